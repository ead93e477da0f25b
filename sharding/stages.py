"""What takes long says so: on a terminal, a line on stderr counts what is done.

It appears after the first second, and goes when all is done. For command lines alone: a program
that calls the functions of this project decides itself what it prints.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

SILENT = 1.0  # seconds
_shown = False


def show_stages() -> None:
    """Show stages from now on, if stderr is a terminal."""
    global _shown
    _shown = sys.stderr.isatty()


class Stage:
    """What is done of one step of the work."""

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.began = time.time()
        self.done = self.folders = 0
        self.bar: Any = None

    def add(self, number: int, folders: int = 0) -> None:
        """Count what was done since the last call."""
        self.done += number
        self.folders += folders
        if not _shown or time.time() < self.began + SILENT:
            return
        if self.bar is None:
            from tqdm import tqdm  # here: it is slow to import

            self.bar = tqdm(desc=self.what, unit=f" {self.unit}", total=self.total, leave=False)
            self.bar.start_t = self.began
        if self.folders:
            self.bar.set_postfix_str(f"{self.folders:,} folders", refresh=False)
        self.bar.update(self.done - self.bar.n)


@contextlib.contextmanager
def stage(what: str, unit: str, total: int | None = None) -> Iterator[Stage]:
    """Begin a step of the work, whose progress is shown if it takes long.

    Args:
        what: is done: "listing".
        unit: of what is counted: "names".
        total: how many there are, if that is known.
    """
    one = Stage(what, unit, total)
    try:
        yield one
    finally:
        if one.bar is not None:
            one.bar.close()
