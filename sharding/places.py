"""Where things are: picks the module for a folder, a bucket or archives, by the path.

They offer the same names, so nothing else needs to know which of them it works with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Generator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

from sharding.batch import Batch
from sharding.errors import InputError
from sharding.plan import Plan, Published
from sharding.samples import Listing, Sample, Samples
from sharding.scan import Scan
from sharding.shards import Found, Left, NewShard
from sharding.urls import is_url, names_archives


class Dataset(Protocol):
    """A dataset: shards that are published in one place."""

    REMOTE: bool  # files have no paths, and processes that read there must not fork

    def find_shards(self, path: str) -> Found:
        """Return the shards in a place, or those that a pattern such as "out/shard-00*.tar" names.

        Raises:
            InputError: there are none.
            PackError: a run is not finished there.
        """

    def match(self, pattern: str, name: str, /) -> list[str]:
        """Return the files that a path, a pattern, or one with braces names, whatever they hold.

        Args:
            name: of the argument that gave it, for the error.

        Raises:
            InputError: it names none, or one of its braces' alternatives does; or no file.
        """

    def identify(self, shards: list[str]) -> object:
        """Return what distinguishes these shards from others that replace them."""

    def open_shard(
        self, path: str, buffering: int = ...
    ) -> AbstractContextManager[tuple[BinaryIO, int, Any]]:
        """Open a shard, which can seek; the context gives stream, size in bytes, and version.

        The version is plain JSON, but for tuples.

        Raises:
            PackError: the shard was replaced while it was read.
        """

    def read_range(self, path: str, offset: int, size: int, version: Any) -> bytes:
        """Return a part of a shard.

        Raises:
            PackError: it is of another version than the one that was opened before.
        """

    def shard_size(self, path: str) -> int:
        """Return the size of a shard in bytes."""

    def read_record(self, path: str) -> bytes | None:
        """Return the record in a folder, or at a prefix, if there is one; see record.py."""

    def write_record(self, path: str, data: bytes | None) -> None:
        """Put a record there, whole or not at all, or take it away."""


class Output(Protocol):
    """Where shards are written: by a run, or single ones."""

    def check_output(self, output: str, listing: Listing) -> None:
        """Refuse an output where writing shards would fail or overwrite something.

        Raises:
            InputError: nothing was written.
        """

    def prepare(self, output: str, shard_ids: Container[int], total_shards: int) -> None:
        """Prepare for single shards that are written without a run.

        Raises:
            PackError: a run is not finished there.
        """

    def begin(
        self, output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
    ) -> tuple[str, Plan, int | None]:
        """Begin a run: the only one there; what dead runs left is finished, taken over or cleared.

        Returns:
            The path of the run: the name by which all others know it; its plan with the digest of
            its samples; a descriptor that holds its lock, if locks are descriptors there.

        Raises:
            InputError: shards that a dead run had finished would be lost.
            PackError: another run is at work there, or may be.
        """

    def read_plan(self, run: str, /) -> Plan:
        """Return the plan of a run."""

    def read_samples(self, run: str, shard_id: int, /) -> Samples:
        """Return the samples of a shard of a run."""

    def find_left(self, run: str, shard_id: int, stamp: Callable[[], str], /) -> Left | None:
        """Return what a dead run had finished of a shard, if anything; delete what is outdated.

        Args:
            stamp: gives that of the samples, if it is needed.
        """

    def new_shard(self, path: str, shard_id: int, /) -> AbstractContextManager[NewShard]:
        """Write a shard of a run, or straight into an output: it appears when the context ends.

        Raises:
            PackError, OSError: it could not be written; it does not appear.
        """

    def publish(self, run: str, lock: int | None, /) -> Published:
        """Make the shards of a run the dataset.

        Args:
            lock: what `begin` gave; None where another process began the run.

        Raises:
            PackError: some are missing; the previous dataset, if any, is untouched.
            AlreadyDone: the run was cut short while it was published, which is finished now.
        """


class Source(Protocol):
    """Where the raw files of samples are."""

    NOTHING: str  # what is said of an empty one; "{cure}" stands for the usual cure

    def list_files(self, scan: Scan) -> None:
        """List all files below a source, and hand their names to the scan, folder by folder.

        Raises:
            InputError: the source cannot be listed.
        """

    def read_batches(self, source: str, samples: Samples) -> Generator[Batch, None, None]:
        """Yield all samples in order, a batch at a time, read ahead where that is faster.

        Raises:
            PackError: a file was changed since it was listed, or while it was read.
            OSError: a file cannot be read; it names the file.
        """

    def stamp_of(self, source: str, samples: Samples) -> str:
        """Return the stamp of samples as they are now; reading them gives it if none changed."""

    def open_file(
        self, source: str, sample: Sample, path: str
    ) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """Open one file of a sample, of any size; the context gives stream and size in bytes."""


def waits(*paths: str | os.PathLike[str] | None) -> bool:
    """Tell whether requests are made there, which wait for their answers and notice no Ctrl-C."""
    try:
        return any(is_url(path) for path in paths if path)
    except InputError:  # which is said by name, when the path is used
        return False


def dataset_at(path: str | os.PathLike[str]) -> Dataset:
    """Return the module that finds and opens shards there."""
    if is_url(path, "path"):
        from sharding.bucket import dataset as in_bucket

        return in_bucket
    from sharding.folder import dataset as in_folder

    return in_folder


def source_at(path: str | os.PathLike[str]) -> Source:
    """Return the module that lists and reads a source there."""
    if is_url(path, "source") and not names_archives(path):
        from sharding.bucket import source as in_bucket

        return in_bucket
    if names_archives(path):
        from sharding.tars import source as in_archives

        return in_archives
    from sharding.folder import source as in_folder

    return in_folder


def output_at(path: str | os.PathLike[str]) -> Output:
    """Return the module that writes shards there."""
    if is_url(path, "output"):
        from sharding.bucket import run as in_bucket

        return in_bucket
    from sharding.folder import run as in_folder

    return in_folder
