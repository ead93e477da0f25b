"""Checks and proof: what is wrong with each shard, and with all of them together.

In come the paths of the shards and, for a proof, the source that they were packed from. A shard
that is byte for byte what the source makes it is not looked at twice.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from sharding.archive import Damaged, read_members
from sharding.errors import PackError, naming
from sharding.files import in_order
from sharding.samples import (
    RESERVED_FOLDER,
    Sample,
    deal,
    list_samples,
    parse_fields,
    split_name,
)
from sharding.shards import shard_name, shard_number, write_samples

MISPLACED = "sample in another shard than this source and its flags say"

Faults = defaultdict[str, list[str]]  # what is wrong -> where


class Task(NamedTuple):
    """What a process needs to check one shard."""

    path: str
    decode: bool = False
    source: str | os.PathLike[str] = ""
    samples: Sequence[Sample] = ()  # that the source, if any, has for this shard


class Report(NamedTuple):
    """What a shard holds, and what is wrong with it."""

    path: str
    size: int
    keys: Sequence[str]  # in order; none where it is proved: they are those of the source
    samples: int
    field_sets: Mapping[tuple[str, ...], str]  # fields -> a key that has them
    faults: Sequence[tuple[str, str]]  # kind and detail of each
    sound: bool = True  # webdataset can read it
    proved: bool = False  # byte for byte what the source makes it


# ---------------------------------------------------------------- a dataset


def check_dataset(
    shards: Sequence[str],
    faults: Faults,
    *,
    source: str | os.PathLike[str] | None = None,
    fields: str | Iterable[str] = ("jpg", "txt"),
    skip_incomplete: bool = False,
    shuffle: int | None = None,
    decode: bool = False,
    num_workers: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> list[Report]:
    """Check every shard, and what only shows across shards.

    Args:
        shards: their paths, in order.
        faults: takes what is wrong.
        source: what the shards must hold, each sample once; with the flags of `list_samples`.
        decode: decode every image in full.
        num_workers: processes.
        progress: called for each shard that is done.

    Raises:
        InputError: the source is refused.
        PackError: a process was killed.
    """
    listed: Sequence[Sample] = ()  # a source that holds none is refused
    if source is not None:
        listed = list_samples(source, parse_fields(fields), skip_incomplete, shuffle).samples
    total = count_shards(shards, listed)
    tasks = (
        Task(shard, decode, source or "", deal(listed, shard_number(shard), total))
        for shard in shards
    )
    for number in sorted(set(range(total)) - set(map(shard_number, shards))):
        faults["missing shard"].append(shard_name(number))
    reports: list[Report] = []
    try:
        for report in _check_in_parallel(tasks, min(num_workers, len(shards))):
            progress()
            reports.append(report)
            for kind, detail in report.faults:
                faults[kind].append(f"{os.path.basename(report.path)}: {detail}")
    except BrokenProcessPool:
        reason = "is there memory for --num-workers?"
        raise PackError(f"a checking process was killed; {reason}") from None
    compare_shards(reports, listed, total, faults)
    return reports


def _check_in_parallel(tasks: Iterator[Task], num_workers: int) -> Iterator[Report]:
    """Yield the report of each task, in order, from this process or from several."""
    if num_workers == 1:
        yield from map(check_shard, tasks)
        return
    ignore = signal.SIGINT, signal.SIG_IGN
    pool = ProcessPoolExecutor(num_workers, initializer=signal.signal, initargs=ignore)
    try:
        yield from in_order(pool, check_shard, tasks, 2 * num_workers)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()  # else the end of the pool waits until their shards are checked
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def count_shards(shards: Sequence[str], listed: Sequence[Sample]) -> int:
    """Return how many shards the dataset must have had: the last ones may be missing.

    The second key of a shard lies `total` places behind its first in the source.
    """
    total = shard_number(shards[-1]) + 1
    for shard in shards[:5] if listed else ():
        number, keys = shard_number(shard), _first_keys(shard)
        second = (place for place, sample in enumerate(listed) if sample.key in keys[1:2])
        step = next(second, 0) - number
        if step > 0 and [s.key for s in deal(listed, number, step)][: len(keys)] == keys:
            return max(total, step)  # else damaged, or of another source
    return total


def _first_keys(shard: str) -> list[str]:
    """Return the keys of the first few members of a shard, in order."""
    keys: dict[str, None] = {}
    with open(shard, "rb") as stream, contextlib.suppress(Damaged):
        members = read_members(stream, os.fstat(stream.fileno()).st_size)
        for name, _ in islice(members, 64):
            keys[split_name(name)[0] or ""] = None
    return list(keys)


def compare_shards(
    reports: Sequence[Report], listed: Sequence[Sample], total: int, faults: Faults
) -> None:
    """Note keys in two shards, differing fields, and what a source has that they have not."""
    places: dict[str, str] = {}
    for report in reports:
        name = os.path.basename(report.path)
        for key in report.keys:
            if key in places and places[key] != name:
                faults["key in two shards"].append(f"{key!r} in {places[key]} and {name}")
            places[key] = name
    field_sets = Counter(fields for report in reports for fields in report.field_sets)
    usual = field_sets.most_common(1)[0][0] if field_sets else ()
    for report in reports:
        for fields, key in report.field_sets.items():
            if fields != usual:
                detail = f"{os.path.basename(report.path)}: {key!r} has {', '.join(fields)}"
                faults["fields differ from those of other samples"].append(detail)
    if not listed:
        return
    proved = {os.path.basename(report.path) for report in reports if report.proved}
    for number in range(total):
        home = shard_name(number)
        for sample in deal(listed, number, total):
            found = places.pop(sample.key, None)
            if home in proved:
                if found:
                    faults["key in two shards"].append(f"{sample.key!r} in {home} and {found}")
            elif not found:
                faults["missing sample"].append(f"{sample.key!r} of {home}")
            elif found != home:
                faults[MISPLACED].append(f"{sample.key!r} is in {found}, not {home}")
    for key, name in places.items():
        faults["extra sample, not in the source"].append(f"{key!r} in {name}")


def identify(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return what tells these shards from others that take their places."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)]


# ---------------------------------------------------------------- one shard


class Comparison(io.BytesIO):
    """A stream to write to that compares what is written with what a file holds."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream = stream

    def write(self, data: Any) -> int:
        """Compare the next bytes."""
        if self.stream.read(len(data)) != data:
            raise Damaged("differs")
        return len(data)


def check_shard(task: Task) -> Report:
    """Check one shard: as a whole, if the source says what it must be, or member by member."""
    with naming(task.path), open(task.path, "rb", buffering=1 << 16) as stream:
        size = os.fstat(stream.fileno()).st_size
        if task.samples and not task.decode:
            try:
                write_samples(Comparison(stream), task.source, task.samples)
                if not stream.read(1):
                    usual = {_fields(task.samples[0]): task.samples[0].key}
                    return Report(task.path, size, (), len(task.samples), usual, (), proved=True)
            except Damaged:
                stream.seek(0)
        return take_apart(task, stream, size)


def take_apart(task: Task, stream: BinaryIO, size: int) -> Report:
    """Read a shard member by member, and note what is wrong with it."""
    faults: list[tuple[str, str]] = []
    keys: list[str] = []
    field_sets: dict[tuple[str, ...], str] = {}
    expected = {sample.key: sample for sample in task.samples}
    current: set[str] = set()
    seen: set[str] = set()

    def finish_sample() -> None:
        if keys:
            field_sets.setdefault(tuple(sorted(current)), keys[-1])
            sample = expected.get(keys[-1])
            if sample and tuple(sorted(current)) != _fields(sample):
                faults.append(("fields differ from the source", repr(keys[-1])))
        current.clear()

    sound = False
    try:
        for name, length in read_members(stream, size):
            key, field = split_name(name)
            if field is not None and field.startswith("__"):
                raise Damaged(f"member {name!r}, whose field is reserved")
            if key is None or field is None or RESERVED_FOLDER.match(name):
                faults.append(("member that readers drop", repr(name)))
                continue
            if not keys or key != keys[-1]:
                finish_sample()
                if key in seen:
                    faults.append(("key occurs twice", repr(key)))
                seen.add(key)
                keys.append(key)
            if field.lower() in current:
                raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
            current.add(field.lower())
            member = f"{key}.{field.lower()}"
            if sample := expected.get(key):
                faults.extend(_compare_content(task.source, sample, member, stream, length))
            if task.decode:
                faults.extend(_decode_content(member, stream, length))
        sound = True
        if not keys:
            faults.append(("empty shard", "which makes some readers fail"))
    except Damaged as error:
        faults.append(("damaged", str(error)))
    finish_sample()
    return Report(task.path, size, keys, len(keys), field_sets, faults, sound)


def _fields(sample: Sample) -> tuple[str, ...]:
    return tuple(extension.lower() for extension in sample.extensions)


def _compare_content(
    source: str | os.PathLike[str], sample: Sample, member: str, stream: BinaryIO, length: int
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a member's content, compared with its file; the stream stays."""
    if member not in sample.members():
        return
    path = sample.files()[sample.members().index(member)]
    with open(os.path.join(source, path), "rb") as file:
        start = stream.tell()
        pieces = iter(lambda: file.read(1 << 20), b"")
        left = length - os.fstat(file.fileno()).st_size
        if left or any(piece != stream.read(len(piece)) for piece in pieces):
            yield "bytes differ from the source", repr(member)
        stream.seek(start)


def _decode_content(member: str, stream: BinaryIO, length: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a member that is an image."""
    from sharding import images  # here: Pillow is needed for this alone

    if images.is_image(member):
        large = length > images.MAX_IMAGE
        data = b"" if large else stream.read(length)
        problem = "too large" if large else images.use_image(data, images.decode)[1]
        if problem:
            yield "image that cannot be decoded", f"{member!r} ({problem})"
