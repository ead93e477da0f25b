"""One shard, from the files of its samples to one tar, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from sharding.apart import Ended, answer, ask
from sharding.archive import FastTarWriter
from sharding.batch import new_stamp
from sharding.errors import InputError, PackError
from sharding.messages import argument, count, explain
from sharding.places import output_at, source_at
from sharding.record import Packed
from sharding.samples import Function, Listing, Origin, Sample, Samples, Transform, split_name
from sharding.shards import PackedShard, Progress, Shard, stamped
from sharding.transform import TransformError, name_of, transformed


def pack_shard(
    source: str,
    samples: Samples,
    path: str,
    shard_id: int,
    progress: Progress | None = None,
    how: str = "created",
    staged: bool = False,
    transform: Transform | None = None,
    before: Callable[[Packed], object] | None = None,
) -> Shard:
    """Write one tar of these samples; the shard appears when it is stored, see `Shard.store`.

    Args:
        path: where the shard goes: an output, or a run.
        how: see `Shard`.
        staged: it is a run, in which the shard waits under the stamp of its files.
        transform: a function of the user's on each sample.
        before: told what the shard is, before it appears.

    Raises:
        PackError, OSError: packing failed; no shard appears.
    """
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(output_at(path).new_shard(path, shard_id))
        stamp, dropped, fields = write_samples(new.stream, source, samples, progress, transform)
        if transform and dropped == len(samples):
            raise _empty(dropped, transform)
        if staged:
            new.stamp = stamped(stamp, dropped if transform else None)
            new.fields = fields
        if before:
            new.before = lambda: before(Packed(len(samples) - dropped, new.size, stamp, dropped))
        packed = PackedShard(new, stack.pop_all())
        return Shard(shard_id, len(samples) - dropped, how=how, packed=packed, dropped=dropped)


def _empty(dropped: int, transform: Transform) -> PackError:
    """Return the error that a shard would be empty, which makes some readers fail."""
    return PackError(
        f"no sample is left: {name_of(transform)} dropped {count(dropped, 'sample')}, all there "
        "are; use fewer shards (if they become uneven, pack once more, from the shards)"
    )


class Written(NamedTuple):
    """What has been written."""

    stamp: str  # of the files, as `stamp_of` of the source gives it, if none has changed
    dropped: int  # samples, by the function
    fields: Mapping[str, int]  # that came out of the function -> how many samples have them


def write_samples(
    stream: BinaryIO,
    source: str,
    samples: Samples,
    progress: Progress | None = None,
    transform: Transform | None = None,
) -> Written:
    """Write the tar archive of these samples to a stream.

    Members of a sample lie side by side, named <key>.<field>, as the format asks
    (https://github.com/webdataset/webdataset, "The WebDataset Format"); bytes in, bytes out,
    unless a function of the user's says otherwise.
    """
    seen, dropped = new_stamp(), 0
    fields: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        closing = contextlib.closing(source_at(source).read_batches(source, samples))
        batches = stack.enter_context(closing)
        if transform:
            closing = contextlib.closing(transformed(batches, samples, transform))
            batches = stack.enter_context(closing)
        sink = stack.enter_context(FastTarWriter(stream))
        for batch in batches:
            sink.write_members(batch.names, batch.contents)
            seen.update(batch.stamp())
            dropped += batch.dropped
            if transform:
                fields.update(split_name(name)[1] or "" for name in batch.names)
            if progress:
                progress(batch.samples)
    return Written(seen.hexdigest(), dropped, fields)


# ---------------------------------------------------------------- before a run


def check_function(listing: Listing | None) -> None:
    """Load the function of a listing, and call it on the first sample, in a process of its own.

    This one lives on, and its stdout may be a protocol. A function that has no file is not tried.

    Raises:
        InputError: the function fails, or returns what cannot be packed.
    """
    function = listing.transform if listing else None
    if not listing or not isinstance(function, Function):
        return
    try:
        ask("sharding.pack", "problem", listing.source, listing.samples[0], function)
    except Ended as error:
        name = f"{argument('transform')} {function.name}"
        raise InputError(f"{name} ended its process on the first sample ({error.code})") from None


def function_problem(source: str, sample: Sample, function: Function) -> str:
    """Return what is wrong with a function, as its first sample shows, if anything."""
    try:
        write_samples(io.BytesIO(), source, Samples.of([sample]), transform=function)
    except TransformError as error:
        return explain(error)
    return ""


def _problem(source: str, sample: Sequence[Any], function: Sequence[str]) -> None:
    """Answer `check_function`."""
    key, stem, extensions, listed, origins = sample
    some = Sample(key, stem, tuple(extensions), listed, tuple(Origin(*one) for one in origins))
    if problem := function_problem(source, some, Function(*function)):
        raise InputError(f"{argument('transform')}: {problem}")


if __name__ == "__main__":
    answer(problem=_problem)
