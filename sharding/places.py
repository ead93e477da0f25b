"""Where things are: picks the module for a folder, or the one for a bucket, by the path alone.

The two offer the same names, so nothing else needs to know which of them it works with. No other
module looks at "://".
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from sharding.errors import InputError, argument
from sharding.shards import Found

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://")


class Dataset(Protocol):
    """A dataset: shards that are published in one place."""

    def find_shards(self, path: str) -> Found:
        """Return the shards in a place, or those that a pattern such as "out/shard-00*.tar" names.

        Raises:
            InputError: there are none.
            PackError: a run is not finished there.
        """

    def identify(self, shards: list[str]) -> object:
        """Return what tells these shards from others that take their places."""

    def open_shard(
        self, path: str, buffering: int = ...
    ) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """Open a shard, which can seek; the context gives the stream and its size in bytes.

        Raises:
            PackError: the shard was replaced while it was read.
        """

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Return a part of a shard."""

    def shard_size(self, path: str) -> int:
        """Return the size of a shard in bytes."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a URL of a bucket.

    Raises:
        InputError: it is another URL; it would become a folder of that name.
    """
    scheme = _URL.match(os.fspath(path))
    if scheme and scheme[1] != "s3":
        raise InputError(f"{path!r}: such URLs are not supported; give a folder or s3://BUCKET/KEY")
    return bool(scheme)


def refuse_url(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a URL where a local path is wanted."""
    if _URL.match(os.fspath(path)):
        raise InputError(f"{argument(name)} {path!r}: a URL cannot be used here; give a local path")


def dataset_at(path: str | os.PathLike[str]) -> Dataset:
    """Return what finds and opens shards there."""
    if is_url(path):
        from sharding import bucket

        return bucket
    from sharding import folder

    return folder
