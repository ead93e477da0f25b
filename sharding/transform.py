"""A user's function on each sample: read its file, load it, and call it on what a source reads.

In: batches of files. Out: batches of what the function makes of them, encoded as webdataset's own
writer does. A plan carries the text of the file, so an edit in mid-run changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Any

from sharding.archive import COPY_SIZE, Pieces
from sharding.batch import Batch
from sharding.errors import InputError, PackError
from sharding.faults import quote
from sharding.messages import argument, explain
from sharding.parallel import in_order
from sharding.samples import Call, Function, Sample, Samples, Transform, is_field
from sharding.urls import refuse_url

READ_THREADS = 8  # of large files; small ones come read
AHEAD_BYTES, FILE_BYTES = 64 << 20, 1 << 20  # what is read and waits; a file counts as no less
CURE = "return a dict of fields, or None to drop the sample"


class TransformError(PackError):
    """The function cannot be loaded, or failed, or returned what cannot be packed."""


# ---------------------------------------------------------------- to load it


def read_function(spec: str) -> Function:
    """Return the function that "FILE.py:FUNCTION" names; nothing of the file is run.

    Raises:
        InputError: there is no such file, or it is not Python.
    """
    name = f"{argument('transform')} {spec!r}"
    refuse_url("transform", spec)
    file, _, function = spec.rpartition(":")
    if not file or not function.isidentifier():
        raise InputError(f"{name}: give FILE.py:FUNCTION")
    path = os.path.abspath(file)
    try:
        with open(path, "rb") as stream:
            text = importlib.util.decode_source(stream.read())
        compile(text, path, "exec", dont_inherit=True)
    except OSError as error:
        raise InputError(f"{name}: {explain(error)}") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(f"{name}: {_at(path, line)}: {_say(error)}") from None
    return Function(function, path, text)


@functools.lru_cache(maxsize=8)  # once in a process, with the models and tables that it loads
def load_function(function: Function) -> Call:
    """Run the text of a file, and return its function.

    Raises:
        TransformError: the text fails, or has no such function.
    """
    name, path, text = function
    module = types.ModuleType(f"transform_{function.digest}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look
    before, folder = list(sys.path), os.path.dirname(path)
    if os.path.isdir(folder):
        sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(text, path, "exec", dont_inherit=True), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        raise TransformError(f"{_at(path, _line(error, path))}: {_say(error)}") from None
    finally:
        sys.path[:] = before
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise TransformError(f"{path!r} has no function {name!r}")
    return found  # type: ignore[no-any-return]


# ---------------------------------------------------------------- to call it


def transformed(
    batches: Iterable[Batch], samples: Samples, transform: Transform
) -> Generator[Batch, None, None]:
    """Yield batches of what a function makes of these samples, which the batches hold in order.

    Large files are read ahead while the function runs; a few samples wait.

    Raises:
        TransformError: in one line, with key, exception, file and line.
    """
    apply, pool = _Apply(transform), ThreadPoolExecutor(READ_THREADS)
    try:
        for samples_of, batch in _read_ahead(pool, _split(batches, samples)):
            yield apply(samples_of, batch)
    finally:
        pool.shutdown(cancel_futures=True)


Task = tuple["list[Sample]", Batch]


def _split(batches: Iterable[Batch], samples: Samples) -> Iterator[Task]:
    """Yield each batch with its samples, or its samples one by one, if it has large files."""
    each = iter(samples)
    for batch in batches:
        some = list(islice(each, batch.samples))
        if not _has_pieces(batch):
            yield some, batch
            continue
        place = 0
        for sample in some:
            end = place + len(sample.extensions)
            stamps = batch.stamps[2 * place : 2 * end]
            yield [sample], Batch(1, batch.names[place:end], batch.contents[place:end], stamps)
            place = end


def _read_ahead(pool: Executor, tasks: Iterable[Task]) -> Iterator[Task]:
    """Yield tasks with all of their contents read; large ones are read while others are used.

    What is whole already passes at no cost, unless it has to wait for its turn.
    """
    return in_order(pool, _read_whole, tasks, AHEAD_BYTES, _size, _is_whole)


def _is_whole(task: Task) -> bool:
    return not _has_pieces(task[1])


def _has_pieces(batch: Batch) -> bool:
    return any(type(content) is not bytes for content in batch.contents)


def _size(task: Task) -> int:
    """Return the bytes that a task holds once it is read."""
    contents = task[1].contents
    size = sum(len(c) if isinstance(c, bytes) else c.size for c in contents)
    return max(size, FILE_BYTES * len(contents))


def _read_whole(task: Task) -> Task:
    """Return the same with no content in pieces."""
    samples, batch = task
    return samples, batch._replace(contents=list(map(_whole, batch.contents)))


def _whole(content: bytes | Pieces) -> bytes:
    if isinstance(content, bytes):
        return content
    return b"".join(map(bytes, content.pieces(memoryview(bytearray(COPY_SIZE)))))


class _Apply:
    """A function, applied to batches."""

    def __init__(self, transform: Transform) -> None:
        # What a caller's own function prints is the caller's.
        loaded = isinstance(transform, Function)
        self.streams = contextlib.redirect_stdout if loaded else contextlib.nullcontext
        self.call: Call = load_function(transform) if isinstance(transform, Function) else transform
        self.name = name_of(transform)
        code = getattr(self.call, "__code__", None)
        self.path = transform.path if isinstance(transform, Function) else ""
        self.path = self.path or getattr(code, "co_filename", "")
        self.line = code.co_firstlineno if code and code.co_filename == self.path else 1

    def __call__(self, samples: list[Sample], batch: Batch) -> Batch:
        """Return what the function makes of a batch."""
        files = iter(batch.contents)
        names: list[str] = []
        contents: list[bytes | Pieces] = []
        dropped = 0
        with self.streams(sys.stderr):
            for key, _, extensions, *_ in samples:
                sample: dict[str, Any] = {"__key__": key}
                for extension in extensions:
                    sample[extension.lower()] = next(files)
                fields = self.fields_of(key, sample)
                if fields is None:
                    dropped += 1
                    continue
                for field in sorted(fields):
                    names.append(f"{key}.{field}")
                    contents.append(self.encode(key, field, fields[field]))
        return batch._replace(names=names, contents=contents, dropped=dropped)

    def fields_of(self, key: str, sample: dict[str, Any]) -> Mapping[str, Any] | None:
        """Call the function, and return the fields that are to be packed."""
        process = os.getpid()
        try:
            found = self.call(sample)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too
            line = _line(error, self.path) or self.line
            raise self.error(key, _say(error), line) from None
        finally:
            if os.getpid() != process:  # the function has forked: two would write one shard
                os._exit(1)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise self.error(key, f"{self.name} returned a {type(found).__name__}; {CURE}")
        if found.get("__key__", key) != key:
            other = f"{self.name} returned the key {found['__key__']!r}"
            raise self.error(key, f"{other}; leave the key as it is")
        fields = {field: value for field, value in found.items() if field != "__key__"}
        if not fields:
            raise self.error(key, f"{self.name} returned no field; {CURE}")
        for field in fields:
            if not _is_good(field):
                cure = 'a field is a lower-case name such as "jpg" or "seg.png"'
                raise self.error(key, f"{self.name} returned the field {field!r}; {cure}")
        return fields

    def encode(self, key: str, field: str, value: Any) -> bytes:
        """Return a value as bytes: what has none is encoded by its field, as webdataset does it."""
        if type(value) is bytes:
            return value
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        try:
            return _encode(field, value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = f"{self.name} returned a {type(value).__name__} as {field!r}"
            raise self.error(key, f"{what}, which cannot be encoded: {_say(error)}") from None

    def error(self, key: str, what: str, line: int = 0) -> TransformError:
        """Return the error that says what is wrong with a sample, and where."""
        return TransformError(f"sample {quote(key)}: {_at(self.path, line or self.line)}: {what}")


@functools.lru_cache(maxsize=256)
def _is_good(field: object) -> bool:
    """Tell whether a field would be read back under this very name."""
    if not isinstance(field, str):
        return False
    return is_field(field) and field == field.lower() and field.isprintable()


def _encode(field: str, value: Any) -> bytes:
    """Return what webdataset's own writer makes of a value."""
    from webdataset.writer import default_handlers, encode_based_on_extension1

    if value is None:
        raise ValueError("leave the field out instead")
    plain = field.removesuffix(".gz")
    data = bytes(encode_based_on_extension1(value, plain, default_handlers))
    if plain == field:
        return data
    import gzip

    return gzip.compress(data, mtime=0)  # webdataset's would hold the time of day


# ---------------------------------------------------------------- in words


def name_of(transform: Transform) -> str:
    """Return the name of a function."""
    return str(getattr(transform, "name", getattr(transform, "__name__", "the function")))


def dropped_by(transform: Transform | None, number: int) -> str:
    """Return '; 12 dropped by shrink', or nothing without a function."""
    return f"; {number:,} dropped by {name_of(transform)}" if transform else ""


def _at(path: str, line: int) -> str:
    return f"{path!r}, line {line}" if path else "line ?"


def _line(error: BaseException, path: str) -> int:
    """Return the line of a file in which an error was raised, or that led there; 0: none."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 0
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == path]  # fmt: skip
    return lines[-1] if lines else 0


def _say(error: BaseException) -> str:
    """Return the kind of an exception, and its text."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # of a class that cannot be printed
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
