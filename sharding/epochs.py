"""Where a reader is in its epochs: the start of each, the state to save, the count of its workers.

Input: which reader of how many this is, and what was loaded. Output: the start of an epoch, which
the stages in pipeline.py read from. Knows no shards and no samples.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import sys
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping
from multiprocessing import context, reduction
from typing import Any, NamedTuple

from sharding.errors import InputError, PackError

ANEW = "or restart the epoch: call set_epoch instead of load_state_dict"
KEPT_ITERATIONS = 500  # of the last ones; more than loaders that read at the same time


class Reader(NamedTuple):
    """One of those who share out an epoch."""

    rank: int
    ranks: int
    worker: int
    workers: int


class Start(NamedTuple):
    """Where a reader begins in an epoch; fixed while the epoch is read."""

    epoch: int
    skip: int = 0  # samples of it were seen before the training was stopped
    over: bool = False  # all of it was
    shards: tuple[int, int] | None = None  # had been opened by then: number, checksum of sizes
    shift: int = 0  # of workers: a loader asks its first one first, whose turn it may not be


class Saved(NamedTuple):
    """A state that was loaded."""

    state: dict[str, Any]
    epoch: int
    seen: int
    over: bool
    batches: tuple[int, int] | None  # number and size, of all workers together
    readers: list[int] | None  # ranks, and workers of each
    shards: tuple[int, int] | None
    by_worker: bool  # a worker loaded it, for itself
    token: str  # tells it from others, however often it is copied

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> Saved:
        """Return a state that somebody kept.

        Raises:
            InputError: it is no such state.
        """
        try:
            batches, shards = None, state.get("shards")
            if "batches" in state:
                batches = int(state["batches"]), int(state["batch_size"])
            return cls(
                dict(state),
                max(0, int(state["epoch"])),
                int(state.get("seen", 0)),
                bool(state.get("over", False)),
                batches,
                state.get("readers"),
                (int(shards[0]), int(shards[1])) if shards else None,
                worker_info() is not None,
                uuid.uuid4().hex,
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"not a state of a dataset: {error!r}") from None

    def start(self, reader: Reader) -> Start:
        """Return where a reader goes on.

        Raises:
            PackError: the state is of other readers.
        """
        readers = [reader.ranks, reader.workers]
        if self.readers not in (None, readers):
            was = "{} ranks with {} workers".format(*self.readers or ())
            now = "{} with {}".format(*readers)
            raise PackError(f"the state is of {was} each, not of {now}; {ANEW}")
        if not self.batches:
            return Start(self.epoch, self.seen, self.over, self.shards)
        number, size = self.batches
        shift = number % reader.workers
        taken = range((reader.worker + shift) % reader.workers, number, reader.workers)
        return Start(self.epoch, len(taken) * size, shift=shift)


class Position:
    """Where a reader is.

    | Where                 | A state says            | The next epoch is        |
    |-----------------------|-------------------------|--------------------------|
    | nothing was read      | epoch 0                 | epoch 0                  |
    | a state was loaded    | the same                | its rest                 |
    | in an epoch           | what was seen of it     | the one behind it        |
    | at its end            | the one behind it       | the one behind it        |
    | at its end, a worker  | that it is over         | the one behind it        |

    The last: a loader may wait for other workers to end this epoch, and whoever takes up such a
    state must get no more samples of it from this one.
    """

    def __init__(self) -> None:
        self.start = Start(-1)
        self.reader: Reader | None = None
        self.seen = 0  # samples of this epoch, in this reader, the skipped ones included
        self.over = True
        self.shards = (0, 0)  # opened in this epoch: number, checksum of their sizes
        self.saved: Saved | None = None
        self.taken = ""  # token of the last state from which an epoch began here
        self.counter = EpochCounter()

    def begin(self, reader: Reader) -> Start:
        """Begin an epoch."""
        worker = worker_info()
        if worker:
            start = self._begin_in_step(worker, reader)
        elif self.saved and self.saved.token != self.taken:
            start = self.saved.start(reader)
        else:
            start = Start(self.start.epoch + 1)
        self.taken = self.saved.token if self.saved else ""
        self.start, self.reader = start, reader
        self.seen, self.over, self.shards = 0, start.over, (0, 0)
        return start

    def _begin_in_step(self, worker: Any, reader: Reader) -> Start:
        """Begin the epoch that the other workers of a loader begin.

        They are told by the seed that a loader draws whenever it starts workers, and by their
        parent: ranks may be forks of one process, and draw the same.
        """
        parent, seed = multiprocessing.parent_process(), worker.seed - worker.id
        owner = parent.pid if parent else os.getppid()
        with self.counter.iterations() as iterations:
            last = next((each for each in reversed(iterations) if each["owner"] == owner), None)
            loader = {"owner": owner, "seed": seed, "workers": reader.workers}
            for mine in reversed(iterations):
                if loader.items() <= mine.items() and worker.id not in mine["begun"]:
                    break  # which another worker has begun
            else:
                epoch, token = (last["epoch"] + 1, last["token"]) if last else (0, "")
                mine = {**loader, "epoch": epoch, "token": token, "token_before": token}
                mine["begun"] = []
                iterations.append(mine)
            mine["begun"].append(worker.id)
            saved = self.saved
            if not saved:
                return Start(mine["epoch"])
            if saved.token == (self.taken if saved.by_worker else mine["token_before"]):
                return Start(mine["epoch"])
            if not saved.by_worker:
                mine["token"] = saved.token
            start = saved.start(reader)
            mine["epoch"] = start.epoch
            return start

    def open_shard(self, size: int) -> None:
        """Note that a shard is opened.

        Raises:
            PackError: it is another shard than when the state was saved, or one before it is.
        """
        number, checksum = self.shards
        self.shards = number + 1, zlib.crc32(b"%d " % size, checksum)
        before = self.start.shards
        if before and before[0] == number + 1 and before != self.shards:
            raise PackError(f"the shards have changed since the state was saved; {ANEW}")

    def skipping(self) -> bool:
        """Tell whether samples are passed over that were seen before the training was stopped."""
        return self.seen < self.start.skip

    def state(self) -> dict[str, Any]:
        """Return the position as plain JSON of one size, however much was read."""
        if self.saved and self.saved.token != self.taken:
            return self.saved.state
        readers = [self.reader.ranks, self.reader.workers] if self.reader else None
        if self.over and not worker_info():
            return {"epoch": self.start.epoch + 1, "seen": 0, "readers": readers}
        state = {"epoch": self.start.epoch, "seen": max(self.seen, self.start.skip)}
        shards = self.start.shards if self.skipping() else self.shards
        over = {"over": True} if self.over else {}
        return {**state, "readers": readers, "shards": list(shards or ()), **over}


def worker_info() -> Any:
    """Return what torch knows of this process as a loader's worker; None if it is none."""
    torch = sys.modules.get("torch")
    return torch.utils.data.get_worker_info() if torch else None


class EpochCounter:
    """The last iterations that workers have begun over a dataset: a small file without a name.

    Workers that are started anew for each epoch inherit it, or get it when they are spawned. In
    any other copy of the dataset, a pickle included, epochs are counted anew.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _nameless_file() if descriptor is None else descriptor
        weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Share the file with a process that is being spawned; leave it out of other pickles."""
        if context.get_spawning_popen() is None:
            return EpochCounter, ()
        return _inherit, (reduction.DupFd(self.descriptor),)

    @contextlib.contextmanager
    def iterations(self) -> Iterator[list[dict[str, Any]]]:
        """Give the last iterations to read and change; an exception leaves them as they were."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)  # which dies with its process
        try:
            data = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
            iterations: list[dict[str, Any]] = json.loads(data or b"[]")
            yield iterations
            new = json.dumps(iterations[-KEPT_ITERATIONS:]).encode()
            os.pwrite(self.descriptor, new.ljust(len(data)), 0)
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("epochs")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _inherit(duplicate: Any) -> EpochCounter:
    return EpochCounter(duplicate.detach())
