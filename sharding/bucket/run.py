"""A run that packs into a bucket: claim it, upload its shards, publish them. See `places.Output`.

While it is not finished, the bucket holds, besides the shards that are there:

    .webdataset-plan                                                its claim; see claim.py
    .webdataset-packed/<samples>/<shard>-<version>-<stamp>-<run>    empty: that shard is finished

The last of these names ends in "-kept" where the run has found the shard of a dead one still true.

Nothing but the shards is left in the end. Each is whole or not there: an upload is atomic. Before
and after a run completes one, it looks whether the claim is still its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import secrets
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import obstore

from sharding.bucket.claim import (
    PROBE,
    REMOVE,
    RUN,
    Mark,
    check_own,
    claim,
    locate,
    mark_published,
    open_plan,
    own_plan,
    probe,
    read_claim,
    split_run,
    swap,
)
from sharding.bucket.dataset import PLAN, UNFINISHED, objects_at
from sharding.bucket.store import check_bucket, delete, saying, version_of
from sharding.bucket.streams import Upload
from sharding.errors import AlreadyDone, InputError, PackError
from sharding.messages import argument, count, warn
from sharding.plan import (
    Plan,
    Published,
    differences,
    does_not_fit,
    dump_plan,
    is_array_job,
    load_samples,
    not_ended,
    not_packed,
)
from sharding.samples import Listing, Samples
from sharding.shards import (
    SHARD_PATTERN,
    STAMPED,
    STRAY_PATTERN,
    Left,
    NewShard,
    beyond,
    inside_source,
    shard_name,
    stamped,
    warn_of_more,
    warn_of_strays,
)
from sharding.urls import canonical, is_url

PACKED = ".webdataset-packed"
_RECORD = re.compile(rf"([0-9]+)-([0-9]+[.][0-9a-f]+)-{STAMPED}-([0-9a-f]{{16}})(-kept)?")


class Record(NamedTuple):
    """What the name of an object says of a finished shard."""

    key: str
    version: str  # of the shard, as `version_of` gives it
    stamp: str  # of its files
    dropped: int  # samples that are not in it
    run: str  # that packed it, or
    kept: bool  # found it still true


# ---------------------------------------------------------------- before a run


def check_output(output: str, listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    if "\\" in output:
        raise InputError(f"{argument('output')} {output!r}: some stores turn a backslash into /")
    check_bucket(output)
    source = canonical(listing.source)
    if is_url(source) and f"{canonical(output)}/".startswith(f"{source}/"):
        raise inside_source(output)
    names = [name for name in objects_at(output) if STRAY_PATTERN.fullmatch(name)]
    strays = [name for name in names if not SHARD_PATTERN.fullmatch(name)]
    warn_of_strays(output, "object", strays)


def prepare(output: str, shard_ids: Container[int], total_shards: int) -> None:  # noqa: ARG001
    """Refuse to write single shards where a run is not finished."""
    found = objects_at(output)
    if PLAN in found:
        raise PackError(f"{output!r}: {UNFINISHED}")
    warn_of_more(output, found, total_shards)


def begin(
    output: str, plan: Plan, samples: Samples, resume: bool, replace: bool
) -> tuple[str, Plan, None]:
    """Claim a prefix for a run; see `places.Output`."""
    run = secrets.token_hex(8)
    path = f"{output}/.webdataset-{run}"
    stream = io.BytesIO()
    plan = dump_plan(stream, plan._replace(run=run), samples)
    finished = finish_cut(path)
    if finished and resume:
        raise AlreadyDone
    found = objects_at(output)
    if PLAN in found:
        before, etag = read_claim(output)
        if not isinstance(before, Plan):
            raise PackError(f"{output!r}: another run is being published there")
        if not resume:
            raise not_ended(output, before)
        _check_left(output, before, plan, replace)
        probe(path)
        if not swap(path, stream.getvalue(), etag):
            raise PackError(f"{output!r}: another run has just taken it over")
        if replace and (records := _all_records(output)):
            delete(output, records)
    else:
        if any(map(SHARD_PATTERN.fullmatch, found)):
            nothing = "nothing to resume: " if resume else ""
            raise InputError(
                f"{nothing}{argument('output')} {output!r} holds a dataset, and a store has no "
                "rename, so none is replaced: choose another, or delete that one first"
            )
        probe(path)
        claim(path, stream.getvalue())
    return path, plan, None


def _check_left(output: str, before: Plan, plan: Plan, replace: bool) -> None:
    """Refuse to take over a run if shards that it had finished would be lost.

    Raises:
        InputError: they would.
        PackError: an array job had finished them, or is to be replaced.
    """
    differs = differences(before, plan)
    finished = len(_records(f"{output}/.webdataset-{before.run}"))
    if before.driver is None and (replace or (differs and finished)):
        raise is_array_job(output, before, differs, "delete all that is there")
    if differs and finished and not replace:
        raise does_not_fit(output, finished, differs)
    if replace and finished:
        warn(f"{count(finished, 'finished shard')} of the interrupted run will be packed afresh")
    elif differs:
        warn(f"not resumed but packed afresh: the interrupted run has {', '.join(differs)}")


# ---------------------------------------------------------------- packing


def read_plan(path: str) -> Plan:
    """Return the plan of a run.

    Raises:
        PackError: the plan there is not its own any more.
    """
    check_own(path)
    return own_plan(path)[0]


def read_samples(path: str, shard_id: int) -> Samples:
    """Return the samples of a shard of a run."""
    item = check_own(path)
    output, _ = split_run(path)
    with open_plan(output, item) as stream:
        return load_samples(stream, shard_id, f"{output}/{PLAN}", REMOVE)


@contextlib.contextmanager
def new_shard(path: str, shard_id: int) -> Iterator[NewShard]:
    """Upload a shard, which appears when the upload is completed, whole or not at all."""
    of_run = RUN.fullmatch(path)
    output, run = (of_run[1], of_run[2]) if of_run else (path, secrets.token_hex(8))
    url = f"{output}/{shard_name(shard_id)}"
    upload = Upload(url, {"run": run})
    new = NewShard(upload)  # type: ignore[arg-type]
    try:
        yield new
        if of_run:
            with saying(url, also=OSError):
                upload.writer.flush()  # so that little is left to do after the look at the plan
            check_own(path)
    except BaseException as error:
        with contextlib.suppress(Exception):  # the first error is the one to report
            upload.writer.__exit__(type(error), error, None)
        raise
    try:
        item = upload.complete()
    except PackError:
        if of_run:
            check_own(path)  # was it taken over? then that is the error
        raise
    new.path, new.size = url, upload.size
    if of_run:
        check_own(path)
        name = f"{shard_id}-{version_of(item)}-{new.stamp}-{run}"
        with saying(url):
            store, prefix = _records_of(path)
            obstore.put(store, f"{prefix}/{name}", b"")


@functools.lru_cache(maxsize=1)
def _left_shards(path: str) -> dict[int, list[Record]]:
    """Return what a run that was interrupted had finished; read once in a process."""
    return _records(path)


def find_left(path: str, shard_id: int, stamp: Callable[[], str]) -> Left | None:
    """Return what a dead run had finished of a shard; see `places.Output`."""
    records = _left_shards(path).get(shard_id, [])
    if not records:
        return None
    output, run = split_run(path)
    url = f"{output}/{shard_name(shard_id)}"
    store, key = locate(output, shard_name(shard_id))
    wanted, left = stamp(), Left()
    with saying(url):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            item = None
        for record in records:
            if item and record.stamp == wanted and record.version == version_of(item):
                left = Left(url, int(item["size"]), record.dropped)
                if record.run != run:
                    made_of = stamped(wanted, record.dropped)
                    name = f"{shard_id}-{record.version}-{made_of}-{run}-kept"
                    obstore.put(store, f"{_records_of(path)[1]}/{name}", b"")
            else:
                delete(output, record.key)
    return left


# ---------------------------------------------------------------- publishing


def publish(path: str, lock: int | None) -> Published:  # noqa: ARG001  # the plan is the lock
    """Make the shards of a run the dataset; see `places.Output`."""
    try:
        plan = read_plan(path)
    except PackError:
        if finish_cut(path):
            raise AlreadyDone from None
        raise
    output, run = split_run(path)
    items, records = objects_at(output), _records(path)
    packed, missing, dropped = {}, [], 0
    for shard_id in range(plan.total_shards):
        item = items.get(shard_name(shard_id))
        # What a dead run had packed counts once this one has found that it is still true.
        own = {record.version: record for record in records.get(shard_id, []) if record.run == run}
        if item and (record := own.get(version_of(item))):
            packed[shard_name(shard_id)] = item
            dropped += record.dropped
        else:
            missing.append(shard_id)
    if missing:
        raise not_packed(plan, missing)
    mark_published(path, len(packed))
    finish_cut(path)
    _check_published(output, packed)
    return Published(plan, [int(item["size"]) for item in packed.values()], dropped=dropped)


def _check_published(output: str, packed: dict[str, Any]) -> None:
    """Look whether a prefix holds what was published; a store's word alone is not enough.

    Raises:
        PackError: it says what is there.
    """
    now = objects_at(output)
    if PLAN in now:
        raise PackError(
            f"{output!r}: all shards are there, but so is the plan of the run, {PLAN!r}, which "
            "the store had said was replaced; nobody reads them: run again with --resume"
        )
    wrong = [
        n for n, was in packed.items() if n not in now or version_of(now[n]) != version_of(was)
    ]
    if wrong:
        what = "was replaced meanwhile" if wrong[0] in now else "is not there any more"
        more = f" (and {count(len(wrong) - 1, 'other shard')})" if wrong[1:] else ""
        raise PackError(f"{output!r}: {wrong[0]!r}{more} {what}; delete all shards and pack again")


def finish_cut(path: str) -> bool:
    """Finish what is left to do for a run whose shards are all there, if that was cut short.

    The mark goes last: whoever comes after a kill finds what is left to do.
    """
    output, _ = split_run(path)
    mark, _ = read_claim(output)
    if not isinstance(mark, Mark):
        return False
    with saying(output):
        found = objects_at(output)
        # Of a run into more shards, and of runs that were killed while they tried the store.
        names = [*beyond(found, mark.total_shards), *(n for n in found if n.startswith(PROBE))]
        left = [*_all_records(output), *(locate(output, name)[1] for name in names)]
        if left:
            delete(output, left)
        still = sorted(set(names).intersection(objects_at(output))) if names else []
        if not still:
            delete(output, locate(output, PLAN)[1])
            still = [PLAN] if read_claim(output)[0] else []
    if still:
        raise PackError(
            f"{output!r}: all shards are there, but so is {still[0]!r}, which the store had said "
            "was deleted; nobody reads them: delete it, and run again with --resume"
        )
    return True


# ---------------------------------------------------------------- records


def _records_of(path: str) -> tuple[Any, str]:
    """Return where the records of a run's samples are: the store, and a prefix of keys."""
    output, _ = split_run(path)
    return locate(output, f"{PACKED}/{_digest(path)}")


@functools.lru_cache(maxsize=4)
def _digest(path: str) -> str:
    """Return what tells the shards of a run from those of other samples."""
    plan = read_plan(path)
    what = f"{plan.source} {plan.fields} {plan.total_shards} {plan.digest}"
    if plan.transform:
        what += f" {plan.transform.name} {plan.transform.digest}"
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


def _all_records(output: str) -> list[str]:
    """Return the keys of all records at a prefix, of whatever samples."""
    store, prefix = locate(output, PACKED)
    with saying(output):
        return [item["path"] for item in obstore.list(store, prefix).collect()]


def _records(path: str) -> dict[int, list[Record]]:
    """Return the records of a run's samples: number of the shard -> them."""
    found: dict[int, list[Record]] = {}
    output, _ = split_run(path)
    store, prefix = _records_of(path)
    with saying(output):
        for item in obstore.list(store, prefix).collect():
            if match := _RECORD.fullmatch(item["path"].rpartition("/")[2]):
                dropped, kept = int(match[4] or 0), bool(match[6])
                record = Record(item["path"], match[2], match[3], dropped, match[5], kept)
                found.setdefault(int(match[1]), []).append(record)
    return found
