"""What reading samples gives: the members of a few at a time, in order, whatever is read ahead.

Also what tells a file from a later version of it: the stamps of a shard's files are one hash.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sharding.archive import Pieces

CHANGED = "changed while it was packed; run again once it no longer changes"
STAMP = b"%d %d "  # of a file: see Batch.stamps


class Batch(NamedTuple):
    """What a few samples become in a shard: their members, in order."""

    samples: int
    names: list[str]
    contents: list[bytes | Pieces]
    stamps: list[int]  # two for each file: its size, and its time or the hash of its etag
    dropped: int = 0  # of the samples, by a function of the user's

    def stamp(self) -> bytes:
        """Return the stamps of all files, one after the other."""
        return STAMP * (len(self.stamps) // 2) % tuple(self.stamps)


def new_stamp() -> hashlib.blake2b:
    """Return the hash object that takes the stamps of a shard's files, in order."""
    return hashlib.blake2b(digest_size=16)
