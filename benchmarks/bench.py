"""Measure the packers and the reader beside their peers, and write what was found to results/.

Contestants run in turn (A B C A B C ...). The first round warms up and is not timed; the work
that each did in it is compared: how many samples, and a checksum of their names and contents.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from charts import CHARTS, chart
from course import HERE, PROJECT, Course
from groups import GROUPS
from measure import Contestant, Skipped, run
from report import Row, read_rows, said, surroundings, table, verdicts, write_rows
from server import adopt_orphans
from tqdm import tqdm

TARGETS = {name: targets for name, (_, targets) in GROUPS.items()}
Work = dict[str, tuple[int, str]]  # samples and checksum, by contestant


def race(
    course: Course, group: str, repeats: int, skipped: list[str], commit: str
) -> Iterator[Row]:
    """Run the contestants of a group in turn; yield each timed run."""
    date = datetime.now().isoformat(" ", "minutes")
    try:
        contestants = GROUPS[group][0](course)
    except Skipped as reason:
        skipped.append(f"{group}: {reason}")
        return
    work: Work = {}
    for repeat in tqdm(range(repeats + 1), desc=group, unit=" rounds", disable=None):
        for contestant in list(contestants):
            env = {**(course.server.env if course.server else {}), **contestant.env}
            env |= {} if repeat else {"BENCH_CHECK": "1"}
            try:
                course.clear()
                os.sync()  # nobody pays for what another wrote
                if contestant.cold and not course.forget(contestant.cold):
                    warm = f"{group}: file by file: folders and inodes stay in memory"
                    skipped += [warm] if warm not in skipped else []
                figures = run(contestant._replace(env=env), course.log)
                if repeat == 0:
                    work[contestant.name] = course.check()
                    compare_work(contestant, work)
            except Skipped as reason:
                contestants.remove(contestant)
                why = str(reason).replace(str(course.root), "DATA").replace(str(PROJECT), ".")
                skipped.append(f"{group}: {contestant.name}: {why}")
            else:
                if repeat:
                    about = *work[contestant.name], date, commit
                    yield Row(group, contestant.name, repeat, *figures, *about)


def compare_work(contestant: Contestant, work: Work) -> None:
    """Shut out a contestant that did not do what it was asked for, or not what the others did."""
    count, checksum = work[contestant.name]
    if count != contestant.samples:
        raise Skipped(f"unequal work: {count:,} samples instead of {contestant.samples:,}")
    others = {other for n, other in work.values() if n == count and other and checksum}
    if len(others) > 1:
        raise Skipped(f"unequal work: {checksum} beside {', '.join(others - {checksum})}")


def write_results(folder: Path, rows: Sequence[Row], head: str, skipped: Sequence[str]) -> None:
    """Write the files of results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "samples.csv", rows)
    for name, picture in CHARTS.items():
        (folder / name).write_text(chart(rows, picture), encoding="utf-8")
    parts = [f"# Results\n\n{head}"]
    for name, (contestants, _) in GROUPS.items():
        if mine := [row for row in rows if row.group == name]:
            title = f"## {name}\n\n{contestants.__doc__}"
            runs = f"Median (min-max) of {max(row.repeat for row in mine)} runs"
            parts.append(f"{title} {runs}, {mine[0].date}, at {mine[0].commit}.\n\n{table(mine)}")
    if skipped:
        parts.append("## Skipped\n\n" + "".join(f"- {line}\n" for line in skipped))
    parts.append(f"## Targets\n\n{verdicts(TARGETS, rows)}")
    (folder / "summary.md").write_text("\n".join(parts), encoding="utf-8")


def main() -> int:
    """Run the command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--scale", type=float, default=1, help="size of the sets (default: 1)")
    parser.add_argument("--data", metavar="DIR", type=Path, default=tempfile.gettempdir())
    parser.add_argument("--keep", action="store_true", help="leave the data for the next time")
    parser.add_argument("--results", metavar="DIR", type=Path, default=HERE / "results")
    args = parser.parse_args()
    groups = args.groups or list(GROUPS)
    if args.scale != 1 and args.results == HERE / "results":
        parser.error("--scale needs --results elsewhere: those here are of full size")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    os.environ.update(PYTHON=sys.executable, RAY_USAGE_STATS_ENABLED="0")
    adopt_orphans(True)
    course = Course(args.data.resolve() / "webdataset-benchmark", args.scale)
    course.root.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.results / "samples.csv")  # groups that are not run keep their figures
    rows = [row for row in rows if row.group in set(GROUPS) - set(groups)]
    command = shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]])
    head = f"- last command: `{command}`\n{surroundings(course.root)}"
    skipped: list[str] = []
    # Before results are written, which would make it dirty.
    commit = said("git", "-C", str(PROJECT), "describe", "--always", "--dirty")
    try:
        for group in groups:
            try:
                runs = list(race(course, group, args.repeats, skipped, commit))
            finally:
                course.stop_server()
            rows += runs
            write_results(args.results, rows, head, skipped)
            print(f"## {group}\n\n{table(runs)}", flush=True)
        print(*skipped, verdicts({group: TARGETS[group] for group in groups}, rows), sep="\n")
    finally:
        shutil.rmtree(course.root / "emptied" if args.keep else course.root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
