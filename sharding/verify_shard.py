"""Checks and proof of one shard: does it equal what the source makes of it, and what is in it?

Input: a task. Output: what the shard holds, and what is wrong with it. A shard that equals, byte
for byte, what the source makes of it is not looked at twice. What shows across shards is in
`verify.py`.
"""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple

from sharding.archive import Damaged
from sharding.decoding import decode_member, is_text
from sharding.pack import write_samples
from sharding.places import dataset_at, source_at
from sharding.reading import KEY, walk
from sharding.samples import Sample, Samples

NO_SAMPLES = Samples([], ())
DAMAGED = "damaged"

Fault = tuple[str, str, str]  # its kind, the name of a shard, key, member or file; what is shown


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


def check_shard(task: Task) -> Checked:
    """Check one shard: as a whole, if the source says what it must be, or member by member."""
    with dataset_at(task.path).open_shard(task.path, 1 << 16) as (stream, size, _):
        if task.samples and not task.decode:
            try:
                write_samples(_Comparison(stream), task.source, task.samples)
                if not stream.read(1):
                    return _proved(task, size)
            except Damaged:
                stream.seek(0)
        return check_members(task, stream, size)


class _Comparison(io.BytesIO):
    """A stream to write to that compares what is written with what a file holds."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream = stream

    def write(self, data: Any) -> int:
        """Compare the next bytes."""
        if self.stream.read(len(data)) != data:
            raise Damaged("differs")
        return len(data)


def _proved(task: Task, size: int) -> Checked:
    sets = Counter(map(_fields, task.samples))
    field_sets = {fields: (number, ()) for fields, number in sets.items()}
    return Checked(task.path, size, (), len(task.samples), field_sets, (), proved=True)


def check_members(task: Task, stream: BinaryIO, size: int) -> Checked:
    """Walk over the members of a shard, and note what is wrong with them."""
    faults: list[Fault] = []
    keys: list[str] = []
    field_sets: dict[tuple[str, ...], list[str]] = defaultdict(list)
    expected = {sample.key: sample for sample in task.samples}
    seen: set[str] = set()
    empty, sound, shard = 0, False, os.path.basename(task.path)

    def drop(name: str) -> None:
        faults.append(("member that readers drop", name, repr(name)))

    try:
        for key, members in groupby(walk(stream, size, drop), KEY):
            if key in seen:
                faults.append(("key occurs twice", key, repr(key)))
            seen.add(key)
            keys.append(key)
            sample, found = expected.get(key), []
            try:
                for _, field, length in members:
                    found.append(field)
                    empty += task.decode and not length and is_text(field)
                    faults += _check_member(task, sample, f"{key}.{field}", stream, length)
            finally:  # also of a sample that is cut short
                fields = tuple(sorted(found))
                field_sets[fields].append(key)
                if sample and fields != _fields(sample):
                    faults.append(("fields differ from the source", key, repr(key)))
        sound = True
        if not keys:
            faults.append(("empty shard", shard, "which makes some readers fail"))
    except Damaged as error:
        faults.append((DAMAGED, shard, str(error)))
    sets = {fields: (len(having), having) for fields, having in field_sets.items()}
    return Checked(task.path, size, keys, len(keys), sets, faults, empty, sound)


def _fields(sample: Sample) -> tuple[str, ...]:
    return tuple(extension.lower() for extension in sample.extensions)


def _check_member(
    task: Task, sample: Sample | None, member: str, stream: BinaryIO, length: int
) -> Iterator[Fault]:
    """Yield what is wrong with the content of a member, which the stream is at.

    Args:
        sample: what the source has under its key, if there is a source that has it.
    """
    files = zip(sample.members(), sample.files(), strict=True) if sample else ()
    file = dict(files).get(member)
    if file is not None:
        start = stream.tell()
        if _differs(task.source, file, stream, length):
            yield "bytes differ from the source", file, repr(member)
        stream.seek(start)
    if task.decode and (problem := decode_member(member, stream, length)):
        kind, text = problem
        yield kind, file or member, text


def _differs(source: str, path: str, stream: BinaryIO, length: int) -> bool:
    """Tell whether the content of a member is not that of a file."""
    with source_at(source).open_file(source, path) as (file, size):
        pieces = iter(lambda: file.read(1 << 20), b"")
        return size != length or any(piece != stream.read(len(piece)) for piece in pieces)
