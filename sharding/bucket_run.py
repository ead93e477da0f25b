"""A run that packs into a bucket: claimed by its plan, packed shard by shard, published. See
`places.Output`.

A store has no rename and no lock that dies with its holder. So while a run is not finished, its
plan stands beside the shards: it is lock, plan and mark in one, and nobody reads the dataset.

    .webdataset-plan                                 created only if there is none
    .webdataset-packed/<samples>/<shard>-<version>-<stamp>-<run>    empty: that shard is finished
    shard-000007.tar                                 whole or not there: an upload is atomic

Nothing but the shards is left in the end. With --resume a run takes the plan over, which fences the
older run: before and after it completes an upload, it looks whether the plan is still its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import secrets
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from sharding.bucket import PLAN, UNFINISHED, objects_at
from sharding.errors import AlreadyDone, InputError, PackError, argument, warn
from sharding.plan import Plan, can_resume, dump_plan, load_plan, load_shards, not_packed
from sharding.samples import Sample
from sharding.shards import (
    SHARD_PATTERN,
    STRAY_PATTERN,
    NewShard,
    shard_name,
    shard_number,
    warn_of_more,
    warn_of_strays,
)
from sharding.store import Ranges, check_bucket, connect, saying, split, version_of
from sharding.urls import canonical, is_url

if TYPE_CHECKING:
    from sharding.listing import Listing

PACKED = ".webdataset-packed"
_MARK = re.compile(rb"published by ([0-9a-f]{16}): ([0-9]+)\n")  # in place of a plan; see Mark
PART_SIZE, PARTS = 8 << 20, 4  # bytes of an upload that are sent at a time, and how many at once
MAX_PARTS = 10_000  # of an upload
_RUN = re.compile(r"(.*)/\.webdataset-([0-9a-f]{16})")  # how a run is named
_RECORD = re.compile(r"([0-9]+)-([0-9]+[.][0-9a-f]+)-([0-9a-f]{32})-([0-9a-f]{16})")


class Record(NamedTuple):
    """What the name of an object says of a finished shard."""

    key: str
    version: str  # of the shard, as `version_of` gives it
    stamp: str  # of its files
    run: str  # that packed it


class Mark(NamedTuple):
    """What stands in place of the plan of a run whose shards are all there."""

    run: str
    total_shards: int


# ---------------------------------------------------------------- before a run


def check_output(output: str, listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    if "\\" in output:
        raise InputError(f"{argument('output')} {output!r}: some stores turn a backslash into /")
    check_bucket(output)
    tars = is_url(listing.source) and "tar" in listing.fields.known()
    if tars and f"{canonical(output)}/".startswith(f"{listing.source}/"):
        inside = f"{argument('output')} {output!r} is inside {argument('source')}"
        raise InputError(f"{inside}, whose tars it could replace")
    names = [name for name in objects_at(output) if STRAY_PATTERN.fullmatch(name)]
    strays = [name for name in names if not SHARD_PATTERN.fullmatch(name)]
    warn_of_strays(output, "object", strays)


def prepare(output: str, shard_ids: Container[int], total_shards: int) -> None:  # noqa: ARG001
    """Refuse to write single shards where a run is not finished."""
    found = objects_at(output)
    if PLAN in found:
        raise PackError(f"{output!r}: {UNFINISHED}")
    warn_of_more(output, found, total_shards)


def settle(output: str) -> None:
    """Do nothing: what is uploaded is stored."""


def begin(
    output: str, plan: Plan, samples: Sequence[Sample], resume: bool
) -> tuple[str, Plan, int]:
    """Claim a prefix for a run; see `places.Output`."""
    run = secrets.token_hex(8)
    folder = f"{output}/.webdataset-{run}"
    stream = io.BytesIO()
    plan = dump_plan(stream, plan._replace(run=run), samples)
    finished = finish_cut(folder)
    if finished and resume:
        raise AlreadyDone
    found = objects_at(output)
    if PLAN in found:
        before, etag = _read_plan(output)
        if not isinstance(before, Plan):
            raise PackError(f"{output!r}: another run is just being published there")
        if not resume:
            raise PackError(
                f"{output!r}: a run of {before.host} that began at {before.begun} has not ended; "
                "if it is dead, run the same command with --resume"
            )
        others = len(_records(f"{output}/.webdataset-{before.run}"))
        can_resume(before, plan, others, "delete all that is there, then leave it out")
        if not _swap(output, stream.getvalue(), etag, run):
            raise PackError(f"{output!r}: another run has just taken it over")
    else:
        if any(map(SHARD_PATTERN.fullmatch, found)):
            raise InputError(
                f"{argument('output')} {output!r} holds a dataset, and a store has no rename, so "
                "none is replaced: choose another, or delete that one first"
            )
        if resume:
            warn("nothing to resume; packing all shards")
        _claim(output, stream.getvalue(), run)
    return folder, plan, -1


def _claim(output: str, data: bytes, run: str) -> None:
    """Create the plan if there is none; refuse a store that would overwrite one."""
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            obstore.put(store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:  # of another run; or ours, if the answer to it was lost
            if _owner(output) != run:
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


def _swap(output: str, data: bytes, etag: str | None, run: str) -> bool:
    """Replace the plan by data of a run if it still has this etag; tell whether it had."""
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            mode: Any = {"e_tag": etag}
            obstore.put(store, key, data, mode=mode, use_multipart=False)
        except PreconditionError:  # or the answer to a first attempt was lost
            return _owner(output) == run
        except FileNotFoundError:
            return False
    return True


def _read_plan(output: str) -> tuple[Plan | Mark | None, str | None]:
    """Return the first line of what stands at a prefix as its plan, and its etag."""
    store, key = _place(output, PLAN)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            return None, None
    raw = Ranges(f"{output}/{PLAN}", item["size"], item["e_tag"])
    with io.BufferedReader(raw, 64 << 10) as stream:
        line = stream.readline()
    if mark := _MARK.fullmatch(line):
        return Mark(mark[1].decode(), int(mark[2])), item["e_tag"]
    plan = load_plan(io.BytesIO(line), f"{output}/{PLAN}")
    return plan, item["e_tag"]


def _owner(output: str) -> str:
    """Return the id of the run whose plan, or mark, stands at a prefix, if any."""
    found, _ = _read_plan(output)
    return found.run if found else ""


# ---------------------------------------------------------------- packing


def read_plan(folder: str) -> Plan:
    """Return the plan of a run.

    Raises:
        PackError: the plan there is not its own any more.
    """
    check_own(folder)
    return _own(folder)[0]


@functools.lru_cache(maxsize=4)
def _own(folder: str) -> tuple[Plan, str | None]:
    """Return the plan of a run, and its etag, which no other run's plan has."""
    output, run = _split_run(folder)
    plan, etag = _read_plan(output)
    if not isinstance(plan, Plan) or plan.run != run:
        raise PackError(_gone(folder))
    return plan, etag


def check_own(folder: str) -> Any:
    """Return what the store says of the plan of a run.

    Raises:
        PackError: it is not that of this run any more.
    """
    output, _ = _split_run(folder)
    store, key = _place(output, PLAN)
    _, own = _own(folder)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            raise PackError(_gone(folder)) from None
    if not own or item["e_tag"] != own:
        raise PackError(_gone(folder))
    return item


def read_shards(folder: str, shard_ids: Iterable[int]) -> Iterator[list[Sample]]:
    """Yield the samples of shards of a run."""
    item = check_own(folder)
    output, _ = _split_run(folder)
    raw = Ranges(f"{output}/{PLAN}", item["size"], item["e_tag"])
    with io.BufferedReader(raw, 64 << 10) as stream:
        yield from load_shards(stream, shard_ids, f"{output}/{PLAN}")


class _Upload(io.RawIOBase):
    """A stream to write to, whose bytes are uploaded in parts."""

    def __init__(self, url: str, writer: Any) -> None:
        super().__init__()
        self.url = url
        self.writer = writer
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


@contextlib.contextmanager
def new_shard(folder: str, shard_id: int) -> Iterator[NewShard]:
    """Upload a shard, which appears when the upload is completed, whole or not at all."""
    of_run = _RUN.fullmatch(folder)
    output, run = (of_run[1], of_run[2]) if of_run else (folder, secrets.token_hex(8))
    url = f"{output}/{shard_name(shard_id)}"
    store, key = _place(output, shard_name(shard_id))
    writer = obstore.open_writer(
        store, key, buffer_size=PART_SIZE, max_concurrency=PARTS, attributes={"run": run}
    )
    upload = _Upload(url, writer)
    new = NewShard(upload)  # type: ignore[arg-type]
    try:
        yield new
        if of_run:
            with saying(url, also=OSError):
                writer.flush()  # so that little is left to do after the look at the plan
            check_own(folder)
    except BaseException as error:
        with contextlib.suppress(Exception):  # the first error is the one to report
            writer.__exit__(type(error), error, None)
        raise
    with saying(url, also=OSError):
        writer.close()
        found = obstore.get(store, key, options={"head": True})  # the writer gives no etag
    if found.attributes.get("run") != run or found.meta["size"] != upload.size:
        raise PackError(f"{url!r}: another run has replaced it; run again with --resume")
    new.path, new.size = url, upload.size
    if of_run:
        check_own(folder)
        name = f"{shard_id}-{version_of(found.meta)}-{new.stamp}-{run}"
        with saying(url):
            obstore.put(store, f"{_records_of(folder)[1]}/{name}", b"")


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
            if item and record.stamp == stamp and record.version == version_of(item):
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


def count_published(output: str) -> int:  # noqa: ARG001
    """Return 0: a finished dataset is never replaced."""
    return 0


def publish(folder: str, plan: Plan) -> list[int]:
    """Make the shards of a run the dataset, and return their sizes; see `places.Output`."""
    check_own(folder)
    output, run = _split_run(folder)
    items, records = objects_at(output), _records(folder)
    sizes, missing = [], []
    for shard_id in range(plan.total_shards):
        item = items.get(shard_name(shard_id))
        versions = [record.version for record in records.get(shard_id, [])]
        if item and version_of(item) in versions:
            sizes.append(int(item["size"]))
        else:
            missing.append(shard_id)
    if missing:
        raise not_packed(plan, missing)
    # From here on nobody can take the run over.
    if not _swap(
        output, b"published by %s: %d\n" % (run.encode(), len(sizes)), _own(folder)[1], run
    ):
        raise PackError(_gone(folder))
    finish_cut(folder)
    return sizes


def finish_cut(folder: str) -> bool:
    """Finish what is left to do for a run whose shards are all there, if that was cut short.

    The mark goes last: whoever comes after a kill finds what is left to do.
    """
    output, _ = _split_run(folder)
    mark, _ = _read_plan(output)
    if not isinstance(mark, Mark):
        return False
    store, prefix = _place(output, PACKED)
    with saying(output):
        left = [item["path"] for item in obstore.list(store, prefix).collect()]
        for name in filter(SHARD_PATTERN.fullmatch, objects_at(output)):
            if shard_number(name) >= mark.total_shards:  # of a run into more shards
                left.append(_place(output, name)[1])
        if left:
            obstore.delete(store, left)
        obstore.delete(store, _place(output, PLAN)[1])
    return True


def lock_output(output: str) -> int:  # noqa: ARG001
    """Do nothing: the plan is the lock."""
    return -1


def may_write(folder: str) -> bool:  # noqa: ARG001
    """Return True: only an upload would tell."""
    return True


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


def _records_of(folder: str) -> tuple[Any, str]:
    """Return where the records of a run's samples are: the store, and a prefix of keys."""
    output, _ = _split_run(folder)
    return _place(output, f"{PACKED}/{_digest(folder)}")


@functools.lru_cache(maxsize=4)
def _digest(folder: str) -> str:
    """Return what tells the shards of a run from those of other samples."""
    plan = read_plan(folder)
    what = f"{plan.source} {plan.fields} {plan.total_shards} {plan.digest}"
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


def _records(folder: str) -> dict[int, list[Record]]:
    """Return the records of a run's samples: number of the shard -> them."""
    found: dict[int, list[Record]] = {}
    output, _ = _split_run(folder)
    store, prefix = _records_of(folder)
    with saying(output):
        for item in obstore.list(store, prefix).collect():
            if match := _RECORD.fullmatch(item["path"].rpartition("/")[2]):
                record = Record(item["path"], match[2], match[3], match[4])
                found.setdefault(int(match[1]), []).append(record)
    return found
