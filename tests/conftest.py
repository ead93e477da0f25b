"""What the tests share: small sources, and a way to look at shards without the project's help."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MakeSource = Callable[..., Path]


def write_pairs(folder: Path, count: int, largest: int = 2_000, seed: int = 0) -> Path:
    """Write `count` pairs of random bytes, some of them empty."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"sample-{number}.jpg").write_bytes(rng.randbytes(rng.randrange(largest)))
        (folder / f"sample-{number}.txt").write_bytes(rng.randbytes(rng.randrange(50)))
    return folder


def touch(folder: Path, *names: str) -> Path:
    """Write files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def without_privileges() -> list[str]:
    """Return what a command begins with so that modes of files count, for root, too."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root reads everything")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def jpeg(width: int, height: int) -> bytes:
    """Return a red picture."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "JPEG")
    return stream.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(shard: Path) -> dict[str, bytes]:
    """Return the content of a shard by member name, as Python's tarfile reads it."""
    with tarfile.open(shard, "r:") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def run_script(
    name: str | Path, *arguments: str | Path, **options
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, or at a path, as a user would, with this interpreter."""
    path, prefix = str(ROOT / name), options.pop("prefix", [])
    command = [*prefix, path] if path.endswith(".sh") else [*prefix, sys.executable, path]
    environment = {**os.environ, "PYTHON": sys.executable, **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        text=True,
        timeout=120,
        **{**streams, **options},
    )


@pytest.fixture(scope="session")
def source_1003(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 1,003 pairs that tests only read."""
    return write_pairs(tmp_path_factory.mktemp("source") / "raw", 1_003)
