"""A shard: its number and its name; everything that finds, stages or replaces shards asks here."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from sharding.errors import InputError
from sharding.messages import argument, count, warn

DIGITS = 6  # of the number in a shard's name
MAX_SHARDS = 10**DIGITS
_NUMBERED = rf"shard-([0-9]{{{DIGITS}}})"
SHARD_PATTERN = re.compile(rf"{_NUMBERED}\.tar")
STAMPED = r"([0-9a-f]{32})(?:[.]([0-9]+))?"  # see `stamped`
STAGED_PATTERN = re.compile(rf"{_NUMBERED}\.{STAMPED}")  # of a folder's run
STRAY_PATTERN = re.compile(r"shard-.*\.tar", re.DOTALL)  # what readers glob
PARTIAL_PATTERN = re.compile(rf"\.{_NUMBERED}-[0-9a-f]{{8}}")
STRAY = "stray file, which readers may take for a shard"
REPLACED = "it was replaced while it was read"

Progress = Callable[[int], object]  # is told how many more samples are done


@dataclasses.dataclass
class Shard:
    """What packing one shard did."""

    shard_id: int
    samples: int  # that are packed
    bytes: int = 0  # size of the tar file
    path: str = ""
    how: str = "created"  # or, of a dead run, "kept", or "created again" where files changed
    packed: PackedShard | None = None  # its tar is written, but it is not stored yet
    dropped: int = 0  # samples that a function of the user's left out

    def store(self) -> Shard:
        """Store the shard and give it its name, unless that was done.

        That waits for a disk or a store about as long as it takes to pack a small shard, so another
        thread can do it while the next one is packed.

        Raises:
            PackError, OSError: it failed; no shard appeared.
        """
        if self.packed:
            packed, self.packed = self.packed, None
            self.path, self.bytes = packed.store()
        return self

    def report(self) -> str:
        """Return the line that says what became of the shard."""
        return f"Shard {self.shard_id} {self.how} with {self.samples} samples."


class PackedShard(NamedTuple):
    """A shard whose tar is written."""

    new: NewShard
    storing: contextlib.ExitStack  # stores it

    def store(self) -> tuple[str, int]:
        """Store the shard; return its path and its size in bytes."""
        self.storing.close()
        return self.new.path, self.new.size


class NewShard:
    """A shard that is being written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.stamp = ""  # see `stamped`; if it waits in a run until all shards are there
        self.path = ""  # this and the next are known once it is whole
        self.size = 0
        self.fields: Mapping[str, int] = {}  # of a run with a function: those that came out of it
        self.before: Callable[[], object] = lambda: None  # called when only its name is lacking


class Left(NamedTuple):
    """A shard that a dead run had finished."""

    path: str = ""  # empty if its files have changed since
    size: int = 0
    dropped: int = 0  # samples


class Found(NamedTuple):
    """What there is at a path."""

    shards: list[str]  # their paths, in order
    faults: list[tuple[str, str]]  # what is wrong: kind and name
    whole: bool  # these must be all shards of a dataset; else a pattern chose them
    record: bytes | None = None  # of such a dataset, if it has one; see record.py
    sizes: Sequence[int] = ()  # of the shards, where there is a record


def shard_name(shard_id: int) -> str:
    """Return the file name of a shard: 7 -> 'shard-000007.tar'."""
    return f"shard-{shard_id:0{DIGITS}d}.tar"


def stamped(stamp: str, dropped: int | None) -> str:
    """Return what the name of a staged shard says of it: the stamp of its files, samples dropped.

    So the count lives as long as the shard: neither a kill nor another process loses it. None: no
    function has made it.
    """
    return stamp if dropped is None else f"{stamp}.{dropped}"


def shard_number(path: str) -> int:
    """Return the number in a shard's name: 'folder/shard-000007.tar' -> 7."""
    return int(path[-DIGITS - 4 : -4])


def warn_of_strays(output: str, noun: str, strays: Sequence[str]) -> None:
    """Warn if an output holds names that match STRAY_PATTERN but are no shard's."""
    if strays:
        found = f"{count(len(strays), noun)} ({min(strays)!r})"
        warn(f"{output!r} has {found} not named like its shards, which readers may take for some")


def beyond(names: Iterable[str], total_shards: int) -> list[str]:
    """Return the names of shards that a dataset of so many cannot have."""
    shards = filter(SHARD_PATTERN.fullmatch, names)
    return [name for name in shards if shard_number(name) >= total_shards]


def warn_of_more(output: str, names: Iterable[str], total_shards: int) -> None:
    """Warn if an output holds shards of a dataset that has more than these."""
    if more := beyond(names, total_shards):
        what = f"{min(more)!r}, of a dataset with more than {count(total_shards, 'shard')}"
        cure = f"give the same {argument('total_shards')}, or delete it"
        warn(f"{output!r} also holds {what}; {cure}")


def inside_source(output: str) -> InputError:
    """Return the error that a later run would find these shards in its source."""
    return InputError(
        f"{argument('output')} {output!r} is inside {argument('source')}: a later run would find "
        "the shards there; choose another place"
    )


def no_shards(path: str, names: Iterable[str], cure: str) -> InputError:
    """Return the error that there is no shard among these names."""
    if others := [name for name in names if name.endswith(".tar")]:
        cure = f"{min(others)!r} has another name; shards begin with {shard_name(0)!r}"
    return InputError(f"{argument('path')} {path!r} has no shard-*.tar; {cure}")


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
