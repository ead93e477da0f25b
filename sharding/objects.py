"""A bucket as a source: list its objects, read exactly the versions that were listed.

See `places.Source`. The listing tells the version of each object. A sample keeps these, a plan
carries them to the workers, and a listing tells whether what a dead run had packed is still true.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

import obstore

from sharding.batch import CHANGED, STAMP, Batch, in_order, new_stamp
from sharding.errors import InputError, PackError
from sharding.samples import Sample
from sharding.store import check_bucket, connect, insist, saying, split, version_of
from sharding.streams import Ranges

if TYPE_CHECKING:
    from sharding.listing import Scan

WHOLE_SIZE = 512 << 10  # bytes of an object that is read whole; larger ones are fetched in ranges
READ_THREADS = 32  # of a process; a store takes some 25 ms for an object of any small size
AHEAD, AHEAD_BYTES = 64, 48 << 20  # samples that are read or wait, and what they may hold


def _read_version(version: str) -> tuple[int, int]:
    """Return the size in what `version_of` gave, and the hash as a number."""
    size, _, tag = version.partition(".")
    return int(size), int(tag, 16)


def _sizes(samples: Iterable[Sample]) -> Iterator[int]:
    """Yield the size of each file of these samples."""
    return (int(part.partition(".")[0]) for s in samples for part in s.listed.split(" "))


def listed_bytes(samples: Iterable[Sample]) -> int:
    """Return the bytes that fetching all files of these samples takes."""
    return sum(_sizes(samples))


def list_files(scan: Scan) -> None:
    """List all objects below a URL."""
    check_bucket(scan.source)
    bucket, prefix = split(scan.source)
    held: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)  # folder -> stem -> extensions
    listed: dict[str, str] = {}  # folder and stem -> versions, in the order of the extensions
    empty: list[tuple[str, str, str]] = []  # objects of no bytes, some of which mark a folder
    folders = {"", prefix + "/"}

    def add(folder: str, name: str, version: str) -> None:
        if scan.replace_dots is None:
            stem, _, extension = name.partition(".")
        else:
            stem, extension = scan.split_at_field(name)
        before = held[folder].get(stem, ())
        after = scan.grow(before, extension)
        if after is None:
            scan.note_ignored(folder, name)
            return
        held[folder][stem] = after
        versions = listed.get(folder + stem, "").split(" ") if before else []
        versions.insert(after.index(extension), version)
        listed[folder + stem] = " ".join(versions)

    with saying(scan.source, InputError):
        for item in (i for chunk in obstore.list(connect(bucket), prefix or None) for i in chunk):
            path = item["path"][len(prefix) + 1 if prefix else 0 :]
            folder, slash, name = path.rpartition("/")
            folder += slash
            if folder not in folders:
                parts = folder.split("/")
                folders.update("/".join(parts[:n]) + "/" for n in range(1, len(parts)))
            if name[:1] in ("", ".") or folder[:1] == "." or "/." in folder:
                continue
            version = version_of(item)
            if item["size"]:
                add(folder, name, version)
            else:
                empty.append((folder, name, version))
    for folder, name, version in empty:
        if f"{folder}{name}/" not in folders:
            add(folder, name, version)
    for folder, stems in held.items():
        scan.add_samples(folder, stems)
    scan.samples = [Sample(key, s, e, listed[s]) for key, s, e, _ in scan.samples]


def may_read(source: str, paths: list[str]) -> bool:  # noqa: ARG001
    """Return True: only a request for an object would tell."""
    return True


def read_batches(source: str, samples: Iterable[Sample]) -> Generator[Batch, None, None]:
    """Yield each sample in order, read ahead by many threads."""
    read = functools.partial(_read_batch, source)
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        yield from in_order(pool, read, ([s] for s in samples), AHEAD_BYTES, _weigh)
    finally:
        pool.shutdown(cancel_futures=True)


def _weigh(samples: Sequence[Sample]) -> int:
    """Return the bytes that samples hold once they are read, and no less than for `AHEAD`."""
    return max(AHEAD_BYTES // AHEAD, sum(size for size in _sizes(samples) if size <= WHOLE_SIZE))


def _read_batch(source: str, samples: Sequence[Sample]) -> Batch:
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


def stamp_of(source: str, samples: Iterable[Sample]) -> str:  # noqa: ARG001
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
