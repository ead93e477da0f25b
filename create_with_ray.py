"""Pack a folder of samples into WebDataset shards as Ray tasks: one task packs one shard."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a run to end: no traceback
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported
try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from tqdm import tqdm

    import create_webdataset as core
    from create_webdataset import Run, Shard
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run: pip install -r requirements.txt")
import sharding
from sharding.errors import InputError, PackError, explain
from sharding.samples import sample_files

MODULES = [core.__file__, __file__, *sharding.__path__]  # what the tasks need on other nodes
RETRIES = 3  # of a shard whose worker or node was lost, or whose storage hiccuped
HICCUPS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what network storage says for a while
EXAMPLE = "  python create_with_ray.py --address 10.0.0.1:6379 --num-shards 1000\n"
PROBE = "probe"  # a file in the staging folder that every node must be able to read


class Hiccup(Exception):
    """An error of the storage that may be gone at the next attempt."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = core.build_driver_parser("python create_with_ray.py", __doc__ or "", EXAMPLE)
    add = parser.add_argument_group("a cluster that runs already").add_argument
    what = "auto or HOST:PORT; needs --num-shards; --num-workers is all its CPUs unless given"
    add("--address", metavar="A", help=what)
    return parser


def connect(address: str | None, num_workers: int | None) -> int:
    """Start a local cluster, or join the one at `address`; return the number of tasks at a time.

    Raises:
        PackError: no cluster answers at that address.
    """
    options: dict[str, Any] = {"runtime_env": {"py_modules": MODULES}}
    if address is None:
        num_workers = num_workers or core.NUM_WORKERS
        options = {"num_cpus": num_workers, "include_dashboard": False}
    try:  # "local": never a cluster that happens to run here
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds, Exception itself included
        reason = str(error).strip().partition("\n")[0]
        if address is None:
            raise PackError(f"Ray does not start: {reason}") from None
        cure = "is RAY_AUTH_MODE=token set, and the token the cluster's? see README, On a cluster"
        raise PackError(f"--address {address!r}: {reason}; {cure}") from None
    return num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def check_address(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself would knock for many minutes."""
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:
        raise PackError(f"--address {address!r}: {error}; see README, On a cluster") from None


def probe_node(staging: str, file: str) -> bool:
    """Tell whether this node sees the staging folder that the driver made, and a source file."""
    try:
        seen = Path(staging, PROBE).read_text(encoding="utf-8") == staging
        return seen and os.path.exists(file) and os.access(staging, os.W_OK)
    except OSError:
        return False


def check_nodes(run: Run) -> None:
    """Refuse paths that are not the same on every node of the cluster, before any work."""
    Path(run.staging, PROBE).write_text(run.staging, encoding="utf-8")
    file = os.path.join(run.source, sample_files(run.samples[0], run.fields)[0])
    answers = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(probe_node).options(num_cpus=0, scheduling_strategy=here)
            answers[node["NodeManagerAddress"]] = task.remote(run.staging, file)
    try:
        blind = [name for name, answer in answers.items() if not ray.get(answer)]
    except ray.exceptions.RayError as error:
        raise PackError(f"a node cannot run a task: {explain(error)}") from None
    if blind:
        raise PackError(
            f"nodes {', '.join(blind)} do not see the files that this machine sees: --source and "
            "--output must be on storage that all nodes share, under the same path, and can write"
        )


def pack_on_node(run: Run, shard_id: int, samples: Sequence[str]) -> Shard:
    """Pack one shard, as a Ray task; say on which node it failed.

    Raises:
        Hiccup: the storage failed in a way that may pass; Ray tries again.
        PackError: anything else; to try again would not help.
    """
    try:
        return core.pack_shard(run, shard_id, samples)
    except (PackError, OSError) as error:
        kind = Hiccup if getattr(error, "errno", None) in HICCUPS else PackError
        raise kind(f"{explain(error)} (on node {ray.util.get_node_ip_address()})") from None


def pack_all(
    run: Run, in_flight: int, strategy: str = "DEFAULT"
) -> Iterator[tuple[int, Shard | Exception]]:
    """Pack all shards of a run, with at most `in_flight` tasks submitted at a time.

    Yields:
        (shard id, what packing it did or raised), as the tasks finish.
    """
    task = ray.remote(pack_on_node).options(
        max_retries=RETRIES, retry_exceptions=[Hiccup], scheduling_strategy=strategy
    )
    bare = run._replace(samples=())  # each task gets its own samples alone
    shard_ids = iter(range(run.total_shards))
    running: dict[ray.ObjectRef[Shard], int] = {}
    while True:
        for shard_id in islice(shard_ids, in_flight - len(running)):
            samples = run.samples[shard_id :: run.total_shards]
            running[task.remote(bare, shard_id, samples)] = shard_id
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


stopped_by: list[int] = []  # signals that have ended the run


def stop(number: int, _frame: object) -> NoReturn:
    """End the run on a signal, with the exit code that a shell gives it."""
    stopped_by.append(number)
    print("stopped; the previous dataset is untouched; --resume continues", file=sys.stderr)
    sys.exit(128 + number)


def handle_signals() -> None:
    """Let the polite signals end the run in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


@core.one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if args.address and args.num_shards is None:
        raise InputError("--address needs --num-shards: the shards must not depend on the cluster")
    run = core.plan_driver_run(args)
    if args.address and args.address != "auto":
        check_address(args.address)
    core.start_run(run, args.resume)  # its lock holds until this process ends
    try:
        handle_signals()
        num_workers = connect(args.address, args.num_workers)
        handle_signals()  # Ray has set its own
        if args.address:
            check_nodes(run)
            outcomes = pack_all(run, num_workers, "SPREAD")
        else:  # its CPUs bound what runs; a second task waits for each, so that none is idle
            outcomes = pack_all(run, 2 * num_workers)
        bar = tqdm(total=run.total_samples, unit=" samples", disable=None)
        with bar:
            for shard_id, outcome in outcomes:
                bar.update(outcome.samples if isinstance(outcome, Shard) else 0)
                with bar.external_write_mode():
                    if isinstance(outcome, Shard):
                        print(core.report(outcome), flush=True)
                    else:
                        print(f"Shard {shard_id} failed: {explain(outcome)}", file=sys.stderr)
    finally:
        ray.shutdown()  # which ends the tasks that are left after a signal, on all nodes
        if stopped_by:  # a blocking call of Ray makes any exit an exit with code 1
            sys.exit(128 + stopped_by[0])
    summary = core.finish_run(run)
    print(f"All shards created successfully with Ray.\n{summary}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
