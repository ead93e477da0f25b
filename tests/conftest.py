"""What the tests share: small sources, and a way to look at shards without the project's help."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import obstore
import pytest
from PIL import Image
from stores import servers
from stores.servers import KEYS as KEYS
from stores.servers import SCHEME, STORE, bucket_of

from create_webdataset import create_webdataset
from sharding.record import RECORD
from sharding.run import Run
from sharding.shards import Progress, Shard

ROOT = Path(__file__).resolve().parent.parent
os.environ.pop("PYTHONUNBUFFERED", None)  # else nobody sees what is never flushed
MakeSource = Callable[..., Path]
SOAK = bool(os.environ.get("SOAK"))  # `make soak`: the long counts
DRIVERS = ["run_parallel.sh", "create_with_ray.py"]
# Where both drivers take the same way, a start of Ray for each row is for `make soak`.
MOSTLY_BASH = DRIVERS if SOAK else DRIVERS[:1]
# The variable that says where the store of the tests is.
ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "az": "AZURITE_BLOB_STORAGE_URL", "gs": "GOOGLE_BASE_URL"}[
    SCHEME
]


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


def hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """Return the sha256 of every file below a folder but the record, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name != RECORD
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
        **{**streams, "timeout": 120, **options},
    )


def start_packing(*flags: str | Path) -> subprocess.Popen[str]:
    """Start run_parallel.sh in a session of its own; return it once it has packed a shard."""
    process = subprocess.Popen(
        list(map(str, [ROOT / "run_parallel.sh", *flags])),
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline().startswith("Shard ")
    return process


def pack_shard_of(run: Run, shard_id: int, progress: Progress | None = None) -> Shard:
    """Pack one shard of a run that was started."""
    return create_webdataset(run, run.path, shard_id, run.total_shards, progress=progress)


@pytest.fixture(scope="session")
def source_1003(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 1,003 pairs that tests only read."""
    return write_pairs(tmp_path_factory.mktemp("source") / "raw", 1_003)


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that plays odd file systems; see no_locks.c."""
    library = tmp_path_factory.mktemp("preload") / "no_locks.so"
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    source = Path(__file__).with_name("no_locks.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real store on the loopback address; gives the environment that leads to it."""
    with servers.SERVERS[STORE](tmp_path_factory.mktemp("store")) as environment:
        yield environment


of_seaweedfs = pytest.mark.skipif(STORE != "seaweedfs", reason="in SeaweedFS's own words")
through_proxies = pytest.mark.skipif(SCHEME == "gs", reason="it knows its own address alone")
of_s3 = pytest.mark.skipif(SCHEME != "s3", reason="of stores that speak S3")


def slow_opens(folder: Path, microseconds: int) -> dict[str, str]:
    """Return the environment in which each open of a path with "sample-" takes so much longer."""
    library = folder / "slow_open.so"
    source = ROOT / "benchmarks" / "slow_open.c"
    define = f"-DSLOW_OPEN_NS={microseconds}000"
    command = ["cc", define, "-shared", "-fPIC", "-o", library, source, "-ldl"]
    if not shutil.which("cc") or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}


def slow_proxy(rate: int, from_when: float = 0) -> str:
    """Return a URL that leads to the server, at so many bytes a second each way.

    Args:
        from_when: in so many seconds; until then, connections are refused.
    """

    def copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(64 << 10):
                other.sendall(data)
                time.sleep(len(data) / rate)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def serve() -> None:
        time.sleep(from_when)
        listener.listen()
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    port = int(os.environ[ENDPOINT].rpartition(":")[2])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


class Bucket(NamedTuple):
    """A prefix of its own for a test."""

    url: str
    prefix: str
    store: Any

    def put(self, key: str, data: bytes = b"") -> None:
        """Write an object below the prefix."""
        servers.put(self.store, f"{self.prefix}/{key}", data)

    def delete(self, key: str) -> None:
        """Delete an object below the prefix."""
        servers.delete(self.store, [f"{self.prefix}/{key}"])

    def clear(self) -> None:
        """Delete every object below the prefix."""
        keys = [item["path"] for item in obstore.list(self.store, prefix=self.prefix).collect()]
        servers.delete(self.store, keys)

    def upload(self, folder: Path, below: str = "") -> str:
        """Write the files below a folder, and return their URL."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        keys = [f"{below}{path.relative_to(folder)}" for path in files]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.put, keys, (path.read_bytes() for path in files)))
        return f"{self.url}/{below}".rstrip("/")

    def hashes(self, below: str = "") -> dict[str, str]:
        """Return the sha256 of every object below the prefix but the record, by its key."""
        prefix = f"{self.prefix}/{below}".rstrip("/")
        found = {}
        for item in obstore.list(self.store, prefix=prefix).collect():
            key = item["path"]
            if key.endswith(RECORD):
                continue
            with contextlib.suppress(FileNotFoundError):  # the last request of a killed run
                data = obstore.get(self.store, key).bytes()
                found[key[len(prefix) + 1 :]] = hashlib.sha256(data).hexdigest()
        return found


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A prefix of its own on the server, with the environment that leads to it."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    prefix = f"run-{secrets.token_hex(4)}"
    return Bucket(f"{SCHEME}://tests/{prefix}", prefix, bucket_of(server))
