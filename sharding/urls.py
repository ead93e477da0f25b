"""Which paths are URLs; no other module looks for "://" in a path."""

from __future__ import annotations

import os
import re

from sharding.errors import InputError
from sharding.messages import argument

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(path: str | os.PathLike[str], name: str = "") -> bool:
    """Tell whether a path is a URL of a bucket.

    Args:
        name: of the argument that gave it, for the error.

    Raises:
        InputError: it is another URL; it would become a folder of that name.
    """
    scheme = _URL.match(os.fspath(path))
    which = f"{argument(name)} " if name else ""
    if not scheme and os.fspath(path).startswith("s3:/"):
        raise InputError(f"{which}{path!r}: give s3://BUCKET/KEY, with two slashes")
    if scheme and scheme[1] != "s3":
        cure = "give a folder or s3://BUCKET/KEY"
        raise InputError(f"{which}{path!r}: such URLs are not supported; {cure}")
    return bool(scheme)


def canonical(path: str | os.PathLike[str]) -> str:
    """Return a path that means the same in any process."""
    return os.fspath(path).rstrip("/") if is_url(path) else os.path.abspath(path)


def real(path: str | os.PathLike[str]) -> str:
    """Return a path with no link in it; a URL as it is."""
    return os.fspath(path) if is_url(path) else os.path.realpath(path)


def without_slash(path: str | os.PathLike[str]) -> str:
    """Return a path as it is; a URL without a slash at its end."""
    return canonical(path) if is_url(path) else os.fspath(path)


def refuse_url(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a URL where a local path is wanted."""
    if _URL.match(os.fspath(path)):
        raise InputError(f"{argument(name)} {path!r}: a URL cannot be used here; give a local path")
