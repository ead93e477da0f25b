"""The dataset that a run finds in its output: is it what the run would make, may it be replaced?

Comes in: the output, and the plan of the run with its samples. Goes out: nothing, or the error that
keeps the run from beginning. Nothing is written here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from sharding import record
from sharding.errors import AlreadyDone, InputError, PackError
from sharding.faults import SHOWN, quote
from sharding.messages import argument, count, warn
from sharding.places import dataset_at, source_at
from sharding.plan import Plan
from sharding.reading import count_shard, read_samples
from sharding.record import Record
from sharding.samples import Samples, deal
from sharding.shards import Found
from sharding.urls import real

STAMP_THREADS = 8  # most of the time, each waits for a disk or a server
COUNT_TIME = 5  # seconds to count the samples of a dataset that has no record


def check(output: str, plan: Plan, samples: Samples, resume: bool, replace: bool) -> None:
    """Find out whether a run is needed, and may replace the dataset in its output, if any.

    Raises:
        AlreadyDone: the run is to be resumed, and that dataset is what it would make.
        InputError: that is another dataset.
        PackError: its record is damaged.
    """
    if replace or not (found := _find(output)):
        return
    differs = _differences(output, found, plan, samples) if resume else []
    _refuse_other(output, found, plan, samples)
    if differs:
        warn(f"{output!r} is packed anew: the dataset there has {', '.join(differs)}")


def _refuse_other(output: str, found: Found, plan: Plan, samples: Samples) -> None:
    """Refuse to replace a dataset of another source, or of samples that are gone."""
    before = record.of_found(found, output)
    if before and not same_source(before, plan.source):
        what = f"a dataset of another source ({before.source!r}, not {plan.source!r})"
        raise _other(output, found, what, _keys_of(found.shards), before.samples)
    if before and before.digest == plan.digest:
        return
    if (keys := _keys_of(found.shards)) and set(keys).isdisjoint(samples.keys):
        what = "a dataset of other samples: none of its first shard is in the source now"
        raise _other(output, found, what, keys, before.samples if before else None)


def check_complete(output: str, plan: Plan, samples: Samples) -> list[str]:
    """Return what a dataset has, in words, that a run would not make; see `check`.

    Raises:
        AlreadyDone: nothing, so no run is needed.
    """
    found = _find(output)
    return _differences(output, found, plan, samples) if found else []


def record_for(output: str, source: str) -> Record | None:
    """Return the record in an output, if any, in which single shards of a source may be packed.

    Raises:
        InputError: it is of another source.
        PackError: it is damaged.
    """
    data = dataset_at(output).read_record(output)
    before = None if data is None else record.load(data, output)
    if before and not same_source(before, source):
        raise InputError(
            f"{argument('output')} {output!r} holds a dataset of another source "
            f"({before.source!r}, not {source!r}); choose another, or delete that one first"
        )
    return before


def same_source(before: Record, source: str) -> bool:
    """Tell whether a record names a source, perhaps as the path that a link leads to."""
    return before.source in (source, real(source))


def _find(output: str) -> Found | None:
    try:
        return dataset_at(output).find_shards(output)
    except InputError:  # there are none
        return None


def _differences(output: str, found: Found, plan: Plan, samples: Samples) -> list[str]:
    """Return what the shards in an output have that a run would not make; see `check_complete`."""
    before = record.of_found(found, output)
    if not before:
        return ["no record of what it is"]
    if differs := record.changes(before, plan):
        return differs
    if wrong := record.disagreements(before, found):
        return [f"{count(len(wrong), 'shard')} {record.DISAGREES} ({wrong[0][0]})"]
    total, stamp_of = plan.total_shards, source_at(plan.source).stamp_of
    dealt = (deal(samples, shard_id, total) for shard_id in range(total))
    with ThreadPoolExecutor(STAMP_THREADS) as pool:
        stamps = pool.map(lambda some: stamp_of(plan.source, some), dealt)
        pairs = zip(stamps, before.shards, strict=True)
        if changed := sum(stamp != shard.stamp for stamp, shard in pairs):
            return [f"{count(changed, 'shard')} whose files have changed"]
    was = f"{count(before.samples, 'sample')} in {count(total, 'shard')}"
    raise AlreadyDone(f"{output!r} is already complete: {was}")


def _keys_of(shards: Sequence[str]) -> list[str]:
    """Return the keys of the first shard that has any; of a damaged one, those before the damage.

    Shards without a readable key are nobody's samples.
    """
    keys: list[str] = []
    for shard in shards:
        with contextlib.suppress(PackError):
            keys.extend(sample["__key__"] for sample in read_samples(shard, (), lambda: True))
        if keys:
            break
    return keys


def _other(
    output: str, found: Found, what: str, keys: Sequence[str], samples: int | None
) -> InputError:
    """Return the error that a dataset would be replaced, perhaps by a mistyped path."""
    named = ", ".join(map(quote, islice(keys, SHOWN)))
    number = count(samples, "sample") if samples else _count(found)
    return InputError(
        f"{argument('output')} {output!r} holds {what}; it has {number} ({named}); choose another "
        f"{argument('output')}, or give {argument('replace')} to replace it (to add to it, see "
        "docs/repacking.md)"
    )


def _count(found: Found) -> str:
    """Return how many samples there are, or at least are, from the headers of the shards."""
    began, number = time.monotonic(), 0
    for shard in found.shards:
        try:
            number += count_shard(shard)
        except PackError:
            return f"at least {count(number, 'sample')}"
        if time.monotonic() - began > COUNT_TIME:
            return f"at least {count(number, 'sample')}"
    return count(number, "sample")
