"""From shards to a training pipeline: `open_webdataset`, and what its arguments may be.

Input: the folder of the shards. Output: a `wds.WebDataset`. Knows nothing of packing. Its stages
are in `pipeline.py`, which imports webdataset.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from sharding.errors import InputError, PackError
from sharding.places import dataset_at
from sharding.reading import count_shard
from sharding.urls import is_url

if TYPE_CHECKING:
    from sharding.pipeline import TrainingDataset

COUNT_THREADS = 8  # each holds some 17 MB


def open_webdataset(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    fields: str | Iterable[str] = "jpg,txt",
    optional_fields: str | Iterable[str] = (),
    decode: str | None = "pilrgb",
    shuffle_buffer: int = 1_000,
    seed: int = 0,
    handler: Callable[[Exception], bool] | None = None,
    even: bool = True,
) -> TrainingDataset:
    """Return a training pipeline over a dataset, for a DataLoader or wds.WebLoader.

    Args:
        path: folder or URL of the shards, or a pattern of some; of a list of these, all are read
            as one.
        fields: what a sample is given as, in this order: "jpg,txt", or the fields one by one;
            "jpg;png" is the one of them that it has.
        optional_fields: more of these, behind them; None where a sample has none (of which a
            DataLoader makes batches with a `collate_fn` alone).
        decode: what images become: "pilrgb", "torchrgb", ... as `decode` of webdataset says;
            None leaves every field as bytes.
        shuffle_buffer: samples that a worker holds to shuffle them; 0 keeps the order of the
            shards.
        seed: of the order of shards and samples.
        handler: what happens to a sample that cannot be decoded, such as webdataset's
            `wds.warn_and_continue`; by default, it is a `PackError` that names it.
        even: refuse fewer shards than ranks, as training in step needs. For an evaluation, False:
            each sample is read once, though ranks and workers may get different numbers, or none.

    Raises:
        InputError: there are no shards, or there is no such way to decode.
        PackError: the folder also holds stray files.
    """
    from webdataset.autodecode import imagespecs

    from sharding.pipeline import open_pipeline

    spellings = sorted(imagespecs)
    if decode is not None and decode not in spellings:
        raise InputError(f"decode {decode!r}: choose None, or one of {', '.join(spellings)}")
    if decode and decode.startswith("torch"):
        importlib.import_module("torch")  # where it is missing, say so now
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    shards = []
    for each in paths:
        found = dataset_at(each).find_shards(os.fspath(each))
        for kind, name in found.faults:
            raise PackError(f"{kind}: {name}")
        shards += found.shards
    required = _split(fields)
    optional = _split(optional_fields) if optional_fields else []
    return open_pipeline(shards, required, optional, decode, shuffle_buffer, seed, handler, even)


def count_samples(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> int:
    """Return the number of samples in a dataset, from the headers of its shards.

    Args:
        path: as of `open_webdataset`.

    Raises:
        InputError: there are no shards.
        PackError: a shard is damaged.
    """
    if not isinstance(path, (str, os.PathLike)):
        return sum(map(count_samples, path))
    if is_url(path, "path"):  # whoever counts here can fork no more
        from sharding.store import apart

        return int(apart("training", "count_in_bucket", os.fspath(path)))
    return sum(map(count_shard, dataset_at(path).find_shards(os.fspath(path)).shards))


def count_in_bucket(url: str) -> int:
    """Count in this process; see `count_samples`."""
    with ThreadPoolExecutor(COUNT_THREADS) as pool:
        return sum(pool.map(count_shard, dataset_at(url).find_shards(url).shards))


def _split(fields: str | Iterable[str]) -> list[str]:
    named = fields if isinstance(fields, str) else ",".join(fields)
    entries = [entry.lower() for entry in named.split(",")]
    for field in (field for entry in entries for field in entry.split(";")):
        if not field or field.split() != [field]:
            raise InputError(f'fields {named!r}: {field!r} is no field; write e.g. "jpg,txt"')
    return entries
