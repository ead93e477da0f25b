"""One shard, from the files of its samples to one tar, written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import BinaryIO

from sharding.archive import FastTarWriter
from sharding.batch import new_stamp
from sharding.places import output_at, source_at
from sharding.samples import Samples
from sharding.shards import Progress, Shard


def begin_shard(
    source: str,
    samples: Samples,
    folder: str,
    shard_id: int,
    progress: Progress | None = None,
    staged: bool = False,
) -> Callable[[], Shard]:
    """Write one tar of these samples, and return a function that does the last step.

    That step stores the shard and gives it its name. It waits for a disk or a store about as long
    as it takes to pack a small shard, so another thread can do it while the next one is packed.

    Args:
        folder: where the shard goes: an output, or the folder of a run.
        staged: it is the folder of a run, where the shard waits under the stamp of its files.

    Raises:
        PackError, OSError: packing failed, now or in the last step; no shard appeared.
    """
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(output_at(folder).new_shard(folder, shard_id))
        stamp = write_samples(new.stream, source, samples, progress)
        if staged:
            new.stamp = stamp
        rest = stack.pop_all()

    def finish() -> Shard:
        rest.close()
        return Shard(shard_id, len(samples), new.size, new.path)

    return finish


def write_shard(
    source: str,
    samples: Samples,
    folder: str,
    shard_id: int,
    progress: Progress | None = None,
) -> Shard:
    """Write one tar of these samples: it appears when it is whole and stored, or not at all.

    Raises:
        PackError, OSError: packing failed; no shard appeared.
    """
    return begin_shard(source, samples, folder, shard_id, progress)()


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
