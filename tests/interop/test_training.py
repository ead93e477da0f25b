"""Feed real torch DataLoaders from open_webdataset: worker processes, two DDP ranks, training."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from create_webdataset import create_webdataset
from read_webdataset import open_webdataset

torch = pytest.importorskip("torch", reason="see `make interop`")
KEYS = [f"sample-{number}" for number in range(103)]
SHARDS = 7  # of 14 or 15 samples: neither two ranks nor their workers get equal shares
Epochs = list[list[str]]  # keys, in the order in which they came


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


def read_epochs(loader: Iterable[Any], count: int = 2) -> Epochs:
    return [[key for (keys,) in loader for key in keys] for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("loader", [wds.WebLoader, torch.utils.data.DataLoader])
def test_each_sample_once_in_another_order(packed: Path, loader: type, num_workers: int) -> None:
    epochs = read_epochs(open_loader(packed, num_workers, loader=loader), 3)
    assert [sorted(epoch) for epoch in epochs] == [sorted(KEYS)] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert read_epochs(open_loader(packed, num_workers, loader=loader), 3) == epochs
    assert read_epochs(open_loader(packed, num_workers, seed=1, loader=loader), 1)[0] != epochs[0]


def test_spawned_workers(packed: Path) -> None:
    """As on macOS; as forkserver, which Python 3.14 uses on Linux, spawn pickles the dataset."""
    spawned = open_loader(packed, 2, multiprocessing_context="spawn")
    assert read_epochs(spawned) == read_epochs(open_loader(packed, 2))


def test_workers_that_are_not_persistent_repeat_the_order(packed: Path) -> None:
    first, second = read_epochs(open_loader(packed, 2, persistent_workers=False))
    assert first == second
    assert sorted(first) == sorted(KEYS)


def test_cut_epochs_are_reproducible(packed: Path) -> None:
    """How far ahead of a cut the workers read is chance; what comes after must not depend on it."""
    runs = [read_epochs(Slow(open_loader(packed, 3), pause), 3) for pause in (0, 0.02)]
    assert runs[0] == runs[1]


class Slow:
    """A training loop that stops after 24 of at least 27 batches, and takes its time."""

    def __init__(self, loader: wds.WebLoader, pause: float) -> None:
        self.loader, self.pause = loader.with_epoch(24), pause

    def __iter__(self) -> Any:
        for batch in self.loader:
            time.sleep(self.pause)
            yield batch


def test_fewer_shards_than_workers(source: Path, tmp_path: Path, capfd: Any) -> None:
    """One warning, from the first worker, which is spawned since pytest keeps those of forks."""
    loader = open_loader(pack(source, tmp_path / "two", 2), 3, multiprocessing_context="spawn")
    assert [sorted(epoch) for epoch in read_epochs(loader)] == [sorted(KEYS)] * 2
    said = capfd.readouterr().err
    assert said.count("2 shards for 3 readers (1 ranks of 3 workers): some get no samples") == 1


def run_rank(rank: int, path: Path, folder: Path, start: str, length: int) -> None:
    """Be one of two ranks: read two epochs, in step with the other where they have a length."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    loader = open_loader(path, 2, multiprocessing_context=start)
    if length:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        loader = loader.with_epoch(length).map(lambda batch: step(model, batch))
    torch.save(read_epochs(loader), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step(model: Any, batch: Any) -> Any:
    model(torch.ones(len(batch[0]), 1)).sum().backward()  # waits for the other rank
    return [[f"batch of {len(batch[0])}"]]


def run_ranks(path: Path, folder: Path, start: str = "fork", length: int = 0) -> list[Epochs]:
    """Return the epochs of both ranks; end them when they take more than 90 seconds."""
    arguments = (path, folder, start, length)
    ranks = torch.multiprocessing.start_processes(run_rank, arguments, 2, join=False)
    deadline = time.monotonic() + 90
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_ranks_share_each_epoch(packed: Path, tmp_path: Path, start: str) -> None:
    first, second = run_ranks(packed, tmp_path, start)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(KEYS)] * 2
    assert set(first[0]) != set(first[1]), "the ranks meet all shards over time"


@pytest.mark.parametrize("length", [11, 16])
def test_two_ranks_in_step(packed: Path, tmp_path: Path, length: int) -> None:
    """One rank has 12 batches at least, the other 15: both are cut, or one begins again."""
    for epochs in run_ranks(packed, tmp_path, length=length):
        assert [len(epoch) for epoch in epochs] == [length] * 2


def as_tensor(image: Image.Image) -> Any:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


@pytest.mark.parametrize("decode", ["torchrgb", "pilrgb"])
def test_training(packed: Path, decode: str) -> None:
    dataset = open_webdataset(packed, decode=decode)
    if decode == "pilrgb":
        dataset = dataset.map_tuple(as_tensor)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for images, texts in wds.WebLoader(dataset, batch_size=8, num_workers=2):
        assert images.shape == (len(texts), 3, 16, 16)
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        targets = torch.tensor([[int(text.removeprefix("é ")) / 103] for text in texts])
        loss = torch.nn.functional.mse_loss(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
