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
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

from sharding import faults, hints
from sharding.errors import InputError, argument, warn
from sharding.faults import Kind, Odd, Report, Tally, quote
from sharding.places import source_at
from sharding.samples import Fields, Sample, judge, name_fault, parse_fields
from sharding.urls import canonical, is_url

MAX_GROWN = 100_000  # entries of a table that only saves time


class Listing(NamedTuple):
    """What a source holds."""

    started: float  # seconds since the epoch
    source: str
    fields: Fields
    samples: list[Sample]  # in the order in which they are dealt to the shards
    ignored: dict[str, int]  # names that are no part of a sample: extension -> how many
    skipped: dict[str, int]  # what `skip_bad` dropped: reason -> how many
    shuffle: int | None = None  # the seed, if any


def list_samples(
    source: str | os.PathLike[str],
    fields: str | Iterable[str] = ("jpg", "txt"),
    *,
    optional_fields: str | Iterable[str] = (),
    replace_dots: str | None = None,
    skip_bad: bool = False,
    shuffle: int | None = None,
    report: Report | None = None,
) -> Listing:
    """List a source, check all of it, and put its samples into the order of the shards.

    Args:
        source: the folder or URL, listed recursively, links to folders included, without hidden
            names.
        fields, optional_fields: see `parse_fields`.
        replace_dots: a character; a file's field is then the longest known one that its name ends
            with, and each dot in front of it becomes this character in the key.
        skip_bad: drop and count what would be refused.
        shuffle: order samples by a hash of this seed and the key, instead of by key.
        report: takes every name that is left out or refused.

    Raises:
        InputError: the source cannot be read, or readers would lose or merge some of its samples.
    """
    if sys.getfilesystemencoding() != "utf-8":
        raise InputError("file names must be read as UTF-8 to give the same keys; set PYTHONUTF8=1")
    started = time.time()
    if replace_dots is not None and not re.fullmatch(r"[^\s./\\\0]", replace_dots):
        raise InputError(f"{argument('replace_dots')} takes one character, such as _")
    parsed = parse_fields(fields, optional_fields)
    as_given = canonical(source) if is_url(source, "source") else os.fspath(source)
    scan = Scan(as_given, parsed, replace_dots, skip_bad, report or Report())
    scan.report.open()
    with _without_collector():
        source_at(source).list_files(scan)
    skipped = scan.skipped()
    if not skip_bad or not scan.samples:
        scan.refuse()
    if skip_bad and sum(skipped.values()) > len(scan.samples):
        names = f"{sum(skipped.values()):,} bad names"
        warn(f"{len(scan.samples):,} samples are left beside {names}; are the fields right?")
    order = attrgetter("key") if shuffle is None else functools.partial(_shuffle_rank, shuffle)
    scan.samples.sort(key=order)
    ignored = dict(scan.ignored)
    return Listing(started, scan.source, scan.fields, scan.samples, ignored, skipped, shuffle)


class Scan:
    """What has been found so far in a source; `files.py` and `objects.py` list one into it."""

    def __init__(
        self,
        source: str,
        fields: Fields,
        replace_dots: str | None,
        skip_bad: bool,
        report: Report,
    ) -> None:
        self.source = source
        self.fields = fields
        self.known = fields.known()
        self.endings = tuple(f".{field}" for field in self.known)
        self.replace_dots = replace_dots
        self.skip_bad = skip_bad
        self.report = report
        self.samples: list[Sample] = []
        self.tallies: dict[Kind, Tally] = defaultdict(Tally)
        self.ignored: Counter[str] = Counter()  # by extension
        self.dotted: Counter[str] = Counter()  # names with a dot before the field, from the first
        self.loose = hints.Loose()
        self.odd: dict[str, list[Odd]] = defaultdict(list)  # stem -> fields that are no files
        self.forms: dict[str, str] = {}  # NFC form of an incomplete key -> the key
        self.same_form: tuple[str, str] | None = None  # two of these that look the same
        # (extensions of a stem, one more) -> all of them, or None where the one is no field
        self.grown: dict[tuple[tuple[str, ...], str], tuple[str, ...] | None] = {}
        self.tuples: dict[tuple[str, ...], tuple[str, ...]] = {}  # one for all equal ones
        self.verdicts: dict[tuple[str, ...], tuple[Kind | None, tuple[str, ...]]] = {}

    def split_at_field(self, name: str) -> tuple[str, str]:
        """Return stem and extension of a file whose stem may hold dots."""
        place = name.find(".")
        while place > 0:
            if name[place + 1 :].lower() in self.known:
                return name[:place], name[place + 1 :]
            place = name.find(".", place + 1)
        return name, ""

    def grow(self, before: tuple[str, ...], extension: str) -> tuple[str, ...] | None:
        """Return the extensions of a stem together with one more, if that is a field."""
        after = None
        if extension.lower() in self.known:
            after = tuple(sorted((*before, extension), key=str.lower))
            after = self.tuples.setdefault(after, after)
        if len(self.grown) > MAX_GROWN:  # as with millions of `name.<number>`
            self.grown.clear()
        self.grown[before, extension] = after
        return after

    def note_ignored(self, prefix: str, name: str) -> None:
        """Note a file that is no part of a sample."""
        stem, _, rest = name.partition(".")
        if self.replace_dots is None:
            self.loose.add(prefix + stem, (rest,))
        else:
            self.loose.add(prefix + os.path.splitext(name)[0], (name.rpartition(".")[2],))
        if name.lower().endswith(self.endings):
            rest = rest.lower()
            if rest in self.dotted or len(self.dotted) < MAX_GROWN:
                self.dotted[rest] += 1
            self.fault(faults.DOTTED, prefix + name)
        else:
            self.ignore(prefix + name, name[name.rindex(".") :] if "." in name else "")

    def ignore(self, name: str, what: str) -> None:
        """Note a name that is left alone."""
        what = what or "without extension"
        if what not in self.ignored and len(self.ignored) > MAX_GROWN:
            what = "of other extensions"
        self.ignored[what] += 1
        self.report.add(name, "ignored", what)

    def add_samples(self, prefix: str, held: dict[str, tuple[str, ...]]) -> None:
        """Note the complete samples of a folder, and what is wrong with the others."""
        plain_prefix = not name_fault(prefix, "")
        dotted = self.replace_dots is not None and self.keys_with_dots(held)
        for stem, extensions in held.items():
            key, name = prefix + stem, stem
            if dotted and "." in stem:
                name = stem.replace(".", self.replace_dots or "")
                key = prefix + name
            try:
                kind, which = self.verdicts[extensions]
            except KeyError:
                kind, which = self.verdicts[extensions] = judge(extensions, self.fields)
            plain = plain_prefix and name.isprintable() and name[:2] != "__"
            if not plain and (fault := name_fault(key, name)):
                kind, which = fault, ()
            elif dotted and dotted[name] > 1:
                kind, which = faults.MEETING, ()
            elif self.odd and prefix + stem in self.odd:
                if kind in (None, faults.INCOMPLETE):
                    kind = self.odd[prefix + stem][0].kind
            elif not kind and self.skip_bad and not self.may_read(prefix + stem, extensions):
                kind, which = faults.DENIED, ()
            if kind:
                self.fault_of_stem(kind, prefix + stem, extensions, which)
            else:
                self.samples.append(Sample(key, key if name is stem else prefix + stem, extensions))

    def keys_with_dots(self, held: Iterable[str]) -> Counter[str]:
        """Return how many stems become each key once their dots are replaced."""
        return Counter(stem.replace(".", self.replace_dots or "") for stem in held)

    def may_read(self, stem: str, extensions: Iterable[str]) -> bool:
        """Tell whether all files of a stem may be read; asked if bad ones are skipped alone."""
        paths = [f"{stem}.{extension}" for extension in extensions]
        return source_at(self.source).may_read(self.source, paths)

    def fault(self, kind: Kind, name: str, detail: str = "") -> None:
        """Note a name that is refused."""
        self.tallies[kind].add(f"{quote(name)} {detail}".rstrip())
        self.report.add(name, kind.reason, detail)

    def note_odd(self, stem: str, extension: str, odd: Odd) -> bool:
        """Note what is no file; tell whether it is a field, which `add_samples` finds lacking."""
        if extension.lower() in self.known:
            self.odd[stem].append(odd)
            return True
        if odd.kind is faults.INCOMPLETE:
            self.ignore(odd.name, "not a regular file")
        else:
            self.fault(odd.kind, odd.name, odd.detail)
        return False

    def fault_of_stem(
        self, kind: Kind, stem: str, extensions: tuple[str, ...], which: tuple[str, ...]
    ) -> None:
        """Note all the files of a stem, which are refused together."""
        names = [f"{stem}.{extension}" for extension in extensions]
        odd = self.odd.pop(stem, [])
        detail, shown = "", quote(stem)
        if odd and kind is odd[0].kind:
            self.loose.add(stem, (*extensions, *(one.name.partition(".")[2] for one in odd)))
            detail = odd[0].detail
            shown = f"{quote(odd[0].name)} {detail}".rstrip()
        elif kind is faults.INCOMPLETE:
            if names and len(which) == len(self.fields.required):
                for name, extension in zip(names, extensions, strict=True):
                    self.ignore(name, f".{extension}")  # optional fields alone make no sample
                return
            self.loose.add(stem, extensions)
            detail = f"has no .{which[0].replace(';', ' or .')}"
            shown = f"{quote(names[0])} {detail}"
            if not stem.isascii():
                other = self.forms.setdefault(unicodedata.normalize("NFC", stem), stem)
                self.same_form = self.same_form or ((other, stem) if other != stem else None)
        elif which:
            wrong = [name for name, e in zip(names, extensions, strict=True) if e.lower() in which]
            shown = " and ".join(map(quote, wrong))
        self.tallies[kind].add(shown)
        for name in (*names, *(one.name for one in odd)):
            self.report.add(name, kind.reason, detail)

    def skipped(self) -> dict[str, int]:
        """Return how many names are bad, by reason."""
        return {kind.reason: tally.number for kind, tally in self.tallies.items()}

    def refuse(self) -> None:
        """Raise an InputError if the source has faults, or no complete sample."""
        where = f"{argument('source')} {self.source!r}"
        lines = []
        for kind, tally in self.tallies.items():
            first, cure = ", ".join(tally.first()), kind.cure
            if kind is faults.INCOMPLETE:
                cure += self.hint() or faults.left_out("also there", self.ignored)
            if kind is faults.DOTTED:
                rest, number = self.dotted.most_common(1)[0]
                if number == tally.number and hints.is_optional(
                    rest, self.fields, self.loose, self.samples
                ):
                    cure += f", or {argument('optional_fields')} {rest}"
            cure += f"; {argument('skip_bad')} drops them"
            lines.append(f"{where} has {kind.what}: {tally.number:,} ({first}); {cure}")
        if lines and not self.skip_bad:
            raise InputError("\n".join(lines))
        if not self.samples:
            pair = [f"sample-0.{entry[0]}" for entry in self.fields.required]
            cure = f"put pairs such as {' + '.join(pair)} there, or give other {argument('fields')}"
            cure += self.hint() + faults.left_out("ignored", self.ignored)
            cure += faults.left_out("skipped", self.skipped())
            if not self.ignored and not self.tallies:
                cure += ", or make some with ./make_dummy_data.sh"
                if is_url(self.source):
                    cure = "there is nothing; are bucket and prefix right?"
            raise InputError(f"{where} has no complete sample: {cure}")

    def hint(self) -> str:
        """Return what may be behind samples that lack a field, or nothing."""
        if self.same_form:
            one, two = map(quote, self.same_form)
            return f"; {one} and {two} differ in Unicode form alone (NFC, NFD): give both one form"
        return hints.hint(self.fields, self.loose, self.samples)


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


def _shuffle_rank(seed: int, sample: Sample) -> bytes:
    """Return the place of a sample in the order of `shuffle`, the same on every machine."""
    return hashlib.blake2b(f"{seed}/{sample.key}".encode()).digest()
