"""A run that packs into a bucket: claimed by its plan, packed shard by shard, published. See
`places.Output`.

A store has no rename and no lock that dies with its holder. So while a run is not finished, its
plan stands beside the shards: it is lock, plan and mark in one, and nobody reads the dataset.

    .webdataset-plan                                 created only if there is none
    .webdataset-packed/<samples>/<shard>-<version>-<stamp>-<run>    empty: that shard is finished
    shard-000007.tar                                 whole or not there: an upload is atomic

Nothing but the shards is left in the end. With --resume a run takes the plan over, which fences the
older run: before it completes an upload, it looks whether the plan is still its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import secrets
import time
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from sharding.bucket import PLAN, base, objects_at
from sharding.errors import InputError, PackError, argument, count, warn
from sharding.plan import Plan, dump_plan, load_plan, load_shard, not_packed, same_samples
from sharding.samples import Sample
from sharding.shards import SHARD_PATTERN, STRAY_PATTERN, NewShard, shard_name
from sharding.store import Ranges, check_bucket, connect, saying, split

if TYPE_CHECKING:
    from sharding.listing import Listing

PACKED = ".webdataset-packed"
PUBLISHING = b'{"publishing": true}\n'  # the plan of a run whose shards are all there
PART_SIZE, PARTS = 8 << 20, 4  # bytes of an upload that are sent at a time, and how many at once
_RUN = re.compile(r"(.*)/\.webdataset-([0-9a-f]{16})")  # how a run is named
_RECORD = re.compile(r"([0-9]+)-([0-9a-f]+)-([0-9a-f]{32})-([0-9a-f]{16})")


class Record(NamedTuple):
    """What the name of an object says of a finished shard."""

    key: str
    version: str  # of the shard, as `_version` gives it
    stamp: str  # of its files
    run: str  # that packed it


# ---------------------------------------------------------------- before a run


def check_output(output: str, listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    check_bucket(output)
    place, source = base(output), base(str(listing.source))
    if "tar" in listing.fields.known() and f"{place}/".startswith(f"{source}/"):
        inside = f"{argument('output')} {output!r} is inside {argument('source')}"
        raise InputError(f"{inside}, whose tars it could replace")
    names = [name for name in objects_at(output) if STRAY_PATTERN.fullmatch(name)]
    if strays := [name for name in names if not SHARD_PATTERN.fullmatch(name)]:
        found = f"{count(len(strays), 'object')} ({min(strays)!r})"
        warn(f"{output!r} has {found} not named like its shards, which readers may take for some")


def prepare(output: str, shard_ids: Container[int]) -> None:  # noqa: ARG001
    """Refuse to write single shards where a run is not finished."""
    if PLAN in objects_at(output):
        raise PackError(f"{output!r}: a run is not finished; finish it with --resume")


def settle(output: str) -> None:
    """Do nothing: what is uploaded is stored."""


def begin(
    output: str, plan: Plan, samples: Sequence[Sample], resume: bool
) -> tuple[str, Plan, int]:
    """Claim a prefix for a run; see `places.Output`."""
    run = secrets.token_hex(8)
    stream = io.BytesIO()
    plan = dump_plan(stream, plan._replace(run=run), samples)
    finish_cut(f"{output}/.webdataset-{run}")
    found = objects_at(output)
    if PLAN in found and (before := _read_header(output)):
        if not resume:
            begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(before.started))
            raise PackError(
                f"{output!r}: a run of {before.host} that began at {begun} has not ended; "
                "if it is dead, run the same command with --resume"
            )
        _take_over(output, stream.getvalue(), found[PLAN], same_samples(before, plan))
    else:
        if any(map(SHARD_PATTERN.fullmatch, found)):
            raise InputError(
                f"{argument('output')} {output!r} holds a dataset, and a store has no rename, so "
                "none is replaced: choose another, or delete that one first"
            )
        if resume:
            warn("nothing to resume; packing all shards")
        _claim(output, stream.getvalue(), run)
    return f"{output}/.webdataset-{run}", plan, -1


def _claim(output: str, data: bytes, run: str) -> None:
    """Create the plan, if there is none, in a store that looks whether there is one."""
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            obstore.put(store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:  # of another run; or ours, if the answer to it was lost
            before = _read_header(output)
            if not before or before.run != run:
                raise PackError(f"{output!r}: another run has just begun there") from None
        with contextlib.suppress(AlreadyExistsError):
            obstore.put(store, key, b"", mode="create", use_multipart=False)
            obstore.delete(store, key)
            raise InputError(
                f"{output!r}: this store ignores conditional writes (If-None-Match), so two runs "
                "would not see each other; pack into a folder, and copy that"
            )
    if any(map(SHARD_PATTERN.fullmatch, objects_at(output))):  # published meanwhile
        obstore.delete(store, key)
        raise PackError(f"{output!r}: another run has just published there")


def _take_over(output: str, data: bytes, before: Any, same: bool) -> None:
    """Put our plan in the place of an older one, unless that has changed meanwhile."""
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            mode: Any = {"e_tag": before["e_tag"]}
            obstore.put(store, key, data, mode=mode, use_multipart=False)
        except PreconditionError:
            raise PackError(f"{output!r}: another run has just taken it over") from None
    if not same:
        _drop_records(output)


def _read_header(output: str) -> Plan | None:
    """Return the first line of the plan at a prefix; None if its shards are all there."""
    with io.BufferedReader(Ranges(f"{output}/{PLAN}"), 64 << 10) as stream:
        return _load(stream, output)


def _load(stream: BinaryIO, output: str) -> Plan | None:
    line = stream.readline()
    return None if line == PUBLISHING else load_plan(io.BytesIO(line), f"{output}/{PLAN}")


# ---------------------------------------------------------------- packing


def read_plan(folder: str) -> Plan:
    """Return the plan of a run.

    Raises:
        PackError: the plan there is not its own any more.
    """
    output, run = _split_run(folder)
    with _opening(folder) as stream:
        plan = _load(stream, output)
    if not plan or plan.run != run:
        raise PackError(_gone(folder))
    return plan


def read_shard(folder: str, shard_id: int) -> list[Sample]:
    """Return the samples of one shard of a run."""
    check_own(folder)
    with _opening(folder) as stream:
        return load_shard(stream, shard_id, folder)


@contextlib.contextmanager
def _opening(folder: str) -> Iterator[BinaryIO]:
    """Open the plan that is where that of a run was."""
    output, _ = _split_run(folder)
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            raise PackError(_gone(folder)) from None
    raw = Ranges(f"{output}/{PLAN}", item["size"], item["e_tag"])
    with io.BufferedReader(raw, 64 << 10) as stream:
        yield stream


@functools.lru_cache(maxsize=4)
def _own_etag(folder: str) -> str | None:
    """Return the etag of the plan of a run, which is that of no other run's."""
    output, _ = _split_run(folder)
    store, key = _place(output, PLAN)
    with saying(output):
        etag = obstore.head(store, key)["e_tag"]
    read_plan(folder)
    return etag


def check_own(folder: str) -> None:
    """Raise a PackError if the plan is not that of this run any more."""
    output, _ = _split_run(folder)
    store, key = _place(output, PLAN)
    own = _own_etag(folder)
    with saying(output):
        try:
            etag = obstore.head(store, key)["e_tag"]
        except FileNotFoundError:
            etag = None
    if not own or etag != own:
        raise PackError(_gone(folder))


class _Upload(io.RawIOBase):
    """A stream to write to, whose bytes are uploaded in parts."""

    def __init__(self, writer: Any) -> None:
        super().__init__()
        self.writer = writer

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Take a copy of these bytes: obstore makes none, and their owner uses the buffer again."""
        self.writer.write(bytes(data))
        return len(data)


@contextlib.contextmanager
def new_shard(folder: str, shard_id: int) -> Iterator[NewShard]:
    """Upload a shard, which appears when the upload is completed, whole or not at all."""
    of_run = _RUN.fullmatch(folder)
    output = of_run[1] if of_run else folder
    store, key = _place(output, shard_name(shard_id))
    with saying(f"{output}/{shard_name(shard_id)}"):
        # An exception leaves the block of the writer, which then gives the upload up.
        with obstore.open_writer(
            store, key, buffer_size=PART_SIZE, max_concurrency=PARTS
        ) as writer:
            new = NewShard(_Upload(writer))  # type: ignore[arg-type]
            yield new
            if of_run:
                check_own(folder)
        found = obstore.head(store, key)  # the writer tells no etag
        new.path, new.size = f"{output}/{shard_name(shard_id)}", found["size"]
        if of_run:
            name = f"{shard_id}-{_version(found)}-{new.stamp}-{of_run[2]}"
            obstore.put(store, f"{_records_of(folder)}/{name}", b"")


@functools.lru_cache(maxsize=1)
def left_shards(folder: str) -> dict[int, list[Record]]:
    """Return what a run that was interrupted had finished; read once in a process."""
    return _records(folder)


def find_kept(folder: str, shard_id: int, stamp: str) -> tuple[str, int] | None:
    """Return URL and size of a shard that is finished, and was made of what the stamp tells."""
    output, _ = _split_run(folder)
    url = f"{output}/{shard_name(shard_id)}"
    store, key = _place(output, shard_name(shard_id))
    kept = None
    with saying(url):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            item = None
        for record in left_shards(folder).get(shard_id, []):
            if item and record.stamp == stamp and record.version == _version(item):
                kept = url, int(item["size"])
            else:
                obstore.delete(store, record.key)
    return kept


# ---------------------------------------------------------------- publishing


def kept_shards(folder: str) -> list[int]:
    """Return which shards another run had packed."""
    _, run = _split_run(folder)
    records = _records(folder).items()
    return [shard_id for shard_id, found in records if all(r.run != run for r in found)]


def publish(folder: str, plan: Plan) -> list[int]:
    """Make the shards of a run the dataset, and return their sizes; see `places.Output`."""
    check_own(folder)
    output, _ = _split_run(folder)
    items, records = objects_at(output), _records(folder)
    sizes, missing = [], []
    for shard_id in range(plan.total_shards):
        item = items.get(shard_name(shard_id))
        versions = [record.version for record in records.get(shard_id, [])]
        if item and _version(item) in versions:
            sizes.append(int(item["size"]))
        else:
            missing.append(shard_id)
    if missing:
        raise not_packed(plan, missing)
    store, key = _place(output, PLAN)
    with saying(output):
        extra = [name for name in items if _number(name) >= plan.total_shards]
        check_own(folder)
        obstore.delete(store, [_place(output, name)[1] for name in extra])
        try:  # from here on nobody can take the run over
            mode: Any = {"e_tag": _own_etag(folder)}
            obstore.put(store, key, PUBLISHING, mode=mode, use_multipart=False)
        except PreconditionError:
            raise PackError(_gone(folder)) from None
    finish_cut(folder)
    return sizes


def finish_cut(folder: str) -> bool:
    """Finish what is left to do for a run whose shards are all there, if that was cut short."""
    output, _ = _split_run(folder)
    if PLAN not in objects_at(output) or _read_header(output):
        return False
    store, key = _place(output, PLAN)
    with saying(output):
        obstore.delete(store, key)
    _drop_records(output)
    return True


def lock_output(output: str) -> int:  # noqa: ARG001
    """Do nothing: the plan is the lock."""
    return -1


def sees(folder: str) -> bool:
    """Tell whether the plan of a run can be read from here."""
    return bool(read_plan(folder))


# ---------------------------------------------------------------- names


def _place(output: str, name: str) -> tuple[Any, str]:
    """Return the store of an object at a prefix, and its key."""
    bucket, key = split(f"{output}/{name}")
    return connect(bucket), key


def _split_run(folder: str) -> tuple[str, str]:
    """Return the prefix of a run, and its id."""
    match = _RUN.fullmatch(folder)
    if not match:
        raise PackError(f"{folder!r} is no run: give what `python sharding start` printed")
    return match[1], match[2]


def _gone(folder: str) -> str:
    return f"{folder!r} is gone: the run was published, or another took it over"


def _number(name: str) -> int:
    match = SHARD_PATTERN.fullmatch(name)
    return int(match[1]) if match else -1


def _version(item: Any) -> str:
    """Return what tells a version of an object from others, for use in a name."""
    text = f"{item['size']} {item['e_tag']}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _records_of(folder: str) -> str:
    """Return where the records of a run's samples are: the key of a prefix."""
    output, _ = _split_run(folder)
    return _place(output, f"{PACKED}/{_digest(folder)}")[1]


@functools.lru_cache(maxsize=4)
def _digest(folder: str) -> str:
    return read_plan(folder).digest[:16]


def _records(folder: str) -> dict[int, list[Record]]:
    """Return the records of a run's samples: number of the shard -> them."""
    found: dict[int, list[Record]] = {}
    output, _ = _split_run(folder)
    store, _ = _place(output, PLAN)
    with saying(output):
        for item in obstore.list(store, _records_of(folder)).collect():
            if match := _RECORD.fullmatch(item["path"].rpartition("/")[2]):
                record = Record(item["path"], match[2], match[3], match[4])
                found.setdefault(int(match[1]), []).append(record)
    return found


def _drop_records(output: str) -> None:
    store, prefix = _place(output, PACKED)
    with saying(output):
        keys = [item["path"] for item in obstore.list(store, prefix).collect()]
        if keys:
            obstore.delete(store, keys)
