"""Pack a folder of samples into WebDataset shards as Ray tasks: one task packs one shard."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from create_webdataset import create_webdataset
from sharding.cluster import Signals, check_nodes, check_ready, find_address, joined
from sharding.command import (
    ProgressBar,
    driver_parser,
    interruptible,
    list_source,
    one_line_errors,
    run_options,
)
from sharding.errors import InputError, PackError, StopRun
from sharding.messages import explain
from sharding.run import Run, load, start
from sharding.samples import NOT_UTF8
from sharding.shards import Shard

SCRIPTS = [__file__, os.path.join(os.path.dirname(__file__), "create_webdataset.py")]  # of a task
RETRIES = 3  # of a shard whose worker or node was lost, or whose storage hiccuped
HICCUPS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what network storage says for a while
EXAMPLE = "  python create_with_ray.py --address 10.0.0.1:6379 --num-shards 1000\n"


class Hiccup(Exception):
    """An error of the storage that may be gone at the next attempt."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = driver_parser("python create_with_ray.py", __doc__ or "", EXAMPLE)
    add = parser.add_argument_group("an existing cluster").add_argument
    what = "HOST:PORT, auto, or local to start one (default: $RAY_ADDRESS, else local)"
    add("--address", metavar="A", help=what)
    return parser


def pack_on_node(path: str, shard_id: int) -> Shard:
    """Pack one shard of a run, as a Ray task; say on which node it failed.

    Raises:
        Hiccup: the storage failed in a way that may pass; Ray tries again.
        PackError: anything else; trying again would not help.
    """
    try:
        run = load(path)
        return create_webdataset(run, run.path, shard_id, run.total_shards)
    except (PackError, OSError) as error:
        import ray

        kind: type[Exception] = StopRun if isinstance(error, StopRun) else PackError
        if getattr(error, "errno", None) in HICCUPS:
            kind = Hiccup
        raise kind(f"{explain(error)} (on node {ray.util.get_node_ip_address()})") from None


def pack_all(
    run: Run, signals: Signals, in_flight: int, strategy: str = "DEFAULT"
) -> Iterator[tuple[int, Shard | Exception]]:
    """Pack all shards of a run, with at most `in_flight` tasks submitted at a time.

    Yields:
        (shard id, what packing it did or raised), as the tasks finish.
    """
    import ray

    task = ray.remote(pack_on_node).options(
        max_retries=RETRIES, retry_exceptions=[Hiccup], scheduling_strategy=strategy
    )
    shard_ids = iter(range(run.total_shards))
    running: dict[Any, int] = {}
    while True:
        for shard_id in islice(shard_ids, in_flight - len(running)):
            running[task.remote(run.path, shard_id)] = shard_id
        if not running:
            return
        for done in signals.wait(running):
            shard_id = running.pop(done)
            try:
                yield shard_id, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield shard_id, error.cause
            except ray.exceptions.RayError as error:
                yield shard_id, error


def pack_run(run: Run, address: str | None, num_workers: int | None) -> None:
    """Pack all shards of a run with Ray, and say what becomes of each."""
    stopped = f"stopped; nothing was published; to continue, {run.plan.again}"
    signals = Signals(f"create_with_ray.py: {stopped}")
    with joined(address, num_workers, SCRIPTS, signals) as at_a_time:
        if address:
            check_nodes(run, signals)
            outcomes = pack_all(run, signals, at_a_time, "SPREAD")
        else:  # its CPUs bound what runs; a second task waits for each, so that none is idle
            outcomes = pack_all(run, signals, 2 * at_a_time)
        with ProgressBar(run.plan.total_samples) as bar:
            for shard_id, outcome in outcomes:
                if isinstance(outcome, StopRun):
                    raise outcome
                if isinstance(outcome, Shard):
                    bar.update(outcome.samples + outcome.dropped)
                bar.report(shard_id, outcome)


@one_line_errors("create_with_ray.py")
def main(argv: Sequence[str]) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    total_given = bool(args.num_shards or args.samples_per_shard or args.num_workers)
    address, options = find_address(args.address, total_given), run_options(args)
    for path in (args.source, args.output):
        if NOT_UTF8.search(os.fspath(path)):
            raise InputError(f"Ray cannot take a path that is not UTF-8: {os.fspath(path)!r}")
    check_ready(address)
    with interruptible(args.source, args.output):
        run = start(list_source(args), **options, driver=os.getpid())
    try:
        pack_run(run, address, args.num_workers)
        print(f"All shards created successfully with Ray.\n{run.finish()}")
    finally:  # of the run, not of the process: a caller of this may begin another
        run.release()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
