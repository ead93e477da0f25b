"""The contestants of bench.py that are written in Python, each as its own documentation has it.

usage: contestants.py NAME SOURCE OUTPUT PART PARTS

Each imports what it needs and no more, so that its start-up is its own. With BENCH_WAIT=1 in the
environment it stops when it has imported, and goes on when it is told to (SIGCONT). One that
writes no tar prints how many samples it counted. With BENCH_CHECK=1 readers print a checksum, too.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

CPUS = 2  # of each contestant that takes a number of workers


class Task(NamedTuple):
    """Pack part `part` of `parts` of the folder `source` into the folder `output`."""

    source: str
    output: str
    part: int
    parts: int


def imported() -> None:
    """Tell the benchmark that imports are over; where it wants that, wait for the word to go."""
    if os.environ.get("BENCH_WAIT"):
        os.kill(os.getpid(), signal.SIGSTOP)
    print("imported at", time.perf_counter(), flush=True)


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


def load_all(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read samples one after the other."""
    for path in paths:
        yield load(path)


# ---------------------------------------------------------------- this project


def core(name: str = "create_webdataset", *more: str) -> Any:
    """Import a script, which lies one folder up, and other modules."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script, *_ = map(importlib.import_module, (name, *more))
    imported()
    return script


def of_buckets(*paths: str) -> list[str]:
    """Name the modules that are imported only for buckets."""
    at_store = any(path.startswith("s3://") for path in paths)
    return ["sharding.objects", "sharding.bucket_run"] if at_store else []


def ours(task: Task) -> None:
    """Pack with the function that both drivers call."""
    script = core("create_webdataset", *of_buckets(task.source, task.output))
    script.create_webdataset(task.source, task.output, task.part, task.parts)


def ours_unsynced(task: Task) -> None:
    """Pack, and leave it to the kernel when the shard reaches the disk."""
    os.fsync = lambda _fd: None  # type: ignore[assignment]
    ours(task)


def listing(task: Task) -> None:
    """List, check and sort, and nothing after it."""
    core()
    from sharding.listing import list_samples

    print("counted", len(list_samples(task.source).samples))


def plan(task: Task) -> None:
    """List, and write the plan of a run of 1,000 shards."""
    core()
    from sharding.listing import list_samples
    from sharding.run import start

    run, _ = start(list_samples(task.source), output=task.output, total_shards=1_000)
    print("counted", run.plan.total_samples)


# ---------------------------------------------------------------- webdataset


def wds_pack(task: Task) -> None:
    """Pack as the documentation of webdataset does: TarWriter with its default arguments."""
    import webdataset as wds

    imported()
    with open(f"{task.output}/shard-{task.part:06d}.tar", "wb") as stream:
        with wds.TarWriter(stream) as sink:
            for sample in load_all(images(task)):
                sink.write(sample)
        stream.flush()
        os.fsync(stream.fileno())


# ---------------------------------------------------------------- Ray


def start_ray() -> Any:
    """Start a Ray of our own on this machine."""
    import ray

    imported()
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    return ray


def ray_empty(_task: Task) -> None:
    """Start Ray and stop it again."""
    start_ray().shutdown()


def ray_wds(task: Task) -> None:
    """Run the plain loop of webdataset as Ray tasks."""
    ray = start_ray()
    remote = ray.remote(wds_pack)
    ray.get([remote.remote(task._replace(part=i, parts=CPUS)) for i in range(CPUS)])
    ray.shutdown()


def ray_data(task: Task) -> None:
    """Pack with Ray Data; encoder=None: the images are encoded already."""
    import ray.data

    start_ray()
    paths = ray.data.from_items([{"path": path} for path in images(task)])
    paths.map(lambda row: load(row["path"])).write_webdataset(task.output, encoder=None)
    ray.shutdown()


# ---------------------------------------------------------------- other formats


def datasets_parquet(task: Task) -> None:
    """Write parquet with Hugging Face datasets."""
    import datasets
    import pyarrow.parquet

    imported()
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(
        load_all,
        cache_dir=f"{task.output}/cache",
        gen_kwargs={"paths": images(task)},
        num_proc=CPUS,
    )
    dataset.to_parquet(f"{task.output}/train.parquet")
    print("counted", pyarrow.parquet.read_metadata(f"{task.output}/train.parquet").num_rows)


def litdata_optimize(task: Task) -> None:
    """Write the chunks of litdata."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{task.output}/cache"
    import litdata

    imported()
    litdata.optimize(
        fn=load,
        inputs=images(task),
        output_dir=f"{task.output}/chunks",
        chunk_bytes="64MB",
        num_workers=CPUS,
    )
    with open(f"{task.output}/chunks/index.json", encoding="utf-8") as stream:
        print("\ncounted", sum(chunk["chunk_size"] for chunk in json.load(stream)["chunks"]))


def mds(task: Task) -> None:
    """Write the shards of mosaicml-streaming."""
    from streaming import MDSWriter

    imported()
    output = f"{task.output}/{task.part}"
    with MDSWriter(out=output, columns={"__key__": "str", "jpg": "bytes", "txt": "str"}) as sink:
        for sample in load_all(images(task)):
            sink.write(sample)
    with open(f"{output}/index.json", encoding="utf-8") as stream:
        print("counted", sum(shard["samples"] for shard in json.load(stream)["shards"]))


# ---------------------------------------------------------------- reading for a training


def pictures(task: Task) -> None:
    """Make real pictures, 256 pixels wide and high, of the bytes in the samples of a folder."""
    from PIL import Image

    imported()
    for path in images(task):
        sample = load(path)
        picture = Image.frombytes("RGB", (32, 32), sample["jpg"]).resize((256, 256))
        picture.save(f"{task.output}/{sample['__key__']}.jpg", quality=85)
        with open(f"{task.output}/{sample['__key__']}.txt", "w", encoding="utf-8") as stream:
            stream.write(sample["txt"])


def content(sample: Any) -> bytes:
    """Return the image of a sample, as bytes or pixels, and its text."""
    image, text = (sample["jpg"], sample["txt"]) if isinstance(sample, dict) else sample
    if hasattr(image, "permute"):  # a tensor: colours first, each from 0 to 1
        image = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    if hasattr(image, "tobytes"):
        image = image.tobytes()
    return bytes(image) + (text.encode() if isinstance(text, str) else text)


def count(samples: Any, workers: int = 0) -> None:
    """Print how many samples are read; where they are to be checked, a checksum of them, too."""
    if workers:
        from torch.utils.data import DataLoader

        samples = DataLoader(samples, batch_size=None, num_workers=workers)
    if os.environ.get("BENCH_CHECK"):
        digests = sorted(hashlib.sha256(content(sample)).digest() for sample in samples)
        print("checksum", hashlib.sha256(b"".join(digests)).hexdigest()[:12])
        samples = digests
    print("counted", sum(1 for _ in samples))


def needed(decode: str | None, workers: int) -> list[str]:
    """Name the modules that a reader imports only to decode, or in workers."""
    pillow = ["PIL.Image"] if decode else []
    return [*pillow, "torch.utils.data"] if workers or decode == "torchrgb" else pillow


def ours_read(task: Task, decode: str | None = None, workers: int = 0) -> None:
    """Read the shards in the folder `source` as a training does."""
    modules = *of_buckets(task.source), *needed(decode, workers)
    reader = core("read_webdataset", "sharding.pipeline", *modules)
    count(reader.open_webdataset(task.source, decode=decode, shuffle_buffer=0), workers)


def ours_count(task: Task) -> None:
    """Count the samples of the shards in the folder `source`."""
    print("counted", core("read_webdataset").count_samples(task.source))


def wds_read(task: Task, decode: str | None = None, workers: int = 0) -> None:
    """Read the shards in the folder `source` with a plain loop, or as a training does."""
    wds, *_ = map(importlib.import_module, ("webdataset", *needed(decode, workers)))
    imported()
    dataset = wds.WebDataset(sorted(glob.glob(f"{task.source}/*.tar")), shardshuffle=False)
    if decode:
        dataset = dataset.decode(decode)
    count(dataset.to_tuple("jpg", "txt") if decode or workers else dataset, workers)


def litdata_read(task: Task, workers: int = 0) -> None:
    """Read the chunks of litdata."""
    import litdata

    imported()
    count(litdata.StreamingDataset(f"{task.source}/chunks"), workers)


def mds_read(task: Task) -> None:
    """Read the shards of mosaicml-streaming."""
    from streaming import StreamingDataset

    imported()
    count(StreamingDataset(local=f"{task.source}/0", shuffle=False, batch_size=1))


def webshart_index(task: Task) -> None:
    """Make the index that webshart reads shards by, beside links to them."""
    import webshart

    imported()
    webshart.MetadataExtractor().extract_metadata(task.source, task.output, max_workers=CPUS)
    for shard in glob.glob(f"{task.source}/*.tar"):
        os.symlink(shard, f"{task.output}/{os.path.basename(shard)}")


def webshart_read(task: Task) -> None:
    """Read with webshart, which gives file after file: an image, its text."""
    import webshart

    imported()
    files = iter(webshart.TarDataLoader(webshart.discover_dataset(task.source)))
    count((image.data, text.data) for image, text in zip(files, files, strict=True))


# ---------------------------------------------------------------- object stores


def bucket_of(url: str) -> tuple[str, str]:
    """Return bucket and prefix of a URL."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


def sample_of(image: str, data: bytes, text: bytes) -> dict[str, Any]:
    """Return a sample, of the path of its image and the contents of both files."""
    return {"__key__": os.path.basename(image)[:-4], "jpg": data, "txt": text.decode()}


def s3fs_pack(task: Task, at_once: int = 1) -> None:
    """Pack with s3fs and TarWriter: an object after the other, or many at once (`cat`)."""
    import s3fs
    import webdataset as wds

    imported()
    fs = s3fs.S3FileSystem()
    names = sorted(path for path in fs.find(task.source) if path.endswith(".jpg"))
    with (
        fs.open(f"{task.output}/shard-{task.part:06d}.tar", "wb") as stream,
        wds.TarWriter(stream) as sink,
    ):
        mine = names[task.part :: task.parts]
        for batch in (mine[i : i + at_once] for i in range(0, len(mine), at_once)):
            paths = [path for image in batch for path in (image, image[:-4] + ".txt")]
            found = fs.cat(paths) if at_once > 1 else {path: fs.cat_file(path) for path in paths}
            for image in batch:
                sink.write(sample_of(image, found[image], found[image[:-4] + ".txt"]))


def boto3_pack(task: Task, threads: int = 1) -> None:
    """Pack with boto3 and TarWriter, in memory: an object after the other, or in threads."""
    import io
    from concurrent.futures import ThreadPoolExecutor

    import boto3
    import webdataset as wds
    from botocore.config import Config

    imported()
    client = boto3.client("s3", config=Config(max_pool_connections=max(10, threads)))
    bucket, prefix = bucket_of(task.source)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    names = sorted(item["Key"] for page in pages for item in page["Contents"])

    def get(key: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def load_object(image: str) -> dict[str, Any]:
        return sample_of(image, get(image), get(image[:-4] + ".txt"))

    mine = [name for name in names if name.endswith(".jpg")][task.part :: task.parts]
    with ThreadPoolExecutor(threads) as pool, io.BytesIO() as stream:
        with wds.TarWriter(stream) as sink:
            for sample in pool.map(load_object, mine) if threads > 1 else map(load_object, mine):
                sink.write(sample)
        stream.seek(0)
        bucket, prefix = bucket_of(task.output)
        client.upload_fileobj(stream, bucket, f"{prefix}/shard-{task.part:06d}.tar")


def bare_store(bucket: str) -> Any:
    """Return the bucket, for what packs and reads nothing: the limit of the server."""
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True})


def bare_gets(task: Task) -> None:
    """List the source, and get each object, in as many threads as ours uses."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore

    imported()
    bucket, prefix = bucket_of(task.source)
    store = bare_store(bucket)
    keys = [item["path"] for chunk in obstore.list(store, prefix) for item in chunk]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda key: len(obstore.get(store, key).bytes()), keys))
    print("counted", len(got) // 2)


def bare_upload(task: Task) -> None:
    """Upload the shards in the folder `source`."""
    import obstore

    imported()
    bucket, prefix = bucket_of(task.output)
    store = bare_store(bucket)
    for path in glob.glob(f"{task.source}/*.tar"):
        with open(path, "rb") as stream:
            obstore.put(store, f"{prefix}/{os.path.basename(path)}", stream)


def bare_download(task: Task) -> None:
    """Get the shards, range by range, and throw them away."""
    import obstore

    imported()
    bucket, prefix = bucket_of(task.source)
    store, images = bare_store(bucket), 0
    for item in obstore.list(store, prefix).collect():
        for begin in range(0, item["size"], 8 << 20):
            end = min(begin + (8 << 20), item["size"])
            part = bytes(obstore.get_range(store, item["path"], start=begin, end=end))
            images += part.count(b".jpg\0") if os.environ.get("BENCH_CHECK") else 0
    print("counted", images)


def wds_curl_read(task: Task) -> None:
    """Read the shards that curl gets with a plain loop."""
    import webdataset as wds

    imported()
    key = '"$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'
    curl = f'curl --fail --silent --aws-sigv4 "aws:amz:$AWS_REGION:s3" --user {key}'
    names = f"{'/'.join(bucket_of(task.source))}/shard-{{000000..000003}}.tar"
    shards = f"pipe:{curl} $AWS_ENDPOINT_URL/{names}"
    count(wds.WebDataset(shards, shardshuffle=False))


def litdata_store_read(task: Task) -> None:
    """Read the chunks of litdata, through an empty cache."""
    import litdata
    from litdata.streaming import downloader

    imported()
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for that
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    where, cache = f"{task.source}/chunks", f"{task.output}/cache"
    count(litdata.StreamingDataset(where, cache_dir=cache, storage_options=options))


def mds_store_read(task: Task) -> None:
    """Read the shards of mosaicml-streaming, through an empty cache."""
    from streaming import StreamingDataset

    imported()
    where, cache = f"{task.source}/0", f"{task.output}/cache"
    count(StreamingDataset(remote=where, local=cache, shuffle=False, batch_size=1))


CONTESTANTS: dict[str, Callable[[Task], None]] = {
    "ours": ours,
    "ours-unsynced": ours_unsynced,
    "listing": listing,
    "plan": plan,
    "ours-read": ours_read,
    "ours-count": ours_count,
    "wds-pack": wds_pack,
    "wds-read": wds_read,
    "ray-empty": ray_empty,
    "ray-wds": ray_wds,
    "ray-data": ray_data,
    "datasets": datasets_parquet,
    "litdata": litdata_optimize,
    "mds": mds,
    "pictures": pictures,
    "ours-pilrgb": partial(ours_read, decode="pilrgb"),
    "wds-pilrgb": partial(wds_read, decode="pilrgb"),
    "ours-torchrgb": partial(ours_read, decode="torchrgb"),
    "wds-torchrgb": partial(wds_read, decode="torchrgb"),
    "ours-read-2": partial(ours_read, workers=CPUS),
    "wds-read-2": partial(wds_read, workers=CPUS),
    "ours-torchrgb-2": partial(ours_read, decode="torchrgb", workers=CPUS),
    "wds-torchrgb-2": partial(wds_read, decode="torchrgb", workers=CPUS),
    "litdata-read": litdata_read,
    "litdata-read-2": partial(litdata_read, workers=CPUS),
    "mds-read": mds_read,
    "webshart-index": webshart_index,
    "webshart-read": webshart_read,
    "s3fs": s3fs_pack,
    "s3fs-cat": partial(s3fs_pack, at_once=64),
    "boto3": boto3_pack,
    "boto3-threads": partial(boto3_pack, threads=32),
    "bare-gets": bare_gets,
    "bare-upload": bare_upload,
    "bare-download": bare_download,
    "wds-curl-read": wds_curl_read,
    "litdata-store-read": litdata_store_read,
    "mds-store-read": mds_store_read,
}


if __name__ == "__main__":
    name, source, output, part, parts = sys.argv[1:]
    CONTESTANTS[name](Task(source, output, int(part), int(parts)))
    print("done at", time.perf_counter(), flush=True)
