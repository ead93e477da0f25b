"""Train on the demo's shards, in a short loop: predict how many words a picture's text has.

In the folder of the project: pip install torch, then PYTHONPATH=. python examples/train_short.py.
A stopped training begins again; train.py resumes where it stopped.
"""

import torch

from read_webdataset import open_webdataset

if __name__ == "__main__":  # workers that are spawned import this file
    dataset = open_webdataset("webdataset_output", "jpg,txt", decode="torchrgb")
    dataset = dataset.map_tuple(torch.nn.AdaptiveAvgPool2d(64))  # pictures of one size
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for epoch in range(3):
        for images, texts in loader:  # 4 x 3 x 64 x 64 floats, and 4 strings
            words = torch.tensor([[len(text.split())] for text in texts], dtype=torch.float32)
            loss = torch.nn.functional.mse_loss(model(images), words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
