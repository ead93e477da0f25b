"""The claim of a run on a prefix of a bucket: its plan, which is lock, plan and mark in one.

A store has no rename and no lock that dies with its holder. So while a run is not finished, its
plan stands beside the shards, and nobody reads the dataset. It is created only if there is none. A
run that takes another one over replaces it, if it is still the plan that was read, and so fences
the older run, which looks whether the plan is still its own. When all shards are there, a mark
takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from sharding.bucket import PLAN, objects_at
from sharding.errors import InputError, PackError
from sharding.plan import Plan, load_plan, no_run
from sharding.shards import SHARD_PATTERN
from sharding.store import connect, saying, split
from sharding.streams import Ranges

RUN = re.compile(r"(.*)/\.webdataset-([0-9a-f]{16})")  # how a run is named: its prefix, its id
_MARK = re.compile(rb"published by ([0-9a-f]{16}): ([0-9]+)\n")


class Mark(NamedTuple):
    """What stands in place of the plan of a run whose shards are all there."""

    run: str
    total_shards: int


def read_claim(output: str) -> tuple[Plan | Mark | None, str | None]:
    """Return the first line of what stands at a prefix as its plan, and its etag."""
    store, key = place(output, PLAN)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            return None, None
    with open_plan(output, item) as stream:
        line = stream.readline()
    if mark := _MARK.fullmatch(line):
        return Mark(mark[1].decode(), int(mark[2])), item["e_tag"]
    return load_plan(io.BytesIO(line), f"{output}/{PLAN}"), item["e_tag"]


def open_plan(output: str, item: Any) -> io.BufferedReader:
    """Open the plan at a prefix, of the version that the store has told of."""
    return io.BufferedReader(Ranges(f"{output}/{PLAN}", item["size"], item["e_tag"]), 64 << 10)


def claim(folder: str, data: bytes) -> None:
    """Create the plan of a run if there is none; refuse a store that would overwrite one."""
    output, run = split_run(folder)
    store, key = place(output, PLAN)
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


def swap(folder: str, data: bytes, etag: str | None) -> bool:
    """Replace the plan by data of a run if it still has this etag; tell whether it had."""
    output, run = split_run(folder)
    store, key = place(output, PLAN)
    with saying(output):
        try:
            mode: Any = {"e_tag": etag}
            obstore.put(store, key, data, mode=mode, use_multipart=False)
        except PreconditionError:  # or the answer to a first attempt was lost
            return _owner(output) == run
        except FileNotFoundError:
            return False
    return True


@functools.lru_cache(maxsize=4)
def own_plan(folder: str) -> tuple[Plan, str | None]:
    """Return the plan of a run, and its etag, which no other run's plan has."""
    output, run = split_run(folder)
    plan, etag = read_claim(output)
    if not isinstance(plan, Plan) or plan.run != run:
        raise _gone(folder)
    return plan, etag


def check_own(folder: str) -> Any:
    """Return what the store says of the plan of a run, now.

    Raises:
        PackError: it is not that of this run any more.
    """
    output, _ = split_run(folder)
    store, key = place(output, PLAN)
    _, own = own_plan(folder)
    with saying(output):
        try:
            item = obstore.head(store, key)
        except FileNotFoundError:
            raise _gone(folder) from None
    if not own or item["e_tag"] != own:
        raise _gone(folder)
    return item


def mark_published(folder: str, total_shards: int) -> None:
    """Put a mark in the place of a run's plan; from then on nobody can take the run over."""
    _, run = split_run(folder)
    mark = b"published by %s: %d\n" % (run.encode(), total_shards)
    if not swap(folder, mark, own_plan(folder)[1]):
        raise _gone(folder)


# ---------------------------------------------------------------- names


def place(output: str, name: str) -> tuple[Any, str]:
    """Return the store of an object at a prefix, and its key."""
    bucket, key = split(f"{output}/{name}")
    return connect(bucket), key


def split_run(folder: str) -> tuple[str, str]:
    """Return the prefix of a run, and its id."""
    match = RUN.fullmatch(folder)
    if not match:
        raise no_run(folder)
    return match[1], match[2]


def _owner(output: str) -> str:
    """Return the id of the run whose plan, or mark, stands at a prefix, if any."""
    found, _ = read_claim(output)
    return found.run if found else ""


def _gone(folder: str) -> PackError:
    return PackError(f"{folder!r} is gone: the run was published, or another took it over")
