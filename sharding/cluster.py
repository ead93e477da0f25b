"""Ray: which cluster, what travels to its nodes, whether they see the files, signals on the way.

The task that packs a shard is in create_with_ray.py. Ray is imported inside functions alone: flags
are checked without it, and it takes its time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sharding
from sharding.command import NUM_WORKERS, plain_interrupt
from sharding.errors import InputError, PackError
from sharding.messages import explain
from sharding.pack import function_problem
from sharding.places import output_at, source_at
from sharding.run import STOPPING, Run, can_catch

# ---------------------------------------------------------------- which cluster


def find_address(given: str | None, total_given: bool) -> str | None:
    """Return the address of the cluster to join, if any.

    Args:
        given: the flag --address, which goes before RAY_ADDRESS.
        total_given: a flag says how many shards to pack.

    Raises:
        InputError: it cannot be used, or the shards would depend on the cluster.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    name = "--address" if given else "RAY_ADDRESS"
    if "://" in address:
        cure = "give the HOST:PORT of the cluster, or use `ray job submit`"
        raise InputError(f"{name} {address!r}: Ray's client is not used here; {cure}")
    if address == "local":
        return None
    if not total_given:
        reason = "the shards must not depend on the cluster"
        raise InputError(f"{name} needs --num-shards or --samples-per-shard: {reason}")
    return address


def check_ready(address: str | None) -> None:
    """Refuse to begin where Ray is missing or in use, or where nothing answers at the address.

    Ray itself would try an address for many minutes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported
    with plain_interrupt():
        import ray
    if ray.is_initialized():  # by the program that calls this; its tasks would end with ours
        raise InputError("Ray is in use in this process already: call ray.shutdown() first")
    if not address or address == "auto":
        return
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OverflowError, ValueError):
        raise InputError(f"cluster at {address!r}: give HOST:PORT, auto or local") from None
    except OSError as error:
        raise PackError(f"cluster at {address!r}: {error}; see docs/cluster.md") from None


# ---------------------------------------------------------------- signals


class Signals:
    """Signals that end the run: noted when they arrive, obeyed between two calls of Ray.

    A handler that raised inside `ray.init` or `ray.shutdown` would crash the process.
    """

    def __init__(self, farewell: str) -> None:
        self.received = 0  # the first of them
        self.farewell = farewell  # what is said after it
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
            print(self.farewell, file=sys.stderr)
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


# ---------------------------------------------------------------- to join it


@contextlib.contextmanager
def joined(
    address: str | None, num_workers: int | None, scripts: Sequence[str], signals: Signals
) -> Iterator[int]:
    """Start a local cluster, or join the one at `address`, until the context ends.

    Args:
        scripts: files of the modules that the tasks need beside our folder.
        signals: are caught meanwhile, and obeyed.

    Yields:
        The number of tasks at a time.

    Raises:
        PackError: Ray does not start, or no cluster answers at that address.
    """
    import ray

    try:
        signals.catch()
        _connect(address, num_workers, scripts)
        signals.catch()  # Ray has set its own
        signals.obey()
        yield num_workers or _cpus(address)
    finally:
        ray.shutdown()  # which ends the tasks that are left after a signal, on all nodes
        signals.release()
    signals.obey()


def _cpus(address: str | None) -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1))) if address else NUM_WORKERS


def _connect(address: str | None, num_workers: int | None, scripts: Sequence[str]) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_workers or NUM_WORKERS, "include_dashboard": False}
    else:
        options |= {"runtime_env": {"py_modules": _shipped_modules(scripts)}}
    try:  # "local": never a cluster that happens to run here
        with _importable() if address is None else contextlib.nullcontext():
            ray.init(address or "local", **options)
    except Exception as error:  # Ray raises many kinds, Exception itself included
        raise _refusal(address, error) from None


def _refusal(address: str | None, error: Exception) -> PackError:
    """Return the error that says in one line why Ray did not start, or joined no cluster."""
    reason = str(error).strip()
    if reason.startswith("Version mismatch"):  # its lines say of what
        return PackError(f"cluster at {address!r}: {reason}")
    reason = reason.partition("\n")[0]
    if "AF_UNIX" in reason:
        reason += "; set RAY_TMPDIR to a folder with a short path"
    home = os.path.expanduser("~")  # where Ray keeps a token; "~" if nobody knows
    if (isinstance(error, OSError) or "home" in reason) and not os.access(home, os.W_OK):
        reason += f"; set HOME to a folder that may be written (now {home!r})"
    if address is None:
        return PackError(f"Ray does not start: {reason}")
    cure = "is RAY_AUTH_MODE=token set, and the token the cluster's? see docs/cluster.md"
    return PackError(f"cluster at {address!r}: {reason}; {cure}")


def _shipped_modules(scripts: Sequence[str]) -> list[str]:
    """Return what travels with the tasks: our modules, and those that `ray job submit` was given.

    Ray refuses to join two lists of modules by itself; told to override, it takes this one.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    theirs = (job.get("runtime_env") or {}).get("py_modules") or ()
    return [*map(os.path.abspath, scripts), *sharding.__path__, *theirs]


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Let processes that start now import our modules, from wherever this one did."""
    before = os.environ.get("PYTHONPATH", "")
    ours = os.path.dirname(sharding.__path__[0])
    os.environ["PYTHONPATH"] = f"{ours}{os.pathsep}{before}".rstrip(os.pathsep)
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before
        if not before:
            del os.environ["PYTHONPATH"]


# ---------------------------------------------------------------- its nodes


class _Tried(Exception):
    """A shard was begun, so its folder can be written."""


def node_problem(path: str) -> str | InputError:
    """Return what keeps this node from reading the source or writing shards, if anything.

    An InputError says what is wrong with the function for `--transform` here.

    In a bucket, to begin a shard sends nothing: there, to read the plan tells of credentials alone.
    """
    where = output_at(path)
    try:
        plan, sample = where.read_plan(path), where.read_samples(path, 0)[0]
        source = plan.source
        with source_at(source).open_file(source, sample, sample.files()[0]):
            pass
        with contextlib.suppress(_Tried), where.new_shard(path, 0):
            raise _Tried  # which gives it up
    except (OSError, InputError, PackError) as error:
        return explain(error)
    if plan.transform and (problem := function_problem(source, sample, plan.transform)):
        return InputError(problem)
    return ""


def check_nodes(run: Run, signals: Signals) -> None:
    """Refuse paths that are not the same on every node of the cluster, before any work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked, problems = {}, {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(node_problem).options(num_cpus=0, scheduling_strategy=here)
            asked[task.remote(run.path)] = node["NodeManagerAddress"]
    while asked:
        for done in signals.wait(asked):
            name = asked.pop(done)
            try:
                reason = ray.get(done)
                if isinstance(reason, InputError):
                    raise InputError(f"--transform fails on node {name}: {explain(reason)}")
                if reason:
                    problems[name] = reason
            except ray.exceptions.RayError as error:
                cure = "if it is gone, wait until `ray status` no longer lists it"
                raise PackError(f"node {name} runs no tasks: {explain(error)}; {cure}") from None
    if problems:
        raise PackError(
            f"nodes {', '.join(sorted(problems))} do not see the files that this machine sees "
            f"({min(problems.values())}): --source and --output must be on storage that all nodes "
            "share under the same path and can write, or in buckets for which each node has "
            "credentials"
        )
