"""The two errors a user can cause, and how an error reads in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

INSTALL = "is not installed; run: pip install -r requirements.txt"
CURES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file grew beyond the limit (ulimit -f): use more shards",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose an --output that can be written",
    errno.EPIPE: "nobody reads the output any more",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class InputError(ValueError):
    """Bad input or usage: nothing was written. Exit code 2 on a command line."""


class PackError(RuntimeError):
    """Work that failed. Exit code 1 on a command line."""


def explain(error: BaseException) -> str:
    """Say in one line what failed and, if known, the cure."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} {INSTALL}"
    if isinstance(error, OSError) and error.strerror:
        cure = CURES.get(error.errno or 0)
        name = "" if error.filename is None else f"{error.filename!r}: "
        return f"{name}{error.strerror}" + (f"; {cure}" if cure else "")
    return " ".join(str(error).split())[:1_000] or type(error).__name__


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Give an OSError the name of its file: one of reading or writing an open file has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise
