"""Pack image + text pairs into WebDataset shards: the core that every driver calls.

Sorted samples are dealt like cards: sample i belongs to shard i % total_shards.
One call of `create_webdataset` packs one shard, so any number of processes, on any
number of machines, can pack the shards of one dataset side by side.
"""

from __future__ import annotations

import argparse
import contextlib
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
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import compress, cycle, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported
from sharding.archive import FastTarWriter
from sharding.errors import InputError, PackError, explain, naming
from sharding.samples import list_samples, parse_fields, sample_files, sample_key

SHARD_PATTERN = re.compile(r"shard-([0-9]{6})\.tar")
PARTIAL_PATTERN = re.compile(r"\.shard-([0-9]{6})-[0-9a-f]{8}")  # see create_webdataset
MAX_SHARDS = 1_000_000
NUM_WORKERS = 4  # of a driver, unless told otherwise
Progress = Callable[[int], object]  # is told how many more samples are done


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line and whose flags are never guessed."""

    def __init__(self, usage: str, description: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__("", usage, description, examples, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def number_from(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number in this range."""
    wanted = f"a number from {least}" + (f" to {most:,}" if most < sys.maxsize else "")

    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return int(text)

    return number


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
        except (InputError, PackError, OSError, ModuleNotFoundError) as error:
            if isinstance(error, BrokenPipeError):  # so that the last flush does not fail, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"{Path(sys.argv[0]).name}: error: {explain(error)}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1

    return wrapper


def check_shard_numbers(total_shards: int, samples: int, shard_id: int = 0) -> None:
    """Refuse shard numbers that cannot be; an empty shard makes some readers fail."""
    if not 1 <= total_shards <= MAX_SHARDS:
        raise InputError(f"{total_shards} shards: choose a number from 1 to {MAX_SHARDS:,}")
    if not 0 <= shard_id < total_shards:
        raise InputError(f"shard id {shard_id} is outside 0 to {total_shards - 1}")
    if total_shards > samples:
        raise InputError(f"{total_shards} shards for {samples} samples: choose at most {samples}")


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
WHOLE_SIZE = 64 << 10  # bytes of a file that is read in one piece; larger ones are copied
AHEAD_SIZE = 512 << 10  # the same as WHOLE_SIZE, for files that are read ahead
SLOW_READ = 0.0005  # seconds a file; a local disk takes a hundredth of that to open one
SLOW_BATCHES = 3  # so many more slow batches than fast ones, and files are read ahead
READ_THREADS, AHEAD_BATCHES, AHEAD_FILES = 16, 24, 4  # 96 files ahead: 48 MB at most
BATCH_SAMPLES = 16  # read at a time where nothing is read ahead


class LargeFile(io.FileIO):
    """An open file that is copied in pieces, of the size that it had when it was opened."""

    def __init__(self, fd: int, path: str, size: int) -> None:
        super().__init__(fd)
        self.path = path
        self.size = size

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the content, piece by piece in the buffer, and close the file.

        Raises:
            PackError: its size is another by now.
        """
        left = self.size
        with naming(self.path), self:
            while (count := self.readinto(buffer)) and count <= left:
                left -= count
                yield buffer[:count]
        if left or count:
            raise PackError(f"{self.path!r} {CHANGED}")


class Batch(NamedTuple):
    """What a few samples become in a shard: their members, in order."""

    samples: int
    names: list[str]
    contents: list[bytes | LargeFile]
    stamps: list[int]  # size and time of each file: see `stamp`


def read_batch(
    source_fd: int, whole_size: int, fields: Sequence[str], samples: Sequence[str]
) -> Batch:
    """Read the files of a few samples; those above `whole_size` bytes are left open instead.

    One function for many files: for small ones, a call for each is a good part of the time.

    Raises:
        PackError: one is no regular file any more, or its size changed under our hands.
    """
    batch = Batch(len(samples), [], [], [])
    for sample in samples:
        for field, path in zip(fields, sample_files(sample, fields), strict=True):
            # O_NONBLOCK: a FIFO that took the file's place must not block the run.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=source_fd)
            try:
                status = os.fstat(fd)
                size = status.st_size
                if not stat.S_ISREG(status.st_mode):
                    raise PackError(f"{path!r} {CHANGED}")
                if size > whole_size:
                    batch.contents.append(LargeFile(os.dup(fd), path, size))
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
            batch.names.append(f"{sample_key(sample)}.{field}" if "\0" in sample else path)
            batch.stamps.extend((size, status.st_mtime_ns))
    return batch


def read_batches(
    samples: Iterable[str], fields: Sequence[str], source_fd: int
) -> Generator[Batch, None, None]:
    """Yield what `read_batch` gives for all samples, in order; read ahead once files open slowly.

    Many reads at a time hide the latency of NFS, Lustre or a cloud disk; on a fast disk, threads
    cost two to three times what they save.
    """
    left, slow, few = iter(samples), 0, max(1, AHEAD_FILES // len(fields))
    count = few  # at first, so that a slow disk is found out soon
    while slow < SLOW_BATCHES and (some := list(islice(left, count))):
        start = time.perf_counter()
        batch = read_batch(source_fd, WHOLE_SIZE, fields, some)
        is_slow = time.perf_counter() - start > SLOW_READ * len(batch.names)
        slow = max(0, slow + (1 if is_slow else -1))
        count = few if is_slow else BATCH_SAMPLES
        yield batch
    batches = iter(lambda: list(islice(left, few)), [])
    read = functools.partial(read_batch, source_fd, AHEAD_SIZE, fields)
    yield from in_order(ThreadPoolExecutor(READ_THREADS), read, batches, AHEAD_BATCHES)


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


STAMP = b"%d %d "  # size and time of a file: what tells it from a later version of it


def stamp(status: os.stat_result) -> bytes:
    """Return the stamp of a source file."""
    return STAMP % (status.st_size, status.st_mtime_ns)


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
    batches = read_batches(samples, fields, source_fd)
    try:
        with FastTarWriter(stream) as sink:
            for batch in batches:
                sink.write_members(batch.names, batch.contents)
                seen.update(STAMP * len(batch.names) % tuple(batch.stamps))
                if progress:
                    progress(batch.samples)
    except OSError as error:
        if error.filename:  # the path of a file that could not be read, below source
            error.filename = os.path.join(source, error.filename)
        raise
    finally:
        batches.close()
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
        progress: called with the number of samples that have just been packed.

    Raises:
        InputError: the source or the shard numbers are bad; nothing was written.
        PackError, OSError: packing failed; no shard appeared.
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
        InputError: bad input.
    """
    started = time.time()
    for name in ("source", "output", "total_shards"):
        if getattr(args, name) in (None, ""):
            raise InputError(f"--{name.replace('_', '-')} is required (see --help)")
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
        PackError: another run is packing into this output.
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
        raise PackError(f"{plan!r} is damaged, or not there; remove its folder") from None


def load_samples(staging: str, chosen: Iterable[bool] = repeat(True)) -> Iterator[str]:
    """Yield the chosen ones among the samples of the run that is staged there."""
    with open(os.path.join(staging, PLAN), encoding="utf-8", newline="\n") as stream:
        for line in compress(islice(stream, 1, None), chosen):
            yield line[:-1].replace(NEWLINE, "\n")


def check_output(output: str, source: str, fields: Sequence[str]) -> None:
    """Refuse an output in which shards cannot take, or would harm, what has their names."""
    inside = Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source))
    if "tar" in fields and inside:
        raise InputError(f"--output {output!r} is inside --source, whose tars it could replace")
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(output):
            if SHARD_PATTERN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                raise InputError(f"{entry.path!r} is a folder with a shard's name; move it away")


def lock_output(output: str) -> int:
    """Take the lock of an output; it is gone when the last holder of the descriptor ends.

    Raises:
        PackError: another run holds it.
    """
    path = os.path.join(output, LOCK)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"another run is packing into {output!r}; wait, or stop it") from None
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
    except (OSError, ValueError, PackError):
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
        PackError: shards are missing; the previous dataset is untouched.
    """
    paths = [os.path.join(run.staging, shard_name(number)) for number in range(run.total_shards)]
    missing = [str(number) for number, path in enumerate(paths) if not os.path.exists(path)]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise PackError(
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
            raise PackError(INTERRUPTED)
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
                raise PackError("the driver is gone, so its workers stop")
            try:
                line = report(pack(shard_id, samples[place :: len(shard_ids)], bar and bar.update))
                stream = sys.stdout
            except (PackError, OSError) as error:
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
            raise InputError("--start is a step of run_parallel.sh: use that")
        start_script(*args.start)
    if args.publish:
        print(finish_run(load_run(args.publish)))
        return 0
    if args.shard_id is None:
        raise InputError("--shard-id is required (see --help)")
    return pack_shards(args)


if __name__ == "__main__":
    raise SystemExit(main())
