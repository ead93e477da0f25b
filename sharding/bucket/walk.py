"""List a bucket: its names go to the scan as pages of them arrive, of many prefixes side by side.

A store names the next page only at the end of one. So where the first page of a prefix shows
folders, the store is asked for all of them, and each is listed as a prefix of its own.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import obstore

from sharding.bucket.store import connect, saying, split, version_of
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.scan import FolderScan, Scan

PAGE = 1_000  # objects that a store names in one answer
SIDE_BY_SIDE, WAITING = 32, 8  # prefixes that are listed, pages that wait to be looked at
# Folders on a first page: with more, one page holds many of them, and a request for each is no
# gain, unless there are few.
LARGE, FEW = 10, 64
# A list of folders may take as long as so many pages: else it is of files beside the folders, and
# obstore would hold them all.
LONGEST = 16

Object = tuple[str, bool, str]  # its path below the source, whether it holds anything, its version


def list_files(scan: Scan) -> None:
    """List all objects below a URL."""
    found: dict[str, FolderScan] = {}
    empty: list[tuple[str, str, str]] = []  # objects of no bytes, some of which mark a folder
    folders = {"", split(scan.source)[1] + "/"}

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

    for page in _Prefixes(scan.source).pages():
        objects: list[tuple[str, str, str]] = []
        for path, full, version in page:
            folder, slash, name = path.rpartition("/")
            folder += slash
            if folder not in folders:
                parts = folder.split("/")
                folders.update("/".join(parts[:n]) + "/" for n in range(1, len(parts)))
            if name[:1] in ("", ".") or folder[:1] == "." or "/." in folder:
                continue
            into = objects if full else empty
            into.append((folder, name, version))
        add(objects)
    add(one for one in empty if f"{one[0]}{one[1]}/" not in folders)
    for _, one in sorted(found.items()):  # pages come in any order
        one.close()


class _Prefixes:
    """The prefixes of a source that are listed side by side."""

    def __init__(self, source: str) -> None:
        self.source = source
        bucket, self.prefix = split(source)
        self.store, self.probe = connect(bucket), connect(bucket, patient=False)
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.left: SimpleQueue[str | None] = SimpleQueue()
        self.begun = 0  # prefixes that are being listed, or will be
        self.found: SimpleQueue[list[Object] | Exception | None] = (
            SimpleQueue()
        )  # None: that is all
        self.room = threading.Semaphore(WAITING)
        self.stopped = False

    def pages(self) -> Iterator[list[Object]]:
        """Yield all objects, as many at a time as come together.

        Raises:
            InputError: they cannot be listed.
        """
        self._begin([self.prefix])
        try:
            while (page := self.found.get()) is not None:
                if isinstance(page, Exception):
                    raise page
                self.room.release()
                yield page
        finally:
            self.stopped = True
            self.room.release(SIDE_BY_SIDE)  # nobody waits any more
            for _ in self.threads:
                self.left.put(None)
            for thread in () if self.begun else self.threads:
                thread.join()

    def _begin(self, prefixes: list[str]) -> None:
        with self.lock:
            self.begun += len(prefixes)
            for prefix in prefixes:
                self.left.put(prefix)
            while len(self.threads) < min(self.begun, SIDE_BY_SIDE):
                # It ends with the process, even where it waits for a store that does not answer.
                self.threads.append(threading.Thread(target=self._work, daemon=True))
                self.threads[-1].start()

    def _work(self) -> None:
        """List one prefix after the other."""
        while (prefix := self.left.get()) is not None and not self.stopped:
            self._list(prefix)

    def _list(self, prefix: str) -> None:
        """List a prefix; leave the folders in it to others if that is faster."""
        try:
            with saying(self.source, InputError):
                self._list_pages(prefix)
        except Exception as error:
            self.found.put(error)
        with self.lock:
            self.begun -= 1
            if not self.begun:
                self.found.put(None)

    def _list_pages(self, prefix: str) -> None:
        began, first_of_all = time.monotonic(), prefix == self.prefix
        # What does not work is found out soon: see `connect`.
        pages = self._pages_of(self.probe if first_of_all else self.store, prefix)
        first = next(pages, [])
        if len(first) < PAGE:
            self._put(first)
            return
        longest = LONGEST * (time.monotonic() - began)
        if level := self._split(prefix, first, longest):
            self._put(level[0])
            self._begin(level[1])
            return
        if first_of_all:
            pages = self._pages_of(self.store, prefix)
        else:
            self._put(first)
        for page in pages:
            self._put(page)
            if self.stopped:
                return

    def _pages_of(self, store: Any, prefix: str) -> Iterator[Sequence[Any]]:
        return iter(obstore.list(store, prefix or None, chunk_size=PAGE))

    def _put(self, items: Iterable[Any]) -> None:
        """Hand objects over."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        page = [(item["path"][cut:], item["size"] > 0, version_of(item)) for item in items]
        self.room.acquire()
        self.found.put(page)

    def _split(
        self, prefix: str, first: Sequence[Any], longest: float
    ) -> tuple[list[Any], list[str]] | None:
        """Return the objects right below a prefix, and the folders there, if that is a gain.

        Args:
            first: the first page of the prefix.
            longest: seconds that it may take.
        """
        cut = len(prefix) + 1 if prefix else 0
        shown = {top for top, slash, _ in (i["path"][cut:].partition("/") for i in first) if slash}
        if not shown or self.stopped or (len(shown) > LARGE and self.begun > SIDE_BY_SIDE):
            return None
        level = self._list_level(prefix, longest)
        if level is None or (len(shown) > LARGE and len(level["common_prefixes"]) > FEW):
            return None
        # An object whose key ends in a slash stands for the prefix itself, on its own first page.
        own = [item for item in first if item["path"] == prefix]
        objects = [item for item in level["objects"] if item["path"] != prefix]
        return own + objects, list(level["common_prefixes"])

    def _list_level(self, prefix: str, longest: float) -> Any:
        """Return the objects and folders right below a prefix; None if that takes too long."""
        import asyncio  # here: few need it

        async def ask() -> Any:
            level = obstore.list_with_delimiter_async(self.store, prefix or None)
            try:
                return await asyncio.wait_for(level, longest)
            except asyncio.TimeoutError:
                return None

        return asyncio.run(ask())
