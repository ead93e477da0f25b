"""Checks and proof of a dataset: each shard in turn, and what only shows across shards.

Input: the paths of the shards and, for a proof, the source that they were packed from. What is
wrong with one shard is found in `verify_shard.py`, in this process or in several.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from sharding.archive import Damaged
from sharding.errors import PackError
from sharding.faults import SHOWN, Report
from sharding.parallel import in_order
from sharding.places import dataset_at, waits
from sharding.plan import digest_plan
from sharding.reading import walk
from sharding.record import (
    DISAGREES,
    MISSING,
    Record,
    Staged,
    compare_function,
    disagreements,
    dump,
    of_run,
)
from sharding.run import plan_of
from sharding.samples import Fields, Listing, Samples, deal, judge
from sharding.shards import Found, shard_name, shard_number
from sharding.stages import Stage, stage
from sharding.verify_shard import NO_SAMPLES, Checked, Task, check_shard, compare_checksum

ENOUGH = 8  # keys; see `count_uneven`
DROPPED = "sample that the function drops"
MISPLACED = "sample in another shard than this source and its flags say"


class Faults:
    """What is wrong: counted, and written to a report; the first few of a kind are kept."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.numbers: Counter[str] = Counter()
        self.shown: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str, text: str) -> None:
        """Note a fault."""
        self.numbers[kind] += 1
        self.report.add(name, kind, text)
        if len(self.shown[kind]) < SHOWN:
            self.shown[kind].append(text)


Result = tuple[list[Checked], Faults]  # what each shard holds; all that is wrong


def check_dataset(
    found: Found,
    report: Report,
    listing: Listing | None,
    record: Record | None,
    *,
    fields: Fields,
    decode: bool,
    hashing: bool,
    num_workers: int,
    progress: Callable[[], object],
) -> Result:
    """Check every shard, and what only shows across shards.

    Args:
        found: the shards, and what else there is.
        report: takes what is wrong, too.
        listing: what the shards must hold, each sample once.
        record: what the shards must be.
        fields: what samples may have; if all fit, their fields may differ.
        decode: decode every image, text, number and JSON in full.
        hashing: give the checksum of each; without a listing, compare just these with the record's.
        num_workers: processes.
        progress: called for each shard that is done.
    """
    gc.freeze()  # else the collector of each process looks at the whole listing again and again
    faults, listed = Faults(report), listing.samples if listing else NO_SAMPLES
    transform = listing.transform if listing else None
    if record and listing:
        compare_function(record, transform)
    total = _compare_shards(found, record, listed, bool(transform), faults)
    folders = {os.path.dirname(shard) for shard in found.shards}
    label = os.path.basename if len(folders) == 1 else str  # of a shard, in messages
    checked: list[Checked] = []
    tasks = _tasks(found, listing, record, total, decode, hashing)
    for shard in _check_each(found, listing, tasks, hashing and not listing, num_workers):
        progress()
        checked.append(shard)
        for kind, name, text in shard.faults:
            faults.add(kind, name, f"{label(shard.path)}: {text}")
    if not transform:  # whose fields were compared, sample by sample
        compare_fields(checked, fields, faults, label)
    with stage("comparing keys", "samples", len(listed)) as comparing:
        compare_shards(checked, listed, total, faults, label, comparing)
    return checked, faults


def _compare_shards(
    found: Found, record: Record | None, listed: Samples, uneven: bool, faults: Faults
) -> int:
    """Note what is wrong with the names and sizes of shards; return how many there must be."""
    for kind, name in found.faults:
        faults.add(kind, name, name)
    if record:
        total = len(record.shards)
    else:
        total = (count_uneven if uneven else count_shards)(found.shards, listed)
    here = set(map(shard_number, found.shards))
    for number in sorted(set(range(total)) - here) if found.whole else ():
        faults.add("missing shard", shard_name(number), shard_name(number))
    for name, what in disagreements(record, found) if record else ():
        if what != MISSING:
            faults.add(DISAGREES, name, f"{name}: {what}")
    return total


def _tasks(
    found: Found,
    listing: Listing | None,
    record: Record | None,
    total: int,
    decode: bool,
    hashing: bool,
) -> Iterator[Task]:
    """Yield what there is to do for each shard; those that are one more have no checksum."""
    source, transform = (listing.source, listing.transform) if listing else ("", None)
    listed = listing.samples if listing else NO_SAMPLES
    for shard in found.shards:
        number = shard_number(shard)
        if number < total:
            due = record.shards[number] if record else None
            dealt = deal(listed, number, total)
            yield Task(shard, decode, source, dealt, transform, hashing, due)
        elif listing or not hashing:
            yield Task(shard, decode, source, hashing=hashing)


def _check_each(
    found: Found, listing: Listing | None, tasks: Iterator[Task], sums: bool, num_workers: int
) -> Iterator[Checked]:
    """Yield what becomes of each task; of checksums alone, if only they are compared.

    Raises:
        PackError: a process was killed.
    """
    source = listing.source if listing else ""
    # A process that is forked from one that used a store cannot use it.
    remote = waits(found.shards[0], source)
    work, workers = compare_checksum if sums else check_shard, min(num_workers, len(found.shards))
    try:
        yield from _check_in_parallel(work, tasks, workers, "spawn" if remote else None)
    except BrokenProcessPool:
        reason = "is there memory for --num-workers?"
        raise PackError(f"a checking process was killed; {reason}") from None


def _check_in_parallel(
    work: Callable[[Task], Checked], tasks: Iterator[Task], num_workers: int, method: str | None
) -> Iterator[Checked]:
    """Yield the report of each task, in order, from this process or from several."""
    if num_workers == 1:
        yield from map(work, tasks)
        return
    ignore = signal.SIGINT, signal.SIG_IGN
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(num_workers, context, signal.signal, ignore)
    try:
        yield from in_order(pool, work, tasks, 2 * num_workers)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()  # else the end of the pool waits until their shards are checked
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def count_shards(shards: Sequence[str], listed: Samples) -> int:
    """Return how many shards the dataset must have had: the last ones may be missing.

    In the source, the second key of a shard is the `total`-th behind its first.
    """
    total = shard_number(shards[-1]) + 1
    for shard in shards[:5] if listed else ():
        number, keys = shard_number(shard), _first_keys(shard)
        second = (index for index, key in enumerate(listed.keys) if key in keys[1:2])
        step = next(second, 0) - number
        if step > 0 and deal(listed.keys, number, step)[: len(keys)] == keys:
            return max(total, step)  # else damaged, or of another source
    return total


def count_uneven(shards: Sequence[str], listed: Samples) -> int:
    """Return how many shards the dataset must have had, where a function has dropped samples.

    In the source, a key lies a multiple of `total` behind the number of its shard. What several
    keys have in common is that; what a few have may be more.
    """
    total = shard_number(shards[-1]) + 1
    numbers = {key: shard_number(shard) for shard in shards[:5] for key in _first_keys(shard)}
    found = enumerate(listed.keys)
    steps = [index - numbers[key] for index, key in found if key in numbers]
    step = math.gcd(*steps)
    if len(steps) - steps.count(0) >= ENOUGH:
        return max(total, step)
    return next((n for n in range(total, step + 1) if not step % n), total)


def _first_keys(shard: str) -> list[str]:
    """Return the keys of the first few members of a shard, in order."""
    keys: dict[str, None] = {}
    with dataset_at(shard).open_shard(shard) as (stream, size, _), contextlib.suppress(Damaged):
        for key, _, _ in islice(walk(stream, size), 64):
            keys[key] = None
    return list(keys)


def compare_shards(
    reports: Sequence[Checked],
    listed: Samples,
    total: int,
    faults: Faults,
    label: Callable[[str], str],
    comparing: Stage,
) -> None:
    """Note keys in two shards, and what a source has that they have not."""
    shard_of: dict[str, str] = {}  # key -> name of the shard that holds it
    for report in reports:
        name = label(report.path)
        for key in report.keys:
            if shard_of.get(key, name) != name:
                faults.add("key in two shards", key, f"{key!r} in {shard_of[key]} and {name}")
            shard_of[key] = name
    if not listed:
        return
    proved = {os.path.basename(report.path) for report in reports if report.proved}
    dropped = {key for report in reports for key in report.dropped}
    for number in range(total):
        due = shard_name(number)
        for key in deal(listed.keys, number, total):
            found = shard_of.pop(key, None)
            if key in dropped:
                if found:
                    faults.add(DROPPED, key, f"{key!r} in {found}")
            elif due in proved:
                if found:
                    faults.add("key in two shards", key, f"{key!r} in {due} and {found}")
            elif not found:
                faults.add("missing sample", key, f"{key!r} of {due}")
            elif found != due:
                faults.add(MISPLACED, key, f"{key!r} is in {found}, not {due}")
        comparing.add(len(range(number, len(listed), total)))
    for key, name in shard_of.items():
        faults.add("extra sample, not in the source", key, f"{key!r} in {name}")


def compare_fields(
    reports: Sequence[Checked], fields: Fields, faults: Faults, label: Callable[[str], str]
) -> None:
    """Note samples that have other fields than most, unless all are as `fields` says."""

    def shape(found: tuple[str, ...]) -> tuple[str, ...] | Fields:
        fit = fields.known().issuperset(found) and judge(found, fields)[0] is None
        return fields if fit else found

    shapes: Counter[tuple[str, ...] | Fields] = Counter()
    for report in reports:
        for found, (number, _) in report.field_sets.items():
            shapes[shape(found)] += number
    usual = shapes.most_common(1)[0][0] if shapes else ()
    kind = "fields differ from those of other samples; --fields and --optional-fields may allow it"
    for report in reports:
        for found, (_, keys) in report.field_sets.items():
            for key in keys if shape(found) != usual else ():
                text = f"{label(report.path)}: {key!r} has {', '.join(found)}"
                faults.add(kind, key, text)


def write_checksums(
    path: str, record: Record | None, listing: Listing | None, result: Result
) -> str:
    """Write the checksums of proved shards into their record, which is made if missing.

    Returns:
        What is said of the checksums of a sound dataset.
    """
    checked, faults = result
    if not listing:
        return ", as its checksums say"
    if faults.numbers:
        return ""
    if record:
        pairs = zip(record.shards, checked, strict=True)
        shards = [shard._replace(sha256=each.sha256) for shard, each in pairs]
        record = record._replace(shards=shards)
    else:
        plan = digest_plan(plan_of(listing, len(checked)), listing.samples)
        record = of_run(plan, map(_staged, checked))
    dataset_at(path).write_record(path, dump(record))
    return "; checksums written"


def _staged(checked: Checked) -> Staged:
    """Return what a proved shard carried for the record, when it was packed."""
    fields: Counter[str] = Counter()
    for names, (number, _) in checked.field_sets.items():
        fields.update(dict.fromkeys(names, number))
    return Staged(checked.size, checked.stamp, len(checked.dropped), fields, checked.sha256)
