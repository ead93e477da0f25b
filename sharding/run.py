"""The order of a run's steps: start it, pack each of its shards, finish it.

A run packs one listing into one dataset. Its hidden folder inside the output holds its plan and its
finished shards; whoever knows that folder and a shard's number can pack the shard.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sharding.errors import StopRun, count
from sharding.faults import left_out
from sharding.listing import Listing
from sharding.pack import begin_shard
from sharding.places import output_at, source_at
from sharding.plan import Plan
from sharding.shards import Progress, Shard, check_shard_numbers
from sharding.urls import canonical, is_url

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that ask a run to end


def can_catch() -> bool:
    """Tell whether this thread may set handlers of signals; only a process's main thread may."""
    return threading.current_thread() is threading.main_thread()


class Run(NamedTuple):
    """A run that has been started."""

    folder: str  # in which its shards wait
    plan: Plan

    @property
    def output(self) -> str:
        """Where the shards are in the end."""
        return os.path.dirname(self.folder)


def start(
    listing: Listing,
    *,
    output: str | os.PathLike[str],
    total_shards: int | None = None,
    samples_per_shard: int | None = None,
    resume: bool = False,
    replace: bool = False,
    driver: int | None = None,
) -> tuple[Run, int]:
    """Check everything that a run needs, lock its output, and write its plan.

    What a dead run had finished of the same shards is kept.

    Args:
        listing: what is packed.
        output: the folder for the shards, made if missing.
        total_shards: number of shards, or
        samples_per_shard: the most samples that a shard gets.
        resume: take over a run that no lock tells to be dead: in a bucket, an array job, on a file
            system without locks.
        replace: pack afresh, whatever an interrupted run had finished; an array job is left alone.
        driver: id of the process without which no worker goes on; None for an array job.

    Returns:
        The run, and the descriptor that holds the lock.

    Raises:
        InputError: bad input, or shards that an interrupted run had finished would be lost;
            nothing was written.
        PackError: another run is packing into this output.
    """
    where = output_at(output)
    where.check_output(os.fspath(output), listing)
    samples = listing.samples
    total = total_shards or -(-len(samples) // (samples_per_shard or len(samples)))
    check_shard_numbers(total, len(samples))
    plan = Plan(
        source=canonical(listing.source),
        fields=str(listing.fields),
        total_shards=total,
        total_samples=len(samples),
        skipped=listing.skipped,
        ignored=listing.ignored,
        started=listing.started,
        host=os.uname().nodename,
        driver=driver,
        shuffle=listing.shuffle,
        source_bytes=source_at(listing.source).listed_bytes(samples),
    )
    folder, plan, lock = where.begin(canonical(output), plan, samples, resume, replace)
    return Run(folder, plan), lock


def load(folder: str) -> Run:
    """Return the run in a folder.

    Raises:
        PackError: there is none.
    """
    folder = folder if is_url(folder) else os.path.realpath(folder)
    return Run(folder, output_at(folder).read_plan(folder))


def pack(run: Run, shard_id: int, progress: Progress | None = None) -> Shard:
    """Pack one shard of a run, unless a dead run had finished it.

    Raises:
        PackError, OSError: packing failed.
    """
    return begin_pack(run, shard_id, progress)()


def begin_pack(run: Run, shard_id: int, progress: Progress | None = None) -> Callable[[], Shard]:
    """Do all of `pack` but its last step, and return a function that does it; see `begin_shard`."""
    where, source = output_at(run.folder), run.plan.source
    (samples,) = where.read_shards(run.folder, [shard_id])
    how = "created"
    if shard_id in where.left_shards(run.folder):
        stamp = source_at(source).stamp_of(source, samples)
        if kept := where.find_kept(run.folder, shard_id, stamp):
            if progress:
                progress(len(samples))
            shard = Shard(shard_id, len(samples), kept[1], kept[0], "kept")
            return lambda: shard
        how = "created again"
    finish = begin_shard(source, samples, run.folder, shard_id, progress, staged=True)
    return lambda: finish()._replace(how=how)


def check_driver(run: Run, parent: int) -> None:
    """Raise StopRun if the driver of a run, or the parent that a worker had, is gone."""
    if run.plan.driver is None:
        return
    try:
        os.kill(run.plan.driver, 0)
    except ProcessLookupError:
        parent = -1
    except PermissionError:
        pass
    if os.getppid() != parent:
        raise StopRun("the driver is gone, so its workers stop")


def finish(run: Run) -> str:
    """Put the shards of a run in the place of the previous dataset; return the summary line.

    Raises:
        PackError: shards are missing; the previous dataset is untouched.
    """
    plan, where = run.plan, output_at(run.folder)
    remote = is_url(plan.source) or is_url(run.folder)
    kept = where.kept_shards(run.folder) if remote else []
    traffic = _fetched(run, kept)
    replaced = where.count_published(run.output)
    instead = f"; in place of {count(replaced, 'shard')} that were there" if replaced else ""
    # To stop now would leave neither the old dataset nor the new one.
    caught = STOPPING if can_catch() else ()
    handlers = [signal.signal(number, signal.SIG_IGN) for number in caught]
    try:
        sizes = where.publish(run.folder, plan)
    finally:
        for number, handler in zip(caught, handlers, strict=True):
            signal.signal(number, handler)
    if is_url(run.folder):
        sent = sum(sizes) - sum(sizes[shard_id] for shard_id in kept)
        traffic = f"; {sent:,} bytes up{traffic}"
    return (
        f"{count(plan.total_samples, 'sample')} in {count(len(sizes), 'shard')}, "
        f"{sum(sizes):,} bytes "
        f"(mean {sum(sizes) // len(sizes):,}, largest {max(sizes):,}) "
        f"in {time.time() - plan.started:.1f} s{traffic}"
        f"{instead}"
        f"{left_out('ignored', plan.ignored)}{left_out('skipped', plan.skipped)}"
    )


def _fetched(run: Run, kept: Sequence[int]) -> str:
    """Return how many bytes this run has fetched from a bucket, for the summary."""
    if not is_url(run.plan.source):
        return ""
    where, bucket = output_at(run.folder), source_at(run.plan.source)
    spared = sum(map(bucket.listed_bytes, where.read_shards(run.folder, kept)))
    return f"; {run.plan.source_bytes - spared:,} bytes down"
