"""Measure the packers and the reader beside their peers, and write what was found to results/.

Contestants run in turn (A B C A B C ...). The first round warms up and is not timed; the work
that each did in it is compared: how many samples, and a checksum of their names and contents.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from measure import Contestant, Skipped, check_apart, run
from report import (
    CHARTS,
    EMPTY,
    Row,
    chart,
    read_rows,
    said,
    surroundings,
    table,
    verdicts,
    write_rows,
)
from server import BUCKET, Server, adopt_orphans
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
SHARDS = (1, 4, 16, 64, 256, 1024)
AT_STORE = "output"  # prefix of what contestants write to the store

# GNU tar lists its files within its time too, and in the fastest way, unsorted (ls -U).
TAR = """cd "$1" && ls -U | awk -v part="$3" -v parts="$4" 'NR % parts == part' |
tar --format=ustar -cf "$2/$3.tar" -T - && sync "$2/$3.tar" """


def elsewhere(jobs: list[list[str]], output: Path, other: str) -> list[list[str]]:
    """Return jobs that write to another place than the usual one."""
    return [[other if word == str(output) else word for word in job] for job in jobs]


class Bench:
    """The data, and how each contestant is called on it."""

    def __init__(self, root: Path, scale: float = 1) -> None:
        self.root, self.scale = root, scale
        self.output, self.log = root / "output", root / "log"
        # Peers may have an environment of their own: torch, which some of them bring along, adds
        # seconds to each start of webdataset.
        own = HERE / ".venv/bin/python"
        self.peer_python = str(own) if own.exists() else sys.executable
        self.skipped: list[str] = []
        self.server: Server | None = None  # of the present group
        self.commit = said("git", "-C", str(PROJECT), "describe", "--always", "--dirty")

    def data(self, samples: int, size: int, text: int = 40) -> tuple[str, int]:
        """Make a set of samples, unless it is there; return its folder and how many they are."""
        samples = max(16, round(samples * self.scale))
        folder = self.root / f"{samples}-of-{size}"
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            for i in tqdm(range(samples), desc=f"making {folder.name}", disable=None):
                (making / f"sample-{i}.jpg").write_bytes(os.urandom(size))
                (making / f"sample-{i}.txt").write_text(
                    f"sample {i}".ljust(text - 1) + "\n" if text else ""
                )
            making.rename(folder)
        return str(folder), samples

    def names(self, samples: int) -> tuple[str, int]:
        """Make names of samples, as links to a few empty files; return their folder as `data`."""
        samples = max(16, round(samples * self.scale))
        folder = self.root / f"{samples}-names"
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            for i in tqdm(range(samples), desc=f"making {folder.name}", disable=None):
                part = making / f"{i // 25_000:03d}"  # ext4 allows a file 65,000 links
                if i % 25_000 == 0:
                    part.mkdir(parents=True)
                    (part / ".empty").touch()
                for field in ("jpg", "txt"):
                    os.link(part / ".empty", part / f"sample-{i}.{field}")
            making.rename(folder)
        return str(folder), samples

    def compiled(self, source: str, *flags: str) -> str:
        """Compile a C file of this folder; return the result."""
        result = str(self.root / Path(source).stem)
        try:
            subprocess.run(["cc", "-O2", *flags, "-o", result, HERE / source, "-ldl"], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise Skipped(f"{source} cannot be compiled: {error}") from None
        return result

    def parts(self, command: Sequence[str], source: str, parts: int) -> list[list[str]]:
        """Return jobs that do one part of the work each."""
        return [[*command, source, str(self.output), str(i), str(parts)] for i in range(parts)]

    def script(self, name: str, source: str, parts: int = 1, peer: bool = False) -> list[list[str]]:
        """Return the jobs of a contestant of contestants.py."""
        python = self.peer_python if peer else sys.executable
        return self.parts([python, str(HERE / "contestants.py"), name], source, parts)

    def made(self, writer: str, source: str, parts: int = 1, peer: bool = False) -> str:
        """Let a contestant write a folder, unless it is there, for others to read; return it."""
        folder = self.root / f"made-by-{writer}" / Path(source).name
        if not folder.exists():
            folder.mkdir(parents=True)
            jobs = self.script(writer, source, parts, peer=peer)
            for job in elsewhere(jobs, self.output, str(folder)):
                subprocess.run(job, capture_output=True)
        return str(folder)

    def serve(self, **folders: str) -> Server:
        """Start an S3 server that holds the files of folders, each below a prefix."""
        self.server = Server(self.root / "server")
        for prefix, folder in folders.items():
            self.server.do("upload", folder, prefix)
        return self.server

    def stop_server(self) -> None:
        """Stop the server of a group, if it has one."""
        server, self.server = self.server, None
        if server:
            server.stop()

    def clear(self) -> None:
        """Remove what a contestant wrote; its files stay, empty, until all is over.

        ext4 makes no new file of an inode that was removed less than some minutes ago, and looks
        at each of them: 0.4 ms for a file, paid by whoever runs next (seen with perf).
        """
        if self.output.exists():
            for path in self.output.rglob("*"):
                if path.is_file():
                    os.truncate(path, 0)
            emptied = self.root / "emptied"
            emptied.mkdir(exist_ok=True)
            self.output.rename(emptied / str(len(os.listdir(emptied))))
        self.output.mkdir()
        self.log.unlink(missing_ok=True)
        if self.server:
            self.server.do("empty", AT_STORE)

    def check(self) -> tuple[int, str]:
        """Return how many samples the last run handled, and a checksum."""
        if self.server:
            self.server.do("download", AT_STORE, str(self.output))
        return check_apart(self.output, self.log)

    def tar(self, source: str, parts: int = 1) -> list[list[str]]:
        """Return the jobs of GNU tar."""
        return self.parts(["sh", "-c", TAR, "sh"], source, parts)

    def floor(self, source: str, parts: int = 1) -> list[list[str]]:
        """Return the jobs of the C program that only opens, reads and writes, if it compiles."""
        try:
            return self.parts([self.compiled("floor.c")], source, parts)
        except Skipped as reason:
            self.skipped.append(f"C floor: {reason}")
            return []

    def driver(self, script: str, source: str, workers: int, *flags: str) -> list[list[str]]:
        """Return the command line of a driver, as the only job."""
        interpreter = [sys.executable] if script.endswith(".py") else []
        command = [*interpreter, str(PROJECT / script), "--source", source]
        return [[*command, "--output", str(self.output), "--num-workers", str(workers), *flags]]


# ---------------------------------------------------------------- the groups


def pack(bench: Bench) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, inside a running interpreter."""
    source, count = bench.data(20_000, 8192)
    contestants = []
    for n, name in ((1, "1 process"), (2, "2 processes")):
        contestants += [
            Contestant(f"ours, {name}", bench.script("ours", source, n), count, go=True),
            Contestant(f"GNU tar, {name}", bench.tar(source, n), count),
            Contestant(f"C floor, {name}", bench.floor(source, n), count),
        ]
    return [
        *contestants,
        Contestant("plain loop, 1 process", bench.script("wds-pack", source), count, go=True),
        Contestant("ours, no fsync", bench.script("ours-unsynced", source), count, go=True),
        Contestant("ours, listing alone", bench.script("listing", source), count, go=True),
    ]


def large(bench: Bench) -> list[Contestant]:
    """2,000 samples of 300 KB + 40 B, inside a running interpreter."""
    source, count = bench.data(2_000, 300 * 1024)
    return [
        Contestant("ours, 1 process", bench.script("ours", source), count, go=True),
        Contestant("GNU tar, 1 process", bench.tar(source), count),
        Contestant("C floor, 1 process", bench.floor(source), count),
        Contestant("plain loop, 1 process", bench.script("wds-pack", source), count, go=True),
        Contestant("ours, no fsync", bench.script("ours-unsynced", source), count, go=True),
    ]


def slow(bench: Bench) -> list[Contestant]:
    """2,000 samples of 8 KB + 40 B, 4,000 files, where each open takes 1 ms longer."""
    source, count = bench.data(2_000, 8192)
    env = {"LD_PRELOAD": bench.compiled("slow_open.c", "-shared", "-fPIC")}
    core = [sys.executable, str(PROJECT / "create_webdataset.py"), "--source", source]
    core += ["--output", str(bench.output), "--shard-id", "0", "--total-shards", "1"]
    return [
        Contestant("ours, start-up excluded", bench.script("ours", source), count, True, env),
        Contestant("create_webdataset.py", [core], count, env=env),
        Contestant("GNU tar", bench.tar(source), count, env=env),
        Contestant("plain loop", bench.script("wds-pack", source), count, True, env),
    ]


def drivers(bench: Bench) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, whole commands."""
    source, count = bench.data(20_000, 8192)
    bash = bench.driver("run_parallel.sh", source, 4)
    return [
        Contestant("run_parallel.sh, 4 workers", bash, count),
        Contestant("plain loop, 4 processes", bench.script("wds-pack", source, 4), count),
    ]


def ray(bench: Bench) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B (100k: 100,000 of 1 KB + 40 B), whole commands."""
    source, count = bench.data(20_000, 8192)
    many, many_count = bench.data(100_000, 1024)
    ours = bench.driver("create_with_ray.py", source, 2)
    one, two = (bench.driver("create_with_ray.py", many, n, "--num-shards", "4") for n in (1, 2))
    return [
        Contestant(EMPTY, bench.script("ray-empty", source), 0, waited_for=False),
        Contestant("create_with_ray.py, 2 workers", ours, count, waited_for=False),
        Contestant(
            "plain loop as Ray tasks", bench.script("ray-wds", source), count, waited_for=False
        ),
        Contestant("create_with_ray.py, 100k, 1 worker", one, many_count, waited_for=False),
        Contestant("create_with_ray.py, 100k, 2 workers", two, many_count, waited_for=False),
    ]


def shards(bench: Bench) -> list[Contestant]:
    """100,000 samples of 1 KB + 40 B in 1 to 1,024 shards, 2 workers, whole commands."""
    source, count = bench.data(100_000, 1024)
    contestants = []
    for script in ("run_parallel.sh", "create_with_ray.py"):
        for n in SHARDS:
            jobs = bench.driver(script, source, 2, "--num-shards", str(n))
            waited_for = script == "run_parallel.sh"
            name = f"{script}, {n} shard{'s' if n > 1 else ''}"
            contestants.append(Contestant(name, jobs, count, waited_for=waited_for))
    return contestants


def samples(bench: Bench) -> list[Contestant]:
    """1,000 to 100,000 samples of 1 KB + 40 B, inside a running interpreter."""
    contestants = []
    for n in (1_000, 10_000, 100_000):
        source, count = bench.data(n, 1024)
        listing, ours = bench.script("listing", source), bench.script("ours", source)
        contestants.append(Contestant(f"listing {n:,}", listing, count, go=True))
        contestants.append(Contestant(f"packing {n:,}", ours, count, go=True))
    return contestants


def million(bench: Bench) -> list[Contestant]:
    """A million samples of 1 KB + 40 B, and the names of ten million files; whole commands."""
    source, count = bench.data(1_000_000, 1024)
    shards = bench.made("ours", source, 4)
    names, name_count = bench.names(5_000_000)
    contestants = [Contestant("GNU tar, 2 processes", bench.tar(source, 2), count)]
    for script in ("run_parallel.sh", "create_with_ray.py"):
        jobs = bench.driver(script, source, 2, "--num-shards", "16")
        waited_for = script == "run_parallel.sh"
        contestants.append(Contestant(f"{script}, 2 workers", jobs, count, waited_for=waited_for))
    read = [sys.executable, str(PROJECT / "read_webdataset.py"), "--path", shards, "--quiet"]
    read += ["--num-workers", "2"]
    for name, jobs, number in (
        ("read_webdataset.py, 2 workers", [read], count),
        ("read_webdataset.py --source, 2 workers", [[*read, "--source", source]], count),
        ("count_samples", bench.script("ours-count", shards), count),
        ("loop over open_webdataset", bench.script("ours-read", shards), count),
        ("listing", bench.script("listing", source), count),
        ("listing, ten million files", bench.script("listing", names), name_count),
        ("listing and plan, ten million files", bench.script("plan", names), name_count),
    ):  # the readers count alone: their checksum is no packer's
        contestants.append(Contestant(name, jobs, number, env={"BENCH_CHECK": ""}))
    return contestants


def reader(bench: Bench) -> list[Contestant]:
    """The shards of 100,000 samples of 1 KB + 40 B, read and checked; whole commands."""
    source, count = bench.data(100_000, 1024)
    shards = bench.made("ours", source, 4)
    read = [sys.executable, str(PROJECT / "read_webdataset.py"), "--path", shards, "--quiet"]
    proof = [*read, "--source", source, "--num-workers", "2"]
    return [
        Contestant("plain loop over wds.WebDataset", bench.script("wds-read", shards), count),
        Contestant("loop over open_webdataset", bench.script("ours-read", shards), count),
        Contestant("read_webdataset.py", [read], count),
        Contestant("read_webdataset.py, 2 workers", [[*read, "--num-workers", "2"]], count),
        Contestant("read_webdataset.py --source, 2 workers", [proof], count),
    ]


def training(bench: Bench) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B as bytes, 2,000 of 18 KB decoded; inside an interpreter."""
    source, count = bench.data(20_000, 8192)
    shards, chunks = bench.made("ours", source, 4), bench.made("litdata", source, peer=True)
    noise, picture_count = bench.data(2_000, 32 * 32 * 3)
    pictures = bench.made("ours", bench.made("pictures", noise), 4)
    contestants = [  # without torch, which would lengthen the end of these two
        Contestant("open_webdataset", bench.script("ours-read", shards), count, go=True),
        Contestant("wds.WebDataset", bench.script("wds-read", shards), count, go=True),
    ]
    for name, reader, folder in (
        ("webshart", "webshart-read", bench.made("webshart-index", shards, peer=True)),
        ("litdata", "litdata-read", chunks),
        ("mosaicml-streaming", "mds-read", bench.made("mds", source, peer=True)),
        ("open_webdataset, 2 workers", "ours-read-2", shards),
        ("wds.WebDataset, 2 workers", "wds-read-2", shards),
        ("litdata, 2 workers", "litdata-read-2", chunks),
        ("open_webdataset, pilrgb", "ours-pilrgb", pictures),
        ("wds.WebDataset, pilrgb", "wds-pilrgb", pictures),
        ("open_webdataset, torchrgb", "ours-torchrgb", pictures),
        ("wds.WebDataset, torchrgb", "wds-torchrgb", pictures),
        ("open_webdataset, torchrgb, 2 workers", "ours-torchrgb-2", pictures),
        ("wds.WebDataset, torchrgb, 2 workers", "wds-torchrgb-2", pictures),
    ):
        jobs = bench.script(reader, folder, peer=True)
        number = picture_count if folder == pictures else count
        contestants.append(Contestant(name, jobs, number, go=True))
    return contestants


def peers(bench: Bench) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, packed by others and into other formats; whole commands."""
    source, count = bench.data(20_000, 8192)
    bash = bench.driver("run_parallel.sh", source, 2)
    contestants = [
        Contestant("run_parallel.sh, 2 workers", bash, count),
        Contestant("plain loop, 2 processes", bench.script("wds-pack", source, 2), count),
    ]
    for name, script, module, parts in (
        ("ray.data write_webdataset, 2 CPUs", "ray-data", "ray.data, pandas, pyarrow", 1),
        ("datasets to parquet, 2 processes", "datasets", "datasets", 1),
        ("litdata optimize, 2 workers", "litdata", "litdata", 1),
        ("MDSWriter, 2 processes", "mds", "streaming", 2),
    ):
        found = subprocess.run([bench.peer_python, "-c", f"import {module}"], capture_output=True)
        if found.returncode:
            bench.skipped.append(f"peers: {name}: cannot import {module}")
        else:
            jobs = bench.script(script, source, parts, peer=True)
            waited_for = script != "ray-data"
            contestants.append(Contestant(name, jobs, count, waited_for=waited_for))
    return contestants


def store(bench: Bench) -> list[Contestant]:
    """5,000 samples of 8 KB + 40 B (300 KB: 300 of these) from bucket to bucket; 20,000 read."""
    few, few_count = bench.data(5_000, 8192)
    large, large_count = bench.data(300, 300 * 1024)
    many, many_count = bench.data(20_000, 8192)
    shard, shards = bench.made("ours", few), bench.made("ours", many, 4)
    chunks, mds = (bench.made(name, many, peer=True) for name in ("litdata", "mds"))
    server = bench.serve(raw=few, large=large, shards=shards, litdata=chunks, mds=mds)
    env, output = server.env, f"{BUCKET}/{AT_STORE}"
    driver = elsewhere(bench.driver("run_parallel.sh", f"{BUCKET}/raw", 2), bench.output, output)
    contestants = [Contestant("run_parallel.sh, 2 workers", driver, few_count, env=env)]
    for name, script, source, count in (
        ("create_webdataset", "ours", f"{BUCKET}/raw", few_count),
        ("s3fs", "s3fs", f"{BUCKET}/raw", few_count),
        ("s3fs, 64 at once", "s3fs-cat", f"{BUCKET}/raw", few_count),
        ("boto3", "boto3", f"{BUCKET}/raw", few_count),
        ("boto3, 32 threads", "boto3-threads", f"{BUCKET}/raw", few_count),
        ("GETs alone, 32 threads", "bare-gets", f"{BUCKET}/raw", few_count),
        ("upload alone", "bare-upload", shard, few_count),
        ("create_webdataset, 300 KB", "ours", f"{BUCKET}/large", large_count),
        ("s3fs, 300 KB", "s3fs", f"{BUCKET}/large", large_count),
        ("boto3, 300 KB", "boto3", f"{BUCKET}/large", large_count),
        ("GETs alone, 32 threads, 300 KB", "bare-gets", f"{BUCKET}/large", large_count),
        ("open_webdataset", "ours-read", f"{BUCKET}/shards", many_count),
        ("wds.WebDataset, pipe:curl", "wds-curl-read", f"{BUCKET}/shards", many_count),
        ("litdata", "litdata-store-read", f"{BUCKET}/litdata", many_count),
        ("mosaicml-streaming", "mds-store-read", f"{BUCKET}/mds", many_count),
        ("download alone", "bare-download", f"{BUCKET}/shards", many_count),
    ):
        peer = script.startswith(("s3fs", "boto3", "litdata", "mds"))
        jobs = bench.script(script, source, peer=peer)
        if count != many_count:  # readers keep their cache, if any, on the disk
            jobs = elsewhere(jobs, bench.output, output)
        contestants.append(Contestant(name, jobs, count, True, env))
    return contestants


PACKING = (pack, large, slow, drivers, ray, shards, samples, million)
GROUPS = {f.__name__: f for f in (*PACKING, reader, training, peers, store)}


# ---------------------------------------------------------------- the race


def race(bench: Bench, group: str, repeats: int) -> Iterator[Row]:
    """Run the contestants of a group in turn; yield each timed run."""
    try:
        contestants = [contestant for contestant in GROUPS[group](bench) if contestant.jobs]
    except Skipped as reason:
        bench.skipped.append(f"{group}: {reason}")
        return
    date = datetime.now().isoformat(" ", "minutes")
    work: dict[str, tuple[int, str]] = {}
    total = (repeats + 1) * len(contestants)
    with tqdm(total=total, desc=group, unit=" runs", disable=None) as bar:
        for repeat in range(repeats + 1):
            for contestant in list(contestants):
                bench.clear()
                os.sync()  # nobody pays for what another wrote
                try:
                    checked = {} if repeat else {"BENCH_CHECK": "1"}
                    env = {**checked, **contestant.env}
                    figures = run(contestant._replace(env=env), bench.log)
                    if repeat == 0:
                        work[contestant.name] = bench.check()
                        compare_work(contestant, work)
                except Skipped as reason:
                    contestants.remove(contestant)
                    why = str(reason).replace(str(bench.root), "DATA").replace(str(PROJECT), ".")
                    bench.skipped.append(f"{group}: {contestant.name}: {why}")
                else:
                    if repeat:
                        about = *work[contestant.name], date, bench.commit
                        yield Row(group, contestant.name, repeat, *figures, *about)
                bar.update()


def compare_work(contestant: Contestant, work: dict[str, tuple[int, str]]) -> None:
    """Shut out a contestant that did not do what it was asked for, or not what the others did."""
    count, checksum = work[contestant.name]
    if count != contestant.samples:
        raise Skipped(f"unequal work: {count:,} samples instead of {contestant.samples:,}")
    others = {other for n, other in work.values() if n == count and other and checksum}
    if len(others) > 1:
        raise Skipped(f"unequal work: {checksum} beside {', '.join(others - {checksum})}")


def write_results(bench: Bench, folder: Path, rows: Sequence[Row], command: str) -> None:
    """Write the files of results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "samples.csv", rows)
    for name, picture in CHARTS.items():
        (folder / name).write_text(chart(rows, picture), encoding="utf-8")
    parts = [f"# Results\n\n- last command: `{command}`\n{surroundings(bench.root)}"]
    for group, contestants in GROUPS.items():
        if mine := [row for row in rows if row.group == group]:
            title = f"## {group}\n\n{contestants.__doc__}"
            runs = f"Median (min-max) of {max(row.repeat for row in mine)} runs"
            parts.append(f"{title} {runs}, {mine[0].date}, at {mine[0].commit}.\n\n{table(mine)}")
    if bench.skipped:
        parts.append("## Skipped\n\n" + "".join(f"- {line}\n" for line in bench.skipped))
    parts.append(f"## Targets\n\n{verdicts(rows)}")
    (folder / "summary.md").write_text("\n".join(parts), encoding="utf-8")


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--scale", type=float, default=1, help="size of the sets (default: 1)")
    parser.add_argument("--data", metavar="DIR", type=Path, default=tempfile.gettempdir())
    parser.add_argument("--keep", action="store_true", help="leave the data for the next time")
    parser.add_argument("--results", metavar="DIR", type=Path, default=HERE / "results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    parser = build_parser()
    args = parser.parse_args(argv)
    groups = args.groups or list(GROUPS)
    if args.scale != 1 and args.results == HERE / "results":
        parser.error("--scale needs --results elsewhere: those here are of full size")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    os.environ.update(PYTHON=sys.executable, RAY_USAGE_STATS_ENABLED="0")
    adopt_orphans(True)
    bench = Bench(args.data.resolve() / "webdataset-benchmark", args.scale)
    bench.root.mkdir(parents=True, exist_ok=True)
    # Groups that are not run now keep their figures.
    rows = [row for row in read_rows(args.results / "samples.csv") if row.group not in groups]
    command = shlex.join(
        ["python", "benchmarks/bench.py", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        for group in groups:
            try:
                runs = list(race(bench, group, args.repeats))
            finally:
                bench.stop_server()
            rows += runs
            write_results(bench, args.results, rows, command)
            print(f"## {group}\n\n{table(runs)}", flush=True)
        print(*bench.skipped, verdicts(rows), sep="\n")
    finally:
        shutil.rmtree(bench.root / "emptied" if args.keep else bench.root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
