"""What the reader prints and draws: a sample, the faults, and the verdict, each fit for a terminal.

Input: samples as webdataset yields them, and reports of shards. Output: lines without control
characters, and captions.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sharding.command import drop_output
from sharding.decoding import decodes
from sharding.faults import left_out
from sharding.messages import count
from sharding.samples import Listing
from sharding.shards import shard_number
from sharding.transform import dropped_by, name_of
from sharding.verify import Faults
from sharding.verify_shard import Checked

TEXT_LIMIT = 200  # characters of a text that are printed
CAPTION = 24  # characters of a line below a picture
DRAWN = 16  # samples in a preview, without --limit

Sample = Mapping[str, Any]  # as webdataset yields it


def one_line(text: str) -> str:
    """Return the beginning of a text as one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:TEXT_LIMIT])


def sample_text(sample: Sample) -> str:
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


def print_sample(number: int, sample: Sample) -> None:
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


def print_samples(samples: Iterator[Sample]) -> int:
    """Print samples; return their number."""
    number = 0
    try:
        for number, sample in enumerate(samples, 1):
            print_sample(number - 1, sample)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has seen enough
        drop_output()
    return number


def draw_samples(
    shards: Sequence[str], read: Callable[[str], Iterator[Sample]], limit: int | None, target: str
) -> int:
    """Draw the first samples of all shards: picture, key and first words of each.

    Args:
        read: yields the samples of a shard.

    Returns:
        Their number.
    """
    from sharding.images import draw_preview

    each, more = divmod(DRAWN if limit is None else limit, len(shards))
    pictures: list[tuple[bytes, Sequence[str]]] = []
    for number, shard in enumerate(shards):
        pictures += map(_picture, islice(read(shard), each + (number < more)))
    draw_preview(pictures, target)
    return len(pictures)


def _picture(sample: Sample) -> tuple[bytes, Sequence[str]]:
    """Return what is drawn of a sample: its first image, if any, and lines of caption."""
    from sharding.images import is_image

    image = next((data for field, data in sample.items() if is_image(field)), b"")
    words = textwrap.wrap(sample_text(sample) if "txt" in sample else "", CAPTION)
    return image, [one_line(sample["__key__"])[-CAPTION:], *words[:2]]


def print_verdict(
    reports: Sequence[Checked],
    faults: Faults,
    listing: Listing | None,
    source: str | None,
    decode: bool,
    also: str,
) -> None:
    """Print the faults, the cure, and what the shards hold, with the verdict on them.

    Args:
        source: as the flag spells it, for a command to paste.
        also: what else holds, if nothing is wrong.
    """
    _print_faults(faults)
    if bad := [report.path for report in reports if not report.sound]:
        total = len(reports) + faults.numbers["missing shard"]
        print(_how_to_pack(bad[0], total, source), file=sys.stderr)
    print(_summary(reports, faults, listing, decode, also))


def _print_faults(faults: Faults) -> None:
    """Print the first few faults of each kind on stderr, and count the others."""
    for kind, number in faults.numbers.items():
        for text in faults.shown[kind]:
            print(f"{kind}: {one_line(text)}", file=sys.stderr)
        if more := number - len(faults.shown[kind]):
            print(f"{kind}: and {more:,} more", file=sys.stderr)


def _how_to_pack(shard: str, total: int, source: str | None) -> str:
    """Return a line with the command that packs a shard anew."""
    return (
        f"to pack {os.path.basename(shard)} again: python create_webdataset.py "
        f"--source {shlex.quote(source) if source else 'DIR'} "
        f"--output {shlex.quote(os.path.dirname(shard) or os.curdir)} "
        f"--shard-id {shard_number(shard)} --total-shards {total if source else 'N'}, "
        "with the other flags that you packed with"
    )


def _summary(
    reports: Sequence[Checked], faults: Faults, listing: Listing | None, decode: bool, also: str
) -> str:
    """Return what the shards hold, and the verdict on them, in one line."""
    number = sum(faults.numbers.values())
    verdict = count(number, "fault") if number else "OK"
    if listing:
        if not number:
            made = f", as {name_of(listing.transform)} makes it" if listing.transform else ""
            verdict += f", each sample of {one_line(listing.source)} once{made}, byte for byte"
        verdict += dropped_by(listing.transform, sum(len(report.dropped) for report in reports))
        verdict += left_out("ignored", listing.ignored) + left_out("skipped", listing.skipped)
    if not number:
        verdict += also
    samples = count(sum(report.samples for report in reports), "sample")
    size = sum(report.size for report in reports)
    shards = count(len(reports), "shard")
    return f"{samples} in {shards}, {size:,} bytes: {verdict}{_count_fields(reports, decode)}"


def _count_fields(reports: Sequence[Checked], decode: bool) -> str:
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
