"""Read WebDataset shards back: print every sample, and what the dataset holds in all."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from create_webdataset import (
    INTERRUPTED,
    SHARD_PATTERN,
    Failed,
    Parser,
    Refused,
    explain,
    interrupted_publishing,
    one_line_errors,
)

try:
    import webdataset as wds
    from PIL import Image
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run: pip install -r requirements.txt")

IMAGE_FIELDS = {"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"}
TEXT_LIMIT = 200  # characters of a text that are printed


def find_shards(path: str) -> list[str]:
    """Return the shards of a dataset, in order, as paths that webdataset opens as they are.

    Raises:
        Refused: there are none.
        Failed: a run was cut short while its shards replaced the previous ones.
    """
    try:
        names = sorted(name for name in os.listdir(path) if SHARD_PATTERN.fullmatch(name))
        if interrupted_publishing(path):
            raise Failed(f"{path!r}: {INTERRUPTED}")
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise Refused(f"--path: {explain(error)}") from None
    if not names:
        raise Refused(f"--path {path!r} has no shard-*.tar; pack some with ./run_parallel.sh")
    return [os.path.join(path, name) for name in names]


def open_shards(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard as the plain file it is.

    webdataset takes a path for a URL: it cuts "a#b" or "a?b" short, and runs "pipe:..." in a shell.
    """
    for url in urls:
        with open(url["url"], "rb") as stream:
            yield {"url": url["url"], "stream": stream}


def read_samples(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Yield every sample of the shards, in order.

    Raises:
        Failed: webdataset cannot read a shard.
    """
    # No splitters: the RANK or WORKER of a training job must not hide shards from a reader.
    dataset = wds.WebDataset(shards, shardshuffle=False, nodesplitter=None, workersplitter=None)
    dataset.pipeline = [
        open_shards if isinstance(stage, wds.cache.StreamingOpen) else stage
        for stage in dataset.pipeline
    ]
    try:
        yield from dataset
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise Failed(f"a shard is damaged: {error.args[0]}") from None


def one_line(text: str) -> str:
    """Return a text as one short line, with control characters escaped."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:TEXT_LIMIT])
    return shown + (f"... ({len(text):,} characters)" if len(text) > TEXT_LIMIT else "")


def describe_image(data: bytes) -> str:
    """Return the size of an image, and a note where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"Image size: {image.width}x{image.height}, {len(data)} bytes"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"Image size: {len(data)} bytes (not readable: {type(error).__name__})"


def print_sample(number: int, sample: dict[str, Any]) -> None:
    """Print a sample: its key, text and image size, and the size of any other field."""
    print(f"--- Sample {number} ---\nKey: {one_line(sample['__key__'])}")
    fields = {field: data for field, data in sample.items() if not field.startswith("__")}
    if "txt" in fields:
        text = fields.pop("txt").decode("utf-8", "backslashreplace")
        print(f"Text: {one_line(text.strip())}")
    for field, data in fields.items():
        image = field in IMAGE_FIELDS
        print(describe_image(data) if image else f"{one_line(field)}: {len(data)} bytes")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(description=__doc__)
    parser.add_argument("--path", required=True, help="folder of the shards")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N samples")
    parser.add_argument("--quiet", action="store_true", help="print the summary alone")
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if args.limit is not None and args.limit < 0:
        raise Refused(f"--limit {args.limit}: not a number from 0")
    shards = find_shards(args.path)
    count = 0
    for sample in islice(read_samples(shards), args.limit):
        if not args.quiet:
            print_sample(count, sample)
        count += 1
    size = sum(os.path.getsize(shard) for shard in shards)
    print(f"{count:,} samples read; {len(shards):,} shards, {size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
