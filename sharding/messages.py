"""How messages read: flags by name, numbers with their nouns, an error in one line."""

from __future__ import annotations

import errno
import re
import sys

from sharding.errors import InputError, PackError, UserError

CURES = {  # where the system's own words do not say what to do
    errno.EFBIG: "a file grew beyond the limit (ulimit -f): use more shards",
    errno.EPIPE: "the reader of this output has gone away",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def argument(name: str) -> str:
    """Return how a message of these errors names an argument.

    A Python caller reads `num_shards`; `explain` makes it `--num-shards`.
    """
    return f"\0{name}\0"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: '1 fault', '2,000 faults'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def warn(message: str) -> None:
    """Tell the user, in one line on stderr, what is unusual but not an error."""
    print(f"warning: {explain(PackError(message))}", file=sys.stderr)


def explain(error: BaseException) -> str:
    """Say in one line, to the user of a command line, what failed and, if known, the cure."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; run: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.strerror:
        cure = CURES.get(error.errno or 0)
        name = "" if error.filename is None else f"{error.filename!r}: "
        return f"{name}{error.strerror}" + (f"; {cure}" if cure else "")
    text = str(error.args[0]) if isinstance(error, UserError) and error.args else str(error)
    text = re.sub("\0([a-z_]+)\0", lambda match: "--" + match[1].replace("_", "-"), text)
    lines = [" ".join(line.split())[:1_000] for line in text.split("\n")]
    if not isinstance(error, InputError):  # whose lines are faults of several kinds
        lines = [" ".join(lines)[:1_000]]
    return "\n".join(lines) or type(error).__name__
