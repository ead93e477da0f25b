"""Objects as streams: `Ranges` reads one range by range, `Upload` writes one part by part."""

from __future__ import annotations

import functools
import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import obstore

from sharding.errors import PackError
from sharding.shards import REPLACED
from sharding.store import connect, insist, saying, split

FIRST_RANGE, LARGEST_RANGE = 256 << 10, 8 << 20  # bytes that a request asks for
NEAR = 2 << 20  # bytes; to read on that far takes no longer than a new request
PART_SIZE, PARTS = 8 << 20, 4  # bytes of an upload that are sent at a time, and how many at once
MAX_PARTS = 10_000  # of an upload


class Ranges(io.RawIOBase):
    """An object as a stream to read; the next range is fetched while the present one is used.

    Ranges grow while they are read one after the other. All are of one version of the object.
    """

    def __init__(
        self,
        url: str,
        size: int | None = None,
        etag: str | None = None,
        first: int = FIRST_RANGE,
    ) -> None:
        super().__init__()
        self.url = url
        bucket, self.key = split(url)
        self.store = connect(bucket)
        if size is None:
            with saying(url):
                found = obstore.head(self.store, self.key)
            size, etag = found["size"], found["e_tag"]
        self.size = size
        self.etag = etag
        self.place = 0
        self.chunk, self.begin = memoryview(b""), 0  # what is here, and where it begins
        self.first = first  # bytes that are asked for at a place that follows no other
        self.length = first // 4  # of the last request
        self.next: tuple[int, Future[memoryview]] | None = None  # where it begins
        self.pool: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can seek."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place, at no cost."""
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes."""
        part = self.peek()[: len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)

    def peek(self) -> memoryview:
        """Return the next bytes, as many as are here; none at the end."""
        if not self.begin <= self.place < self.begin + len(self.chunk) and self.place < self.size:
            self.load()
        return self.chunk[self.place - self.begin :] if self.place < self.size else memoryview(b"")

    def load(self) -> None:
        """Make the chunk one that holds the present place."""
        onward = 0 <= self.place - (self.begin + len(self.chunk)) < NEAR
        self.length = min(4 * self.length, LARGEST_RANGE) if onward else self.first
        ahead, self.next = self.next, None
        begin, chunk = self.place, memoryview(b"")
        if ahead and ahead[0] <= self.place:
            begin, chunk = ahead[0], ahead[1].result()
        if self.place >= begin + len(chunk):
            begin, chunk = self.place, self.fetch(self.place, self.length)
        self.begin, self.chunk = begin, chunk
        end = begin + len(chunk)
        if onward and end < self.size:
            self.pool = self.pool or ThreadPoolExecutor(1)
            self.next = end, self.pool.submit(self.fetch, end, self.length)

    def fetch(self, begin: int, length: int) -> memoryview:
        """Return a range of the object, of the version that was opened."""
        end = min(begin + length, self.size)
        options: Any = {"range": (begin, end)}
        if self.etag:
            options["if_match"] = self.etag
        get = functools.partial(obstore.get, self.store, self.key, options=options)
        chunk = memoryview(insist(self.url, lambda: get().bytes()))
        if len(chunk) != end - begin:
            raise PackError(f"{self.url!r}: {REPLACED}")
        return chunk

    def close(self) -> None:
        """Give up what is being fetched."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
        super().close()


class Upload(io.RawIOBase):
    """An object as a stream to write to, whose bytes are uploaded in parts.

    The object is there once `writer` is closed.
    """

    def __init__(self, url: str, attributes: dict[str, str]) -> None:
        super().__init__()
        self.url = url
        bucket, key = split(url)
        self.writer = obstore.open_writer(
            connect(bucket),
            key,
            buffer_size=PART_SIZE,
            max_concurrency=PARTS,
            attributes=attributes,
        )
        self.size = 0

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Pass on a copy of these bytes: obstore makes none, and the caller reuses its buffer."""
        self.size += len(data)
        if self.size > MAX_PARTS * PART_SIZE:
            raise PackError(f"{self.url!r}: larger than an upload can be; use more shards")
        with saying(self.url, also=OSError):
            self.writer.write(bytes(data))
        return len(data)
