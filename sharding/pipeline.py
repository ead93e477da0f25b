"""The stages of a training pipeline: deal the shards, read, shuffle, make tuples.

Input: paths of shards, and the start of each epoch from epochs.py. Output: a `wds.WebDataset` that
yields tuples, and goes on exactly where a stopped training was.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import webdataset as wds
from webdataset import filters
from webdataset.utils import pytorch_worker_info

from sharding.epochs import ANEW, Position, Reader, Saved, Start, worker_info
from sharding.errors import InputError, PackError
from sharding.messages import count
from sharding.parallel import in_order
from sharding.places import dataset_at
from sharding.reading import Later, count_shard, read_samples

COUNT_THREADS = 4  # of each worker; each holds some 17 MB of a bucket's shard

# Stages of webdataset that take one sample, and give it or drop it, before they take the next.
# (Of batched, that is true of the one here.)
PROMPT = {"associate", "batched", "decode", "extract_keys", "info", "log_keys", "map", "map_dict"}
PROMPT |= {"map_tuple", "rename", "rename_keys", "select", "to_tuple", "xdecode"}
CURES = {
    "shuffle": "shuffle by shuffle_buffer=",
    "detshuffle": "shuffle by shuffle_buffer=",
    "with_epoch": "give the length to the loader: wds.WebLoader(...).with_epoch(n)",
}
OTHER_CURE = "batch in the loader, or in .batched(); do the rest by .map()"


class TrainingDataset(wds.WebDataset):  # type: ignore[misc]
    """A `wds.WebDataset` whose position can be saved and loaded, as torchdata's loader does it.

    For one loader at a time: two count their epochs together, and it is chance which is first.
    """

    position: Position
    split_by_node: bool

    def iterator(self) -> Iterator[Any]:
        """Read one epoch, or as many as `repeat` says.

        In a worker the first one begins at once: its loader may save the state before a sample.
        """
        return self._read(self.pipeline[0].begin() if worker_info() else None)

    def _read(self, start: Start | None) -> Iterator[Any]:
        for _ in range(self.repetitions):
            start = start or self.pipeline[0].begin()
            samples = self.pipeline[0](start)
            for stage in self.pipeline[1:]:
                samples = self.invoke(stage, samples)
            empty = True
            for sample in samples:
                empty = False
                yield sample
            self.position.over = True
            if empty and not start.skip:
                break  # there are none, and never will be
            start = None

    def invoke(self, stage: Any, *args: Any) -> Any:
        """Put a stage behind others; let webdataset's batches take no sample of the next one."""
        if _kind(stage) == (True, "batched"):
            return _batched(*args, *stage.args, **stage.kw)
        return super().invoke(stage, *args)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this reader, as plain JSON."""
        state = self.position.state()
        inexact = self._inexact_stage()
        if inexact and state.get("seen") and not state.get("over"):
            return {**state, "inexact": inexact}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position: what `state_dict` gave, or what a loop of one's own counted.

        Args:
            state: of `state_dict`; or {"epoch": e, "batches": b, "batch_size": n}, where b batches
                of epoch e have been taken from a DataLoader with the same number of workers, of
                which none had come to its end.

        Raises:
            InputError: it is no such state, or a stage behind the dataset's own makes it inexact.
        """
        saved = Saved.parse(state)
        inexact = saved.state.get("inexact")
        if saved.batches and saved.batches[0]:
            inexact = self._inexact_stage(counted=True)
        if inexact:
            raise InputError(
                f"the training cannot go on exactly: .{inexact}() holds samples back, repeats or "
                f"drops some; {CURES.get(inexact, OTHER_CURE)}; {ANEW}"
            )
        self.position.saved = saved

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch; those that follow count on by themselves.

        All ranks must begin the same epochs. If one of them alone has looked at a batch, call this
        in each. (Workers that are persistent have begun their count when they were started.)
        """
        _refuse_prepared(self)
        self.load_state_dict({"epoch": epoch})

    def _inexact_stage(self, counted: bool = False) -> str | None:
        """Return the name of a stage behind which the number of samples does not tell which."""
        if self.repetitions != 1 and (self.repetitions < sys.maxsize or self.nsamples > 0):
            return "with_epoch" if self.nsamples > 0 else "repeat"
        for stage in self.pipeline[1:]:
            own, kind = _kind(stage)
            if not own or kind not in PROMPT or (counted and kind == "select"):
                return kind
        return None


def _kind(stage: Any) -> tuple[bool, str]:
    """Return whether a stage is one of webdataset's filters, and its name."""
    curried = isinstance(stage, filters.FilterFunction)
    function = stage.f if curried else stage
    name = str(getattr(function, "__name__", type(function).__name__)).lstrip("_")
    return curried and getattr(function, "__module__", "") == filters.__name__, name


def _batched(
    samples: Iterable[Any],
    batchsize: int = 20,
    collation_fn: Callable[[list[Any]], Any] | None = filters.default_collation_fn,
    partial: bool = True,
) -> Iterator[Any]:
    """Yield the batches of webdataset, which for each one reads a sample of the next."""
    samples = iter(samples)
    while batch := list(itertools.islice(samples, batchsize)):
        if len(batch) == batchsize or partial:
            yield batch if collation_fn is None else collation_fn(batch)


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
    dataset.pipeline = [
        ReadEpoch(position, shards, shuffle_buffer, seed, even, split_by_node, make_tuples)
    ]
    return dataset


class ReadEpoch:
    """The first stage: deals the shards, reads, shuffles and makes tuples.

    Every epoch has another order, the same in every rank, so that each worker meets all shards
    over time.
    """

    def __init__(
        self,
        position: Position,
        shards: Sequence[str],
        shuffle_buffer: int,
        seed: int,
        even: bool,
        split_by_node: bool,
        make_tuples: MakeTuples,
    ) -> None:
        self.position = position
        self.shards = shards
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.even = even
        self.split_by_node = split_by_node
        self.make_tuples = make_tuples
        self.node = 0, 1  # rank and world size

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along to workers that are spawned: they have no process group."""
        return {**self.__dict__, "node": self.reader()[:2]}

    def reader(self) -> Reader:
        """Return which reader this is."""
        reader = Reader(*pytorch_worker_info())
        if not self.split_by_node:
            return Reader(0, 1, *reader[2:])
        return reader if reader.ranks > 1 else Reader(*self.node, *reader[2:])

    def begin(self) -> Start:
        """Begin an epoch."""
        return self.position.begin(self.reader())

    def __call__(self, start: Start | None = None) -> Iterator[tuple[Any, ...]]:
        """Yield the tuples of an epoch."""
        start = start or self.begin()
        if start.over:
            return iter(())
        samples = self.read_shards(self.deal(start), start)
        if self.shuffle_buffer > 0:
            # Anew, wherever the last epoch was cut, and for each reader in another order: shards
            # hold neighbours at the same place, which would come out together. detshuffle adds
            # seed and epoch, so that one seed's epochs would be another's.
            name = f"{self.seed} {start.epoch} {self.place(start)[0]}"
            seed = random.Random(name).getrandbits(64)
            samples = wds.detshuffle(self.shuffle_buffer, seed=seed).run(samples)
        return self.make_tuples(samples)

    def place(self, start: Start) -> tuple[int, int]:
        """Return the number of this reader among all, and how many these are."""
        rank, ranks, worker, workers = self.reader()
        return rank * workers + (worker + start.shift) % workers, ranks * workers

    def deal(self, start: Start) -> list[str]:
        """Return the shards of this rank and worker, in the order of the epoch."""
        _, ranks, _, workers = self.reader()
        shards = list(self.shards)
        reader, readers = self.place(start)
        if self.even and len(shards) < ranks:
            raise PackError(f"{len(shards)} shards for {ranks} ranks: pack at least {ranks} shards")
        if self.even and len(shards) < readers and reader == 0 and start.epoch == 0:
            warnings.warn(
                f"{len(shards)} shards for {readers} readers (ranks: {ranks}, "
                f"workers of each: {workers}): some get no samples; pack more shards",
                stacklevel=2,
            )
        if self.shuffle_buffer > 0:
            random.Random(f"{self.seed} {start.epoch}").shuffle(shards)
        return shards[reader::readers]

    def read_shards(self, shards: Sequence[str], start: Start) -> Iterator[dict[str, Any]]:
        """Yield the samples of shards; those of shards that were seen whole as mere places."""
        position = self.position
        counts = _count_seen(shards, start) if start.skip else []
        for path, number in itertools.zip_longest(shards, counts):
            position.open_shard(dataset_at(path).shard_size(path))
            if number is None:
                yield from read_samples(path, self.make_tuples.wanted, position.skipping)
            else:
                yield from ({"__url__": path, "__place__": place} for place in range(number))


def _count_seen(shards: Sequence[str], start: Start) -> list[int]:
    """Return the number of samples in each of the shards that were seen whole, side by side."""
    if start.shards:
        shards = shards[: max(0, start.shards[0] - 1)]  # the last one was not read to its end
    counts: list[int] = []
    left = start.skip
    with ThreadPoolExecutor(COUNT_THREADS) as pool:
        for number in in_order(pool, count_shard, shards, COUNT_THREADS):
            left -= number
            if left < 0:
                break
            counts.append(number)
    return counts


@functools.lru_cache(maxsize=2)
def _scan_shard(path: str, wanted: Container[str]) -> list[dict[str, Any]]:
    return list(read_samples(path, wanted, lambda: True))


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
        for sample in samples:
            passed_over = position.skipping()
            position.seen += 1
            if passed_over:
                continue
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
        if skipped:
            warnings.warn(f"{count(skipped, 'sample')} skipped in this epoch", stacklevel=2)

    def make_tuple(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        """Return the fields of a sample."""
        if "__place__" in sample:
            sample = _scan_shard(sample["__url__"], self.wanted)[sample["__place__"]]
        if not self.decoders:  # nearly all that is left to do is to pass on bytes
            values = tuple([sample.get(entry) for entry, _ in self.entries])
            if {type(value) for value in values} == {bytes}:
                return values
        return tuple(self.value(sample, *entry) for entry in self.entries)

    def value(self, sample: Mapping[str, Any], entry: str, alternatives: Sequence[str]) -> Any:
        """Return the field of a sample that an entry asks for."""
        for field in alternatives:
            if field in sample:
                break
        else:
            if entry in self.optional:
                return None
            there = ", ".join(name for name in sample if not name.startswith("__"))
            raise PackError(f"{_name(sample)} has no field {entry!r}, but {there}: see fields=")
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
