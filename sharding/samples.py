"""From files to samples: keys and fields, what is refused, the order, and the deal.

Knows names alone: it lists a folder of raw files and opens none of them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from sharding.errors import InputError, argument, explain, warn

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python marks the bytes of a name that is not UTF-8
RESERVED_FOLDER = re.compile(r"__[^/]*__($|/)")  # in front of a name: webdataset drops it
MAX_GROWN = 100_000  # entries of a table that only saves time
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # see split_name

INCOMPLETE = "samples that lack a field; add it, give other {fields}, or {skip_incomplete}"
DUPLICATE = "files whose key and field another has, in upper or lower case; rename them"
DOTTED = "names with a dot before the field, which readers take for another key; rename them"
RESERVED = "names that begin with __, which readers drop; rename them"
BAD_NAME = "names that are not UTF-8, or that hold a newline; rename them"


class Sample(NamedTuple):
    """The files of one key: each is `<stem>.<extension>` below the source.

    The stem is the very string that the key is, and all samples with the same extensions share
    one tuple, so a sample costs some 60 bytes beside its key.
    """

    key: str
    stem: str
    extensions: tuple[str, ...]  # as they are spelled, in the order of their fields

    def files(self) -> list[str]:
        """Return the paths of the sample's files below the source."""
        return [f"{self.stem}.{extension}" for extension in self.extensions]

    def members(self) -> list[str]:
        """Return the names of the sample's members in a shard, each of the file in its place."""
        return [f"{self.key}.{extension.lower()}" for extension in self.extensions]


class Listing(NamedTuple):
    """What a source holds."""

    samples: list[Sample]  # in the order in which they are dealt to the shards
    skipped: int  # incomplete samples that `skip_incomplete` dropped
    ignored: int  # names that are no part of a sample


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and field of a member: 'cats/7.seg.png' -> ('cats/7', 'seg.png').

    The rule is webdataset's (`base_plus_ext` in `webdataset/tariterators.py`): the key ends at the
    first dot of the last component. (None, None) for a name that has no key or no field.
    """
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (None, None)


def deal(samples: Sequence[Sample], shard_id: int, total_shards: int) -> Sequence[Sample]:
    """Return the samples of a shard: sample i belongs to shard i % total_shards."""
    return samples[shard_id::total_shards]


def parse_fields(fields: str | Iterable[str]) -> tuple[str, ...]:
    """Return fields in lower case, in the order in which a shard holds them.

    Args:
        fields: "jpg,txt", or the fields one by one.

    Raises:
        InputError: there are none, one is there twice, or one cannot be a field.
    """
    named = fields if isinstance(fields, str) else ",".join(fields)
    split = named.lower().split(",")
    where = f"{argument('fields')} {named!r}"
    for field in split:
        if not re.fullmatch(r"[^_./\s][^/\s]*", field) or NOT_UTF8.search(field):
            raise InputError(f"{where}: {field!r} cannot be a field; write e.g. jpg,txt")
    if len(set(split)) < len(split):
        raise InputError(f"{where} names a field twice; name each once")
    return tuple(sorted(split))


def list_samples(
    source: str | os.PathLike[str],
    fields: str | Iterable[str] = ("jpg", "txt"),
    skip_incomplete: bool = False,
    shuffle: int | None = None,
) -> Listing:
    """List a source, check all of it, and put its samples into the order of the shards.

    Args:
        source: the folder, listed recursively, without hidden names and linked folders.
        fields: the required fields.
        skip_incomplete: drop and count samples that lack a field instead of refusing them.
        shuffle: order samples by a hash of this seed and the key, instead of by key.

    Raises:
        InputError: the source cannot be read, or readers would lose or merge some of its samples.
    """
    if sys.getfilesystemencoding() != "utf-8":
        raise InputError("file names must be read as UTF-8 to give the same keys; set PYTHONUTF8=1")
    scan = _Scan(source, parse_fields(fields))
    try:
        while scan.folders:
            scan.list_folder(scan.folders.pop())
    except OSError as error:
        raise InputError(f"{argument('source')} cannot be listed: {explain(error)}") from None
    skipped = len(scan.faults.pop(INCOMPLETE, ())) if skip_incomplete else 0
    scan.refuse_faults(skipped)
    order = attrgetter("key") if shuffle is None else functools.partial(_shuffle_rank, shuffle)
    scan.samples.sort(key=order)
    return Listing(scan.samples, skipped, sum(scan.ignored.values()))


@functools.lru_cache(maxsize=1_024)
def judge(extensions: tuple[str, ...], fields: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return what is wrong with the files of one stem, and which extensions are lacking or doubled.

    Args:
        extensions: of its files, those that are fields in some spelling, sorted in lower case.
        fields: the required fields.

    Returns:
        ("", ()) for a complete sample.
    """
    found = [extension.lower() for extension in extensions]
    again = [place for place in range(1, len(found)) if found[place] == found[place - 1]]
    if again:
        return DUPLICATE, tuple(extensions[place] for place in again)
    lacking = tuple(field for field in fields if field not in found)
    return (INCOMPLETE, lacking) if lacking else ("", ())


def warn_of_skipped(listing: Listing) -> None:
    """Warn if `skip_incomplete` dropped most of the samples: the fields may be wrong."""
    kept = len(listing.samples)
    if listing.skipped > kept:
        warn(f"{kept:,} of {kept + listing.skipped:,} samples are complete; are the fields right?")


class _Scan:
    """What has been found so far in a source, and what is still to be listed."""

    def __init__(self, source: str | os.PathLike[str], fields: tuple[str, ...]) -> None:
        self.source = source
        self.fields = fields
        self.folders = [""]  # to be listed, as "" or "cats/" below source
        self.samples: list[Sample] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.ignored: Counter[str] = Counter()  # by extension
        self.irregular: set[str] = set()  # names of fields that no regular file has
        # (extensions of a stem, one more) -> all of them, or None where the one is no field
        self.grown: dict[tuple[tuple[str, ...], str], tuple[str, ...] | None] = {}
        self.tuples: dict[tuple[str, ...], tuple[str, ...]] = {}  # one for all equal ones

    def list_folder(self, prefix: str) -> None:
        """List the folder at `prefix`; note the folders within it for later."""
        held: dict[str, tuple[str, ...]] = {}  # stem -> the extensions that are fields
        grown = self.grown  # looked up once: this loop sees each file of a dataset
        folder = os.path.join(self.source, prefix[:-1]) if prefix else self.source
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if not entry.is_file(follow_symlinks=False):
                    if entry.is_dir(follow_symlinks=False):
                        self.folders.append(f"{prefix}{name}/")
                        continue
                    if not os.path.isfile(entry.path):  # nor a link to one
                        self.note_irregular(prefix, held, name)
                        continue
                stem, _, extension = name.partition(".")
                before = held.get(stem, ())
                try:
                    after = grown[before, extension]
                except KeyError:
                    after = self.grow(before, extension)
                if after is None:
                    self.note_ignored(prefix, name)
                else:
                    held[stem] = after
        self.add_samples(prefix, held)

    def grow(self, before: tuple[str, ...], extension: str) -> tuple[str, ...] | None:
        """Return the extensions of a stem together with one more, if that is a field."""
        after = None
        if extension.lower() in self.fields:
            after = tuple(sorted((*before, extension), key=str.lower))
            after = self.tuples.setdefault(after, after)
        if len(self.grown) > MAX_GROWN:  # as with millions of `name.<number>`
            self.grown.clear()
        self.grown[before, extension] = after
        return after

    def note_irregular(self, prefix: str, held: dict[str, tuple[str, ...]], name: str) -> None:
        """Note a name that is no file: a field of that name is lacking."""
        stem, _, extension = name.partition(".")
        if extension.lower() in self.fields:
            held.setdefault(stem, ())
            self.irregular.add(f"{prefix}{stem}.{extension.lower()}")
        else:
            self.note_ignored(prefix, name)

    def note_ignored(self, prefix: str, name: str) -> None:
        """Note a file that is no part of a sample."""
        extension = name.rpartition(".")[2] if "." in name else ""
        known = extension in self.ignored or len(self.ignored) < MAX_GROWN
        self.ignored[extension if known else ""] += 1
        if name.lower().endswith(tuple(f".{field}" for field in self.fields)):
            self.faults[DOTTED].append(_quote(prefix + name))

    def add_samples(self, prefix: str, held: dict[str, tuple[str, ...]]) -> None:
        """Note the complete samples of a folder, and what is wrong with the others."""
        plain_prefix = not _name_fault(prefix, "")
        for stem, extensions in held.items():
            key = prefix + stem
            fault, which = judge(extensions, self.fields)
            plain = plain_prefix and stem.isprintable() and stem[:2] != "__"
            if not plain and (name_fault := _name_fault(key, stem)):
                self.faults[name_fault].append(_quote(key))
            elif fault:
                self.faults[fault] += self.describe(key, extensions, which)
            else:
                self.samples.append(Sample(key, key, extensions))

    def describe(self, key: str, held: tuple[str, ...], wrong: tuple[str, ...]) -> list[str]:
        """Say what is wrong with the files of a stem; `wrong` is what `judge` named."""
        names = [f"{key}.{extension}" for extension in wrong]
        if wrong[0] in held:  # it is there, but so is another
            return [_quote(name) for name in names]
        for name in names:
            if name in self.irregular:
                return [f"{_quote(name)} is no regular file"]
        return [f"{_quote(f'{key}.{held[0]}')} has no .{wrong[0]}"]

    def suggest(self, problem: str, names: list[str]) -> str:
        """Return a hint if the field that samples lack may have another name here."""
        if problem != INCOMPLETE or not self.ignored:
            return ""
        (extension, number), lacking = self.ignored.most_common(1)[0], names[0].rpartition(" .")[2]
        if not extension or number < len(names) or lacking not in self.fields:
            return ""
        fields = ",".join(extension if field == lacking else field for field in self.fields)
        return f"; .{extension} files are there ({number:,}): {argument('fields')} {fields}?"

    def refuse_faults(self, skipped: int) -> None:
        """Raise an InputError if the source has faults, or no complete sample."""
        where = f"{argument('source')} {os.fspath(self.source)!r}"
        for problem, names in self.faults.items():
            what, _, cure = problem.partition("; ")
            first = ", ".join(sorted(names)[:5])
            arguments = {name: argument(name) for name in ("fields", "skip_incomplete")}
            cure = cure.format(**arguments) + self.suggest(problem, names)
            raise InputError(f"{where} has {what}: {len(names)} ({first}); {cure}")
        if not self.samples:
            cure = "put pairs such as " + " + ".join(f"sample-0.{field}" for field in self.fields)
            cure += f" there, or give other {argument('fields')}"
            if not skipped and not self.ignored:
                cure += ", or make some with ./make_dummy_data.sh"
            raise InputError(f"{where} has no complete sample: {cure}")


def _quote(name: str) -> str:
    return repr(name[-100:])


def _name_fault(key: str, stem: str) -> str:
    """Return what keeps a key from being read back, or nothing."""
    if stem[:2] == "__" or RESERVED_FOLDER.match(key):
        return RESERVED
    if "\n" in key or (not key.isascii() and NOT_UTF8.search(key)):
        return BAD_NAME
    return ""


def _shuffle_rank(seed: int, sample: Sample) -> bytes:
    """Return the place of a sample in the order of `shuffle`, the same on every machine."""
    return hashlib.blake2b(f"{seed}/{sample.key}".encode()).digest()
