"""Epochs: states of one size that go on exactly or are refused, and a count that workers share."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from conftest import write_pairs

from create_webdataset import create_webdataset
from read_webdataset import open_webdataset
from sharding.epochs import EpochCounter
from sharding.errors import InputError

KEYS = sorted(f"sample-{number}" for number in range(43))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epochs")
    write_pairs(folder / "source", len(KEYS))
    for shard_id in range(20):
        create_webdataset(folder / "source", folder / "packed", shard_id, 20)
    return folder / "packed"


def open_it(path: Path) -> Any:
    return open_webdataset(path, "__key__", decode=None, shuffle_buffer=10)


def keys(samples: Any) -> list[str]:
    return [key for (key,) in samples]


def test_a_state_has_one_size(packed: Path) -> None:
    """However many shards there are, were read, or were left unread by the last epoch."""
    dataset = open_it(packed)
    sizes = []
    for _ in range(3):
        for _ in dataset:
            sizes.append(len(json.dumps(dataset.state_dict())))
    assert max(sizes) < 100


@pytest.mark.parametrize("place", [1, 20, 42])
def test_a_state_of_the_old_form(packed: Path, place: int) -> None:
    """It listed the shards that were read; it is taken up exactly, too."""
    whole = keys(open_it(packed))
    counts = {str(path): [1, path.stat().st_size] for path in packed.glob("*.tar")}
    dataset = open_it(packed)
    dataset.load_state_dict({"epoch": 0, "seen": place, "readers": [1, 1], "counts": counts})
    assert keys(dataset) == whole[place:]


def test_only_a_loaded_state_is_checked_against_the_readers(packed: Path, monkeypatch) -> None:
    """Not where a look at one sample was taken, before there were workers."""
    dataset = open_it(packed)
    next(iter(dataset))
    monkeypatch.setenv("NUM_WORKERS", "2")
    found = []
    for worker in "01":
        monkeypatch.setenv("WORKER", worker)
        found += keys(copy.deepcopy(dataset))
    assert sorted(found) == KEYS


def same(sample: Any) -> Any:
    return sample


def odd(sample: Any) -> bool:
    return int(sample[0].rpartition("-")[2]) % 2 == 1


@pytest.mark.parametrize(
    "behind",
    [
        lambda it: it.map(same),
        lambda it: it.map_tuple(same),
        lambda it: it.select(odd),
        lambda it: it.compose(wds.filters.info(n=0)),
        lambda it: it.batched(4, partial=False),
        lambda it: it.listed(4).map(same),
        lambda it: it.compose(wds.filters.batched(4)),
        lambda it: it.repeat(),
    ],
)
def test_stages_that_go_on_exactly(packed: Path, behind: Any) -> None:
    unbroken = behind(open_it(packed))
    samples = list(itertools.islice(unbroken, 30))
    for place in (0, 1, 5, len(samples)):
        stopped = behind(open_it(packed))
        seen = list(itertools.islice(stopped, place))
        again = behind(open_it(packed))
        again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert [*seen, *itertools.islice(again, len(samples) - place)] == samples, place


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_batches_are_those_of_webdataset(packed: Path, size: int, partial: bool) -> None:
    expected = list(wds.filters.batched(size, partial=partial)(open_it(packed)))
    assert list(open_it(packed).batched(size, partial=partial)) == expected


def pairs(samples: Any) -> Any:
    return itertools.pairwise(samples)


class Odd(dict[str, Any]):
    """A stage that cannot be hashed."""

    def __call__(self, samples: Any) -> Any:
        return (sample for sample in samples if odd(sample))


@pytest.mark.parametrize(
    ("behind", "name", "cure"),
    [
        (lambda it: it.shuffle(20), "shuffle", "shuffle by shuffle_buffer="),
        (lambda it: it.compose(wds.detshuffle(20)), "detshuffle", "shuffle by shuffle_buffer="),
        (lambda it: it.batched(4).unbatched(), "unbatched", "batch in the loader"),
        (lambda it: it.map(same).slice(30), "islice", "batch in the loader"),
        (lambda it: it.rsample(0.9), "rsample", "batch in the loader"),
        (lambda it: it.compose(pairs), "pairs", "batch in the loader"),
        (lambda it: it.compose(Odd()), "Odd", "batch in the loader"),
        (lambda it: it.with_epoch(60), "with_epoch", r"wds.WebLoader\(...\).with_epoch"),
        (lambda it: it.repeat(3), "repeat", "batch in the loader"),
    ],
)
def test_stages_that_do_not(packed: Path, behind: Any, name: str, cure: str) -> None:
    """Every state can be asked for; one that would lose samples cannot be loaded."""
    stopped = behind(open_it(packed))
    start = stopped.state_dict()
    list(itertools.islice(stopped, 5))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["inexact"] == name and len(json.dumps(state)) < 200
    again = behind(open_it(packed))
    for wrong in (state, {"epoch": 0, "batches": 5, "batch_size": 1}):
        with pytest.raises(InputError, match=rf"\.{name}\(\) .*{cure}.*; or .* set_epoch"):
            again.load_state_dict(wrong)
    again.load_state_dict(start)
    again.set_epoch(1)
    if name != "with_epoch":  # which never ends an epoch
        list(again)
        again.load_state_dict(again.state_dict())


def test_batches_cannot_be_counted_behind_select(packed: Path) -> None:
    dataset = open_it(packed).select(odd)
    with pytest.raises(InputError, match=r"\.select\(\)"):
        dataset.load_state_dict({"epoch": 0, "batches": 5, "batch_size": 1})


def test_a_dataset_can_be_copied_and_pickled(packed: Path) -> None:
    dataset = open_it(packed)
    whole = keys(dataset)
    stopped = open_it(packed)
    list(itertools.islice(stopped, 5))
    loaded = open_it(packed)
    loaded.load_state_dict(stopped.state_dict())
    for made in (copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        assert keys(made(open_it(packed))) == whole
        assert keys(copy.deepcopy(made(loaded))) == whole[5:]


def count_one(counter: EpochCounter) -> None:
    with counter.iterations() as iterations:
        iterations.append({"pid": os.getpid()})


@pytest.mark.parametrize("file", ["memory", "temporary"])
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_processes_share_a_count(start: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if file == "temporary":  # as on macOS
        monkeypatch.delattr(os, "memfd_create", raising=False)
    counter, context = EpochCounter(), multiprocessing.get_context(start)
    processes = [context.Process(target=count_one, args=(counter,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with counter.iterations() as iterations:
        assert {each["pid"] for each in iterations} == {each.pid for each in processes}
    with pickle.loads(pickle.dumps(counter)).iterations() as iterations:
        assert iterations == []


def test_a_count_stays_small_and_whole() -> None:
    counter = EpochCounter()
    for number in range(1_200):
        with counter.iterations() as iterations:
            iterations.append({"number": number})
    with pytest.raises(ZeroDivisionError), counter.iterations() as iterations:
        iterations.clear()
        raise ZeroDivisionError
    with counter.iterations() as iterations:
        assert [each["number"] for each in iterations] == list(range(700, 1_200))


def test_descriptors_are_given_back(packed: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        keys(open_it(packed))
    assert len(os.listdir("/dev/fd")) == before


def test_readers_shuffle_each_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards hold neighbours at the same place: in one order, workers would give them together."""
    write_pairs(tmp_path / "source", 800, largest=1)
    for shard_id in range(2):
        create_webdataset(tmp_path / "source", tmp_path / "packed", shard_id, 2)
    rows = {f: place // 2 for place, f in enumerate(sorted(f"sample-{n}" for n in range(800)))}
    monkeypatch.setenv("NUM_WORKERS", "2")
    orders = {}
    for seed, epoch, worker in itertools.product(range(2), range(2), range(2)):
        monkeypatch.setenv("WORKER", str(worker))
        dataset = open_webdataset(tmp_path / "packed", "__key__", decode=None, seed=seed)
        dataset.set_epoch(epoch)
        orders[seed, epoch, worker] = [rows[key] for key in keys(dataset)]
    for one, other in itertools.combinations(orders.values(), 2):
        assert len(one) == len(other) == 400
        assert sum(map(int.__eq__, one, other)) < 20, "by chance, one"
