"""Read WebDataset shards back: look at the samples, check the shards, prove them complete."""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from sharding.archive import Damaged
from sharding.command import (
    Parser,
    ProgressBar,
    add_source_arguments,
    interruptible,
    list_source,
    number_from,
    one_line_errors,
    plain_interrupt,
    stdout_apart,
)
from sharding.errors import InputError, PackError
from sharding.faults import open_report
from sharding.messages import argument, count, explain
from sharding.pack import check_function
from sharding.places import dataset_at
from sharding.reading import sound_part
from sharding.record import settle_flags
from sharding.samples import parse_fields
from sharding.shards import MAX_SHARDS, Found
from sharding.show import DRAWN, draw_samples, one_line, print_samples, print_verdict
from sharding.training import count_samples, open_webdataset
from sharding.urls import refuse_url
from sharding.verify import check_dataset, write_checksums

__all__ = ["count_samples", "open_webdataset"]  # to import from here
GLANCE = 16 << 10  # bytes read at a time: a look may end soon
USAGE = "read_webdataset.py --path DIR [options]"
EXAMPLES = """examples:
  python read_webdataset.py --path webdataset_output --limit 3 --no-check
  python read_webdataset.py --path webdataset_output --source source_data --quiet --num-workers 8
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(USAGE, __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--path", required=True, metavar="DIR", help="folder or URL of the shards, or a pattern"
    )
    add = parser.add_argument_group("what to show").add_argument
    add("--limit", metavar="N", type=number_from(0), help="show the first N samples (default: all)")
    add("--quiet", action="store_true", help="print only the summary")
    add("--preview", metavar="FILE", help=f"draw samples of all shards (--limit, or {DRAWN})")
    add("--no-check", action="store_true", help="show or draw samples, and check nothing")
    add = parser.add_argument_group("what to check").add_argument
    add("--decode", action="store_true", help="decode every image, text, number and JSON")
    number, workers = number_from(1, MAX_SHARDS), "processes (default: %(default)s)"
    add("--num-workers", metavar="N", type=number, default=1, help=workers)
    what = "SHA-256 of each shard: written with --source, else compared, and nothing else checked"
    add("--checksums", action="store_true", help=what)
    add_source_arguments(parser, "the source to prove the shards against, if any", recorded=True)
    return parser


def open_samples(shard: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard, whatever a training job's RANK or WORKER say."""
    import webdataset as wds

    dataset = wds.WebDataset(
        [shard], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    dataset.pipeline = [
        open_shards if isinstance(stage, wds.cache.StreamingOpen) else stage
        for stage in dataset.pipeline
    ]
    return iter(dataset)


def open_shards(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard as the file that it is; this takes the place of webdataset's own opener.

    webdataset takes a path for a URL: it cuts "a#b" or "a?b" short, and runs "pipe:..." in a shell.
    """
    for url in urls:
        with dataset_at(url["url"]).open_shard(url["url"], GLANCE) as (stream, *_):
            yield {"url": url["url"], "stream": stream}


def sound_samples(shard: str, damaged: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard up to the first damage, which is noted under its path."""
    try:
        yield from sound_part(shard, open_samples(shard))
    except Damaged as error:
        damaged[shard] = str(error)
    except (tarfile.TarError, ValueError) as error:
        raise PackError(f"webdataset cannot read {shard!r}: {explain(error)}") from None


def show(args: argparse.Namespace, shards: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Print and draw samples; return what was done, and what is wrong with which shards."""
    damaged: dict[str, str] = {}
    read = partial(sound_samples, damaged=damaged)
    done = []
    if not args.quiet:
        samples = islice(chain.from_iterable(map(read, shards)), args.limit)
        done.append(f"{count(print_samples(samples), 'sample')} shown")
    if args.preview is not None:
        drawn = draw_samples(shards, read, args.limit, args.preview)
        done.append(f"{count(drawn, 'sample')} drawn")
    return ", ".join(done), damaged


def prepare(args: argparse.Namespace) -> Found:
    """Refuse what cannot be done, before any work; return what there is to read."""
    for name in ("source", "decode", "report", "quiet", "checksums") if args.no_check else ():
        if getattr(args, name) and not (name == "quiet" and args.preview):
            raise InputError(f"{argument(name)} makes no sense with --no-check; leave out one")
    refuse_url("report", args.report or "")
    refuse_url("preview", args.preview or "")
    parse_fields(args.fields or "jpg,txt", args.optional_fields or "")
    if not args.quiet or args.preview is not None:
        with plain_interrupt():  # now: one of these may be missing, and they take their time
            import webdataset  # noqa: F401

            from sharding.images import check_preview
    if args.preview is not None:
        check_preview(args.preview, args.limit or 0)
    found = dataset_at(args.path).find_shards(args.path)
    if args.transform is not None and args.source is None:
        raise InputError("--transform needs --source: the function is called on its samples")
    if args.source is not None and not found.whole:
        raise InputError("--source proves whole datasets: give their folder as --path")
    return found


def look(args: argparse.Namespace, shards: Sequence[str]) -> int:
    """Show samples, and check nothing; return the exit code."""
    done, damaged = show(args, shards)
    for shard, reason in damaged.items():
        print(f"damaged: {one_line(shard)}: {one_line(reason)}", file=sys.stderr)
    print(f"{done}, nothing checked")
    return 1 if damaged else 0


def run(args: argparse.Namespace) -> int:
    """Show samples, then check all shards and print the verdict; return the exit code."""
    found = prepare(args)
    if args.no_check:
        return look(args, found.shards)
    record = settle_flags(found, vars(args))
    options: dict[str, Any] = {"fields": parse_fields(args.fields, args.optional_fields)}
    options |= {"decode": args.decode, "hashing": args.checksums, "num_workers": args.num_workers}
    identify = dataset_at(args.path).identify
    before = identify(found.shards)
    with open_report(args.report, args.source, args.path) as report:
        listing = None if args.source is None else list_source(args, report)
        check_function(listing)
        show(args, found.shards)  # what it meets that is damaged, the check finds again
        with stdout_apart(args.transform), ProgressBar(len(found.shards), " shards") as bar:
            options["progress"] = bar.update
            checked, faults = check_dataset(found, report, listing, record, **options)
    if identify(found.shards) != before:
        raise PackError(f"{args.path!r}: the dataset was replaced while it was read; run again")
    sums = args.checksums and write_checksums(args.path, record, listing, (checked, faults))
    print_verdict(checked, faults, listing, args.source, args.decode, sums or "")
    return 1 if faults.numbers else 0


@one_line_errors("read_webdataset.py")
def main(argv: Sequence[str]) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    with interruptible(args.path, args.source):
        return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
