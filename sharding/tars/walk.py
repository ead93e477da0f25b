"""List archives: the names of their members go to the scan as headers are read.

Names are what files in a folder would be called: a leading "./" is dropped, hidden names are passed
over, and a path that no file below a folder can have is a fault. The version of a member is its
place, in hexadecimal: the number of its archive, the block where its content begins, its size.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from sharding import faults
from sharding.archive import BLOCK, SCAN_SIZE, Damaged, Window, read_members
from sharding.errors import InputError
from sharding.messages import argument, count, explain
from sharding.parallel import in_order
from sharding.places import dataset_at
from sharding.samples import Origin

if TYPE_CHECKING:
    from sharding.scan import FolderScan, Scan

NAMES_AT_ONCE = 4_096
SCAN_THREADS = 8  # that list archives side by side, where that is mostly waiting


class Page(NamedTuple):
    """Some members of an archive, as text: those of several archives may wait."""

    folders: dict[str, tuple[str, str]]  # folder -> names, a slash between; places, a space between
    odd: list[str]  # paths that no file below a folder can have


Walk = Iterable[Origin | Page | Damaged]  # begins with what the archive is; Damaged ends it


def list_files(scan: Scan) -> None:
    """List the members of all archives."""
    archives = dataset_at(scan.source).match(scan.source, "source")
    found: dict[str, FolderScan] = {}
    damaged = []
    for path, walk in zip(archives, _walk_all(archives), strict=True):
        for one in walk:
            if isinstance(one, Origin):
                scan.origins.append(one)
            elif isinstance(one, Damaged):
                damaged.append(f"{argument('source')}: {path!r}: {one}")
            else:
                for folder, (names, places) in one.folders.items():
                    if folder not in found:
                        found[folder] = scan.folder(folder)
                    found[folder].add(names.split("/"), places.split(" "))
                for name in one.odd:
                    scan.fault(faults.ODD_PATH, f"{path}: {name}")
    if damaged:
        more = len(damaged) - faults.SHOWN
        also = [f"and {count(more, 'other archive')}"] if more > 0 else []
        raise InputError("\n".join(damaged[: faults.SHOWN] + also))
    while found:
        found.pop(next(iter(found))).close()


def _walk_all(archives: Sequence[str]) -> Iterator[Walk]:
    """Yield the walk over each archive; several go on side by side if that is mostly waiting."""
    waits, done = False, 0
    while done < len(archives) and not waits:
        wall, worked = time.perf_counter(), time.thread_time()
        with contextlib.closing(_walk(done, archives[done])) as walk:
            yield walk
        waits = time.perf_counter() - wall > 3 * (time.thread_time() - worked)
        done += 1
    if done == len(archives):
        return
    pool = ThreadPoolExecutor(SCAN_THREADS)
    try:
        rest = enumerate(archives[done:], done)
        yield from in_order(pool, lambda task: list(_walk(*task)), rest, 2 * SCAN_THREADS)
    finally:
        pool.shutdown(cancel_futures=True)


def _walk(number: int, path: str) -> Generator[Origin | Page | Damaged, None, None]:
    """Yield what an archive is, and then its members."""
    try:
        with dataset_at(path).open_shard(path, SCAN_SIZE) as (stream, size, version):
            yield Origin(path, size, json.dumps(version))
            yield from _pages(number, stream, size)
    except Damaged as error:
        yield error
    except OSError as error:
        raise InputError(f"{argument('source')}: {explain(error)}") from None


def _pages(number: int, stream: BinaryIO, end: int) -> Iterator[Page]:
    """Yield the members of the archive of this number."""
    window, place = Window(stream), f"{number:x}.%x.%x"
    members = read_members(window, end)
    while True:
        folders: dict[str, tuple[list[str], list[str]]] = {}
        odd, last, skip, name = [], None, False, None
        for name, size in islice(members, NAMES_AT_ONCE):  # this loop sees each member
            if name[:2] == "./":
                name = name[2:]
            cut = name.rfind("/") + 1
            if name[:cut] != last:
                last = name[:cut]
                skip = not {".", ""}.isdisjoint(part[:1] for part in last.split("/")[:-1])
                if not skip:
                    names, places = folders.setdefault(last, ([], []))
            base = name[cut:]
            if skip or base[:1] in (".", ""):
                if not {"", ".", ".."}.isdisjoint(name.split("/")):
                    odd.append(name)
                continue  # a hidden name
            names.append(base)
            places.append(place % (window.place // BLOCK, size))
        if name is None:
            return
        yield Page({f: ("/".join(n), " ".join(p)) for f, (n, p) in folders.items() if n}, odd)
