"""Calls in a process of their own: a process that has used a bucket must not fork any more.

A training forks its workers, so whatever it asks a bucket before, another process asks. A room that
can be asked ends with `if __name__ == "__main__": answer(...)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sharding.errors import InputError, PackError


class Ended(PackError):
    """The process has ended without an answer."""

    def __init__(self, code: int) -> None:
        self.code = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        super().__init__(f"work in a process of its own failed: {self.code}")


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
        InputError, PackError: what the function raised.
        Ended: the process was killed.
    """
    here = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, here, room, question],
        bufsize=0,  # what cannot be written is not tried again when it is closed
        stdin=subprocess.PIPE,  # which closes when this process ends: see `_end_with_parent`
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C ends it through us
    ) as process:
        assert process.stdin and process.stdout
        left = json.dumps(arguments).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # its exit code says more
            while left:
                left = left[process.stdin.write(left) :]
        text = process.stdout.read()
    if process.returncode or not text:
        raise Ended(process.returncode)
    answered = json.loads(text)
    if "error" in answered:
        kind = InputError if answered["error"] == "InputError" else PackError
        raise kind(answered["text"])
    return answered["result"]


def answer(**functions: Callable[..., Any]) -> None:
    """Be the process that `ask` starts."""
    asked = sys.stdin.buffer.readline()
    if not asked:  # who would ask has ended
        os._exit(1)
    asker, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # who reads it, a function of the user's say, would wait for ever
    os.close(nothing)
    threading.Thread(target=_end_with_parent, args=[asker], daemon=True).start()
    # Its end closes the pipe, not we: who waits would take us for done, and end us.
    with open(os.dup(1), "w", closefd=False) as stream:
        os.dup2(2, 1)  # what others print here is no answer
        json.dump(_result(functions[sys.argv[-1]], json.loads(asked)), stream)


def _result(function: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    try:
        return {"result": function(*arguments)}
    except (InputError, PackError) as error:
        kind = InputError if isinstance(error, InputError) else PackError
        return {"error": kind.__name__, "text": error.args[0]}


def _end_with_parent(asker: int) -> None:
    """End this process as soon as the one that waits for its answer has ended."""
    os.read(asker, 1)  # not sys.stdin, whose lock this thread would hold when Python ends
    os._exit(1)
