"""Turn measured runs into tables and verdicts, and keep them as a CSV file."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One counted run."""

    group: str
    contestant: str
    repeat: int
    wall: float
    cpu: float
    peak_mb: float
    samples: int
    checksum: str
    date: str
    commit: str  # of the code that ran; "-dirty" where files differed from it


CELLS: tuple[Callable[[str], Any], ...] = (str, str, int, *[float] * 3, int, str, str, str)


def read_rows(path: Path) -> list[Row]:
    """Read the runs of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        _, *lines = csv.reader(stream)
    return [
        Row(*(convert(cell) for convert, cell in zip(CELLS, line, strict=True))) for line in lines
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the runs as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row])


def short(number: float) -> str:
    """Write a number with three significant digits: 0.652, 12.3, 2,810."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.{2 if number < 10 else 1}f}"


def spread(numbers: Sequence[float]) -> str:
    """Write the median and the range of some numbers."""
    return f"{short(median(numbers))} ({short(min(numbers))}-{short(max(numbers))})"


def by_contestant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Sort runs by contestant, in the order in which these first ran."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.contestant, []).append(row)
    return result


def table(rows: Sequence[Row]) -> str:
    """Return the table of one group."""
    lines = [
        ["contestant", "seconds", "CPU s", "peak MB", "samples/s", "samples", "checksum"],
        ["---", *["---:"] * 5, "---"],
    ]
    for name, runs in by_contestant(rows).items():
        walls, samples = [run.wall for run in runs], runs[0].samples
        cpu, peak = median(run.cpu for run in runs), median(run.peak_mb for run in runs)
        used = ["", ""] if math.isnan(cpu) else [short(cpu), f"{peak:.0f}"]
        speed = f"{samples / median(walls):,.0f}" if samples else ""
        lines.append([name, spread(walls), *used, speed, f"{samples:,}", runs[0].checksum])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


Runs = Mapping[str, list[Row]]  # of a group, by contestant


class Target(NamedTuple):
    """A figure of a group, and what it must be at most or at least; else it is only stated."""

    text: str
    figure: Callable[[Runs], list[float]]  # a KeyError says that it was not measured
    most: float | None = None
    least: float | None = None


def ratio(over: str, under: str, most: float | None = None, least: float | None = None) -> Target:
    """Return the target for how long one took of what the other took, round by round.

    One that failed in a later round has fewer runs: then the rounds that both have are compared.
    """

    def figure(runs: Runs) -> list[float]:
        return [a.wall / b.wall for a, b in zip(runs[over], runs[under], strict=False)]

    return Target(f"{over} / {under}", figure, most, least)


def seconds(name: str, most: float) -> Target:
    """Return the target for the time of one."""
    return Target(f"{name}: seconds", lambda runs: [run.wall for run in runs[name]], most)


def memory(more: str, less: str, most: float) -> Target:
    """Return the target for the bytes of memory for each sample that one has more than another."""

    def figure(runs: Runs) -> list[float]:
        pairs = zip(runs[more], runs[less], strict=False)
        return [(a.peak_mb - b.peak_mb) * 2**20 / (a.samples - b.samples) for a, b in pairs]

    return Target(f"{more}: bytes of memory for each sample beyond {less}", figure, most)


def verdicts(targets: Mapping[str, Iterable[Target]], rows: Sequence[Row]) -> str:
    """Return the table of the targets of groups: what was measured, and whether it holds."""
    lines = ["| figure (of times: run by run) | target | measured | holds |\n|---|---|---|---|\n"]
    for group, mine in targets.items():
        runs = by_contestant(row for row in rows if row.group == group)
        for text, figure, most, least in mine:
            wanted = f"≤ {most:g}" if most else f"≥ {least:g}" if least else "stated"
            measured, holds = "not measured", ""
            with contextlib.suppress(KeyError):
                figures = figure(runs)
                measured, middle = spread(figures), median(figures)
                if most or least:
                    holds = "yes" if (least or 0) <= middle <= (most or math.inf) else "**no**"
            lines.append(f"| {group}: {text} | {wanted} | {measured} | {holds} |\n")
    return "".join(lines)


def said(*command: str) -> str:
    """Return the last line that a command prints."""
    try:
        return subprocess.check_output(command, text=True).splitlines()[-1].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def surroundings(data: Path) -> str:
    """Return, as a list, what the figures depend on besides the code."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"Python {platform.python_version()}, webdataset {version('webdataset')}",
        f"ray {version('ray')}, {said('sh', '-c', 'tar --version | head -n 1')}",
        f"{platform.system()} {platform.release()}, {memory:.0f} GiB",
        f"{os.cpu_count()} CPUs: {cpu[1] if cpu else 'unknown'}",
        f"file system of the data: {said('df', '--output=fstype', str(data))}",
    ]
    return "".join(f"- {line}\n" for line in lines)
