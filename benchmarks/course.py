"""Where contestants run: the data they read, how they are called, and what is done between runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measure import Contestant, Skipped
from server import BUCKET, Server
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
AT_STORE = "s3://benchmark/output"  # what contestants write to the bucket

# GNU tar lists its files within its time too, and in the fastest way, unsorted (ls -U).
TAR = """cd "$1" && LC_ALL=C ls $5 | awk -v part="$3" -v parts="$4" 'NR % parts == part' |
tar --format=ustar -cf "$2/$3.tar" -T - && sync "$2/$3.tar" """


class Data(NamedTuple):
    """A set of samples, in a folder or below a URL."""

    path: str
    samples: int


class Course:
    """The data and the output below a folder, and the contestants that run on them."""

    def __init__(self, root: Path, scale: float = 1) -> None:
        self.root, self.scale = root, scale
        self.output, self.log = root / "output", root / "log"
        # Peers may have an environment of their own: torch, which some of them bring along, adds
        # seconds to each start of webdataset.
        own = HERE / ".venv/bin/python"
        self.peer_python = str(own) if own.exists() else sys.executable
        self.server: Server | None = None  # of the present group

    def made(self, name: str, fill: Callable[[Path], None]) -> str:
        """Return a folder below the root that `fill` has filled, now or before."""
        folder, making = self.root / name, self.root / "making"
        if not folder.exists():
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            fill(making)
            making.rename(folder)
        return str(folder)

    def files(self, samples: int, size: int) -> Data:
        """Return samples of an image of so many bytes, and a text of 40."""
        samples = max(16, round(samples * self.scale))

        def fill(folder: Path) -> None:
            for i in tqdm(range(samples), desc=f"making {samples} of {size}", disable=None):
                (folder / f"sample-{i}.jpg").write_bytes(os.urandom(size))
                (folder / f"sample-{i}.txt").write_text(f"sample {i}".ljust(39) + "\n")

        return Data(self.made(f"{samples}-of-{size}", fill), samples)

    def names(self, samples: int, each: int = 25_000) -> Data:
        """Return the names of samples: links to empty files, so many samples in each folder."""
        samples = max(16, round(samples * self.scale))

        def fill(folder: Path) -> None:
            for i in tqdm(range(samples), desc=f"making {samples} names", disable=None):
                part = folder / f"sample-{i // each:03d}"  # ext4 allows a file 65,000 links
                if i % each == 0:
                    part.mkdir()
                    (part / ".empty").touch()
                for field in ("jpg", "txt"):
                    os.link(part / ".empty", part / f"sample-{i}.{field}")

        return Data(self.made(f"{samples}-names-{each}", fill), samples)

    def written(self, by: str, data: Data, parts: int = 1, *, peer: bool = False) -> Data:
        """Return what a contestant makes of some data, for others to read."""

        def fill(folder: Path) -> None:
            for job in self.call(by, by, data, parts, output=str(folder), peer=peer).jobs:
                subprocess.run(job, capture_output=True)

        return data._replace(path=self.made(f"{Path(data.path).name}-{by}", fill))

    def recorded(self, data: Data) -> Data:
        """Return a dataset of some data, with its record and checksums."""

        def fill(folder: Path) -> None:
            packed = data._replace(path=str(folder))
            flags = ["--path", packed.path, "--source", data.path, "--checksums", "--quiet"]
            for contestant in (
                self.pack("run_parallel.sh", data, "", packed.path),
                self.script("", "read_webdataset.py", packed, *flags),
            ):
                subprocess.run(contestant.jobs[0], capture_output=True, check=True)

        return data._replace(path=self.made(f"{Path(data.path).name}-recorded", fill))

    def uploaded(self, data: Data) -> Data:
        """Return some data in a bucket; the first to ask for this starts the server."""
        self.server = self.server or Server(self.root / "server")
        self.server.sync(data.path, f"{BUCKET}/{Path(data.path).name}")
        return data._replace(path=f"s3://benchmark/{Path(data.path).name}")

    def call(
        self,
        name: str,
        function: str,
        data: Data,
        parts: int = 1,
        *,
        output: str | None = None,
        peer: bool = False,
        go: bool = True,
        **options: object,
    ) -> Contestant:
        """Return a contestant that is a function of packers.py or readers.py, called with options.

        With `peer`, in the environment of the peers; with `go`, its imports are not timed.
        """
        file, _, what = function.partition(".")
        python = self.peer_python if peer else sys.executable
        head = [python, str(HERE / f"{file}.py"), what, data.path, output or str(self.output)]
        tail = [f"{option}={value}" for option, value in options.items()]
        jobs = [[*head, str(part), str(parts), *tail] for part in range(parts)]
        return Contestant(name, jobs, data.samples, go)

    def script(self, name: str, script: str, data: Data, *words: str) -> Contestant:
        """Return a contestant that is one of this project's scripts, a whole command."""
        python = [sys.executable] if script.endswith(".py") else []
        job = [*python, str(PROJECT / script), *words]
        return Contestant(name, [job], data.samples, waited_for=script != "create_with_ray.py")

    def pack(self, name: str, data: Data, flags: str, output: str | None = None) -> Contestant:
        """Return a script that packs; its name begins with the script's."""
        words = ["--source", data.path, "--output", output or str(self.output), *flags.split()]
        return self.script(name, name.partition(",")[0], data, *words)

    def read(self, name: str, shards: Data, workers: int, files: Data | None = None) -> Contestant:
        """Return the script that checks shards, and compares them with their source, if given."""
        words = ["--path", shards.path, "--quiet", "--num-workers", str(workers)]
        words += ["--source", files.path] if files else []
        return self.script(name, "read_webdataset.py", shards, *words)

    def shell(self, name: str, command: str, data: Data) -> Contestant:
        """Return a command of the shell, with the path of the data as its argument."""
        job = ["sh", "-c", f"{command} && echo counted {data.samples}", "sh", data.path]
        return Contestant(name, [job], data.samples)

    def tar(self, name: str, data: Data, parts: int = 1, order: str = "-U") -> Contestant:
        """Return GNU tar as a contestant."""
        head = ["sh", "-c", TAR, "sh", data.path, str(self.output)]
        jobs = [[*head, str(part), str(parts), order] for part in range(parts)]
        return Contestant(name, jobs, data.samples)

    def slow_opens(self, ms: int = 1) -> dict[str, str]:
        """Return the environment in which each open of a sample, or its folder, takes longer."""
        library = str(self.root / f"slow_open_{ms}.so")
        command = ["cc", f"-DSLOW_OPEN_NS={ms}000000", "-shared", "-fPIC", "-o", library]
        try:
            subprocess.run([*command, HERE / "slow_open.c", "-ldl"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Skipped(f"slow_open.c cannot be compiled: {error}") from None
        return {"LD_PRELOAD": library}

    def forget(self, folder: str) -> bool:
        """Drop what is in memory of a folder; where none may, ask for its files to be dropped.

        Returns:
            Whether all is dropped; else folders and inodes are still there.
        """
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            for path in Path(folder).iterdir():
                with path.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return False
        return True

    def clear(self) -> None:
        """Remove what a contestant wrote; its files stay, empty, until all is over.

        ext4 makes no new file of an inode that was removed less than some minutes ago, and looks
        at each of them: 0.4 ms for a file, paid by whoever runs next (seen with perf).
        """
        if self.output.exists():
            for path in self.output.rglob("*"):
                if path.is_file():
                    os.truncate(path, 0)
            emptied = self.root / "emptied"
            emptied.mkdir(exist_ok=True)
            self.output.rename(emptied / str(len(os.listdir(emptied))))
        self.output.mkdir()
        self.log.unlink(missing_ok=True)
        if self.server:
            self.server.sync(self.output, f"{BUCKET}/output")

    def check(self) -> tuple[int, str]:
        """Return how many samples the last run handled, and a checksum."""
        if self.server:
            self.server.sync(f"{BUCKET}/output", self.output)
        command = [sys.executable, HERE / "measure.py", self.output, self.log]
        samples, checksum = subprocess.check_output(command, text=True).split(" ")
        return int(samples), checksum.strip()

    def stop_server(self) -> None:
        """Stop the server of a group, if it has one."""
        server, self.server = self.server, None
        if server:
            server.stop()
