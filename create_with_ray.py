"""Pack a folder of samples into WebDataset shards as Ray tasks: one task packs one shard."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

from create_webdataset import (
    Parser,
    Run,
    Shard,
    add_pack_arguments,
    explain,
    finish_run,
    one_line_errors,
    pack_shard,
    plan_run,
    report,
    start_run,
)

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported: it reports usage
try:
    import ray
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run: pip install -r requirements.txt")

HERE = Path(__file__).resolve().parent


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(description=__doc__)
    add_pack_arguments(parser)
    parser.set_defaults(source=HERE / "source_data", output=HERE / "webdataset_output")
    parser.add_argument("--num-workers", type=int, default=4, metavar="N", help="tasks at a time")
    parser.add_argument("--num-shards", type=int, metavar="N", help="shards (default: as workers)")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run did")
    return parser


def pack_all(run: Run, num_workers: int) -> Iterator[tuple[int, Shard | Exception]]:
    """Pack all shards of a run, at most `num_workers` at a time.

    Yields:
        (shard id, what packing it did or raised), as the tasks finish.
    """
    task = ray.remote(pack_shard)
    frame = run._replace(samples=())  # each task gets its own samples alone
    shard_ids = iter(range(run.total_shards))
    running: dict[ray.ObjectRef[Shard], int] = {}
    while True:
        for shard_id in islice(shard_ids, num_workers - len(running)):
            running[task.remote(frame, shard_id, run.shard_samples(shard_id))] = shard_id
        if not running:
            return
        for done in ray.wait(list(running))[0]:
            shard_id = running.pop(done)
            try:
                yield shard_id, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield shard_id, error.cause
            except ray.exceptions.RayError as error:
                yield shard_id, error


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if args.num_workers < 1:
        build_parser().error(f"--num-workers {args.num_workers}: not a number from 1")
    args.total_shards = args.num_workers if args.num_shards is None else args.num_shards
    run = plan_run(args)
    start_run(run, args.resume)
    ray.init(
        address="local",  # never a cluster that happens to run
        num_cpus=args.num_workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        for shard_id, outcome in pack_all(run, args.num_workers):
            if isinstance(outcome, Shard):
                print(report(outcome), flush=True)
            else:
                print(f"Shard {shard_id} failed: {explain(outcome)}", file=sys.stderr)
    finally:
        ray.shutdown()
    summary = finish_run(run)
    print(f"All shards created successfully with Ray.\n{summary}")
    return 0


def stop(number: int, _frame: object) -> NoReturn:
    """End the run on a signal, with the exit code that a shell gives it."""
    print("stopped; the previous dataset is untouched; --resume continues", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
