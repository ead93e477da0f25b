"""Checks and proof: what is wrong with each shard, and with all of them together.

Input: the paths of the shards and, for a proof, the source that they were packed from. A shard that
equals, byte for byte, what the source makes of it is not looked at twice.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import multiprocessing
import os
import signal
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from sharding.archive import Damaged, read_members
from sharding.batch import in_order
from sharding.errors import PackError
from sharding.faults import SHOWN, Report
from sharding.pack import write_samples
from sharding.places import dataset_at, source_at
from sharding.samples import (
    RESERVED_FOLDER,
    Fields,
    Listing,
    Sample,
    Samples,
    deal,
    judge,
    split_name,
)
from sharding.shards import shard_name, shard_number
from sharding.urls import is_url

NO_SAMPLES = Samples([], ())
MISPLACED = "sample in another shard than this source and its flags say"

Fault = tuple[str, str, str]  # its kind, the name of a shard, key, member or file; what is shown


class Faults:
    """What is wrong: counted, and written to a report; the first few of a kind are kept."""

    def __init__(self, report: Report | None = None) -> None:
        self.report = report or Report()
        self.numbers: Counter[str] = Counter()
        self.shown: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str, text: str) -> None:
        """Note a fault."""
        self.numbers[kind] += 1
        self.report.add(name, kind, text)
        if len(self.shown[kind]) < SHOWN:
            self.shown[kind].append(text)


class Task(NamedTuple):
    """What a process needs to check one shard."""

    path: str
    decode: bool = False
    source: str = ""
    samples: Samples = NO_SAMPLES  # that the source, if any, has for this shard


class Checked(NamedTuple):
    """What a shard holds, and what is wrong with it."""

    path: str
    size: int
    keys: Sequence[str]  # in order; none where it is proved: they are those of the source
    samples: int
    # Fields -> how many keys have them, and these, unless the shard is proved.
    field_sets: Mapping[tuple[str, ...], tuple[int, Sequence[str]]]
    faults: Sequence[Fault]
    empty: int = 0  # texts, as far as they were decoded
    sound: bool = True  # webdataset can read it
    proved: bool = False  # byte for byte what the source makes it


# ---------------------------------------------------------------- a dataset


def check_dataset(
    shards: Sequence[str],
    faults: Faults,
    *,
    fields: Fields,
    listing: Listing | None = None,
    decode: bool = False,
    num_workers: int = 1,
    whole: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> list[Checked]:
    """Check every shard, and what only shows across shards.

    Args:
        shards: their paths, in order.
        faults: takes what is wrong.
        fields: what samples may have; if all fit, their fields may differ.
        listing: what the shards must hold, each sample once.
        decode: decode every image, text, number and JSON in full.
        num_workers: processes.
        whole: these must be all shards of a dataset; else none is missed.
        progress: called for each shard that is done.

    Raises:
        PackError: a process was killed.
    """
    gc.freeze()  # else the collector of each process looks at the whole listing again and again
    listed = listing.samples if listing else NO_SAMPLES  # never an empty one
    source = listing.source if listing else ""
    total = count_shards(shards, listed)
    tasks = (
        Task(shard, decode, source, deal(listed, shard_number(shard), total)) for shard in shards
    )
    here = set(map(shard_number, shards))
    for number in sorted(set(range(total)) - here) if whole else ():
        faults.add("missing shard", shard_name(number), shard_name(number))
    folders = {os.path.dirname(shard) for shard in shards}
    label = os.path.basename if len(folders) == 1 else str  # of a shard, in messages
    reports: list[Checked] = []
    try:
        # A process that is forked from one that used a store cannot use it.
        method = "spawn" if is_url(shards[0]) or is_url(source) else None
        for report in _check_in_parallel(tasks, min(num_workers, len(shards)), method):
            progress()
            reports.append(report)
            for kind, name, text in report.faults:
                faults.add(kind, name, f"{label(report.path)}: {text}")
    except BrokenProcessPool:
        reason = "is there memory for --num-workers?"
        raise PackError(f"a checking process was killed; {reason}") from None
    compare_fields(reports, fields, faults, label)
    compare_shards(reports, listed, total, faults, label)
    return reports


def _check_in_parallel(
    tasks: Iterator[Task], num_workers: int, method: str | None
) -> Iterator[Checked]:
    """Yield the report of each task, in order, from this process or from several."""
    if num_workers == 1:
        yield from map(check_shard, tasks)
        return
    ignore = signal.SIGINT, signal.SIG_IGN
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(num_workers, context, signal.signal, ignore)
    try:
        yield from in_order(pool, check_shard, tasks, 2 * num_workers)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()  # else the end of the pool waits until their shards are checked
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def count_shards(shards: Sequence[str], listed: Samples) -> int:
    """Return how many shards the dataset must have had: the last ones may be missing.

    The second key of a shard lies `total` places behind its first in the source.
    """
    total = shard_number(shards[-1]) + 1
    for shard in shards[:5] if listed else ():
        number, keys = shard_number(shard), _first_keys(shard)
        second = (place for place, key in enumerate(listed.keys) if key in keys[1:2])
        step = next(second, 0) - number
        if step > 0 and deal(listed.keys, number, step)[: len(keys)] == keys:
            return max(total, step)  # else damaged, or of another source
    return total


def _first_keys(shard: str) -> list[str]:
    """Return the keys of the first few members of a shard, in order."""
    keys: dict[str, None] = {}
    with dataset_at(shard).open_shard(shard) as (stream, size, _), contextlib.suppress(Damaged):
        for name, _ in islice(read_members(stream, size), 64):
            keys[split_name(name)[0] or ""] = None
    return list(keys)


def compare_shards(
    reports: Sequence[Checked],
    listed: Samples,
    total: int,
    faults: Faults,
    label: Callable[[str], str],
) -> None:
    """Note keys in two shards, and what a source has that they have not."""
    places: dict[str, str] = {}
    for report in reports:
        name = label(report.path)
        for key in report.keys:
            if key in places and places[key] != name:
                faults.add("key in two shards", key, f"{key!r} in {places[key]} and {name}")
            places[key] = name
    if not listed:
        return
    proved = {os.path.basename(report.path) for report in reports if report.proved}
    for number in range(total):
        home = shard_name(number)
        for sample in deal(listed, number, total):
            found = places.pop(sample.key, None)
            if home in proved:
                if found:
                    text = f"{sample.key!r} in {home} and {found}"
                    faults.add("key in two shards", sample.key, text)
            elif not found:
                faults.add("missing sample", sample.key, f"{sample.key!r} of {home}")
            elif found != home:
                text = f"{sample.key!r} is in {found}, not {home}"
                faults.add(MISPLACED, sample.key, text)
    for key, name in places.items():
        faults.add("extra sample, not in the source", key, f"{key!r} in {name}")


def compare_fields(
    reports: Sequence[Checked], fields: Fields, faults: Faults, label: Callable[[str], str]
) -> None:
    """Note samples that have other fields than most, unless all are as `fields` says."""

    def shape(found: tuple[str, ...]) -> tuple[str, ...] | Fields:
        fit = fields.known().issuperset(found) and judge(found, fields)[0] is None
        return fields if fit else found

    shapes: Counter[tuple[str, ...] | Fields] = Counter()
    for report in reports:
        for found, (number, _) in report.field_sets.items():
            shapes[shape(found)] += number
    usual = shapes.most_common(1)[0][0] if shapes else ()
    kind = "fields differ from those of other samples; --fields and --optional-fields may allow it"
    for report in reports:
        for found, (_, keys) in report.field_sets.items():
            for key in keys if shape(found) != usual else ():
                text = f"{label(report.path)}: {key!r} has {', '.join(found)}"
                faults.add(kind, key, text)


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


def check_shard(task: Task) -> Checked:
    """Check one shard: as a whole, if the source says what it must be, or member by member."""
    with dataset_at(task.path).open_shard(task.path, 1 << 16) as (stream, size, _):
        if task.samples and not task.decode:
            try:
                write_samples(Comparison(stream), task.source, task.samples)
                if not stream.read(1):
                    sets = Counter(map(_fields, task.samples))
                    field_sets = {fields: (number, ()) for fields, number in sets.items()}
                    return Checked(
                        task.path, size, (), len(task.samples), field_sets, (), proved=True
                    )
            except Damaged:
                stream.seek(0)
        return take_apart(task, stream, size)


def take_apart(task: Task, stream: BinaryIO, size: int) -> Checked:
    """Read a shard member by member, and note what is wrong with it."""
    faults: list[Fault] = []
    keys: list[str] = []
    field_sets: dict[tuple[str, ...], list[str]] = defaultdict(list)
    empty = 0
    expected = {sample.key: sample for sample in task.samples}
    current: set[str] = set()
    seen: set[str] = set()
    shard = os.path.basename(task.path)

    def finish_sample() -> None:
        if keys:
            found, key = tuple(sorted(current)), keys[-1]
            field_sets[found].append(key)
            sample = expected.get(key)
            if sample and found != _fields(sample):
                faults.append(("fields differ from the source", key, repr(key)))
        current.clear()

    sound = False
    try:
        for name, length in read_members(stream, size):
            key, field = split_name(name)
            if field is not None and field.startswith("__"):
                raise Damaged(f"member {name!r}, whose field is reserved")
            if key is None or field is None or RESERVED_FOLDER.match(name):
                faults.append(("member that readers drop", name, repr(name)))
                continue
            if not keys or key != keys[-1]:
                finish_sample()
                if key in seen:
                    faults.append(("key occurs twice", key, repr(key)))
                seen.add(key)
                keys.append(key)
            if field.lower() in current:
                raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
            current.add(field.lower())
            member = f"{key}.{field.lower()}"
            file = _file_of(expected.get(key), member)
            if file is not None:
                faults.extend(_compare_content(task.source, file, member, stream, length))
            if task.decode:
                problems = _decode_content(member, stream, length)
                faults.extend((kind, file or member, text) for kind, text in problems)
                empty += not length and _ending(member) in TEXTS
        sound = True
        if not keys:
            faults.append(("empty shard", shard, "which makes some readers fail"))
    except Damaged as error:
        faults.append(("damaged", shard, str(error)))
    finish_sample()
    sets = {fields: (len(having), having) for fields, having in field_sets.items()}
    return Checked(task.path, size, keys, len(keys), sets, faults, empty, sound)


def _fields(sample: Sample) -> tuple[str, ...]:
    return tuple(extension.lower() for extension in sample.extensions)


def _file_of(sample: Sample | None, member: str) -> str | None:
    """Return the file below the source of which a member was made, if there is a source."""
    return dict(zip(sample.members(), sample.files(), strict=True)).get(member) if sample else None


def _compare_content(
    source: str, path: str, member: str, stream: BinaryIO, length: int
) -> Iterator[Fault]:
    """Yield what is wrong with a member's content, compared with its file; the stream stays."""
    with source_at(source).open_file(source, path) as (file, size):
        start = stream.tell()
        pieces = iter(lambda: file.read(1 << 20), b"")
        if size != length or any(piece != stream.read(len(piece)) for piece in pieces):
            yield "bytes differ from the source", path, repr(member)
        stream.seek(start)


# What webdataset's decoders make of fields (`webdataset/autodecode.py`), but for images.
TEXTS = {"txt", "text", "transcript"}
DECODERS: dict[str, Callable[[bytes], object]] = {
    **dict.fromkeys(TEXTS, lambda data: data.decode("utf-8")),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
}


def _ending(member: str) -> str:
    return member.rpartition(".")[2]


def decodes(field: str) -> bool:
    """Tell whether a field is one that `_decode_content` decodes."""
    from sharding import images

    ending = _ending(field.removesuffix(".gz"))
    return ending in DECODERS or images.is_image(ending)


def _decode_content(member: str, stream: BinaryIO, length: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a member that webdataset decodes: its kind, and what is shown."""
    from sharding import images  # here: Pillow is needed for this alone

    shown, kind = member, "field that cannot be decoded"
    try:
        if _ending(member) == "gz":
            member, stream = member[:-3], io.BytesIO(gzip.decompress(stream.read(length)))
            length = len(stream.getbuffer())
        if decoder := DECODERS.get(_ending(member)):
            decoder(stream.read(length))
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield kind, f"{shown!r} ({type(error).__name__}: {error})"[:200]
        return
    if images.is_image(member):
        large = length > images.MAX_IMAGE
        data = b"" if large else stream.read(length)
        problem = "too large" if large else images.use_image(data, images.decode)[1]
        if problem:
            yield "image that cannot be decoded", f"{member!r} ({problem})"
