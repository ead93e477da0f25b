"""List a folder: its names go to the scan in one order, whoever reads the folders.

Where folders open slowly, as on NFS or Lustre, threads read those that come next: see ahead.py.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sharding import faults
from sharding.errors import InputError
from sharding.faults import Odd, quote
from sharding.folder.ahead import Ahead, Folder, Parents, Part, Unopened
from sharding.messages import argument, explain

if TYPE_CHECKING:
    from sharding.scan import FolderScan, Scan

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process, not faults of a name
NAMES_AT_ONCE = 4_096
SLOW_FOLDERS = 3  # so many more that are waited for than not, and threads read ahead


_OPENED = Part([], [], [])


def list_files(scan: Scan) -> None:
    """List all files below a source."""
    walk = _Walk(scan)
    try:
        while walk.left:
            walk.list_folder(walk.left.pop())
    except BaseException:
        if walk.ahead:
            walk.ahead.stop()
        raise
    if walk.ahead:
        walk.ahead.stop()
        walk.ahead.join()  # a process with threads should not fork
    for prefix, names in walk.vanished.items():
        for name in _still_listed(_path(scan.source, prefix), names):
            scan.add_odd(names[name])


def _path(source: str, prefix: str) -> str:
    """Return the path of the folder at "" or "cats/"."""
    return os.path.join(source, prefix[:-1]) if prefix else source


class _Walk:
    """What is left of a source to list, the next folder last."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.left = [Folder("", True, (), ())]
        self.vanished: dict[str, dict[str, Odd]] = defaultdict(dict)  # folders, by their parent
        self.slow = 0  # folders that were waited for, less those that were not
        self.ahead: Ahead | None = None

    def list_folder(self, folder: Folder) -> None:
        """Hand what a folder holds to the scan; add the folders within it to what is left."""
        into: FolderScan | None = None
        for part in self.parts(folder):
            if isinstance(part, Unopened):
                if part.gone:
                    parent, _, name = folder.prefix[:-1].rpartition("/")
                    self.vanished[f"{parent}/" if parent else ""][name] = part.odd
                else:
                    self.scan.add_odd(part.odd)
                return
            into = into or self.scan.folder(folder.prefix)
            for name, odd in part.odd:
                into.add_odd(name, odd)
            if part.names:
                into.add(part.names)
            self.left += part.folders
        if into:
            into.close(functools.partial(_may_read, self.scan.source))

    def parts(self, folder: Folder) -> Iterator[Part | Unopened]:
        """Yield what `_read` does; find out whether folders should be read ahead."""
        if self.ahead:
            yield from self.ahead.parts(folder)
            return
        began, busy = time.perf_counter(), time.thread_time()
        parts = _read(self.scan.source, folder)
        opened = list(itertools.islice(parts, 2))
        busy = time.thread_time() - busy
        waited = time.perf_counter() - began > 2 * busy
        self.slow = max(0, self.slow + (1 if waited else -1))
        yield from opened
        yield from parts
        if self.slow >= SLOW_FOLDERS:
            self.ahead = Ahead(functools.partial(_read, self.scan.source), self.left)


def _read(source: str, folder: Folder) -> Iterator[Part | Unopened]:
    """Yield what a folder holds: first an empty part, once it is open.

    Links alone make circles, and paths alone tell: on some mounts inode numbers change.

    Raises:
        InputError: it cannot be listed to its end, and nobody knows what it would have named.
    """
    path, above, name = _path(source, folder.prefix), folder.above, folder.prefix[:-1]
    last = name.rpartition("/")[2]
    real = os.path.realpath(path) if folder.linked else os.path.join(above[-1], last)
    if real in above:
        yield Unopened(Odd(name, faults.CIRCLE, ""))
        return
    try:
        entries = os.scandir(path)
    except OSError as error:
        if not name or error.errno in SHORTAGES:
            raise _cannot_list(error) from None
        yield Unopened(_odd(name, error), isinstance(error, FileNotFoundError) and _is_gone(path))
        return
    yield _OPENED
    try:
        with entries:
            yield from _look(folder, path, entries, (*above, real))
    except OSError as error:
        raise _cannot_list(error) from None


def _look(
    folder: Folder, path: str, entries: Iterable[os.DirEntry[str]], parents: Parents
) -> Iterator[Part]:
    """Yield what the entries of a folder are."""
    prefix, number = folder.prefix, 0
    names, folders, odd = list[str](), list[Folder](), list[tuple[str, Odd]]()
    vanished: dict[str, Odd] = {}
    for entry in entries:  # this loop sees each file of a dataset
        name = entry.name
        if name[0] == ".":
            continue
        try:
            plain = entry.is_file(follow_symlinks=False)
        except OSError:  # where a listing tells no types, this looks at the file
            plain = False
        if not plain:
            found = _mode(entry.path)
            if isinstance(found, OSError):
                why = _odd(prefix + name, found)
                if isinstance(found, FileNotFoundError) and _is_gone(entry.path):
                    vanished[name] = why
                else:
                    odd.append((name, why))
                continue
            if stat.S_ISDIR(found):
                number -= 1  # the last folder is the next to be listed
                place = (*folder.place, number)
                folders.append(Folder(f"{prefix}{name}/", entry.is_symlink(), parents, place))
                continue
            if not stat.S_ISREG(found):
                odd.append((name, _odd(prefix + name)))
                continue
        names.append(name)
        if len(names) == NAMES_AT_ONCE:
            yield Part(names, folders, odd)
            names, folders, odd = [], [], []
    yield Part(names, folders, odd)
    if vanished:
        there = _still_listed(path, vanished)
        yield Part([], [], [(name, vanished[name]) for name in there])


def _cannot_list(error: OSError) -> InputError:
    """Return the error that the source cannot be listed, or not to its end."""
    return InputError(f"{argument('source')} cannot be listed: {explain(error)}")


def _odd(name: str, error: OSError | None = None) -> Odd:
    """Return why a name is no file to pack."""
    if error is None:
        return Odd(name, faults.INCOMPLETE, "is not a regular file")
    if isinstance(error, PermissionError):
        return Odd(name, faults.DENIED, "")
    try:
        what = f"is a link to {quote(os.readlink(error.filename))}"
    except OSError:
        what = "is unreachable"
    return Odd(name, faults.UNREACHABLE, f"{what}: {error.strerror}")


def _mode(path: str) -> int | OSError:
    """Return the mode of what a path leads to, or why that cannot be looked at."""
    try:
        try:
            return os.stat(path).st_mode
        except FileNotFoundError:
            os.lstat(path)
            return os.stat(path).st_mode  # it may have been replaced meanwhile
    except OSError as error:
        if error.errno in SHORTAGES:
            raise _cannot_list(error) from None
        return error


def _is_gone(path: str) -> bool:
    """Tell whether a name that was listed is no longer there: it is no link that leads nowhere."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _still_listed(folder: str, names: Iterable[str]) -> list[str]:
    """Return those names, of which nothing was there, that their folder still lists.

    So do some network mounts for names that they cannot spell: such a name has not gone.
    """
    if not names:
        return []
    try:
        there = set(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _cannot_list(error) from None
    return [name for name in names if name in there]


def _may_read(source: str, paths: Iterable[str]) -> bool:
    """Tell whether these files may be read."""
    return all(os.access(os.path.join(source, path), os.R_OK) for path in paths)
