"""A folder as a source: read small files whole, by the batch, ahead where that is faster.

See `places.Source`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.errors import PackError, naming
from sharding.folder.walk import list_files as list_files
from sharding.parallel import WIDTHS, Pace, in_order
from sharding.samples import Sample, Samples

NOTHING = "{cure}, or make some with ./make_dummy_data.sh"  # what to do with an empty source
WHOLE_SIZE = 64 << 10  # bytes of a file that is read whole; larger ones are copied
AHEAD_SIZE = 512 << 10  # the same as WHOLE_SIZE, for files that are read ahead
AHEAD_FILES = 96  # that are read ahead: 48 MB at most
BATCH_FILES = 32  # of a batch where nothing is read ahead


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


@contextlib.contextmanager
def open_file(source: str, sample: Sample, path: str) -> Iterator[tuple[BinaryIO, int]]:  # noqa: ARG001
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
    """Yield all samples in order, a batch at a time; read ahead where that is faster.

    Many reads at a time hide the latency of NFS, Lustre or a cloud disk, and of any disk whose
    files are not in memory: see `Pace`.

    Raises:
        PackError: a file is no longer a regular file, or was changed while it was read.
        OSError: a file cannot be read; it names the file.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    pool = ThreadPoolExecutor(max(WIDTHS))
    try:
        yield from _read_batches(source_fd, samples, _pace(source, threading.get_ident()), pool)
    except OSError as error:
        if error.filename:  # a path below the source
            error.filename = os.path.join(source, error.filename)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(source_fd)


@functools.lru_cache(maxsize=8)
def _pace(_source: str, _thread: int) -> Pace:
    """Return what a thread knows of a source: its next shard begins as the last one ended."""
    return Pace()


def _read_batches(
    source_fd: int, samples: Samples, pace: Pace, pool: ThreadPoolExecutor
) -> Iterator[Batch]:
    """Yield what `read_batch` gives for these samples, a few at a time.

    What the pace is told includes the time of whoever takes the batches: threads disturb it.
    """
    done = 0
    while done < len(samples):
        width, number = pace.stretch()
        files = len(samples[done].extensions)
        some = samples[done : done + max(1, number // files)]
        done += len(some)
        began, busy = time.perf_counter(), time.thread_time()
        tasks = width * 3 // 2
        few = max(1, (BATCH_FILES if width == 1 else AHEAD_FILES // tasks) // files)
        tasks = min(tasks, max(2, AHEAD_FILES // (few * files)))
        batches = (some[begin : begin + few] for begin in range(0, len(some), few))
        read = functools.partial(read_batch, source_fd, width > 1)
        yield from map(read, batches) if width == 1 else in_order(pool, read, batches, tasks)
        busy = time.thread_time() - busy
        pace.took(len(some) * files, time.perf_counter() - began, busy)


def read_batch(source_fd: int, ahead: bool, samples: Samples) -> Batch:
    """Read the files of a few samples; those that are not small are left open instead.

    One function for many files: for small ones, a call for each is a good part of the time. Ahead
    of their use, the disk is asked for all of them before the first is read.
    """
    batch = Batch(len(samples), samples.members(), [], [])
    whole_size, fds = AHEAD_SIZE if ahead else WHOLE_SIZE, list[int]()
    ask = ahead and hasattr(os, "posix_fadvise")
    paths = samples.files()
    path = ""
    try:
        for path in paths:
            # O_NONBLOCK: a FIFO that took the file's place must not block the run.
            fds.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=source_fd))
            if ask:
                os.posix_fadvise(fds[-1], 0, whole_size, os.POSIX_FADV_WILLNEED)
        for path, fd in zip(paths, fds, strict=True):
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
            batch.stamps.extend((size, status.st_mtime_ns))
    except OSError as error:
        error.filename = path
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return batch
