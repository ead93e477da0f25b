"""Staging folders: made, found, removed, on any file system.

A run packs into a hidden folder of its own inside the output; see folder_run.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Container

from sharding.errors import InputError, PackError, argument, explain, warn
from sharding.folder.dataset import MARKER, STAGING, cut_short, is_publishing
from sharding.folder.mounts import LOCK, denied, make_folder, remove_folder
from sharding.plan import PLAN
from sharding.shards import MAX_SHARDS, PARTIAL_PATTERN

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
            f"{argument('output')} {output!r}: this file system renames no folders "
            f"({error.strerror}), as publishing must; pack into a local folder, and copy that"
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


def remove_leftovers(output: str, shard_ids: Container[int] = range(MAX_SHARDS)) -> None:
    """Remove what killed attempts at these shards left, and staging folders half removed."""
    left = []
    for name in os.listdir(output):
        path = os.path.join(output, name)
        try:
            if match := PARTIAL_PATTERN.fullmatch(name):
                if int(match[1]) in shard_ids and not _is_being_written(path):
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
    return [path for path in cut_short(output) if not os.path.lexists(os.path.join(path, PLAN))]
