"""Draw the charts: a bar for each contestant, its samples a second."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from statistics import median

from report import Row, by_contestant

OURS = "ours|run_parallel|create_with_ray|open_webdataset"
# The parts of each chart: a title, and a pattern of the names "group: contestant" in it.
CHARTS = {
    "speed.svg": {
        "20,000 samples of 8 KB + 40 B, packed inside a running interpreter": "pack: ",
        "The same by whole commands, start-up included": "(ray|peers): ",
    },
    "training.svg": {
        "20,000 samples of 8 KB + 40 B, read as bytes": "training: (?!.*(rgb|workers))",
        "The same in 2 workers of a DataLoader": "training: (?!.*rgb).*workers",
        "Decoded, 2,000 pictures of 256x256 pixels": "training: .*rgb",
    },
}
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #6e7781 } .title { font-weight: 600 }
.ours { fill: #2f81f7 } .peer { fill: #8c959f }
@media (prefers-color-scheme: dark) { text { fill: #9ea7b3 } }
</style>
"""


def speeds(rows: Iterable[Row], pattern: str) -> list[tuple[float, str]]:
    """Return the samples/s of each contestant that a pattern picks, the fastest first."""
    picked = (row for row in rows if re.match(pattern, f"{row.group}: {row.contestant}"))
    found = by_contestant(row for row in picked if row.samples)
    return sorted(
        ((median(run.samples / run.wall for run in runs), name) for name, runs in found.items()),
        reverse=True,
    )


def chart(rows: Iterable[Row], shown: Mapping[str, str]) -> str:
    """Return an SVG; each of its parts has a scale of its own."""
    rows, bars, y = list(rows), [STYLE], 0
    for title, pattern in shown.items():
        y += 34
        bars.append(f'<text class="title" x="8" y="{y - 10}">{escape(title)}: samples/s</text>\n')
        part = speeds(rows, pattern)
        for speed, name in part:
            kind = "ours" if re.match(OURS, name) else "peer"
            width = max(1, round(speed / part[0][0] * 400))
            bars.append(
                f'<text x="290" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
                f'<rect class="{kind}" x="298" y="{y + 1}" width="{width}" height="16" rx="2"/>'
                f'<text x="{304 + width}" y="{y + 13}">{speed:,.0f}</text>\n'
            )
            y += 21
    size = f'viewBox="0 0 770 {y + 8}" width="770" height="{y + 8}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{"".join(bars)}</svg>\n'
