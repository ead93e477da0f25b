"""Pack image + text pairs into WebDataset shards: the core that every driver calls.

Sorted samples are dealt like cards: sample i belongs to shard i % total_shards.
One call of `create_webdataset` packs one shard, so any number of processes, on any
number of machines, can pack the shards of one dataset side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tarfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import compress, cycle, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

INSTALL = "is not installed; run: pip install -r requirements.txt"
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported
try:
    import webdataset as wds
    from webdataset.tariterators import base_plus_ext
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {missing.name} {INSTALL}")

SHARD_PATTERN = re.compile(r"shard-([0-9]{6})\.tar")
PARTIAL_PATTERN = re.compile(r"\.shard-([0-9]{6})-[0-9a-f]{8}")  # see create_webdataset
MAX_SHARDS = 1_000_000
NUM_WORKERS = 4  # of a driver, unless told otherwise
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python marks the bytes of a name that is not UTF-8
Progress = Callable[[int], object]  # is told how many more samples are done

CURES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file grew beyond the limit (ulimit -f): use more shards",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose an --output that can be written",
    errno.EPIPE: "nobody reads the output any more",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Refused(Exception):
    """Bad input or usage: nothing was written; one line for the user, exit code 2."""


class Failed(Exception):
    """Work that failed: one line for the user, exit code 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line and whose flags are never guessed."""

    def __init__(self, usage: str, description: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__("", usage, description, examples, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (see --help)")


def number_from(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number in this range."""
    wanted = f"a number from {least}" + (f" to {most:,}" if most < sys.maxsize else "")

    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return int(text)

    return number


def explain(error: BaseException) -> str:
    """Say in one line what failed and, where it is known, the cure."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} {INSTALL}"
    if isinstance(error, OSError) and error.strerror:
        cure = CURES.get(error.errno or 0)
        name = "" if error.filename is None else f"{error.filename!r}: "
        return f"{name}{error.strerror}" + (f"; {cure}" if cure else "")
    return " ".join(str(error).split())[:1_000] or type(error).__name__


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Give an OSError the name of its file: one of reading or writing an open file has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def one_line_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Turn what a user can cause into one line on stderr and the exit code that goes with it."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        for name in ("stdout", "stderr"):
            # None: closed by the shell
            stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
            setattr(sys, name, stream)
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from the imports of a script
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return 130
        except (Refused, Failed, OSError, ModuleNotFoundError) as error:
            if isinstance(error, BrokenPipeError):  # so that the last flush does not fail, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"{Path(sys.argv[0]).name}: error: {explain(error)}", file=sys.stderr)
            return 2 if isinstance(error, Refused) else 1

    return wrapper


# ---------------------------------------------------------------- from files to samples


class Listing(NamedTuple):
    """What a source holds.

    A sample is written as its key. Only where an extension is not spelled in lower case
    do the spellings of all its fields follow, each after a NUL: "cats/7\\0JPG\\0txt".
    NUL sorts before every character of a name, so samples sort by key.
    """

    samples: list[str]
    skipped: int  # incomplete samples that --skip-incomplete dropped
    ignored: int  # names that are no part of a sample


def sample_key(sample: str) -> str:
    """Return the key of a sample of a Listing."""
    return sample.partition("\0")[0]


def sample_files(sample: str, fields: Sequence[str]) -> list[str]:
    """Return the paths below source of a sample's files, in the order of `fields`."""
    key, *spelled = sample.split("\0")
    return [f"{key}.{extension}" for extension in spelled or fields]


INCOMPLETE = "samples that lack a field; add it, give other --fields, or --skip-incomplete"
DUPLICATE = "files whose key and field another has, in upper or lower case; rename them"
DOTTED = "names with a dot before the field, which readers take for another key; rename them"
RESERVED = "names that begin with __, which readers drop; rename them"
BAD_NAME = "names that are not UTF-8, or that readers cannot split; rename them"


def parse_fields(text: str) -> tuple[str, ...]:
    """Return the fields of 'jpg,txt' in the order in which a shard holds them."""
    fields = text.lower().split(",")
    for field in fields:
        if not re.fullmatch(r"[^_./\s][^/\s]*", field) or NOT_UTF8.search(field):
            raise Refused(f"--fields {text!r}: {field!r} cannot be a field; write e.g. jpg,txt")
    if len(set(fields)) < len(fields):
        raise Refused(f"--fields {text!r} names a field twice; name each once")
    return tuple(sorted(fields))


def list_samples(
    source: str | os.PathLike[str],
    fields: Sequence[str] = ("jpg", "txt"),
    skip_incomplete: bool = False,
    shuffle: int | None = None,
) -> Listing:
    """List a source, check all of it, and put its samples into the order of the shards.

    Args:
        source: the folder, listed recursively, without hidden names and linked folders.
        fields: the required fields, sorted, as `parse_fields` returns them.
        skip_incomplete: drop and count samples that lack a field instead of refusing them.
        shuffle: order samples by a hash of this seed and the key, instead of by key.

    Raises:
        Refused: the source cannot be read, or readers would lose or merge some of its samples.
    """
    if sys.getfilesystemencoding() != "utf-8":
        raise Refused("file names must be read as UTF-8 to give the same keys; set PYTHONUTF8=1")
    scan = Scan(source, fields)
    try:
        while scan.folders:
            scan.list_folder(scan.folders.pop())
    except OSError as error:
        raise Refused(f"--source cannot be listed: {explain(error)}") from None
    samples, faults = scan.samples, scan.faults
    skipped = len(faults.pop(INCOMPLETE, ())) if skip_incomplete else 0
    for problem, names in faults.items():
        what, _, cure = problem.partition("; ")
        first = ", ".join(repr(name[-100:]) for name in sorted(names)[:5])
        raise Refused(f"--source {os.fspath(source)!r} has {what}: {len(names)} ({first}); {cure}")
    if not samples:
        cure = "put pairs such as " + " + ".join(f"sample-0.{field}" for field in fields)
        cure += " there, or give other --fields"
        if not skipped and not scan.ignored:
            cure += ", or make some with ./make_dummy_data.sh"
        raise Refused(f"--source {os.fspath(source)!r} has no complete sample: {cure}")
    samples.sort(key=None if shuffle is None else functools.partial(shuffle_rank, shuffle))
    return Listing(samples, skipped, scan.ignored)


class Scan:
    """What has been found so far in a source, and what is still to be listed."""

    def __init__(self, source: str | os.PathLike[str], fields: Sequence[str]) -> None:
        self.source = source
        self.bits = {field: 1 << number for number, field in enumerate(fields)}
        self.endings = tuple("." + field for field in fields)
        self.folders = [""]  # to be listed, as "" or "cats/" below source
        self.samples: list[str] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.ignored = 0

    def list_folder(self, prefix: str) -> None:
        """List the folder at `prefix`; note the folders within it for later."""
        bits = self.bits  # looked up once: this loop sees each file of a dataset
        held: dict[str, int] = {}  # name up to the first dot -> the fields that are there, as bits
        spelled: dict[str, dict[str, str]] = defaultdict(dict)
        folder = os.path.join(self.source, prefix[:-1]) if prefix else self.source
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                regular = entry.is_file(follow_symlinks=False)
                if not regular:
                    if entry.is_dir(follow_symlinks=False):
                        self.folders.append(f"{prefix}{name}/")
                        continue
                    regular = os.path.isfile(entry.path)  # a link to one?
                stem, _, extension = name.partition(".")
                bit = bits.get(extension) or bits.get(extension.lower())
                if bit is None:
                    self.ignored += 1
                    if name.lower().endswith(self.endings):
                        self.faults[DOTTED].append(prefix + name)
                    continue
                if regular and extension not in bits:
                    spelled[stem][extension.lower()] = extension
                before = held.get(stem, 0)
                if before & bit:
                    self.faults[DUPLICATE].append(prefix + name)
                held[stem] = before | bit if regular else before
        self.add_samples(prefix, held, spelled)

    def add_samples(
        self, prefix: str, held: Mapping[str, int], spelled: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Note the complete samples of a folder, and what is wrong with the others."""
        complete = (1 << len(self.bits)) - 1
        for stem, bits in held.items():
            key = prefix + stem
            if fault := key_fault(prefix, stem):
                self.faults[fault].append(key)
            elif bits != complete:
                lacking = next(field for field, bit in self.bits.items() if not bits & bit)
                self.faults[INCOMPLETE].append(f"{key}.{lacking}")
            elif stem in spelled:
                self.samples.append("\0".join([key, *(spelled[stem].get(f, f) for f in self.bits)]))
            else:
                self.samples.append(key)


def key_fault(prefix: str, stem: str) -> str:
    """Return what keeps a folder's path and a stem from being a key, or nothing."""
    if stem.startswith("__") or (prefix[:2] == "__" and re.match("__[^/]*__/", prefix)):
        return RESERVED
    key = prefix + stem
    if key[:3] == "BZh" and re.match(r"BZh.1AY&SY", key, re.DOTALL):
        return BAD_NAME  # in front of a shard, readers take it for bzip2
    if key.isascii() and "\n" not in key:
        return ""
    split_back = not NOT_UTF8.search(key) and base_plus_ext(f"{key}.a") == (key, "a")
    return "" if split_back else BAD_NAME


def shuffle_rank(seed: int, sample: str) -> bytes:
    """Return the place of a sample in the order of --shuffle, the same on every machine."""
    return hashlib.blake2b(f"{seed}/{sample_key(sample)}".encode()).digest()


def check_shard_numbers(total_shards: int, samples: int, shard_id: int = 0) -> None:
    """Refuse shard numbers that cannot be; an empty shard makes some readers fail."""
    if not 1 <= total_shards <= MAX_SHARDS:
        raise Refused(f"{total_shards} shards: choose a number from 1 to {MAX_SHARDS:,}")
    if not 0 <= shard_id < total_shards:
        raise Refused(f"shard id {shard_id} is outside 0 to {total_shards - 1}")
    if total_shards > samples:
        raise Refused(f"{total_shards} shards for {samples} samples: choose at most {samples}")


# ---------------------------------------------------------------- from samples to one shard


class Shard(NamedTuple):
    """What packing one shard did."""

    shard_id: int
    samples: int
    bytes: int  # size of the tar file
    fingerprint: str  # hash of its inode and its source files' sizes and times, for --resume
    how: str = "created"  # or, with --resume, "kept", or "created again" where files changed


def shard_name(shard_id: int) -> str:
    """Return the file name of a shard: 7 -> 'shard-000007.tar'."""
    return f"shard-{shard_id:06d}.tar"


CHANGED = "changed while it was packed; run again when it is at rest"
WRITE_SIZE = 512 << 10  # bytes gathered for one write
SEND_SIZE = 16 << 20  # bytes sent to the disk at a time
WHOLE_SIZE = 64 << 10  # bytes of a file that is read in one piece; larger ones are copied
AHEAD_SIZE = 512 << 10  # the same as WHOLE_SIZE, for files that are read ahead
SLOW_READ = 0.0005  # seconds a file; a local disk takes a hundredth of that to open one
SLOW_BATCHES = 3  # so many more slow batches than fast ones, and files are read ahead
READ_THREADS, READ_BATCHES, READ_BATCH = 16, 24, 4  # 96 files ahead: 48 MB at most
COPY_SIZE = 1 << 20  # bytes of a large file that are copied at a time
PADDING = [bytes(length) for length in range(512)]


class LargeFile(io.FileIO):
    """An open file that is copied in pieces, of the size that it had when it was opened."""

    def __init__(self, fd: int, path: str, size: int) -> None:
        super().__init__(fd)
        self.path = path
        self.size = size

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the content, piece by piece in the buffer, and close the file.

        Raises:
            Failed: its size is another by now.
        """
        left = self.size
        with naming(self.path), self:
            while (count := self.readinto(buffer)) and count <= left:
                left -= count
                yield buffer[:count]
        if left or count:
            raise Failed(f"{self.path!r} {CHANGED}")


File = tuple[bytes | LargeFile, os.stat_result]


class FastTarWriter(wds.TarWriter):  # type: ignore[misc]
    """A drop-in for `wds.TarWriter(stream, encoder=False, mtime=0)`: same bytes, in less time.

    Nearly all headers differ in name, size and checksum alone (the field offsets are those of
    POSIX ustar), so one header made by tarfile serves as a template. Besides bytes, `write` takes
    open files, which are copied in pieces.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoder=False, mtime=0)
        header = self.make_header("", 0)
        self.template = (
            b"%b" + header[100:124] + b"%b" + header[135:148] + b"%06o\0 " + header[156:]
        )
        # The checksum counts itself as spaces; what name and size add comes with each member.
        self.checksum = sum(header[100:124] + header[135:148] + b" " * 8 + header[156:])
        self.parts: list[bytes] = []  # what is to be written next
        self.pending = 0  # bytes in parts, about
        self.buffer = memoryview(bytearray(COPY_SIZE))
        self.offset = 0  # bytes written
        self.sent = 0  # bytes of them on their way to the disk

    def fill_header(self, name: bytes, digits: bytes) -> bytes:
        """Return the header of a member, given its name and the octal digits of its size."""
        checksum = self.checksum + sum(name) + sum(digits)
        return self.template % (name.ljust(100, b"\0"), digits, checksum)

    def make_header(self, name: str, size: int) -> bytes:
        """Return the header that tarfile makes for a member; here for what the template lacks."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = size, self.mode, self.user, self.group
        return info.tobuf(self.tarstream.format, self.tarstream.encoding, self.tarstream.errors)

    def write(self, sample: Mapping[str, Any]) -> int:
        """Write a sample, {"__key__": key, field: bytes or LargeFile, ...}; return its bytes."""
        key, total = sample.get("__key__"), 0
        if key is None:
            raise ValueError("object must contain a __key__")
        for field in sorted(sample):
            if field[0] == "_":
                continue
            data = sample[field]
            if isinstance(data, (bytearray, memoryview)):
                data = bytes(data)  # whose owner may change it before it is written
            whole = isinstance(data, bytes)
            size = len(data) if whole else data.size
            member, digits = f"{key}.{field}", b"%011o" % size
            if len(member) <= 100 and len(digits) == 11 and member.isascii():
                self.parts.append(self.fill_header(member.encode(), digits))
            else:
                self.parts.append(self.make_header(member, size))
            if whole:
                self.parts.append(data)
                self.pending += size
            else:
                self.flush()
                for piece in data.pieces(self.buffer):
                    self.put(piece)
            self.parts.append(PADDING[-size % 512])
            total += size
            self.pending += 1024  # about what header and padding take
            if self.pending > WRITE_SIZE:
                self.flush()
        return total

    def flush(self) -> None:
        """Write what has been gathered, and start it on its way to the disk."""
        self.put(b"".join(self.parts))
        self.parts.clear()
        self.pending = 0

    def put(self, data: Any) -> None:
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
        self.put(bytes(1024 + -(self.offset + 1024) % 10_240))

    def __exit__(self, exc_type: object, exc_val: object, exc_tb: object) -> None:
        """Finish the archive, or, after an exception, make sure that it looks cut short."""
        if exc_type is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                self.stream.write(self.make_header("unfinished", 512))  # whose data never comes


def read_file(path: str, source_fd: int, whole_size: int) -> File:
    """Return the content of a source file (or, where it is large, the open file) and its status.

    Raises:
        Failed: it is no regular file any more, or its size changed under our hands.
    """
    # O_NONBLOCK: a FIFO that took the file's place must not block the run.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=source_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Failed(f"{path!r} {CHANGED}")
        if status.st_size > whole_size:
            return LargeFile(os.dup(fd), path, status.st_size), status
        data = os.read(fd, status.st_size + 1)
        if len(data) != status.st_size:
            raise Failed(f"{path!r} {CHANGED}")
        return data, status
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def read_batch(source_fd: int, whole_size: int, paths: Sequence[str]) -> list[File]:
    """Return what `read_file` gives for each path."""
    return [read_file(path, source_fd, whole_size) for path in paths]


def read_files(paths: Iterator[str], source_fd: int) -> Generator[File, None, None]:
    """Yield what `read_file` gives for each path, in order; read ahead once files open slowly.

    Many reads at a time hide the latency of NFS, Lustre or a cloud disk; on a fast disk, threads
    cost two to three times what they save.
    """
    batches = iter(lambda: list(islice(paths, READ_BATCH)), [])
    slow = 0
    while slow < SLOW_BATCHES and (batch := next(batches, None)):
        start = time.perf_counter()
        files = read_batch(source_fd, WHOLE_SIZE, batch)
        slow = max(0, slow + (1 if time.perf_counter() - start > SLOW_READ * READ_BATCH else -1))
        yield from files
    read = functools.partial(read_batch, source_fd, AHEAD_SIZE)
    for files in in_order(ThreadPoolExecutor(READ_THREADS), read, batches, READ_BATCHES):
        yield from files


def in_order(
    pool: Executor, work: Callable[[Any], Any], tasks: Iterator[Any], ahead: int
) -> Iterator[Any]:
    """Yield work(task) for each task, in order, with at most `ahead` begun; end the pool."""
    begun: deque[Future[Any]] = deque()
    try:
        while True:
            for task in islice(tasks, ahead - len(begun)):
                begun.append(pool.submit(work, task))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stamp(status: os.stat_result) -> bytes:
    """Return what tells a source file from a later version of it."""
    return b"%d %d " % (status.st_size, status.st_mtime_ns)


def write_samples(
    stream: BinaryIO,
    source: str | os.PathLike[str],
    samples: Sequence[str],
    fields: Sequence[str],
    progress: Progress | None = None,
) -> Any:
    """Write the tar archive of these samples to a stream.

    Returns:
        A hash object that has seen the sizes and times of all the files.
    """
    seen = hashlib.blake2b(digest_size=16)
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    files = read_files((path for s in samples for path in sample_files(s, fields)), source_fd)
    try:
        with FastTarWriter(stream) as sink:
            for sample in samples:
                data: dict[str, Any] = {"__key__": sample_key(sample)}
                for field in fields:
                    data[field], status = next(files)
                    seen.update(stamp(status))
                sink.write(data)
                if progress:
                    progress(1)
    except OSError as error:
        if error.filename:  # the path of a file that could not be read, below source
            error.filename = os.path.join(source, error.filename)
        raise
    finally:
        files.close()
        os.close(source_fd)
    return seen


def create_webdataset(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    shard_id: int,
    total_shards: int,
    fields: Sequence[str] = ("jpg", "txt"),
    skip_incomplete: bool = False,
    shuffle: int | None = None,
    samples: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Shard:
    """Pack one shard: every sample i of the source with i % total_shards == shard_id.

    A sample's members lie side by side, named <key>.<field>, as the format asks
    (https://github.com/webdataset/webdataset, "The WebDataset Format"); bytes in, bytes out.
    The shard appears under its name only when it is whole and on the disk.

    Args:
        source, fields, skip_incomplete, shuffle: see `list_samples`.
        output: the folder for the shard, made when it is missing.
        shard_id, total_shards: which shard to pack, 0 <= shard_id < total_shards.
        samples: this shard's own samples, from a caller that has listed the source already.
        progress: called with 1 after each sample.

    Raises:
        Refused: the source or the shard numbers are bad; nothing was written.
        Failed, OSError: packing failed; no shard appeared.
    """
    if samples is None:
        listing = list_samples(source, fields, skip_incomplete, shuffle)
        check_shard_numbers(total_shards, len(listing.samples), shard_id)
        samples = listing.samples[shard_id::total_shards]
        os.makedirs(output, exist_ok=True)
    # No reader globs this name, and no two attempts at the same shard share it.
    partial = os.path.join(output, f".shard-{shard_id:06d}-{secrets.token_hex(4)}")
    try:
        with naming(partial), open(partial, "xb", buffering=0) as stream:
            seen = write_samples(stream, source, samples, fields, progress)
            os.fsync(stream.fileno())
            status = os.fstat(stream.fileno())
        os.rename(partial, os.path.join(output, shard_name(shard_id)))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    seen.update(b"%d" % status.st_ino)
    return Shard(shard_id, len(samples), status.st_size, seen.hexdigest())


# ---------------------------------------------------------------- from shards to a dataset

STAGING = ".webdataset-"  # begins the name of the hidden folder in which a run's shards wait
MARKER = "publishing"  # stands in that folder while its shards replace the previous ones
LOCK = ".webdataset.lock"
PLAN = "plan"  # in the staging folder: see save_run
NEWLINE = "\0/"  # stands for one in a plan; no sample holds it: a NUL begins an extension
PACKED = "packed-"  # begins the names of the files there that hold its shards' fingerprints
RESUMED = {  # what must be the same in a run that goes on with the shards of another
    "source": "--source",
    "fields": "--fields",
    "total_shards": "number of shards",
    "samples": "samples, or --shuffle",
}
INTERRUPTED = "publishing was interrupted; run the same command again, the one that packed"


class Run(NamedTuple):
    """One run: what its workers share, and the folder in which its shards wait."""

    staging: str
    source: str
    fields: Sequence[str]
    total_shards: int
    started: float  # seconds since the epoch
    driver: int  # id of the process that planned it, and then becomes the parent of its workers
    skipped: int  # this and the next: see Listing
    ignored: int
    total_samples: int
    samples: Sequence[str] = ()  # all of them, where the run is planned; workers load their own

    @property
    def output(self) -> str:
        """The folder that the shards go to in the end."""
        return os.path.dirname(self.staging)


def plan_run(args: argparse.Namespace) -> Run:
    """Check everything that a run needs; nothing is written.

    Args:
        args: the flags of `add_source_arguments`, and output and total_shards.

    Raises:
        Refused: bad input.
    """
    started = time.time()
    for name in ("source", "output", "total_shards"):
        if getattr(args, name) in (None, ""):
            raise Refused(f"--{name.replace('_', '-')} is required (see --help)")
    fields = parse_fields(args.fields)
    source, output = os.path.abspath(args.source), os.path.abspath(args.output)
    listing = list_samples(source, fields, args.skip_incomplete, args.shuffle)
    check_shard_numbers(args.total_shards, len(listing.samples))
    check_output(output, source, fields)
    staging = os.path.join(output, STAGING + secrets.token_hex(8))
    numbers = args.total_shards, started, os.getpid(), listing.skipped, listing.ignored
    return Run(staging, source, fields, *numbers, len(listing.samples), listing.samples)


def start_run(run: Run, resume: bool) -> int:
    """Lock the output and make the staging folder of a run; finish or clear what others left.

    Returns:
        The descriptor that holds the lock.

    Raises:
        Failed: another run is packing into this output.
    """
    os.makedirs(run.output, exist_ok=True)
    lock = lock_output(run.output)
    remove_shards(run.output, PARTIAL_PATTERN)
    unfinished = staging_folders(run.output)
    if resume and not unfinished:
        print("nothing to resume: packed afresh", file=sys.stderr)
    for old in unfinished:
        if os.path.exists(os.path.join(old, MARKER)):
            publish_shards(old, load_run(old).total_shards)
        elif resume and not os.path.exists(run.staging) and same_run(old, run):  # the first such
            remove_shards(old, PARTIAL_PATTERN)
            os.rename(old, run.staging)  # a late writer of the old run finds its folder gone
        else:
            remove_staging(old)
    os.makedirs(run.staging, exist_ok=True)
    save_run(run)
    return lock


def save_run(run: Run) -> None:
    """Write the plan of a run: a line for all but its samples, and a line for each of these."""
    plan = os.path.join(run.staging, PLAN)
    with naming(plan), open(f"{plan}-new", "w", encoding="utf-8", newline="\n") as stream:
        stream.write(json.dumps(run._replace(samples=())) + "\n")
        stream.writelines(sample.replace("\n", NEWLINE) + "\n" for sample in run.samples)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{plan}-new", plan)  # a whole plan is there at any time, the old or the new


def load_run(staging: str) -> Run:
    """Read the run that is staged in a folder, without its samples."""
    plan = os.path.join(staging, PLAN)
    try:
        with open(plan, encoding="utf-8", newline="\n") as stream:
            run = Run(*json.loads(stream.readline()))
            return run._replace(staging=staging, fields=tuple(run.fields))
    except (FileNotFoundError, ValueError, TypeError):
        raise Failed(f"{plan!r} is damaged, or not there; remove its folder") from None


def load_samples(staging: str, chosen: Iterable[bool] = repeat(True)) -> Iterator[str]:
    """Yield the chosen ones among the samples of the run that is staged there."""
    with open(os.path.join(staging, PLAN), encoding="utf-8", newline="\n") as stream:
        for line in compress(islice(stream, 1, None), chosen):
            yield line[:-1].replace(NEWLINE, "\n")


def check_output(output: str, source: str, fields: Sequence[str]) -> None:
    """Refuse an output in which shards cannot take, or would harm, what has their names."""
    inside = Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source))
    if "tar" in fields and inside:
        raise Refused(f"--output {output!r} is inside --source, whose tars it could replace")
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(output):
            if SHARD_PATTERN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                raise Refused(f"{entry.path!r} is a folder with a shard's name; move it away")


def lock_output(output: str) -> int:
    """Take the lock of an output; it is gone when the last holder of the descriptor ends.

    Raises:
        Failed: another run holds it.
    """
    path = os.path.join(output, LOCK)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"another run is packing into {output!r}; wait, or stop it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # the run that held it has just ended and removed the file


def staging_folders(output: str | os.PathLike[str]) -> list[str]:
    """Return the staging folders that runs have left in an output."""
    return [
        entry.path
        for entry in os.scandir(output)
        if re.fullmatch(re.escape(STAGING) + "[0-9a-f]{16}", entry.name)
        and entry.is_dir(follow_symlinks=False)
    ]


def remove_staging(folder: str) -> None:
    """Remove a staging folder, in which a late task of a killed run may still want to write."""
    gone = os.path.join(os.path.dirname(folder), STAGING + secrets.token_hex(8))
    os.rename(folder, gone)  # it finds its folder gone
    shutil.rmtree(gone)


def interrupted_publishing(output: str | os.PathLike[str]) -> bool:
    """Tell whether a run ended while its shards replaced the previous ones."""
    return any(os.path.exists(os.path.join(old, MARKER)) for old in staging_folders(output))


def same_run(old: str, run: Run) -> bool:
    """Tell whether the shards of an old staging folder can be kept; if not, say what differs."""
    try:
        before = load_run(old)._replace(samples=list(load_samples(old)))
    except (OSError, ValueError, Failed):
        return False  # it ended before it packed anything
    differs = [RESUMED[name] for name in RESUMED if getattr(before, name) != getattr(run, name)]
    if differs:
        print(f"not resumed but packed afresh: other {', '.join(differs)}", file=sys.stderr)
    return not differs


def remove_shards(
    folder: str, pattern: re.Pattern[str], shard_ids: Container[int] = range(MAX_SHARDS)
) -> None:
    """Remove these shards, or what killed attempts at them left, as the pattern of names says."""
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and int(match[1]) in shard_ids:
            os.unlink(os.path.join(folder, name))


def pack_into(
    folder: str, run: Run, shard_id: int, samples: Sequence[str], progress: Progress | None = None
) -> Shard:
    """Pack one shard of a run, given its samples, into a folder."""
    what = shard_id, run.total_shards, run.fields
    return create_webdataset(run.source, folder, *what, samples=samples, progress=progress)


def pack_shard(
    run: Run, shard_id: int, samples: Sequence[str], progress: Progress | None = None
) -> Shard:
    """Pack one shard into the staging folder of a run, unless --resume finds it finished there.

    Args:
        run: the run; its own `samples` are not looked at, so a driver may leave them out.
        samples: the shard's samples.
    """
    how = "created"
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(os.path.join(run.staging, shard_name(shard_id)))
        seen = hashlib.blake2b(digest_size=16)
        for sample in samples:
            for path in sample_files(sample, run.fields):
                seen.update(stamp(os.stat(os.path.join(run.source, path))))
        seen.update(b"%d" % status.st_ino)
        if seen.hexdigest() in read_fingerprints(run.staging):
            return Shard(shard_id, len(samples), status.st_size, seen.hexdigest(), "kept")
        how = "created again"
    shard = pack_into(run.staging, run, shard_id, samples, progress)
    # One file for each process: to append to it is cheaper than a file for each shard.
    record = os.path.join(run.staging, f"{PACKED}{os.uname().nodename}-{os.getpid()}")
    with open(record, "a", encoding="ascii") as stream:
        stream.write(shard.fingerprint + "\n")
    return shard._replace(how=how)


@functools.lru_cache(maxsize=1)
def read_fingerprints(staging: str) -> set[str]:
    """Return the fingerprints of the shards that an interrupted run had finished."""
    records = Path(staging).glob(f"{PACKED}*")
    return {line for path in records for line in path.read_text("ascii").split()}


def report(shard: Shard) -> str:
    """Return the line that says what became of a shard."""
    return f"Shard {shard.shard_id} {shard.how} with {shard.samples} samples."


def finish_run(run: Run) -> str:
    """Put the shards of a run in the place of the previous dataset; return the summary line.

    Raises:
        Failed: shards are missing; the previous dataset is untouched.
    """
    paths = [os.path.join(run.staging, shard_name(number)) for number in range(run.total_shards)]
    missing = [str(number) for number, path in enumerate(paths) if not os.path.exists(path)]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise Failed(
            f"not packed: {len(missing):,} shards ({first}); the previous dataset is untouched; "
            "run again with --resume to pack just these"
        )
    sizes = [os.stat(path).st_size for path in paths]
    # To stop now would leave neither the old dataset nor the new one.
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in stopping]
    with open(os.path.join(run.staging, MARKER), "xb"):
        sync_folder(run.staging)
    publish_shards(run.staging, run.total_shards)
    os.unlink(os.path.join(run.output, LOCK))
    for number, handler in zip(stopping, handlers, strict=True):
        signal.signal(number, handler)
    return (
        f"{run.total_samples:,} samples in {len(sizes):,} shards, {sum(sizes):,} bytes "
        f"(mean {sum(sizes) // len(sizes):,}, largest {max(sizes):,}) "
        f"in {time.time() - run.started:.1f} s; "
        f"{run.ignored:,} names ignored, {run.skipped:,} incomplete samples skipped"
    )


def publish_shards(staging: str, total_shards: int) -> None:
    """Move shards to their final place; what is moved already, by a run cut short, stays."""
    output = os.path.dirname(staging)
    for shard_id in range(total_shards):
        with contextlib.suppress(FileNotFoundError):
            name = shard_name(shard_id)
            os.rename(os.path.join(staging, name), os.path.join(output, name))
    remove_shards(output, SHARD_PATTERN, range(total_shards, MAX_SHARDS))  # of a larger dataset
    sync_folder(output)
    os.unlink(os.path.join(staging, MARKER))
    remove_staging(staging)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put the names in a folder on the disk, as fsync does for the content of a file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- command line


USAGE = "create_webdataset.py --source DIR --output DIR --shard-id I --total-shards N [options]"
EXAMPLES = """examples:
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 4
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 64 \\
      --shard-step 8
"""


def add_source_arguments(parser: argparse.ArgumentParser, title: str = "the source") -> None:
    """Add the flags that say what a source is, and mean the same in every script."""
    add = parser.add_argument_group(title).add_argument
    add("--source", metavar="DIR", help="folder of the raw files, listed recursively")
    what = "a sample's files (default: %(default)s)"
    add("--fields", metavar="A,B", default="jpg,txt", help=what)
    add("--skip-incomplete", action="store_true", help="drop samples that lack a field")
    add("--shuffle", metavar="SEED", type=int, help="shuffle before sharding")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(USAGE, "Pack one shard (or every K-th) of a folder of samples.", EXAMPLES)
    add_source_arguments(parser)
    add = parser.add_argument_group("the shards").add_argument
    add("--output", metavar="DIR", help="folder for the shards, made when it is missing")
    add("--shard-id", metavar="I", type=int, help="the shard to pack, from 0")
    number = number_from(1, MAX_SHARDS)
    add("--total-shards", metavar="N", type=number, help="number of shards")
    add("--shard-step", metavar="K", type=number, help="pack shards I, I+K, I+2K, ...")
    add = parser.add_argument_group("steps of run_parallel.sh").add_argument
    add("--start", metavar="SCRIPT", nargs=argparse.REMAINDER, help="check, lock and stage a run")
    add("--run", metavar="STAGING", help="pack shards of the run that is staged there")
    add("--publish", metavar="STAGING", help="put a run's shards in their final place")
    return parser


def build_driver_parser(command: str, purpose: str, example: str = "") -> argparse.ArgumentParser:
    """Return the flags that both drivers have."""
    where = "Unless told otherwise, from source_data to webdataset_output beside this script."
    usual = f"  {command} --source raw --output out --num-workers 8 --num-shards 64"
    examples = f"examples:\n{usual}\n{usual} --resume\n{example}"
    parser = Parser(f"{command} [options]", f"{purpose}\n{where}", examples)
    here = Path(__file__).resolve().parent
    add_source_arguments(parser)
    add = parser.add_argument_group("the output").add_argument
    add("--output", metavar="DIR", help="folder for the shards, made when it is missing")
    add("--resume", action="store_true", help="keep the shards that an interrupted run finished")
    add = parser.add_argument_group("the work").add_argument
    number = number_from(1, MAX_SHARDS)
    workers = f"processes, or tasks at a time (default: {NUM_WORKERS})"
    add("--num-workers", metavar="N", type=number, help=workers)
    add("--num-shards", metavar="N", type=number, help="shards (default: as many as workers)")
    parser.set_defaults(source=here / "source_data", output=here / "webdataset_output")
    return parser


def plan_driver_run(args: argparse.Namespace) -> Run:
    """Settle the number of shards of a driver, and check all that its run needs."""
    args.total_shards = args.num_shards or args.num_workers or NUM_WORKERS
    return plan_run(args)


def start_script(bash: str, script: str, *argv: str) -> NoReturn:
    """Stage a run with the flags of run_parallel.sh, and become its second half.

    The lock passes on to it, and from it to the workers, as with flock(1).
    """
    purpose = "Pack a folder of samples into WebDataset shards, with background processes."
    args = build_driver_parser("./run_parallel.sh", purpose).parse_args(argv)
    run = plan_driver_run(args)
    os.set_inheritable(start_run(run, args.resume), True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, others should not
    workers = min(args.num_workers or NUM_WORKERS, run.total_shards)
    os.execvp(bash, [bash, script, "--staged", str(workers), run.staging])


def is_alive(pid: int) -> bool:
    """Tell whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def pack_shards(args: argparse.Namespace) -> int:
    """Pack shards I, I+K, ... of a staged run, or straight into --output, and report each."""
    run = load_run(args.run) if args.run else plan_run(args)
    check_shard_numbers(run.total_shards, run.total_samples, args.shard_id)
    shard_ids = range(args.shard_id, run.total_shards, args.shard_step or run.total_shards)
    pack = functools.partial(pack_shard, run)
    if not args.run:
        os.makedirs(run.output, exist_ok=True)
        if interrupted_publishing(run.output):
            raise Failed(INTERRUPTED)
        remove_shards(run.output, PARTIAL_PATTERN, shard_ids)
        pack = functools.partial(pack_into, run.output, run)
    own = cycle([shard_id in shard_ids for shard_id in range(run.total_shards)])
    # A worker keeps no others: there may be many workers, and many millions of samples.
    samples = list(load_samples(args.run, own) if args.run else compress(run.samples, own))
    bar: Any = None
    if sys.stderr.isatty():
        from tqdm import tqdm  # here: to import it takes as long as to pack a thousand samples

        row = args.shard_id if args.run else 0
        bar = tqdm(total=len(samples), unit=" samples", position=row)
    failed, parent = False, os.getppid()  # the driver, or an interpreter's wrapper
    with bar or contextlib.nullcontext():
        for place, shard_id in enumerate(shard_ids):
            if args.run and (os.getppid() != parent or not is_alive(run.driver)):
                raise Failed("the driver is gone, so its workers stop")
            try:
                line = report(pack(shard_id, samples[place :: len(shard_ids)], bar and bar.update))
                stream = sys.stdout
            except (Failed, OSError) as error:
                line = f"Shard {shard_id} failed: {explain(error)}"
                stream, failed = sys.stderr, True
            with bar.external_write_mode() if bar else contextlib.nullcontext():
                # One write a line: other workers write, too.
                print(line + "\n", end="", file=stream, flush=True)
    if not args.run:
        sync_folder(run.output)
    return 1 if failed else 0


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if args.start is not None or args.run or args.publish:
        sys.argv[0] = "run_parallel.sh"  # these are its steps, and so it signs their errors
    if args.start is not None:
        if len(args.start) < 2:
            raise Refused("--start is a step of run_parallel.sh: use that")
        start_script(*args.start)
    if args.publish:
        print(finish_run(load_run(args.publish)))
        return 0
    if args.shard_id is None:
        raise Refused("--shard-id is required (see --help)")
    return pack_shards(args)


if __name__ == "__main__":
    raise SystemExit(main())
