"""A folder as a source: read small files whole, by the batch, ahead where they open slowly.

See `places.Source`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from sharding.batch import CHANGED, STAMP, Batch, new_stamp
from sharding.errors import PackError, naming
from sharding.folder.walk import list_files as list_files
from sharding.parallel import in_order
from sharding.samples import Sample, Samples

NOTHING = "{cure}, or make some with ./make_dummy_data.sh"  # what to do with an empty source
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
