"""The writer: the bytes of wds.TarWriter, in bounded memory, and never a half that looks whole."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
import webdataset as wds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharding import archive

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.text("ab/é", min_size=80, max_size=300),
)
FIELDS = st.dictionaries(
    st.text("abcXYZ.é_0", min_size=1, max_size=12),
    st.one_of(st.binary(max_size=1500), st.binary(max_size=20).map(bytearray)),
    max_size=4,
)


def plain_header(name: bytes, size: int) -> bytes:
    """Return the header that a member gets in the hot path of `write_members`."""
    middle, checksum, _ = archive._of_size(size)
    checksum += archive._name_checksum(name)
    return name.ljust(100, b"\0") + middle + archive._of_checksum(checksum)


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
    header = archive.make_header(name, size)
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
        info = tar.next()
    assert info and (info.name, info.size, info.isreg()) == (name, size, True)
    ours = archive.read_members(io.BytesIO(header), len(header) + size)
    assert next(ours) == (name, size)
    if len(name) < 100 and size < 8 << 30 and name.isascii():
        assert plain_header(name.encode(), size) == header


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


@pytest.mark.parametrize("seed", range(20))
def test_a_window_reads_what_the_stream_holds(seed: int) -> None:
    """At any place, of any size, whatever was read before; a stream may be a file or a bucket."""
    rng = random.Random(seed)
    content = rng.randbytes(3 * archive.WINDOW_SIZE)
    sizes = (1, 512, archive.SCAN_SIZE, archive.WINDOW_SIZE, 2 * archive.WINDOW_SIZE)
    window = archive.Window(io.BytesIO(content))
    for _ in range(300):
        size = rng.randrange(rng.choice(sizes) + 1)
        if rng.random() < 0.3:
            place = rng.choice((rng.randrange(len(content)), max(0, window.tell() - size)))
            window.seek(min(place, window.tell() + rng.choice((0, 1, 5_000, len(content)))))
        place = window.tell()
        assert window.read(size) == content[place : place + size], (place, size)
        assert window.tell() == place + len(content[place : place + size])


def test_headers_are_read_without_what_lies_between() -> None:
    """Large contents are passed over; small ones are read along, many at a time."""

    class Counter(io.BytesIO):
        count = bytes_read = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.count, self.bytes_read = self.count + 1, self.bytes_read + len(data)
            return data

    for size in (100, 1_000_000):
        stream = Counter()
        with archive.FastTarWriter(stream) as sink:
            for number in range(100):
                sink.write({"__key__": str(number), "jpg": bytes(size)})
        end = stream.seek(0, io.SEEK_END)
        stream.count = stream.bytes_read = 0
        assert sum(1 for _ in archive.read_members(archive.Window(stream), end)) == 100
        assert stream.count <= 12 if size == 100 else stream.bytes_read < end // 100, size


@pytest.mark.parametrize("seed", range(20))
def test_a_usual_header_is_one_of_ours(seed: int) -> None:
    """What is read in a short way has not one bit that this module would write otherwise."""
    rng, usual = random.Random(seed), 0
    for _ in range(500):
        name = rng.choice((b"a.jpg", b"x" * 100, "é.txt".encode(), b"\xff.txt", b"a/", b""))
        header = bytearray(plain_header(name, rng.choice((0, 7, 40, 8 << 10, (8 << 30) - 1))))
        for _ in range(rng.choice((0, 0, 1, 2))):
            header[rng.randrange(archive.BLOCK)] = rng.choice((0, 32, 47, 48, 55, 255))
        if rng.random() < 0.7:
            checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32
            header[148:156] = b"%06o\0 " % checksum
        found = archive._read_usual(bytes(header))
        if found:
            kind, name_read, size = found
            encoded = name_read.encode("utf-8", "surrogateescape")
            assert kind == b"0" and bytes(header) == plain_header(encoded, size)
            assert encoded and encoded[-1:] != b"/"
            usual += 1
    assert 50 < usual < 450, usual


def test_bytes_between_members_are_damage() -> None:
    """No reader shows what stands in the padding behind a member."""
    stream = io.BytesIO()
    with archive.FastTarWriter(stream) as sink:
        sink.write({"__key__": "a", "jpg": b"x", "txt": b"y"})
    good = stream.getvalue()
    for place in (archive.BLOCK + 1, 2 * archive.BLOCK - 1, 4 * archive.BLOCK - 1):
        damaged = bytearray(good)
        damaged[place] = 1
        with pytest.raises(archive.Damaged, match="bytes other than zero behind the member"):
            list(archive.read_members(io.BytesIO(damaged), len(damaged)))
