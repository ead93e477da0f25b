"""Loaders of accelerate on two processes: each sample once in each epoch, or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from create_webdataset import create_webdataset

pytest.importorskip("accelerate", reason="see `make interop`")
LOOP = """
import json
import sys
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from read_webdataset import open_webdataset


def main(accelerator, path, prepare, split, loading):
    dataset = open_webdataset(path, "cls", shuffle_buffer=20, split_by_node=split)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, **loading)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    if prepare:
        loader = accelerator.prepare(loader)
    epochs = []
    for epoch in range(2):
        epochs.append([])
        for (numbers,) in loader:
            numbers = numbers.to(accelerator.device)
            loss = model(numbers[:, None].float()).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            epochs[-1] += numbers.tolist()
    return epochs


if __name__ == "__main__":
    path, dispatch, prepare, split = json.loads(sys.argv[1])
    dealing = DataLoaderConfiguration(dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=dealing)
    found = []
    spawn = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"}
    for loading in ({"num_workers": 0}, {"num_workers": 2}, spawn):
        try:
            found.append(main(accelerator, path, prepare, split, loading))
        except ValueError as error:
            found.append(str(error))
    with open(f"{accelerator.process_index}.json", "w") as stream:
        json.dump(found, stream)
    accelerator.end_training()
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 numbers in 8 shards."""
    folder = tmp_path_factory.mktemp("accelerate")
    (folder / "source").mkdir()
    for number in range(64):
        (folder / "source" / f"{number:02d}.cls").write_text(str(number))
    for shard_id in range(8):
        create_webdataset(folder / "source", folder / "o", shard_id, 8, "cls")
    return folder / "o"


def run_loop(path: Path, folder: Path, **flags: bool | None) -> list[tuple[Any, Any]]:
    """Run the loop on two processes; return what each loader gave to both."""
    (folder / "train.py").write_text(LOOP, encoding="utf-8")
    arguments = json.dumps([str(path), *flags.values()])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "train.py",
            arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == 3
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("prepare", "dispatch"),
    [(False, None), (True, None), (True, False)],
    ids=["not prepared", "dispatched", "dealt in each process"],
)
def test_each_sample_once(packed: Path, prepare: bool, dispatch: bool | None, tmp_path) -> None:
    """Read by no worker, or by two of each process, forked or spawned."""
    found = run_loop(packed, tmp_path, dispatch=dispatch, prepare=prepare, split=not prepare)
    for both in found:
        for first, second in zip(*both, strict=True):
            assert sorted(first + second) == list(range(64)) and len(first) == len(second)


@pytest.mark.parametrize("dispatch", [None, False])
def test_no_sample_is_dealt_out_twice(packed: Path, dispatch: bool | None, tmp_path: Path) -> None:
    """A loader that is prepared, though each process reads its own shards, would lose half."""
    found = run_loop(packed, tmp_path, dispatch=dispatch, prepare=True, split=True)
    for said in (said for both in found for said in both):
        assert "accelerate deals the samples" in said
        assert "open_webdataset(..., split_by_node=False)" in said
