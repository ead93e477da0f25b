"""Listing a source: from names of files to samples in the order in which they are dealt.

Every name is part of a sample, or refused, or ignored; the last two are counted by kind. No file is
opened.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator

from sharding.errors import InputError
from sharding.faults import Report
from sharding.messages import argument, warn
from sharding.places import source_at
from sharding.samples import Given, Listing, Transform, parse_fields
from sharding.scan import Scan
from sharding.stages import stage
from sharding.transform import read_function
from sharding.urls import without_slash


def list_samples(
    source: str | os.PathLike[str],
    fields: str | Iterable[str] = ("jpg", "txt"),
    *,
    optional_fields: str | Iterable[str] = (),
    replace_dots: str | None = None,
    skip_bad: bool = False,
    shuffle: int | None = None,
    transform: str | Transform | None = None,
    report: Report | None = None,
) -> Listing:
    """List a source, check all of it, and put its samples into the order of the shards.

    Args:
        source: the folder or URL, listed recursively, links to folders included, without hidden
            names; or archives: a path, a pattern or braces that end in ".tar".
        fields, optional_fields: see `parse_fields`.
        replace_dots: a character; a file's field is then the longest known one that its name ends
            with, and each dot in front of it becomes this character in the key.
        skip_bad: drop and count what would be refused.
        shuffle: order samples by a hash of this seed and the key, instead of by key.
        transform: a function for each sample, or "FILE.py:FUNCTION", whose text is read now.
        report: takes every name that is left out or refused.

    Raises:
        InputError: the source cannot be read, or readers would lose or merge some of its samples.
    """
    if sys.getfilesystemencoding() != "utf-8":
        raise InputError("file names must be read as UTF-8 to give the same keys; set PYTHONUTF8=1")
    started = time.time()
    if replace_dots is not None and not re.fullmatch(r"[^\s./\\\0]", replace_dots):
        raise InputError(f"{argument('replace_dots')} takes one character, such as _")
    given = Given.of(fields, optional_fields, replace_dots, skip_bad, shuffle)
    parsed = parse_fields(given.fields, given.optional_fields)
    function = read_function(transform) if isinstance(transform, str) else transform
    where = source_at(source)
    scan = Scan(without_slash(source), parsed, replace_dots, skip_bad, report or Report())
    scan.report.open()
    with _without_collector(), stage("listing", "names") as scan.stage:
        where.list_files(scan)
    skipped = scan.skipped()
    if not skip_bad or not scan.keys:
        scan.refuse(where.NOTHING)
    if skip_bad and sum(skipped.values()) > len(scan.keys):
        names = f"{sum(skipped.values()):,} bad names"
        warn(f"{len(scan.keys):,} samples are left, besides {names}; are the fields right?")
    scan.keys.sort(key=None if shuffle is None else functools.partial(_shuffle_rank, shuffle))
    ignored = dict(scan.ignored)
    samples = scan.samples()
    return Listing(
        started, scan.source, scan.fields, samples, ignored, skipped, shuffle, function, given
    )


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from looking at all names again and again; they form no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shuffle_rank(seed: int, key: str) -> bytes:
    """Return the place of a sample in the order of `shuffle`, the same on every machine."""
    return hashlib.blake2b(f"{seed}/{key}".encode()).digest()
