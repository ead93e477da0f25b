"""A run that packs into a bucket: claim it, upload its shards, publish them. See `places.Output`.

While it is not finished, the bucket holds, besides the shards that are there:

    .webdataset-plan                                                its claim; see claim.py
    .webdataset-packed/<samples>/<shard>-<version>-<stamp>-<run>    a note: that shard is finished

The last of these names ends in "-kept" where the run has found the shard of a dead one still true.

Nothing but the shards and their record is left in the end. Each is whole or not there: an upload is
atomic. Before and after a run completes one, it looks whether the claim is still its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import secrets
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import obstore

from sharding import previous, record
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
from sharding.bucket.dataset import PLAN, UNFINISHED, objects_at, write_record
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
from sharding.record import Staged, dump_fields, load_fields
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
NOTE_THREADS = 16  # each waits for a store; only where a function made the shards
_NOTE = re.compile(rf"([0-9]+)-([0-9]+[.][0-9a-f]+)-{STAMPED}-([0-9a-f]{{16}})(-kept)?")


class Note(NamedTuple):
    """What the name of an object says of a finished shard."""

    key: str
    version: str  # of the shard, as `version_of` gives it
    stamp: str  # of its files
    dropped: int | None  # samples, by a function; the note then holds the fields that came out
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
        if replace and (notes := _all_notes(output)):
            delete(output, notes)
    else:
        if any(map(SHARD_PATTERN.fullmatch, found)):
            look = resume and not replace
            differs = previous.check_complete(output, plan, samples) if look else []
            other = f" with {', '.join(differs)}" if differs else ""
            raise InputError(
                f"{argument('output')} {output!r} holds a dataset{other}, and a store has no "
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
    differs = differences(before.made, plan.made)
    finished = len(_notes(f"{output}/.webdataset-{before.run}"))
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
        new.size = upload.size
        new.before()
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
    new.path = url
    if of_run:
        check_own(path)
        name = f"{shard_id}-{version_of(item)}-{new.stamp}-{run}"
        with saying(url):
            store, prefix = _notes_at(path)
            obstore.put(store, f"{prefix}/{name}", dump_fields(new.fields))


@functools.lru_cache(maxsize=1)
def _left_shards(path: str) -> dict[int, list[Note]]:
    """Return what a run that was interrupted had finished; read once in a process."""
    return _notes(path)


def find_left(path: str, shard_id: int, stamp: Callable[[], str]) -> Left | None:
    """Return what a dead run had finished of a shard; see `places.Output`."""
    notes = _left_shards(path).get(shard_id, [])
    if not notes:
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
        for one in notes:
            if item and one.stamp == wanted and one.version == version_of(item):
                left = Left(url, int(item["size"]), one.dropped or 0)
                if one.run != run:
                    name = f"{shard_id}-{one.version}-{stamped(wanted, one.dropped)}-{run}-kept"
                    obstore.put(store, f"{_notes_at(path)[1]}/{name}", _held(store, one))
            else:
                delete(output, one.key)
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
    items, notes = objects_at(output), _notes(path)
    packed, own, missing = {}, [], []
    for shard_id in range(plan.total_shards):
        item = items.get(shard_name(shard_id))
        # What a dead run had packed counts once this one has found that it is still true.
        versions = {one.version: one for one in notes.get(shard_id, []) if one.run == run}
        if item and (one := versions.get(version_of(item))):
            packed[shard_name(shard_id)] = item
            own.append(one)
        else:
            missing.append(shard_id)
    if missing:
        raise not_packed(plan, missing)
    sizes = [int(item["size"]) for item in packed.values()]
    with ThreadPoolExecutor(NOTE_THREADS) as pool:
        said = pool.map(functools.partial(_said, locate(output, PACKED)[0]), own, sizes)
        mark_published(path, len(packed), record.dump(record.of_run(plan, said)))
    finish_cut(path)
    _check_published(output, packed)
    return Published(plan, sizes, dropped=sum(one.dropped or 0 for one in own))


def _said(store: Any, note: Note, size: int) -> Staged:
    """Return what a note says of a shard of this size, for the record."""
    with saying(note.key):
        fields = load_fields(_held(store, note)) if note.dropped is not None else {}
    return Staged(size, note.stamp, note.dropped or 0, fields)


def _held(store: Any, note: Note) -> bytes:
    """Return what a note holds: something where a function made the shard."""
    return b"" if note.dropped is None else bytes(obstore.get(store, note.key).bytes())


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

    The mark, which holds the record, goes last: whoever comes after a kill finds what is left to
    do, and while the mark stands nobody looks at a record.
    """
    output, _ = split_run(path)
    mark, _ = read_claim(output)
    if not isinstance(mark, Mark):
        return False
    with saying(output):
        found = objects_at(output)
        # Of a run into more shards, and of runs that were killed while they tried the store.
        names = [*beyond(found, mark.total_shards), *(n for n in found if n.startswith(PROBE))]
        left = [*_all_notes(output), *(locate(output, name)[1] for name in names)]
        if left:
            delete(output, left)
        still = sorted(set(names).intersection(objects_at(output))) if names else []
        if not still:
            write_record(output, mark.record or None)
            delete(output, locate(output, PLAN)[1])
            still = [PLAN] if read_claim(output)[0] else []
    if still:
        raise PackError(
            f"{output!r}: all shards are there, but so is {still[0]!r}, which the store had said "
            "was deleted; nobody reads them: delete it, and run again with --resume"
        )
    return True


# ---------------------------------------------------------------- notes of finished shards


def _notes_at(path: str) -> tuple[Any, str]:
    """Return where the notes of a run's samples are: the store, and a prefix of keys."""
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


def _all_notes(output: str) -> list[str]:
    """Return the keys of all notes at a prefix, of whatever samples."""
    store, prefix = locate(output, PACKED)
    with saying(output):
        return [item["path"] for item in obstore.list(store, prefix).collect()]


def _notes(path: str) -> dict[int, list[Note]]:
    """Return the notes of a run's samples: number of the shard -> them."""
    found: dict[int, list[Note]] = {}
    output, _ = split_run(path)
    store, prefix = _notes_at(path)
    with saying(output):
        for item in obstore.list(store, prefix).collect():
            if match := _NOTE.fullmatch(item["path"].rpartition("/")[2]):
                dropped = None if match[4] is None else int(match[4])
                one = Note(item["path"], match[2], match[3], dropped, match[5], bool(match[6]))
                found.setdefault(int(match[1]), []).append(one)
    return found
