"""One shard, from the files of its samples to one tar, written whole or not at all."""

from __future__ import annotations

import contextlib
from typing import BinaryIO

from sharding.archive import FastTarWriter
from sharding.batch import new_stamp
from sharding.places import output_at, source_at
from sharding.samples import Samples
from sharding.shards import PackedShard, Progress, Shard


def pack_shard(
    source: str,
    samples: Samples,
    path: str,
    shard_id: int,
    progress: Progress | None = None,
    how: str = "created",
    staged: bool = False,
) -> Shard:
    """Write one tar of these samples; the shard appears when it is stored, see `Shard.store`.

    Args:
        path: where the shard goes: an output, or a run.
        how: see `Shard`.
        staged: it is a run, in which the shard waits under the stamp of its files.

    Raises:
        PackError, OSError: packing failed; no shard appears.
    """
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(output_at(path).new_shard(path, shard_id))
        stamp = write_samples(new.stream, source, samples, progress)
        if staged:
            new.stamp = stamp
        packed = PackedShard(new, stack.pop_all())
        return Shard(shard_id, len(samples), how=how, packed=packed)


def write_samples(
    stream: BinaryIO,
    source: str,
    samples: Samples,
    progress: Progress | None = None,
) -> str:
    """Write the tar archive of these samples to a stream.

    Members of a sample lie side by side, named <key>.<field>, as the format asks
    (https://github.com/webdataset/webdataset, "The WebDataset Format"); bytes in, bytes out.

    Returns:
        The stamp of the files, as `stamp_of` of the source gives it, if none has changed.
    """
    seen = new_stamp()
    with (
        contextlib.closing(source_at(source).read_batches(source, samples)) as batches,
        FastTarWriter(stream) as sink,
    ):
        for batch in batches:
            sink.write_members(batch.names, batch.contents)
            seen.update(batch.stamp())
            if progress:
                progress(batch.samples)
    return seen.hexdigest()
