"""Objects as streams: `Ranges` reads one range by range, `Upload` writes one part by part."""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import obstore

from sharding.bucket.schemes import scheme_of
from sharding.bucket.store import connect, insist, quoted, saying, split
from sharding.errors import PackError
from sharding.shards import REPLACED

FIRST_RANGE, LARGEST_RANGE = 256 << 10, 8 << 20  # bytes that a request asks for
NEAR = 2 << 20  # bytes; to read on that far takes no longer than a new request
PART_SIZE, PARTS = 8 << 20, 4  # bytes of an upload that are sent at a time, and how many at once
MAX_PARTS = 10_000  # of an upload


class Ahead(NamedTuple):
    """The range that is fetched while the one before it is used."""

    begin: int
    end: int
    chunk: Future[memoryview]


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
        self.etag = quoted(etag)
        self.place = 0
        self.chunk, self.begin = memoryview(b""), 0  # what is here, and where it begins
        self.first = first  # bytes that are asked for at a place that follows no other
        self.length = first // 4  # of the last request
        self.next: Ahead | None = None
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
        end = self.begin + len(self.chunk)
        reads_on = 0 <= self.place - end < NEAR
        self.length = min(4 * self.length, LARGEST_RANGE) if reads_on else self.first
        ahead, self.next = self.next, None
        if ahead and ahead.begin <= self.place < ahead.end:  # read on, into what was fetched ahead
            self.begin, self.chunk = ahead.begin, ahead.chunk.result()
        else:  # read on, with nothing ahead yet; or a jump
            self.begin, self.chunk = self.place, self.fetch(self.place, self.length)
        if reads_on:  # whoever jumps may jump again
            self.fetch_ahead(self.begin + len(self.chunk))

    def fetch_ahead(self, begin: int) -> None:
        """Begin to fetch what follows the chunk, if anything does."""
        if begin < self.size:
            self.pool = self.pool or ThreadPoolExecutor(1)
            chunk = self.pool.submit(self.fetch, begin, self.length)
            self.next = Ahead(begin, min(begin + self.length, self.size), chunk)

    def fetch(self, begin: int, length: int) -> memoryview:
        """Return a range of the object, of the version that was opened."""
        end = min(begin + length, self.size)

        def get() -> memoryview:
            found = obstore.get(self.store, self.key, options={"range": (begin, end)})
            # The answer tells its version; whether a store heeds If-Match, and in which spelling,
            # does not matter.
            if self.etag and quoted(found.meta["e_tag"]) != self.etag:
                raise PackError(f"{self.url!r}: {REPLACED}")
            return memoryview(found.bytes())

        chunk = insist(self.url, get)
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

    The object is there once it is complete.
    """

    def __init__(self, url: str, attributes: dict[str, str]) -> None:
        super().__init__()
        self.url = url
        self.bucket, self.key = split(url)
        self.attributes = attributes  # which tell it from what others write there
        self.writer = obstore.open_writer(
            connect(self.bucket),
            self.key,
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

    def complete(self) -> Any:
        """Make the object appear, and return what the store says of it.

        Raises:
            PackError: what is there is not it.
        """
        lost = None
        try:
            with saying(self.url, also=OSError):
                self.writer.close()  # gives no etag
        except PackError as error:  # it may be there, and only the answer is lost
            lost = error
        try:
            with saying(self.url):
                store = connect(self.bucket, patient=not lost)
                found = obstore.get(store, self.key, options={"head": True})
        except PackError as error:
            raise lost or error from None
        given = {name: found.attributes.get(name) for name in self.attributes}
        if given == self.attributes and found.meta["size"] == self.size:
            return found.meta
        why = "another run has replaced it; run again with --resume"
        if None in given.values():
            what = f"the store drops metadata ({scheme_of(self.url).metadata})"
            why = f"another program has replaced it, or {what}"
        raise lost or PackError(f"{self.url!r}: {why}")
