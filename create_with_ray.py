"""Pack a folder of samples into WebDataset shards as Ray tasks: one task packs one shard."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import sharding
from sharding.command import (
    NUM_WORKERS,
    ProgressBar,
    driver_parser,
    list_source,
    one_line_errors,
    plain_interrupt,
    run_options,
)
from sharding.errors import InputError, PackError, StopRun, explain
from sharding.places import output_at, source_at
from sharding.run import STOPPING, Run, can_catch, finish, load, pack, start
from sharding.samples import NOT_UTF8
from sharding.shards import Shard
from sharding.urls import is_url

MODULES = [__file__, *sharding.__path__]  # what the tasks need on other nodes
RETRIES = 3  # of a shard whose worker or node was lost, or whose storage hiccuped
HICCUPS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what network storage says for a while
EXAMPLE = "  python create_with_ray.py --address 10.0.0.1:6379 --num-shards 1000\n"


class Signals:
    """Signals that end the run: noted when they arrive, obeyed between two calls of Ray.

    A handler that raised inside `ray.init` or `ray.shutdown` would crash the process.
    """

    def __init__(self, cure: str) -> None:
        self.received = 0  # the first of them
        self.cure = cure  # how to continue after it
        caught = STOPPING if can_catch() else ()
        self.previous = {number: signal.getsignal(number) for number in caught}

    def catch(self) -> None:
        """Note signals from now on; call it again after Ray has set its own handlers."""
        for number in self.previous:
            signal.signal(number, self.note)

    def note(self, number: int, _frame: object) -> None:
        """Note a signal."""
        self.received = self.received or number

    def obey(self) -> None:
        """End the run if a signal was received, with the exit code that a shell gives it."""
        if self.received:
            what = f"stopped; nothing was published; {self.cure}"
            print(f"create_with_ray.py: {what}", file=sys.stderr)
            raise SystemExit(128 + self.received)

    def wait(self, tasks: Iterable[Any]) -> list[Any]:
        """Return the tasks that are done, as soon as there are any."""
        import ray

        while True:
            self.obey()
            if done := ray.wait(list(tasks), timeout=0.2)[0]:
                return list(done)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Hiccup(Exception):
    """An error of the storage that may be gone at the next attempt."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = driver_parser("python create_with_ray.py", __doc__ or "", EXAMPLE)
    add = parser.add_argument_group("an existing cluster").add_argument
    what = "HOST:PORT, auto, or local to start one (default: $RAY_ADDRESS, else local)"
    add("--address", metavar="A", help=what)
    return parser


def find_address(args: argparse.Namespace) -> str | None:
    """Return the address of the cluster to join, from --address or RAY_ADDRESS, if any.

    Raises:
        InputError: it cannot be used, or no flag says how many shards to pack there.
    """
    address = args.address or os.environ.get("RAY_ADDRESS") or "local"
    name = "--address" if args.address else "RAY_ADDRESS"
    if "://" in address:
        cure = "give the HOST:PORT of the cluster, or use `ray job submit`"
        raise InputError(f"{name} {address!r}: Ray's client is not used here; {cure}")
    if address == "local":
        return None
    if not (args.num_shards or args.samples_per_shard or args.num_workers):
        reason = "the shards must not depend on the cluster"
        raise InputError(f"{name} needs --num-shards or --samples-per-shard: {reason}")
    return str(address)


def check_address(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself would keep trying for many minutes."""
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OverflowError, ValueError):
        raise InputError(f"cluster at {address!r}: give HOST:PORT, auto or local") from None
    except OSError as error:
        raise PackError(f"cluster at {address!r}: {error}; see README, On a cluster") from None


def shipped_modules() -> list[str]:
    """Return what travels with the tasks: our modules, and those that `ray job submit` was given.

    Ray refuses to join two lists of modules by itself; told to override, it takes this one.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    return [*MODULES, *((job.get("runtime_env") or {}).get("py_modules") or ())]


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Let processes that start now import this module, from wherever it was itself imported."""
    before = os.environ.get("PYTHONPATH", "")
    ours = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = f"{ours}{os.pathsep}{before}".rstrip(os.pathsep)
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before
        if not before:
            del os.environ["PYTHONPATH"]


def connect(address: str | None, num_workers: int | None) -> int:
    """Start a local cluster, or join the one at `address`; return the number of tasks at a time.

    Raises:
        PackError: no cluster answers at that address.
    """
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        num_workers = num_workers or NUM_WORKERS
        options |= {"num_cpus": num_workers, "include_dashboard": False}
    else:
        options |= {"runtime_env": {"py_modules": shipped_modules()}}
    try:  # "local": never a cluster that happens to run here
        with importable_here() if address is None else contextlib.nullcontext():
            ray.init(address or "local", **options)
    except Exception as error:  # Ray raises many kinds, Exception itself included
        reason = str(error).strip()
        if reason.startswith("Version mismatch"):  # its lines say of what
            raise PackError(f"cluster at {address!r}: {reason}") from None
        reason = reason.partition("\n")[0]
        if "AF_UNIX" in reason:
            reason += "; set RAY_TMPDIR to a folder with a short path"
        home = os.path.expanduser("~")  # where Ray keeps a token; "~" if nobody knows
        if (isinstance(error, OSError) or "home" in reason) and not os.access(home, os.W_OK):
            reason += f"; set HOME to a folder that may be written (now {home!r})"
        if address is None:
            raise PackError(f"Ray does not start: {reason}") from None
        cure = "is RAY_AUTH_MODE=token set, and the token the cluster's? see README, On a cluster"
        raise PackError(f"cluster at {address!r}: {reason}; {cure}") from None
    return num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def node_problem(folder: str) -> str:
    """Return what keeps this node from reading the source or writing shards, if anything."""
    where = output_at(folder)
    try:
        source = where.read_plan(folder).source
        ((sample, *_),) = where.read_shards(folder, [0])
        with source_at(source).open_file(source, sample.files()[0]):
            return "" if where.may_write(folder) else f"{folder!r} may not be written"
    except (OSError, InputError, PackError) as error:
        return explain(error)


def check_nodes(run: Run, signals: Signals) -> None:
    """Refuse paths that are not the same on every node of the cluster, before any work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked, problems = {}, {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(node_problem).options(num_cpus=0, scheduling_strategy=here)
            asked[task.remote(run.folder)] = node["NodeManagerAddress"]
    while asked:
        for done in signals.wait(asked):
            name = asked.pop(done)
            try:
                if reason := ray.get(done):
                    problems[name] = reason
            except ray.exceptions.RayError as error:
                cure = "if it is gone, wait until `ray status` does not list it any more"
                raise PackError(f"node {name} runs no tasks: {explain(error)}; {cure}") from None
    if problems:
        raise PackError(
            f"nodes {', '.join(sorted(problems))} do not see the files that this machine sees "
            f"({min(problems.values())}): --source and --output must be on storage that all nodes "
            "share under the same path and can write, or in buckets for which each node has "
            "credentials"
        )


def pack_on_node(folder: str, shard_id: int) -> Shard:
    """Pack one shard of the run in a folder, as a Ray task; say on which node it failed.

    Raises:
        Hiccup: the storage failed in a way that may pass; Ray tries again.
        PackError: anything else; trying again would not help.
    """
    try:
        return pack(load(folder), shard_id)
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
    shard_ids = iter(range(run.plan.total_shards))
    running: dict[Any, int] = {}
    while True:
        for shard_id in islice(shard_ids, in_flight - len(running)):
            running[task.remote(run.folder, shard_id)] = shard_id
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
    import ray

    # A bucket has no lock that tells who is dead.
    again = " with --resume" if is_url(run.folder) else ""
    signals = Signals(f"to continue, run the same command again{again}")
    try:
        signals.catch()
        num_workers = connect(address, num_workers)
        signals.catch()  # Ray has set its own
        signals.obey()
        if address:
            check_nodes(run, signals)
            outcomes = pack_all(run, signals, num_workers, "SPREAD")
        else:  # its CPUs bound what runs; a second task waits for each, so that none is idle
            outcomes = pack_all(run, signals, 2 * num_workers)
        with ProgressBar(run.plan.total_samples) as bar:
            for shard_id, outcome in outcomes:
                if isinstance(outcome, StopRun):
                    raise outcome
                if isinstance(outcome, Shard):
                    bar.update(outcome.samples)
                    bar.say(outcome.report(), sys.stdout)
                else:
                    bar.say(f"Shard {shard_id} failed: {explain(outcome)}", sys.stderr)
    finally:
        ray.shutdown()  # which ends the tasks that are left after a signal, on all nodes
        signals.release()
    signals.obey()


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    address, options = find_address(args), run_options(args)
    for path in (args.source, args.output):
        if NOT_UTF8.search(os.fspath(path)):
            raise InputError(f"Ray cannot take a path that is not UTF-8: {os.fspath(path)!r}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported
    with plain_interrupt():
        import ray
    if ray.is_initialized():  # by the program that calls this; its tasks would end with ours
        raise InputError("Ray is in use in this process already: call ray.shutdown() first")
    if address and address != "auto":
        check_address(address)
    run, lock = start(list_source(args), **options, driver=os.getpid())
    try:
        pack_run(run, address, args.num_workers)
        print(f"All shards created successfully with Ray.\n{finish(run)}")
    finally:  # of the run, not of the process: a caller of this may begin another
        if lock >= 0:
            os.close(lock)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
