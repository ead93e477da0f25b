"""A bucket as a source: read exactly the versions of objects that were listed.

See `places.Source`. The listing tells the version of each object. A sample keeps these, a plan
carries them to the workers, and a listing tells whether what a dead run had packed is still true.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import obstore

from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.bucket.store import connect, insist, saying, split, version_of
from sharding.bucket.streams import Ranges
from sharding.bucket.walk import list_files as list_files
from sharding.errors import PackError
from sharding.parallel import in_order
from sharding.samples import Sample, Samples

NOTHING = "there is nothing; are bucket and prefix right?"
WHOLE_SIZE = 512 << 10  # bytes of an object that is read whole; larger ones are fetched in ranges
READ_THREADS = 32  # of a process; a store takes some 25 ms for an object of any small size
AHEAD, AHEAD_BYTES = 64, 48 << 20  # samples that are read or wait, and what they may hold


def _read_version(version: str) -> tuple[int, int]:
    """Return the size in what `version_of` gave, and the hash as a number."""
    size, _, tag = version.partition(".")
    return int(size), int(tag, 16)


def _sizes(samples: Samples) -> Iterator[int]:
    """Yield the size of each file of these samples."""
    return (int(part.partition(".")[0]) for s in samples for part in s.listed.split(" "))


def read_batches(source: str, samples: Samples) -> Generator[Batch, None, None]:
    """Yield each sample in order, read ahead by many threads."""
    read = functools.partial(_read_batch, source)
    each = (samples[place : place + 1] for place in range(len(samples)))
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        yield from in_order(pool, read, each, AHEAD_BYTES, _weigh)
    finally:
        pool.shutdown(cancel_futures=True)


def _weigh(samples: Samples) -> int:
    """Return the bytes that samples hold once they are read, and no less than for `AHEAD`."""
    return max(AHEAD_BYTES // AHEAD, sum(size for size in _sizes(samples) if size <= WHOLE_SIZE))


def _read_batch(source: str, samples: Samples) -> Batch:
    """Read the objects of a few samples; large ones are left to be fetched later."""
    batch = Batch(len(samples), [], [], [])
    for sample in samples:
        batch.names.extend(sample.members())
        for path, version in zip(sample.files(), sample.listed.split(" "), strict=True):
            size, tag = _read_version(version)
            url = f"{source}/{path}"
            large = size > WHOLE_SIZE
            batch.contents.append(LargeObject(url, version) if large else _read(url, version))
            batch.stamps.extend((size, tag))
    return batch


def _read(url: str, version: str) -> bytes:
    """Return the content of a small object, of the version that was listed."""
    bucket, key = split(url)

    def get() -> bytes | None:
        try:
            found = obstore.get(connect(bucket), key)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()) if version_of(found.meta) == version else None

    data = insist(url, get)
    if data is None:
        raise PackError(f"{url!r} {CHANGED}")
    return data


class LargeObject:
    """An object that is fetched in ranges, of the version that was listed."""

    def __init__(self, url: str, version: str) -> None:
        self.url = url
        self.version = version
        self.size, _ = _read_version(version)

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:  # noqa: ARG002
        """Yield the content, range by range."""
        bucket, key = split(self.url)
        with saying(self.url):
            try:
                found = obstore.head(connect(bucket), key)
            except FileNotFoundError:
                raise PackError(f"{self.url!r} {CHANGED}") from None
        if version_of(found) != self.version:
            raise PackError(f"{self.url!r} {CHANGED}")
        with Ranges(self.url, found["size"], found["e_tag"]) as ranges:
            while piece := ranges.peek():
                yield piece
                ranges.seek(len(piece), io.SEEK_CUR)


def stamp_of(source: str, samples: Samples) -> str:  # noqa: ARG001
    """Return the stamp of samples, from what their listing said."""
    seen = new_stamp()
    for sample in samples:
        for version in sample.listed.split(" "):
            seen.update(STAMP % _read_version(version))
    return seen.hexdigest()


@contextlib.contextmanager
def open_file(source: str, sample: Sample, path: str) -> Iterator[tuple[BinaryIO, int]]:  # noqa: ARG001
    """Open one object, of any size; give the stream and its size."""
    raw: Any = Ranges(f"{source}/{path}")
    with io.BufferedReader(raw, 1 << 20) as stream:
        yield stream, raw.size
