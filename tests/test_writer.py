"""The writer: the bytes of wds.TarWriter, in bounded memory, and never a half that looks whole."""

from __future__ import annotations

import functools
import io
import os
import resource
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset as wds
from conftest import ROOT, members, write_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st

import create_webdataset as core
from sharding import archive
from sharding.errors import PackError

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.text("ab/é", min_size=80, max_size=300),
)
FIELDS = st.dictionaries(
    st.text("abcXYZ.é_0", min_size=1, max_size=12),
    st.one_of(st.binary(max_size=1500), st.binary(max_size=20).map(bytearray)),
    max_size=4,
)


@given(st.lists(st.tuples(NAMES, FIELDS), max_size=8))
@example([("x" * 96, {"jpg": b""}), ("x" * 97, {"jpg": b"1" * 512})])  # 100 bytes, and 101
@example([("k", {"jpg": b"1" * n}) for n in (511, 512, 513, 8192)])
@settings(max_examples=400, deadline=None)
def test_same_bytes_as_webdataset(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    with archive.FastTarWriter(ours) as fast, wds.TarWriter(theirs, encoder=False, mtime=0) as slow:
        for key, fields in samples:
            sample = {"__key__": key, **fields}
            assert fast.write(sample) == slow.write(sample)
    assert ours.getvalue() == theirs.getvalue()


@pytest.mark.parametrize("size", [0, 1, 8 * 1024**3 - 1, 8 * 1024**3, 1 << 40])
@pytest.mark.parametrize("name", ["a.jpg", "é.jpg", "x" * 200])
def test_headers_of_any_size(name: str, size: int) -> None:
    """A size beyond 8 GiB does not fit the header's eleven octal digits."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "bigdata", "bigdata"
    assert archive.make_header(name, size) == info.tobuf()


def test_a_content_in_memory_of_8_gib() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 8 << 30

    stream = io.BytesIO()
    archive.FastTarWriter(stream).write({"__key__": "a", "jpg": Huge()})
    assert stream.getvalue() == archive.make_header("a.jpg", 8 << 30)


def test_text_is_for_the_caller_to_encode() -> None:
    with pytest.raises(TypeError, match="field 'txt' is str"):
        archive.FastTarWriter(io.BytesIO()).write({"__key__": "a", "txt": "words"})


@pytest.mark.parametrize("sample", [{}, {"jpg": b""}, {"__key__": "a", "jpg": 1}])
def test_bad_samples(sample: dict) -> None:
    for writer in (archive.FastTarWriter(io.BytesIO()), wds.TarWriter(io.BytesIO(), encoder=False)):
        with pytest.raises((ValueError, TypeError)):
            writer.write(sample)


@pytest.mark.parametrize("written", [0, 1, 100])
def test_an_exception_leaves_no_finished_archive(written: int) -> None:
    stream = io.BytesIO()
    with pytest.raises(KeyboardInterrupt), archive.FastTarWriter(stream) as sink:
        for number in range(written):
            sink.write({"__key__": str(number), "jpg": bytes(10_000)})
        raise KeyboardInterrupt
    stream.seek(0)
    with pytest.raises(tarfile.ReadError), tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            tar.extractfile(info).read()  # type: ignore[union-attr]


def test_many_small_writes_are_few_large_ones() -> None:
    class Counter(io.BytesIO):
        writes = 0

        def write(self, data) -> int:
            self.writes += 1
            return super().write(data)

    stream = Counter()
    with archive.FastTarWriter(stream) as sink:
        for number in range(2_000):
            sink.write({"__key__": str(number), "jpg": bytes(1000)})
    assert stream.writes <= 2_000 * 2_024 / archive.WRITE_SIZE + 2


def test_short_writes_lose_nothing() -> None:
    """An unbuffered file may take less than it is given, also of the last zeros."""

    class Short(io.BytesIO):
        def write(self, data) -> int:
            return super().write(bytes(data[: max(1, len(data) // 2)]))

    ours, theirs = Short(), io.BytesIO()
    with archive.FastTarWriter(ours) as fast, wds.TarWriter(theirs, encoder=False, mtime=0) as slow:
        for writer in (fast, slow):
            writer.write({"__key__": "a", "jpg": b"x" * 3_000})
    assert ours.getvalue() == theirs.getvalue()


def test_a_buffer_that_is_used_again() -> None:
    """What is handed over is what is written, whatever its owner does with it later."""
    ours, buffer = io.BytesIO(), bytearray(b"first")
    with archive.FastTarWriter(ours) as sink:
        sink.write({"__key__": "a", "jpg": buffer, "txt": memoryview(buffer)})
        buffer[:] = b"other"
    with tarfile.open(fileobj=io.BytesIO(ours.getvalue())) as tar:
        assert [tar.extractfile(info).read() for info in tar] == [b"first"] * 2  # type: ignore[union-attr]


def test_shards_packed_in_threads(tmp_path: Path) -> None:
    """Large files go through a buffer, which no two writers may share."""
    source = write_pairs(tmp_path / "source", 0)
    for number in range(40):
        (source / f"{number}.jpg").write_bytes(os.urandom(core.WHOLE_SIZE * 4))
        (source / f"{number}.txt").touch()
    with ThreadPoolExecutor(4) as pool:
        pack = functools.partial(core.create_webdataset, source, tmp_path, total_shards=4)
        list(pool.map(lambda shard_id: pack(shard_id=shard_id), range(4)))
    for shard in tmp_path.glob("*.tar"):
        for name, data in members(shard).items():
            assert data == (source / name).read_bytes(), name


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_large_files_are_copied(extra: int, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3)
    large = os.urandom(core.WHOLE_SIZE + extra)
    (source / "sample-1.jpg").write_bytes(large)
    core.create_webdataset(source, tmp_path, 0, 1)
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
    size = core.AHEAD_SIZE * 2 if large else 1_000
    victim = source / "sample-20.jpg"
    victim.write_bytes(bytes(size))
    if slow:
        monkeypatch.setattr(core, "SLOW_READ", -1)
    fstat = os.fstat

    def fstat_then_change(fd: int) -> os.stat_result:
        status = fstat(fd)
        if status.st_size == size and status.st_ino == victim.stat().st_ino:
            os.truncate(victim, size + change)
        return status

    monkeypatch.setattr(os, "fstat", fstat_then_change)
    with pytest.raises(PackError, match=r"sample-20\.jpg.*changed"):
        core.create_webdataset(source, tmp_path / "o", 0, 1)
    assert os.listdir(tmp_path / "o") == []


def test_a_file_that_vanishes_or_becomes_a_fifo(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3)
    samples = core.list_samples(source).samples
    (tmp_path / "o").mkdir()
    (source / "sample-1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"source/sample-1\.jpg"):
        core.create_webdataset(source, tmp_path / "o", 0, 1, samples=samples)
    os.mkfifo(source / "sample-1.jpg")
    with pytest.raises(PackError, match=r"sample-1\.jpg.*changed"):
        core.create_webdataset(source, tmp_path / "o", 0, 1, samples=samples)
    assert os.listdir(tmp_path / "o") == []


def test_reading_ahead_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pairs(tmp_path / "source", 500, largest=30_000)
    (source / "sample-70.jpg").write_bytes(bytes(3 * core.AHEAD_SIZE))
    core.create_webdataset(source, tmp_path / "plain", 0, 1)
    threads = threading.active_count()
    monkeypatch.setattr(core, "SLOW_READ", -1)
    seen = set()
    read_batch = core.read_batch
    monkeypatch.setattr(
        core, "read_batch", lambda *args: (seen.add(threading.get_ident()), read_batch(*args))[1]
    )
    core.create_webdataset(source, tmp_path / "ahead", 0, 1)
    assert len(seen) > 1 and threading.active_count() == threads
    plain, ahead = (tmp_path / name / "shard-000000.tar" for name in ("plain", "ahead"))
    assert plain.read_bytes() == ahead.read_bytes()


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import create_webdataset as core
core.SLOW_READ = float(sys.argv[4])
core.create_webdataset(sys.argv[2], sys.argv[3], 0, 1)
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
        os.truncate(source / f"{number}.jpg", core.AHEAD_SIZE)
    assert peak_memory(source, tmp_path, slow_read) < 100
    (tmp_path / "shard-000000.tar").unlink()


def test_open_files_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are opened ahead, but never as many as the usual limit of macOS, 256."""
    source = write_pairs(tmp_path / "source", 0)
    for number in range(300):
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").touch()
        os.truncate(source / f"{number}.jpg", core.AHEAD_SIZE + 1)
    monkeypatch.setattr(core, "SLOW_READ", -1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        core.create_webdataset(source, tmp_path, 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (tmp_path / "shard-000000.tar").unlink()
