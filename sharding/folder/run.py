"""A run that packs into a folder: lock it, stage the shards in a hidden folder, publish them.

See `places.Output`. A run has a staging folder of its own inside the output, so that a late writer
of a killed run finds its folder gone.

A published dataset survives a power cut: each shard is synced before it gets its staged name
(`new_shard`), the staging folder before a shard of it is moved (`_begin_publishing`), and the
output when all are moved, before the mark that they are being moved goes (`_move_shards`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
from collections.abc import Callable, Container, Iterator

from sharding import previous, record
from sharding.errors import AlreadyDone, InputError, naming
from sharding.folder import staging
from sharding.folder.checks import check_output as check_output
from sharding.folder.dataset import (
    MARKER,
    cut_short,
    is_publishing,
    is_staging,
    refuse_cut_short,
    write_record,
)
from sharding.folder.mounts import LOCK, lock_output, remove_folder, settle, unlock
from sharding.folder.staging import (
    all_shards,
    clear,
    lost_runs,
    made_of,
    make_staging,
    move_staged,
    new_staging,
    read_fields,
    remove_leftovers,
    staged_shards,
    write_fields,
    write_plan,
)
from sharding.folder.staging import read_samples as read_samples
from sharding.folder.takeover import (
    Remains,
    check_remains,
    find_remains,
    refuse_others,
    take_over,
)
from sharding.messages import warn
from sharding.plan import Plan, Published, no_run, not_packed
from sharding.record import RECORD
from sharding.samples import Samples
from sharding.shards import (
    SHARD_PATTERN,
    Left,
    NewShard,
    beyond,
    shard_name,
    warn_of_more,
)
from sharding.stages import stage


def prepare(output: str, shard_ids: Container[int], total_shards: int) -> None:
    """Make the folder for single shards, and clear what killed attempts at them left."""
    os.makedirs(output, exist_ok=True)
    refuse_cut_short(output)
    warn_of_more(output, os.listdir(output), total_shards)
    remove_leftovers(output, shard_ids)


def begin(
    output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
) -> tuple[str, Plan, int | None]:
    """Lock the output, stage a new run, and take over or clear what dead runs left."""
    os.makedirs(output, exist_ok=True)
    new = not os.path.lexists(os.path.join(output, LOCK))
    lock = lock_output(output)
    try:
        if not (resume or replace or _is_locked(lock)):
            refuse_others(output)
        remove_leftovers(output)
        finish_publishing(output)
        return *_stage(output, plan, samples, resume, replace), lock
    except BaseException as error:
        if new and isinstance(error, (AlreadyDone, InputError)):  # it leaves nothing behind
            unlock(output)
        os.close(lock)
        raise


def _stage(
    output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
) -> tuple[str, Plan]:
    """Make the staging folder of a run, and take over or clear those of others."""
    folder = make_staging(output)
    remains: list[Remains] = []

    def check(plan: Plan) -> None:
        remains.extend(find_remains(folder, plan))
        check_remains(remains, resume, replace)
        # A run that fits, and so goes on here, was allowed to begin; of one that is lost, nobody
        # can tell what it has replaced.
        goes_on = any(other.plan and not other.differs for other in remains)
        if not goes_on and not lost_runs(output):
            previous.check(output, plan, samples, resume, replace)

    try:
        plan = write_plan(folder, plan, samples, check)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_folder(folder)
        raise
    take_over(folder, remains, replace)
    return folder, plan


def _is_locked(lock: int) -> bool:
    """Tell whether what `lock_output` returned is locked: whether this file system has locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_plan(folder: str) -> Plan:
    """Return the plan of a run; see `places.Output`."""
    if not is_staging(folder):
        raise no_run(folder)
    return staging.read_plan(folder)


@contextlib.contextmanager
def new_shard(folder: str, shard_id: int) -> Iterator[NewShard]:
    """Write a shard into a folder; it gets its name only when it is whole and on the disk.

    With a stamp, the name ends in that instead of ".tar": so it says what the shard was made of,
    and no reader takes it for one.
    """
    final = shard_name(shard_id)
    # No reader globs this name, and no two attempts at the same shard share it.
    partial = os.path.join(folder, f".{final[:-4]}-{secrets.token_hex(4)}")
    try:
        with naming(partial), open(partial, "xb", buffering=0) as stream:
            with contextlib.suppress(OSError):  # tells others that it is no leftover
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new = NewShard(stream)
            yield new
            os.fsync(stream.fileno())
            new.size = os.fstat(stream.fileno()).st_size
            new.before()
        new.path = os.path.join(folder, f"{final[:-4]}.{new.stamp}" if new.stamp else final)
        if new.fields:
            write_fields(new.path, new.fields)
        os.rename(partial, new.path)
        if not new.stamp:  # a run syncs all names at once, when it is published
            settle(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@functools.lru_cache(maxsize=1)
def _left_shards(folder: str) -> dict[int, list[str]]:
    """Return what dead runs had finished.

    Read once in a process, before this run adds shards of its own.
    """
    return all_shards(folder)


def find_left(folder: str, shard_id: int, stamp: Callable[[], str]) -> Left | None:
    """Return what a dead run had finished of a shard; see `places.Output`."""
    paths = _left_shards(folder).get(shard_id, [])
    if not paths:
        return None
    wanted, left = stamp(), Left()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            its_stamp, dropped = made_of(path)
            if its_stamp == wanted and not left.path and read_fields(path) is not None:
                kept = os.path.join(folder, os.path.basename(path))
                move_staged(path, kept)
                left = Left(kept, os.stat(kept).st_size, dropped or 0)
            elif path != left.path:  # an older version, or one of another attempt
                os.unlink(path)
    return left


def publish(folder: str, lock: int | None) -> Published:
    """Put the shards of a run in the place of the previous dataset."""
    output, held = os.path.dirname(folder), lock
    if is_staging(folder) and not os.path.exists(folder) and os.path.isdir(output):
        held = lock_output(output) if held is None else held
        if finish_publishing(output):
            raise AlreadyDone
    plan = read_plan(folder)
    if held is None and plan.driver is None:  # else its driver has the lock
        lock_output(output)
    replaced = sum(1 for name in os.listdir(output) if SHARD_PATTERN.fullmatch(name))
    if not is_publishing(folder):
        folder = _set_aside(folder, plan)
    dropped = _read_marker(folder)
    _move_shards(folder, plan.total_shards)
    for left in lost_runs(output):
        clear(left)
    unlock(output)
    names = map(shard_name, range(plan.total_shards))
    sizes = [os.stat(os.path.join(output, name)).st_size for name in names]
    return Published(plan, sizes, replaced, dropped)


def _set_aside(folder: str, plan: Plan) -> str:
    """Let no late task change a run any more, and mark it as one that is being published.

    Returns:
        Its folder, which has another name now, unless that cannot be: see `remove_staging`.
    """
    _check_complete(folder, plan)  # before tasks that are still at work lose their folder
    aside = folder
    with contextlib.suppress(OSError):
        new = new_staging(os.path.dirname(folder))
        os.rename(folder, new)
        aside = new
    try:
        _check_complete(aside, plan)
        write_record(aside, record.dump(record.of_run(plan, _staged(aside, plan))))
        _begin_publishing(aside)
    except BaseException:
        if aside != folder:
            os.rename(aside, folder)
        raise
    return aside


def _staged(folder: str, plan: Plan) -> Iterator[record.Staged]:
    """Yield what each shard of a run carries for the record, as long as it is staged."""
    for shard_id, (path, *_) in sorted(staged_shards(folder).items()):
        stamp, dropped = made_of(path)
        fields = read_fields(path)
        if fields is None:
            raise not_packed(plan, [shard_id])
        yield record.Staged(os.stat(path).st_size, stamp, dropped or 0, fields)


def _check_complete(folder: str, plan: Plan) -> None:
    """Refuse to publish a run unless each of its shards is there once."""
    staged = staged_shards(folder)
    if missing := [n for n in range(plan.total_shards) if len(staged.get(n, ())) != 1]:
        raise not_packed(plan, missing)


def finish_publishing(output: str) -> bool:
    """Finish a run that was cut short while its shards replaced the previous ones, if any."""
    lost = lost_runs(output)
    for folder in lost:
        warn(f"{folder!r}: publishing was interrupted, and the plan is gone; packing all afresh")
    cut = [folder for folder in cut_short(output) if folder not in lost]
    for folder in cut:
        _move_shards(folder, staging.read_plan(folder).total_shards)
    return bool(cut)


def _begin_publishing(folder: str) -> None:
    """Mark a run as one whose shards replace the previous ones."""
    path = os.path.join(folder, MARKER)
    try:
        paths = (path for paths in staged_shards(folder).values() for path in paths)
        with open(path, "xb") as stream:
            # Once shards are moved, their names say no more how many samples were dropped.
            stream.write(b"%d\n" % sum(made_of(path)[1] or 0 for path in paths))
            settle(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _read_marker(folder: str) -> int:
    """Return the number of dropped samples that the mark of a run holds."""
    with open(os.path.join(folder, MARKER), "rb") as stream:
        return int(stream.read() or 0)


def _move_shards(folder: str, total_shards: int) -> None:
    """Move shards to their final place; what is moved already, by a run cut short, stays.

    The old record goes first, and the new one comes last: so no record stands beside a mixture.
    """
    output = os.path.dirname(folder)
    staged, its_record = staged_shards(folder), os.path.join(folder, RECORD)
    if staged or os.path.lexists(its_record):  # else the new one is there
        write_record(output, None)
    with stage("publishing", "shards", total_shards) as publishing:
        for shard_id, (path, *_) in sorted(staged.items()):
            os.rename(path, os.path.join(output, shard_name(shard_id)))
            publishing.add(1)
    for name in beyond(os.listdir(output), total_shards):  # of a larger dataset
        os.unlink(os.path.join(output, name))
    with contextlib.suppress(FileNotFoundError):
        os.rename(its_record, os.path.join(output, RECORD))
    settle(output)
    clear(folder)
