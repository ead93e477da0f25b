"""Turn measured runs into tables, verdicts and charts."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One counted run."""

    group: str
    contestant: str
    repeat: int
    wall: float
    inside: float
    cpu: float
    peak_mb: float
    samples: int
    checksum: str
    date: str
    commit: str  # of the code that ran; "-dirty" where files differed from it


CELLS: tuple[Callable[[str], Any], ...] = (str, str, int, *[float] * 4, int, str, str, str)


def read_rows(path: Path) -> list[Row]:
    """Read the runs of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            Row(*(convert(cell) for convert, cell in zip(CELLS, line, strict=True)))
            for line in list(csv.reader(stream))[1:]
        ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the runs as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row])


# ---------------------------------------------------------------- tables


def short(number: float) -> str:
    """Write a number with three significant digits: 0.652, 12.3, 2,810."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.{2 if number < 10 else 1}f}"


def spread(numbers: Sequence[float]) -> str:
    """Write the median and the range of some numbers."""
    return f"{short(median(numbers))} ({short(min(numbers))}-{short(max(numbers))})"


def told_apart(runs: Sequence[Row]) -> str:
    """Write the seconds after the imports, where a contestant tells these apart."""
    apart = any(run.inside < run.wall for run in runs)
    return spread([run.inside for run in runs]) if apart else ""


def by_contestant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Sort runs by contestant, in the order in which these first ran."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.contestant, []).append(row)
    return result


def table(rows: Sequence[Row]) -> str:
    """Return the table of one group."""
    # Where no contestant tells its imports apart there is nothing to show in a column of its own.
    inside = any(row.inside < row.wall for row in rows)
    head = ["contestant", "seconds", *(["imports excluded"] if inside else []), "CPU s", "peak MB"]
    lines = [
        [*head, "samples/s", "samples", "checksum"],
        ["---", *["---:"] * (len(head) + 1), "---"],
    ]
    for name, runs in by_contestant(rows).items():
        wall = median(run.wall for run in runs)
        samples = runs[0].samples
        lines.append(
            [
                name,
                spread([run.wall for run in runs]),
                *([told_apart(runs)] if inside else []),
                "" if math.isnan(runs[0].cpu) else short(median(run.cpu for run in runs)),
                "" if math.isnan(runs[0].cpu) else f"{median(run.peak_mb for run in runs):.0f}",
                f"{samples / wall:,.0f}" if samples else "",
                f"{samples:,}",
                runs[0].checksum,
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------- verdicts

EMPTY = "empty Ray, start and stop"
WDS = "plain loop over wds.WebDataset"


class Runs:
    """What the targets ask of the measured runs; a KeyError says that they were not made.

    One that failed in a later round has fewer runs: then the rounds that both have are compared.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.runs: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self.runs.setdefault((row.group, row.contestant), []).append(row)

    def wall(self, group: str, name: str) -> list[float]:
        """Return the seconds of each run."""
        return [run.wall for run in self.runs[group, name]]

    def ratio(self, group: str, over: str, under: str) -> list[float]:
        """Return how long one took of what the other took, round by round."""
        pairs = zip(self.wall(group, over), self.wall(group, under), strict=False)
        return [a / b for a, b in pairs]

    def memory(self, group: str, name: str) -> list[float]:
        """Return the bytes for each sample by which a listing is larger than one of 1,000."""
        few = self.runs["samples", "listing 1,000"]
        pairs = zip(self.runs[group, name], few, strict=False)
        return [(a.peak_mb - b.peak_mb) * 2**20 / (a.samples - b.samples) for a, b in pairs]

    def ray_speed_up(self) -> list[float]:
        """Return what a second worker brings when the start and stop of Ray are taken off."""
        empty = self.wall("ray", EMPTY)
        one = self.wall("ray", "create_with_ray.py, 100k, 1 worker")
        two = self.wall("ray", "create_with_ray.py, 100k, 2 workers")
        return [(a - c) / (b - c) for a, b, c in zip(one, two, empty, strict=False)]


class Target(NamedTuple):
    """A figure, and what it must be at most or at least; with neither it is only stated."""

    text: str
    figure: Callable[[Runs], list[float]]
    at_most: float | None = None
    at_least: float | None = None


def ratio(
    group: str,
    over: str,
    under: str,
    text: str = "",
    most: float | None = None,
    least: float | None = None,
) -> Target:
    """Return the target for the ratio of two contestants of a group."""
    return Target(
        f"{group}: {over} / {under}{text}", lambda r: r.ratio(group, over, under), most, least
    )


TARGETS = (
    ratio("pack", "ours, 1 process", "GNU tar, 1 process", "; aim 0.9", most=1.1),
    ratio("pack", "plain loop, 1 process", "ours, 1 process", "; aim 10", least=7),
    ratio("pack", "plain loop, 1 process", "GNU tar, 1 process"),
    ratio("pack", "plain loop, 1 process", "C floor, 1 process"),
    ratio("pack", "ours, 2 processes", "GNU tar, 2 processes", "; aim 0.9", most=1.1),
    ratio("pack", "ours, 2 processes", "C floor, 2 processes", most=2),
    ratio("pack", "ours, listing alone", "ours, 1 process"),
    ratio("pack", "ours, 1 process", "ours, no fsync"),
    ratio("large", "ours, 1 process", "GNU tar, 1 process", most=0.8),
    ratio("large", "ours, 1 process", "C floor, 1 process", most=1.4),
    ratio("large", "ours, 1 process", "ours, no fsync"),
    ratio("slow", "GNU tar", "ours, start-up excluded", least=8),
    ratio("slow", "GNU tar", "create_webdataset.py", least=6),
    ratio("drivers", "run_parallel.sh, 4 workers", "plain loop, 4 processes", most=0.55),
    ratio("ray", "create_with_ray.py, 2 workers", EMPTY, "; aim 1.2", most=1.5),
    ratio("ray", "create_with_ray.py, 100k, 1 worker", "create_with_ray.py, 100k, 2 workers"),
    Target("ray: the same, start and stop of Ray taken off", Runs.ray_speed_up),
    ratio("shards", "run_parallel.sh, 1024 shards", "run_parallel.sh, 4 shards", most=1.3),
    ratio("shards", "create_with_ray.py, 1024 shards", "create_with_ray.py, 4 shards", most=1.5),
    Target(
        "samples: bytes of memory for each of 100,000",
        lambda runs: runs.memory("samples", "listing 100,000"),
    ),
    ratio("million", "run_parallel.sh, 2 workers", "GNU tar, 2 processes"),
    ratio("million", "create_with_ray.py, 2 workers", "GNU tar, 2 processes"),
    Target(
        "million: seconds to list, check and sort them; aim 4",
        lambda runs: runs.wall("million", "listing"),
        at_most=6,
    ),
    Target(
        "million: bytes of memory for each of them listed",
        lambda runs: runs.memory("million", "listing"),
        at_most=400,
    ),
    ratio("million", "listing, ten million files", "listing", " (5 times the samples)"),
    Target(
        "million: bytes of memory for each of five million listed, in 200 folders",
        lambda runs: runs.memory("million", "listing, ten million files"),
        at_most=400,
    ),
    ratio("reader", WDS, "loop over open_webdataset", least=4),
    ratio("training", "wds.WebDataset", "open_webdataset", "; aim 6", least=4),
    ratio("training", "wds.WebDataset, 2 workers", "open_webdataset, 2 workers"),
    ratio("training", "litdata", "open_webdataset", "; aim 1"),
    ratio("training", "webshart", "open_webdataset"),
    ratio("training", "wds.WebDataset, pilrgb", "open_webdataset, pilrgb"),
    ratio("training", "wds.WebDataset, torchrgb", "open_webdataset, torchrgb"),
    ratio(
        "training", "wds.WebDataset, torchrgb, 2 workers", "open_webdataset, torchrgb, 2 workers"
    ),
    ratio("reader", WDS, "read_webdataset.py, 2 workers", least=3),
    ratio("reader", WDS, "read_webdataset.py --source, 2 workers"),
    ratio("store", "s3fs", "create_webdataset", least=5),
    ratio("store", "s3fs, 64 at once", "create_webdataset"),
    ratio("store", "boto3", "create_webdataset"),
    ratio("store", "boto3, 32 threads", "create_webdataset"),
    ratio("store", "s3fs", "run_parallel.sh, 2 workers"),
    ratio("store", "create_webdataset", "GETs alone, 32 threads"),
    ratio("store", "run_parallel.sh, 2 workers", "GETs alone, 32 threads"),
    ratio("store", "s3fs, 300 KB", "create_webdataset, 300 KB"),
    ratio("store", "boto3, 300 KB", "create_webdataset, 300 KB"),
    ratio("store", "create_webdataset, 300 KB", "GETs alone, 32 threads, 300 KB"),
    ratio("store", "wds.WebDataset, pipe:curl", "open_webdataset"),
    ratio("store", "litdata", "open_webdataset"),
    ratio("store", "mosaicml-streaming", "open_webdataset"),
    ratio("store", "open_webdataset", "download alone"),
)


def verdicts(rows: Iterable[Row]) -> str:
    """Return the table of the targets: what was measured, and whether it holds."""
    runs = Runs(rows)
    lines = ["| figure (of times: run by run) | target | measured | holds |\n|---|---|---|---|\n"]
    for text, figure, at_most, at_least in TARGETS:
        wanted = f"≤ {at_most:g}" if at_most else f"≥ {at_least:g}" if at_least else "stated"
        try:
            figures = figure(runs)
        except KeyError:
            lines.append(f"| {text} | {wanted} | not measured | |\n")
            continue
        middle = median(figures)
        holds = (at_most is None or middle <= at_most) and (at_least is None or middle >= at_least)
        verdict = "" if wanted == "stated" else "yes" if holds else "**no**"
        lines.append(f"| {text} | {wanted} | {spread(figures)} | {verdict} |\n")
    return "".join(lines)


# ---------------------------------------------------------------- charts

OURS = "ours|run_parallel|create_with_ray|open_webdataset"


class Chart(NamedTuple):
    """What a chart shows: for each part, a pattern of the names "group: contestant" in it."""

    title: str
    parts: dict[str, str]
    one_scale: bool  # for all parts


CHARTS = {
    "speed.svg": Chart(
        "20,000 samples of 8 KB + 40 B: samples packed per second",
        {
            "Inside a running interpreter": "pack: (?!.*(alone|no fsync))",
            "Whole commands, start-up included": "(drivers|ray|peers): (?!.*100k)",
        },
        one_scale=True,
    ),
    "training.svg": Chart(
        "Samples read per second for a training",
        {
            "Bytes, 20,000 samples of 8 KB + 40 B": "training: (?!.*(rgb|workers))",
            "The same in 2 workers of a DataLoader": "training: (?!.*rgb).*workers",
            "Decoded, 2,000 pictures of 256x256 pixels": "training: .*rgb",
        },
        one_scale=False,
    ),
}
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #6e7781 } .title { font-weight: 600 }
.ours { fill: #2f81f7 } .peer { fill: #8c959f }
@media (prefers-color-scheme: dark) { text { fill: #9ea7b3 } }
</style>
"""


def speeds(rows: Iterable[Row], pattern: str) -> list[tuple[float, str]]:
    """Return the samples/s of each contestant that a pattern picks, the fastest first."""
    picked = (
        row for row in rows if row.samples and re.match(pattern, f"{row.group}: {row.contestant}")
    )
    return sorted(
        (
            (runs[0].samples / median(run.wall for run in runs), name)
            for name, runs in by_contestant(picked).items()
        ),
        reverse=True,
    )


def chart(rows: Sequence[Row], shown: Chart) -> str:
    """Return an SVG with a bar for each contestant: its samples/s."""
    bars = {title: speeds(rows, pattern) for title, pattern in shown.parts.items()}
    largest = max((part[0][0] for part in bars.values() if part), default=1)
    parts, y = [], 0
    for title, part in bars.items():
        y += 24
        parts.append(f'<text class="title" x="8" y="{y}">{escape(title)}: samples/s</text>\n')
        y += 10
        for speed, name in part:
            kind = "ours" if re.match(OURS, name) else "peer"
            width = max(1, round(speed / (largest if shown.one_scale else part[0][0]) * 400))
            parts.append(
                f'<text x="290" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
                f'<rect class="{kind}" x="298" y="{y + 1}" width="{width}" height="16" rx="2"/>'
                f'<text x="{304 + width}" y="{y + 13}">{speed:,.0f}</text>\n'
            )
            y += 21
    size = f'viewBox="0 0 770 {y + 8}" width="770" height="{y + 8}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n'
    return "".join([head, f"<title>{escape(shown.title)}</title>\n", STYLE, *parts, "</svg>\n"])


# ---------------------------------------------------------------- surroundings


def said(*command: str) -> str:
    """Return the last line that a command prints."""
    try:
        return subprocess.check_output(command, text=True).splitlines()[-1].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def version(package: str) -> str:
    """Return the name and version of an installed package."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"


def surroundings(data: Path) -> str:
    """Return, as a list, what the figures depend on besides the code."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    model = cpu[1] if cpu else "unknown"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"Python {platform.python_version()}, {version('webdataset')}, {version('ray')}",
        said("sh", "-c", "tar --version | head -n 1"),
        f"{platform.system()} {platform.release()}, {memory:.0f} GiB",
        f"{os.cpu_count()} CPUs: {model}",
        f"file system of the data: {said('df', '--output=fstype', str(data))}",
    ]
    return "".join(f"- {line}\n" for line in lines)
