"""What only a folder does: find the shards of a dataset, and open them. See `places.Dataset`.

Writing is in run.py.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from sharding.errors import InputError, PackError, naming
from sharding.folder.mounts import settle
from sharding.messages import argument, explain
from sharding.record import RECORD
from sharding.shards import REPLACED, SHARD_PATTERN, STRAY, STRAY_PATTERN, Found, no_shards
from sharding.urls import expand_braces, nothing_matches

REMOTE = False
STAGING = ".webdataset-"  # begins the name of the hidden folder in which a run's shards wait
MARKER = "publishing"  # stands in that folder while its shards replace the previous ones


def staging_folders(output: str) -> list[str]:
    """Return the staging folders that runs have left in an output."""
    return [
        entry.path
        for entry in os.scandir(output)
        if is_staging(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def is_staging(path: str) -> bool:
    """Tell whether a path has the name of a staging folder."""
    return bool(re.fullmatch(re.escape(STAGING) + "[0-9a-f]{16}", os.path.basename(path)))


def is_publishing(staging: str) -> bool:
    """Tell whether the shards of a run were about to replace the previous ones."""
    return os.path.exists(os.path.join(staging, MARKER))


def cut_short(output: str) -> list[str]:
    """Return the staging folders of runs that were cut short while they were publishing."""
    return list(filter(is_publishing, staging_folders(output)))


def refuse_cut_short(output: str) -> None:
    """Raise a PackError if such a run is there."""
    if cut_short(output):
        raise PackError(
            f"{output!r}: publishing was interrupted; run the same command again, the one that "
            "packed (of an array job: the one that published)"
        )


def match(pattern: str, name: str) -> list[str]:
    """Return the files that a pattern names; see `places.Dataset`."""
    found: dict[str, None] = {}
    for one in expand_braces(pattern, name):
        paths = [one] if os.path.lexists(one) else sorted(glob.glob(one))
        if not paths:
            raise nothing_matches(name, pattern, one)
        for path in paths:
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise InputError(f"{argument(name)} {pattern!r}: {path!r} is not a file")
            except OSError as error:
                raise InputError(f"{argument(name)} {pattern!r}: {explain(error)}") from None
        found.update(dict.fromkeys(paths))
    for folder in {os.path.dirname(path) or os.curdir for path in found}:
        refuse_cut_short(folder)
    return list(found)


def find_shards(path: str) -> Found:
    """Return the shards in a folder, or those that a pattern of paths names."""
    try:
        if expand_braces(path, "path") != [path] or (not _is_folder(path) and glob.glob(path)):
            return Found(_chosen_shards(path, match(path, "path")), [], False)
        record = read_record(path)
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        sizes = [
            entry.stat().st_size
            for entry in entries
            if record is not None and SHARD_PATTERN.fullmatch(entry.name) and entry.is_file()
        ]
        refuse_cut_short(path)
        if record != read_record(path):
            raise PackError(f"{path!r}: the dataset was just replaced; run again")
    except OSError as error:
        raise InputError(f"{argument('path')}: {explain(error)}") from None
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
            cure = "an unfinished run is there: finish it with the same command, or publish it"
        raise no_shards(path, (entry.name for entry in entries), cure)
    return Found(shards, faults, True, record, sizes)


def _is_folder(path: str) -> bool:
    """Tell whether a path is a folder, unlike `os.path.isdir` also where that cannot be told.

    Raises:
        OSError: the path cannot be looked at.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        if os.path.islink(path) or not glob.has_magic(path):
            raise
        return False


def _chosen_shards(path: str, chosen: Sequence[str]) -> list[str]:
    """Return the shards that a pattern names, in order."""
    for shard in chosen:
        if not SHARD_PATTERN.fullmatch(os.path.basename(shard)):
            raise InputError(f"{argument('path')} {path!r}: {shard!r} is not a shard-*.tar")
    return sorted(chosen, key=lambda shard: (os.path.basename(shard), shard))


def identify(shards: Sequence[str]) -> list[tuple[int, int]]:
    """Return what distinguishes these shards from others that replace them.

    Their inode numbers would, too, but on some mounts those change by themselves.
    """
    return [(s.st_size, s.st_mtime_ns) for s in map(os.stat, shards)]


def _version(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a shard from one that takes its place, also when it is opened again.

    Not its inode: on some mounts that follows the path, or is another one each time it is opened.
    """
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def open_shard(path: str, buffering: int = 1 << 20) -> Iterator[tuple[BinaryIO, int, Any]]:
    """Open a shard; give the stream, its size and its version."""
    with naming(path), open(path, "rb", buffering=buffering) as stream:
        status = os.fstat(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield stream, status.st_size, _version(status)
        now = os.stat(path)
        if not os.path.samestat(status, now) or _version(status) != _version(now):
            raise PackError(f"{path!r}: {REPLACED}")


def read_range(path: str, offset: int, size: int, version: Any) -> bytes:
    """Return a part of this version of a shard."""
    with open_shard(path, 4 << 10) as (stream, _, found):
        if found != version:
            raise PackError(f"{path!r}: {REPLACED}")
        stream.seek(offset)
        return stream.read(size)


def read_record(path: str) -> bytes | None:
    """Return the record in a folder, if there is one; nothing of what is no file.

    Raises:
        PackError: it cannot be read, which is no reason to go on as if there were none.
    """
    name = os.path.join(path, RECORD)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # a FIFO must not block
            return b""
        with open(name, "rb") as stream:
            return stream.read()
    except OSError as error:
        none = isinstance(error, (FileNotFoundError, NotADirectoryError))
        if none and not os.path.islink(name):  # of a link, what it leads to is not here now
            return None
        raise PackError(f"{name!r} cannot be read: {error.strerror}") from None


def write_record(path: str, data: bytes | None) -> None:
    """Put a record into a folder, whole or not at all, or take it away."""
    name = os.path.join(path, RECORD)
    if data is not None:
        write_whole(name, data)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    settle(path)


def write_whole(path: str, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    partial = f"{path}-{secrets.token_hex(4)}"
    try:
        with naming(partial), open(partial, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def shard_size(path: str) -> int:
    """Return the size of a shard in bytes."""
    return os.path.getsize(path)
