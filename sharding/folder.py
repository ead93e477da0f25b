"""What only a folder does: check an output, lock it, stage a run, publish it, find the shards.

In come paths and numbers of shards. Apart, so that an object store can have the same few names in
a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

from sharding.errors import InputError, PackError, argument, count, explain, refuse_url, warn
from sharding.listing import Listing
from sharding.shards import MAX_SHARDS, SHARD_PATTERN, STAGED_PATTERN, shard_name

STAGING = ".webdataset-"  # begins the name of the hidden folder in which a run's shards wait
MARKER = "publishing"  # stands in that folder while its shards replace the previous ones
LOCK = ".webdataset.lock"
_STRAY_PATTERN = re.compile(r"shard-.*\.tar", re.DOTALL)  # what readers glob
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of flock: some Lustre and FUSE
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # of fsync on a folder: CIFS and the like
LOCK_WAIT = 0.5  # seconds; the holder of a run that has just ended takes a moment to go
INTERRUPTED = "publishing was interrupted; run the same command again, the one that packed"


def check_output(output: str | os.PathLike[str], listing: Listing) -> None:
    """Refuse an output in which shards cannot take, or would harm, what has their names."""
    refuse_url("output", output)
    name = f"{argument('output')} {os.fspath(output)!r}"
    inside = Path(os.path.realpath(output)).is_relative_to(os.path.realpath(listing.source))
    if "tar" in listing.fields.known() and inside:
        raise InputError(f"{name} is inside {argument('source')}, whose tars it could replace")
    strays = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(output):
            if SHARD_PATTERN.fullmatch(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    raise InputError(
                        f"{entry.path!r} is a folder with a shard's name; move it away"
                    )
            elif _STRAY_PATTERN.fullmatch(entry.name):
                strays.append(entry.name)
    if strays:
        found = f"{count(len(strays), 'file')} ({min(strays)!r})"
        warn(f"{output!r} has {found} of another naming, which readers may take for a shard")


def lock_output(output: str) -> int:
    """Take the lock of an output; it is gone when the last holder of the descriptor ends.

    Raises:
        PackError: another run holds it.
    """
    path, deadline = os.path.join(output, LOCK), time.monotonic() + LOCK_WAIT
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass  # the run that held it has just ended and removed the file
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warn(f"{output!r}: no locks on this file system: two runs would not see each other")
                return fd
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() > deadline:
                os.close(fd)
                message = f"another run is packing into {output!r}; wait, or stop it"
                raise PackError(message) from None
            time.sleep(LOCK_WAIT / 10)
        os.close(fd)


def new_staging(output: str) -> str:
    """Return the path of a staging folder that no other run has."""
    return os.path.join(output, STAGING + secrets.token_hex(8))


def staging_folders(output: str | os.PathLike[str]) -> list[str]:
    """Return the staging folders that runs have left in an output."""
    return [
        entry.path
        for entry in os.scandir(output)
        if re.fullmatch(re.escape(STAGING) + "[0-9a-f]{16}", entry.name)
        and entry.is_dir(follow_symlinks=False)
    ]


def staged_shards(staging: str) -> dict[int, list[str]]:
    """Return the shards that a run has finished: number -> paths of its versions, mostly one."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in os.listdir(staging):
        if match := STAGED_PATTERN.fullmatch(name):
            found[int(match[1])].append(os.path.join(staging, name))
    return dict(found)


def remove_staging(staging: str) -> None:
    """Remove a staging folder, in which a late task of a killed run may still want to write."""
    gone = new_staging(os.path.dirname(staging))
    os.rename(staging, gone)  # it finds its folder gone
    shutil.rmtree(gone)


def remove_shards(
    folder: str | os.PathLike[str],
    pattern: re.Pattern[str],
    shard_ids: Container[int] = range(MAX_SHARDS),
) -> None:
    """Remove these shards, or what killed attempts at them left, as the pattern of names says."""
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and int(match[1]) in shard_ids:
            os.unlink(os.path.join(folder, name))


def is_publishing(staging: str) -> bool:
    """Tell whether the shards of a run were about to replace the previous ones."""
    return os.path.exists(os.path.join(staging, MARKER))


def begin_publishing(staging: str) -> None:
    """Mark a run as one whose shards replace the previous ones."""
    with open(os.path.join(staging, MARKER), "xb"):
        sync_folder(staging)


def publish(staging: str, total_shards: int) -> None:
    """Move shards to their final place; what is moved already, by a run cut short, stays."""
    output = os.path.dirname(staging)
    for shard_id, (path,) in sorted(staged_shards(staging).items()):
        os.rename(path, os.path.join(output, shard_name(shard_id)))
    remove_shards(output, SHARD_PATTERN, range(total_shards, MAX_SHARDS))  # of a larger dataset
    sync_folder(output)
    os.unlink(os.path.join(staging, MARKER))
    remove_staging(staging)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put the names in a folder on the disk, as fsync does for the content of a file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


def find_shards(path: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the paths of the shards of a dataset, in order, and what is wrong: (kind, name).

    Raises:
        InputError: there are none.
        PackError: a run was cut short while its shards replaced the previous ones.
    """
    refuse_url("path", path)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        runs = staging_folders(path)
    except OSError as error:
        raise InputError(f"{argument('path')}: {explain(error)}") from None
    if any(map(is_publishing, runs)):
        raise PackError(f"{path!r}: {INTERRUPTED}")
    shards, faults = [], []
    for entry in entries:
        if SHARD_PATTERN.fullmatch(entry.name):
            if entry.is_file():
                shards.append(entry.path)
            else:
                faults.append(("not a file", entry.name))
        elif _STRAY_PATTERN.fullmatch(entry.name):
            faults.append(("stray file, which readers may take for a shard", entry.name))
    if not shards:
        cure = "pack some with ./run_parallel.sh"
        if runs:
            cure = "an unfinished run is there: end it with --resume"
        raise InputError(f"{argument('path')} {path!r} has no shard-*.tar; {cure}")
    return shards, faults
