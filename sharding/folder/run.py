"""A run that packs into a folder: lock it, stage the shards in a hidden folder, publish them.

See `places.Output`. A run has a staging folder of its own inside the output, so that a late writer
of a killed run finds its folder gone.

A published dataset survives a power cut: each shard is synced before it gets its staged name
(`new_shard`), the staging folder before a shard of it is moved (`_begin_publishing`), and the
output when all are moved, before the mark that they are being moved goes (`_move_shards`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import secrets
import stat
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sharding import plan as plans
from sharding.errors import InputError, PackError, argument, count, explain, naming, warn
from sharding.folder.dataset import (
    MARKER,
    cut_short,
    is_publishing,
    is_staging,
    refuse_cut_short,
    staging_folders,
)
from sharding.folder.mounts import LOCK as LOCK
from sharding.folder.mounts import denied, make_folder, remove_folder, unlock
from sharding.folder.mounts import (
    lock_output as lock_output,  # which `places.Output` has, as the next
)
from sharding.folder.mounts import settle as settle
from sharding.folder.staging import GONE as GONE
from sharding.folder.staging import (
    clear,
    lost_runs,
    make_staging,
    new_staging,
    remove_leftovers,
    remove_staging,
)
from sharding.plan import (
    PLAN,
    Plan,
    differences,
    does_not_fit,
    is_array_job,
    no_run,
    not_ended,
    not_packed,
    write_plan,
)
from sharding.samples import Samples
from sharding.shards import (
    SHARD_PATTERN,
    STAGED_PATTERN,
    STRAY_PATTERN,
    NewShard,
    beyond,
    inside_source,
    shard_name,
    warn_of_more,
    warn_of_strays,
)

if TYPE_CHECKING:
    from sharding.listing import Listing

LEFT = "left"  # in a staging folder: shards of dead runs, until each is found to be still true

# ---------------------------------------------------------------- before a run


def check_output(output: str, listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    name = f"{argument('output')} {output!r}"
    _check_folder(output, name)
    if os.path.isdir(listing.source):
        _check_outside(output, name, listing)
    strays = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(output):
            if SHARD_PATTERN.fullmatch(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    raise InputError(
                        f"{entry.path!r} is a folder with a shard's name; move it away"
                    )
            elif STRAY_PATTERN.fullmatch(entry.name):
                strays.append(entry.name)
    warn_of_strays(output, "file", strays)


def _check_folder(output: str, name: str) -> None:
    """Refuse an output that is no folder, and cannot become one."""
    try:
        if not stat.S_ISDIR(os.stat(output).st_mode):
            raise InputError(f"{name} is no folder")
    except FileNotFoundError:
        for path in (Path(output), *Path(output).parents):
            if path.is_symlink() and not path.exists():
                leads = f"the link {str(path)!r} leads to {os.readlink(path)!r}"
                raise InputError(f"{name}: {leads}, which is not there") from None
    except OSError as error:
        raise InputError(f"{name}: {explain(error)}") from None


def _check_outside(output: str, name: str, listing: Listing) -> None:
    """Refuse an output in a folder of the source, even one that a link leads to."""
    here = os.path.realpath(output)
    folders = {os.path.realpath(listing.source), *_linked_folders(listing)}
    if any(map(Path(here).is_relative_to, folders)):
        raise inside_source(output)
    if "tar" in listing.fields.known():  # a link may lead to a shard in the output
        for file in (file for sample in listing.samples for file in sample.files()):
            folder, base = os.path.split(os.path.realpath(os.path.join(listing.source, file)))
            if folder == here and SHARD_PATTERN.fullmatch(base):
                raise InputError(f"{name} holds {file!r} of {argument('source')}; choose another")


def _linked_folders(listing: Listing) -> set[str]:
    """Return where links lead that stand for folders with samples."""
    seen, linked = {""}, set()
    for folder in {sample.stem.rpartition("/")[0] for sample in listing.samples}:
        while folder not in seen:
            seen.add(folder)
            path = os.path.join(listing.source, folder)
            if os.path.islink(path):
                linked.add(os.path.realpath(path))
            folder = folder.rpartition("/")[0]
    return linked


def prepare(output: str, shard_ids: Container[int], total_shards: int) -> None:
    """Make the folder for single shards, and clear what killed attempts at them left."""
    os.makedirs(output, exist_ok=True)
    refuse_cut_short(output)
    warn_of_more(output, os.listdir(output), total_shards)
    remove_leftovers(output, shard_ids)


def begin(
    output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
) -> tuple[str, Plan, int]:
    """Lock the output, stage a new run, and take over or clear what dead runs left."""
    os.makedirs(output, exist_ok=True)
    lock = lock_output(output)
    try:
        if not (resume or replace or _is_locked(lock)):
            _refuse_others(output)
        remove_leftovers(output)
        finish_publishing(output)
        return *_stage(output, plan, samples, resume, replace), lock
    except BaseException:
        os.close(lock)
        raise


def _stage(
    output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
) -> tuple[str, Plan]:
    """Make the staging folder of a run, and take over or clear those of others."""
    folder = make_staging(output)
    try:
        plan = write_plan(folder, plan, samples)
        left = _left_runs(folder, plan)
        _check_left(left, resume, replace)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_folder(folder)
        raise
    _take_over(folder, left, replace)
    return folder, plan


def _is_locked(lock: int) -> bool:
    """Tell whether what `lock_output` returned is locked: whether this file system has locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _refuse_others(output: str) -> None:
    """Raise a PackError if another run is there: without locks, nobody can tell if it is dead."""
    for other in staging_folders(output):
        if os.path.exists(os.path.join(other, PLAN)):
            before = plans.read_plan(other)
            raise _array_job(other, before) if before.driver is None else not_ended(output, before)


class _Left(NamedTuple):
    """What another run has left. Unless it is an array job, it is dead, since we have its lock."""

    folder: str
    plan: Plan | None  # None: there is none
    differs: list[str]  # see `plan.differences`
    shards: dict[int, list[str]]  # that it had finished


def _left_runs(folder: str, plan: Plan) -> list[_Left]:
    """Return what other runs have left beside the folder of a run."""
    found = []
    for other in staging_folders(os.path.dirname(folder)):
        if other == folder or is_publishing(other):  # one that is lost; its mark must stay
            continue
        before, shards = None, all_shards(other)
        try:
            before = plans.read_plan(other)
        except PackError:
            if shards and os.path.exists(os.path.join(other, PLAN)):  # perhaps of a newer version
                raise
        found.append(_Left(other, before, differences(before, plan) if before else [], shards))
    return found


def _check_left(left: Sequence[_Left], resume: bool, replace: bool) -> None:
    """Refuse to begin if what other runs have left would be lost, or may not be dead.

    Raises:
        InputError: finished shards would be lost.
        PackError: an array job is there, or what may not be touched.
    """
    for other, before, differs, shards in left:
        output, finished = os.path.dirname(other), len(shards)
        if not os.access(other, os.W_OK | os.X_OK):
            raise denied(other)
        if before and before.driver is None and (differs or replace or not resume):
            raise _array_job(other, before, differs)
        if before and differs and finished and not replace:
            raise does_not_fit(output, finished, differs)
        if not before and finished and not replace:
            cure = f"{argument('replace')} removes it and packs afresh"
            raise InputError(
                f"{other!r}: {count(finished, 'finished shard')} without a plan; {cure}"
            )


def _take_over(folder: str, left: Sequence[_Left], replace: bool) -> None:
    """Move shards that fit a run into its folder `LEFT`, and remove all else that is left.

    Whenever this is cut short, a folder with a plan holds each of these shards.
    """
    kept = os.path.join(folder, LEFT)
    for other, _, differs, shards in left:
        fits = not (differs or replace)
        if shards and fits:
            _move_left(other, shards, kept)
        gone = remove_staging(other)  # a late writer of that run finds its folder gone
        if shards and gone and not fits:
            warn(f"{count(len(shards), 'finished shard')} of an interrupted run removed")


def _move_left(other: str, shards: dict[int, list[str]], kept: str) -> None:
    """Move the finished shards of a dead run to a new one."""
    if not os.path.isdir(kept):
        make_folder(kept)
    for path in (path for paths in shards.values() for path in paths):
        try:
            os.rename(path, os.path.join(kept, os.path.basename(path)))
        except FileNotFoundError:
            pass  # a late task of Ray has just moved it
        except PermissionError:
            raise denied(other) from None
        except OSError as error:
            if error.errno != errno.EXDEV:  # of a quota of its own, or another file system
                raise
            warn(f"{path!r} cannot be moved ({error.strerror}); it and others are packed again")
            return


def _array_job(folder: str, before: Plan, differs: Sequence[str] = ()) -> PackError:
    return is_array_job(folder, before, differs, "remove that folder")


# ---------------------------------------------------------------- packing


def read_plan(folder: str) -> Plan:
    """Return the plan of a run.

    Raises:
        PackError: there is none.
    """
    if not is_staging(folder):
        raise no_run(folder)
    return plans.read_plan(folder)


def read_shards(folder: str, shard_ids: Iterable[int]) -> Iterator[Samples]:
    """Yield the samples of shards of a run."""
    return plans.read_shards(folder, shard_ids)


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
        new.path = os.path.join(folder, f"{final[:-4]}.{new.stamp}" if new.stamp else final)
        os.rename(partial, new.path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@functools.lru_cache(maxsize=1)
def left_shards(folder: str) -> dict[int, list[str]]:
    """Return what dead runs had finished.

    Read once in a process, before this run adds shards of its own.
    """
    return all_shards(folder)


def find_kept(folder: str, shard_id: int, stamp: str) -> tuple[str, int] | None:
    """Return path and size of a shard that is finished, and was made of what the stamp tells."""
    kept = None
    for path in left_shards(folder).get(shard_id, []):
        with contextlib.suppress(FileNotFoundError):
            if path.endswith(stamp) and not kept:
                place = os.path.join(folder, os.path.basename(path))
                os.rename(path, place)
                kept = place, os.stat(place).st_size
            elif not kept or path != kept[0]:  # an older version, or one of another attempt
                os.unlink(path)
    return kept


def all_shards(staging: str) -> dict[int, list[str]]:
    """Return what `staged_shards` does, with the shards that dead runs had finished behind them."""
    found = staged_shards(staging)
    with contextlib.suppress(FileNotFoundError):
        for shard_id, paths in staged_shards(os.path.join(staging, LEFT)).items():
            found.setdefault(shard_id, []).extend(paths)
    return found


def staged_shards(staging: str) -> dict[int, list[str]]:
    """Return the shards that a run has finished: number -> paths of its versions, mostly one."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in os.listdir(staging):
        if match := STAGED_PATTERN.fullmatch(name):
            found[int(match[1])].append(os.path.join(staging, name))
    return dict(found)


def kept_shards(staging: str) -> list[int]:
    """Return which shards are older than the plan of their run: of one that was interrupted."""
    began = os.stat(os.path.join(staging, PLAN)).st_mtime_ns
    staged = staged_shards(staging).items()
    return [shard_id for shard_id, paths in staged if os.stat(paths[0]).st_mtime_ns < began]


def may_write(folder: str) -> bool:
    """Tell whether shards of a run can be written from here."""
    return os.access(folder, os.W_OK)


# ---------------------------------------------------------------- publishing


def count_published(output: str) -> int:
    """Return how many shards a run would replace."""
    return sum(1 for name in os.listdir(output) if SHARD_PATTERN.fullmatch(name))


def publish(folder: str, plan: Plan) -> list[int]:
    """Put the shards of a run in the place of the previous dataset, and return their sizes."""
    output, staging = os.path.dirname(folder), folder
    if not is_publishing(folder):
        _check_complete(folder, plan)  # before tasks that are still at work lose their folder
        with contextlib.suppress(OSError):  # some folders cannot be renamed: see _remove_staging
            new = new_staging(output)
            os.rename(folder, new)  # from here on, no late task changes anything
            staging = new
        try:
            _check_complete(staging, plan)
            _begin_publishing(staging)
        except BaseException:
            if staging != folder:
                os.rename(staging, folder)
            raise
    _move_shards(staging, plan.total_shards)
    for left in lost_runs(output):
        clear(left)
    unlock(output)
    names = map(shard_name, range(plan.total_shards))
    return [os.stat(os.path.join(output, name)).st_size for name in names]


def _check_complete(staging: str, plan: Plan) -> None:
    """Refuse to publish a run unless each of its shards is there once."""
    staged = staged_shards(staging)
    if missing := [n for n in range(plan.total_shards) if len(staged.get(n, ())) != 1]:
        raise not_packed(plan, missing)


def finish_publishing(output: str) -> bool:
    """Finish a run that was cut short while its shards replaced the previous ones, if any."""
    lost = lost_runs(output)
    for folder in lost:
        warn(f"{folder!r}: publishing was interrupted, and the plan is gone; packing all afresh")
    cut = [folder for folder in cut_short(output) if folder not in lost]
    for folder in cut:
        _move_shards(folder, plans.read_plan(folder).total_shards)
    return bool(cut)


def finish_cut(folder: str) -> bool:
    """Finish a run whose folder is gone, if it was cut short while it was publishing."""
    output = os.path.dirname(folder)
    if not is_staging(folder) or os.path.exists(folder) or not os.path.isdir(output):
        return False
    lock_output(output)
    return finish_publishing(output)


def _begin_publishing(staging: str) -> None:
    """Mark a run as one whose shards replace the previous ones."""
    path = os.path.join(staging, MARKER)
    try:
        with open(path, "xb"):
            settle(staging)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _move_shards(staging: str, total_shards: int) -> None:
    """Move shards to their final place; what is moved already, by a run cut short, stays."""
    output = os.path.dirname(staging)
    for shard_id, (path, *_) in sorted(staged_shards(staging).items()):
        os.rename(path, os.path.join(output, shard_name(shard_id)))
    for name in beyond(os.listdir(output), total_shards):  # of a larger dataset
        os.unlink(os.path.join(output, name))
    settle(output)
    clear(staging)
