"""What takes long says so on a terminal, and Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import KEYS, ROOT, Bucket, run_script, touch, write_pairs
from proxy import Request, start_proxy

import read_webdataset
from sharding import stages
from sharding.listing import list_samples
from sharding.run import start

SCRIPTS = ["create_webdataset.py", "run_parallel.sh", "create_with_ray.py", "read_webdataset.py"]


def command(script: str, source: str, shards: Path, output: Path) -> list[str]:
    flags = {
        "create_webdataset.py": ["--output", str(output), "--shard-id=0", "--total-shards=1"],
        "read_webdataset.py": ["--path", str(shards), "--quiet"],
    }.get(script, ["--output", str(output), "--num-shards=2"])
    run = [] if script.endswith(".sh") else [sys.executable]
    return [*run, str(ROOT / script), "--source", source, *flags]


def interrupt_once(seen: bytes, argv: list[str], env: dict[str, str]) -> tuple[int, float, bytes]:
    """Run a command on a terminal; press Ctrl-C once it shows something.

    Returns:
        Its exit code, as a shell gives it; the seconds that it then took to end; what it showed.
    """
    keyboard, tty = pty.openpty()
    fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = subprocess.Popen(
        argv,
        stdin=tty,
        stdout=subprocess.DEVNULL,
        stderr=tty,
        env={**os.environ, "PYTHON": sys.executable, **env},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(tty)
    said, pressed, deadline = b"", 0.0, time.monotonic() + 20
    with contextlib.suppress(OSError):  # the last of its processes has gone
        while time.monotonic() < deadline:
            if select.select([keyboard], [], [], 0.1)[0]:
                said += os.read(keyboard, 4_096)
            if not pressed and seen in said:
                os.write(keyboard, b"\x03")
                pressed = time.monotonic()
            if process.poll() is not None:
                break
    took = time.monotonic() - pressed
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    os.close(keyboard)
    assert pressed, said
    return (128 - code if code < 0 else code), took, said


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    flags = ["--source", write_pairs(folder / "source", 4), "--output", folder / "shards"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    return folder / "shards"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a compiler")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_long_listing_shows_and_ends(script: str, packed: Path, tmp_path: Path) -> None:
    """600 folders that take 200 ms each, of which sixteen are opened at a time."""
    names = [f"sample-{n}/{n}.{field}" for n in range(600) for field in ("jpg", "txt")]
    source, library = touch(tmp_path / "source", *names), str(tmp_path / "slow_open.so")
    options = ["-DSLOW_OPEN_NS=200000000", "-shared", "-fPIC", "-o", library, "-ldl"]
    subprocess.run(["cc", ROOT / "benchmarks" / "slow_open.c", *options], check=True)
    argv = command(script, str(source), packed, tmp_path / "o")
    code, took, said = interrupt_once(b" folders", argv, {"LD_PRELOAD": library})
    assert b"listing: " in said and b" names [" in said, said
    assert code == 130 and took < 2 and not (tmp_path / "o").exists(), (code, took, said)
    assert b"Traceback" not in said and b"rror" not in said


@pytest.mark.parametrize("where", ["--source", "--output"])
@pytest.mark.parametrize("script", [*SCRIPTS, "sharding"])
def test_a_store_that_does_not_answer(
    script: str, where: str, bucket: Bucket, packed: Path, tmp_path: Path
) -> None:
    if (script, where) == ("read_webdataset.py", "--output"):
        pytest.skip("it has none")
    bucket.put("a.jpg")
    asked = tmp_path / "asked"

    def late(_: Request) -> None:
        asked.touch()
        time.sleep(10)

    server = os.environ["AWS_ENDPOINT_URL"]
    env = {"AWS_ENDPOINT_URL": start_proxy(server, KEYS["AWS_SECRET_ACCESS_KEY"], late)}
    argv = [
        *command(script, str(packed.parent / "source"), packed, tmp_path / "o"),
        where,
        bucket.url,
    ]
    if script == "sharding":
        argv.insert(2, "start")
    process = subprocess.Popen(
        argv,
        env={**os.environ, "PYTHON": sys.executable, **env},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not asked.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT) and time.monotonic() - began < 2, err
    assert err == b"" and not (tmp_path / "o").exists()


def test_each_stage_shows(tmp_path: Path, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = write_pairs(tmp_path / "source", 4)
    monkeypatch.setattr(stages, "SILENT", -1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    stages.show_stages()
    try:
        run = start(list_samples(source), output=tmp_path / "o", total_shards=2)
        for shard_id in range(2):
            assert run.pack(shard_id, run.samples(shard_id), None).store()
        run.finish()
        flags = ["--path", str(tmp_path / "o"), "--source", str(source), "--quiet"]
        assert read_webdataset.main(flags) == 0
        said = sys.stderr.getvalue()
    finally:
        monkeypatch.undo()
        stages.show_stages()
    for what in ("listing: ", "planning: ", "publishing: ", "comparing keys: "):
        assert what in said, (what, said)


def test_a_program_decides_itself_what_it_prints(tmp_path: Path) -> None:
    """Its stages stay silent, on a terminal, too."""
    code = (
        "import sys; from sharding import stages; stages.SILENT = -1\n"
        "from sharding.listing import list_samples; list_samples(sys.argv[1])"
    )
    ours, tty = pty.openpty()
    argv = [sys.executable, "-c", code, str(write_pairs(tmp_path / "source", 4))]
    subprocess.run(argv, check=True, stderr=tty, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert not select.select([ours], [], [], 0.1)[0]
    os.close(ours)
    os.close(tty)
