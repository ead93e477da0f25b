"""Pack image + text pairs into WebDataset shards: one call, or one command, packs one shard.

Sorted samples are dealt like cards: sample i belongs to shard i % total_shards. So any number of
processes, on any number of machines, can pack the shards of one dataset side by side.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sharding.command import (
    OUTPUT,
    Parser,
    ProgressBar,
    add_source_arguments,
    interruptible,
    list_source,
    number_from,
    one_line_errors,
    refuse_others,
    require,
    stdout_apart,
)
from sharding.errors import attempt
from sharding.listing import list_samples
from sharding.parallel import in_order
from sharding.run import Direct, Run, check_driver, load, start_direct
from sharding.samples import deal
from sharding.shards import MAX_SHARDS, Progress, Shard, check_shard_numbers
from sharding.transform import dropped_by

USAGE = """create_webdataset.py --source DIR --output DIR --shard-id I --total-shards N [options]
       create_webdataset.py --run DIR --shard-id I"""
EXAMPLES = """examples:
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 4
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 64 \\
      --shard-step 8
"""
STORING = 2  # shards that are stored while the next one is packed


def create_webdataset(
    source: str | os.PathLike[str] | Run | Direct,
    output: str | os.PathLike[str],
    shard_id: int,
    total_shards: int,
    fields: str | Iterable[str] = "jpg,txt",
    *,
    progress: Progress | None = None,
    store: bool = True,
    **flags: Any,
) -> Shard:
    """Pack one shard: every sample i of the source with i % total_shards == shard_id.

    The shard appears under its name only when it is whole and on the disk.

    Args:
        source: the folder or URL of the raw files, or archives; or a run that was started, whose
            samples, output and number of shards are settled.
        output: the folder for the shard, made if missing.
        shard_id, total_shards: which shard to pack, 0 <= shard_id < total_shards.
        fields: the files of a sample; this and the flags are those of `list_samples`.
        progress: called with the number of samples that have just been packed or dropped.
        store: False leaves the last step to the caller; see `Shard.store`.
        flags: optional_fields, replace_dots, skip_bad, shuffle, transform.

    Raises:
        InputError: the source or the shard numbers are bad; nothing was written.
        PackError, OSError: packing failed; no shard appeared.
    """
    run = source
    if not isinstance(run, (Run, Direct)):
        listing = list_samples(run, fields, **flags)
        run = start_direct(listing, output, range(shard_id, shard_id + 1), total_shards)
    samples = run.samples(shard_id)  # of all samples, [shard_id::total_shards]
    shard = run.pack(shard_id, samples, progress)  # one tar, written from them
    return shard.store() if store else shard


def build_parser() -> Parser:
    """Return the command line of this script."""
    parser = Parser(USAGE, "Pack one shard (or every K-th) of a folder of samples.", EXAMPLES)
    add_source_arguments(parser)
    add = parser.add_argument_group("the shards").add_argument
    add("--output", metavar="DIR", help=OUTPUT)
    add("--shard-id", metavar="I", type=int, help="the shard to pack, from 0")
    number = number_from(1, MAX_SHARDS)
    add("--total-shards", metavar="N", type=number, help="--num-shards of the drivers")
    add("--shard-step", metavar="K", type=number, help="pack shards I, I+K, I+2K, ...")
    add = parser.add_argument_group("a run that `python sharding start` has planned").add_argument
    what = "its folder; of the other flags, only --shard-id and --shard-step go with it"
    add("--run", metavar="DIR", help=what)
    return parser


def open_run(args: argparse.Namespace) -> tuple[Run | Direct, range, int]:
    """Return what the flags say to pack from, which shards of it, and the number of all samples."""
    if args.run is None:
        require(args, "source", "output", "total_shards", "shard_id")
        listing, total = list_source(args), args.total_shards
        shard_ids = range(args.shard_id, total, args.shard_step or total)
        return start_direct(listing, args.output, shard_ids, total), shard_ids, len(listing.samples)
    require(args, "run", "shard_id")
    refuse_others(build_parser(), args, "run", "shard_id", "shard_step")
    run = load(args.run)
    check_shard_numbers(run.total_shards, run.plan.total_samples, args.shard_id)
    shard_ids = range(args.shard_id, run.total_shards, args.shard_step or run.total_shards)
    return run, shard_ids, run.plan.total_samples


def pack_each(
    run: Run | Direct, shard_ids: range, progress: Progress
) -> Iterator[tuple[int, Shard | Exception]]:
    """Pack shards in turn, and store the last few meanwhile; yield each, or what went wrong."""
    parent = os.getppid()  # of a worker: the driver, or an interpreter's wrapper

    def pack(shard_id: int) -> Shard | Exception:
        if isinstance(run, Run):
            check_driver(run, parent)
        more: dict[str, Any] = {"progress": progress, "store": False}
        return attempt(lambda: create_webdataset(run, run.path, shard_id, run.total_shards, **more))

    def store(shard: Shard | Exception) -> Shard | Exception:
        return attempt(shard.store) if isinstance(shard, Shard) else shard

    with ThreadPoolExecutor(STORING) as pool:
        shards = in_order(pool, store, map(pack, shard_ids), STORING + 1)
        yield from zip(shard_ids, shards, strict=True)


def pack_all(args: argparse.Namespace) -> int:
    """Pack all the shards that the flags name; return the exit code."""
    run, shard_ids, samples = open_run(args)
    dealt = (deal(range(samples), shard_id, run.total_shards) for shard_id in shard_ids)
    position = args.shard_id if args.run else 0
    with stdout_apart(run.transform), ProgressBar(sum(map(len, dealt)), position=position) as bar:
        outcomes = [(*one, bar.report(*one)) for one in pack_each(run, shard_ids, bar.update)]
    shards = [shard for _, shard, _ in outcomes if isinstance(shard, Shard)]
    if isinstance(run, Direct) and run.transform:  # of a run, the summary says it
        print(dropped_by(run.transform, sum(shard.dropped for shard in shards))[2:])
    return 0 if len(shards) == len(outcomes) else 1


@one_line_errors("create_webdataset.py")
def main(argv: Sequence[str]) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    with interruptible(args.source, args.output, args.run):
        return pack_all(args)


if __name__ == "__main__":
    raise SystemExit(main())
