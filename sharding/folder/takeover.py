"""What other runs have left in an output: look at all of it, then decide, then act.

Unless it is an array job, a run that is found here is dead, since we have its lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from sharding.errors import InputError, PackError
from sharding.folder.dataset import is_publishing, staging_folders
from sharding.folder.mounts import denied, make_folder
from sharding.folder.staging import (
    LEFT,
    all_shards,
    has_plan,
    move_staged,
    read_plan,
    remove_staging,
)
from sharding.messages import argument, count, warn
from sharding.plan import Plan, differences, does_not_fit, is_array_job, not_ended


class Remains(NamedTuple):
    """What another run has left. Unless it is an array job, it is dead, since we have its lock."""

    folder: str
    plan: Plan | None  # None: there is none
    differs: list[str]  # see `plan.differences`
    shards: dict[int, list[str]]  # that it had finished


def find_remains(folder: str, plan: Plan) -> list[Remains]:
    """Return what other runs have left beside the folder of a run."""
    found = []
    for other in staging_folders(os.path.dirname(folder)):
        if other == folder or is_publishing(other):  # one that is lost; its mark must stay
            continue
        before, shards = None, all_shards(other)
        try:
            before = read_plan(other)
        except PackError:
            if shards and has_plan(other):  # perhaps of a newer version
                raise
        found.append(
            Remains(other, before, differences(before.made, plan.made) if before else [], shards)
        )
    return found


def check_remains(remains: Sequence[Remains], resume: bool, replace: bool) -> None:
    """Refuse to begin if what other runs have left would be lost, or may not be dead.

    Raises:
        InputError: finished shards would be lost.
        PackError: an array job is there, or what may not be touched.
    """
    for other, before, differs, shards in remains:
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


def take_over(folder: str, remains: Sequence[Remains], replace: bool) -> None:
    """Move shards that fit a run into its folder `LEFT`, and remove all else that is left.

    Whenever this is cut short, a folder with a plan holds each of these shards.
    """
    kept = os.path.join(folder, LEFT)
    for other, _, differs, shards in remains:
        fits = not (differs or replace)
        if shards and fits:
            _move_shards(other, shards, kept)
        gone = remove_staging(other)  # a late writer of that run finds its folder gone
        if shards and gone and not fits:
            warn(f"{count(len(shards), 'finished shard')} of an interrupted run removed")


def _move_shards(other: str, shards: dict[int, list[str]], kept: str) -> None:
    """Move the finished shards of a dead run to a new one."""
    if not os.path.isdir(kept):
        make_folder(kept)
    for path in (path for paths in shards.values() for path in paths):
        try:
            move_staged(path, os.path.join(kept, os.path.basename(path)))
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


def refuse_others(output: str) -> None:
    """Raise a PackError if another run is there: without locks, nobody can tell if it is dead."""
    for other in staging_folders(output):
        if has_plan(other):
            before = read_plan(other)
            raise _array_job(other, before) if before.driver is None else not_ended(output, before)
