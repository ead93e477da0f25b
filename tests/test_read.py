"""The reader: the specified lines, every sample whatever the environment says, clear errors."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import jpeg, run_script, touch

import create_webdataset
import read_webdataset
from sharding.archive import make_header
from sharding.errors import PackError
from sharding.reading import read_samples


def make_dataset(folder: Path, samples: dict[str, tuple[bytes, bytes]], shards: int = 1) -> Path:
    """Pack samples, given as key -> (jpg, txt), into folder/output."""
    (folder / "source").mkdir()
    for key, (image, text) in samples.items():
        (folder / "source" / f"{key}.jpg").write_bytes(image)
        (folder / "source" / f"{key}.txt").write_bytes(text)
    for shard_id in range(shards):
        create_webdataset.create_webdataset(folder / "source", folder / "output", shard_id, shards)
    return folder / "output"


def test_specified_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = jpeg(64, 48)
    output = make_dataset(
        tmp_path,
        {
            "sample-0": (image, b"This is the description for sample 0.\n"),
            "sample-1": (b"", b"two\nlines \x1b[31m\xff"),
            "sample-2": (b"no image", "é".encode() * 300),
        },
        shards=2,
    )
    assert read_webdataset.main(["--path", str(output)]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "--- Sample 0 ---",
        "Key: sample-0",
        "Text: This is the description for sample 0.",
        f"Image size: 64x48, {len(image)} bytes",
        "--- Sample 1 ---",
        "Key: sample-2",
        f"Text: {'é' * 200}... (600 bytes)",
        "Image size: 8 bytes (not readable: UnidentifiedImageError)",
        "--- Sample 2 ---",
        "Key: sample-1",
        "Text: two\\nlines \\x1b[31m\\xff",
        "Image size: 0 bytes (not readable: UnidentifiedImageError)",
        "3 samples in 2 shards, 20,480 bytes: OK",
    ]


def test_limit_and_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = make_dataset(tmp_path, {str(n): (b"", b"") for n in range(5)}, shards=2)
    assert read_webdataset.main(["--path", str(output), "--limit", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines.count("Key: 0") == 1 and lines[-1].startswith("5 samples in")
    assert read_webdataset.main(["--path", str(output), "--quiet"]) == 0
    assert capfd.readouterr().out == "5 samples in 2 shards, 20,480 bytes: OK\n"


def test_environment_of_a_training_job(tmp_path: Path) -> None:
    output = make_dataset(tmp_path, {str(n): (b"", b"") for n in range(4)}, shards=4)
    job = {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "2"}
    done = run_script("read_webdataset.py", "--path", output, env=job)
    assert done.returncode == 0 and "\n4 samples in" in done.stdout, done
    assert "--- Sample 3 ---" in done.stdout


@pytest.mark.parametrize(
    "name", ["a#b?c;d", "pipe:echo x", "{0..3}", "x::y", "file:x", "s3:/y", "ü"]
)
def test_odd_paths(name: str, tmp_path: Path, monkeypatch, capfd) -> None:
    make_dataset(tmp_path, {"a": (b"", b"")}).rename(tmp_path / name.replace("/", ""))
    monkeypatch.chdir(tmp_path)
    assert read_webdataset.main(["--path", name.replace("/", ""), "--quiet"]) == 0
    assert capfd.readouterr().out.startswith("1 sample in 1 shard, ")


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("nowhere", "No such file"),
        ("empty", "pack some"),
        ("stray", "'shard-1.tar' has another name"),
        ("others", "'train-1.tar' has another name; shards begin with 'shard-000000.tar'"),
        ("file", "is not a shard-*.tar"),
    ],
)
def test_no_shards(name: str, cure: str, tmp_path: Path, capfd) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "stray", "shard-1.tar")
    touch(tmp_path / "others", "train-1.tar", "train-2.tar")
    (tmp_path / "file").touch()
    assert read_webdataset.main(["--path", str(tmp_path / name)]) == 2
    out, err = capfd.readouterr()
    assert not out and name in err and cure in err and err.count("\n") == 1


def test_damaged_shard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = make_dataset(tmp_path, {"a": (b"x" * 5000, b"")})
    os.truncate(output / "shard-000000.tar", 3000)
    assert read_webdataset.main(["--path", str(output)]) == 1
    err = capfd.readouterr().err
    assert "shard-000000.tar: cut short: the member at byte 0" in err and "Traceback" not in err


def test_head_of_the_output(tmp_path: Path) -> None:
    output = make_dataset(tmp_path, {str(n): (b"", b"") for n in range(2000)})
    command = [sys.executable, read_webdataset.__file__, "--path", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"--- Sample 0 ---\n"
        process.stdout.close()
        assert process.stderr.read() == b""


def test_short_texts_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    contents = {
        "jpg": jpeg(4, 4), "txt": b"words", "cls": b"3\n", "json": b'{\n "a": 1\n}',
        "npy": b"\x93NUMPY", "caption": "\u00e9t\u00e9".encode(), "bin": b"a\x00b",
        "esc": b"\x1b[31m", "long": b"x" * 201, "none": b"", "seg.png": jpeg(2, 3),
    }  # fmt: skip
    (tmp_path / "source").mkdir()
    for field, data in contents.items():
        (tmp_path / "source" / f"a.{field}").write_bytes(data)
    create_webdataset.create_webdataset(tmp_path / "source", tmp_path / "o", 0, 1, list(contents))
    assert (
        read_webdataset.main(["--path", str(tmp_path / "o"), "--fields", ",".join(contents)]) == 0
    )
    assert capfd.readouterr().out.splitlines()[:-1] == [
        "--- Sample 0 ---",
        "Key: a",
        "Text: words",
        "bin: 3 bytes",
        "caption: \u00e9t\u00e9",
        "cls: 3",
        "esc: 5 bytes",
        f"Image size: 4x4, {len(contents['jpg'])} bytes",
        'json: {\\n "a": 1\\n}',
        "long: 201 bytes",
        "none: 0 bytes",
        "npy: 6 bytes",
        f"Image size: 2x3, {len(contents['seg.png'])} bytes",
    ]


def keys_in(out: str) -> list[str]:
    return [line[5:] for line in out.splitlines() if line.startswith("Key: ")]


def test_samples_are_shown_before_the_check(tmp_path: Path, capfd, monkeypatch) -> None:
    """A look at a large dataset does not wait until all of it is read."""
    output = make_dataset(tmp_path, {str(n): (b"", b"") for n in range(5)}, shards=2)
    check, shown = read_webdataset.check_dataset, []

    def look_then_check(*args, **options):
        shown.extend(keys_in(capfd.readouterr().out))
        return check(*args, **options)

    monkeypatch.setattr(read_webdataset, "check_dataset", look_then_check)
    preview = tmp_path / "p.png"
    flags = ["--path", str(output), "--limit=3", "--preview", str(preview)]
    assert read_webdataset.main(flags) == 0
    assert shown == ["0", "2", "4"] and preview.exists()
    assert capfd.readouterr().out == "5 samples in 2 shards, 20,480 bytes: OK\n"


def test_a_look_without_a_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It says what it did, and never OK."""
    output = make_dataset(tmp_path, {str(n): (jpeg(9, 9), b"") for n in range(5)}, shards=2)
    look = ["--path", str(output), "--no-check"]
    preview = ["--preview", str(tmp_path / "p.png")]
    assert read_webdataset.main(look) == 0
    out = capfd.readouterr().out
    assert keys_in(out) == ["0", "2", "4", "1", "3"], "all, as without --limit"
    assert out.endswith("\n5 samples shown, nothing checked\n")
    assert read_webdataset.main([*look, *preview, "--quiet", "--limit=4"]) == 0
    assert capfd.readouterr().out == "4 samples drawn, nothing checked\n"
    assert read_webdataset.main([*look, *preview, "--limit=1"]) == 0
    assert capfd.readouterr().out.endswith("\n1 sample shown, 1 sample drawn, nothing checked\n")
    for wrong in (
        ["--source", str(tmp_path / "source")],
        ["--decode"],
        ["--report=r"],
        ["--quiet"],
    ):
        assert read_webdataset.main([*look, *wrong]) == 2
        out, err = capfd.readouterr()
        assert not out and f"{wrong[0].partition('=')[0]} makes no sense with --no-check" in err


@pytest.mark.parametrize("more", [[], ["--limit=4"]])
def test_damage_that_is_met_while_showing(more: list[str], tmp_path: Path, capfd) -> None:
    """What is sound of the shard is shown, then the next one, and the verdict names the damage."""
    output = make_dataset(tmp_path, {str(n): (b"x" * 600, b"") for n in range(8)}, shards=2)
    os.truncate(output / "shard-000000.tar", 3 * 2048 + 1700)  # 6 has lost its text
    flags = ["--path", str(output), *more]
    preview = ["--path", str(output), "--preview", str(tmp_path / "p.png"), "--quiet"]
    assert read_webdataset.main(flags) == 1
    out, err = capfd.readouterr()
    expected = ["0", "2", "4", "1", "3", "5", "7"][: 4 if more else 7]
    assert keys_in(out) == expected, out
    assert "damaged: shard-000000.tar: cut short: the end-of-archive" in err
    assert err.count("cut short") == 1 and ": 2 faults; fields: " in out
    for options in (flags, preview):
        assert read_webdataset.main([*options, "--no-check"]) == 1
        out, err = capfd.readouterr()
        assert f"damaged: {output}/shard-000000.tar: cut short" in err and err.count("\n") == 1
        assert out.endswith("nothing checked\n") and "OK" not in out


def test_a_sample_before_damage_is_enough_for_a_look(tmp_path: Path, capfd) -> None:
    output = make_dataset(tmp_path, {str(n): (b"x" * 600, b"") for n in range(8)})
    os.truncate(output / "shard-000000.tar", 3 * 2048 + 1700)
    assert read_webdataset.main(["--path", str(output), "--limit=2", "--no-check"]) == 0
    assert capfd.readouterr().out.endswith("\n2 samples shown, nothing checked\n")


def sparse(size: int) -> bytes:
    """Return a shard whose first member says that it is this large, and has next to nothing."""
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0" % (size - 512) + b"%011o\0" % 512
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


@pytest.mark.parametrize("how", ["sparse", "gzip"])
def test_a_look_at_what_would_fill_the_memory(how: str, tmp_path: Path) -> None:
    """webdataset would make gigabytes of a few kilobytes; our own walk is there before it."""
    shard = tmp_path / "shard-000000.tar"
    end = make_header("b.jpg", 0) + bytes(1024)
    if how == "sparse":
        shard.write_bytes(sparse(3 << 30) + end)
    else:
        with gzip.open(shard, "wb", 1) as stream:
            stream.write(make_header("a.jpg", 300 << 20))
            for _ in range(300):
                stream.write(bytes(1 << 20))
            stream.write(end)
    code = (
        "import resource, sys, read_webdataset\n"
        "code = read_webdataset.main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(code, used)\n"
    )
    command = [sys.executable, "-c", code, "--path", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(read_webdataset.__file__).parent
    )
    result, used = done.stdout.split()[-2:]
    assert result == "1" and "damaged: shard-000000.tar" in done.stderr, done
    assert int(used) < 600_000 * (1024 if sys.platform == "darwin" else 1)


def test_one_walk() -> None:
    """Who reads the members of a shard goes by the same rule; archives as a source are listed."""
    folder = Path(read_webdataset.__file__).with_name("sharding")
    rooms = {path for path in folder.rglob("*.py") if "read_members" in path.read_text()}
    users = {str(path.relative_to(folder)) for path in rooms}
    assert users == {"archive.py", "reading.py", "tars/walk.py"}
    assert len(Path(read_webdataset.__file__).read_text().splitlines()) <= 185


def test_a_reserved_field_is_no_sample(tmp_path: Path) -> None:
    """In training, too, whose samples have `__key__` and `__url__`; webdataset gives others."""
    (tmp_path / "shard-000000.tar").write_bytes(make_header("a.__x__", 0) + bytes(1024))
    with pytest.raises(PackError, match=r"member 'a.__x__', whose field is reserved"):
        list(read_samples(str(tmp_path / "shard-000000.tar")))
    (tmp_path / "shard-000000.tar").write_bytes(make_header("__x__/a.__x__", 0) + bytes(1024))
    assert list(read_samples(str(tmp_path / "shard-000000.tar"))) == [], "readers drop it"
