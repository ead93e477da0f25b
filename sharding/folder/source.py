"""A folder as a source: list its files; read small ones whole, by the batch, ahead if slow to open.

See `places.Source`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

from sharding import faults
from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.errors import InputError, PackError, naming
from sharding.faults import Odd, quote
from sharding.messages import argument, explain
from sharding.parallel import in_order
from sharding.samples import Samples

if TYPE_CHECKING:
    from sharding.scan import Scan

Parents = tuple[str, ...]  # the real path of each

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process, not faults of a name
REMOTE = False
NOTHING = "{cure}, or make some with ./make_dummy_data.sh"  # what to do with an empty source
NAMES_AT_ONCE = 4_096
WHOLE_SIZE = 64 << 10  # bytes of a file that is read whole; larger ones are copied
AHEAD_SIZE = 512 << 10  # the same as WHOLE_SIZE, for files that are read ahead
SLOW_READ = 0.0005  # seconds a file; a local disk takes a hundredth of that to open one
SLOW_BATCHES = 3  # so many more slow batches than fast ones, and files are read ahead
READ_THREADS, AHEAD_FILES, FEW_FILES = 16, 96, 4  # 96 files ahead, 4 at a time: 48 MB at most
BATCH_FILES = 32  # read at a time where nothing is read ahead


class LargeFile(io.FileIO):
    """An open file that is copied in pieces, of the size that it had when it was opened."""

    def __init__(self, fd: int, path: str, size: int, mtime_ns: int) -> None:
        super().__init__(fd)
        self.path = path
        self.size = size
        self.mtime_ns = mtime_ns

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the content, piece by piece in the buffer, and close the file.

        Raises:
            PackError: it was changed meanwhile.
        """
        left = self.size
        with naming(self.path), self:
            while (count := self.readinto(buffer)) and count <= left:
                left -= count
                yield buffer[:count]
            touched = os.fstat(self.fileno()).st_mtime_ns != self.mtime_ns
        if left or count or touched:
            raise PackError(f"{self.path!r} {CHANGED}")


def list_files(scan: Scan) -> None:
    """List all files below a source."""
    walk = _Walk(scan)
    while walk.left:
        walk.list_folder(*walk.left.pop())
    for prefix, names in walk.vanished.items():
        for name in _still_listed(_folder(scan, prefix), names):
            scan.add_odd(names[name])


def _folder(scan: Scan, prefix: str) -> str:
    """Return the path of the folder at "" or "cats/"."""
    return os.path.join(scan.source, prefix[:-1]) if prefix else scan.source


class _Walk:
    """What is left of a source to list."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.left: list[tuple[str, bool, Parents]] = [("", True, ())]
        self.vanished: dict[str, dict[str, Odd]] = defaultdict(dict)  # folders, by their parent

    def list_folder(self, prefix: str, linked: bool, above: Parents) -> None:
        """List the folder at `prefix`, "" or "cats/"; add those within it to what is left.

        Links alone make circles, and paths alone tell: on some mounts inode numbers change.
        """
        folder = _folder(self.scan, prefix)
        parent, _, name = prefix[:-1].rpartition("/")
        real = os.path.realpath(folder) if linked else os.path.join(above[-1], name)
        if real in above:
            self.scan.fault(faults.CIRCLE, prefix[:-1])
            return
        try:
            entries = os.scandir(folder)
        except OSError as error:
            if not prefix or error.errno in SHORTAGES:
                raise _cannot_list(error) from None
            odd = _odd(prefix[:-1], error)
            if isinstance(error, FileNotFoundError) and _is_gone(folder):
                self.vanished[f"{parent}/" if parent else ""][name] = odd
            else:
                self.scan.add_odd(odd)
            return
        try:
            with entries:
                self.list_entries(prefix, entries, (*above, real))
        except OSError as error:
            if error.filename == folder:
                raise _cannot_list(error) from None
            raise  # the report cannot be written

    def list_entries(
        self, prefix: str, entries: Iterable[os.DirEntry[str]], parents: Parents
    ) -> None:
        """Note all names of a folder."""
        folder, names = self.scan.folder(prefix), []
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
                    odd = _odd(prefix + name, found)
                    if isinstance(found, FileNotFoundError) and _is_gone(entry.path):
                        vanished[name] = odd
                    else:
                        folder.add_odd(name, odd)
                    continue
                if stat.S_ISDIR(found):
                    self.left.append((f"{prefix}{name}/", entry.is_symlink(), parents))
                    continue
                if not stat.S_ISREG(found):
                    folder.add_odd(name, _odd(prefix + name))
                    continue
            names.append(name)
            if len(names) == NAMES_AT_ONCE:
                folder.add(names)
                names.clear()
        folder.add(names)
        for name in _still_listed(_folder(self.scan, prefix), vanished):
            folder.add_odd(name, vanished[name])
        folder.close(functools.partial(_may_read, self.scan.source))


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


@contextlib.contextmanager
def open_file(source: str, path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open one file, of any size; give the stream and its size."""
    with open(os.path.join(source, path), "rb") as stream:
        yield stream, os.fstat(stream.fileno()).st_size


def stamp_of(source: str, samples: Samples) -> str:
    """Return the stamp of samples as they are now; reading them gives the same if none changed."""
    seen = new_stamp()
    for path in samples.files():
        status = os.stat(os.path.join(source, path))
        seen.update(STAMP % (status.st_size, status.st_mtime_ns))
    return seen.hexdigest()


def read_batches(source: str, samples: Samples) -> Generator[Batch, None, None]:
    """Yield all samples in order, a batch at a time; read ahead once files open slowly.

    Many reads at a time hide the latency of NFS, Lustre or a cloud disk; on a fast disk, threads
    cost two to three times what they save.

    Raises:
        PackError: a file is no longer a regular file, or was changed while it was read.
        OSError: a file cannot be read; it names the file.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield from _read_batches(source_fd, samples)
    except OSError as error:
        if error.filename:  # a path below the source
            error.filename = os.path.join(source, error.filename)
        raise
    finally:
        os.close(source_fd)


def _read_batches(source_fd: int, samples: Samples) -> Iterator[Batch]:
    """Yield what `read_batch` gives for these samples, a few at a time."""
    done = slow = 0
    count = few = files = 1  # at first few, so that a slow disk is found out soon
    while slow < SLOW_BATCHES and done < len(samples):
        some = samples[done : done + count]
        done += count
        files = len(some[0].extensions)
        few = max(1, FEW_FILES // files)
        start = time.perf_counter()
        batch = read_batch(source_fd, WHOLE_SIZE, some)
        is_slow = time.perf_counter() - start > SLOW_READ * len(batch.names)
        slow = max(0, slow + (1 if is_slow else -1))
        count = few if is_slow else max(1, BATCH_FILES // files)
        yield batch
    batches = (samples[begin : begin + few] for begin in range(done, len(samples), few))
    read = functools.partial(read_batch, source_fd, AHEAD_SIZE)
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        yield from in_order(pool, read, batches, max(2, AHEAD_FILES // (few * files)))
    finally:
        pool.shutdown(cancel_futures=True)


def read_batch(source_fd: int, whole_size: int, samples: Samples) -> Batch:
    """Read the files of a few samples; those above `whole_size` bytes are left open instead.

    One function for many files: for small ones, a call for each is a good part of the time.
    """
    batch = Batch(len(samples), samples.members(), [], [])
    for path in samples.files():
        # O_NONBLOCK: a FIFO that took the file's place must not block the run.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=source_fd)
        try:
            status = os.fstat(fd)
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise PackError(f"{path!r} {CHANGED}")
            if size > whole_size:
                batch.contents.append(LargeFile(os.dup(fd), path, size, status.st_mtime_ns))
            else:
                data = os.read(fd, size + 1)
                if len(data) != size:
                    raise PackError(f"{path!r} {CHANGED}")
                batch.contents.append(data)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)
        batch.stamps.extend((size, status.st_mtime_ns))
    return batch
