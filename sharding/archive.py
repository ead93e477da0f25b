"""The tar format alone, in both directions: `FastTarWriter` and `read_members`.

The format is POSIX ustar, with a pax header where a name or a size does not fit
(https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html, "ustar Interchange Format").
Knows nothing of sources, samples' files or shards.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

BLOCK = tarfile.BLOCKSIZE
WRITE_SIZE = 512 << 10  # bytes gathered for one write
SEND_SIZE = 16 << 20  # bytes sent to the disk at a time
WINDOW_SIZE = 256 << 10  # bytes read at a time where all are read; a processor's cache holds them
SCAN_SIZE = 4 << 10  # the same where headers alone are read
COPY_SIZE = 1 << 20  # bytes of a large file that are copied at a time
PAX_SIZE = 8 << 30  # bytes from which a size does not fit the header's eleven octal digits
MAX_EXTENDED = 8 << 10  # bytes of an extended header; names of files have 4 KB at most

PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # these say more about the next member
# How readers recognise gzip, bzip2, xz, lzma and zstd (getcomptype of Python's tarfile).
COMPRESSED = re.compile(
    rb"\x1f\x8b\x08|BZh.1AY&SY|\xfd7zXZ|\x5d\0\0\x80|\x28\xb5\x2f\xfd", re.DOTALL
)


class Damaged(Exception):
    """What is read is not one whole, plain tar archive of plain files."""


class Pieces(Protocol):
    """A content that is too large to hold, of a size that is known."""

    size: int

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the content, piece by piece in the buffer."""


# ---------------------------------------------------------------- headers


def make_header(name: str, size: int) -> bytes:
    """Return the header, of 512 bytes or more, that tarfile makes for a member."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "bigdata", "bigdata"
    return info.tobuf()


# Nearly all headers differ in name (bytes 0 to 99), size (124 to 134) and checksum (148 to 155)
# alone, so one that tarfile made is the template for them.
_TEMPLATE = make_header("", 0)
_BEFORE_SIZE, _AFTER_SIZE, _REST = _TEMPLATE[100:124], _TEMPLATE[135:148], _TEMPLATE[156:]
_CHECKSUM = sum(_BEFORE_SIZE + _AFTER_SIZE + b" " * 8 + _REST)  # it counts itself as spaces
_ZEROS = [bytes(length) for length in range(BLOCK)]


@functools.lru_cache(maxsize=4_096)
def _of_size(size: int) -> tuple[bytes, int, bytes]:
    """Return what a size settles: the header behind the name, its checksum, and the padding.

    The checksum lacks the name's, and is one too low: Adler-32 begins to count at one.
    """
    digits = b"%011o" % size
    middle = _BEFORE_SIZE + digits + _AFTER_SIZE
    return middle, _CHECKSUM + sum(digits) - 1, _ZEROS[-size % BLOCK]


@functools.lru_cache(maxsize=32_768)
def _of_checksum(checksum: int) -> bytes:
    """Return the last part of a header, from the checksum on."""
    return b"%06o\0 %b" % (checksum, _REST)


def _name_checksum(name: bytes) -> int:
    """Return one more than the sum of a name's bytes: the lower half of its Adler-32."""
    return zlib.adler32(name) & 0xFFFF  # of at most 100 bytes, so below the modulus 65,521


# ---------------------------------------------------------------- writing


class FastTarWriter:
    """A drop-in for `wds.TarWriter(stream, encoder=False, mtime=0)`: same bytes, in less time.

    Besides bytes, `write` takes contents with a size that come in pieces.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.parts: list[bytes] = []  # what is to be written next
        self.pending = 0  # bytes in parts, about
        self.buffer = memoryview(b"")  # for large contents
        self.offset = 0  # bytes written
        self.sent = 0  # bytes of them on their way to the disk

    def write(self, sample: Mapping[str, Any]) -> int:
        """Write a sample, and return the bytes of its contents.

        Args:
            sample: {"__key__": key, field: bytes or `Pieces`, ...}; other names that begin with
                an underscore are left out.

        Raises:
            ValueError: it has no key.
            TypeError: a field has neither bytes nor pieces.
        """
        if "__key__" not in sample:
            raise ValueError("a sample must have a __key__")
        names, contents = [], []
        for field in sorted(sample):
            if field[0] == "_":
                continue
            content = sample[field]
            if isinstance(content, (bytearray, memoryview)):
                content = bytes(content)  # whose owner may change it before it is written
            elif not isinstance(content, bytes) and not hasattr(content, "pieces"):
                raise TypeError(f"field {field!r} is {type(content).__name__}; encode it to bytes")
            names.append(f"{sample['__key__']}.{field}")
            contents.append(content)
        self.write_members(names, contents)
        return sum(len(c) if isinstance(c, bytes) else c.size for c in contents)

    def write_members(self, names: Sequence[str], contents: Sequence[bytes | Pieces]) -> None:
        """Write members one after the other.

        This is the hot path: for small files, what Python does here takes longer than to write
        them. So a member is five entries of a list, which are joined once for many members.
        """
        parts = self.parts
        for name, content in zip(names, contents, strict=True):
            if not isinstance(content, bytes):
                self._write_pieces(name, content)
                continue
            size = len(content)
            middle, checksum, padding = _of_size(size)
            if len(name) <= 100 and size < PAX_SIZE and name.isascii():
                encoded = name.encode()
                checksum += _name_checksum(encoded)
                parts += (
                    encoded.ljust(100, b"\0"), middle, _of_checksum(checksum), content, padding,
                )  # fmt: skip
            else:
                parts += (make_header(name, size), content, padding)
            self.pending += size + 1_024  # about what header and padding take
            if self.pending > WRITE_SIZE:
                self.flush()

    def _write_pieces(self, name: str, content: Pieces) -> None:
        """Write a member whose content is too large to gather."""
        self.parts.append(make_header(name, content.size))
        self.flush()
        self.buffer = self.buffer or memoryview(bytearray(COPY_SIZE))
        for piece in content.pieces(self.buffer):
            self._put(piece)
        self.parts.append(_ZEROS[-content.size % BLOCK])

    def flush(self) -> None:
        """Write what has been gathered, and start it on its way to the disk."""
        self._put(b"".join(self.parts))
        self.parts.clear()
        self.pending = 0

    def _put(self, data: bytes | memoryview) -> None:
        """Write all of these bytes, and send what has gathered on its way to the disk."""
        self.offset += len(data)
        left = memoryview(data)
        while left:
            left = left[self.stream.write(left) :]
        if self.offset - self.sent > SEND_SIZE and isinstance(self.stream, io.FileIO):
            # On Linux this starts to write the pages without waiting, so that fsync finds few.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.stream.fileno(), self.sent, 0, os.POSIX_FADV_DONTNEED)
            self.sent = self.offset

    def close(self) -> None:
        """Finish the archive: two blocks of zeros, then zeros up to a whole record of 10,240."""
        self.flush()
        self._put(bytes(2 * BLOCK + -(self.offset + 2 * BLOCK) % tarfile.RECORDSIZE))

    def __enter__(self) -> FastTarWriter:
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        """Finish the archive, or, after an exception, make sure that it looks cut short.

        Readers take an archive that ends behind a member for a whole one. Nothing that goes wrong
        here may take the place of the exception that is passing.
        """
        if exc_type is None:
            self.close()
            return
        with contextlib.suppress(Exception):
            self.stream.write(make_header("unfinished", BLOCK))  # whose content never comes


# ---------------------------------------------------------------- reading


class Window:
    """A stream that is read forwards, through a buffer out of which small contents are cut.

    It reads much at a time only while nearly all of it is wanted.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Take a stream that can seek."""
        self.stream = stream
        self.place = 0  # from where the next bytes are read
        self.data, self.begin = b"", 0  # what was read last, and from where
        self.step = SCAN_SIZE // 2  # bytes of that, at least; the first read doubles it

    def tell(self) -> int:
        """Return the place from which is read."""
        return self.place

    def seek(self, place: int) -> int:
        """Read from there."""
        self.place = place
        return place

    def read(self, size: int) -> bytes:
        """Return so many bytes, or what is left."""
        begin = self.place - self.begin
        end = begin + size
        if begin < 0 or end > len(self.data):
            return self._read_on(size)
        self.place += size
        return self.data[begin:end]

    def _read_on(self, size: int) -> bytes:
        """Return the same, of which the buffer has no more than the first part."""
        begin, end = self.place - self.begin, self.begin + len(self.data)
        head = self.data[begin:] if begin >= 0 else b""
        skipped = self.place + len(head) - end
        self.step = min(2 * self.step, WINDOW_SIZE) if 0 <= skipped < 4 * self.step else SCAN_SIZE
        self.begin = self.stream.seek(end + skipped)
        left = size - len(head)
        data = self.stream.read(max(left, self.step))
        self.data = data if left < WINDOW_SIZE else b""  # a large one is not held
        if not self.data:
            self.begin += len(data)
        content = head + data[:left]
        self.place += len(content)
        return content


def read_members(stream: BinaryIO | Window, end: int) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of each member, with the stream at its content.

    Understands what tar writers make of plain files: ustar and pax headers, and GNU's long names.
    All else is refused, where readers would guess, skip it, or stop early in silence.

    Args:
        stream: the archive, which can seek; the caller may read any part of a content.
        end: its size in bytes.

    Raises:
        Damaged: it is not one whole, plain archive.
    """
    window = stream if isinstance(stream, Window) else Window(stream)
    if COMPRESSED.match(window.read(BLOCK)):
        raise Damaged("compressed, or readers take it for that")
    offset, extended = 0, b""
    while True:  # as `write_members`, a hot path
        window.place = offset
        padding = -offset % BLOCK
        data, begin = window.data, offset - window.begin
        if begin < 0 or begin + padding + BLOCK > len(data):
            data, begin = window.read(padding + BLOCK), 0
        usual = data.startswith(_ZEROS[padding], begin)
        if not usual and data[begin : begin + padding].strip(b"\0"):
            raise Damaged(f"bytes other than zero behind the member that ends at {offset:,}")
        offset += padding
        header = data[begin + padding : begin + padding + BLOCK]
        if len(header) < BLOCK:
            raise Damaged("cut short: the end-of-archive blocks are missing")
        known = None if extended else _read_usual(header)
        if not known and not header[0] and not header.strip(b"\0"):
            break
        kind, name, size = known or _read_header(header, extended, offset)
        if not 0 <= size <= end - offset - BLOCK:
            raise Damaged(f"cut short: the member at byte {offset:,} is not whole")
        if kind in EXTENDED:
            if extended or size > MAX_EXTENDED:
                raise Damaged(f"extended header of {size:,} bytes, or two in a row")
            window.place = offset + BLOCK
            extended = header + window.read(size + -size % BLOCK)
        else:
            extended = b""
            if kind in PLAIN:
                window.place = offset + BLOCK
                if window is not stream:
                    stream.seek(window.place)
                yield name, size
        offset += BLOCK + size
    window.place = offset
    if end - offset < 2 * BLOCK or extended:
        raise Damaged("cut short: the second end-of-archive block, or a member, is missing")
    while rest := window.read(1 << 20):
        if rest.strip(b"\0"):
            raise Damaged("trailing garbage behind the end of the archive")


_KINDS = {  # that are refused
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.XGLTYPE: "a global header",
}

_MIDDLE = re.compile(re.escape(_BEFORE_SIZE) + rb"([0-7]{11})" + re.escape(_AFTER_SIZE))
_SPACES = sum(b" " * 8 + _REST) - 1  # with a header's first part, whose Adler-32 begins at one
_SLASH = ord("/")


@functools.lru_cache(maxsize=4_096)
def _of_middle(middle: bytes) -> int | None:
    """Return the size that a header gives between name and checksum; None if it is not usual."""
    match = _MIDDLE.fullmatch(middle)
    return int(match[1], 8) if match else None


def _read_usual(header: bytes) -> tuple[bytes, str, int] | None:
    """Return what `_read_header` does of a header such as this module writes; None of others."""
    if header[148:] != _of_checksum(_SPACES + (zlib.adler32(header[:148]) & 0xFFFF)):
        return None
    size, name = _of_middle(header[100:148]), header[:100].rstrip(b"\0")
    if size is None or not name or b"\0" in name or name[-1] == _SLASH:
        return None
    return b"0", name.decode("utf-8", "surrogateescape"), size


def _read_header(header: bytes, extended: bytes, offset: int) -> tuple[bytes, str, int]:
    """Return type, name and size of a member, as tarfile, and so webdataset, reads them.

    Args:
        header: its 512 bytes.
        extended: the pax header or GNU long name in front of it, whole, or nothing.
        offset: where in the archive it is, for messages.
    """
    where = f"at byte {offset:,}"
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if extended and b"GNU.sparse" not in extended:
            with tarfile.open(fileobj=io.BytesIO(extended + header), mode="r:") as tar:
                info = tar.next() or info
    except MemoryError:
        raise
    except Exception as error:  # tarfile raises nearly anything on hostile headers
        raise Damaged(f"no tar header {where}: damaged, compressed or no tar at all") from error
    kind, size = info.type, info.size
    if kind not in (*PLAIN, *EXTENDED, tarfile.DIRTYPE) or b"GNU.sparse" in extended:
        kind = tarfile.GNUTYPE_SPARSE if b"GNU.sparse" in extended else kind
        what = _KINDS.get(kind, "of type " + ascii(kind)[2:-1])
        raise Damaged(f"member {info.name!r} is {what}, not a regular file, {where}")
    if kind == tarfile.DIRTYPE and (size or header[156:157] != kind):
        raise Damaged(f"a folder's name on a file, or a folder with content, {where}")
    return kind, info.name, size
