"""From shards to a training pipeline: `open_webdataset`, and what its arguments may be.

Input: the folder of the shards. Output: a `wds.WebDataset`. Knows nothing of packing. Its stages
are in `pipeline.py`, which imports webdataset.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sharding.apart import answer, ask
from sharding.errors import InputError, PackError
from sharding.places import dataset_at
from sharding.reading import count_shard
from sharding.record import Record, check_found, fields_to_read, of_found

if TYPE_CHECKING:
    from sharding.pipeline import TrainingDataset

COUNT_THREADS = 8  # each holds some 17 MB
DEFAULT = "pilrgb"
# Fields that webdataset decodes by running what is in them (`webdataset/autodecode.py`).
PICKLES = {"pickle", "pkl", "pth", "pyd"}
POSTSCRIPT = b"%!PS", b"\xc5\xd0\xd3\xc6"  # beginnings of what Pillow has Ghostscript run


def open_webdataset(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    fields: str | Iterable[str] | None = None,
    optional_fields: str | Iterable[str] | None = None,
    decode: str | Mapping[str, str | Callable[[bytes], Any] | None] | None = DEFAULT,
    shuffle_buffer: int = 1_000,
    seed: int = 0,
    handler: Callable[[Exception], bool] | None = None,
    even: bool = True,
    split_by_node: bool = True,
) -> TrainingDataset:
    """Return a training pipeline over a dataset, for a DataLoader or wds.WebLoader.

    Args:
        path: folder or URL of the shards, or a pattern of some; of a list of these, all are read
            as one.
        fields: what a sample is given as, in this order: "jpg,txt", or the fields one by one;
            "jpg;png" is the one of them that it has. By default, those that were packed, if the
            dataset has a record, else "jpg,txt".
        optional_fields: more of these, behind them; None where a sample has none (of which a
            DataLoader makes batches with a `collate_fn` alone). By default those that were packed,
            where `fields` is left out, too; else none.
        decode: what images become, in the spellings of webdataset. "pilrgb", "pilrgba", "pill": PIL
            images, of which a DataLoader makes batches with a `collate_fn` alone. "rgb", "rgba",
            "l": arrays of height, width and channels ("l": without these), floats from 0 to 1;
            "rgb8", "rgba8", "l8": bytes from 0 to 255. "torchrgb", "torchrgb8", ...: such tensors,
            with channels first. All of these make a picture 8-bit, in these channels: in 16-bit
            grey (depth), what is beyond 255 becomes 255; ids of a mask with a palette become its
            colors; without "a", transparency is dropped. Other fields are decoded by their ending
            (txt, json, cls, npy, ...), or stay bytes if webdataset does not know it.

            None leaves every field as bytes. A mapping says it for each field: a spelling, None,
            or a function of its bytes, such as {"jpg": "torchrgb", "depth.png": read_depth,
            "mask.png": None}; "pilrgb" for those that it does not name. Workers that are spawned
            import the function, so it can be no lambda. Pickles (pkl, pyd, pth, ...) must be
            named, with None or a function: to load one runs whatever its maker wrote there.
        shuffle_buffer: samples that a worker holds to shuffle them; 0 keeps the order of the
            shards.
        seed: of the order of shards and samples.
        handler: what happens to a sample that cannot be decoded, such as webdataset's
            `wds.warn_and_continue`; by default, it is a `PackError` that names it.
        even: refuse fewer shards than ranks, as training in step needs. For an evaluation, False:
            each sample is read once, though ranks and workers may get different numbers, or none.
        split_by_node: give each rank shards of its own. False lets each read all of them, for
            loaders that deal samples to ranks themselves, as `accelerator.prepare(loader)` and the
            Trainer of transformers make them.

    Raises:
        InputError: there are no shards, or there is no such way to decode.
        PackError: the folder also holds stray files, or its shards are not those of its record.
    """
    from sharding.pipeline import open_pipeline

    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    shards, records = _find(paths)
    if fields is None:
        fields, packed = _packed_fields(records)
        optional_fields = packed if optional_fields is None else optional_fields
    required = _split(fields)
    optional = _split(optional_fields) if optional_fields else []
    decoders = _decoders([f for entry in required + optional for f in entry.split(";")], decode)
    return open_pipeline(
        shards, required, optional, decoders, shuffle_buffer, seed, handler, even, split_by_node
    )


def _find(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[str], list[Record]]:
    """Return all shards, and the records of the datasets that have one."""
    shards, records = [], []
    for each in paths:
        path = os.fspath(each)
        found = dataset_at(path).find_shards(path)
        for kind, name in found.faults:
            raise PackError(f"{kind}: {name}")
        shards += found.shards
        if record := of_found(found, path):
            check_found(record, found, path)
            records.append(record)
    return shards, records


def _packed_fields(records: Iterable[Record]) -> tuple[str, str]:
    """Return the fields that were packed, and the optional ones.

    Raises:
        InputError: several datasets differ.
    """
    packed = set(map(fields_to_read, records)) or {("jpg,txt", "")}
    if len(packed) > 1:
        named = " and ".join(repr(fields) for fields, _ in sorted(packed))
        raise InputError(f'these datasets have other fields each: {named}; give fields="..."')
    return packed.pop()


def count_samples(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> int:
    """Return the number of samples in a dataset, from its record, or the headers of its shards.

    Args:
        path: as of `open_webdataset`.

    Raises:
        InputError: there are no shards.
        PackError: a shard is damaged, or not one of the record's.
    """
    if not isinstance(path, (str, os.PathLike)):
        return sum(map(count_samples, path))
    if dataset_at(path).REMOTE:  # whoever counts there can fork no more
        return int(ask("sharding.training", "count", os.fspath(path)))
    return _count(os.fspath(path), map)


def count_in_bucket(url: str) -> int:
    """Count in this process; see `count_samples`."""
    with ThreadPoolExecutor(COUNT_THREADS) as pool:
        return _count(url, pool.map)


def _count(path: str, each: Callable[..., Iterable[int]]) -> int:
    found = dataset_at(path).find_shards(path)
    if record := of_found(found, path):
        check_found(record, found, path)
        return record.samples
    return sum(each(count_shard, found.shards))


def _split(fields: str | Iterable[str]) -> list[str]:
    named = fields if isinstance(fields, str) else ",".join(fields)
    entries = [entry.lower() for entry in named.split(",")]
    for field in (field for entry in entries for field in entry.split(";")):
        if not field or field.split() != [field]:
            raise InputError(f'fields {named!r}: {field!r} is not a field; write e.g. "jpg,txt"')
    return entries


def _decoders(fields: Sequence[str], decode: object) -> dict[str, Callable[[bytes], Any]]:
    """Return what decodes each of these fields; those that stay bytes are left out."""
    fields = [field for field in fields if not field.startswith("__")]
    ways: dict[str, Any] = dict.fromkeys(fields, decode)
    if isinstance(decode, Mapping):
        ways = dict.fromkeys(fields, DEFAULT)
        ways |= {field: way for name, way in decode.items() for field in name.lower().split(";")}
        for field in ways.keys() - set(fields):
            raise InputError(f"decode names {field!r}, a field that is not asked for; see fields=")
    return {
        field: way if callable(way) and isinstance(decode, Mapping) else _spelled(field, way)
        for field, way in ways.items()
        if way is not None
    }


def _spelled(field: str, way: object) -> Callable[[bytes], Any]:
    """Return what decodes a field as webdataset does by this spelling.

    Raises:
        InputError: there is no such spelling, or it would run what is in the field.
    """
    from webdataset.autodecode import Decoder, imagehandler, imagespecs

    if not isinstance(way, str) or way not in imagespecs:
        known = ", ".join(sorted(imagespecs))
        raise InputError(
            f"decode {way!r}: choose None, or one of {known}; or, for each field, one of these or "
            'a function of its bytes: decode={"jpg": "torchrgb", "depth.png": read_depth}'
        )
    if field.removesuffix(".gz").rpartition(".")[2] in PICKLES:
        raise InputError(
            f"field {field!r} is a pickle: to load it runs whatever its maker wrote there. To have "
            f"its bytes: decode={{{field!r}: None}}; if you trust its makers, a function of these: "
            f"decode={{{field!r}: pickle.loads}}"
        )
    if way.startswith("torch"):
        try:
            importlib.import_module("torch")  # where it is missing, say so now
        except ModuleNotFoundError as error:
            raise InputError(f"decode {way!r}: {error}; run: pip install torch") from None
    return functools.partial(Decoder([_refuse_postscript, imagehandler(way)]).decode1, field)


def _refuse_postscript(name: str, data: bytes) -> None:
    """Refuse an image that is a program; whatever its name, Pillow goes by what is in it."""
    from webdataset.autodecode import IMAGE_EXTENSIONS

    if data.startswith(POSTSCRIPT) and name.rpartition(".")[2] in IMAGE_EXTENSIONS:
        raise ValueError("it is PostScript, a program; decode it with a function of your own")


if __name__ == "__main__":
    answer(count=count_in_bucket)
