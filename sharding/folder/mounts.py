"""What the file system of a folder may do in its own way: lock, remove, sync, who may write.

Network mounts, FUSE and layers of containers lack calls that a disk has, or give a file another
inode number each time, so nothing here compares those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import shlex
import stat
import time
from collections.abc import Callable

from sharding.errors import PackError
from sharding.messages import explain, warn

LOCK = ".webdataset.lock"
LOCK_WAIT = 0.5  # seconds; the holder of a run that has just ended takes a moment to go
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of flock: some Lustre and FUSE
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # of fsync on a folder: CIFS and the like
_NEW_EACH_TIME = 3  # a file is replaced so often in a moment only where inode numbers change


def lock_output(output: str) -> int:
    """Take the lock of an output; it is released when the last holder of the descriptor ends.

    Raises:
        PackError: another run holds it, or another user does not let go of it.
    """
    path, deadline = os.path.join(output, LOCK), time.monotonic() + LOCK_WAIT
    others = 0  # locked so far, but not what the path leads to
    while True:
        fd = _open_lock(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if others == _NEW_EACH_TIME or os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
            others += 1
        except FileNotFoundError:  # the run that held it has just ended and removed the file
            if time.monotonic() > deadline:
                raise
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warn(f"{output!r}: no locks on this file system: two runs would not see each other")
                return fd
            if error.errno == errno.EBADF:  # NFS locks only what may be written
                raise denied(path) from None
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() > deadline:
                os.close(fd)
                message = f"another run is packing into {output!r}; wait, or stop it"
                raise PackError(message) from None
            time.sleep(LOCK_WAIT / 10)
        os.close(fd)


def _open_lock(path: str) -> int:
    """Open the file of a lock, made if missing, for the group if the output is one's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        share(fd, os.path.dirname(path))
        return fd
    except PermissionError:
        if not os.path.lexists(path):
            raise
    for how in (os.O_RDWR, os.O_RDONLY):  # another user's; most systems lock what may be read
        with contextlib.suppress(PermissionError):
            return os.open(path, how | os.O_NOFOLLOW)
    raise denied(path)


def unlock(output: str) -> None:
    """Remove the file of the lock; no other run has it, and none minds if it stays."""
    path = os.path.join(output, LOCK)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # SMB removes no file that is open
        warn(f"{explain(error)}; it stays, and does no harm")


def settle(folder: str) -> None:
    """Flush the names in a folder to the disk, as fsync does for the content of a file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


def remove_folder(
    path: str, order: Callable[[str], object] = str, within: int | None = None
) -> None:
    """Remove a folder and what is in it; a link that took its place is not followed.

    `shutil.rmtree` compares inode numbers, and gives up where they change.

    Args:
        order: of the names, in which they go.
        within: descriptor of the folder that the path begins in.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    try:
        with os.scandir(fd) as entries:
            folders = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        for name in sorted(folders, key=order):  # type: ignore[arg-type]
            if folders[name]:
                remove_folder(name, within=fd)
                continue
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(path, dir_fd=within)


def make_folder(path: str) -> None:
    """Make a folder, and share it; see `share`."""
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    share(fd, os.path.dirname(path))
    os.close(fd)


def share(fd: int, folder: str) -> None:
    """Let the group do with a new file or folder what it may do in the folder that holds it."""
    with contextlib.suppress(OSError):  # on mounts without modes; the group can do without
        theirs, status = os.stat(folder), os.fstat(fd)
        if not theirs.st_mode & stat.S_IWGRP:
            return
        if status.st_gid != theirs.st_gid:
            os.fchown(fd, -1, theirs.st_gid)
        bits = stat.S_IRGRP | stat.S_IWGRP
        if stat.S_ISDIR(status.st_mode):
            bits = stat.S_IRWXG | stat.S_ISGID
        os.fchmod(fd, stat.S_IMODE(status.st_mode) | theirs.st_mode & bits)


def owner_of(path: str) -> str:
    """Return who owns a file or folder, as far as that can be told."""
    try:
        number = os.lstat(path).st_uid
    except OSError:
        return "another user"
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def denied(path: str) -> PackError:
    """Return the error that says whose a path is, where a permission is lacking."""
    owner = owner_of(path)
    what = os.path.dirname(path) if os.path.isfile(path) else path
    return PackError(
        f"{path!r}: Permission denied: a run of {owner} left it; ask {owner} to run the same "
        f"command, or `chmod -R g+rwX {shlex.quote(what)}`"
    )
