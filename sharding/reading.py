"""The samples of a shard, as WebDataset reads them, without webdataset.

Input: the path of a shard, or its stream. Output: its members, or a dict for each sample. Proof,
training and counting walk over a shard by `walk` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple, TypeVar

from sharding.archive import SCAN_SIZE, Damaged, Window, read_members
from sharding.errors import PackError
from sharding.places import dataset_at
from sharding.samples import RESERVED_FOLDER, split_name

T = TypeVar("T")

# Bytes read at a time. To free so large a buffer teaches glibc's malloc to keep what is freed:
# with 1 MB, each tensor of a decoded picture was given back and fetched anew, for half of the time.
READ_SIZE = 4 << 20

Member = tuple[str, str, int]  # key, field in lower case, size
KEY = itemgetter(0)  # of a member: `groupby(walk(...), KEY)` gives the members of each sample


class Later(NamedTuple):
    """The content of a field that is read when it is asked for."""

    path: str
    offset: int
    size: int
    version: Any  # of the shard

    def read(self) -> bytes:
        """Return the content."""
        if not self.size:  # a store has no empty range
            return b""
        return dataset_at(self.path).read_range(*self)


def walk(
    stream: BinaryIO | Window, end: int, dropped: Callable[[str], object] | None = None
) -> Iterator[Member]:
    """Yield the members of all samples in a shard, with the stream at the content of each.

    Args:
        stream: the shard, which can seek; the caller may read any part of a content.
        end: its size in bytes.
        dropped: is told the name of each member that readers pass over.

    Raises:
        Damaged: it is not one whole, plain archive, or readers would lose or confuse a field.
    """
    last = None
    fields: set[str] = set()
    for name, size in read_members(stream, end):
        key, field = split_name(name)
        odd = "__" in name  # the only names that must be looked at closely
        if key is None or field is None or (odd and RESERVED_FOLDER.match(name)):
            if dropped:
                dropped(name)
            continue
        if odd and field[:2] == "__":
            raise Damaged(f"member {name!r}, whose field is reserved")
        field = field.lower()
        if key != last:
            last, fields = key, {field}
        elif field in fields:
            raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
        else:
            fields.add(field)
        yield key, field, size


def read_samples(
    path: str, wanted: Container[str] | None = None, later: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `wds.WebDataset` does: fields by name, and `__key__`.

    Args:
        path: a plain path; webdataset would cut "a#b" short, and run "pipe:..." in a shell.
        wanted: fields to read, in lower case; the bytes of others are passed over.
        later: asked before each sample: are its contents to be `Later`?

    Raises:
        PackError: the shard is damaged, or was replaced while it was read; it names the shard.
    """
    where = {"__url__": path}
    if not dataset_at(path).REMOTE:
        where["__local_path__"] = path
    buffering = SCAN_SIZE if later() else READ_SIZE
    try:
        with dataset_at(path).open_shard(path, buffering) as (stream, end, version):
            window, sample, put_off = Window(stream), dict[str, Any](), False
            for key, field, size in walk(window, end):
                if not sample or key != sample["__key__"]:
                    if sample:
                        yield sample
                    sample, put_off = {"__key__": key, **where}, later()
                if wanted is not None and field not in wanted:
                    continue
                if put_off:
                    sample[field] = Later(path, window.place, size, version)
                else:
                    begin = window.place - window.begin
                    content = window.data[begin : begin + size]  # in front of it, with its header
                    sample[field] = content if len(content) == size else window.read(size)
            if sample:
                yield sample
    except Damaged as error:
        raise PackError(f"{path!r}: {error}") from None


def count_shard(path: str) -> int:
    """Return the number of samples in a shard, from its headers.

    Raises:
        PackError: the shard is damaged.
    """
    return sum(1 for _ in read_samples(path, (), lambda: True))


def sound_part(path: str, samples: Iterator[T]) -> Iterator[T]:
    """Yield what another reader finds in a shard, as long as our own walk is there before it.

    Nothing that is damaged, or hostile, is ever let at that reader, which may not notice it, or
    fill the memory with it.

    Args:
        samples: all of the shard, read one by one: each up to the first member behind it.

    Raises:
        Damaged: behind the last sample but one that was found sound, and so was yielded.
    """
    with dataset_at(path).open_shard(path, SCAN_SIZE) as (stream, end, _):
        begun = groupby(walk(Window(stream), end), KEY)
        for _ in chain(islice(begun, 1, None), [None]):
            yield from islice(samples, 1)
