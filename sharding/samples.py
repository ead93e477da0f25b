"""From files to samples: keys and fields, what is refused, and the order.

Knows names alone: it lists a folder of raw files and opens none of them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sharding.errors import InputError, explain

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python marks the bytes of a name that is not UTF-8
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # see split_name


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and field of a member: 'cats/7.seg.png' -> ('cats/7', 'seg.png').

    The rule is webdataset's (`base_plus_ext` in `webdataset/tariterators.py`): the key ends at the
    first dot of the last component. (None, None) for a name that has no key or no field.
    """
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (None, None)


class Listing(NamedTuple):
    """What a source holds.

    A sample is written as its key. Only where an extension is not spelled in lower case
    do the spellings of all its fields follow, each after a NUL: "cats/7\\0JPG\\0txt".
    NUL sorts before every character of a name, so samples sort by key.
    """

    samples: list[str]
    skipped: int  # incomplete samples that --skip-incomplete dropped
    ignored: int  # names that are no part of a sample


def sample_key(sample: str) -> str:
    """Return the key of a sample of a Listing."""
    return sample.partition("\0")[0]


def sample_files(sample: str, fields: Sequence[str]) -> list[str]:
    """Return the paths below source of a sample's files, in the order of `fields`."""
    key, *spelled = sample.split("\0")
    return [f"{key}.{extension}" for extension in spelled or fields]


INCOMPLETE = "samples that lack a field; add it, give other --fields, or --skip-incomplete"
DUPLICATE = "files whose key and field another has, in upper or lower case; rename them"
DOTTED = "names with a dot before the field, which readers take for another key; rename them"
RESERVED = "names that begin with __, which readers drop; rename them"
BAD_NAME = "names that are not UTF-8, or that readers cannot split; rename them"


def parse_fields(text: str) -> tuple[str, ...]:
    """Return the fields of 'jpg,txt' in the order in which a shard holds them."""
    fields = text.lower().split(",")
    for field in fields:
        if not re.fullmatch(r"[^_./\s][^/\s]*", field) or NOT_UTF8.search(field):
            raise InputError(f"--fields {text!r}: {field!r} cannot be a field; write e.g. jpg,txt")
    if len(set(fields)) < len(fields):
        raise InputError(f"--fields {text!r} names a field twice; name each once")
    return tuple(sorted(fields))


def list_samples(
    source: str | os.PathLike[str],
    fields: Sequence[str] = ("jpg", "txt"),
    skip_incomplete: bool = False,
    shuffle: int | None = None,
) -> Listing:
    """List a source, check all of it, and put its samples into the order of the shards.

    Args:
        source: the folder, listed recursively, without hidden names and linked folders.
        fields: the required fields, sorted, as `parse_fields` returns them.
        skip_incomplete: drop and count samples that lack a field instead of refusing them.
        shuffle: order samples by a hash of this seed and the key, instead of by key.

    Raises:
        InputError: the source cannot be read, or readers would lose or merge some of its samples.
    """
    if sys.getfilesystemencoding() != "utf-8":
        raise InputError("file names must be read as UTF-8 to give the same keys; set PYTHONUTF8=1")
    scan = Scan(source, fields)
    try:
        while scan.folders:
            scan.list_folder(scan.folders.pop())
    except OSError as error:
        raise InputError(f"--source cannot be listed: {explain(error)}") from None
    samples, faults = scan.samples, scan.faults
    skipped = len(faults.pop(INCOMPLETE, ())) if skip_incomplete else 0
    for problem, names in faults.items():
        what, _, cure = problem.partition("; ")
        first = ", ".join(repr(name[-100:]) for name in sorted(names)[:5])
        raise InputError(
            f"--source {os.fspath(source)!r} has {what}: {len(names)} ({first}); {cure}"
        )
    if not samples:
        cure = "put pairs such as " + " + ".join(f"sample-0.{field}" for field in fields)
        cure += " there, or give other --fields"
        if not skipped and not scan.ignored:
            cure += ", or make some with ./make_dummy_data.sh"
        raise InputError(f"--source {os.fspath(source)!r} has no complete sample: {cure}")
    samples.sort(key=None if shuffle is None else functools.partial(shuffle_rank, shuffle))
    return Listing(samples, skipped, scan.ignored)


class Scan:
    """What has been found so far in a source, and what is still to be listed."""

    def __init__(self, source: str | os.PathLike[str], fields: Sequence[str]) -> None:
        self.source = source
        self.bits = {field: 1 << number for number, field in enumerate(fields)}
        self.endings = tuple("." + field for field in fields)
        self.folders = [""]  # to be listed, as "" or "cats/" below source
        self.samples: list[str] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.ignored = 0

    def list_folder(self, prefix: str) -> None:
        """List the folder at `prefix`; note the folders within it for later."""
        bits = self.bits  # looked up once: this loop sees each file of a dataset
        held: dict[str, int] = {}  # name up to the first dot -> the fields that are there, as bits
        spelled: dict[str, dict[str, str]] = defaultdict(dict)
        folder = os.path.join(self.source, prefix[:-1]) if prefix else self.source
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                regular = entry.is_file(follow_symlinks=False)
                if not regular:
                    if entry.is_dir(follow_symlinks=False):
                        self.folders.append(f"{prefix}{name}/")
                        continue
                    regular = os.path.isfile(entry.path)  # a link to one?
                stem, _, extension = name.partition(".")
                bit = bits.get(extension) or bits.get(extension.lower())
                if bit is None:
                    self.ignored += 1
                    if name.lower().endswith(self.endings):
                        self.faults[DOTTED].append(prefix + name)
                    continue
                if regular and extension not in bits:
                    spelled[stem][extension.lower()] = extension
                before = held.get(stem, 0)
                if before & bit:
                    self.faults[DUPLICATE].append(prefix + name)
                held[stem] = before | bit if regular else before
        self.add_samples(prefix, held, spelled)

    def add_samples(
        self, prefix: str, held: Mapping[str, int], spelled: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Note the complete samples of a folder, and what is wrong with the others."""
        complete = (1 << len(self.bits)) - 1
        for stem, bits in held.items():
            key = prefix + stem
            if fault := key_fault(prefix, stem):
                self.faults[fault].append(key)
            elif bits != complete:
                lacking = next(field for field, bit in self.bits.items() if not bits & bit)
                self.faults[INCOMPLETE].append(f"{key}.{lacking}")
            elif stem in spelled:
                self.samples.append("\0".join([key, *(spelled[stem].get(f, f) for f in self.bits)]))
            else:
                self.samples.append(key)


def key_fault(prefix: str, stem: str) -> str:
    """Return what keeps a folder's path and a stem from being a key, or nothing."""
    if stem.startswith("__") or (prefix[:2] == "__" and re.match("__[^/]*__/", prefix)):
        return RESERVED
    key = prefix + stem
    if key[:3] == "BZh" and re.match(r"BZh.1AY&SY", key, re.DOTALL):
        return BAD_NAME  # in front of a shard, readers take it for bzip2
    if key.isascii() and "\n" not in key:
        return ""
    split_back = not NOT_UTF8.search(key) and split_name(f"{key}.a") == (key, "a")
    return "" if split_back else BAD_NAME


def shuffle_rank(seed: int, sample: str) -> bytes:
    """Return the place of a sample in the order of --shuffle, the same on every machine."""
    return hashlib.blake2b(f"{seed}/{sample_key(sample)}".encode()).digest()
