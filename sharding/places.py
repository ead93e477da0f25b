"""Where things are: picks the module for a folder, or the one for a bucket, by the path alone.

The two offer the same names, so nothing else needs to know which of them it works with.
"""

from __future__ import annotations

import os
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from sharding.shards import Found, NewShard
from sharding.urls import is_url

if TYPE_CHECKING:
    from sharding.batch import Batch
    from sharding.listing import Listing
    from sharding.plan import Plan
    from sharding.samples import Samples
    from sharding.scan import Scan


class Dataset(Protocol):
    """A dataset: shards that are published in one place."""

    def find_shards(self, path: str) -> Found:
        """Return the shards in a place, or those that a pattern such as "out/shard-00*.tar" names.

        Raises:
            InputError: there are none.
            PackError: a run is not finished there.
        """

    def identify(self, shards: list[str]) -> object:
        """Return what distinguishes these shards from others that replace them."""

    def open_shard(
        self, path: str, buffering: int = ...
    ) -> AbstractContextManager[tuple[BinaryIO, int, Any]]:
        """Open a shard, which can seek; the context gives stream, size in bytes, and version.

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


class Output(Protocol):
    """Where shards are written: by a run, or single ones."""

    def check_output(self, output: str, listing: Listing) -> None:
        """Refuse an output where writing shards would fail or overwrite something.

        Raises:
            InputError: nothing was written.
        """

    def prepare(self, output: str, shard_ids: Container[int], total_shards: int) -> None:
        """Prepare for single shards that are written without a run."""

    def settle(self, output: str) -> None:
        """End what `prepare` began."""

    def begin(
        self, output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
    ) -> tuple[str, Plan, int]:
        """Begin a run: the only one there; what others left is finished, taken over or cleared.

        Args:
            resume, replace: see `run.start`.

        Returns:
            How the run is named from now on; its plan with the digest of its samples; a
            descriptor that holds its lock, or -1.

        Raises:
            PackError: another run is at work there.
            InputError: shards that another run had finished would be lost.
        """

    def read_plan(self, folder: str) -> Plan:
        """Return the plan of a run."""

    def read_shards(self, folder: str, shard_ids: Iterable[int]) -> Iterator[Samples]:
        """Yield the samples of each of these shards of a run."""

    def left_shards(self, folder: str) -> Mapping[int, Sequence[object]]:
        """Return what an interrupted run had finished: by the number of the shard."""

    def find_kept(self, folder: str, shard_id: int, stamp: str) -> tuple[str, int] | None:
        """Return path and size of one of these, if it has this stamp; delete its other versions."""

    def new_shard(self, folder: str, shard_id: int) -> AbstractContextManager[NewShard]:
        """Write a shard: it appears when the context ends, whole, or not at all.

        Raises:
            PackError, OSError: it could not be written.
        """

    def kept_shards(self, folder: str) -> list[int]:
        """Return which finished shards an earlier run had packed."""

    def count_published(self, output: str) -> int:
        """Return how many shards a run would replace."""

    def publish(self, folder: str, plan: Plan) -> list[int]:
        """Make the shards of a run the dataset; return their sizes in bytes.

        Raises:
            PackError: some are missing; the previous dataset, if any, is untouched.
        """

    def finish_cut(self, folder: str) -> bool:
        """Finish a run that was cut short while it was publishing; tell whether there was one."""

    def lock_output(self, output: str) -> int:
        """Take the lock of an output for publishing; return what holds it, or -1."""

    def may_write(self, folder: str) -> bool:
        """Tell whether shards of a run may be written from here, as far as that can be told."""


class Source(Protocol):
    """Where the raw files of samples are."""

    def list_files(self, scan: Scan) -> None:
        """List all files below a source, and tell the scan of each.

        Raises:
            InputError: the source cannot be listed.
        """

    def may_read(self, source: str, paths: list[str]) -> bool:
        """Tell whether these files may be read, as far as that can be told without reading."""

    def listed_bytes(self, samples: Samples) -> int:
        """Return the bytes that must be fetched to pack these samples."""

    def read_batches(self, source: str, samples: Samples) -> Generator[Batch, None, None]:
        """Yield all samples in order, a batch at a time, read ahead where files open slowly.

        Raises:
            PackError: a file was changed since it was listed, or while it was read.
            OSError: a file cannot be read; it names the file.
        """

    def stamp_of(self, source: str, samples: Samples) -> str:
        """Return the stamp of samples as they are now; reading them gives it if none changed."""

    def open_file(self, source: str, path: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """Open one file, of any size; the context gives the stream and its size in bytes."""


def dataset_at(path: str | os.PathLike[str]) -> Dataset:
    """Return the module that finds and opens shards there."""
    if is_url(path, "path"):
        from sharding.bucket import dataset as bucket

        return bucket
    from sharding.folder import dataset as folder

    return folder


def source_at(path: str | os.PathLike[str]) -> Source:
    """Return the module that lists and reads a source there."""
    if is_url(path, "source"):
        from sharding.bucket import source as objects

        return objects
    from sharding.folder import source as files

    return files


def output_at(path: str | os.PathLike[str]) -> Output:
    """Return the module that writes shards there."""
    if is_url(path, "output"):
        from sharding.bucket import run as bucket_run

        return bucket_run
    from sharding.folder import run as folder_run

    return folder_run
