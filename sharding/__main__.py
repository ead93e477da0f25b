"""Start a run, whose shards other processes pack, and publish it: the ends of an array job.

`run_parallel.sh` is made of the same two steps.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence

if not __package__:  # run as `python sharding`
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from sharding.command import (
    NUM_WORKERS,
    Parser,
    driver_parser,
    interruptible,
    list_source,
    one_line_errors,
    require,
    run_options,
)
from sharding.errors import AlreadyDone, InputError
from sharding.run import STOPPING, finish, start
from sharding.urls import real

USAGE = "python sharding start [options] | python sharding publish --run DIR"
EXAMPLES = """examples:
  run=$(python sharding start --source raw --output out --num-shards 1000)
  python create_webdataset.py --run "$run" --shard-id 0     # and so on, in any job
  python sharding publish --run "$run"
"""
START = "Check a source, plan a run, and print the folder in which its shards will wait."
BASH = "Pack a folder of samples into WebDataset shards, with background processes."


def build_start_parser(for_bash: bool) -> argparse.ArgumentParser:
    """Return the command line of `start`, which run_parallel.sh has, too."""
    command, purpose = "python sharding start", START
    if for_bash:
        command, purpose = "./run_parallel.sh", BASH
    parser = driver_parser(command, purpose)
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    return parser


def start_run(argv: Sequence[str]) -> int:
    """Start a run and print its folder; for run_parallel.sh, also hold the lock of its output."""
    for_bash = "--hold" in argv[:1]
    args = build_start_parser(for_bash).parse_args(argv)
    options = run_options(args)
    try:
        with interruptible(args.source, args.output):
            run = start(list_source(args), **options, driver=args.hold)
    except AlreadyDone as done:
        if not for_bash:
            raise
        print(f"\0{done}\0", end="")
        return 0
    if args.hold is None:
        sys.stdout.buffer.write(os.fsencode(run.path) + b"\n")
        return 0
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the lock goes last
    workers = min(args.num_workers or NUM_WORKERS, run.plan.total_shards)
    sys.stdout.buffer.write(os.fsencode(run.path) + b"\0%d\0" % workers)
    sys.stdout.flush()
    # Bash cannot hold a lock, but it and its workers hold the other end of this pipe.
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLIN)
    poll.poll()
    return 0


def publish_run(argv: Sequence[str]) -> int:
    """Move the shards of a run into place, and print the summary."""
    what = "Move the finished shards of a run into place; fails if any is missing."
    parser = Parser("python sharding publish --run DIR", what, "")
    parser.add_argument("--run", metavar="DIR", required=True, help="what `start` printed")
    args = parser.parse_args(argv)
    require(args, "run")
    print(finish(real(args.run)))
    return 0


@one_line_errors("sharding")
def main(argv: Sequence[str]) -> int:
    """Run the command line; see --help."""
    step, rest = argv[0] if argv else "", argv[1:]
    if step == "start":
        return start_run(rest)
    if step == "publish":
        return publish_run(rest)
    if step[:1] == "-":
        Parser(USAGE, __doc__ or "", EXAMPLES).parse_args([step])
    raise InputError(f"{step!r} is not a command: start or publish? (see --help)")


if __name__ == "__main__":
    raise SystemExit(main())
