"""The errors a user can cause; messages.py says how they read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """What a user can cause; its text may hold arguments, as `messages.argument` marks them."""

    def __str__(self) -> str:
        return super().__str__().replace("\0", "")


class InputError(UserError, ValueError):
    """Bad input or usage: nothing was written. Exit code 2 on a command line."""


class PackError(UserError, RuntimeError):
    """Work that failed. Exit code 1 on a command line."""


class StopRun(PackError):
    """Work that failed for a reason that would fail the rest of it, too."""


class AlreadyDone(Exception):
    """Nothing is left to do. Exit code 0."""

    def __init__(
        self, why: str = "publishing was interrupted; now all shards are in place"
    ) -> None:
        super().__init__(why)


def attempt(step: Callable[[], T]) -> T | Exception:
    """Return what a step of the work gives, or the error with which it failed.

    Raises:
        StopRun: the rest of the work would fail, too.
    """
    try:
        return step()
    except StopRun:
        raise
    except (PackError, OSError) as error:
        return error


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Give an OSError the name of its file: one of reading or writing an open file has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise
