"""Read folders ahead with threads, in the order in which they will be asked for.

One thread asks, and gets what each folder holds in that order, whoever has read it. What waits is
bounded in names, however large a folder is.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import NamedTuple

from sharding.faults import Odd

Parents = tuple[str, ...]  # the real path of each

THREADS, AHEAD = 16, 65_536  # names and folders that are read ahead: some 10 MB


class Folder:
    """A folder that is to be listed."""

    __slots__ = ("above", "linked", "parts", "place", "prefix")

    def __init__(self, prefix: str, linked: bool, above: Parents, place: tuple[int, ...]) -> None:
        self.prefix = prefix  # "" or "cats/"
        self.linked = linked  # its path may lead elsewhere
        self.above = above
        self.place = place  # in the order of the listing
        self.parts: SimpleQueue[Part | Unopened | Exception | None] | None = None  # once begun


class Part(NamedTuple):
    """Some of what a folder holds."""

    names: list[str]  # of files
    folders: list[Folder]
    odd: list[tuple[str, Odd]]  # names of what is neither

    def weight(self) -> int:
        """Return what it takes of AHEAD."""
        return 1 + len(self.names) + len(self.folders)


class Unopened(NamedTuple):
    """A folder that cannot be listed, and why."""

    odd: Odd
    gone: bool = False  # its name was listed, but nothing is there
    folders: tuple[Folder, ...] = ()

    def weight(self) -> int:
        """Return what it takes of AHEAD."""
        return 1


Read = Callable[[Folder], Iterator[Part | Unopened]]


class Ahead:
    """Threads that read folders ahead, in the order in which they will be asked for."""

    def __init__(self, read: Read, folders: Iterable[Folder]) -> None:
        self.read = read
        self.changed = threading.Condition()
        self.left: list[tuple[tuple[int, ...], Folder]] = []  # a heap
        self.held = 0  # of AHEAD
        self.wanted: Folder | None = None
        self.stalled: set[Folder] = set()  # those whose threads wait for room
        self.stopped = False
        self.add(folders)
        # They end with the process, even where a mount has died and they wait for ever.
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def add(self, folders: Iterable[Folder]) -> None:
        """Take folders that were found."""
        with self.changed:
            for folder in folders:
                heapq.heappush(self.left, (folder.place, folder))
                self.changed.notify()

    def parts(self, folder: Folder) -> Iterator[Part | Unopened]:
        """Yield what a folder holds, which is read now if no thread has begun to."""
        with self.changed:
            self.wanted, begun = folder, folder.parts is not None
            parts = folder.parts = folder.parts or SimpleQueue()
        if not begun:
            for part in self.read(folder):
                self.add(part.folders)
                yield part
            return
        weight = 0
        while True:
            with self.changed:
                self.held -= weight
                self.changed.notify()
                if folder in self.stalled and parts.empty():
                    self.changed.notify_all()
            found = parts.get()
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            weight = found.weight()
            yield found

    def _work(self) -> None:
        """Read one folder after the other."""
        while (folder := self._next()) and (parts := folder.parts):
            try:
                for part in self.read(folder):
                    self.add(part.folders)
                    self._hold(folder, part.weight())
                    parts.put(part)
                parts.put(None)
            except Exception as error:  # whoever asks for the folder gets it
                parts.put(error)

    def _next(self) -> Folder | None:
        """Wait for the next folder to read; None if there will be none."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.stopped or (self.left and self.held < AHEAD))
                if self.stopped:
                    return None
                _, folder = heapq.heappop(self.left)
                if not folder.parts:
                    folder.parts = SimpleQueue()
                    return folder

    def _hold(self, folder: Folder, weight: int) -> None:
        """Wait until there is room for more of a folder, or somebody has to wait for it."""

        def may_go_on() -> bool:
            starving = self.wanted is folder and bool(folder.parts and folder.parts.empty())
            return self.stopped or self.held < AHEAD or starving

        with self.changed:
            self.stalled.add(folder)
            self.changed.wait_for(may_go_on)
            self.stalled.discard(folder)
            self.held += weight

    def stop(self) -> None:
        """Let the threads end."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def join(self) -> None:
        """Wait until they have."""
        for thread in self.threads:
            thread.join()
