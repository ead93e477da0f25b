"""Train on one process or several, and go on after a stop exactly where the training was.

In the folder of the project: pip install torch torchdata, then
    PYTHONPATH=. python examples/train.py
    PYTHONPATH=. torchrun --nproc-per-node 2 examples/train.py
After a stop, the same command goes on from train.pt, with as many ranks and workers as before.
Between epochs, the number of ranks may change.
"""

import os

import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader

from read_webdataset import open_webdataset

EPOCHS = 3
SAVE_EVERY = 100  # steps


def gather(value):
    """Return what each rank has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main():
    """Train for all epochs that are left."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)  # on GPUs: "cpu:gloo,cuda:nccl", and GPU LOCAL_RANK
    rank, first, step = dist.get_rank(), 0, 0
    torch.manual_seed(0)
    resize = torch.nn.AdaptiveAvgPool2d(64)  # of each picture; a batch needs one size
    dataset = open_webdataset("webdataset_output", decode="torchrgb", seed=0).map_tuple(resize)
    loader = StatefulDataLoader(dataset, batch_size=32, num_workers=2, persistent_workers=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1))
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def save(epoch, place):
        """Write one file for all ranks, which replaces the last one whole."""
        state = [epoch, step, gather(place), model.state_dict(), optimizer.state_dict()]
        if rank == 0:
            torch.save(state, "train.pt.new")
            os.replace("train.pt.new", "train.pt")

    if os.path.exists("train.pt"):
        first, step, places, weights, moments = torch.load("train.pt", map_location="cpu")
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        dataset.set_epoch(first)
        loader.load_state_dict(places[rank % len(places)])  # mid-epoch, other ranks are refused
        print(f"train.pt: {first} of {EPOCHS} epochs and {step} steps are done")
    for epoch in range(first, EPOCHS):
        batches = iter(loader)
        # An epoch ends for all ranks when one has no more batches: DDP waits for all of them.
        while all(gather((batch := next(batches, None)) is not None)):
            images, texts = batch  # 32 x 3 x 64 x 64 floats, and 32 strings
            words = torch.tensor([[len(text.split())] for text in texts], dtype=torch.float32)
            loss = torch.nn.functional.mse_loss(model(images), words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"epoch {epoch}, rank {rank}, step {step}: loss {loss.item():.6f}")
            if step % SAVE_EVERY == 0:
                save(epoch, loader.state_dict())
        save(epoch + 1, {})
    dist.destroy_process_group()


if __name__ == "__main__":  # workers that are spawned import this file
    main()
