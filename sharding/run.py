"""The order of a run's steps: start it, pack each of its shards, finish it.

A run packs one listing into one dataset. It waits in a hidden folder of the output, which holds its
plan and its finished shards; whoever knows that folder and a shard's number can pack the shard.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import time
from typing import NamedTuple

from sharding.errors import PackError, count, warn
from sharding.faults import left_out
from sharding.files import stamp_of
from sharding.folder import (
    LOCK,
    begin_publishing,
    check_output,
    is_publishing,
    lock_output,
    new_staging,
    publish,
    remove_shards,
    remove_staging,
    staged_shards,
    staging_folders,
)
from sharding.listing import Listing
from sharding.plan import PLAN, Plan, read_plan, read_shard, write_plan
from sharding.shards import PARTIAL_PATTERN, Progress, Shard, check_shard_numbers, write_shard


class Run(NamedTuple):
    """A run that has been started."""

    folder: str  # in which its shards wait
    plan: Plan

    @property
    def output(self) -> str:
        """The folder that the shards go to in the end."""
        return os.path.dirname(self.folder)


def start(
    listing: Listing,
    *,
    output: str | os.PathLike[str],
    total_shards: int | None = None,
    samples_per_shard: int | None = None,
    resume: bool = False,
    driver: int | None = None,
) -> tuple[Run, int]:
    """Check everything that a run needs, lock its output, and write its plan.

    What other runs left in the output is finished, resumed or cleared.

    Args:
        listing: what is packed.
        output: the folder for the shards, made when it is missing.
        total_shards: number of shards, or
        samples_per_shard: the most samples that a shard gets.
        resume: keep the shards that an interrupted run of the same samples had finished.
        driver: id of the process without which no worker goes on; None for an array job.

    Returns:
        The run, and the descriptor that holds the lock.

    Raises:
        InputError: bad input; nothing was written.
        PackError: another run is packing into this output.
    """
    check_output(output, listing)
    output, samples = os.path.abspath(output), listing.samples
    total = total_shards or -(-len(samples) // (samples_per_shard or len(samples)))
    check_shard_numbers(total, len(samples))
    os.makedirs(output, exist_ok=True)
    lock = lock_output(output)
    remove_shards(output, PARTIAL_PATTERN)
    _finish_publishing(output)
    folder = new_staging(output)
    os.mkdir(folder)
    plan = Plan(
        source=os.path.abspath(listing.source),
        fields=str(listing.fields),
        total_shards=total,
        total_samples=len(samples),
        skipped=listing.skipped,
        ignored=listing.ignored,
        started=listing.started,
        host=os.uname().nodename,
        driver=driver,
    )
    try:
        run = Run(folder, write_plan(folder, plan, samples))
        _take_over(run, resume)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run, lock


def load(folder: str) -> Run:
    """Return the run in a folder.

    Raises:
        PackError: there is none.
    """
    return Run(os.path.abspath(folder), read_plan(folder))


def pack(run: Run, shard_id: int, progress: Progress | None = None) -> Shard:
    """Pack one shard into the folder of a run, unless it was finished there before `resume`.

    Raises:
        PackError, OSError: packing failed.
    """
    samples, how = read_shard(run.folder, shard_id), "created"
    for path in _left_shards(run.folder).get(shard_id, ()):
        with contextlib.suppress(FileNotFoundError):
            size = os.stat(path).st_size
            if path.endswith(stamp_of(run.plan.source, samples)):
                if progress:
                    progress(len(samples))
                return Shard(shard_id, len(samples), size, "kept")
            os.unlink(path)
            how = "created again"
    shard = write_shard(run.plan.source, samples, run.folder, shard_id, progress, staged=True)
    return shard._replace(how=how)


def finish(run: Run) -> str:
    """Put the shards of a run in the place of the previous dataset; return the summary line.

    Raises:
        PackError: shards are missing; the previous dataset is untouched.
    """
    plan, staged = run.plan, staged_shards(run.folder)
    missing = [str(n) for n in range(plan.total_shards) if len(staged.get(n, ())) != 1]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise PackError(
            f"not packed: {count(len(missing), 'shard')} ({first}); nothing was published; "
            "run again with --resume to pack just these"
        )
    sizes = [os.stat(path).st_size for paths in staged.values() for path in paths]
    # To stop now would leave neither the old dataset nor the new one.
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in stopping]
    begin_publishing(run.folder)
    publish(run.folder, plan.total_shards)
    os.unlink(os.path.join(run.output, LOCK))
    for number, handler in zip(stopping, handlers, strict=True):
        signal.signal(number, handler)
    return (
        f"{count(plan.total_samples, 'sample')} in {count(len(sizes), 'shard')}, "
        f"{sum(sizes):,} bytes "
        f"(mean {sum(sizes) // len(sizes):,}, largest {max(sizes):,}) "
        f"in {time.time() - plan.started:.1f} s"
        f"{left_out('ignored', plan.ignored)}{left_out('skipped', plan.skipped)}"
    )


# What killed runs left; read once in a process, for what is packed meanwhile is no such thing.
_left_shards = functools.lru_cache(maxsize=1)(staged_shards)


def _finish_publishing(output: str) -> None:
    """Finish a run that was cut short while its shards replaced the previous ones."""
    for old in filter(is_publishing, staging_folders(output)):
        publish(old, read_plan(old).total_shards)


def _take_over(run: Run, resume: bool) -> None:
    """Make what an interrupted run finished this run's own, if `resume` says so; clear the rest.

    Raises:
        PackError: an array job is there, which may still be at work.
    """
    left = [folder for folder in staging_folders(run.output) if folder != run.folder]
    left.sort(key=lambda folder: -len(staged_shards(folder)))
    if resume and not left:
        warn("no interrupted run to resume: all shards are packed")
    taken = None
    for old in left:
        same, before = False, None
        with contextlib.suppress(OSError, PackError):  # it ended before it packed anything
            before = read_plan(old)
            same = resume and not taken and _same_samples(before, run.plan)
        if same:
            taken = old
        elif before and before.driver is None:
            begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(before.started))
            raise PackError(
                f"{old!r} holds an array job that {before.host} started at {begun}; publish it, "
                "go on with --resume and the same flags, or remove that folder"
            )
    if taken:
        remove_shards(taken, PARTIAL_PATTERN)
        os.replace(os.path.join(run.folder, PLAN), os.path.join(taken, PLAN))
        os.rmdir(run.folder)
        os.rename(taken, run.folder)  # a late writer of the old run finds its folder gone
    for old in left:
        if old != taken:
            remove_staging(old)


def _same_samples(before: Plan, plan: Plan) -> bool:
    """Tell whether an earlier plan has the same shards; if not, say what differs."""
    names = {"source": "--source", "fields": "--fields", "total_shards": "number of shards"}
    differs = [names[name] for name in names if getattr(before, name) != getattr(plan, name)]
    if not {"--fields", "number of shards"} & set(differs) and before.digest != plan.digest:
        differs.append("samples, or flags that choose or order them")
    if differs:
        warn(f"not resumed but packed afresh: other {', '.join(differs)}")
    return not differs
