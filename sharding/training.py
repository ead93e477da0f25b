"""From shards to a training pipeline: `open_webdataset`, and the stages that it adds to webdataset.

Input: the folder of the shards. Output: a `wds.WebDataset`. Knows nothing of packing.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sharding.errors import InputError, PackError
from sharding.folder import find_shards

if TYPE_CHECKING:
    import webdataset as wds


def open_webdataset(
    path: str | os.PathLike[str],
    fields: str | Iterable[str] = "jpg,txt",
    optional_fields: str | Iterable[str] = (),
    decode: str | None = "pilrgb",
    shuffle_buffer: int = 1_000,
    seed: int = 0,
) -> wds.WebDataset:
    """Return a training pipeline over a dataset, for a DataLoader or wds.WebLoader.

    Args:
        path: folder of the shards.
        fields: what a sample is given as, in this order: "jpg,txt", or the fields one by one;
            "jpg;png" is the one of them that it has.
        optional_fields: more of these, behind them; None where a sample has none.
        decode: what images become: "pilrgb", "torchrgb", ... as `decode` of webdataset says;
            None leaves every field as bytes.
        shuffle_buffer: samples that a worker holds to shuffle them; 0 keeps the order of the
            shards.
        seed: of the order of shards and samples.

    Raises:
        InputError: there are no shards, or there is no such way to decode.
        PackError: the folder also holds stray files.
    """
    import webdataset as wds

    spellings = sorted(wds.autodecode.imagespecs)
    if decode is not None and decode not in spellings:
        raise InputError(f"decode {decode!r}: choose None, or one of {', '.join(spellings)}")
    if decode and decode.startswith("torch"):
        importlib.import_module("torch")  # where it is missing, say so now
    shards, faults = find_shards(os.fspath(path))
    for kind, name in faults:
        raise PackError(f"{kind}: {name}")
    dataset = plain_dataset(
        shards,
        shardshuffle=False,  # SplitShards does it, before it deals
        nodesplitter=SplitShards(shuffle_buffer > 0, seed),
        workersplitter=None,
        empty_check=False,
    )
    if shuffle_buffer > 0:  # anew from seed and epoch, however much of the last epoch was read
        dataset = dataset.compose(wds.detshuffle(shuffle_buffer, seed=seed))
    required = _split(fields)
    optional = _split(optional_fields) if optional_fields else []
    wanted = {field for entry in required + optional for field in entry.split(";")}
    dataset = dataset.map(functools.partial(_choose, wanted))
    if decode:
        dataset = dataset.decode(decode)
    if optional:
        dataset = dataset.map(functools.partial(_fill, optional))
    return dataset.to_tuple(*required, *optional, none_is_error=not optional)


def _split(fields: str | Iterable[str]) -> list[str]:
    named = fields if isinstance(fields, str) else ",".join(fields)
    entries = [entry.lower() for entry in named.split(",")]
    for field in (field for entry in entries for field in entry.split(";")):
        if not field or field.split() != [field]:
            raise InputError(f'fields {named!r}: {field!r} is no field; write e.g. "jpg,txt"')
    return entries


def _choose(wanted: Container[str], sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with these fields alone, so that no other is decoded."""
    return {f: data for f, data in sample.items() if f in wanted or f.startswith("__")}


def _fill(optional: Sequence[str], sample: dict[str, Any]) -> dict[str, Any]:
    """Give a sample None for what it lacks."""
    for entry in optional:
        alternatives = entry.split(";")
        if not any(field in sample for field in alternatives):
            sample[alternatives[0]] = None
    return sample


def plain_dataset(shards: Sequence[str], **options: Any) -> wds.WebDataset:
    """Return a wds.WebDataset over shards whose paths are plain paths, whatever they look like."""
    import webdataset as wds

    dataset = wds.WebDataset(list(shards), **options)
    dataset.pipeline = [
        open_shards if isinstance(stage, wds.cache.StreamingOpen) else stage
        for stage in dataset.pipeline
    ]
    return dataset


def open_shards(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard as the plain file it is; this takes the place of webdataset's own opener.

    webdataset takes a path for a URL: it cuts "a#b" or "a?b" short, and runs "pipe:..." in a shell.
    """
    for url in urls:
        with open(url["url"], "rb") as stream:
            yield {"url": url["url"], "stream": stream}


class SplitShards:
    """A stage of a pipeline that shuffles the shards and deals them to all ranks and workers.

    Every epoch has another order, the same in every rank, so that each worker meets all shards
    over time; a worker that is started anew for each epoch begins at the first one again.
    """

    def __init__(self, shuffle: bool, seed: int) -> None:
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = -1
        self.node = 0, 1  # rank and world size

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along to workers that are spawned: they have no process group."""
        from webdataset.utils import pytorch_worker_info

        return {**self.__dict__, "node": pytorch_worker_info()[:2]}

    def __call__(self, urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the shards of this rank and worker."""
        from webdataset.utils import pytorch_worker_info

        self.epoch += 1
        shards = list(urls)
        rank, world_size, worker, num_workers = pytorch_worker_info()
        if world_size == 1:
            rank, world_size = self.node
        readers, reader = world_size * num_workers, rank * num_workers + worker
        if len(shards) < world_size:
            raise PackError(f"{len(shards)} shards for {world_size} ranks: pack at least as many")
        if len(shards) < readers and reader == 0 and self.epoch == 0:
            warnings.warn(
                f"{len(shards)} shards for {readers} readers (ranks: {world_size}, "
                f"workers of each: {num_workers}): some get no samples; pack more shards",
                stacklevel=2,
            )
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(shards)
        yield from shards[reader::readers]
