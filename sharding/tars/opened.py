"""Archives that are read as they were listed: whole pieces of them, or a member as a stream."""

from __future__ import annotations

import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from sharding.batch import CHANGED
from sharding.errors import PackError
from sharding.places import dataset_at
from sharding.samples import Origin

OPEN = 64  # archives that are open at a time
READ_SIZE = 1 << 20  # bytes read at a time of a large member


def _version(origin: Origin) -> Any:
    """Return the version of an archive as `open_shard` gives it."""
    version = json.loads(origin.version)
    return tuple(version) if isinstance(version, list) else version


@contextlib.contextmanager
def open_archive(origin: Origin, buffering: int) -> Iterator[BinaryIO]:
    """Open an archive, as it was listed."""
    with dataset_at(origin.path).open_shard(origin.path, buffering) as (stream, size, version):
        if size != origin.size or version != _version(origin):
            raise PackError(f"{origin.path!r} {CHANGED}")
        yield stream


class Opened:
    """Archives that are open, those that were used last; each is still as it was listed."""

    def __init__(self, origins: Sequence[Origin]) -> None:
        self.origins = origins
        self.streams: OrderedDict[int, tuple[Any, BinaryIO]] = OrderedDict()

    def read(self, archive: int, offset: int, size: int) -> bytes:
        """Return a part of an archive."""
        try:
            _, stream = self.streams[archive]
            self.streams.move_to_end(archive)
        except KeyError:
            if len(self.streams) == OPEN:
                self.streams.popitem(last=False)[1][0].__exit__(None, None, None)
            context = open_archive(self.origins[archive], 0)
            stream = context.__enter__()
            self.streams[archive] = context, stream
        stream.seek(offset)
        data = stream.read(size)
        while len(data) < size and (more := stream.read(size - len(data))):
            data += more  # without a buffer, a read may be short
        return data

    def close(self) -> None:
        """Close them.

        Raises:
            PackError: one was changed meanwhile.
        """
        with contextlib.ExitStack() as stack:
            for context, _ in self.streams.values():
                stack.push(context)


def read_range(origins: Sequence[Origin], archive: int, offset: int, size: int) -> bytes:
    """Return a part of an archive, in any thread."""
    origin = origins[archive]
    return dataset_at(origin.path).read_range(origin.path, offset, size, _version(origin))


class LargeMember:
    """A member that is copied in pieces."""

    def __init__(self, origin: Origin, offset: int, size: int) -> None:
        self.origin = origin
        self.offset = offset
        self.size = size

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the content, piece by piece in the buffer."""
        with open_archive(self.origin, READ_SIZE) as stream:
            stream.seek(self.offset)
            part = Part(stream, self.size)
            while size := part.readinto(buffer):
                yield buffer[:size]
        if part.left:
            raise PackError(f"{self.origin.path!r} {CHANGED}")


class Part(io.RawIOBase):
    """The next bytes of a stream, as a stream of their own."""

    def __init__(self, stream: Any, size: int) -> None:
        super().__init__()
        self.stream = stream
        self.left = size

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes."""
        size = int(self.stream.readinto(memoryview(buffer)[: self.left]))
        self.left -= size
        return size
