"""From shards to a training pipeline: `open_webdataset`, and the stages that it adds to webdataset.

Input: the folder of the shards. Output: a `wds.WebDataset`. Knows nothing of packing.
"""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharding.archive import Damaged, read_members
from sharding.errors import InputError, PackError, count
from sharding.folder import find_shards
from sharding.samples import RESERVED_FOLDER, split_name

if TYPE_CHECKING:
    import webdataset as wds


def open_webdataset(
    path: str | os.PathLike[str],
    fields: str | Iterable[str] = "jpg,txt",
    optional_fields: str | Iterable[str] = (),
    decode: str | None = "pilrgb",
    shuffle_buffer: int = 1_000,
    seed: int = 0,
    handler: Callable[[Exception], bool] | None = None,
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
        handler: what happens to a sample that cannot be decoded, such as webdataset's
            `wds.warn_and_continue`; by default, it is a `PackError` that names it.

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
    required = _split(fields)
    optional = _split(optional_fields) if optional_fields else []
    dataset = wds.WebDataset(
        shards,
        shardshuffle=False,  # SplitShards does it, before it deals
        nodesplitter=SplitShards(shuffle_buffer > 0, seed),
        workersplitter=None,
        empty_check=False,
    )
    wanted = {field for entry in required + optional for field in entry.split(";")}
    list_shards, split_shards, *_ = dataset.pipeline  # what webdataset reads with goes
    dataset.pipeline = [list_shards, split_shards, ReadShards(frozenset(wanted))]
    if shuffle_buffer > 0:  # anew from seed and epoch, however much of the last epoch was read
        dataset = dataset.compose(wds.detshuffle(shuffle_buffer, seed=seed))
    return dataset.compose(MakeTuples(required, optional, decode, handler))


READ_SIZE = 1 << 20  # bytes read at a time


def _split(fields: str | Iterable[str]) -> list[str]:
    named = fields if isinstance(fields, str) else ",".join(fields)
    entries = [entry.lower() for entry in named.split(",")]
    for field in (field for entry in entries for field in entry.split(";")):
        if not field or field.split() != [field]:
            raise InputError(f'fields {named!r}: {field!r} is no field; write e.g. "jpg,txt"')
    return entries


def read_samples(
    path: str | os.PathLike[str], wanted: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `wds.WebDataset` does: fields by name, and `__key__`.

    Args:
        path: a plain path; webdataset would cut "a#b" short, and run "pipe:..." in a shell.
        wanted: fields to read, in lower case; the bytes of others are passed over.

    Raises:
        PackError: the shard is damaged, or was replaced while it was read; it names the shard.
    """
    sample: dict[str, Any] = {}
    try:
        with open(path, "rb", buffering=READ_SIZE) as stream:
            status = os.fstat(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for name, size in read_members(stream, status.st_size):
                key, field = split_name(name)
                if key is None or field is None:
                    continue
                if name[:2] == "__" and RESERVED_FOLDER.match(name):
                    continue
                field = field.lower()
                if not sample or key != sample["__key__"]:
                    if sample:
                        yield sample
                    sample = {"__key__": key, "__url__": path, "__local_path__": path}
                    seen = set()
                if field in seen:
                    raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
                seen.add(field)
                if wanted is None or field in wanted:
                    sample[field] = stream.read(size)
            if sample:
                yield sample
        if not os.path.samestat(status, os.stat(path)):
            raise Damaged("it was replaced while it was read")
    except Damaged as error:
        raise PackError(f"{os.fspath(path)!r}: {error}") from None


class ReadShards:
    """A stage of a pipeline that reads shards; it takes the place of webdataset's own."""

    def __init__(self, wanted: Container[str]) -> None:
        self.wanted = wanted

    def __call__(self, urls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the samples of shards."""
        for url in urls:
            yield from read_samples(url["url"], self.wanted)


class MakeTuples:
    """A stage of a pipeline that decodes samples and makes tuples of them.

    What fails names shard, key and field; it is a `PackError`, or goes to webdataset's `handler`.
    """

    def __init__(
        self,
        required: Sequence[str],
        optional: Sequence[str],
        decode: str | None,
        handler: Callable[[Exception], bool] | None,
    ) -> None:
        from webdataset import autodecode

        self.entries = [(entry, entry.split(";")) for entry in (*required, *optional)]
        self.optional = set(optional)
        self.decode: Callable[[str, bytes], Any] | None = None
        if decode:
            self.decode = autodecode.Decoder([autodecode.imagehandler(decode)]).decode1
        self.handler = handler

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        """Yield tuples."""
        skipped = 0
        for sample in samples:
            try:
                values = tuple(self.value(sample, *entry) for entry in self.entries)
            except PackError as error:
                if self.handler is None:
                    raise
                if not self.handler(error):
                    break
                skipped += 1
            else:
                yield values
        if skipped:
            warnings.warn(f"{count(skipped, 'sample')} skipped in this epoch", stacklevel=2)

    def value(self, sample: Mapping[str, Any], entry: str, alternatives: Sequence[str]) -> Any:
        """Return the field of a sample that an entry asks for."""
        field = next((field for field in alternatives if field in sample), None)
        if field is None:
            if entry in self.optional:
                return None
            raise PackError(f"{_name(sample)} has no field {entry!r}")
        data = sample[field]
        if self.decode is None or field.startswith("__"):
            return data
        try:
            return self.decode(field, data)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and others raise nearly anything
            reason = f"{type(error).__name__}: {error}"
            name = f"{_name(sample)}, field {field!r}"
            raise PackError(f"{name} cannot be decoded: {reason}") from error


def _name(sample: Mapping[str, Any]) -> str:
    return f"{sample['__url__']!r}: sample {sample['__key__']!r}"


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
