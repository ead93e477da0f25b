"""What reading samples gives: the members of a few at a time, in order, whatever is read ahead.

Also what tells a file from a later version of it: the stamps of a shard's files are one hash.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Any, NamedTuple

from sharding.archive import Pieces

CHANGED = "changed while it was packed; run again once it no longer changes"
STAMP = b"%d %d "  # size and time, or another mark, of a file


class Batch(NamedTuple):
    """What a few samples become in a shard: their members, in order."""

    samples: int
    names: list[str]
    contents: list[bytes | Pieces]
    stamps: list[
        int
    ]  # size and time of each file, or another mark that differs from a later version's

    def stamp(self) -> bytes:
        """Return the stamps of all files, one after the other."""
        return STAMP * len(self.names) % tuple(self.stamps)


def new_stamp() -> Any:
    """Return the hash object that takes the stamps of a shard's files, in order."""
    return hashlib.blake2b(digest_size=16)


def in_order(
    pool: Executor, work: Callable[[Any], Any], tasks: Iterator[Any], ahead: int
) -> Iterator[Any]:
    """Yield work(task) for each task, in order, with at most `ahead` begun."""
    begun: deque[Future[Any]] = deque()
    while True:
        for task in islice(tasks, ahead - len(begun)):
            begun.append(pool.submit(work, task))
        if not begun:
            return
        yield begun.popleft().result()
