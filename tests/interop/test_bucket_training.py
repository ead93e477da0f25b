"""Feed torch DataLoaders from a bucket: forked and spawned workers, and an exact resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Bucket, write_pairs

from create_webdataset import create_webdataset

pytest.importorskip("torch", reason="see `make interop`")
LOOP = """
import itertools, json, sys
from torchdata.stateful_dataloader import StatefulDataLoader
from read_webdataset import open_webdataset

def open_loader():
    dataset = open_webdataset(path, ("__key__",), decode=None, seed=5)
    return StatefulDataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=start)

def read(loader):
    return [key for (keys,) in loader for key in keys]

if __name__ == "__main__":
    path, start = sys.argv[1:]
    loader = open_loader()
    epochs = [read(loader), read(loader)]
    cut = open_loader()
    seen = [key for (keys,) in itertools.islice(cut, 7) for key in keys]
    state = json.loads(json.dumps(cut.state_dict()))
    rest = open_loader()
    rest.load_state_dict(state)
    assert seen + read(rest) == epochs[0], "the rest of the first epoch"
    assert read(rest) == epochs[1], "the second epoch"
    print(json.dumps(epochs))
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_a_bucket_as_a_folder(start: str, bucket: Bucket, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 103)
    for shard_id in range(7):
        create_webdataset(source, tmp_path / "o", shard_id, 7)
    (tmp_path / "loop.py").write_text(LOOP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    epochs = []
    for path in (str(tmp_path / "o"), bucket.upload(tmp_path / "o", "packed/")):
        command = [sys.executable, str(tmp_path / "loop.py"), path, start]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        epochs.append(json.loads(done.stdout))
    assert epochs[0] == epochs[1] and len(set(epochs[0][0])) == 103
