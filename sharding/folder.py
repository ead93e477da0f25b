"""What only a folder does: check an output, lock it, stage a run, publish it, find the shards.

Kept separate so that an object store can offer the same few names in a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sharding.errors import InputError, PackError, argument, count, explain, naming, warn
from sharding.shards import (
    MAX_SHARDS,
    PARTIAL_PATTERN,
    REPLACED,
    SHARD_PATTERN,
    STAGED_PATTERN,
    STRAY,
    STRAY_PATTERN,
    Found,
    NewShard,
    shard_name,
)

if TYPE_CHECKING:
    from sharding.listing import Listing

STAGING = ".webdataset-"  # begins the name of the hidden folder in which a run's shards wait
GONE = ".webdataset-gone-"  # begins the name of one that is being removed
MARKER = "publishing"  # stands in that folder while its shards replace the previous ones
LOCK = ".webdataset.lock"
READ_SIZE = 1 << 20  # bytes read at a time
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of flock: some Lustre and FUSE
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # of fsync on a folder: CIFS and the like
LOCK_WAIT = 0.5  # seconds; the holder of a run that has just ended takes a moment to go
INTERRUPTED = (
    "publishing was interrupted; run the same command again, the one that packed (of an array job: "
    "the one that published)"
)


def check_output(output: str | os.PathLike[str], listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    name = f"{argument('output')} {os.fspath(output)!r}"
    replaces = "tar" in listing.fields.known() and os.path.isdir(listing.source)
    inside = Path(os.path.realpath(output)).is_relative_to(os.path.realpath(listing.source))
    if replaces and inside:
        raise InputError(f"{name} is inside {argument('source')}, whose tars it could replace")
    if replaces:  # a link may lead from the source to the output
        here = os.path.realpath(output)
        for file in (file for sample in listing.samples for file in sample.files()):
            folder, base = os.path.split(os.path.realpath(os.path.join(listing.source, file)))
            if folder == here and SHARD_PATTERN.fullmatch(base):
                raise InputError(f"{name} holds {file!r} of {argument('source')}; choose another")
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"{name} is no folder")
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
    if strays:
        found = f"{count(len(strays), 'file')} ({min(strays)!r})"
        warn(f"{name} has {found} not named like its shards, which readers may take for some")


def lock_output(output: str) -> int:
    """Take the lock of an output; it is released when the last holder of the descriptor ends.

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
        if is_staging(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def staged_shards(staging: str) -> dict[int, list[str]]:
    """Return the shards that a run has finished: number -> paths of its versions, mostly one."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in os.listdir(staging):
        if match := STAGED_PATTERN.fullmatch(name):
            found[int(match[1])].append(os.path.join(staging, name))
    return dict(found)


def kept_shards(staging: str) -> list[int]:
    """Return which shards are older than the plan of their run: of one that was interrupted."""
    began = os.stat(os.path.join(staging, "plan")).st_mtime_ns
    staged = staged_shards(staging).items()
    return [shard_id for shard_id, paths in staged if os.stat(paths[0]).st_mtime_ns < began]


def is_staging(path: str) -> bool:
    """Tell whether a path has the name of a staging folder."""
    return bool(re.fullmatch(re.escape(STAGING) + "[0-9a-f]{16}", os.path.basename(path)))


def move_staging(staging: str) -> str:
    """Give a staging folder a new name, so that late tasks find their folder gone; return it."""
    new = new_staging(os.path.dirname(staging))
    os.rename(staging, new)
    return new


def remove_staging(staging: str) -> None:
    """Remove a staging folder; as soon as it has another name, it is none any more."""
    gone = os.path.join(os.path.dirname(staging), GONE + secrets.token_hex(8))
    os.rename(staging, gone)
    shutil.rmtree(gone)


def remove_leftovers(output: str, shard_ids: Container[int] = range(MAX_SHARDS)) -> None:
    """Remove what killed attempts at these shards left, and staging folders half removed."""
    for name in os.listdir(output):
        path = os.path.join(output, name)
        if match := PARTIAL_PATTERN.fullmatch(name):
            if int(match[1]) in shard_ids and not _is_being_written(path):
                os.unlink(path)
        elif re.fullmatch(re.escape(GONE) + "[0-9a-f]{16}", name) and not os.path.islink(path):
            shutil.rmtree(path)


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


def is_publishing(staging: str) -> bool:
    """Tell whether the shards of a run were about to replace the previous ones."""
    return os.path.exists(os.path.join(staging, MARKER))


def cut_short(output: str | os.PathLike[str]) -> list[str]:
    """Return the staging folders of runs that were cut short while they were publishing."""
    return list(filter(is_publishing, staging_folders(output)))


def begin_publishing(staging: str) -> None:
    """Mark a run as one whose shards replace the previous ones."""
    path = os.path.join(staging, MARKER)
    try:
        with open(path, "xb"):
            sync_folder(staging)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def publish(staging: str, total_shards: int) -> None:
    """Move shards to their final place; what is moved already, by a run cut short, stays."""
    output = os.path.dirname(staging)
    for shard_id, (path,) in sorted(staged_shards(staging).items()):
        os.rename(path, os.path.join(output, shard_name(shard_id)))
    for name in os.listdir(output):
        match = SHARD_PATTERN.fullmatch(name)
        if match and int(match[1]) >= total_shards:  # of a larger dataset
            os.unlink(os.path.join(output, name))
    sync_folder(output)
    remove_staging(staging)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush the names in a folder to the disk, as fsync does for the content of a file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


# ---------------------------------------------------------------- reading: see places.Dataset


def find_shards(path: str) -> Found:
    """Return the shards in a folder, or those that a pattern of paths names."""
    if not os.path.isdir(path) and (chosen := glob.glob(path)):
        return Found(_chosen_shards(path, chosen), [], False)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        interrupted = cut_short(path)
    except OSError as error:
        raise InputError(f"{argument('path')}: {explain(error)}") from None
    if interrupted:
        raise PackError(f"{path!r}: {INTERRUPTED}")
    shards, faults = [], []
    for entry in entries:
        if SHARD_PATTERN.fullmatch(entry.name):
            if entry.is_file():
                shards.append(entry.path)
            else:
                faults.append(("not a file", entry.name))
        elif STRAY_PATTERN.fullmatch(entry.name):
            faults.append((STRAY, entry.name))
    if not shards:
        cure = "pack some with ./run_parallel.sh"
        if staging_folders(path):
            cure = "an unfinished run is there: finish it with --resume, or publish it"
        raise InputError(f"{argument('path')} {path!r} has no shard-*.tar; {cure}")
    return Found(shards, faults, True)


def _chosen_shards(path: str, chosen: Sequence[str]) -> list[str]:
    """Return the shards that a pattern names, in order."""
    for folder in {os.path.dirname(shard) or os.curdir for shard in chosen}:
        if cut_short(folder):
            raise PackError(f"{folder!r}: {INTERRUPTED}")
    for shard in chosen:
        if not SHARD_PATTERN.fullmatch(os.path.basename(shard)) or not os.path.isfile(shard):
            raise InputError(f"{argument('path')} {path!r}: {shard!r} is no shard-*.tar")
    return sorted(chosen, key=lambda shard: (os.path.basename(shard), shard))


def identify(shards: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return what tells these shards from others that take their places."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, shards)]


@contextlib.contextmanager
def open_shard(path: str, buffering: int = READ_SIZE) -> Iterator[tuple[BinaryIO, int]]:
    """Open a shard; give the stream and its size."""
    with naming(path), open(path, "rb", buffering=buffering) as stream:
        status = os.fstat(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield stream, status.st_size
        if not os.path.samestat(status, os.stat(path)):
            raise PackError(f"{path!r}: {REPLACED}")


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return a part of a shard."""
    with naming(path), open(path, "rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.read(size)


def shard_size(path: str) -> int:
    """Return the size of a shard in bytes."""
    return os.path.getsize(path)
