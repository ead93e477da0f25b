"""Calls in a process of their own: a process that has used a bucket must not fork any more.

A training forks its workers, so whatever it asks a bucket before, another process asks. A room that
can be asked ends with `if __name__ == "__main__": answer(...)`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.errors import InputError, PackError

_RUN = """import runpy, sys
sys.path.insert(0, sys.argv[1])
runpy.run_module(sys.argv[2], run_name="__main__")"""


def ask(room: str, question: str, *arguments: Any) -> Any:
    """Return what a room answers, as plain JSON.

    Args:
        room: its module, such as "sharding.training".
        question: the name of one of its functions for `answer`.
        arguments: of that function, as JSON.

    Raises:
        InputError, PackError: what the function raised, or the process was killed.
    """
    here = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, here, room, question, json.dumps(arguments)],
        stdin=subprocess.PIPE,  # which closes when this process ends: see `_end_with_parent`
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C ends it through us
    ) as process:
        text = process.stdout.read() if process.stdout else b""
    if process.returncode:
        raise PackError(f"listing in a process of its own failed: exit code {process.returncode}")
    answered = json.loads(text)
    if "error" in answered:
        kind = InputError if answered["error"] == "InputError" else PackError
        raise kind(answered["text"])
    return answered["result"]


def answer(**functions: Callable[..., Any]) -> None:
    """Be the process that `ask` starts."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    question, arguments = sys.argv[-2:]
    try:
        said = {"result": functions[question](*json.loads(arguments))}
    except (InputError, PackError) as error:
        said = {"error": type(error).__name__, "text": error.args[0]}
    print(json.dumps(said))


def _end_with_parent() -> None:
    """End this process as soon as the one that waits for its answer has ended."""
    os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when Python ends
    os._exit(1)
