"""Archives as a source: read members by their place. See `places.Source`.

A source is a path, a pattern or braces that end in ".tar"; what is a folder's or a bucket's,
`places` knows. Members that lie near to each other are read at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from sharding.archive import BLOCK
from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.errors import PackError
from sharding.parallel import in_order
from sharding.samples import Origin, Sample, Samples
from sharding.tars.opened import READ_SIZE, LargeMember, Opened, Part, open_archive, read_range
from sharding.tars.walk import list_files as list_files

NOTHING = "the archives hold no files"
WHOLE_SIZE = 512 << 10  # bytes of a member that is read whole; larger ones are copied
SPAN_SIZE = 4 << 20  # bytes that are read at a time, at most
SLOW_READ = 0.0005  # seconds a sample: a request to a server, not a read of a local disk
SLOW_BATCHES = 3  # so many more slow batches than fast ones, and the rest is read ahead
READ_THREADS, AHEAD_BYTES = 32, 48 << 20  # that read ahead, and what they may hold


class Reach(NamedTuple):
    """How much is read at a time."""

    samples: int
    size: int  # bytes
    gap: int  # bytes between two members that are read along with these


FIRST, FAST = Reach(1, 0, 16 << 10), Reach(32, 1 << 20, 16 << 10)
SLOW = Reach(64, SPAN_SIZE, 256 << 10)  # a request takes as long as to read on that far, or longer


class Place(NamedTuple):
    """Where the content of a member is."""

    archive: int
    offset: int
    size: int


class Task(NamedTuple):
    """A few samples to read."""

    samples: int
    names: list[str]  # of all members, in order
    places: list[Place]


class Span(NamedTuple):
    """Bytes of an archive that hold members; these, by their number in the task."""

    archive: int
    begin: int
    end: int
    members: list[int]


def _place(version: str) -> Place:
    archive, block, size = version.split(".")
    return Place(int(archive, 16), int(block, 16) * BLOCK, int(size, 16))


def _places(sample: Sample) -> list[Place]:
    return [_place(version) for version in sample.listed.split(" ")]


def read_batches(source: str, samples: Samples) -> Generator[Batch, None, None]:  # noqa: ARG001
    """Yield all samples in order, a few at a time; read ahead once reading turns out slow."""
    origins, left = samples.origins, iter(samples)
    tags = [_tag(origin) for origin in origins]
    slow, reach = 0, FIRST  # at first few, so that a slow disk is found out soon
    with contextlib.closing(Opened(origins)) as opened:
        while slow < SLOW_BATCHES and (task := _next_task(left, reach)):
            start = time.perf_counter()
            batch = _read(opened.read, origins, tags, reach, task)
            is_slow = time.perf_counter() - start > SLOW_READ * task.samples
            slow = max(0, slow + (1 if is_slow else -1))
            reach = FIRST if is_slow else FAST
            yield batch
    read = functools.partial(_read, functools.partial(read_range, origins), origins, tags, SLOW)
    tasks = iter(lambda: _next_task(left, SLOW), None)
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        yield from in_order(pool, read, tasks, AHEAD_BYTES, _weigh)
    finally:
        pool.shutdown(cancel_futures=True)


def _next_task(left: Iterator[Sample], reach: Reach) -> Task | None:
    """Take the next few samples, as many as a reach has room for; None if none are left."""
    names: list[str] = []
    places: list[Place] = []
    samples = held = 0
    for sample in left:
        samples += 1
        names += sample.members()
        for place in _places(sample):
            places.append(place)
            held += place.size if place.size <= WHOLE_SIZE else 0
        if samples == reach.samples or held >= reach.size:
            break
    return Task(samples, names, places) if samples else None


def _spans(places: Sequence[Place], gap: int) -> list[Span]:
    """Return what to read for members: those that lie near to each other at once."""
    spans: list[Span] = []
    archive, begin, end = -1, 0, 0
    for number in sorted(range(len(places)), key=places.__getitem__):
        place = places[number]
        if not 0 < place.size <= WHOLE_SIZE:
            continue
        after = place.offset + place.size
        if archive == place.archive and place.offset - end <= gap and after - begin <= SPAN_SIZE:
            end = max(end, after)
            spans[-1].members.append(number)
            spans[-1] = spans[-1]._replace(end=end)
        else:
            archive, begin, end = place.archive, place.offset, after
            spans.append(Span(archive, begin, end, [number]))
    return spans


def _weigh(task: Task) -> int:
    """Return the bytes that a task holds while it is read, and no less than for all threads."""
    held = sum(span.end - span.begin for span in _spans(task.places, SLOW.gap))
    return max(AHEAD_BYTES // (2 * READ_THREADS), held)


def _read(
    read: Callable[[int, int, int], bytes],
    origins: Sequence[Origin],
    tags: Sequence[int],
    reach: Reach,
    task: Task,
) -> Batch:
    """Read a few samples; large members are left to be copied later.

    Args:
        read: reads a number of bytes: (archive, offset, size).
    """
    places = task.places
    contents: list[Any] = [b""] * len(places)
    for archive, begin, end, members in _spans(places, reach.gap):
        data = read(archive, begin, end - begin)
        if len(data) < end - begin:
            raise PackError(f"{origins[archive].path!r} {CHANGED}")
        for number in members:
            _, offset, size = places[number]
            contents[number] = data[offset - begin : offset - begin + size]
    stamps: list[int] = []
    for number, (archive, offset, size) in enumerate(places):
        if size > WHOLE_SIZE:
            contents[number] = LargeMember(origins[archive], offset, size)
        stamps += (size, tags[archive] + offset)
    return Batch(task.samples, task.names, contents, stamps)


def _tag(origin: Origin) -> int:
    """Return a number that tells an archive from a later one of its path."""
    text = f"{origin.path} {origin.size} {origin.version}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def stamp_of(source: str, samples: Samples) -> str:  # noqa: ARG001
    """Return the stamp of samples, from what their listing said."""
    tags = [_tag(origin) for origin in samples.origins]
    seen = new_stamp()
    for sample in samples:
        for archive, offset, size in _places(sample):
            seen.update(STAMP % (size, tags[archive] + offset))
    return seen.hexdigest()


@contextlib.contextmanager
def open_file(source: str, sample: Sample, path: str) -> Iterator[tuple[BinaryIO, int]]:  # noqa: ARG001
    """Open one member, of any size; give the stream and its size."""
    archive, offset, size = _places(sample)[sample.files().index(path)]
    with open_archive(sample.origins[archive], READ_SIZE) as stream:
        stream.seek(offset)
        yield io.BufferedReader(Part(stream, size)), size
