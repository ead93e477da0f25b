"""The order of a run's steps: start it, pack each of its shards, finish it.

A run packs one listing into one dataset. Its hidden folder inside the output holds its plan and its
finished shards; whoever knows that folder and a shard's number can pack the shard.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from typing import NamedTuple

from sharding.errors import InputError, StopRun
from sharding.faults import left_out
from sharding.messages import argument, count
from sharding.pack import check_function, pack_shard
from sharding.places import dataset_at, output_at, source_at
from sharding.plan import Plan, digest_plan
from sharding.previous import record_for
from sharding.record import Packed, Record, changes
from sharding.samples import Function, Listing, Samples, Transform, deal
from sharding.shards import Progress, Shard, check_shard_numbers
from sharding.transform import dropped_by
from sharding.urls import canonical, real, without_slash

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that ask a run to end


def can_catch() -> bool:
    """Tell whether this thread may set handlers of signals; only a process's main thread may."""
    return threading.current_thread() is threading.main_thread()


class Run(NamedTuple):
    """A run that has been started: its plan has the samples of each shard."""

    path: str  # where its shards wait: a folder inside the output, or the URL that names it
    plan: Plan
    lock: int | None = None  # descriptor that holds the lock of the output, if this process does

    @property
    def total_shards(self) -> int:
        """How many shards it packs."""
        return self.plan.total_shards

    @property
    def transform(self) -> Function | None:
        """The function that is called on each sample, if any."""
        return self.plan.transform

    def samples(self, shard_id: int) -> Samples:
        """Return the samples of a shard: of all, [shard_id::total_shards]."""
        return output_at(self.path).read_samples(self.path, shard_id)

    def pack(self, shard_id: int, samples: Samples, progress: Progress | None) -> Shard:
        """Write one tar of these samples, unless a dead run had finished it."""
        source, how, transform = self.plan.source, "created", self.plan.transform
        stamp = functools.partial(source_at(source).stamp_of, source, samples)
        if left := output_at(self.path).find_left(self.path, shard_id, stamp):
            if left.path:
                if progress:
                    progress(len(samples))
                packed = len(samples) - left.dropped
                return Shard(shard_id, packed, left.size, left.path, "kept", dropped=left.dropped)
            how = "created again"
        return pack_shard(
            source, samples, self.path, shard_id, progress, how, staged=True, transform=transform
        )

    def finish(self) -> str:
        """Publish the run; see `finish`."""
        return finish(self.path, self.lock)

    def release(self) -> None:
        """Let other runs into the output; else the lock ends with this process."""
        if self.lock is not None:
            os.close(self.lock)


class Direct(NamedTuple):
    """Single shards that are packed straight into an output, from one listing."""

    path: str  # the output
    listing: Listing
    total_shards: int
    record: Record | None = None  # of the dataset there
    fits: bool = False  # that dataset was packed from this listing

    @property
    def transform(self) -> Transform | None:
        """The function that is called on each sample, if any."""
        return self.listing.transform

    def samples(self, shard_id: int) -> Samples:
        """Return the samples of a shard."""
        return deal(self.listing.samples, shard_id, self.total_shards)

    def pack(self, shard_id: int, samples: Samples, progress: Progress | None) -> Shard:
        """Write one tar of these samples; first, take away a record that it will belie."""

        def check_record(packed: Packed) -> None:
            if self.record and not (self.fits and self.record.says(shard_id, packed)):
                dataset_at(self.path).write_record(self.path, None)

        source, transform = self.listing.source, self.transform
        return pack_shard(
            source, samples, self.path, shard_id, progress, before=check_record, transform=transform
        )


def _refuse_archives(output: str, samples: Samples) -> None:
    """Refuse an output that an archive of the source lies in, also by a link."""
    here = real(without_slash(output))
    paths = {os.path.dirname(origin.path): origin.path for origin in samples.origins}
    links = filter(os.path.islink, (origin.path for origin in samples.origins))
    folders = {real(folder): path for folder, path in paths.items()}
    folders |= {os.path.dirname(real(path)): path for path in links}
    if here in folders:
        raise InputError(
            f"{argument('output')} {output!r} holds {folders[here]!r} of {argument('source')}, "
            "and what is not packed of that would be lost: choose another folder"
        )


def start_direct(
    listing: Listing,
    output: str | os.PathLike[str],
    shard_ids: range,
    total_shards: int,
) -> Direct:
    """Check everything that packing these shards straight into an output needs, and prepare it.

    Raises:
        InputError: bad input, or a dataset of another source is there; nothing was written.
        PackError: a run is not finished there, or the record there is damaged.
    """
    path, where = os.fspath(output), output_at(output)
    check_shard_numbers(total_shards, len(listing.samples), shard_ids.start)
    _refuse_archives(path, listing.samples)
    where.check_output(path, listing)
    check_function(listing)
    plan = plan_of(listing, total_shards)
    record = record_for(path, plan.source)
    fits = bool(record and not changes(record, digest_plan(plan, listing.samples)))
    where.prepare(path, shard_ids, total_shards)
    return Direct(path, listing, total_shards, record, fits)


def start(
    listing: Listing,
    *,
    output: str | os.PathLike[str],
    total_shards: int | None = None,
    samples_per_shard: int | None = None,
    resume: bool = False,
    replace: bool = False,
    driver: int | None = None,
) -> Run:
    """Check everything that a run needs, lock its output, and write its plan.

    What a dead run had finished of the same shards is kept.

    Args:
        listing: what is packed.
        output: the folder for the shards, made if missing.
        total_shards: number of shards, or
        samples_per_shard: the most samples that a shard gets.
        resume: take over an interrupted run in a bucket, of an array job, or on a file system
            without locks; do nothing if the dataset is complete.
        replace: pack afresh, whatever dataset is there, or an interrupted run had finished; an
            array job, and a dataset in a bucket, are left alone.
        driver: id of the process without which no worker goes on; None for an array job.

    Returns:
        The run; it holds the lock of its output as long as this process lives.

    Raises:
        InputError: bad input, or a dataset of another source, or shards that an interrupted run
            had finished, would be lost; nothing was written.
        PackError: another run is packing into this output.
        AlreadyDone: the run is to be resumed, and the dataset there is what it would make.
    """
    where, samples = output_at(output), listing.samples
    _refuse_archives(os.fspath(output), samples)
    where.check_output(os.fspath(output), listing)
    total = total_shards or -(-len(samples) // (samples_per_shard or len(samples)))
    check_shard_numbers(total, len(samples))
    function = listing.transform
    if function is not None and not isinstance(function, Function):
        raise InputError(f"a run takes its {argument('transform')} as FILE.py:FUNCTION")
    check_function(listing)
    plan = plan_of(listing, total, driver)
    return Run(*where.begin(canonical(output), plan, samples, resume, replace))


def plan_of(listing: Listing, total_shards: int, driver: int | None = None) -> Plan:
    """Return the plan of a run that packs a listing, without the digest of its samples."""
    function = listing.transform
    return Plan(
        source=canonical(listing.source),
        fields=str(listing.fields),
        total_shards=total_shards,
        total_samples=len(listing.samples),
        skipped=listing.skipped,
        ignored=listing.ignored,
        started=listing.started,
        host=os.uname().nodename,
        driver=driver,
        shuffle=listing.shuffle,
        transform=function if isinstance(function, Function) else None,
        given=listing.given,
    )


def load(path: str) -> Run:
    """Return the run in a folder, or at a URL.

    Raises:
        PackError: there is none.
    """
    path = real(path)
    return Run(path, output_at(path).read_plan(path))


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


def finish(path: str, lock: int | None = None) -> str:
    """Put the shards of a run in the place of the previous dataset; return the summary line.

    Args:
        lock: descriptor that holds the lock of the output; None: it is taken now, unless the
            run's driver has it.

    Raises:
        PackError: shards are missing; the previous dataset is untouched.
        AlreadyDone: the run was cut short while it was published; now all shards are in place.
    """
    # To stop now would leave neither the old dataset nor the new one.
    caught = STOPPING if can_catch() else ()
    handlers = [signal.signal(number, signal.SIG_IGN) for number in caught]
    try:
        plan, sizes, replaced, dropped = output_at(path).publish(path, lock)
    finally:
        for number, handler in zip(caught, handlers, strict=True):
            signal.signal(number, handler)
    instead = f"; replaced {count(replaced, 'shard')}" if replaced else ""
    return (
        f"{count(plan.total_samples - dropped, 'sample')} in {count(len(sizes), 'shard')}, "
        f"{sum(sizes):,} bytes (mean {sum(sizes) // len(sizes):,}, largest {max(sizes):,}) "
        f"in {time.time() - plan.started:.1f} s{instead}{dropped_by(plan.transform, dropped)}"
        f"{left_out('ignored', plan.ignored)}{left_out('skipped', plan.skipped)}"
    )
