"""The contestants of bench.py that are written in Python, each as its own documentation has it.

usage: contestants.py NAME SOURCE OUTPUT PART PARTS

Each imports what it needs and nothing else, so that its start-up is its own. With BENCH_WAIT=1
in the environment it stops when it has imported, and works when it is told to go on (SIGCONT).
A contestant that writes no tar prints how many samples it counted.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

CPUS = 2  # of each contestant that asks for a number of workers


def imported() -> None:
    """Tell bench.py that imports are over; wait for the word to go where that is asked for."""
    if os.environ.get("BENCH_WAIT"):
        os.kill(os.getpid(), signal.SIGSTOP)
    print("imported at", time.perf_counter(), flush=True)


def images(source: str, part: int, parts: int) -> list[str]:
    """List the samples of one part of a folder, as the path of the image."""
    return sorted(glob.glob(f"{source}/*.jpg"))[part::parts]


def load(image: str) -> dict[str, Any]:
    """Read a sample: the loop body of every packer that has no listing of its own."""
    key = os.path.splitext(os.path.basename(image))[0]
    with open(image, "rb") as stream:
        data = stream.read()
    with open(image[:-4] + ".txt", encoding="utf-8") as stream:
        text = stream.read()
    return {"__key__": key, "jpg": data, "txt": text}


def load_all(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read samples one after the other."""
    for path in paths:
        yield load(path)


# ---------------------------------------------------------------- ours


def ours(source: str, output: str, part: int, parts: int) -> None:
    """Pack with the function that both drivers call."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from create_webdataset import create_webdataset

    imported()
    create_webdataset(source, output, part, parts)


def ours_unsynced(source: str, output: str, part: int, parts: int) -> None:
    """Pack, but leave it to the kernel when the shard reaches the disk."""
    os.fsync = lambda fd: None
    ours(source, output, part, parts)


def listing(source: str, output: str, part: int, parts: int) -> None:
    """List, check and sort, and no more."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from create_webdataset import list_samples

    imported()
    print("counted", len(list_samples(source).samples))


# ---------------------------------------------------------------- webdataset itself


def wds_pack(source: str, output: str, part: int, parts: int) -> None:
    """Pack as the documentation of webdataset does: TarWriter with its default arguments."""
    import webdataset as wds

    imported()
    with open(f"{output}/shard-{part:06d}.tar", "wb") as stream:
        with wds.TarWriter(stream) as sink:
            for sample in load_all(images(source, part, parts)):
                sink.write(sample)
        stream.flush()
        os.fsync(stream.fileno())


def wds_read(source: str, output: str, part: int, parts: int) -> None:
    """Read the shards in the folder `source` with a plain loop."""
    import webdataset as wds

    imported()
    shards = sorted(glob.glob(f"{source}/*.tar"))
    print("counted", sum(1 for _ in wds.WebDataset(shards, shardshuffle=False)))


# ---------------------------------------------------------------- Ray


def start_ray() -> Any:
    """Start a Ray of our own on this machine."""
    import ray

    imported()
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    return ray


def ray_empty(source: str, output: str, part: int, parts: int) -> None:
    """Start Ray and stop it again."""
    start_ray().shutdown()


def ray_wds(source: str, output: str, part: int, parts: int) -> None:
    """Run the plain loop of webdataset as Ray tasks."""
    ray = start_ray()
    task = ray.remote(wds_pack)
    ray.get([task.remote(source, output, i, CPUS) for i in range(CPUS)])
    ray.shutdown()


def ray_data(source: str, output: str, part: int, parts: int) -> None:
    """Pack with Ray Data."""
    import ray.data

    start_ray()
    paths = ray.data.from_items([{"path": path} for path in images(source, 0, 1)])
    paths.map(lambda row: load(row["path"])).write_webdataset(output)
    ray.shutdown()


# ---------------------------------------------------------------- other formats


def datasets_parquet(source: str, output: str, part: int, parts: int) -> None:
    """Write parquet with Hugging Face datasets."""
    import datasets
    import pyarrow.parquet

    imported()
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(
        load_all,
        cache_dir=f"{output}/cache",
        gen_kwargs={"paths": images(source, 0, 1)},
        num_proc=CPUS,
    )
    dataset.to_parquet(f"{output}/train.parquet")
    print("counted", pyarrow.parquet.read_metadata(f"{output}/train.parquet").num_rows)


def litdata_optimize(source: str, output: str, part: int, parts: int) -> None:
    """Write the chunks of litdata."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{output}/cache"
    import litdata

    imported()
    litdata.optimize(
        fn=load,
        inputs=images(source, 0, 1),
        output_dir=f"{output}/chunks",
        chunk_bytes="64MB",
        num_workers=CPUS,
    )
    with open(f"{output}/chunks/index.json", encoding="utf-8") as stream:
        print("counted", sum(chunk["chunk_size"] for chunk in json.load(stream)["chunks"]))


def mds(source: str, output: str, part: int, parts: int) -> None:
    """Write the shards of mosaicml-streaming."""
    from streaming import MDSWriter

    imported()
    columns = {"__key__": "str", "jpg": "bytes", "txt": "str"}
    with MDSWriter(out=f"{output}/{part}", columns=columns) as sink:
        for sample in load_all(images(source, part, parts)):
            sink.write(sample)
    with open(f"{output}/{part}/index.json", encoding="utf-8") as stream:
        print("counted", sum(shard["samples"] for shard in json.load(stream)["shards"]))


CONTESTANTS: dict[str, Callable[[str, str, int, int], None]] = {
    "ours": ours,
    "ours-unsynced": ours_unsynced,
    "listing": listing,
    "wds-pack": wds_pack,
    "wds-read": wds_read,
    "ray-empty": ray_empty,
    "ray-wds": ray_wds,
    "ray-data": ray_data,
    "datasets": datasets_parquet,
    "litdata": litdata_optimize,
    "mds": mds,
}


if __name__ == "__main__":
    name, source, output, part, parts = sys.argv[1:]
    CONTESTANTS[name](source, output, int(part), int(parts))
