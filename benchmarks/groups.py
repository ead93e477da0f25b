"""The groups: which contestants run in turn, on which data, and what is asked of their times.

A group is a function that makes the data and returns the contestants, below its targets.
"""

from __future__ import annotations

from collections.abc import Callable

from course import AT_STORE, HERE, Course
from measure import Contestant
from report import Target, memory, ratio, seconds

KB = 1024
WDS = "plain loop over wds.WebDataset"
Contestants = Callable[[Course], list[Contestant]]
GROUPS: dict[str, tuple[Contestants, tuple[Target, ...]]] = {}


def group(*targets: Target) -> Callable[[Contestants], Contestants]:
    """Make a group of a function; its docstring is its title."""

    def register(contestants: Contestants) -> Contestants:
        GROUPS[contestants.__name__] = contestants, targets
        return contestants

    return register


@group(
    ratio("ours, 1 process", "GNU tar, 1 process", most=1.1),
    ratio("ours, 2 processes", "GNU tar, 2 processes", most=1.1),
    ratio("plain loop, 1 process", "ours, 1 process", least=7),
    ratio("plain loop, 1 process", "GNU tar, 1 process"),
)
def pack(course: Course) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, inside a running interpreter."""
    files = course.files(20_000, 8 * KB)
    return [
        course.call("ours, 1 process", "packers.ours", files),
        course.tar("GNU tar, 1 process", files),
        course.call("ours, 2 processes", "packers.ours", files, 2),
        course.tar("GNU tar, 2 processes", files, 2),
        course.call("plain loop, 1 process", "packers.wds", files),
    ]


@group(
    ratio("ours, 1 process", "GNU tar, 1 process", most=0.8),
    ratio("plain loop, 1 process", "ours, 1 process"),
)
def large(course: Course) -> list[Contestant]:
    """2,000 samples of 300 KB + 40 B, inside a running interpreter."""
    files = course.files(2_000, 300 * KB)
    return [
        course.call("ours, 1 process", "packers.ours", files),
        course.tar("GNU tar, 1 process", files),
        course.call("plain loop, 1 process", "packers.wds", files),
    ]


@group(ratio("GNU tar", "create_webdataset.py", least=6))
def slow(course: Course) -> list[Contestant]:
    """2,000 samples of 8 KB + 40 B, where each open takes 1 ms longer; whole commands."""
    files, env = course.files(2_000, 8 * KB), course.slow_opens()
    contestants = [
        course.pack("create_webdataset.py", files, "--shard-id 0 --total-shards 1"),
        course.tar("GNU tar", files),
    ]
    return [contestant._replace(env=env) for contestant in contestants]


@group(ratio("listing", "os.walk", most=0.2))
def slow_folders(course: Course) -> list[Contestant]:
    """12,000 samples in 600 folders, each of which takes 10 ms longer to open; inside Python."""
    names, env = course.names(12_000, 20), course.slow_opens(10)
    contestants = [
        course.call("listing", "packers.listing", names),
        course.call("os.walk", "packers.walk", names),
    ]
    return [contestant._replace(env=env) for contestant in contestants]


@group(
    ratio("listing", "one listing of obstore's", most=0.25),
    ratio("listing, one prefix", "one listing of obstore's, one prefix", most=1.2),
)
def slow_answers(course: Course) -> list[Contestant]:
    """15,000 samples in 24 prefixes, or in one; the store answers 150 ms later."""
    prefixes, one = (
        course.uploaded(course.names(15_000, 625)),
        course.uploaded(course.names(15_000)),
    )
    assert course.server
    env = course.server.delayed(0.15)
    contestants = [
        course.call(name + suffix, function, data)
        for data, suffix in ((prefixes, ""), (one, ", one prefix"))
        for name, function in (
            ("listing", "packers.listing"),
            ("one listing of obstore's", "packers.serial"),
        )
    ]
    return [contestant._replace(env=env) for contestant in contestants]


@group(
    ratio("ours", "ours, never ahead", most=0.35),
    ratio("GNU tar, in the same order", "ours", least=3),
    ratio("GNU tar, in the same order", "run_parallel.sh, 2 workers"),
)
def cold(course: Course) -> list[Contestant]:
    """100,000 samples of 1 KB + 40 B, of which nothing is in memory."""
    files = course.files(100_000, KB)
    packed = course.written("packers.ours", files, 4)
    contestants = [
        course.call("ours", "packers.ours", files),
        course.call("ours, never ahead", "packers.never_ahead", files),
        course.tar("GNU tar, in the same order", files, order="-1"),
        course.pack("run_parallel.sh, 2 workers", files, "--num-workers 2"),
        course.read("read_webdataset.py --source, 2 workers", packed, 2, files),
    ]
    return [contestant._replace(cold=files.path) for contestant in contestants]


@group(ratio("create_with_ray.py, 2 workers", "empty Ray, start and stop", most=1.5))
def ray(course: Course) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, whole commands."""
    files = course.files(20_000, 8 * KB)
    empty = course.call("empty Ray, start and stop", "packers.empty_ray", files, go=False)
    return [
        empty._replace(samples=0, waited_for=False),
        course.pack("create_with_ray.py, 2 workers", files, "--num-workers 2"),
    ]


@group(
    ratio("run_parallel.sh, 1024 shards", "run_parallel.sh, 4 shards", most=1.3),
    ratio("create_with_ray.py, 1024 shards", "create_with_ray.py, 4 shards", most=1.5),
)
def shards(course: Course) -> list[Contestant]:
    """100,000 samples of 1 KB + 40 B in few shards and many, 2 workers, whole commands."""
    files = course.files(100_000, KB)
    return [
        course.pack(f"{script}, {n} shards", files, f"--num-workers 2 --num-shards {n}")
        for script in ("run_parallel.sh", "create_with_ray.py")
        for n in (4, 1024)
    ]


@group(
    ratio("plain loop, 2 processes", "run_parallel.sh, 2 workers", least=2),
    ratio("datasets to parquet, 2 processes", "run_parallel.sh, 2 workers"),
    ratio("litdata optimize, 2 workers", "run_parallel.sh, 2 workers"),
    ratio("ray.data write_webdataset, 2 CPUs", "run_parallel.sh, 2 workers"),
)
def peers(course: Course) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B, packed by others and into other formats; whole commands."""
    files = course.files(20_000, 8 * KB)
    own = {"peer": True, "go": False}
    ray = course.call("ray.data write_webdataset, 2 CPUs", "packers.ray_data", files, **own)
    return [
        course.pack("run_parallel.sh, 2 workers", files, "--num-workers 2"),
        course.call("plain loop, 2 processes", "packers.wds", files, 2, go=False),
        ray._replace(waited_for=False),
        course.call("datasets to parquet, 2 processes", "packers.parquet", files, **own),
        course.call("litdata optimize, 2 workers", "packers.litdata", files, **own),
    ]


@group(
    ratio("run_parallel.sh, from shards", "run_parallel.sh, from files", most=1),
    ratio("run_parallel.sh, from shards", f"{WDS} into TarWriters", most=0.3),
    ratio("run_parallel.sh, from shards, shuffled", f"{WDS} into TarWriters", most=0.5),
    ratio("listing", "walk over the headers", most=1.5),
)
def repack(course: Course) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B from 8 shards into 32, 1 worker; whole commands."""
    files = course.files(20_000, 8 * KB)
    packed = course.written("packers.ours", files, 8)
    tars, flags = packed._replace(path=f"{packed.path}/*.tar"), "--num-workers 1 --num-shards 32"
    return [
        course.pack("run_parallel.sh, from files", files, flags),
        course.pack("run_parallel.sh, from shards", tars, flags),
        course.pack("run_parallel.sh, from shards, shuffled", tars, f"{flags} --shuffle 1"),
        course.call(f"{WDS} into TarWriters", "packers.wds_again", tars, go=False),
        course.call("listing", "packers.listing", tars),
        course.call("walk over the headers", "packers.headers", tars),
    ]


@group(
    ratio("run_parallel.sh, 1 worker", "run_parallel.sh, 2 workers", least=1.8),
    ratio("ray.data", "run_parallel.sh, 2 workers", least=1),
    ratio("litdata optimize, 2 workers", "run_parallel.sh, 2 workers", least=1),
)
def transform(course: Course) -> list[Contestant]:
    """500 pictures of 1 MB, made 256 pixels wide by the same function; whole commands."""
    files = course.written("packers.photos", course.files(500, 400 * 300 * 3), 2)
    own = {"peer": True, "go": False}
    flags = f"--num-shards 4 --transform {HERE}/packers.py:shrink --num-workers"
    ray = course.call("ray.data", "packers.ray_shrink", files, **own)
    return [
        course.pack("run_parallel.sh, 1 worker", files, f"{flags} 1"),
        course.pack("run_parallel.sh, 2 workers", files, f"{flags} 2"),
        ray._replace(waited_for=False),
        course.call("litdata optimize, 2 workers", "packers.litdata_shrink", files, **own),
    ]


@group(
    ratio("sha256sum", "read_webdataset.py --checksums", least=1),
    ratio("count_samples, from headers", "count_samples, from the record"),
)
def record(course: Course) -> list[Contestant]:
    """3,000 samples of 300 KB + 40 B with a record: is the copy whole, how many are there?"""
    packed = course.recorded(course.files(3_000, 300 * KB))
    flags, count = ["--path", packed.path, "--checksums", "--quiet"], "readers.ours_count"
    tars = packed._replace(path=f"{packed.path}/*.tar")  # a pattern has no record
    return [
        course.script("read_webdataset.py --checksums", "read_webdataset.py", packed, *flags),
        course.shell("sha256sum", 'sha256sum "$1"/*.tar', packed),
        course.call("count_samples, from the record", count, packed),
        course.call("count_samples, from headers", count, tars),
    ]


@group(
    ratio("run_parallel.sh, 2 workers", "GNU tar, 2 processes"),
    ratio("create_with_ray.py, 2 workers", "GNU tar, 2 processes"),
    seconds("listing", most=6),
    seconds("listing and plan, ten million files", most=10),
    memory("listing and plan, ten million files", "listing", most=400),
)
def million(course: Course) -> list[Contestant]:
    """A million samples of 1 KB + 40 B, and the names of ten million files; whole commands."""
    files, names = course.files(1_000_000, KB), course.names(5_000_000)
    packed = course.written("packers.ours", files, 4)
    flags, plan = "--num-workers 2 --num-shards 16", "listing and plan, ten million files"
    return [
        course.tar("GNU tar, 2 processes", files, 2),
        course.pack("run_parallel.sh, 2 workers", files, flags),
        course.pack("create_with_ray.py, 2 workers", files, flags),
        course.read("read_webdataset.py, 2 workers", packed, 2),
        course.read("read_webdataset.py --source, 2 workers", packed, 2, files),
        course.call("count_samples", "readers.ours_count", packed, go=False),
        course.call("listing", "packers.listing", files, go=False),
        course.call(plan, "packers.plan", names, go=False),
    ]


@group(
    ratio(WDS, "loop over open_webdataset", least=4),
    ratio(WDS, "read_webdataset.py, 2 workers", least=3),
    ratio(WDS, "read_webdataset.py --source, 2 workers"),
)
def reader(course: Course) -> list[Contestant]:
    """The shards of 100,000 samples of 1 KB + 40 B, read and checked; whole commands."""
    files = course.files(100_000, KB)
    packed = course.written("packers.ours", files, 4)
    return [
        course.call(WDS, "readers.wds", packed, go=False),
        course.call("loop over open_webdataset", "readers.ours", packed, go=False),
        course.read("read_webdataset.py", packed, 1),
        course.read("read_webdataset.py, 2 workers", packed, 2),
        course.read("read_webdataset.py --source, 2 workers", packed, 2, files),
    ]


@group(
    ratio("wds.WebDataset", "open_webdataset", least=4),
    ratio("litdata", "open_webdataset"),
    ratio("wds.WebDataset, 2 workers", "open_webdataset, 2 workers"),
    ratio("litdata, 2 workers", "open_webdataset, 2 workers"),
    *(
        ratio(f"wds.WebDataset, {decoded}", f"open_webdataset, {decoded}")
        for decoded in ("pilrgb", "torchrgb", "torchrgb, 2 workers")
    ),
)
def training(course: Course) -> list[Contestant]:
    """20,000 samples of 8 KB + 40 B as bytes, 2,000 of 18 KB decoded; inside an interpreter."""
    files = course.files(20_000, 8 * KB)
    packed = course.written("packers.ours", files, 4)
    chunks = course.written("packers.litdata", files, peer=True)
    drawn = course.written("packers.pictures", course.files(2_000, 32 * 32 * 3))
    pictures = course.written("packers.ours", drawn, 4)
    both = {"open_webdataset": "readers.ours", "wds.WebDataset": "readers.wds"}
    litdata = {"litdata": "readers.litdata"}
    two, tensors = {"workers": 2}, {"decode": "torchrgb"}
    return [
        *(course.call(name, both[name], packed) for name in both),  # torch would delay their end
        *(
            course.call(name + suffix, function, data, peer=True, **options)
            for suffix, readers, data, options in (
                ("", litdata, chunks, {}),
                (", 2 workers", both, packed, two),
                (", 2 workers", litdata, chunks, two),
                (", pilrgb", both, pictures, {"decode": "pilrgb"}),
                (", torchrgb", both, pictures, tensors),
                (", torchrgb, 2 workers", both, pictures, tensors | two),
            )
            for name, function in readers.items()
        ),
    ]


@group(
    ratio("s3fs, 64 at once", "create_webdataset", least=5),
    ratio("wds.WebDataset, pipe:curl", "open_webdataset"),
    ratio("litdata", "open_webdataset"),
)
def store(course: Course) -> list[Contestant]:
    """5,000 samples of 8 KB + 40 B packed from bucket to bucket, 20,000 read from there."""
    many = course.files(20_000, 8 * KB)
    chunks = course.uploaded(course.written("packers.litdata", many, peer=True))
    packed = course.uploaded(course.written("packers.ours", many, 4))
    objects = course.uploaded(course.files(5_000, 8 * KB))
    return [
        course.pack("run_parallel.sh, 2 workers", objects, "--num-workers 2", AT_STORE),
        course.call("create_webdataset", "packers.ours", objects, output=AT_STORE),
        course.call("s3fs, 64 at once", "packers.s3fs", objects, output=AT_STORE, peer=True),
        course.call("open_webdataset", "readers.ours", packed),
        course.call("wds.WebDataset, pipe:curl", "readers.wds", packed),
        course.call("litdata", "readers.litdata", chunks, peer=True),
    ]
