"""A bucket as a source: list its objects, read exactly the versions that were listed.

See `places.Source`. The listing tells the version of each object. A sample keeps these, a plan
carries them to the workers, and a listing tells whether what a dead run had packed is still true.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

import obstore

from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.bucket.store import check_bucket, connect, insist, saying, split, version_of
from sharding.bucket.streams import Ranges
from sharding.errors import InputError, PackError
from sharding.parallel import in_order
from sharding.samples import Samples

if TYPE_CHECKING:
    from sharding.scan import FolderScan, Scan

REMOTE = True
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


def list_files(scan: Scan) -> None:
    """List all objects below a URL."""
    check_bucket(scan.source)
    bucket, prefix = split(scan.source)
    found: dict[str, FolderScan] = {}
    empty: list[tuple[str, str, str]] = []  # objects of no bytes, some of which mark a folder
    folders = {"", prefix + "/"}

    def add(objects: Iterable[tuple[str, str, str]]) -> None:
        pages: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for folder, name, version in objects:
            names, versions = pages[folder]
            names.append(name)
            versions.append(version)
        for folder, page in pages.items():
            if folder not in found:
                found[folder] = scan.folder(folder)
            found[folder].add(*page)

    with saying(scan.source, InputError):
        for chunk in obstore.list(connect(bucket), prefix or None):
            objects: list[tuple[str, str, str]] = []
            for item in chunk:
                path = item["path"][len(prefix) + 1 if prefix else 0 :]
                folder, slash, name = path.rpartition("/")
                folder += slash
                if folder not in folders:
                    parts = folder.split("/")
                    folders.update("/".join(parts[:n]) + "/" for n in range(1, len(parts)))
                if name[:1] in ("", ".") or folder[:1] == "." or "/." in folder:
                    continue
                into = objects if item["size"] else empty
                into.append((folder, name, version_of(item)))
            add(objects)
    add(one for one in empty if f"{one[0]}{one[1]}/" not in folders)
    for one in found.values():
        one.close()


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
def open_file(source: str, path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open one object, of any size; give the stream and its size."""
    raw: Any = Ranges(f"{source}/{path}")
    with io.BufferedReader(raw, 1 << 20) as stream:
        yield stream, raw.size
