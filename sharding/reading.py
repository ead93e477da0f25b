"""The samples of a shard, as WebDataset reads them, without webdataset.

Input: the path of a shard. Output: a dict for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

from sharding.archive import Damaged, read_members
from sharding.errors import PackError
from sharding.places import dataset_at
from sharding.samples import RESERVED_FOLDER, split_name
from sharding.urls import is_url

# Bytes read at a time. To free so large a buffer teaches glibc's malloc to keep what is freed:
# with 1 MB, each tensor of a decoded picture was given back and fetched anew, for half of the time.
READ_SIZE = 4 << 20
SCAN_SIZE = 4 << 10  # the same where headers alone are read


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


def read_samples(
    path: str, wanted: Container[str] | None = None, later: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `wds.WebDataset` does: fields by name, and `__key__`.

    Args:
        path: a plain path; webdataset would cut "a#b" short, and run "pipe:..." in a shell.
        wanted: fields to read, in lower case; the bytes of others are passed over.
        later: tells whether a content is to be a `Later` for now.

    Raises:
        PackError: the shard is damaged, or was replaced while it was read; it names the shard.
    """
    where = {"__url__": path} if is_url(path) else {"__url__": path, "__local_path__": path}
    sample: dict[str, Any] = {}
    seen: set[str] = set()
    buffering = SCAN_SIZE if later() else READ_SIZE
    try:
        with dataset_at(path).open_shard(path, buffering) as (stream, end, version):
            for name, size in read_members(stream, end):
                key, field = split_name(name)
                if key is None or field is None:
                    continue
                if name[:2] == "__" and RESERVED_FOLDER.match(name):
                    continue
                field = field.lower()
                if not sample or key != sample["__key__"]:
                    if sample:
                        yield sample
                    sample = {"__key__": key, **where}
                    seen = set()
                if field in seen:
                    raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
                seen.add(field)
                if wanted is None or field in wanted:
                    if later():
                        sample[field] = Later(path, stream.tell(), size, version)
                    else:
                        sample[field] = stream.read(size)
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
