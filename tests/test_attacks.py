"""What an attack on the scripts once found, and must not find again."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, hashes, run_script, write_pairs

import create_webdataset as core
import create_with_ray
import read_webdataset as reader
from sharding import show
from sharding.errors import PackError
from sharding.folder import dataset as folder
from sharding.folder import mounts
from sharding.plan import PLAN


def test_tars_of_a_linked_source_are_safe(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "shard-000000.tar").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("real")
    flags = ["--fields=tar", "--num-shards=1", "--source", tmp_path / "link", "--output"]
    for output in ("real", "link", "real/deeper"):
        done = run_script("run_parallel.sh", *flags, tmp_path / output)
        assert done.returncode == 2 and "inside --source" in done.stderr
    assert (tmp_path / "real" / "shard-000000.tar").read_bytes() == b"mine"


@pytest.mark.parametrize("flag", ["--source=", "--output=", "--num-shards=", "--num-workers="])
@pytest.mark.parametrize("script", ["run_parallel.sh", "create_with_ray.py"])
def test_empty_flags(flag: str, script: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    (tmp_path / "shard-000007.tar").touch()
    before = hashes(tmp_path)
    done = run_script(script, "--source=.", "--output=o", flag, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert hashes(tmp_path) == before


def test_decode_runs_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path / "source", 1)
    (source / "sample-0.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
    )
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    flags = ["--path", str(tmp_path / "o"), "--decode", "--preview", str(tmp_path / "p.png")]
    assert reader.main(flags) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("limit", [2, 4])
def test_replaced_while_it_is_read(limit: int, tmp_path: Path, capfd) -> None:
    """Also where its last samples are not looked at."""
    source = write_pairs(tmp_path / "source", 4)
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    print_sample = show.print_sample

    def replace_then_print(*args: object) -> None:
        core.create_webdataset(source, tmp_path / "o", 0, 1)
        print_sample(*args)  # type: ignore[arg-type]

    show.print_sample = replace_then_print  # type: ignore[assignment]
    try:
        assert reader.main(["--path", str(tmp_path / "o"), "--limit", str(limit)]) == 1
    finally:
        show.print_sample = print_sample
    out, err = capfd.readouterr()
    assert "replaced while it was read" in err and "OK" not in out


@pytest.mark.parametrize("script", ["create_webdataset.py", "read_webdataset.py"])
def test_closed_and_full_streams(script: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 2)
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    command = f"'{sys.executable}' '{ROOT / script}'"
    command += " --path o --quiet" if script.startswith("read") else (
        " --source source --output o --shard-id 0 --total-shards 1"
    )  # fmt: skip
    for streams, code in ((">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1)):
        done = subprocess.run(
            f"{command} {streams}", shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, (streams, done.stderr)
        assert "Traceback" not in done.stderr


def test_ascii_terminal(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 0)
    (source / "é.jpg").touch()
    (source / "é.txt").write_text("日本")
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    done = run_script(
        "read_webdataset.py", "--path", tmp_path / "o", env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and "Key: \\xe9\n" in done.stdout, done.stderr


def test_huge_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "source", 2)
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    many = "9" * 30
    path = ["--path", str(tmp_path / "o"), "--quiet"]
    assert reader.main([*path, "--num-workers", "1000000", "--limit", str(sys.maxsize)]) == 0
    for flag, wrong in (("--num-workers", "0"), ("--num-workers", many), ("--limit", "-1")):
        assert reader.main([*path, flag, wrong]) == 2
        assert f"{flag}: {wrong} is not a number from " in capfd.readouterr().err
    flags = ["--source", str(source), "--output", str(tmp_path / "new")]
    assert create_with_ray.main([*flags, "--num-workers", many, "--num-shards", "1"]) == 2
    assert core.main([*flags, "--total-shards", many, "--shard-id", "0"]) == 2
    assert capfd.readouterr().err.count("\n") == 2 and not (tmp_path / "new").exists()


CUT = '{"source": "/s", "fields": ["jpg", "txt"], "usual": ["jpg"]}\n\udcc3'  # inside a character


@pytest.mark.parametrize("plan", ["", "{}", "5", "null", "[]", "[1]", '"x"', CUT])
def test_damaged_plan_of_an_old_run(plan: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 4)
    staging = tmp_path / "o" / f"{folder.STAGING}{'0' * 16}"
    staging.mkdir(parents=True)
    (staging / PLAN).write_text(plan, errors="surrogateescape")
    flags = ["--source", source, "--output", tmp_path / "o"]
    done = run_script("run_parallel.sh", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / "o")) == 5


def test_escapes_in_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "\x1b[31m", 1)
    core.create_webdataset(source, tmp_path / "o", 0, 1)
    assert reader.main(["--path", str(tmp_path / "o"), "--source", str(source)]) == 0
    assert "\x1b" not in capfd.readouterr().out


def test_script_without_its_interpreter(tmp_path: Path) -> None:
    done = run_script("run_parallel.sh", env={"PYTHON": str(tmp_path / "no python")})
    assert done.returncode == 2 and "no interpreter" in done.stderr


def test_a_lock_that_is_about_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose holder has just ended, or has removed the file that this run has just opened."""
    lock = mounts.lock_output(str(tmp_path))
    threading.Timer(0.1, os.close, [lock]).start()
    os.close(mounts.lock_output(str(tmp_path)))
    path, flock = tmp_path / mounts.LOCK, fcntl.flock

    def late(fd: int, how: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = mounts.lock_output(str(tmp_path))
    assert os.path.samestat(os.fstat(lock), path.stat()), "else a second run could lock it, too"
    os.close(lock)


def test_lock_outlives_a_killed_driver_only_with_its_workers(tmp_path: Path) -> None:
    """The lock belongs to whoever holds the descriptor, and to nobody after that."""
    lock = mounts.lock_output(str(tmp_path))
    failures: list[BaseException] = []

    def second() -> None:
        try:
            mounts.lock_output(str(tmp_path))
        except PackError as error:
            failures.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(failures) == 1
    os.close(lock)
    os.close(mounts.lock_output(str(tmp_path)))
    shutil.rmtree(tmp_path)
