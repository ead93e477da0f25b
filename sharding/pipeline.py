"""The stages of a training pipeline: split the shards, read, shuffle, make tuples, take up again.

Input: paths of shards. Output: a `wds.WebDataset` that yields tuples. Its stages share one
position, from which a stopped training goes on exactly where it was.
"""

from __future__ import annotations

import functools
import random
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import webdataset as wds
from webdataset.utils import pytorch_worker_info

from sharding.errors import InputError, PackError, count
from sharding.places import dataset_at
from sharding.reading import Later, read_samples

ANEW = "else begin the epoch anew: call set_epoch in place of load_state_dict"


class Position:
    """Where a pipeline is in its epochs; its stages share it."""

    def __init__(self) -> None:
        self.epoch = -1
        self.seen = 0  # samples of this epoch, in this reader
        self.to_skip = 0  # so many of them were seen before the training was stopped
        self.fixed = False  # the next epoch is `epoch` itself, and not the one behind it
        self.batches: tuple[int, int] | None = None  # number and size, of all workers together
        self.readers: list[int] | None = None  # ranks and workers that the state is of
        self.counts: dict[str, list[int]] = {}  # path of a shard -> its samples and bytes
        # Of the workers: a loader asks its first one first, whose turn it may not be.
        self.shift = 0
        self.begun = False  # before its first sample was asked for

    def begin(self) -> None:
        """Begin an epoch."""
        _, ranks, worker, workers = pytorch_worker_info()
        if self.readers not in (None, [ranks, workers]):
            was = "{} ranks with {} workers".format(*self.readers or ())
            raise PackError(f"the state is of {was} each, not of {ranks} with {workers}; {ANEW}")
        if not self.fixed:
            self.epoch += 1
            self.seen = 0
        self.shift = 0
        if self.batches:
            number, size = self.batches
            self.shift = number % workers
            self.seen = len(range((worker + self.shift) % workers, number, workers)) * size
        self.readers, self.batches, self.fixed = [ranks, workers], None, False
        self.to_skip = self.seen

    def finish(self) -> None:
        """End an epoch that was read to its end.

        In a worker of a loader the position stays: its loader may wait for other workers to end
        this epoch, and whoever takes up such a state must get no more samples of it.
        """
        if not _in_worker():
            self.epoch += 1
            self.seen = 0
            self.fixed = True


def _in_worker() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.utils.data.get_worker_info())


class TrainingDataset(wds.WebDataset):  # type: ignore[misc]
    """A `wds.WebDataset` whose position can be saved and loaded, as torchdata's loader does it."""

    position: Position
    split_by_node: bool

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch; in a worker at once: its loader may save the state before a sample."""
        if _in_worker():
            self.position.begin()
            self.position.begun = True
        return iter(super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this reader, as plain JSON."""
        position = self.position
        return {
            "epoch": position.epoch,
            "seen": position.seen,
            "readers": position.readers,
            "counts": position.counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position: what `state_dict` gave, or what a loop of one's own counted.

        Args:
            state: of `state_dict`; or {"epoch": e, "batches": b, "batch_size": n}, where b batches
                of epoch e have been taken from a DataLoader with the same number of workers, of
                which none had come to its end.

        Raises:
            InputError: it is no such state.
        """
        position = self.position
        try:
            position.epoch = max(0, int(state["epoch"]))
            position.seen = int(state.get("seen", 0))
            position.batches = None
            if "batches" in state:
                position.batches = int(state["batches"]), int(state["batch_size"])
            position.readers = state.get("readers")
            position.counts = dict(state.get("counts", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no state of a dataset: {error!r}") from None
        position.fixed = True

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch; for workers that are started anew for each."""
        _refuse_prepared(self)
        self.load_state_dict({"epoch": epoch, "counts": self.position.counts})


def open_pipeline(
    shards: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str],
    decoders: Mapping[str, Callable[[bytes], Any]],
    shuffle_buffer: int,
    seed: int,
    handler: Callable[[Exception], bool] | None,
    even: bool,
    split_by_node: bool,
) -> TrainingDataset:
    """Return the pipeline; see `open_webdataset`."""
    position = Position()
    dataset = TrainingDataset(shards, shardshuffle=False, empty_check=False)
    dataset.position = position
    dataset.split_by_node = split_by_node
    make_tuples = MakeTuples(position, required, optional, decoders, handler)
    stages: list[Any] = [SplitShards(position, shuffle_buffer > 0, seed, even, split_by_node)]
    stages.append(ReadShards(position, make_tuples.wanted))
    if shuffle_buffer > 0:
        stages.append(ShuffleSamples(position, shuffle_buffer, seed))
    stages.append(make_tuples)
    dataset.pipeline = [dataset.pipeline[0], *stages]  # in place of how webdataset reads
    return dataset


# ---------------------------------------------------------------- reading


class ReadShards:
    """A stage that reads shards; it takes the place of webdataset's own."""

    def __init__(self, position: Position, wanted: Container[str]) -> None:
        self.position = position
        self.wanted = wanted

    def __call__(self, urls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the samples of shards; those of shards that were seen whole as mere places."""
        position = self.position
        for url in urls:
            path = url["url"]
            size = dataset_at(path).shard_size(path)
            number, known_size = position.counts.get(path, (0, size))
            if known_size != size:
                raise PackError(f"{path!r} is another shard than when the state was saved; {ANEW}")
            if number and position.to_skip > 0:
                yield from ({"__url__": path, "__place__": place} for place in range(number))
                continue
            number = 0
            for sample in read_samples(path, self.wanted, lambda: position.to_skip > 0):
                number += 1
                yield sample
            position.counts[path] = [number, size]


@functools.lru_cache(maxsize=2)
def _scan_shard(path: str, wanted: Container[str]) -> list[dict[str, Any]]:
    return list(read_samples(path, wanted, lambda: True))


class ShuffleSamples:
    """A stage that shuffles samples anew from seed and epoch, wherever the last epoch was cut."""

    def __init__(self, position: Position, size: int, seed: int) -> None:
        self.position = position
        self.size = size
        self.seed = seed

    def __call__(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Yield the samples in the order of this epoch."""
        epoch = self.position.epoch  # of which detshuffle wants the one before
        yield from wds.detshuffle(self.size, seed=self.seed, epoch=epoch - 1).run(samples)


class SplitShards:
    """A stage of a pipeline that shuffles the shards and deals them to all ranks and workers.

    Every epoch has another order, the same in every rank, so that each worker meets all shards
    over time; a worker that is started anew for each epoch begins at the first one again.
    """

    def __init__(
        self, position: Position, shuffle: bool, seed: int, even: bool, split_by_node: bool
    ) -> None:
        self.even = even
        self.split_by_node = split_by_node
        self.position = position
        self.shuffle = shuffle
        self.seed = seed
        self.node = 0, 1  # rank and world size

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along to workers that are spawned: they have no process group."""
        return {**self.__dict__, "node": pytorch_worker_info()[:2]}

    def __call__(self, urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the shards of this rank and worker."""
        epoch = self.position.epoch
        shards = list(urls)
        rank, world_size, worker, num_workers = pytorch_worker_info()
        worker = (worker + self.position.shift) % num_workers
        if not self.split_by_node:
            rank, world_size = 0, 1
        elif world_size == 1:
            rank, world_size = self.node
        readers, reader = world_size * num_workers, rank * num_workers + worker
        if self.even and len(shards) < world_size:
            raise PackError(f"{len(shards)} shards for {world_size} ranks: pack at least as many")
        if self.even and len(shards) < readers and reader == 0 and epoch == 0:
            warnings.warn(
                f"{len(shards)} shards for {readers} readers (ranks: {world_size}, "
                f"workers of each: {num_workers}): some get no samples; pack more shards",
                stacklevel=2,
            )
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(shards)
        yield from shards[reader::readers]


class MakeTuples:
    """A stage of a pipeline that decodes samples and makes tuples of them.

    What fails names shard, key and field; it is a `PackError`, or goes to webdataset's `handler`.
    """

    def __init__(
        self,
        position: Position,
        required: Sequence[str],
        optional: Sequence[str],
        decoders: Mapping[str, Callable[[bytes], Any]],
        handler: Callable[[Exception], bool] | None,
    ) -> None:
        self.position = position
        self.entries = [(entry, entry.split(";")) for entry in (*required, *optional)]
        self.wanted = frozenset(field for _, fields in self.entries for field in fields)
        self.optional = set(optional)
        self.decoders = decoders
        self.handler = handler

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        """Yield tuples."""
        position, skipped = self.position, 0
        if not position.begun:
            position.begin()
        position.begun = False
        for sample in samples:
            if position.to_skip > 0:
                position.to_skip -= 1
                continue
            position.seen += 1
            try:
                values = self.make_tuple(sample)
            except PackError as error:
                if self.handler is None:
                    raise
                if not self.handler(error):
                    break
                skipped += 1
            else:
                yield values
        position.finish()
        if skipped:
            warnings.warn(f"{count(skipped, 'sample')} skipped in this epoch", stacklevel=2)

    def make_tuple(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        """Return the fields of a sample."""
        if "__place__" in sample:
            sample = _scan_shard(sample["__url__"], self.wanted)[sample["__place__"]]
        return tuple(self.value(sample, *entry) for entry in self.entries)

    def value(self, sample: Mapping[str, Any], entry: str, alternatives: Sequence[str]) -> Any:
        """Return the field of a sample that an entry asks for."""
        for field in alternatives:
            if field in sample:
                break
        else:
            if entry in self.optional:
                return None
            raise PackError(
                f"{_name(sample)} has no field {entry!r}; see fields= and optional_fields="
            )
        data = sample[field]
        if isinstance(data, Later):
            data = data.read()
        decode = self.decoders.get(field)
        if decode is None:
            return data
        try:
            return decode(data)
        except MemoryError:
            raise
        except Exception as error:  # Pillow, and functions of users, raise nearly anything
            reason = f"{type(error).__name__}: {error}"
            name = f"{_name(sample)}, field {field!r}"
            raise PackError(f"{name} cannot be decoded: {reason}") from error


def _name(sample: Mapping[str, Any]) -> str:
    return f"{sample['__url__']!r}: sample {sample['__key__']!r}"


def _refuse_prepared(dataset: TrainingDataset) -> None:
    """Refuse a loader that deals out to ranks what has been dealt out to them already.

    accelerate, which makes such loaders, sets their epoch when they begin one, and then tells
    which of them that is.
    """
    accelerate = sys.modules.get("accelerate.state")
    loader = accelerate and accelerate.GradientState().active_dataloader
    outer = getattr(loader, "dataset", None)
    prepared = dataset is outer or dataset is getattr(outer, "dataset", None)
    if prepared and dataset.split_by_node and pytorch_worker_info()[1] > 1:
        raise InputError(
            "accelerate deals the samples of a loader that it has prepared to all processes, but "
            "each reads shards of its own, so samples would be lost. Do not prepare the loader; or "
            "let each read all of them: open_webdataset(..., split_by_node=False)"
        )
