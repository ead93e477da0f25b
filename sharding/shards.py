"""A shard: its number and name, and how it is written, whole or not at all.

Input: the samples of one shard. Output: one tar file. Kept separate because everything that finds,
stages or replaces shards asks here for their names.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

from sharding.archive import FastTarWriter
from sharding.errors import InputError, argument, count, naming
from sharding.files import new_stamp, read_batches
from sharding.samples import Sample

DIGITS = 6  # of the number in a shard's name
MAX_SHARDS = 10**DIGITS
_NUMBERED = rf"shard-([0-9]{{{DIGITS}}})"
SHARD_PATTERN = re.compile(rf"{_NUMBERED}\.tar")
STAGED_PATTERN = re.compile(rf"{_NUMBERED}\.([0-9a-f]{{32}})")  # see write_shard
STRAY_PATTERN = re.compile(r"shard-.*\.tar", re.DOTALL)  # what readers glob
PARTIAL_PATTERN = re.compile(rf"\.{_NUMBERED}-[0-9a-f]{{8}}")
STRAY = "stray file, which readers may take for a shard"
REPLACED = "it was replaced while it was read"

Progress = Callable[[int], object]  # is told how many more samples are done


class Shard(NamedTuple):
    """What packing one shard did."""

    shard_id: int
    samples: int
    bytes: int  # size of the tar file
    path: str
    how: str = "created"  # or, with --resume, "kept", or "created again" where files changed

    def report(self) -> str:
        """Return the line that says what became of the shard."""
        return f"Shard {self.shard_id} {self.how} with {self.samples} samples."


class Found(NamedTuple):
    """What there is at a path."""

    shards: list[str]  # their paths, in order
    faults: list[tuple[str, str]]  # what is wrong: kind and name
    whole: bool  # these must be all shards of a dataset; else a pattern chose them


def shard_name(shard_id: int) -> str:
    """Return the file name of a shard: 7 -> 'shard-000007.tar'."""
    return f"shard-{shard_id:0{DIGITS}d}.tar"


def shard_number(path: str) -> int:
    """Return the number in a shard's name: 'folder/shard-000007.tar' -> 7."""
    return int(path[-DIGITS - 4 : -4])


def check_shard_numbers(total_shards: int, samples: int, shard_id: int = 0) -> None:
    """Refuse impossible shard numbers; an empty shard makes some readers fail."""
    if not 1 <= total_shards <= MAX_SHARDS:
        raise InputError(f"{total_shards} shards: choose a number from 1 to {MAX_SHARDS:,}")
    if not 0 <= shard_id < total_shards:
        raise InputError(f"{argument('shard_id')} {shard_id} is outside 0 to {total_shards - 1}")
    if total_shards > samples:
        raise InputError(
            f"{total_shards} shards for {count(samples, 'sample')}: choose at most {samples}"
        )


def write_shard(
    source: str | os.PathLike[str],
    samples: Sequence[Sample],
    folder: str | os.PathLike[str],
    shard_id: int,
    progress: Progress | None = None,
    staged: bool = False,
) -> Shard:
    """Write one tar of these samples; it gets its name only when it is whole and on the disk.

    Args:
        staged: the name ends in the stamp of the files instead of ".tar", so that it says what
            the shard was made of, and no reader takes it for one.

    Raises:
        PackError, OSError: packing failed; no shard appeared.
    """
    final = shard_name(shard_id)
    # No reader globs this name, and no two attempts at the same shard share it.
    partial = os.path.join(folder, f".{final[:-4]}-{secrets.token_hex(4)}")
    try:
        with naming(partial), open(partial, "xb", buffering=0) as stream:
            with contextlib.suppress(OSError):  # tells others that it is no leftover
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stamp = write_samples(stream, source, samples, progress)
            os.fsync(stream.fileno())
            size = os.fstat(stream.fileno()).st_size
        path = os.path.join(folder, f"{final[:-4]}.{stamp}" if staged else final)
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    return Shard(shard_id, len(samples), size, path)


def write_samples(
    stream: BinaryIO,
    source: str | os.PathLike[str],
    samples: Sequence[Sample],
    progress: Progress | None = None,
) -> str:
    """Write the tar archive of these samples to a stream.

    Members of a sample lie side by side, named <key>.<field>, as the format asks
    (https://github.com/webdataset/webdataset, "The WebDataset Format"); bytes in, bytes out.

    Returns:
        The stamp of the files: see `stamp_of`.
    """
    seen = new_stamp()
    with (
        contextlib.closing(read_batches(source, samples)) as batches,
        FastTarWriter(stream) as sink,
    ):
        for batch in batches:
            sink.write_members(batch.names, batch.contents)
            seen.update(batch.stamp())
            if progress:
                progress(batch.samples)
    return str(seen.hexdigest())
