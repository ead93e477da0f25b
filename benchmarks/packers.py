"""The packers, each as its own documentation has it; see contestant.py for how they are called."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import contestant
from contestant import CPUS, Task, imported

LOCAL_RAY: dict[str, Any] = {"address": "local", "num_cpus": CPUS}
LOCAL_RAY |= {"include_dashboard": False, "log_to_driver": False}


def images(task: Task) -> list[str]:
    """List the samples of a task, as the paths of their images."""
    return sorted(glob.glob(f"{task.source}/*.jpg"))[task.part :: task.parts]


def load(image: str) -> dict[str, Any]:
    """Read a sample, as the loop body of a packer does."""
    with open(image, "rb") as stream:
        data = stream.read()
    with open(image[:-4] + ".txt", encoding="utf-8") as stream:
        text = stream.read()
    return {"__key__": os.path.basename(image)[:-4], "jpg": data, "txt": text}


Load = Callable[[str], dict[str, Any]]


def load_all(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read samples one after the other."""
    for path in paths:
        yield load(path)


def ours(task: Task) -> None:
    """Pack with the function that both drivers call."""
    script = contestant.ours("create_webdataset", task)
    script.create_webdataset(task.source, task.output, task.part, task.parts)


def never_ahead(task: Task) -> None:
    """Do the same, but never read a file ahead."""
    script = contestant.ours("create_webdataset", task)
    sys.modules["sharding.parallel"].FIRST = sys.maxsize  # type: ignore[attr-defined]
    script.create_webdataset(task.source, task.output, task.part, task.parts)


def listing(task: Task) -> None:
    """List, check and sort, and nothing after it."""
    list_samples = contestant.ours("sharding.listing", task).list_samples
    print("counted", len(list_samples(task.source).samples))


def walk(task: Task) -> None:
    """List as Python does, and nothing more."""
    imported()
    found = (name for *_, names in os.walk(task.source) for name in names)
    print("counted", sum(name.endswith(".jpg") for name in found))


def serial(task: Task) -> None:
    """List a bucket as obstore does: page after page."""
    import obstore
    from obstore.store import S3Store

    imported()
    _, _, bucket, prefix = task.source.split("/")
    pages = obstore.list(S3Store(bucket, client_options={"allow_http": True}), prefix)
    print("counted", sum(item["path"].endswith(".jpg") for page in pages for item in page))


def plan(task: Task) -> None:
    """List, and write the plan of a run of 1,000 shards."""
    listed = contestant.ours("sharding.listing", task, "sharding.run").list_samples(task.source)
    from sharding.run import start

    run = start(listed, output=task.output, total_shards=1_000)
    print("counted", run.plan.total_samples)


def wds(task: Task) -> None:
    """Pack as the documentation of webdataset does: TarWriter with its default arguments."""
    import webdataset

    imported()
    with open(f"{task.output}/shard-{task.part:06d}.tar", "wb") as stream:
        with webdataset.TarWriter(stream) as sink:
            for sample in load_all(images(task)):
                sink.write(sample)
        stream.flush()
        os.fsync(stream.fileno())


def wds_again(task: Task) -> None:
    """Pack what is in shards into 32 others, in one loop."""
    import webdataset

    imported()
    with contextlib.ExitStack() as stack:
        names = [f"{task.output}/shard-{number:06d}.tar" for number in range(32)]
        streams = [stack.enter_context(open(name, "wb")) for name in names]
        sinks = [webdataset.TarWriter(stream) for stream in streams]
        shards = webdataset.WebDataset(sorted(glob.glob(task.source)), shardshuffle=False)
        for number, sample in enumerate(shards):
            sinks[number % 32].write(sample)
        for sink, stream in zip(sinks, streams, strict=True):
            sink.close()
            stream.flush()
            os.fsync(stream.fileno())


def headers(task: Task) -> None:
    """Walk over the members of shards, and do nothing with them."""
    read_members, number = contestant.ours("sharding.archive", task).read_members, 0
    for path in sorted(glob.glob(task.source)):
        with open(path, "rb", buffering=4_096) as stream:
            number += sum(1 for _ in read_members(stream, os.path.getsize(path)))
    print("counted", number // 2)


def empty_ray(_task: Task) -> None:
    """Start a Ray of our own on this machine, and stop it again."""
    import ray

    imported()
    ray.init(**LOCAL_RAY)
    ray.shutdown()


def ray_data(task: Task, load: Load = load) -> None:
    """Pack with Ray Data; encoder=None: the images are encoded already."""
    import ray.data

    imported()
    ray.init(**LOCAL_RAY)
    paths = ray.data.from_items([{"path": path} for path in images(task)])
    paths.map(lambda row: load(row["path"])).write_webdataset(task.output, encoder=None)
    ray.shutdown()


def parquet(task: Task) -> None:
    """Write parquet with Hugging Face datasets."""
    import datasets
    import pyarrow.parquet

    imported()
    datasets.disable_progress_bars()
    paths, cache, path = {"paths": images(task)}, f"{task.output}/cache", f"{task.output}/x.parquet"
    new = datasets.Dataset.from_generator(load_all, None, cache, gen_kwargs=paths, num_proc=CPUS)
    new.to_parquet(path)
    print("counted", pyarrow.parquet.read_metadata(path).num_rows)


def litdata(task: Task, load: Load = load) -> None:
    """Write the chunks of litdata."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{task.output}/cache"
    import litdata

    imported()
    chunks = f"{task.output}/chunks"
    litdata.optimize(load, images(task), chunks, chunk_bytes="64MB", num_workers=CPUS)
    with open(f"{chunks}/index.json", encoding="utf-8") as stream:
        print("\ncounted", sum(chunk["chunk_size"] for chunk in json.load(stream)["chunks"]))


def pictures(task: Task) -> None:
    """Make real pictures, 256 pixels wide and high, of the bytes in the samples of a folder."""
    draw(task, (32, 32), (256, 256), 85)


def photos(task: Task) -> None:
    """Make real pictures of about 1 MB of the bytes in the samples of a folder."""
    draw(task, (400, 300), (1600, 1200), 96)


def draw(task: Task, pixels: tuple[int, int], size: tuple[int, int], quality: int) -> None:
    """Make pictures of a size, whose bytes are so many pixels, enlarged."""
    from PIL import Image

    for path in images(task):
        stem = f"{task.output}/{os.path.basename(path)[:-4]}"
        small = Image.frombytes("RGB", pixels, load(path)["jpg"])
        small.resize(size).save(f"{stem}.jpg", quality=quality)
        shutil.copy(path[:-4] + ".txt", f"{stem}.txt")


def shrink(sample: dict[str, Any]) -> dict[str, Any]:
    """Make a picture smaller, as examples/shrink.py does."""
    from PIL import Image

    picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    picture.thumbnail((256, 256))
    picture.save(stream := io.BytesIO(), "JPEG", quality=90)
    return {**sample, "jpg": stream.getvalue()}


def shrink_file(path: str) -> dict[str, Any]:
    """Make the picture of a sample smaller."""
    return shrink(load(path))


def ray_shrink(task: Task) -> None:
    """Shrink and pack with Ray Data."""
    ray_data(task, shrink_file)


def litdata_shrink(task: Task) -> None:
    """Shrink and write the chunks of litdata."""
    litdata(task, shrink_file)


def s3fs(task: Task) -> None:
    """Pack with s3fs and TarWriter: read the objects of 64 samples at once (`cat`)."""
    import s3fs
    import webdataset

    imported()
    fs = s3fs.S3FileSystem()
    names = sorted(path[:-4] for path in fs.find(task.source) if path.endswith(".jpg"))
    shard = fs.open(f"{task.output}/shard-000000.tar", "wb")
    with shard, webdataset.TarWriter(shard) as sink:
        for i in range(0, len(names), 64):
            batch = names[i : i + 64]
            found = fs.cat([f"{name}.{field}" for name in batch for field in ("jpg", "txt")])
            for name in batch:
                text = found[f"{name}.txt"].decode()
                key = os.path.basename(name)
                sink.write({"__key__": key, "jpg": found[f"{name}.jpg"], "txt": text})


if __name__ == "__main__":
    contestant.main(globals())
