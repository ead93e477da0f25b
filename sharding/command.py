"""What the command lines share: flags, usage, exit codes, progress, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from sharding.errors import AlreadyDone, InputError, PackError
from sharding.faults import Report, open_report
from sharding.listing import list_samples
from sharding.messages import argument, explain
from sharding.places import waits
from sharding.run import can_catch
from sharding.samples import Listing
from sharding.shards import MAX_SHARDS, Shard
from sharding.stages import show_stages
from sharding.urls import OUTPUT_URL, URL, is_url, refuse_url

OUTPUT = f"folder (made if missing) or {OUTPUT_URL} for the shards"  # help for --output
NUM_WORKERS = 4  # of a driver, by default
Main = Callable[..., int]  # of a command line; without arguments, it takes those of the process
_PROJECT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line and whose flags are never guessed."""

    def __init__(self, usage: str, description: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__("", usage, description, examples, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: ") and message.endswith(".tar"):
            message += '; was it a pattern that the shell expanded? quote it: "DIR/*.tar"'
        raise InputError(f"{message} (see --help)")


def number_from(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number in this range."""
    wanted = f"a number from {least}" + (f" to {most:,}" if most < sys.maxsize else "")

    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return int(text)

    return number


def require(args: argparse.Namespace, *names: str) -> None:
    """Refuse a command line that lacks a flag, or gives it nothing."""
    for name in names:
        if getattr(args, name) in (None, ""):
            raise InputError(f"{argument(name)} is required (see --help)")


def refuse_others(parser: Parser, args: argparse.Namespace, first: str, *more: str) -> None:
    """Refuse any flag beside the first one but these."""
    plain = parser.parse_args([])
    for name, value in vars(args).items():
        if name not in (first, *more) and value != getattr(plain, name):
            message = f"{argument(first)} names a run that is planned already"
            raise InputError(f"{message}: leave out {argument(name)}")


def add_source_arguments(
    parser: argparse.ArgumentParser, title: str = "the source", recorded: bool = False
) -> None:
    """Add the flags that say what a source is, and mean the same in every script.

    Args:
        recorded: a dataset's record has them, too, so they may be left out, and are None then.
    """
    add = parser.add_argument_group(title).add_argument
    what = f'folder or {URL} of the raw files, listed recursively; or archives: "DIR/*.tar"'
    add("--source", metavar="DIR", help=what)
    usual = "as the dataset was packed, else jpg,txt" if recorded else "%(default)s"
    what = f"a sample's files (default: {usual}); A;B for one of two"
    add("--fields", metavar="A,B", default=None if recorded else "jpg,txt", help=what)
    what = "files that a sample may lack"
    add("--optional-fields", metavar="A,B", default=None if recorded else "", help=what)
    what = "allow dots in names, and replace them by C in the key"
    add("--replace-dots", metavar="C", help=what)
    what = "drop what would be refused, and count it"
    add("--skip-bad", action="store_true", default=None if recorded else False, help=what)
    add("--shuffle", metavar="SEED", type=int, help="shuffle before sharding")
    add("--report", metavar="FILE", help="write every name that is refused or left out, and why")
    what = "call a function of yours on each sample; what it returns is packed"
    add("--transform", metavar="FILE.py:FUNCTION", help=what)


def list_source(args: argparse.Namespace, report: Report | None = None) -> Listing:
    """List the source that the flags of `add_source_arguments` describe."""
    names = ("fields", "optional_fields", "replace_dots", "skip_bad", "shuffle", "transform")
    flags = {name: getattr(args, name) for name in names}
    refuse_url("report", args.report or "")
    if not report:
        is_url(args.output or "", "output")  # a listing may take long
    own = None if report else open_report(args.report, args.source, args.output)
    with own or contextlib.nullcontext(report) as report:
        return list_samples(args.source, **flags, report=report)


def driver_parser(command: str, purpose: str, example: str = "") -> argparse.ArgumentParser:
    """Return the parser that the drivers share."""
    where = "By default, source_data is packed into webdataset_output, both beside this script."
    usual = f"  {command} --source raw --output out --num-workers 8 --num-shards 64"
    examples = f"examples:\n{usual}\n{example}"
    parser = Parser(f"{command} [options]", f"{purpose}\n{where}", examples)
    add_source_arguments(parser)
    add = parser.add_argument_group("the output").add_argument
    add("--output", metavar="DIR", help=OUTPUT)
    what = "take over an interrupted run in a bucket or of an array job"
    add("--resume", action="store_true", help=what)
    what = "pack afresh, whatever dataset is there, or an interrupted run had finished"
    add("--replace", action="store_true", help=what)
    add = parser.add_argument_group("the work").add_argument
    number = number_from(1, MAX_SHARDS)
    workers = f"processes, or tasks at a time (default: {NUM_WORKERS})"
    add("--num-workers", metavar="N", type=number, help=workers)
    add("--num-shards", metavar="N", type=number, help="shards (default: as many as workers)")
    add(
        "--samples-per-shard",
        metavar="N",
        type=number_from(1),
        help="the most samples of a shard, instead of --num-shards",
    )
    parser.set_defaults(source=_PROJECT / "source_data", output=_PROJECT / "webdataset_output")
    return parser


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `run.start` that the flags of `driver_parser` stand for."""
    require(args, "source", "output")
    if args.num_shards and args.samples_per_shard:
        both = f"{argument('num_shards')} and {argument('samples_per_shard')}"
        raise InputError(f"{both} both set the number of shards: give one of them")
    options = {"output": args.output, "resume": args.resume, "replace": args.replace}
    if args.samples_per_shard:
        return {**options, "samples_per_shard": args.samples_per_shard}
    return {**options, "total_shards": args.num_shards or args.num_workers or NUM_WORKERS}


class ProgressBar:
    """A bar on stderr, if that is a terminal, and lines that do not tear it apart."""

    def __init__(self, total: int, unit: str = " samples", position: int = 0) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # here: to import it takes as long as to pack a thousand samples

            self.bar = tqdm(total=total, unit=unit, position=position)

    def update(self, count: int = 1) -> None:
        """Count what is done."""
        if self.bar:
            self.bar.update(count)

    def say(self, line: str, stream: TextIO) -> None:
        """Print a line, in one write: other processes print, too."""
        with self.bar.external_write_mode() if self.bar else contextlib.nullcontext():
            print(line + "\n", end="", file=stream, flush=True)

    def report(self, shard_id: int, outcome: Shard | Exception) -> bool:
        """Say what became of a shard; tell whether it was packed."""
        packed = isinstance(outcome, Shard)
        if isinstance(outcome, Shard):
            self.say(outcome.report(), sys.stdout)
        else:
            self.say(f"Shard {shard_id} failed: {explain(outcome)}", sys.stderr)
        return packed

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.close()


def drop_output() -> None:
    """Discard what stdout still holds: flushing it would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def plain_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once: some imports swallow it, and requests wait on."""
    handler = signal.getsignal(signal.SIGINT)
    ours = handler is signal.default_int_handler and can_catch()
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def stdout_apart(needed: object) -> Iterator[None]:
    """Keep stdout for our own lines: what else prints here, a user's subprocess say, uses stderr.

    Args:
        needed: nothing happens without.
    """
    if not needed or not _is_plain(sys.stdout, 1) or not _is_plain(sys.stderr, 2):
        yield
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    stream = open(ours, "w", errors="backslashreplace")  # noqa: SIM115
    try:
        with contextlib.redirect_stdout(stream):
            yield
            stream.flush()
    finally:
        os.dup2(ours, 1)
        with contextlib.suppress(OSError):
            stream.close()


def _is_plain(stream: TextIO, number: int) -> bool:
    """Tell whether a stream is what the process was started with, and no caller's."""
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False


def interruptible(*paths: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Let Ctrl-C end the process at once while one of these paths is used, if that needs help."""
    return plain_interrupt() if waits(*paths) else contextlib.nullcontext()


def one_line_errors(program: str) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Turn what a user can cause into one line on stderr and the exit code that goes with it.

    0: done. 1: the work failed. 2: bad input or usage. 130: Ctrl-C.

    Args:
        program: begins that line; a script that calls this one as a step gives its own name
            instead, as the first two arguments: --as NAME.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Main:
        @functools.wraps(main)
        def wrapper(argv: Sequence[str] | None = None) -> int:
            argv, name = sys.argv[1:] if argv is None else argv, program
            if len(argv) > 1 and argv[0] == "--as":
                name, argv = argv[1], argv[2:]
            return _run(main, argv, name)

        return wrapper

    return decorate


def _run(main: Callable[[Sequence[str]], int], argv: Sequence[str], program: str) -> int:
    """Return the exit code of a main function; see `one_line_errors`."""
    _prepare_process()
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except AlreadyDone as done:
        print(done)
        return 0
    except (InputError, PackError, OSError, ModuleNotFoundError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # its reader has gone, or its disk is full
            drop_output()
        for line in explain(error).split("\n"):
            print(f"{program}: error: {line}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _prepare_process() -> None:
    """Give the process streams that take any text, stages that show, and Ctrl-C as an exception."""
    for name in ("stdout", "stderr"):
        # None: closed by the shell
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_stages()
    # So that a script could be stopped while it was imported; see sharding/__init__.py.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and can_catch():
        signal.signal(signal.SIGINT, signal.default_int_handler)
