"""What is wrong with names or left out, by kind: counts, the first names, and the report of all.

Names come one by one, while a source is listed or shards are checked. They are counted and written
to the report at once, so that a million of them cost no memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

from sharding.errors import InputError, naming
from sharding.messages import argument, count

SHOWN = 5  # names of a kind that are shown
LISTED = 10  # kinds that a summary names


class Kind(NamedTuple):
    """A reason to refuse a name."""

    reason: str  # in summaries and in the report
    what: str
    cure: str


class Odd(NamedTuple):
    """A name that is not a regular file, or that cannot be reached."""

    name: str
    kind: Kind  # INCOMPLETE if it was seen to be no regular file
    detail: str


INCOMPLETE = Kind(
    "incomplete",
    "samples that lack a field",
    f"add it, or give other {argument('fields')} or {argument('optional_fields')}",
)
DOUBLED = Kind(
    "doubled",
    "files whose key and field another has, in upper or lower case",
    "rename one, or leave it, or its archive, out",
)
ALTERNATIVES = Kind(
    "two alternatives", "samples with two alternatives of one field", "remove one of them"
)
DOTTED = Kind(
    "dotted",
    "names with a dot before the field, which readers take for another key",
    f"rename them, or give {argument('replace_dots')} _",
)
MEETING = Kind(
    "meeting", "names that get the same key once their dots are replaced", "rename one of them"
)
RESERVED = Kind("reserved", "names that begin with __, which readers drop", "rename them")
BAD_NAME = Kind(
    "unreadable name", "names that are not UTF-8, or that hold a newline", "rename them"
)
ODD_PATH = Kind(
    "odd path", "members whose path has an empty part, '.' or '..'", "unpack them, and pack these"
)
CIRCLE = Kind("circle", "symlink loops", "remove the link")
DENIED = Kind("permission denied", "names that may not be read", "change their mode or owner")
UNREACHABLE = Kind(
    "unreachable",
    "names that cannot be reached, and may be folders of samples",
    "mount or repair what they lead to, or remove them",
)


class Report:
    """The report that `--report` asks for: JSON Lines, an object for each name.

    Each is {"name": below the source or in the shards, "reason": its kind, "detail": what is
    special about this name}. The file is opened with the first of them, so that a mistyped flag
    costs nobody his last report.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.stream: TextIO | None = None

    def open(self) -> None:
        """Begin the file anew."""
        if self.path is not None and self.stream is None:
            self.stream = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  # see open_report

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """Write a line."""
        self.open()
        if self.stream:
            line = json.dumps({"name": name, "reason": reason, "detail": detail})
            try:
                self.stream.write(line + "\n")
            except OSError as error:
                error.filename = self.path
                raise


@contextlib.contextmanager
def open_report(path: str | None, *folders: str | os.PathLike[str] | None) -> Iterator[Report]:
    """Open a report for writing; without a path, one that keeps nothing.

    Raises:
        InputError: it cannot be written, or is inside one of these folders, where it would be taken
            for data.
    """
    report = Report(path)
    if path is not None:
        name, real = f"{argument('report')} {path!r}", os.path.realpath(path)
        for folder in folders:
            if folder is not None and Path(real).is_relative_to(os.path.realpath(folder)):
                where = f"{name} is inside {os.fspath(folder)!r}"
                raise InputError(f"{where}; choose a place elsewhere")
        if not os.path.isdir(os.path.dirname(real)):
            raise InputError(f"{name}: its folder does not exist; make it")
        if os.path.exists(real) and not os.path.isfile(real):
            raise InputError(f"{name} is not a file")
    try:
        yield report
        report.open()  # also where there is nothing to report
    finally:
        if report.stream:
            with naming(report.path or ""):
                report.stream.close()


class Tally:
    """How many names are of a kind, and the first few of them in order."""

    def __init__(self) -> None:
        self.number = 0
        self.names: list[str] = []

    def add(self, name: str) -> None:
        """Count a name."""
        self.number += 1
        self.names.append(name)
        if len(self.names) > 1_000:
            self.names = self.first()

    def first(self) -> list[str]:
        """Return the first names."""
        return sorted(self.names)[:SHOWN]


def quote(name: str) -> str:
    """Return the end of a name as it is shown in a message."""
    return repr(name[-100:])


def left_out(what: str, numbers: Mapping[str, int]) -> str:
    """Return '; ignored: 5 .caption, 5 .png', the largest number first, or nothing."""
    if not numbers:
        return ""
    ranked = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{number:,} {name}" for name, number in ranked[:LISTED]]
    if rest := sum(number for _, number in ranked[LISTED:]):
        parts[-1] += f" and {count(rest, 'other')}"
    return f"; {what}: {', '.join(parts)}"
