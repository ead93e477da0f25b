"""The checks: each fault is named, nothing sound is refused, nothing hostile does harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from conftest import SOAK, jpeg, touch, write_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import create_webdataset as core
import read_webdataset as reader
from sharding import archive, images, verify, verify_shard
from sharding.folder import source as files
from sharding.shards import shard_name

SHARDS = 5


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of 53 samples in 5 shards."""
    folder = tmp_path_factory.mktemp("good")
    source = write_pairs(folder / "source", 50)
    (source / "d.e").mkdir()
    for name in ("d.e/nested", "é" * 70, "x" * 120):
        (source / f"{name}.JPG").write_bytes(b"picture" + name.encode())
        (source / f"{name}.txt").write_bytes(name.encode())
    for shard_id in range(SHARDS):
        core.create_webdataset(source, folder / "output", shard_id, SHARDS)
    return source, folder / "output"


def check(path: Path, capfd: pytest.CaptureFixture[str], *flags: str | Path) -> tuple[int, str]:
    """Return exit code and faults of a check; summary and progress keep to their streams."""
    code = reader.main(["--path", str(path), "--quiet", *map(str, flags)])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and ("OK" in out) == (code == 0)
    assert (err == "") == (code == 0)
    return code, err


@pytest.mark.parametrize("workers", ["1", "3"])
def test_good_dataset(workers: str, good: tuple[Path, Path], capfd) -> None:
    source, output = good
    assert check(output, capfd, "--num-workers", workers) == (0, "")
    assert check(output, capfd, "--num-workers", workers, "--source", source) == (0, "")


def kill_self(_: verify_shard.Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process(good: tuple[Path, Path], capfd, monkeypatch) -> None:
    """As when memory runs out."""
    monkeypatch.setattr(verify, "check_shard", kill_self)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Ray driver that ran here has set its own
    assert reader.main(["--path", str(good[1]), "--quiet", "--num-workers=2"]) == 1
    out, err = capfd.readouterr()
    assert not out and "a checking process was killed" in err and err.count("\n") == 1


def test_an_interrupt_is_no_damage(good: tuple[Path, Path], capfd, monkeypatch) -> None:
    """Ctrl-C while shards are compared with the source ends the proof; it was once swallowed."""
    calls, read_batch = iter([1, 2]), files.read_batch

    def interrupted(*args: object) -> files.Batch:
        if not next(calls, None):
            raise KeyboardInterrupt
        return read_batch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "read_batch", interrupted)
    assert reader.main(["--path", str(good[1]), "--source", str(good[0]), "--quiet"]) == 130
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_a_check_at_once(workers: int, tmp_path: Path) -> None:
    """As with large shards: nobody waits until they are read."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").touch()
        (tmp_path / f"{name}.jpg").touch()
        os.truncate(tmp_path / f"{name}.jpg", 4 << 30)  # sparse
    for shard_id in range(2):
        header = archive.make_header(f"{'ab'[shard_id]}.jpg", 4 << 30)
        (tmp_path / shard_name(shard_id)).write_bytes(header)
        os.truncate(tmp_path / shard_name(shard_id), (4 << 30) + 20 * 512)
    command = [sys.executable, reader.__file__, "--path", tmp_path, "--source", tmp_path]
    process = subprocess.Popen(
        [*map(str, command), "--quiet", f"--num-workers={workers}"], stdout=subprocess.PIPE
    )
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"") and time.monotonic() - began < 1


def test_how_to_pack_a_shard_again(good: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    shutil.copytree(good[1], tmp_path / "o")
    os.truncate(tmp_path / "o" / "shard-000003.tar", 600)
    code, err = check(tmp_path / "o", capfd, "--source", good[0])
    cure = f"--source {good[0]} --output {tmp_path}/o --shard-id 3 --total-shards 5, with the other"
    assert code == 1 and cure in err, err


def test_datasets_side_by_side(good: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    """A pattern finds keys that two folders share, though their shards have the same names."""
    shutil.copytree(good[1], tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(good[1] / "shard-000003.tar", tmp_path / "b")
    code, err = check(tmp_path / "?" / "*.tar", capfd)
    pair = f"in {tmp_path}/a/shard-000003.tar and {tmp_path}/b/shard-000003.tar"
    assert code == 1 and "key in two shards: " in err and pair in err, err


def test_an_empty_shard_too_many(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """wds.TarWriter writes such a shard when it gets no samples."""
    source, output = write_pairs(tmp_path / "source", 2), tmp_path / "output"
    for shard_id in range(2):
        core.create_webdataset(source, output, shard_id, 2)
    (output / "shard-000002.tar").write_bytes(bytes(10_240))
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and "empty shard: shard-000002.tar" in err, err


def test_shuffled_and_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "source", 20)
    (source / "more.txt").touch()
    flags = ["--skip-bad", "--shuffle=5"]
    base = ["--source", str(source), "--output", str(tmp_path / "o"), "--shard-id=0"]
    assert core.main([*base, "--total-shards=3", "--shard-step=1", *flags]) == 0
    capfd.readouterr()
    assert check(tmp_path / "o", capfd, "--source", source, *flags)[0] == 0
    code, err = check(tmp_path / "o", capfd, "--source", source, "--skip-bad")
    assert code == 1 and "another shard than" in err
    assert reader.main(["--path", str(tmp_path / "o"), "--source", str(source)]) == 2


def test_a_source_that_has_grown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No shard is called missing that never was."""
    source, output = write_pairs(tmp_path / "source", 40), tmp_path / "output"
    for shard_id in range(4):
        core.create_webdataset(source, output, shard_id, 4)
    (output / "shard-000003.tar").unlink()
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and "missing shard: shard-000003.tar\n" in err, err
    os.truncate(output / "shard-000000.tar", 600)  # the next one tells, then
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and "missing shard: shard-000003.tar\n" in err, err
    core.create_webdataset(source, output, 0, 4)
    (source / "sample-00.jpg").touch()
    (source / "sample-00.txt").touch()
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and "missing shard" not in err and "'sample-00'" in err, err


def test_files_that_begin_alike(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One has lost its end since, the other has got zeros, as behind it in the shard."""
    source, output = write_pairs(tmp_path / "source", 4, largest=1), tmp_path / "output"
    for name in ("sample-1.jpg", "sample-2.jpg"):
        (source / name).write_bytes(b"x" * 100)
    core.create_webdataset(source, output, 0, 1)
    os.truncate(source / "sample-1.jpg", 50)
    os.truncate(source / "sample-2.jpg", 150)
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and err.count("bytes differ from the source") == 2, err


def test_a_field_that_all_samples_lack(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """None of them differs from the others."""
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "output"
    core.create_webdataset(source, output, 0, 1, "jpg")
    code, err = check(output, capfd, "--source", source)
    assert code == 1 and err.count("fields differ from the source: shard-000000.tar") == 4, err


def samples_of(shard: Path) -> list[tuple[str, dict[str, bytes]]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for info in tar:
            key, field = wds.tariterators.base_plus_ext(info.name)
            samples.setdefault(key, {})[field] = tar.extractfile(info).read()  # type: ignore
    return list(samples.items())


def rewrite(shard: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with shard.open("wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as sink:
        for key, fields in samples:
            sink.write({"__key__": key, **fields})


def flip_a_bit(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    data = bytearray(shard.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    return shard.name


def cut(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    os.truncate(shard, rng.randrange(shard.stat().st_size))
    return shard.name


def cut_at_a_member(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    with tarfile.open(shard) as tar:
        os.truncate(shard, rng.choice(tar.getmembers()).offset)
    return shard.name


def swap(shards: list[Path], rng: random.Random) -> str:
    one, two = rng.sample(shards, 2)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    return "another shard than"


def remove_member(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    samples = samples_of(shard)
    key, fields = rng.choice(samples)
    del fields[rng.choice(sorted(fields))]
    rewrite(shard, samples)
    return repr(key)[:30]


def remove_sample(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    samples = samples_of(shard)
    key, _ = samples.pop(rng.randrange(len(samples)))
    rewrite(shard, samples)
    return f"missing sample: {key!r}"[:80]


def duplicate(shards: list[Path], rng: random.Random) -> str:
    one, two = rng.choice(shards), rng.choice(shards)
    sample = rng.choice(samples_of(one))
    rewrite(two, [*samples_of(two), sample])
    return f"{sample[0]!r}"[:30]


def rename(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    samples = samples_of(shard)
    place = rng.randrange(len(samples))
    samples[place] = ("renamed", samples[place][1])
    rewrite(shard, samples)
    return "extra sample, not in the source: 'renamed'"


def remove_shard(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    shard.unlink()
    return f"missing shard: {shard.name}"


def stray(shards: list[Path], rng: random.Random) -> str:
    name = rng.choice(["shard-5.tar", "shard-000001 (copy).tar", "shard-.tar", "shard-x\n.tar"])
    shutil.copy(shards[0], shards[0].parent / name)
    return repr(name)[1:-1]


def extra_shard(shards: list[Path], _rng: random.Random) -> str:
    shutil.copy(shards[0], shards[0].parent / shard_name(len(shards)))
    return "key"


def garbage(shards: list[Path], rng: random.Random) -> str:
    shard = rng.choice(shards)
    with shard.open("ab") as stream:
        stream.write(rng.randbytes(rng.randrange(1, 2000)))
    return shard.name


FAULTS: list[Callable[[list[Path], random.Random], str]] = [
    flip_a_bit, cut, cut_at_a_member, swap, remove_member, remove_sample, duplicate, rename,
    remove_shard, stray, extra_shard, garbage,
]  # fmt: skip


@pytest.mark.parametrize("inject", FAULTS, ids=lambda fault: fault.__name__)
def test_single_faults(inject, good, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """216 random faults in all, each named by the proof."""
    source, output = good
    for seed in range(18):
        rng = random.Random(f"{inject.__name__} {seed}")
        shutil.copytree(output, tmp_path / "o")
        named = inject(sorted((tmp_path / "o").iterdir()), rng)
        code, err = check(tmp_path / "o", capfd, "--source", source)
        assert code == 1 and named in err, (seed, named, err)
        shutil.rmtree(tmp_path / "o")


WITHOUT_SOURCE = [cut, cut_at_a_member, remove_member, duplicate, stray, extra_shard, garbage]


@pytest.mark.parametrize("inject", WITHOUT_SOURCE, ids=lambda fault: fault.__name__)
def test_faults_that_show_without_the_source(inject, good, tmp_path: Path, capfd) -> None:
    for seed in range(5):
        rng = random.Random(f"{inject.__name__} {seed}")
        shutil.copytree(good[1], tmp_path / "o")
        named = inject(sorted((tmp_path / "o").iterdir()), rng)
        code, err = check(tmp_path / "o", capfd)
        assert code == 1 and (named in err or inject is remove_member), (named, err)
        shutil.rmtree(tmp_path / "o")


def test_another_tool_is_judged_by_its_samples(good, tmp_path: Path, capfd) -> None:
    """Other modes, times, header formats and folder entries, but the samples where they belong."""
    source, output = good
    formats = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
    for shard_id in range(SHARDS):
        name = shard_name(shard_id)
        with tarfile.open(tmp_path / name, "w", format=formats[shard_id % 2]) as tar:
            folder = tarfile.TarInfo("d.e")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for key, fields in samples_of(output / name):
                for field, data in fields.items():
                    info = tarfile.TarInfo(f"{key}.{field}")
                    info.size, info.mtime, info.mode = len(data), 1.5, 0o600
                    tar.addfile(info, io.BytesIO(data))
    assert check(tmp_path, capfd, "--source", source) == (0, "")
    assert check(tmp_path, capfd) == (0, "")


def header(name: bytes = b"a.jpg", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """Return a tar header with a right checksum, whatever else is in it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000444\0" * 3
    block[124:136], block[136:148], block[156:157] = size, b"00000000000\0", kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
HOSTILE = {
    "negative size": header(size=b"-0000000001\0") + END,
    "negative base-256 size": header(size=b"\xff" * 12) + END,
    "huge size": header(size=b"77777777777\0") + END,
    "huge base-256 size": header(size=b"\x80" + b"\xff" * 11) + END,
    "hard link": header(kind=b"1") + END,
    "link": header(kind=b"2") + END,
    "device": header(kind=b"3") + END,
    "fifo": header(kind=b"6") + END,
    "contiguous": header(kind=b"7") + END,
    "sparse": header(kind=b"S") + END,
    "global pax": header(kind=b"g") + END,
    "huge pax header": header(size=b"00010000000\0", kind=b"x")
    + b"2097152 comment=".ljust((1 << 21) - 1, b"x") + b"\n" + header() + END,
    "pax size": header(size=b"%011o\0" % 21, kind=b"x") + b"21 size=" + b"9" * 12 + b"\n"
    + bytes(491) + header() + END,
    "pax sparse map": header(size=b"%011o\0" % 25, kind=b"x") + b"25 GNU.sparse.major=1\n".ljust(25)
    + bytes(487) + header() + END,
    "bad pax": header(size=b"%011o\0" % 12, kind=b"x") + b"99 path=xyz\n" + bytes(500)
    + header() + END,
    "path traversal": header(b"../../etc/passwd") + END,
    "absolute": header(b"/etc/passwd") + END,
    "no tar": b"not a tar" * 1000,
    "empty file": b"",
    "only zeros": bytes(10240),
    "one zero block": header() + bytes(512),
    "two pax headers": 2 * (header(size=b"%011o\0" % 14, kind=b"x") + b"14 path=b.jpg\n"
    + bytes(498)) + header() + END,
    "bzip2 by a name": header(b"BZh91AY&SY.jpg") + END,
    "folder with content": header() + header(b"d/", size=b"00000001000\0", kind=b"5")
    + header(b"b.jpg") + END,
    "folder by a name": header() + header(b"b.jpg/", kind=b"\0") + END,
    "gzip": b"\x1f\x8b" + bytes(2000),
    "reserved": header(b"__x__/a.jpg") + END,
    "reserved field": header(b"a.__url__") + END,
    "no field": header(b"README") + END,
    "hidden": header(b".jpg") + END,
    "field twice": header() + header(b"a.JPG") + END,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_hostile_shards(name: str, decode: list[str], tmp_path: Path, capfd) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(HOSTILE[name])
    assert reader.main(["--path", str(tmp_path), *decode]) == 1
    err = capfd.readouterr().err
    assert "shard-000000.tar: " in err and "Traceback" not in err and len(err) < 500
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.tar"]


def mutate(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for place, patch in edits:
        place %= len(changed)
        changed[place : place + len(patch)] = patch
    return bytes(changed)


SEED = (
    header(size=b"%011o\0" % 5) + b"image" + bytes(507) + header(b"a.txt") + header(b"b.jpg") + END
)


@given(
    st.one_of(
        st.binary(max_size=3000),
        st.lists(
            st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=20)), max_size=4
        ).map(lambda edits: mutate(SEED, edits)),
        st.lists(
            st.builds(
                header,
                st.sampled_from(
                    [b"a.jpg", b"a.txt", b"b.jpg", b"b", b"__c.jpg", b"d/e.f.g", b"\xff.x"]
                ),
                st.sampled_from(
                    [b"00000000000\0", b"00000000010\0", b"00000001000\0", b"\x80" + bytes(11)]
                ),
                st.sampled_from([b"0", b"0", b"0", b"\0", b"5", b"x", b"L", b"g", b"2", b"K"]),
            ),
            max_size=6,
        ).map(lambda blocks: b"".join(blocks) + END),
    )
)
@example(SEED)
@settings(max_examples=30_000 if SOAK else 300, deadline=None)
def test_what_is_counted_is_what_webdataset_yields(tmp_path_factory, data: bytes) -> None:
    """On any bytes: a named fault, or the very samples that wds.WebDataset yields."""
    shard = tmp_path_factory.getbasetemp() / "shard-000000.tar"
    shard.write_bytes(data)
    report = verify_shard.check_shard(verify_shard.Task(str(shard)))
    if report.faults:
        return
    theirs = list(wds.WebDataset([str(shard)], shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == report.keys
    assert report.samples == len(theirs)


def test_decode_and_preview(tmp_path: Path, capfd, monkeypatch) -> None:
    whole = jpeg(40, 30)
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    half = whole[: len(whole) // 2]
    pictures = {"a": whole, "b": half, "c": b"", "d": bomb.getvalue(), "e": whole}
    (tmp_path / "source").mkdir()
    for key, data in pictures.items():
        (tmp_path / "source" / f"{key}.jpg").write_bytes(data)
        (tmp_path / "source" / f"{key}.txt").write_bytes(b"\x1b[31m some words " * 9)
    for shard_id in range(2):
        core.create_webdataset(tmp_path / "source", tmp_path / "o", shard_id, 2)
    assert check(tmp_path / "o", capfd) == (0, "")
    code, err = check(tmp_path / "o", capfd, "--decode", "--source", tmp_path / "source")
    assert code == 1
    lines = [line for line in err.splitlines() if "cannot be decoded" in line]
    assert [line.split("'")[1] for line in lines] == ["c.jpg", "b.jpg", "d.jpg"], err
    assert "DecompressionBomb" in lines[2]
    monkeypatch.setattr(images, "MAX_IMAGE", len(whole) - 1)
    code, err = check(tmp_path / "o", capfd, "--decode")
    assert code == 1 and "'a.jpg' (too large)" in err and "'e.jpg' (too large)" in err, err
    preview = tmp_path / "preview.png"
    assert check(tmp_path / "o", capfd, "--preview", preview)[0] == 0
    with Image.open(preview) as sheet:
        assert sheet.size == (4 * 160, 2 * 204)
        colours = {sheet.getpixel((column * 160 + 80, 30)) for column in range(4)}
        assert len(colours) >= 2
    for wrong in (["x.nope"], ["x.psd"], ["x"], ["no/x.png"], ["x.png", "--limit=1001"]):
        assert reader.main(["--path", str(tmp_path / "o"), "--preview", *wrong]) == 2
        out, err = capfd.readouterr()
        assert not out and "--preview" in err and err.count("\n") == 1, err


def test_what_training_could_not_decode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Texts, JSON and numbers, as webdataset's own decoders read them."""
    good = {"txt": "né".encode(), "json": b"[1]", "cls": b" 7\n"}
    bad = {
        "cp1252": {"txt": "né".encode("cp1252")},
        "utf16": {"txt": "né".encode("utf-16")},
        "broken": {"json": b'{"a": '},
        "deep": {"json": b"[" * 100_000},
        "word": {"cls": b"seven"},
    }
    source, output = tmp_path / "source", tmp_path / "o"
    source.mkdir()
    for key, fields in {"good": {}, "empty": {"txt": b""}, **bad}.items():
        for field, data in {**good, **fields}.items():
            (source / f"{key}.{field}").write_bytes(data)
    core.create_webdataset(source, output, 0, 1, "txt,json,cls")
    report = tmp_path / "report"
    code, err = check(output, capfd, "--decode", "--report", report)
    assert code == 1 and err.count("field that cannot be decoded") == len(bad), err
    read = [json.loads(line) for line in report.read_text().splitlines()]
    names = {f"{key}.{field}" for key, fields in bad.items() for field in fields}
    assert {line["name"] for line in read} == names
    dataset = wds.WebDataset([str(output / "shard-000000.tar")], shardshuffle=False)
    for sample in dataset:
        fields = [field for field in good if f"{sample['__key__']}.{field}" in names]
        for field in good:
            try:
                wds.autodecode.basichandlers(field, sample[field])
            except (ValueError, RecursionError):
                assert field in fields
            else:
                assert field not in fields
    for key in bad:
        for path in source.glob(f"{key}.*"):
            path.unlink()
    for path in source.glob("*.txt"):
        touch(source, f"{path.stem}.heic", f"{path.stem}.caption")
    core.create_webdataset(source, output, 0, 1, "txt,json,cls,heic,caption")
    flags = ["--path", str(output), "--decode", "--quiet", "--report", str(report)]
    assert reader.main(flags) == 0
    assert capfd.readouterr().out.endswith(": OK; 1 empty text; not decoded: 2 caption, 2 heic\n")
    assert report.read_text() == "", "an earlier report is none of these shards"


def test_a_report_names_every_fault(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twelve broken images: all in the report, which names the files to leave out."""
    source, output, report = tmp_path / "source", tmp_path / "o", tmp_path / "report"
    write_pairs(source, 12)
    for path in source.glob("sample-*1.jpg"):
        path.rename(path.with_suffix(".JPG"))  # not the name of its member
    for number in range(12, 20):
        (source / f"sample-{number}.jpg").write_bytes(jpeg(9, 9))
        (source / f"sample-{number}.txt").touch()
    core.create_webdataset(source, output, 0, 1)
    code, err = check(output, capfd, "--decode", "--source", source, "--report", report)
    images = [line for line in err.splitlines() if line.startswith("image that cannot be decoded")]
    assert code == 1 and len(images) == 6 and images[-1].endswith("and 7 more")
    for line in map(json.loads, report.read_text().splitlines()):
        (source / line["name"]).unlink()
    core.create_webdataset(source, output, 0, 1, skip_bad=True)
    assert reader.main(["--path", str(output), "--decode", "--quiet"]) == 0
    assert "8 samples" in capfd.readouterr().out


@pytest.mark.filterwarnings("error")
def test_images_that_pillow_warns_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Damaged EXIF data, and transparency in a palette, are no faults, and cost no lines."""
    source, exif, palette = tmp_path / "source", io.BytesIO(), io.BytesIO()
    source.mkdir()
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\1\0\6"
    Image.new("RGB", (9, 9)).save(exif, "JPEG", exif=damaged)
    Image.new("P", (9, 9)).save(palette, "PNG", transparency=b"\0\1")
    for name, data in (("a", exif), ("b", palette)):
        (source / f"{name}.img.jpg").write_bytes(data.getvalue())
        (source / f"{name}.txt").touch()
    core.create_webdataset(source, tmp_path / "o", 0, 1, ("img.jpg", "txt"))
    flags = ["--path", str(tmp_path / "o"), "--decode", "--preview", str(tmp_path / "p.png")]
    assert reader.main(flags) == 0
    out, err = capfd.readouterr()
    assert not err and out.count("Image size: 9x9, ") == 2, (out, err)


def test_first_five_of_a_kind(good, tmp_path: Path, capfd) -> None:
    source, output = good
    shutil.copytree(output, tmp_path / "o")
    (tmp_path / "o" / "shard-000002.tar").unlink()
    code, err = check(tmp_path / "o", capfd, "--source", source)
    assert code == 1 and err.count("missing sample: '") == 5 and "missing sample: and 6 more" in err


def test_folder_in_a_shards_place(good, tmp_path: Path, capfd) -> None:
    shutil.copytree(good[1], tmp_path / "o")
    (tmp_path / "o" / "shard-000005.tar").mkdir()
    code, err = check(tmp_path / "o", capfd)
    assert code == 1 and "not a file: shard-000005.tar" in err


def test_paths_are_never_run(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (f"pipe:touch {tmp_path}/ran", "http://127.0.0.1:9/x", "{a,b}", "-"):
        assert reader.main(["--path", path] if path != "-" else ["--path=-"]) == 2
        said = capfd.readouterr().err
        assert ("URLs are not supported" if "//1" in path else "No such file") in said
    assert not os.listdir(tmp_path)


def test_fields_are_counted_by_the_sample(tmp_path: Path, capfd) -> None:
    """The few are named, each of them, and not the many; nor a shard that is proved."""
    source, output, report = tmp_path / "source", tmp_path / "o", tmp_path / "report"
    write_pairs(source, 120)
    for shard_id in range(3):
        core.create_webdataset(source, output, shard_id, 3)
    for name in ("shard-000001.tar", "shard-000002.tar"):
        samples = samples_of(output / name)
        rewrite(output / name, [(k, {"jpg": v["jpg"]}) for k, v in samples[:10]] + samples[10:])
    code, err = check(output, capfd, "--report", report)
    named = [json.loads(line) for line in report.read_text().splitlines()]
    assert code == 1 and len(named) == 20 and all(" has jpg" in n["detail"] for n in named)
    assert err.endswith("and 15 more\n") and "--optional-fields may allow it" in err
    code, err = check(output, capfd, "--source", source, "--report", report)
    named = [json.loads(line) for line in report.read_text().splitlines()]
    assert code == 1 and all(n["name"] and "shard-000000" not in n["detail"] for n in named), err


def test_every_frame_is_decoded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of an animation whose second frame is cut short."""
    source, image = tmp_path / "source", io.BytesIO()
    source.mkdir()
    frames = [Image.effect_noise((64, 64), 99 + number) for number in range(2)]
    frames[0].save(image, "GIF", save_all=True, append_images=frames[1:])
    (source / "a.gif").write_bytes(image.getvalue())
    (source / "b.gif").write_bytes(image.getvalue()[:-1_000])
    core.create_webdataset(source, tmp_path / "o", 0, 1, "gif")
    code, err = check(tmp_path / "o", capfd, "--decode")
    assert code == 1 and "'b.gif'" in err and "'a.gif'" not in err, err


def test_more_that_training_could_not_decode(tmp_path: Path, capfd) -> None:
    source, image = tmp_path / "source", io.BytesIO()
    source.mkdir()
    Image.new("L", (9, 9)).save(image, "PPM")
    for key, good in (("a", True), ("b", False)):
        for field, data in (
            ("pgm", image.getvalue()),
            ("jp2", None),
            ("txt.gz", gzip.compress("né".encode())),
            ("json.gz", gzip.compress(b"[1]")),
        ):
            if field == "jp2":
                Image.new("L", (9, 9)).save(jp2 := io.BytesIO(), "JPEG2000")
                data = jp2.getvalue()
            (source / f"{key}.{field}").write_bytes(data if good else b"P5 9 9 255 garbage")
    core.create_webdataset(source, tmp_path / "o", 0, 1, "pgm,jp2,txt.gz,json.gz")
    code, err = check(tmp_path / "o", capfd, "--decode")
    assert code == 1 and "'a." not in err, err
    assert all(f"'b.{field}'" in err for field in ("pgm", "jp2", "txt.gz", "json.gz")), err
