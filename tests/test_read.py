"""The reader: the specified lines, every sample whatever the environment says, clear errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jpeg, run_script, touch

import create_webdataset
import read_webdataset


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
        ("file", "is no shard-*.tar"),
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
