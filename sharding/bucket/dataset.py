"""What only a bucket does: find the shards of a dataset, and open them. See `places.Dataset`.

Writing is in run.py.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import obstore

from sharding.apart import answer, ask
from sharding.bucket.store import check_bucket, connect, saying, split
from sharding.bucket.streams import FIRST_RANGE, LARGEST_RANGE, Ranges
from sharding.errors import PackError
from sharding.shards import SHARD_PATTERN, STRAY, STRAY_PATTERN, Found, no_shards, shard_number
from sharding.urls import canonical

REMOTE = True  # a process that was forked from one that had read there cannot
PLAN = ".webdataset-plan"  # stands beside the shards until all are there; see claim.py
UNFINISHED = "a run is not finished; finish it with --resume"


def find_shards(path: str) -> Found:
    """Return the shards at a prefix, or those that a pattern names."""
    shards, faults, whole = ask("sharding.bucket.dataset", "shards", path)
    return Found(shards, [(kind, name) for kind, name in faults], whole)


def list_shards(url: str) -> Found:
    """List the shards at a prefix, in this process."""
    check_bucket(url)
    folder, pattern = canonical(url), ""
    names = list(objects_at(folder))
    if not names:  # the last part is a pattern, or the shard itself
        folder, _, pattern = folder.rpartition("/")
        names = list(objects_at(folder)) if split(url)[1] else []
    if PLAN in names:
        raise PackError(f"{folder!r}: {UNFINISHED}")
    if pattern:
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    shards = [f"{folder}/{name}" for name in names if SHARD_PATTERN.fullmatch(name)]
    strays = [n for n in names if STRAY_PATTERN.fullmatch(n) and not SHARD_PATTERN.fullmatch(n)]
    if not shards:
        raise no_shards(url, names, "pack some")
    return Found(
        sorted(shards, key=shard_number), [(STRAY, n) for n in sorted(strays)], not pattern
    )


def objects_at(url: str) -> dict[str, Any]:
    """Return the objects directly below a prefix: name -> what the store says of them."""
    bucket, prefix = split(url)
    with saying(url):
        items = obstore.list_with_delimiter(connect(bucket), prefix or None)["objects"]
    return {item["path"].rpartition("/")[2]: item for item in items}


def identify(shards: Sequence[str]) -> Any:
    """Return what distinguishes these shards from others that replace them."""
    return ask("sharding.bucket.dataset", "etags", list(shards))


def etags(urls: Iterable[str]) -> list[str | None]:
    """Return the etag of each of these objects, in this process."""
    folders: dict[str, dict[str, Any]] = {}
    found = []
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in folders:
            folders[folder] = objects_at(folder)
        found.append(folders[folder].get(name, {}).get("e_tag"))
    return found


@contextlib.contextmanager
def open_shard(path: str, buffering: int = 1 << 20) -> Iterator[tuple[BinaryIO, int, Any]]:
    """Open a shard; give the stream, its size and its version."""
    # A large buffer means that all is read: no need to begin with small ranges.
    raw = Ranges(path, first=LARGEST_RANGE if buffering >= 64 << 10 else FIRST_RANGE)
    with io.BufferedReader(raw, max(buffering, 4 << 10)) as stream:
        yield stream, raw.size, raw.etag


def read_range(path: str, offset: int, size: int, version: Any) -> bytes:
    """Return a part of this version of a shard."""
    return bytes(Ranges(path, offset + size, version).fetch(offset, size))


def shard_size(path: str) -> int:
    """Return the size of a shard in bytes."""
    bucket, key = split(path)
    with saying(path):
        return int(obstore.head(connect(bucket), key)["size"])


if __name__ == "__main__":
    answer(shards=list_shards, etags=etags)
