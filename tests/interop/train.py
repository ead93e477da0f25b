"""A training that can be stopped at any step and goes on exactly where it was.

usage: python train.py SHARDS STATE [STEPS]

or, on two ranks, `torchrun --nproc-per-node 2 train.py SHARDS STATE`. STATE is a folder, in which
each rank saves itself after every step; with STEPS, it stops after so many. Needs torch, torchdata.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader

from read_webdataset import open_webdataset

BATCH, WORKERS, EPOCHS, SEED = 8, 2, 2, 0


def main(shards: str, folder: str, steps: int = sys.maxsize) -> None:
    """Train a small model to guess the number of words from a picture of 64 x 64."""
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(SEED)
    dataset = open_webdataset(shards, decode="torchrgb", seed=SEED)
    loader = StatefulDataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1))
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    parts = {"loader": loader, "model": model, "optimizer": optimizer}
    path, epoch, step = os.path.join(folder, f"rank-{rank}.pt"), 0, 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=False)
        epoch, step = saved["epoch"], saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    while epoch < EPOCHS:
        batches = iter(loader)
        while (batch := next_of_all(batches, ranks)) is not None:
            images, texts = batch
            words = torch.tensor([[len(text.split())] for text in texts], dtype=torch.float32)
            loss = torch.nn.functional.mse_loss(model(images), words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"epoch {epoch}, rank {rank}, step {step}: loss {loss.item():.6f}", flush=True)
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"epoch": epoch, "step": step, **states}, f"{path}-new")
            os.replace(f"{path}-new", path)
            if step >= steps:
                return
        epoch += 1


def next_of_all(batches, ranks: int):
    """Return the next batch, or None as soon as any rank has none: DDP steps together."""
    batch = next(batches, None)
    if ranks > 1:
        have = torch.tensor(int(batch is not None))
        dist.all_reduce(have, dist.ReduceOp.MIN)
        batch = batch if have else None
    return batch


if __name__ == "__main__":  # workers that are spawned, as on macOS, import this file
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
    if dist.is_initialized():
        dist.destroy_process_group()
