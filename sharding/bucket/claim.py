"""The claim of a run on a prefix of a bucket: its plan, which is lock, plan and mark in one.

A store has no rename and no lock that dies with its holder. So while a run is not finished, its
plan stands beside the shards, and nobody reads the dataset. It is created only if there is none. A
run that takes another one over replaces it, if it is still the plan that was read, and so fences
the older run, which looks whether the plan is still its own. When all shards are there, a mark
takes its place. Whether a store can do all that is tried before any work.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from sharding.bucket.dataset import PLAN, objects_at
from sharding.bucket.schemes import Scheme, scheme_of
from sharding.bucket.store import connect, delete, quoted, saying, split, status_of, version_of
from sharding.bucket.streams import Ranges
from sharding.errors import InputError, PackError
from sharding.plan import Plan, load_plan, no_run
from sharding.shards import SHARD_PATTERN

REMOVE = "it and all objects beside it"  # to give up a run whose plan is damaged
PROBE = ".webdataset-probe-"  # and the id of a run: what it tries a store on

RUN = re.compile(r"(.*)/\.webdataset-([0-9a-f]{16})")  # how a run is named: its prefix, its id
_MARK = re.compile(rb"published by ([0-9a-f]{16}): ([0-9]+)\n")  # and the dataset's record


class Mark(NamedTuple):
    """What stands in place of the plan of a run whose shards are all there."""

    run: str
    total_shards: int
    record: bytes  # of the dataset


def read_claim(output: str) -> tuple[Plan | Mark | None, str | None]:
    """Return the first line of what stands at a prefix as its plan, and its etag."""
    store, key = locate(output, PLAN)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            return None, None
    with open_plan(output, item) as stream:
        line = stream.readline()
        if mark := _MARK.fullmatch(line):
            return Mark(mark[1].decode(), int(mark[2]), stream.read()), quoted(item["e_tag"])
    return load_plan(io.BytesIO(line), f"{output}/{PLAN}", REMOVE), quoted(item["e_tag"])


def open_plan(output: str, item: Any) -> io.BufferedReader:
    """Open the plan at a prefix, of the version that the store has told of."""
    return io.BufferedReader(Ranges(f"{output}/{PLAN}", item["size"], item["e_tag"]), 64 << 10)


def probe(path: str) -> None:
    """Try what a run needs of a store, on an object of the run's own; before any work.

    Raises:
        InputError: the store does not do all of it. Nothing is left there.
    """
    output, run = split_run(path)
    bucket, key = split(f"{output}/{PROBE}{run}")
    store = connect(bucket, patient=False)
    scheme = scheme_of(output)
    with saying(output, InputError):
        try:
            lack = _find_lack(scheme, store, key, run)
        finally:
            with contextlib.suppress(PackError):
                delete(output, key)
        if not lack and _look(store, key):
            lack = f"deletes nothing (do the credentials allow {scheme.deleting}?)"
    if lack:
        raise InputError(
            f"{output!r}: this store {lack}, so no run is safe there; "
            "pack into a folder, and copy that"
        )


def claim(path: str, data: bytes) -> None:
    """Create the plan of a run if there is none."""
    output, run = split_run(path)
    store, key = locate(output, PLAN)
    with saying(output):
        if not _put_if(store, key, run, data):
            raise PackError(f"{output!r}: another run has just begun there")
        if any(map(SHARD_PATTERN.fullmatch, objects_at(output))):  # published meanwhile
            delete(output, key)
            raise PackError(f"{output!r}: another run has just published there")


def swap(path: str, data: bytes, etag: str | None) -> bool:
    """Replace the plan by data of a run if it still has this etag; tell whether it had."""
    output, run = split_run(path)
    store, key = locate(output, PLAN)
    spellings = scheme_of(output).spellings(etag or "")
    with saying(output):
        return bool(etag and _put_if(store, key, run, data, *spellings))


@functools.lru_cache(maxsize=4)
def own_plan(path: str) -> tuple[Plan, str | None]:
    """Return the plan of a run, and its etag, which no other run's plan has."""
    output, run = split_run(path)
    plan, etag = read_claim(output)
    if not isinstance(plan, Plan) or plan.run != run:
        raise _gone(path)
    return plan, etag


def check_own(path: str) -> Any:
    """Return what the store says of the plan of a run, now.

    Raises:
        PackError: it is not that of this run any more.
    """
    output, _ = split_run(path)
    store, key = locate(output, PLAN)
    _, own = own_plan(path)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            raise _gone(path) from None
    if not own or quoted(item["e_tag"]) != own:
        raise _gone(path)
    return item


def mark_published(path: str, total_shards: int, record: bytes | None) -> None:
    """Put a mark in the place of a run's plan; from then on nobody can take the run over.

    It holds the record, so that whoever comes after a kill can put that beside the shards.
    """
    output, run = split_run(path)
    mark = b"published by %s: %d\n%s" % (run.encode(), total_shards, record or b"")
    if not swap(path, mark, own_plan(path)[1]):
        check_own(path)
        why = f"the store refuses to replace {PLAN!r} (If-Match), though no other run has"
        raise PackError(f"{output!r}: {why}; nothing is published")


# ---------------------------------------------------------------- conditional writes


def _put_if(store: Any, key: str, run: str, data: bytes, *etags: str) -> str | None:
    """Put an object in place of the one with an etag, or of none; return its own etag.

    None means that something else stands there. A refusal does not say so: it may answer a second
    attempt, after the answer to the first was lost; and some stores know an etag only without its
    quotes. A look at what stands there does.

    Args:
        etags: spellings of the etag; the next is tried if one is refused while the etag holds.
    """
    absent = (FileNotFoundError,) if etags else ()
    modes: list[Any] = [{"e_tag": etag} for etag in etags] or ["create"]
    for mode in modes:
        try:
            options: Any = {"mode": mode, "attributes": {"run": run}, "use_multipart": False}
            return quoted(obstore.put(store, key, data, **options)["e_tag"])
        except (AlreadyExistsError, PreconditionError, *absent):
            found = _look(store, key)
        if not found:
            break
        now = quoted(found.meta["e_tag"])
        if found.meta["size"] == len(data) and bytes(found.bytes()) == data:
            return now
        if not etags or now != quoted(etags[0]):
            break
    return None


def _look(store: Any, key: str) -> Any:
    """Return what stands at a key, if anything does."""
    try:
        return obstore.get(store, key)
    except FileNotFoundError:
        return None


def _find_lack(scheme: Scheme, store: Any, key: str, run: str) -> str | None:
    """Return what a store does not do of that which runs need."""
    condition = "If-None-Match"
    try:
        first = _put_if(store, key, run, b"first")
        if not first:
            return f"refuses conditional writes ({condition})"
        if _put_if(store, key, run, b"not the first"):
            return f"ignores conditional writes ({condition})"
        condition = "If-Match"
        for etag in scheme.spellings(first):
            if _put_if(store, key, run, b"second", etag):
                break
        else:
            return f"refuses conditional writes ({condition})"
        if _put_if(store, key, run, b"not the second", etag):
            return f"ignores conditional writes ({condition})"
    except BaseError as error:
        if status_of(error) not in ("400", "405", "501"):
            raise
        return f"refuses conditional writes ({condition})"
    found = obstore.get(store, key, options={"head": True})
    if found.attributes.get("run") != run:
        return f"drops metadata ({scheme.metadata})"
    # What follows the name without its last letter is that name, usually.
    pages = obstore.list(store, os.path.dirname(key) or None, offset=key[:-1], chunk_size=1)
    listed = next((item for page in pages for item in page if item["path"] == key), None)
    if not listed or version_of(listed) != version_of(found.meta):
        return f"lists a new object {'with another ETag' if listed else 'late'}"
    return None


# ---------------------------------------------------------------- names


def locate(output: str, name: str) -> tuple[Any, str]:
    """Return the store of an object at a prefix, and its key."""
    bucket, key = split(f"{output}/{name}")
    return connect(bucket), key


def split_run(path: str) -> tuple[str, str]:
    """Return the prefix of a run, and its id."""
    match = RUN.fullmatch(path)
    if not match:
        raise no_run(path)
    return match[1], match[2]


def _gone(path: str) -> PackError:
    return PackError(f"{path!r} is gone: the run was published, or another took it over")
