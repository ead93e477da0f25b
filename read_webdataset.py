"""Read WebDataset shards back: look at the samples, check the shards, prove them complete."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sharding.command import (
    Parser,
    ProgressBar,
    add_source_arguments,
    drop_output,
    list_source,
    number_from,
    one_line_errors,
    plain_interrupt,
)
from sharding.errors import InputError, PackError, count, explain
from sharding.faults import left_out, open_report
from sharding.places import dataset_at
from sharding.samples import Listing, parse_fields
from sharding.shards import MAX_SHARDS, shard_number
from sharding.training import count_samples, open_webdataset
from sharding.urls import is_url, refuse_url
from sharding.verify import Checked, Faults, check_dataset, decodes

__all__ = ["count_samples", "open_webdataset"]  # to import from here
TEXT_LIMIT = 200  # characters of a text that are printed
USAGE = "read_webdataset.py --path DIR [options]"
EXAMPLES = """examples:
  python read_webdataset.py --path webdataset_output --limit 3
  python read_webdataset.py --path webdataset_output --source source_data --quiet --num-workers 8
"""


def read_samples(shards: Sequence[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield the first samples, whatever a training job's RANK or WORKER in the environment say."""
    if not shards:  # webdataset takes no empty list
        return iter(())
    import webdataset as wds

    dataset = wds.WebDataset(
        list(shards), shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    dataset.pipeline = [
        open_shards if isinstance(stage, wds.cache.StreamingOpen) else stage
        for stage in dataset.pipeline
    ]
    return islice(dataset, limit)


def open_shards(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard as the file that it is; this takes the place of webdataset's own opener.

    webdataset takes a path for a URL: it cuts "a#b" or "a?b" short, and runs "pipe:..." in a shell.
    """
    for url in urls:
        with dataset_at(url["url"]).open_shard(url["url"]) as (stream, *_):
            yield {"url": url["url"], "stream": stream}


def one_line(text: str) -> str:
    """Return the beginning of a text as one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:TEXT_LIMIT])


def sample_text(sample: Mapping[str, Any]) -> str:
    """Return the beginning of a sample's text as one line."""
    data = sample["txt"].strip()
    text = data[: 4 * TEXT_LIMIT].decode("utf-8", "backslashreplace")  # 4 bytes a character at most
    return one_line(text) + (f"... ({len(data):,} bytes)" if len(text) > TEXT_LIMIT else "")


def short_text(data: bytes) -> str | None:
    """Return what a field holds in one line, such as a class or JSON; None if that is no text."""
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return None
    plain = all(c.isprintable() or c in "\t\n\r" for c in text)
    return one_line(text) if plain and 0 < len(text) <= TEXT_LIMIT else None


def print_sample(number: int, sample: Mapping[str, Any]) -> None:
    """Print a sample: its key, text and image size; of other fields a short text, or the size."""
    from sharding.images import image_size, is_image

    print(f"--- Sample {number} ---\nKey: {one_line(sample['__key__'])}")
    if "txt" in sample:
        print(f"Text: {sample_text(sample)}")
    for field, data in sample.items():
        if is_image(field):
            print(f"Image size: {image_size(data)}")
        elif field != "txt" and not field.startswith("__"):
            text = short_text(data)
            print(f"{one_line(field)}: {f'{len(data)} bytes' if text is None else text}")


def print_samples(shards: Sequence[str], limit: int | None) -> None:
    """Print the first samples of these shards."""
    try:
        for number, sample in enumerate(read_samples(shards, limit)):
            print_sample(number, sample)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has seen enough
        drop_output()
    except (tarfile.TarError, ValueError) as error:
        raise PackError(f"webdataset cannot read a shard: {explain(error)}") from None


def preview(shards: Sequence[str], limit: int, target: str) -> None:
    """Draw the first samples of all shards: picture, key and first words of each."""
    from sharding.images import draw_preview, is_image

    each, rest = divmod(limit, max(1, len(shards)))
    pictures = []
    for place, shard in enumerate(shards):
        for sample in read_samples([shard], each + (place < rest)):
            images = [data for field, data in sample.items() if is_image(field)]
            words = textwrap.wrap(sample_text(sample) if "txt" in sample else "", 24)
            caption = [one_line(sample["__key__"])[-24:], *words[:2]]
            pictures.append((images[0] if images else b"", caption))
    draw_preview(pictures, target)


def print_faults(faults: Faults) -> None:
    """Print the first few faults of each kind on stderr, and count the others."""
    for kind, number in faults.numbers.items():
        for text in faults.shown[kind]:
            print(f"{kind}: {one_line(text)}", file=sys.stderr)
        if more := number - len(faults.shown[kind]):
            print(f"{kind}: and {more:,} more", file=sys.stderr)


def count_fields(reports: Sequence[Checked], decode: bool) -> str:
    """Return how many samples have which fields, if they differ, and what decoding met or left."""
    numbers: Counter[str] = Counter()
    opaque: Counter[str] = Counter()
    for report in reports:
        for fields, (number, _) in report.field_sets.items():
            numbers["+".join(fields)] += number
            opaque.update({field: number for field in fields if decode and not decodes(field)})
    said = left_out("fields", numbers) if len(numbers) > 1 else ""
    if empty := sum(report.empty for report in reports):
        said += f"; {count(empty, 'empty text')}"
    return said + left_out("not decoded", opaque)


def summary(
    reports: Sequence[Checked], faults: Faults, listing: Listing | None, decode: bool
) -> str:
    """Return what the shards hold, and the verdict on them, in one line."""
    number = sum(faults.numbers.values())
    verdict = count(number, "fault") if number else "OK"
    if listing:
        if not number:
            verdict += f", each sample of {one_line(listing.source)} once, byte for byte"
        verdict += left_out("ignored", listing.ignored) + left_out("skipped", listing.skipped)
    samples = count(sum(report.samples for report in reports), "sample")
    size = sum(report.size for report in reports)
    shards = count(len(reports), "shard")
    return f"{samples} in {shards}, {size:,} bytes: {verdict}{count_fields(reports, decode)}"


def how_to_pack(shard: str, total: int, args: argparse.Namespace) -> str:
    """Return a line with the command that packs a shard anew."""
    source = shlex.quote(args.source) if args.source else "DIR"
    return (
        f"to pack {os.path.basename(shard)} again: python create_webdataset.py --source {source} "
        f"--output {shlex.quote(args.path)} --shard-id {shard_number(shard)} "
        f"--total-shards {total if args.source else 'N'}, with the other flags of the first time"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(USAGE, __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--path", required=True, metavar="DIR", help="folder or URL of the shards, or a pattern"
    )
    add = parser.add_argument_group("what to show").add_argument
    add("--limit", metavar="N", type=number_from(0), help="show the first N samples (default: all)")
    add("--quiet", action="store_true", help="print the summary alone")
    add("--preview", metavar="FILE", help="draw the first samples (--limit, or 16) of all shards")
    add = parser.add_argument_group("what to check").add_argument
    add("--decode", action="store_true", help="decode every image, text, number and JSON")
    number, workers = number_from(1, MAX_SHARDS), "processes (default: %(default)s)"
    add("--num-workers", metavar="N", type=number, default=1, help=workers)
    add_source_arguments(parser, "the source to prove the shards against, if any")
    return parser


def check(args: argparse.Namespace) -> int:
    """Do what the flags say; return the exit code."""
    drawn = 16 if args.limit is None else args.limit
    if not args.quiet or args.preview is not None:
        with plain_interrupt():  # before any work: one may be missing, and they take their time
            import webdataset  # noqa: F401

            from sharding.images import check_preview
    refuse_url("report", args.report or "")
    if args.preview is not None:
        refuse_url("preview", args.preview)
        check_preview(args.preview, drawn)
    fields = parse_fields(args.fields, args.optional_fields)
    dataset = dataset_at(args.path)
    shards, strays, whole = dataset.find_shards(args.path)
    if args.source is not None and not whole:
        raise InputError("--source proves whole datasets: give their folder as --path")
    before = dataset.identify(shards)
    with open_report(args.report, args.source, args.path) as report:
        listing = None if args.source is None else list_source(args, report)
        faults = Faults(report)
        for kind, name in strays:
            faults.add(kind, name, name)
        with ProgressBar(len(shards), unit=" shards") as bar:
            reports = check_dataset(
                shards,
                faults,
                fields=fields,
                listing=listing,
                decode=args.decode,
                num_workers=args.num_workers,
                whole=whole,
                progress=bar.update,
            )
    sound = [report.path for report in reports if report.sound]
    if not args.quiet:
        print_samples(sound, args.limit)
    if args.preview is not None:
        preview(sound, drawn, args.preview)
    if dataset.identify(shards) != before:
        raise PackError(f"{args.path!r}: the dataset was replaced while it was read; run again")
    print_faults(faults)
    if bad := [report.path for report in reports if not report.sound]:
        total = len(reports) + faults.numbers["missing shard"]
        print(how_to_pack(bad[0], total, args), file=sys.stderr)
    print(summary(reports, faults, listing, args.decode))
    return 1 if faults.numbers else 0


@one_line_errors("read_webdataset.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if is_url(args.path, "path") or is_url(args.source or "", "source"):
        with plain_interrupt():  # a request that waits for its answer would not notice Ctrl-C
            return check(args)
    return check(args)


if __name__ == "__main__":
    raise SystemExit(main())
