"""What the contestants written in Python share; they are in packers.py and readers.py.

usage: packers.py | readers.py NAME SOURCE OUTPUT PART PARTS [OPTION=VALUE ...]

Each imports what it needs and no more, so that its start-up is its own. With BENCH_WAIT=1 in the
environment it stops when it has imported, and goes on when it is told to (SIGCONT). One that
writes no tar prints how many samples it counted. With BENCH_CHECK=1 readers print a checksum, too.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

CPUS = 2  # of each contestant that takes a number of workers


class Task(NamedTuple):
    """Handle part `part` of `parts` of the source; write, if anything, into the folder `output`."""

    source: str
    output: str
    part: int
    parts: int

    @property
    def in_bucket(self) -> bool:
        """Whether the source is a URL."""
        return self.source.startswith("s3://")


def imported() -> None:
    """Wait for the word to go, where the benchmark wants that: imports are over."""
    if os.environ.get("BENCH_WAIT"):
        os.kill(os.getpid(), signal.SIGSTOP)


def ours(name: str, task: Task, *later: str) -> Any:
    """Import a module of this project, one folder up, and what it would only import later."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    later += ("obstore",) if task.in_bucket else ()
    module, *_ = map(importlib.import_module, (name, *later))
    imported()
    return module


def main(functions: Mapping[str, Any]) -> None:
    """Call the function that the command line names."""
    name, source, output, part, parts, *words = sys.argv[1:]
    options = dict(word.split("=") for word in words)
    functions[name](Task(source, output, int(part), int(parts)), **options)
    print("done at", time.perf_counter(), flush=True)
