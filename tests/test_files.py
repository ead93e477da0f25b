"""Reading the source's files: whole or in pieces, ahead or not, in bounded memory."""

from __future__ import annotations

import functools
import io
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from conftest import ROOT, members, slow_opens, write_pairs

from create_webdataset import create_webdataset
from sharding.errors import PackError
from sharding.folder import source as files
from sharding.folder.run import new_shard
from sharding.folder.staging import GONE, remove_leftovers
from sharding.listing import list_samples
from sharding.pack import pack_shard
from sharding.parallel import WIDTHS, Pace


def ahead(monkeypatch: pytest.MonkeyPatch, width: int = max(WIDTHS)) -> None:
    """Read so many things at a time from the first one on."""
    monkeypatch.setattr(Pace, "stretch", lambda _: (width, 1 << 20))


def test_shards_packed_in_threads(tmp_path: Path) -> None:
    """Large files go through a buffer, which no two writers may share."""
    source = write_pairs(tmp_path / "source", 0)
    for number in range(40):
        (source / f"{number}.jpg").write_bytes(os.urandom(files.WHOLE_SIZE * 4))
        (source / f"{number}.txt").touch()
    with ThreadPoolExecutor(4) as pool:
        pack = functools.partial(create_webdataset, source, tmp_path, total_shards=4)
        list(pool.map(lambda shard_id: pack(shard_id=shard_id), range(4)))
    for shard in tmp_path.glob("*.tar"):
        for name, data in members(shard).items():
            assert data == (source / name).read_bytes(), name


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_large_files_are_copied(extra: int, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3)
    large = os.urandom(files.WHOLE_SIZE + extra)
    (source / "sample-1.jpg").write_bytes(large)
    create_webdataset(source, tmp_path, 0, 1)
    assert members(tmp_path / "shard-000000.tar")["sample-1.jpg"] == large
    shard = (tmp_path / "shard-000000.tar").read_bytes()
    expected = io.BytesIO()
    with wds.TarWriter(expected, encoder=False, mtime=0) as sink:
        for number in range(3):
            fields = {f: (source / f"sample-{number}.{f}").read_bytes() for f in ("jpg", "txt")}
            sink.write({"__key__": f"sample-{number}", **fields})
    assert shard == expected.getvalue()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("slow", [False, True])
def test_a_file_that_changes_size(
    large: bool, change: int, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real changes, between the fstat and the end of the read."""
    source = write_pairs(tmp_path / "source", 40)
    size = files.AHEAD_SIZE * 2 if large else 1_000
    victim = source / "sample-20.jpg"
    victim.write_bytes(bytes(size))
    if slow:
        ahead(monkeypatch)
    fstat = os.fstat

    def fstat_then_change(fd: int) -> os.stat_result:
        status = fstat(fd)
        if status.st_size == size and status.st_ino == victim.stat().st_ino:
            os.truncate(victim, size + change)
            os.utime(victim, ns=(0, status.st_mtime_ns))  # as within a tick of a coarse clock
        return status

    monkeypatch.setattr(os, "fstat", fstat_then_change)
    with pytest.raises(PackError, match=r"sample-20\.jpg.*changed"):
        create_webdataset(source, tmp_path / "o", 0, 1)
    assert os.listdir(tmp_path / "o") == []


def test_a_file_that_vanishes_or_becomes_a_fifo(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3)
    samples = list_samples(source).samples
    (tmp_path / "o").mkdir()
    (source / "sample-1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"source/sample-1\.jpg"):
        pack_shard(source, samples, tmp_path / "o", 0).store()
    os.mkfifo(source / "sample-1.jpg")
    with pytest.raises(PackError, match=r"sample-1\.jpg.*changed"):
        pack_shard(source, samples, tmp_path / "o", 0).store()
    assert os.listdir(tmp_path / "o") == []


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_reading_ahead_gives_the_same_bytes(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pairs(tmp_path / "source", 500, largest=30_000)
    (source / "sample-70.jpg").write_bytes(bytes(3 * files.AHEAD_SIZE))
    create_webdataset(source, tmp_path / "plain", 0, 1)
    threads = threading.active_count()
    ahead(monkeypatch, width)
    seen = set()
    read_batch = files.read_batch
    monkeypatch.setattr(
        files, "read_batch", lambda *args: (seen.add(threading.get_ident()), read_batch(*args))[1]
    )
    create_webdataset(source, tmp_path / "ahead", 0, 1)
    assert len(seen) > 1 and threading.active_count() == threads
    plain, beside = (tmp_path / name / "shard-000000.tar" for name in ("plain", "ahead"))
    assert plain.read_bytes() == beside.read_bytes()


DISKS = [  # microseconds a file, at a time: 1, 4, 16; how much of the first is work; the best
    ((5, 15, 20), 5, 1),
    ((10, 15, 14), 9, 1),
    ((150, 30, 60), 50, 4),
    ((150, 60, 35), 50, 16),
    ((1_100, 280, 75), 20, 16),
    ((50_000, 13_000, 3_200), 20, 16),
    ((300, 400, 500), 50, 1),  # a disk that can do one thing at a time
]


def read(pace: Pace, disk: tuple[tuple[int, int, int], int, int], number: int) -> int:
    """Read so many files from such a disk; return the microseconds for each."""
    costs, busy, _ = disk
    took = 0
    for part in range(0, number, 500):  # shards of 500
        left = min(500, number - part)
        while left:
            width, most = pace.stretch()
            things = min(left, most)
            cost = costs[WIDTHS.index(width)]
            pace.took(things, things * cost, things * (busy if width == 1 else 5))
            left, took = left - things, took + things * cost
    return took // number


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("before", DISKS)
def test_the_pace_suits_the_disk(before: Any, disk: Any) -> None:
    """Whatever it was used to: what of a folder is in memory changes from file to file."""
    pace = Pace()
    read(pace, before, 10_000)
    read(pace, disk, 20_000)  # so long, at most, until it looks again
    assert read(pace, disk, 40_000) < 1.1 * disk[0][WIDTHS.index(disk[2])]
    assert pace.width == disk[2] or pace.trials


def test_short_waits_are_noticed(tmp_path: Path) -> None:
    """Of 0.2 ms for each file, as a disk takes that is no network, but has to be asked."""
    source = write_pairs(tmp_path / "source", 1_000)
    code = (
        "import io, sys, threading, time; from sharding.listing import list_samples\n"
        "from sharding.pack import write_samples; from sharding.folder import source\n"
        "samples, seen, read = list_samples(sys.argv[1]).samples, {}, source.read_batch\n"
        "def count(*args):\n"
        "    me = threading.get_ident(); seen[me] = seen.get(me, 0) + args[-1].__len__()\n"
        "    return read(*args)\n"
        "source.read_batch = count; write_samples(io.BytesIO(), sys.argv[1], samples)\n"
        "print(len(samples), seen.get(threading.get_ident(), 0), threading.active_count())"
    )
    env = slow_opens(tmp_path, 200)
    done = subprocess.check_output([sys.executable, "-c", code, source], env=env, text=True)
    number, here, threads = map(int, done.split())
    assert (number, threads) == (1_000, 1) and 0 < here < 100, done


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
from create_webdataset import create_webdataset
from sharding.parallel import Pace
if width := int(sys.argv[4]):
    Pace.stretch = lambda self: (width, 1 << 20)
create_webdataset(sys.argv[2], sys.argv[3], 0, 1)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_memory(source: Path, output: Path, width: int = 0) -> int:
    """Return the peak memory of a fresh process that packs a source, in MB."""
    if sys.platform != "linux":
        pytest.skip("needs /proc; the peak of getrusage would be that of the forking parent")
    command = [sys.executable, "-c", MEASURE, ROOT, source, output, width]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return int(done.stdout) // 1024


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 2)
    os.truncate(source / "sample-1.jpg", 300 << 20)  # a sparse file costs no disk, but a long read
    assert peak_memory(source, tmp_path) < 100
    (tmp_path / "shard-000000.tar").unlink()


@pytest.mark.parametrize("width", WIDTHS)
def test_memory_does_not_grow_with_the_shard(width: int, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 0)
    for number in range(600):  # 300 MB, each file as large as is read in one piece
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").touch()
        os.truncate(source / f"{number}.jpg", files.AHEAD_SIZE)
    assert peak_memory(source, tmp_path, width) < 100
    (tmp_path / "shard-000000.tar").unlink()


def test_open_files_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are opened ahead, but never as many as the usual limit of macOS, 256."""
    source = write_pairs(tmp_path / "source", 0)
    for number in range(300):
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").touch()
        os.truncate(source / f"{number}.jpg", files.AHEAD_SIZE + 1)
    ahead(monkeypatch)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        create_webdataset(source, tmp_path, 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (tmp_path / "shard-000000.tar").unlink()


def test_an_error_in_a_large_file_names_it() -> None:
    file = files.LargeFile(os.open("/proc/self/mem", os.O_RDONLY), "sample-1.jpg", 100, 0)
    with pytest.raises(OSError, match=r"'sample-1\.jpg'"):
        list(file.pieces(memoryview(bytearray(10))))


def test_a_large_file_that_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same size, but while it is copied: the shard would hold what never was."""
    source = write_pairs(tmp_path / "source", 2)
    victim = source / "sample-1.jpg"
    victim.write_bytes(bytes(4 << 20))
    readinto = files.LargeFile.readinto

    def touched(self: files.LargeFile, buffer: memoryview) -> int:
        os.utime(victim, ns=(1, 1))
        return readinto(self, buffer)

    monkeypatch.setattr(files.LargeFile, "readinto", touched)
    with pytest.raises(PackError, match=r"sample-1\.jpg.*changed"):
        create_webdataset(source, tmp_path / "o", 0, 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_samples_of_many_files(width: int, tmp_path: Path, monkeypatch) -> None:
    """Neither open files nor memory grow with the number of fields."""
    source, fields = tmp_path / "source", [f"f{number}" for number in range(70)]
    source.mkdir()
    for sample in range(8):  # more files than may be open
        for field in fields:
            (source / f"{sample}.{field}").touch()
            os.truncate(source / f"{sample}.{field}", files.AHEAD_SIZE + 1)
    if width > 1:
        ahead(monkeypatch, width)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        create_webdataset(source, tmp_path, 0, 1, fields)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (tmp_path / "shard-000000.tar").unlink()


def test_a_shard_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".shard-000000-01234567").touch()
    (tmp_path / f"{GONE}{'0' * 16}" / "x").mkdir(parents=True)  # half removed
    (tmp_path / f"{GONE}{'1' * 16}").symlink_to(tmp_path)
    with new_shard(str(tmp_path), 0) as new:
        remove_leftovers(str(tmp_path))
        assert len(os.listdir(tmp_path)) == 2
        new.stream.write(b"whole")
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == [f"{GONE}{'1' * 16}", "shard-000000.tar"]
