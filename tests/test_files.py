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

import pytest
import webdataset as wds
from conftest import ROOT, members, write_pairs

from create_webdataset import create_webdataset
from sharding.errors import PackError
from sharding.folder import source as files
from sharding.folder.run import new_shard
from sharding.folder.staging import GONE, remove_leftovers
from sharding.listing import list_samples
from sharding.pack import pack_shard


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
        monkeypatch.setattr(files, "SLOW_READ", -1)
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


def test_reading_ahead_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pairs(tmp_path / "source", 500, largest=30_000)
    (source / "sample-70.jpg").write_bytes(bytes(3 * files.AHEAD_SIZE))
    create_webdataset(source, tmp_path / "plain", 0, 1)
    threads = threading.active_count()
    monkeypatch.setattr(files, "SLOW_READ", -1)
    seen = set()
    read_batch = files.read_batch
    monkeypatch.setattr(
        files, "read_batch", lambda *args: (seen.add(threading.get_ident()), read_batch(*args))[1]
    )
    create_webdataset(source, tmp_path / "ahead", 0, 1)
    assert len(seen) > 1 and threading.active_count() == threads
    plain, ahead = (tmp_path / name / "shard-000000.tar" for name in ("plain", "ahead"))
    assert plain.read_bytes() == ahead.read_bytes()


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
from create_webdataset import create_webdataset
from sharding.folder import source as files
files.SLOW_READ = float(sys.argv[4])
create_webdataset(sys.argv[2], sys.argv[3], 0, 1)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_memory(source: Path, output: Path, slow_read: float = 1) -> int:
    """Return the peak memory of a fresh process that packs a source, in MB."""
    if sys.platform != "linux":
        pytest.skip("needs /proc; the peak of getrusage would be that of the forking parent")
    command = [sys.executable, "-c", MEASURE, ROOT, source, output, slow_read]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return int(done.stdout) // 1024


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 2)
    os.truncate(source / "sample-1.jpg", 300 << 20)  # a sparse file costs no disk, but a long read
    assert peak_memory(source, tmp_path) < 100
    (tmp_path / "shard-000000.tar").unlink()


@pytest.mark.parametrize("slow_read", [1, -1], ids=["plain", "ahead"])
def test_memory_does_not_grow_with_the_shard(slow_read: float, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 0)
    for number in range(600):  # 300 MB, each file as large as is read in one piece
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").touch()
        os.truncate(source / f"{number}.jpg", files.AHEAD_SIZE)
    assert peak_memory(source, tmp_path, slow_read) < 100
    (tmp_path / "shard-000000.tar").unlink()


def test_open_files_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are opened ahead, but never as many as the usual limit of macOS, 256."""
    source = write_pairs(tmp_path / "source", 0)
    for number in range(300):
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").touch()
        os.truncate(source / f"{number}.jpg", files.AHEAD_SIZE + 1)
    monkeypatch.setattr(files, "SLOW_READ", -1)
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


@pytest.mark.parametrize("slow_read", [1, -1], ids=["plain", "ahead"])
def test_samples_of_many_files(slow_read: float, tmp_path: Path, monkeypatch) -> None:
    """Neither open files nor memory grow with the number of fields."""
    source, fields = tmp_path / "source", [f"f{number}" for number in range(70)]
    source.mkdir()
    for sample in range(20):
        for field in fields:
            (source / f"{sample}.{field}").touch()
            os.truncate(source / f"{sample}.{field}", files.AHEAD_SIZE + 1)
    monkeypatch.setattr(files, "SLOW_READ", slow_read)
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
