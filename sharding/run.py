"""The order of a run's steps: start it, pack each of its shards, finish it.

A run packs one listing into one dataset. Its hidden folder inside the output holds its plan and its
finished shards; whoever knows that folder and a shard's number can pack the shard.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import time
from typing import NamedTuple

from sharding.errors import PackError, argument, count, warn
from sharding.faults import left_out
from sharding.folder import (
    LOCK,
    begin_publishing,
    check_output,
    cut_short,
    is_publishing,
    is_staging,
    kept_shards,
    lock_output,
    move_staging,
    new_staging,
    publish,
    remove_leftovers,
    remove_staging,
    staged_shards,
    staging_folders,
)
from sharding.listing import Listing
from sharding.pack import write_shard
from sharding.places import canonical, output_at, source_at
from sharding.plan import PLAN, Plan, read_plan, read_shard, write_plan
from sharding.shards import Progress, Shard, check_shard_numbers, shard_name

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that ask a run to end


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
    output_at(output)
    check_output(output, listing)
    output, samples = os.path.abspath(output), listing.samples
    total = total_shards or -(-len(samples) // (samples_per_shard or len(samples)))
    check_shard_numbers(total, len(samples))
    os.makedirs(output, exist_ok=True)
    lock = lock_output(output)
    remove_leftovers(output)
    finish_publishing(output)
    folder = new_staging(output)
    os.mkdir(folder)
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
        source_bytes=source_at(listing.source).listed_bytes(samples),
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
    folder = os.path.realpath(folder)
    if not is_staging(folder) or not os.path.exists(os.path.join(folder, PLAN)):
        raise PackError(
            f"no run in {folder!r}: it was published, resumed in a new folder, or removed; "
            f"{argument('run')} takes what `python sharding start` printed"
        )
    return Run(folder, read_plan(folder))


def pack(run: Run, shard_id: int, progress: Progress | None = None) -> Shard:
    """Pack one shard into the folder of a run, unless it was finished there before `resume`.

    Raises:
        PackError, OSError: packing failed.
    """
    samples = read_shard(run.folder, shard_id)
    old = _left_shards(run.folder).get(shard_id, [])
    stamp = source_at(run.plan.source).stamp_of(run.plan.source, samples) if old else ""
    kept = [path for path in old if path.endswith(stamp) and os.path.exists(path)]
    if kept:
        size = os.stat(kept[0]).st_size
        shard = Shard(shard_id, len(samples), size, kept[0], "kept")
        if progress:
            progress(len(samples))
    else:
        shard = write_shard(run.plan.source, samples, run.folder, shard_id, progress, staged=True)
        shard = shard._replace(how="created again" if old else "created")
    for path in old:
        if path != shard.path:  # an older version, or one of another attempt
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return shard


class DriverGone(PackError):
    """The process that started a run has ended, so nobody would publish it."""


def check_driver(run: Run, parent: int) -> None:
    """Raise DriverGone if the driver of a run, or the parent that a worker had, is gone."""
    if run.plan.driver is None:
        return
    try:
        os.kill(run.plan.driver, 0)
    except ProcessLookupError:
        parent = -1
    except PermissionError:
        pass
    if os.getppid() != parent:
        raise DriverGone("the driver is gone, so its workers stop")


def finish(run: Run) -> str:
    """Put the shards of a run in the place of the previous dataset; return the summary line.

    Raises:
        PackError: shards are missing; the previous dataset is untouched.
    """
    plan = run.plan
    down = _fetched(run)
    # To stop now would leave neither the old dataset nor the new one.
    handlers = [signal.signal(number, signal.SIG_IGN) for number in STOPPING]
    try:
        sizes = _publish(run)
    finally:
        for number, handler in zip(STOPPING, handlers, strict=True):
            signal.signal(number, handler)
    return (
        f"{count(plan.total_samples, 'sample')} in {count(len(sizes), 'shard')}, "
        f"{sum(sizes):,} bytes "
        f"(mean {sum(sizes) // len(sizes):,}, largest {max(sizes):,}) "
        f"in {time.time() - plan.started:.1f} s{down}"
        f"{left_out('ignored', plan.ignored)}{left_out('skipped', plan.skipped)}"
    )


def _fetched(run: Run) -> str:
    """Return how many bytes this run has fetched from a bucket, for the summary."""
    if not run.plan.source_bytes:
        return ""
    bucket = source_at(run.plan.source)
    kept = (read_shard(run.folder, shard_id) for shard_id in kept_shards(run.folder))
    fetched = run.plan.source_bytes - sum(map(bucket.listed_bytes, kept))
    return f"; {fetched:,} bytes down"


def finish_publishing(output: str) -> bool:
    """Finish a run that was cut short while its shards replaced the previous ones, if any."""
    cut = cut_short(output)
    for folder in cut:
        publish(folder, read_plan(folder).total_shards)
    return bool(cut)


def _publish(run: Run) -> list[int]:
    """Put complete shards in their place, and return their sizes."""
    folder = run.folder
    if not is_publishing(folder):
        _check_complete(run)  # before tasks that are still at work lose their folder
        folder = move_staging(folder)  # from here on, no late task changes anything
        try:
            _check_complete(Run(folder, run.plan))
            begin_publishing(folder)
        except BaseException:
            os.rename(folder, run.folder)
            raise
    publish(folder, run.plan.total_shards)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(run.output, LOCK))
    names = map(shard_name, range(run.plan.total_shards))
    return [os.stat(os.path.join(run.output, name)).st_size for name in names]


def _check_complete(run: Run) -> None:
    """Refuse to publish a run unless each of its shards is there once."""
    staged = staged_shards(run.folder)
    missing = [str(n) for n in range(run.plan.total_shards) if len(staged.get(n, ())) != 1]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        cure = "run again with --resume to pack just these"
        if run.plan.driver is None:
            cure = "pack them with create_webdataset.py --run DIR --shard-id I, then publish"
        shards = count(len(missing), "shard")
        raise PackError(f"not packed: {shards} ({first}); nothing was published; {cure}")


# What killed runs left; read once in a process, for what is packed meanwhile is no such thing.
_left_shards = functools.lru_cache(maxsize=1)(staged_shards)


def _take_over(run: Run, resume: bool) -> None:
    """Take over what an interrupted run had finished, if `resume` says so; clear the rest.

    Raises:
        PackError: an array job is there, which may still be at work.
    """
    others = (folder for folder in staging_folders(run.output) if folder != run.folder)
    staged = {folder: len(staged_shards(folder)) for folder in others}
    left = sorted(staged, key=lambda folder: -staged[folder])
    if resume and not left:
        warn("nothing to resume; packing all shards")
    taken = None
    for old in left:
        try:
            before = read_plan(old)
        except PackError:
            if staged[old]:
                raise
            continue  # it ended before it packed anything
        if resume and not taken and _same_samples(before, run.plan):
            taken = old
        elif before.driver is None:
            begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(before.started))
            raise PackError(
                f"{old!r} holds an array job that {before.host} started at {begun}; publish it, "
                "go on with --resume and the same flags, or remove that folder"
            )
    if taken:
        remove_leftovers(taken)
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
