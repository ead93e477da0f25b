"""Checks and proof of one shard: does it equal what the source makes of it, and what is in it?

Input: a task. Output: what the shard holds, and what is wrong with it. A shard that equals, byte
for byte, what the source makes of it is not looked at twice. What shows across shards is in
`verify.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple, cast

from sharding.archive import Damaged, Window
from sharding.decoding import decode_member, is_text
from sharding.messages import count
from sharding.pack import write_samples
from sharding.places import dataset_at, source_at
from sharding.reading import KEY, walk
from sharding.record import DISAGREES, Packed
from sharding.samples import Samples, Transform, split_name
from sharding.transform import transformed

NO_SAMPLES = Samples([], ())
DAMAGED = "damaged"

Fault = tuple[str, str, str]  # its kind, the name of a shard, key, member or file; what is shown


class Task(NamedTuple):
    """What a process needs to check one shard."""

    path: str
    decode: bool = False
    source: str = ""
    samples: Samples = NO_SAMPLES  # that the source, if any, has for this shard
    transform: Transform | None = None  # on each of them
    hashing: bool = False  # give the checksum, and the stamp of the files
    due: Packed | None = None  # what the shard must be, by the record


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
    dropped: Sequence[str] = ()  # keys, by the function
    sha256: str = ""  # this and the next: if they were asked for
    stamp: str = ""


def check_shard(task: Task) -> Checked:
    """Check one shard: as a whole, if the source says what it must be, or member by member."""
    with dataset_at(task.path).open_shard(task.path, 1 << 16) as (stream, size, _):
        if task.samples and not task.decode:
            same, samples = _Comparison(stream, task.hashing), task.samples
            transform = task.transform
            with contextlib.suppress(Damaged):
                written = write_samples(same, task.source, samples, transform=transform)
                if not stream.read(1) and written.dropped < len(samples):
                    proved = _proved_of(task, stream, size) if transform else _proved(task, size)
                    sha256 = same.sha256.hexdigest() if task.hashing else ""
                    proved = proved._replace(sha256=sha256, stamp=written.stamp)
                    return _compare_number(task, proved)
            stream.seek(0)
        checked = check_members(task, stream, size)
        if not task.hashing or checked.faults:
            return _compare_number(task, checked)
        stream.seek(0)
        stamp = source_at(task.source).stamp_of(task.source, task.samples)
        checked = checked._replace(sha256=_sha256(stream), stamp=stamp)
        return _compare_number(task, checked)


def _compare_number(task: Task, checked: Checked) -> Checked:
    """Return the same, with a fault if the record says another number of samples."""
    if not task.due or not checked.sound or checked.samples == task.due.samples:
        return checked
    what = f"has {count(checked.samples, 'sample')}, not {task.due.samples:,}"
    fault = (DISAGREES, os.path.basename(task.path), what)
    return checked._replace(faults=[*checked.faults, fault])


def compare_checksum(task: Task) -> Checked:
    """Compare a shard with its checksum, and look at nothing in it."""
    assert task.due
    shard, due = os.path.basename(task.path), task.due
    with dataset_at(task.path).open_shard(task.path) as (stream, size, _):
        wrong = _sha256(stream) != due.sha256
    fault = ("bytes differ from the checksum", shard, f"SHA-256 is not {due.sha256}")
    return Checked(task.path, size, (), due.samples, {}, [fault] if wrong else [])


def _sha256(stream: BinaryIO) -> str:
    seen = hashlib.sha256()
    while piece := stream.read(4 << 20):
        seen.update(piece)
    return seen.hexdigest()


class _Comparison(io.BytesIO):
    """A stream to write to that compares what is written with what a file holds."""

    def __init__(self, stream: BinaryIO, hashing: bool = False) -> None:
        super().__init__()
        self.stream = stream
        self.hashing = hashing
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Compare the next bytes."""
        if self.stream.read(len(data)) != data:
            raise Damaged("differs")
        if self.hashing:
            self.sha256.update(data)
        return len(data)


def _proved(task: Task, size: int) -> Checked:
    sets = Counter(sample.fields() for sample in task.samples)
    field_sets = {fields: (number, ()) for fields, number in sets.items()}
    return Checked(task.path, size, (), len(task.samples), field_sets, (), proved=True)


def _proved_of(task: Task, stream: BinaryIO, size: int) -> Checked:
    """Return what a shard holds that equals what the function makes of the source."""
    sets: Counter[tuple[str, ...]] = Counter()
    keys: set[str] = set()
    stream.seek(0)
    for key, members in groupby(walk(stream, size), KEY):
        keys.add(key)
        sets[tuple(sorted(field for _, field, _ in members))] += 1
    field_sets = {fields: (number, ()) for fields, number in sets.items()}
    dropped = [key for key in task.samples.keys if key not in keys]
    return Checked(task.path, size, (), len(keys), field_sets, (), proved=True, dropped=dropped)


class _Files:
    """What a shard must hold: the files of its samples."""

    def __init__(self, task: Task) -> None:
        self.source = task.source
        self.samples = {sample.key: sample for sample in task.samples}
        self.dropped: Sequence[str] = ()

    def fields(self, key: str) -> tuple[str, ...] | None:
        """Return the fields of a sample; None if the source has no such sample."""
        sample = self.samples.get(key)
        return sample.fields() if sample else None

    def name(self, key: str, field: str) -> str | None:
        """Return the file of which a member was made, if there is one."""
        sample = self.samples.get(key)
        if sample is None:
            return None
        return dict(zip(sample.fields(), sample.files(), strict=True)).get(field)

    def differs(self, key: str, field: str, stream: BinaryIO, length: int) -> bool:
        """Tell whether the content of a member, which the stream is at, is another one."""
        path = self.name(key, field)
        if path is None:
            return False
        opened = source_at(self.source).open_file(self.source, self.samples[key], path)
        with opened as (file, size):
            pieces = iter(lambda: file.read(1 << 20), b"")
            return size != length or any(piece != stream.read(len(piece)) for piece in pieces)


class _Made(_Files):
    """What a shard must hold: what a function makes of its samples."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        assert task.transform
        self.made: dict[str, dict[str, bytes]] = {}  # key -> field -> hash
        read = source_at(task.source).read_batches(task.source, task.samples)
        with (
            contextlib.closing(read) as batches,
            contextlib.closing(transformed(batches, task.samples, task.transform)) as results,
        ):
            for batch in results:
                for name, content in zip(batch.names, batch.contents, strict=True):
                    key, field = split_name(name)
                    if key and field and isinstance(content, bytes):
                        self.made.setdefault(key, {})[field] = _hash(content)
        self.dropped = [key for key in self.samples if key not in self.made]

    def fields(self, key: str) -> tuple[str, ...] | None:
        """Return the fields that the function gives a sample."""
        return tuple(self.made[key]) if key in self.made else None

    def name(self, key: str, field: str) -> str | None:  # noqa: ARG002
        """Return nothing: a member is made of several files."""
        return None

    def differs(self, key: str, field: str, stream: BinaryIO, length: int) -> bool:
        """Tell whether the content of a member is not what the function made."""
        wanted = self.made.get(key, {}).get(field)
        return wanted is not None and _hash(stream.read(length)) != wanted


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def check_members(task: Task, stream: BinaryIO, size: int) -> Checked:
    """Walk over the members of a shard, and note what is wrong with them."""
    faults: list[Fault] = []
    keys: list[str] = []
    field_sets: dict[tuple[str, ...], list[str]] = defaultdict(list)
    wanted = (_Made if task.transform else _Files)(task)
    stream = cast(BinaryIO, Window(stream))  # which reads, seeks and tells like one
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
            found: list[str] = []
            try:
                for _, field, length in members:
                    found.append(field)
                    empty += task.decode and not length and is_text(field)
                    faults += _check_member(wanted, key, field, stream, length, task.decode)
            finally:  # also of a sample that is cut short
                fields = tuple(sorted(found))
                field_sets[fields].append(key)
                if wanted.fields(key) not in (None, fields):
                    faults.append(("fields differ from the source", key, repr(key)))
        sound = True
        if not keys:
            faults.append(("empty shard", shard, "which makes some readers fail"))
    except Damaged as error:
        faults.append((DAMAGED, shard, str(error)))
    sets = {fields: (len(having), having) for fields, having in field_sets.items()}
    return Checked(
        task.path, size, keys, len(keys), sets, faults, empty, sound, dropped=wanted.dropped
    )


def _check_member(
    wanted: _Files, key: str, field: str, stream: BinaryIO, length: int, decode: bool
) -> Iterator[Fault]:
    """Yield what is wrong with the content of a member, which the stream is at."""
    member = f"{key}.{field}"
    name, start = wanted.name(key, field) or member, stream.tell()
    if wanted.differs(key, field, stream, length):
        yield "bytes differ from the source", name, repr(member)
    stream.seek(start)
    if decode and (problem := decode_member(member, stream, length)):
        kind, text = problem
        yield kind, name, text
