"""Run one contestant once: what it took, and what work it did."""

from __future__ import annotations

import hashlib
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LINGER = 30  # seconds that what a contestant left running has to end


class Skipped(Exception):
    """A contestant cannot run here, and why."""


class Contestant(NamedTuple):
    """What takes part in a race: one or more processes that are started together."""

    name: str
    jobs: list[list[str]]
    samples: int  # that it must handle
    go: bool = False  # each job stops when it has imported; the clock starts when all have
    env: Mapping[str, str] = {}
    waited_for: bool = True  # not so Ray's workers: the kernel keeps no account of what they took


class Figures(NamedTuple):
    """What one run took."""

    wall: float
    inside: float  # from the end of the imports, where a contestant says when that was
    cpu: float  # of all processes, those included that outlive the one that started them
    peak_mb: float  # of the largest process


def seconds(usage: resource.struct_rusage) -> float:
    """Return the processor time of a process and of those children that it waited for."""
    return usage.ru_utime + usage.ru_stime


def spawn(job: list[str], env: Mapping[str, str], log: Path) -> int:
    """Start one process that writes to the log."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawnp(job[0], job, {**os.environ, **env}, file_actions=actions)


def wait_until_imported(pids: set[int], log: Path) -> float:
    """Wait until all processes have stopped themselves; return the processor time so far."""
    before = 0.0
    for pid in pids:
        _, status, usage = os.wait4(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            for other in pids - {pid}:
                os.kill(other, signal.SIGKILL)
            wait_for_orphans()
            raise Skipped(f"it ended before it worked: {last_line(log)}")
        before += seconds(usage)
    return before


def run(contestant: Contestant, log: Path) -> Figures:
    """Run a contestant.

    Raises:
        Skipped: it failed.
    """
    env = {**contestant.env}
    if contestant.go:  # what is left over of its imports: threads of numpy's that spin for a while
        env |= {"BENCH_WAIT": "1", "OPENBLAS_NUM_THREADS": "1"}
    begin, before, cpu, peak, failed = time.perf_counter(), 0.0, 0.0, 0, 0
    running = {spawn(job, env, log) for job in contestant.jobs}
    if contestant.go:
        before = wait_until_imported(running, log)
        begin = time.perf_counter()
        for pid in running:
            os.kill(pid, signal.SIGCONT)
    while running:
        pid, status, usage = os.wait3(0)
        cpu, peak = cpu + seconds(usage), max(peak, usage.ru_maxrss)
        if pid in running:
            running.discard(pid)
            failed = failed or os.waitstatus_to_exitcode(status)
    end = time.perf_counter()
    cpu += wait_for_orphans()
    if failed:
        raise Skipped(f"exit code {failed}: {last_line(log)}")
    said = log.read_text(errors="replace")
    done = re.findall(r"^done at ([\d.]+)", said, re.M)
    if contestant.go and done:  # the end of its interpreter counts no more than its start
        end = max(map(float, done))
    imported = re.findall(r"^imported at ([\d.]+)", said, re.M)
    started = begin if contestant.go or not imported else float(min(imported, key=float))
    if not contestant.waited_for:
        return Figures(end - begin, end - started, math.nan, math.nan)
    return Figures(end - begin, end - started, cpu - before, peak / 1024)


def wait_for_orphans() -> float:
    """Wait for what the contestant left running, so that the next runs alone; return its time."""
    cpu = 0.0
    deadline = time.perf_counter() + LINGER
    while time.perf_counter() < deadline:
        try:
            pid, _, usage = os.wait3(os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            cpu += seconds(usage)
        else:
            time.sleep(0.02)
    return cpu


def last_line(log: Path) -> str:
    """Return what a contestant said last."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:200] if lines else "it said nothing"


def check_work(output: Path, log: Path) -> tuple[int, str]:
    """Return how many samples a run handled, and a checksum of the names and contents in its tars.

    Which tar holds a member, and in which order, makes no difference. A reader tells both itself.
    """
    members = []
    for path in output.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if content := tar.extractfile(member):
                    members.append(f"{member.name} {hashlib.sha256(content.read()).hexdigest()}\n")
    if members:
        checksum = hashlib.sha256("".join(sorted(members)).encode()).hexdigest()
        return sum(".jpg " in member for member in members), checksum[:12]
    said = log.read_text(errors="replace") if log.exists() else ""
    numbers = re.findall(r"^(?:counted )?([\d,]+)(?: samples\b.*)?$", said, re.M)
    checksum = re.search(r"^checksum (\w+)$", said, re.M)
    return sum(int(number.replace(",", "")) for number in numbers), checksum[1] if checksum else ""


def check_apart(output: Path, log: Path) -> tuple[int, str]:
    """Do `check_work` in a process of its own.

    For the kernel, a new process has at its peak at least the memory of the one that started it,
    so the benchmark has to stay small.
    """
    said = subprocess.check_output([sys.executable, __file__, str(output), str(log)], text=True)
    samples, _, checksum = said.strip("\n").partition(" ")
    return int(samples), checksum


if __name__ == "__main__":
    print(*check_work(Path(sys.argv[1]), Path(sys.argv[2])))
