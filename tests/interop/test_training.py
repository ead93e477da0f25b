"""Feed real torch DataLoaders from open_webdataset: worker processes, two DDP ranks, training."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # else every forked worker imports it, in the midst of which 3.11 may collect
import pytest
import webdataset as wds
from conftest import ROOT, jpeg, run_script
from PIL import Image

from create_webdataset import create_webdataset
from read_webdataset import open_webdataset
from sharding.errors import InputError, PackError

torch = pytest.importorskip("torch", reason="see `make interop`")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
KEYS = sorted(f"sample-{number}" for number in range(103))
SHARDS = 7  # of 14 or 15 samples: neither two ranks nor their workers get equal shares
Epoch = list[str]  # keys, in the order in which they came


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for number, key in enumerate(KEYS):
        Image.new("RGB", (16, 16), (number, 2 * number, 0)).save(folder / f"{key}.jpg")
        (folder / f"{key}.txt").write_text(f"é {number}", encoding="utf-8")
    return folder


def pack(source: Path, output: Path, total_shards: int) -> Path:
    for shard_id in range(total_shards):
        create_webdataset(source, output, shard_id, total_shards, ["jpg", "txt"])
    return output


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(source, tmp_path_factory.mktemp("training") / "packed", SHARDS)


def open_loader(path: Path, num_workers: int, seed: int = 0, **options: Any) -> wds.WebLoader:
    options = {"persistent_workers": num_workers > 0, "batch_size": 4, **options}
    dataset = open_webdataset(path, ("__key__",), decode=None, seed=seed)
    return options.pop("loader", wds.WebLoader)(dataset, num_workers=num_workers, **options)


def read_epochs(loader: Iterable[Any], count: int = 2) -> list[Epoch]:
    return [[key for (keys,) in loader for key in keys] for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("loader", [wds.WebLoader, torch.utils.data.DataLoader])
def test_each_sample_once_in_another_order(packed: Path, loader: type, num_workers: int) -> None:
    epochs = read_epochs(open_loader(packed, num_workers, loader=loader), 3)
    assert [sorted(epoch) for epoch in epochs] == [KEYS] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert read_epochs(open_loader(packed, num_workers, loader=loader), 3) == epochs
    assert read_epochs(open_loader(packed, num_workers, seed=1, loader=loader), 1)[0] != epochs[0]


def test_spawned_workers(packed: Path) -> None:
    """As on macOS; like forkserver, which Python 3.14 uses on Linux, spawn pickles the dataset."""
    spawned = open_loader(packed, 2, multiprocessing_context="spawn")
    assert read_epochs(spawned) == read_epochs(open_loader(packed, 2))


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_that_are_started_anew(packed: Path, start: str) -> None:
    anew = open_loader(packed, 2, persistent_workers=False, multiprocessing_context=start)
    assert read_epochs(anew) == read_epochs(open_loader(packed, 2))


def test_epochs_of_workers_that_are_started_anew(packed: Path) -> None:
    """Each has the order that persistent workers give it, whatever was begun before."""
    expected = read_epochs(open_loader(packed, 2), 4)
    dataset = open_webdataset(packed, "__key__", decode=None)
    next(iter(dataset))  # a look in the main process counts no epoch of the workers
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=2)
    assert read_epochs(loader, 2) == expected[:2]
    next(iter(loader))  # cut at once
    assert read_epochs(loader, 1) == expected[3:]
    dataset.set_epoch(1)
    assert read_epochs(loader, 2) == expected[1:3]


def test_workers_of_equal_seeds(packed: Path) -> None:
    """A program that seeds torch before each epoch, or each loader, still gets new orders."""
    dataset = open_webdataset(packed, "__key__", decode=None)
    epochs = []
    for num_workers in (2, 2, 3, 2):
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(dataset, 4, num_workers=num_workers)
        epochs += read_epochs(loader, 1)
    assert [sorted(epoch) for epoch in epochs] == [KEYS] * 4
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_counts_for_itself(packed: Path, copied: Any) -> None:
    dataset = open_webdataset(packed, "__key__", decode=None)
    expected = read_epochs(torch.utils.data.DataLoader(dataset, 4, num_workers=2), 2)
    loader = torch.utils.data.DataLoader(copied(dataset), 4, num_workers=2)
    assert read_epochs(loader, 2) == expected


def test_a_look_does_not_move_what_was_loaded(packed: Path) -> None:
    """A loaded state is taken once by the workers; a look at it in the main process is no use."""
    epochs = read_epochs(open_loader(packed, 2), 4)
    dataset = open_webdataset(packed, "__key__", decode=None)
    dataset.load_state_dict({"epoch": 1, "batches": 6, "batch_size": 4})
    next(iter(dataset))
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=2)
    assert read_epochs(loader, 3) == [epochs[1][24:], *epochs[2:]]


def test_readers_that_do_not_fit_are_refused_each_time(packed: Path) -> None:
    dataset = open_webdataset(packed, "__key__", decode=None)
    dataset.load_state_dict({"epoch": 1, "seen": 3, "readers": [1, 3]})
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=2)
    for _ in range(2):
        with pytest.raises(PackError, match="of 1 ranks with 3 workers each, not of 1 with 2"):
            list(loader)
    dataset.set_epoch(1)
    assert sorted(read_epochs(loader, 1)[0]) == KEYS


def test_an_epoch_is_the_same_wherever_the_last_was_cut(packed: Path) -> None:
    """How far workers read beyond a cut is chance; the order of the next epoch must not be."""
    second = []
    for length in (5, 20):
        loader = open_loader(packed, 3)
        read_epochs(loader.with_epoch(length), 1)
        second += read_epochs(loader.with_epoch(20), 1)
    assert second[0] == second[1]


def test_fewer_shards_than_workers(source: Path, tmp_path: Path, capfd: Any) -> None:
    """One warning, from the first worker, which is spawned since pytest keeps those of forks."""
    loader = open_loader(pack(source, tmp_path / "two", 2), 3, multiprocessing_context="spawn")
    assert [sorted(epoch) for epoch in read_epochs(loader)] == [KEYS] * 2
    said = capfd.readouterr().err
    assert (
        said.count("2 shards for 3 readers (ranks: 1, workers of each: 3): some get no samples")
        == 1
    )


def run_rank(rank: int, path: Path, folder: Path, start: str, opened: Any) -> None:
    """Be one of two ranks: read two epochs as they are, then in step with the other rank."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    loader = open_loader(path, 2, multiprocessing_context=start)
    epochs = read_epochs(loader)
    anew = torch.utils.data.DataLoader(opened, 4, num_workers=2, multiprocessing_context=start)
    epochs += read_epochs(anew)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    steps = []
    for length in (11, 16):
        for _ in range(2):
            steps.append(0)
            for (keys,) in loader.with_epoch(length):
                model(torch.ones(len(keys), 1)).sum().backward()  # waits for the other rank
                steps[-1] += 1
    torch.save((epochs, steps), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_ranks(packed: Path, tmp_path: Path, start: str) -> None:
    """They share each epoch out; given a length, both do as many batches, of the 11 to 16 in it."""
    opened = open_webdataset(packed, "__key__", decode=None)  # which the ranks inherit
    arguments = (packed, tmp_path, start, opened)
    begin = {"join": False, "start_method": start}
    ranks = torch.multiprocessing.start_processes(run_rank, arguments, 2, **begin)
    deadline = time.monotonic() + 120
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()
    (first, steps), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [KEYS] * 4
    assert first[2] != first[3]
    assert set(first[0]) != set(first[1]), "a rank meets all shards over time"
    assert steps == others == [11, 11, 16, 16]


def open_stateful(path: Path, num_workers: int, persistent: bool) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = open_webdataset(path, "__key__", decode=None, shuffle_buffer=10, seed=1)
    keep = persistent and num_workers > 0
    return StatefulDataLoader(dataset, 4, num_workers=num_workers, persistent_workers=keep)


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "anew"])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stopped_training_is_taken_up_exactly(packed, num_workers: int, persistent: bool) -> None:
    """Stopped at each batch of an epoch, and between two: what follows is as if unbroken."""
    loader = open_stateful(packed, num_workers, persistent)
    epochs = read_epochs(loader, 4)
    batches = len(list(loader))
    places = (
        range(batches + 1) if num_workers == 0 else (0, 1, 6, batches - 2, batches - 1, batches)
    )
    for epoch in range(3 if num_workers == 0 else 2):
        for place in places:
            loader = open_stateful(packed, num_workers, persistent)
            read_epochs(loader, epoch)
            batch = iter(loader)
            seen = [key for _ in range(place) for key in next(batch)[0]]
            assert seen == epochs[epoch][: len(seen)]
            if place == batches:
                assert next(batch, None) is None
            again = open_stateful(packed, num_workers, persistent)
            again.load_state_dict(loader.state_dict())
            rest, after = read_epochs(again, 2)
            if place == batches:
                assert rest == epochs[epoch + 1], (epoch, place)
            else:
                assert (rest, after) == (epochs[epoch][len(seen) :], epochs[epoch + 1]), place


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_webdataset_are_taken_up_exactly(packed: Path, num_workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def open_it(size: int = 4) -> Any:
        dataset = open_webdataset(packed, "__key__", decode=None, shuffle_buffer=10).batched(size)
        return StatefulDataLoader(dataset, None, num_workers=num_workers)

    unbroken = read_epochs(open_it(), 2)
    for place in (0, 1, 9, len(list(open_it()))):
        loader = open_it()
        batches = iter(loader)
        seen = [key for _ in range(place) for key in next(batches)[0]]
        again = open_it()
        again.load_state_dict(loader.state_dict())
        assert seen + read_epochs(again, 1)[0] == unbroken[0], place
        assert read_epochs(again, 1)[0] == unbroken[1], place


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stage_that_holds_samples_back(packed: Path, num_workers: int) -> None:
    """States can be asked for all the time; one of mid-epoch is refused, and says what to do."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def open_it() -> Any:
        dataset = open_webdataset(packed, "__key__", decode=None).shuffle(20)
        return StatefulDataLoader(dataset, 4, num_workers=num_workers)

    loader = open_it()
    batches = iter(loader)
    start = loader.state_dict()
    next(batches)
    cut = loader.state_dict()
    list(batches)
    end = loader.state_dict()
    again = open_it()
    again.load_state_dict(cut)
    with pytest.raises(InputError, match=r"\.shuffle\(\) holds samples back.* shuffle_buffer="):
        list(again)
    # Of workers, one may have given its last batch and not know that it was the last.
    for state in (start, end) if num_workers == 0 else (start,):
        again = open_it()
        again.load_state_dict(state)
        assert sorted(read_epochs(again, 1)[0]) == KEYS


def test_an_epoch_with_many_states_and_shards(source: Path, tmp_path: Path) -> None:
    """What a loader of torchdata asks for with each batch has one size, however much was read."""
    loader = open_stateful(pack(source, tmp_path / "many", len(KEYS)), 2, True)
    sizes = []
    for _ in range(2):
        for _ in loader:
            workers = loader.state_dict()["_snapshot"]["_worker_snapshots"].values()
            sizes += [len(json.dumps(worker["dataset_state"])) for worker in workers]
    assert max(sizes) < 150 and len(sizes) > 2 * len(KEYS) / 4


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_loop_that_counts_its_batches(packed: Path, num_workers: int) -> None:
    """Without torchdata: epoch and number of batches are enough."""
    loader = open_loader(packed, num_workers, batch_size=4)
    first, second = ([key for (keys,) in loader for key in keys] for _ in range(2))
    assert first != second
    dataset = open_webdataset(packed, "__key__", decode=None, seed=0)
    dataset.load_state_dict({"epoch": 1, "batches": 9, "batch_size": 4})
    again = wds.WebLoader(dataset, num_workers=num_workers, batch_size=4)
    assert [key for (keys,) in again for key in keys] == second[36:]


def evaluate(rank: int, path: Path, folder: Path) -> None:
    """Be one of two ranks: read what it gets, then gather what both have seen."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    dataset = open_webdataset(path, "__key__", decode=None, shuffle_buffer=0, even=False)
    loader = wds.WebLoader(dataset, num_workers=2, batch_size=4)
    seen = [None, None]
    torch.distributed.all_gather_object(seen, [key for (keys,) in loader for key in keys])
    if rank == 0:
        torch.save(seen, folder / "seen.pt")
    torch.distributed.destroy_process_group()


def test_an_evaluation_sees_each_sample_once(source: Path, tmp_path: Path) -> None:
    """37 samples in 3 shards, on 2 ranks with 2 workers each."""
    few = tmp_path / "few"
    few.mkdir()
    for key in KEYS[:37]:
        for field in ("jpg", "txt"):
            (few / f"{key}.{field}").symlink_to(source / f"{key}.{field}")
    arguments = (pack(few, tmp_path / "o", 3), tmp_path)
    torch.multiprocessing.start_processes(evaluate, arguments, 2, start_method="spawn")
    first, second = torch.load(tmp_path / "seen.pt")
    assert sorted(first + second) == KEYS[:37] and first and second


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_error_in_a_worker_names_the_sample(tmp_path: Path, start: str) -> None:
    (tmp_path / "source").mkdir()
    for number in range(4):
        (tmp_path / "source" / f"{number}.txt").write_bytes(b"\xe9" if number == 2 else b"good")
    for shard_id in range(2):
        create_webdataset(tmp_path / "source", tmp_path / "o", shard_id, 2, "txt")
    dataset = open_webdataset(tmp_path / "o", "txt", shuffle_buffer=0)
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context=start)
    with pytest.raises(RuntimeError, match=r"shard-000000.tar': sample '2', field 'txt'"):
        list(loader)


@pytest.mark.parametrize("decode", ["torchrgb", "pilrgb"])
def test_training(packed: Path, decode: str) -> None:
    dataset = open_webdataset(packed, decode=decode)
    if decode == "pilrgb":
        dataset = dataset.map_tuple(lambda image: torch.tensor(np.array(image)).permute(2, 0, 1))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for images, texts in wds.WebLoader(dataset, batch_size=8, num_workers=2):
        assert images.shape == (len(texts), 3, 16, 16)
        pixels = images if decode == "torchrgb" else images / 255
        targets = torch.tensor([[int(text.removeprefix("é ")) / 103] for text in texts])
        loss = torch.nn.functional.mse_loss(model(pixels), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example(ranks: int, tmp_path: Path) -> None:
    """It runs as it stands; killed at two random steps, it takes the steps of an unbroken run."""
    loop = (ROOT / "examples" / "train.py").read_text(encoding="utf-8")
    made = run_script("make_dummy_data.sh", "500", tmp_path / "source")
    assert made.returncode == 0, made.stderr
    for number in range(0, 500, 9):
        (tmp_path / "source" / f"sample-{number}.jpg").write_bytes(jpeg(9 + number, 70))
    pack(tmp_path / "source", tmp_path / "webdataset_output", SHARDS)
    kill = 'if step == int(os.environ.get("KILL", 0)):\n                os.kill(os.getpid(), 9)'
    save = "if step % SAVE_EVERY == 0:"
    assert loop.count(save) == loop.count("SAVE_EVERY = 100") == 1
    often = loop.replace(save, f"{kill}\n            {save}").replace("EVERY = 100", "EVERY = 3")

    def start(text: str, kill: int, ranks: int = ranks) -> subprocess.CompletedProcess[str]:
        (tmp_path / "train.py").write_text(text, encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if ranks == 2 else []
        more = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "KILL": str(kill)}
        return subprocess.run(
            [sys.executable, *launcher, "train.py"],
            cwd=tmp_path,
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def train(text: str, kill: int = 0) -> list[str]:
        done = start(text, kill)
        assert (done.returncode != 0) == (kill > 0), done.stderr[-2_000:]
        return re.findall(r"epoch \d, rank \d, step \d+: loss [\d.]+", done.stdout)

    unbroken, state = train(loop), tmp_path / "train.pt"
    epoch, steps, _, trained, _ = torch.load(state)
    assert steps >= 3 * (500 // (32 * ranks) - 1) and len(unbroken) == steps * ranks
    state.unlink()
    first, second = kills = sorted(random.sample(range(1, steps + 1), 2))
    broken = {*train(often, first), *train(often, second), *train(often)}
    assert broken == set(unbroken), kills
    *ended, _, again, _ = torch.load(state)
    assert ended == [epoch, steps] == [3, steps], kills
    for name, weights in trained.items():
        assert torch.equal(weights, again[name]), (kills, name)
    done = start(loop, 0)
    assert "loss" not in done.stdout, "there is nothing left to do"
    assert f"train.pt: 3 of 3 epochs and {steps} steps are done" in done.stdout

    state.unlink()
    train(often, 5)
    other = start(loop, 0, 3 - ranks)
    refusal = f"the state is of {ranks} ranks with 2 workers each, not of {3 - ranks} with 2"
    assert other.returncode and refusal in other.stderr


def test_a_step_with_each_example_for_transform(tmp_path: Path) -> None:
    """What the functions in examples/ make goes through decoding, batches and a step."""
    raw, examples = tmp_path / "raw", ROOT / "examples"
    for number in range(8):
        key = f"{('cats', 'dogs')[number % 2]}/{number}"
        (raw / key).parent.mkdir(parents=True, exist_ok=True)
        (raw / f"{key}.jpg").write_bytes(jpeg(512, 512))
    rows = [
        json.dumps({"file_name": f"{p.parent.name}/{p.name}", "text": "red"})
        for p in raw.rglob("*.jpg")
    ]
    (raw / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (raw / "classes.txt").write_text("cats\ndogs\n")
    (raw / "dogs" / "broken.jpg").write_bytes(b"no picture")
    for name in ("captions", "classes"):
        (raw / f"{name}.py").write_text((examples / f"{name}.py").read_text())
    functions = {
        f"{examples}/drop_broken.py:whole": ("jpg",),
        f"{examples}/shrink.py:shrink": ("jpg", "cls"),
        f"{raw}/classes.py:number": ("jpg", "cls"),
        f"{raw}/captions.py:caption": ("jpg", "txt", "json"),
    }
    for spec, fields in functions.items():
        output = tmp_path / spec.rpartition(":")[2]
        create_webdataset(raw, output, 0, 1, "jpg", transform=spec)
        (raw / "dogs" / "broken.jpg").unlink(missing_ok=True)
        dataset = open_webdataset(output, fields, decode="torchrgb")
        batches = list(wds.WebLoader(dataset, batch_size=4, num_workers=0))
        assert [len(batch[0]) for batch in batches] == [4, 4]
        images = batches[0][0]
        assert images.shape[2:] == ((256, 256) if "shrink" in spec else (512, 512))
        model = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2)
        )
        labels = batches[0][1] if "cls" in fields else torch.zeros(4, dtype=torch.long)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        assert model[2].weight.grad.abs().sum() > 0
