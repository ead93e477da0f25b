"""The readers, each as its own documentation has it; see contestant.py for how they are called."""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
from typing import Any

import contestant
from contestant import Task, imported


def content(sample: Any) -> bytes:
    """Return the image of a sample, as bytes or pixels, and its text."""
    image, text = (sample["jpg"], sample["txt"]) if isinstance(sample, dict) else sample
    if hasattr(image, "permute"):  # a tensor: colours first, each from 0 to 1
        image = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    if hasattr(image, "tobytes"):
        image = image.tobytes()
    return bytes(image) + (text.encode() if isinstance(text, str) else text)


def count(samples: Any, workers: str = "") -> None:
    """Print how many samples are read; where they are to be checked, a checksum of them, too."""
    if workers:
        from torch.utils.data import DataLoader

        samples = DataLoader(samples, batch_size=None, num_workers=int(workers))
    if os.environ.get("BENCH_CHECK"):
        digests = sorted(hashlib.sha256(content(sample)).digest() for sample in samples)
        print("checksum", hashlib.sha256(b"".join(digests)).hexdigest()[:12])
        samples = digests
    print("counted", sum(1 for _ in samples))


def needed(decode: str | None, workers: str) -> list[str]:
    """Name the modules that a reader imports only to decode, or in workers."""
    pillow = ["PIL.Image"] if decode else []
    return [*pillow, "torch.utils.data"] if workers or decode == "torchrgb" else pillow


def ours(task: Task, decode: str | None = None, workers: str = "") -> None:
    """Read shards as a training does."""
    later = "sharding.pipeline", *needed(decode, workers)
    reader = contestant.ours("read_webdataset", task, *later)
    count(reader.open_webdataset(task.source, decode=decode, shuffle_buffer=0), workers)


def ours_count(task: Task) -> None:
    """Count the samples of shards."""
    print("counted", contestant.ours("read_webdataset", task).count_samples(task.source))


def wds(task: Task, decode: str | None = None, workers: str = "") -> None:
    """Read shards with a plain loop, or as a training does; those in a bucket through curl."""
    wds, *_ = map(importlib.import_module, ("webdataset", *needed(decode, workers)))
    imported()
    urls: Any = sorted(glob.glob(f"{task.source}/*.tar"))
    if task.in_bucket:
        user = '"$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'
        curl = f'curl --fail --silent --aws-sigv4 "aws:amz:$AWS_REGION:s3" --user {user}'
        folder = f"$AWS_ENDPOINT_URL/{task.source.removeprefix('s3://')}"
        urls = f"pipe:{curl} {folder}/shard-{{000000..000003}}.tar"
    dataset = wds.WebDataset(urls, shardshuffle=False)
    if decode:
        dataset = dataset.decode(decode)
    count(dataset.to_tuple("jpg", "txt") if decode or workers else dataset, workers)


def litdata(task: Task, workers: str = "") -> None:
    """Read the chunks of litdata; those in a bucket through an empty cache."""
    import litdata
    from litdata.streaming import downloader

    imported()
    options: dict[str, Any] = {}
    if task.in_bucket:
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for that
        options["cache_dir"] = f"{task.output}/cache"
        options["storage_options"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    count(litdata.StreamingDataset(f"{task.source}/chunks", **options), workers)


if __name__ == "__main__":
    contestant.main(globals())
