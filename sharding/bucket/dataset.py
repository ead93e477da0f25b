"""What only a bucket does: find the shards of a dataset, and open them. See `places.Dataset`.

Writing is in run.py.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import obstore

from sharding.apart import answer, ask
from sharding.bucket.store import check_bucket, connect, delete, saying, split
from sharding.bucket.streams import FIRST_RANGE, LARGEST_RANGE, Ranges
from sharding.errors import InputError, PackError
from sharding.messages import argument
from sharding.record import RECORD
from sharding.shards import SHARD_PATTERN, STRAY, STRAY_PATTERN, Found, no_shards, shard_number
from sharding.urls import canonical, expand_braces, nothing_matches

REMOTE = True  # a process that was forked from one that had read there cannot
PLAN = ".webdataset-plan"  # stands beside the shards until all are there; see claim.py
UNFINISHED = "a run is not finished; finish it with --resume"


def find_shards(path: str) -> Found:
    """Return the shards at a prefix, or those that a pattern names."""
    shards, faults, whole, record, sizes = ask("sharding.bucket.dataset", "shards", path)
    data = None if record is None else record.encode("latin-1")
    return Found(shards, [(kind, name) for kind, name in faults], whole, data, sizes)


def match(pattern: str, name: str) -> list[str]:
    """Return the objects that a pattern names, in this process; see `places.Dataset`."""
    check_bucket(pattern)
    folders: dict[str, dict[str, None]] = {}
    found: dict[str, None] = {}
    for one in expand_braces(canonical(pattern), name):
        folder, _, last = one.rpartition("/")
        if folder not in folders:
            folders[folder] = dict.fromkeys(sorted(objects_at(folder)))
            if PLAN in folders[folder]:
                raise PackError(f"{folder!r}: {UNFINISHED}")
        names = [last] if last in folders[folder] else fnmatch.filter(folders[folder], last)
        if not names:
            last_alone = "; in a bucket, a pattern is the last part alone"
            raise nothing_matches(name, pattern, one, last_alone * glob.has_magic(folder))
        found.update(dict.fromkeys(f"{folder}/{one}" for one in names))
    return list(found)


def list_shards(url: str) -> tuple[Any, ...]:
    """List the shards at a prefix, in this process; return what `Found` takes, as plain JSON."""
    check_bucket(url)
    if expand_braces(url, "path") != [url]:
        return _chosen_shards(url)
    folder, pattern = canonical(url), ""
    items = objects_at(folder)
    if not items:  # the last part is a pattern, or the shard itself
        folder, _, pattern = folder.rpartition("/")
        items = objects_at(folder) if split(url)[1] else {}
    names = list(items)
    if PLAN in names:
        raise PackError(f"{folder!r}: {UNFINISHED}")
    if pattern:
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    shards = sorted(filter(SHARD_PATTERN.fullmatch, names), key=shard_number)
    strays = [n for n in names if STRAY_PATTERN.fullmatch(n) and not SHARD_PATTERN.fullmatch(n)]
    if not shards:
        raise no_shards(url, names, "pack some")
    data = read_record(folder) if RECORD in items and not pattern else None
    record = None if data is None else data.decode("latin-1")
    sizes = [] if data is None else [int(items[name]["size"]) for name in shards]
    faults = [(STRAY, name) for name in sorted(strays)]
    return [f"{folder}/{name}" for name in shards], faults, not pattern, record, sizes


def _chosen_shards(url: str) -> tuple[Any, ...]:
    """Return the shards that braces name, as `list_shards` does."""
    shards = match(url, "path")
    for shard in shards:
        if not SHARD_PATTERN.fullmatch(shard.rpartition("/")[2]):
            raise InputError(f"{argument('path')} {url!r}: {shard!r} is not a shard-*.tar")
    return sorted(shards, key=lambda shard: (shard_number(shard), shard)), [], False, None, []


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


def read_record(path: str) -> bytes | None:
    """Return the record at a prefix, if there is one; in this process."""
    bucket, key = split(f"{canonical(path)}/{RECORD}")
    with saying(path):
        try:
            return bytes(obstore.get(connect(bucket), key).bytes())
        except FileNotFoundError:
            return None


def write_record(path: str, data: bytes | None) -> None:
    """Put a record at a prefix, or take it away."""
    bucket, key = split(f"{canonical(path)}/{RECORD}")
    with saying(path):
        if data is None:
            delete(path, key)
        else:
            obstore.put(connect(bucket), key, data)


if __name__ == "__main__":
    answer(shards=list_shards, etags=etags)
