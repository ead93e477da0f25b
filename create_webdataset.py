"""Pack image + text pairs into WebDataset shards: one call, or one command, packs one shard.

Sorted samples are dealt like cards: sample i belongs to shard i % total_shards. So any number of
processes, on any number of machines, can pack the shards of one dataset side by side.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sharding import run as runs
from sharding.batch import in_order
from sharding.command import (
    Parser,
    ProgressBar,
    add_source_arguments,
    list_source,
    number_from,
    one_line_errors,
    plain_interrupt,
    require,
)
from sharding.errors import InputError, PackError, StopRun, argument, explain
from sharding.listing import list_samples
from sharding.pack import begin_shard, write_shard
from sharding.places import output_at
from sharding.samples import deal
from sharding.shards import MAX_SHARDS, Progress, Shard, check_shard_numbers
from sharding.urls import is_url

USAGE = """create_webdataset.py --source DIR --output DIR --shard-id I --total-shards N [options]
       create_webdataset.py --run DIR --shard-id I"""
EXAMPLES = """examples:
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 4
  python create_webdataset.py --source raw --output out --shard-id 0 --total-shards 64 \\
      --shard-step 8
"""
T = TypeVar("T")
STORING = 2  # shards that are stored while the next one is packed
PackShard = Callable[[int, Progress], Callable[[], Shard]]  # returns its last step; see begin_shard


def create_webdataset(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    shard_id: int,
    total_shards: int,
    fields: str | Iterable[str] = "jpg,txt",
    optional_fields: str | Iterable[str] = (),
    replace_dots: str | None = None,
    skip_bad: bool = False,
    shuffle: int | None = None,
    progress: Progress | None = None,
) -> Shard:
    """Pack one shard: every sample i of the source with i % total_shards == shard_id.

    The shard appears under its name only when it is whole and on the disk.

    Args:
        source, fields, optional_fields, replace_dots, skip_bad, shuffle: see `list_samples`.
        output: the folder for the shard, made if missing.
        shard_id, total_shards: which shard to pack, 0 <= shard_id < total_shards.
        progress: called with the number of samples that have just been packed.

    Raises:
        InputError: the source or the shard numbers are bad; nothing was written.
        PackError, OSError: packing failed; no shard appeared.
    """
    listing = list_samples(
        source,
        fields,
        optional_fields=optional_fields,
        replace_dots=replace_dots,
        skip_bad=skip_bad,
        shuffle=shuffle,
    )
    check_shard_numbers(total_shards, len(listing.samples), shard_id)
    samples = deal(listing.samples, shard_id, total_shards)  # [shard_id::total_shards]
    where, folder = output_at(output), os.fspath(output)
    where.check_output(folder, listing)
    where.prepare(folder, [shard_id], total_shards)
    shard = write_shard(listing.source, samples, folder, shard_id, progress)
    where.settle(folder)
    return shard


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(USAGE, "Pack one shard (or every K-th) of a folder of samples.", EXAMPLES)
    add_source_arguments(parser)
    add = parser.add_argument_group("the shards").add_argument
    what = "folder (made if missing) or s3:// URL for the shards"
    add("--output", metavar="DIR", help=what)
    add("--shard-id", metavar="I", type=int, help="the shard to pack, from 0")
    number = number_from(1, MAX_SHARDS)
    what = "number of shards: --num-shards of the drivers"
    add("--total-shards", metavar="N", type=number, help=what)
    add("--shard-step", metavar="K", type=number, help="pack shards I, I+K, I+2K, ...")
    add = parser.add_argument_group("a run that `python sharding start` has planned").add_argument
    what = "its folder; takes the place of all flags but --shard-id and --shard-step"
    add("--run", metavar="DIR", help=what)
    return parser


def chosen_shards(args: argparse.Namespace, total_shards: int) -> range:
    """Return the shard ids that --shard-id and --shard-step choose."""
    return range(args.shard_id, total_shards, args.shard_step or total_shards)


def prepare_direct(args: argparse.Namespace) -> tuple[range, int, PackShard]:
    """Prepare to pack straight into --output; the source is listed once for all shards.

    Returns:
        The shard ids, their number of samples, and what packs one.
    """
    require(args, "source", "output", "total_shards", "shard_id")
    total = args.total_shards
    listing = list_source(args)
    check_shard_numbers(total, len(listing.samples), args.shard_id)
    where = output_at(args.output)
    where.check_output(args.output, listing)
    shard_ids = chosen_shards(args, total)
    shards = {shard_id: deal(listing.samples, shard_id, total) for shard_id in shard_ids}
    where.prepare(args.output, shard_ids, total)

    def pack(shard_id: int, progress: Progress) -> Callable[[], Shard]:
        return begin_shard(listing.source, shards[shard_id], args.output, shard_id, progress)

    return shard_ids, sum(map(len, shards.values())), pack


def prepare_staged(args: argparse.Namespace) -> tuple[range, int, PackShard]:
    """Prepare to pack shards of the run in --run; returns what `prepare_direct` does."""
    require(args, "run", "shard_id")
    plain = build_parser().parse_args([])
    for name, value in vars(args).items():
        if name not in ("run", "shard_id", "shard_step") and value != getattr(plain, name):
            message = f"{argument('run')} names a run that has a plan"
            raise InputError(f"{message}: leave out {argument(name)}")
    run = runs.load(args.run)
    if run.plan.driver is not None:
        sys.argv[0] = "run_parallel.sh"  # this is a step of that script: its name begins the errors
    total, parent = run.plan.total_shards, os.getppid()  # the driver, or an interpreter's wrapper
    check_shard_numbers(total, run.plan.total_samples, args.shard_id)
    shard_ids = chosen_shards(args, total)

    def pack(shard_id: int, progress: Progress) -> Callable[[], Shard]:
        runs.check_driver(run, parent)
        return runs.begin_pack(run, shard_id, progress)

    places = range(run.plan.total_samples)
    return shard_ids, sum(len(deal(places, shard_id, total)) for shard_id in shard_ids), pack


def attempt(shard_id: int, step: Callable[[], T]) -> tuple[int, T | Exception]:
    """Do a step of packing a shard; return its number, and what the step gave or what went wrong.

    Raises:
        StopRun: the rest would fail, too.
    """
    try:
        return shard_id, step()
    except StopRun:
        raise
    except (PackError, OSError) as error:
        return shard_id, error


def pack_all(args: argparse.Namespace) -> int:
    """Pack all the shards that the flags name; return the exit code."""
    shard_ids, samples, pack = prepare_direct(args) if args.run is None else prepare_staged(args)
    failed = False

    def begin(shard_id: int) -> tuple[int, Callable[[], Shard] | Exception]:
        return attempt(shard_id, lambda: pack(shard_id, bar.update))

    def finish(
        begun: tuple[int, Callable[[], Shard] | Exception],
    ) -> tuple[int, Shard | Exception]:
        shard_id, last_step = begun
        if isinstance(last_step, Exception):
            return shard_id, last_step
        return attempt(shard_id, last_step)

    bar = ProgressBar(samples, position=args.shard_id if args.run else 0)
    with bar, ThreadPoolExecutor(STORING) as pool:
        for shard_id, outcome in in_order(pool, finish, map(begin, shard_ids), STORING + 1):
            if isinstance(outcome, Shard):
                bar.say(outcome.report(), sys.stdout)
            else:
                bar.say(f"Shard {shard_id} failed: {explain(outcome)}", sys.stderr)
                failed = True
    if not args.run:
        output_at(args.output).settle(args.output)
    return 1 if failed else 0


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    if any(is_url(getattr(args, name) or "", name) for name in ("source", "output", "run")):
        with plain_interrupt():  # a request that waits for its answer would not notice Ctrl-C
            return pack_all(args)
    return pack_all(args)


if __name__ == "__main__":
    raise SystemExit(main())
