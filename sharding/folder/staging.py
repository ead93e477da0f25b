"""Staging folders: a run packs into a hidden folder of its own inside the output.

Here they are made, read and removed, on any file system: their plan, and the shards that wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from typing import BinaryIO

from sharding.errors import InputError, PackError, StopRun, naming
from sharding.folder.dataset import MARKER, STAGING, cut_short, is_publishing, write_whole
from sharding.folder.mounts import LOCK, denied, make_folder, remove_folder
from sharding.messages import argument, explain, warn
from sharding.plan import PLAN, Plan, dump_plan, load_plan, load_samples
from sharding.record import RECORD, dump_fields, load_fields
from sharding.samples import Samples
from sharding.shards import MAX_SHARDS, PARTIAL_PATTERN, STAGED_PATTERN

LEFT = "left"  # in a staging folder: shards of dead runs, until each is found to be still true
FIELDS = ".fields"  # ends the name of what says which fields came out of a function
GONE = ".webdataset-gone-"  # begins the name of a staging folder that is being removed
_PASSING = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}


def new_staging(output: str) -> str:
    """Return the path of a staging folder that no other run has."""
    return os.path.join(output, STAGING + secrets.token_hex(8))


def _new_gone(output: str) -> str:
    """Return a path for a staging folder that is no run's yet, or no more."""
    return os.path.join(output, GONE + secrets.token_hex(8))


def make_staging(output: str) -> str:
    """Make a staging folder, by renaming one: at the end of the run, that must work, too.

    Raises:
        InputError: folders cannot be renamed there.
    """
    first, folder = _new_gone(output), new_staging(output)
    make_folder(first)
    try:
        # Some mounts rename a folder only while it is empty. The plan takes the place of this.
        open(os.path.join(first, f"{PLAN}-new"), "xb").close()
        _rename_first(first, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_folder(first)
        raise
    return folder


def _rename_first(first: str, folder: str) -> None:
    try:
        os.rename(first, folder)
    except OSError as error:
        if error.errno in _PASSING:
            raise
        output = os.path.dirname(folder)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(output, LOCK))
        raise InputError(
            f"{argument('output')} {output!r}: this file system cannot rename folders "
            f"({error.strerror}), which publishing needs; pack into a local folder, and copy that"
        ) from None


def remove_staging(staging: str) -> bool:
    """Remove a staging folder, and tell whether it is gone; if not, a later run tries again.

    Raises:
        PackError: it is another user's, and stays as it was.
    """
    gone = _new_gone(os.path.dirname(staging))
    try:
        os.rename(staging, gone)  # nobody takes it for one any more
    except OSError:  # overlayfs renames no folder of a lower layer
        gone = staging
    try:
        remove_folder(gone, _order)
    except FileNotFoundError:
        pass
    except PermissionError:
        if gone != staging and not is_publishing(gone):
            os.rename(gone, staging)
        raise denied(staging) from None
    except OSError as error:
        warn(f"{gone!r} cannot be removed ({error.strerror}); a later run tries again")
        return False
    return True


def _order(name: str) -> tuple[bool, bool]:
    """Let the plan go last, and first of all the mark for which readers refuse an output."""
    return name != MARKER, name == PLAN


def clear(staging: str) -> None:
    """Remove a staging folder when all shards are in place: what fails then is no fault."""
    try:
        remove_staging(staging)
    except (PackError, OSError) as error:
        warn(f"all shards are in place, but {explain(error)}")


def write_plan(
    staging: str, plan: Plan, samples: Samples, check: Callable[[Plan], object] | None = None
) -> Plan:
    """Write the plan of a run into its folder, and return it with its digest.

    Args:
        check: is given that plan, and raises an error if it may not be there; nobody finds it
            until then.
    """
    path = os.path.join(staging, PLAN)
    with naming(path), open(f"{path}-new", "wb") as stream:
        plan = dump_plan(stream, plan, samples)
        stream.flush()
        os.fsync(stream.fileno())
    if check:
        check(plan)
    os.replace(f"{path}-new", path)
    return plan


def has_plan(staging: str) -> bool:
    """Tell whether a plan is there, whole or damaged."""
    return os.path.lexists(os.path.join(staging, PLAN))


def read_plan(staging: str) -> Plan:
    """Return the plan of a run.

    Raises:
        PackError: there is none, or it is damaged.
    """
    with _open_plan(staging) as (path, stream):
        return load_plan(stream, path, "its folder")


def read_samples(staging: str, shard_id: int) -> Samples:
    """Return the samples of a shard of a run; see `read_plan`."""
    with _open_plan(staging) as (path, stream):
        return load_samples(stream, shard_id, path, "its folder")


@contextlib.contextmanager
def _open_plan(staging: str) -> Iterator[tuple[str, BinaryIO]]:
    path = os.path.join(staging, PLAN)
    try:
        with open(path, "rb") as stream:
            yield path, stream
    except FileNotFoundError:
        output = os.path.dirname(os.path.abspath(staging))
        if not os.path.isdir(output):
            raise StopRun(f"{output!r} is gone: was it removed or unmounted?") from None
        why = "the run was published, resumed in a new folder, or removed"
        raise PackError(f"{path!r} is gone: {why}") from None


def made_of(path: str) -> tuple[str, int | None]:
    """Return what the name of a staged shard says; see `stamped`."""
    match = STAGED_PATTERN.fullmatch(os.path.basename(path))
    if not match:
        return "", None
    return match[2], None if match[3] is None else int(match[3])


def write_fields(path: str, fields: Mapping[str, int]) -> None:
    """Write what came out of the function beside the staged shard that it made."""
    write_whole(path + FIELDS, dump_fields(fields))


def read_fields(path: str) -> dict[str, int] | None:
    """Return what `write_fields` was given; of another shard, nothing; None if it is lost."""
    if made_of(path)[1] is None:
        return {}
    try:
        with open(path + FIELDS, "rb") as stream:
            return load_fields(stream.read())
    except (FileNotFoundError, ValueError):
        return None


def move_staged(path: str, target: str) -> None:
    """Move a staged shard, after what stands beside it."""
    if made_of(path)[1] is not None:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + FIELDS, target + FIELDS)
    os.rename(path, target)


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


def remove_leftovers(output: str, shard_ids: Container[int] = range(MAX_SHARDS)) -> None:
    """Remove what killed attempts at these shards left, and staging folders half removed."""
    left = []
    for name in os.listdir(output):
        path = os.path.join(output, name)
        try:
            if match := PARTIAL_PATTERN.fullmatch(name):
                if int(match[1]) in shard_ids and not _is_being_written(path):
                    os.unlink(path)
            elif name.startswith(f"{RECORD}-"):
                os.unlink(path)
            elif re.fullmatch(re.escape(GONE) + "[0-9a-f]{16}", name) and not os.path.islink(path):
                remove_folder(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            left.append(f"{path!r} ({error.strerror})")
    if left:
        more = f" and {len(left) - 1:,} more" if left[1:] else ""
        warn(f"{left[0]}{more}: leftovers of killed runs that cannot be removed; they do no harm")


def _is_being_written(path: str) -> bool:
    """Tell whether a process has this partial shard locked."""
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks on this file system
            pass
        return False


def lost_runs(output: str) -> list[str]:
    """Return the folders of runs cut short that nobody can finish: moved or copied in part.

    The mark stays, and readers refuse the output, until another run is published.
    """
    return [path for path in cut_short(output) if not has_plan(path)]
