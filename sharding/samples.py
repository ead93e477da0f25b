"""Samples: keys and fields, which names readers would lose or merge, and the deal.

Knows names alone, and no folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from sharding import faults
from sharding.errors import InputError, argument
from sharding.faults import Kind

T = TypeVar("T")
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python marks the bytes of a name that is not UTF-8
RESERVED_FOLDER = re.compile(r"__[^/]*__($|/)")  # in front of a name: webdataset drops it
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # see split_name


class Sample(NamedTuple):
    """The files of one key: each is `<stem>.<extension>` below the source.

    The stem is nearly always the very string that the key is, and all samples with the same
    extensions share one tuple, so a sample costs some 60 bytes beside its key.
    """

    key: str
    stem: str  # another string than the key where dots in it were replaced
    extensions: tuple[str, ...]  # as they are spelled, in the order of their fields
    listed: str = ""  # of a bucket: the version of each file; see store.version_of

    def files(self) -> list[str]:
        """Return the paths of the sample's files below the source."""
        return [f"{self.stem}.{extension}" for extension in self.extensions]

    def members(self) -> list[str]:
        """Return the names of the sample's members in a shard, each of the file in its place."""
        return [f"{self.key}.{extension.lower()}" for extension in self.extensions]


class Fields(NamedTuple):
    """What files make a sample; each entry lists alternatives, of which a sample has one."""

    required: tuple[tuple[str, ...], ...]
    optional: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        """Return them as the flags spell them."""
        required, optional = (",".join(map(";".join, entries)) for entries in self)
        return required + (f", optional {optional}" if optional else "")

    def known(self) -> frozenset[str]:
        """Return every field that a sample may have."""
        return frozenset(field for entries in self for entry in entries for field in entry)


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and field of a member: 'cats/7.seg.png' -> ('cats/7', 'seg.png').

    The rule is webdataset's (`base_plus_ext` in `webdataset/tariterators.py`): the key ends at the
    first dot of the last component. (None, None) for a name that has no key or no field.
    """
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (None, None)


def deal(samples: Sequence[T], shard_id: int, total_shards: int) -> Sequence[T]:
    """Return the samples of a shard: sample i belongs to shard i % total_shards."""
    return samples[shard_id::total_shards]


def parse_fields(fields: str | Iterable[str], optional_fields: str | Iterable[str] = ()) -> Fields:
    """Return what files make a sample.

    Args:
        fields: required, as "jpg,txt" or one by one; "jpg;png" are alternatives.
        optional_fields: the same, for fields that are packed where they are there.

    Raises:
        InputError: none is required, one is there twice, or one cannot be a field.
    """
    parsed = Fields(_parse("fields", fields), _parse("optional_fields", optional_fields))
    if len(parsed.known()) < sum(len(entry) for entries in parsed for entry in entries):
        raise InputError(f"{argument('fields')} {str(parsed)!r} names a field twice; name it once")
    return parsed


def _parse(name: str, fields: str | Iterable[str]) -> tuple[tuple[str, ...], ...]:
    named = fields if isinstance(fields, str) else ",".join(fields)
    if not named and name == "optional_fields":
        return ()
    entries = [tuple(sorted(entry.split(";"))) for entry in named.lower().split(",")]
    for field in (field for entry in entries for field in entry):
        if not re.fullmatch(r"[^_./\s|][^/\s|]*", field) or NOT_UTF8.search(field):
            cure = 'write e.g. jpg,txt, or "jpg;png,txt" for one of two'
            raise InputError(f"{argument(name)} {named!r}: {field!r} cannot be a field; {cure}")
    return tuple(sorted(entries))


def judge(extensions: Iterable[str], fields: Fields) -> tuple[Kind | None, tuple[str, ...]]:
    """Return what is wrong with the files of one stem, and the fields that it is wrong with.

    Args:
        extensions: of its files, those that are fields in some spelling, sorted in lower case.

    Returns:
        (None, ()) for a complete sample.
    """
    found = [extension.lower() for extension in extensions]
    again = tuple(sorted({field for field in found if found.count(field) > 1}))
    if again:
        return faults.DOUBLED, again
    for entry in (*fields.required, *fields.optional):
        if len(both := tuple(field for field in entry if field in found)) > 1:
            return faults.ALTERNATIVES, both
    lacking = tuple(
        ";".join(entry) for entry in fields.required if not any(field in found for field in entry)
    )
    return (faults.INCOMPLETE, lacking) if lacking else (None, ())


def name_fault(key: str, name: str) -> Kind | None:
    """Return what keeps a key, which ends in a name, from being read back."""
    if name[:2] == "__" or RESERVED_FOLDER.match(key):
        return faults.RESERVED
    if "\n" in key or (not key.isascii() and NOT_UTF8.search(key)):
        return faults.BAD_NAME
    return None
