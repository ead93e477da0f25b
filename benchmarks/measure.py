"""Run one contestant once: what it took, and what work it did."""

from __future__ import annotations

import hashlib
import math
import os
import re
import signal
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
    cold: str = ""  # a folder of which nothing may be in memory


def spawn(job: list[str], env: Mapping[str, str], log: Path) -> int:
    """Start one process that writes to the log."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawnp(job[0], job, {**os.environ, **env}, file_actions=actions)


def run(contestant: Contestant, log: Path) -> tuple[float, float, float]:
    """Run a contestant, and wait for all that it started, so that the next runs alone.

    Returns:
        Seconds; CPU seconds of all processes, those included that outlive the one that started
        them; MB of memory that the largest had at its peak.

    Raises:
        Skipped: it failed.
    """
    env = {**contestant.env}
    if contestant.go:  # what is left over of its imports: threads of numpy's that spin for a while
        env |= {"BENCH_WAIT": "1", "OPENBLAS_NUM_THREADS": "1"}
    begin, cpu, peak, failed = time.perf_counter(), 0.0, 0, 0
    running = {spawn(job, env, log) for job in contestant.jobs}
    if contestant.go:
        for pid in list(running):
            _, status, usage = os.wait4(pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                cpu -= sum(usage[:2])  # user and system time
            else:
                running.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status) or 1
        begin = time.perf_counter()
        for pid in running:
            os.kill(pid, signal.SIGCONT)
    end = begin
    while time.perf_counter() < end + LINGER or running:
        try:
            pid, status, usage = os.wait3(0 if running else os.WNOHANG)
        except ChildProcessError:
            break
        if not pid:
            time.sleep(0.02)
            continue
        cpu, peak = cpu + sum(usage[:2]), max(peak, usage.ru_maxrss)
        if pid in running:
            running.remove(pid)
            failed = failed or os.waitstatus_to_exitcode(status)
            end = time.perf_counter()
    said = log.read_text(errors="replace").strip()
    if failed:
        raise Skipped(f"exit code {failed}: " + said.rpartition("\n")[2][:200])
    done = re.findall(r"^done at ([\d.]+)", said, re.M)
    if contestant.go:  # the end of its interpreter counts no more than its start
        end = max(map(float, done), default=end)
    if not contestant.waited_for:
        return end - begin, math.nan, math.nan
    return end - begin, cpu, peak / 1024


def check_work(output: Path, log: Path) -> tuple[int, str]:
    """Return how many samples a run handled, and a checksum of the names and contents in its tars.

    Which tar holds a member, and in which order, makes no difference. A reader tells both itself.
    To be called in a process of its own: for the kernel, a new process has at its peak at least
    the memory of the one that started it, so the benchmark has to stay small.
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
    said = log.read_text(errors="replace")
    numbers = re.findall(r"^(?:counted )?([\d,]+)(?: samples\b.*)?$", said, re.M)
    checksum = re.search(r"^checksum (\w+)$", said, re.M)
    return sum(int(number.replace(",", "")) for number in numbers), checksum[1] if checksum else ""


if __name__ == "__main__":
    print(*check_work(Path(sys.argv[1]), Path(sys.argv[2])))
