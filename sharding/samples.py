"""Samples as plain data: keys and fields, which names readers would lose or merge, and the deal.

Knows names alone, and no folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from sharding import faults
from sharding.errors import InputError
from sharding.faults import Kind
from sharding.messages import argument

T = TypeVar("T", covariant=True)
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python marks the bytes of a name that is not UTF-8
RESERVED_FOLDER = re.compile(r"__[^/]*__($|/)")  # in front of a name: webdataset drops it
_FIELD = re.compile(r"[^_./\s|][^/\s|]*")
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # see split_name


class Origin(NamedTuple):
    """A file that files of samples lie in: an archive.

    Where there are any, the version of a file begins with the number of its own, in hexadecimal.
    """

    path: str
    size: int  # in bytes
    version: str  # tells it from a later one, as its source spells that


def origin_of(version: str) -> int:
    """Return the number of the origin that a file of this version lies in."""
    return int(version.partition(".")[0], 16)


class Sample(NamedTuple):
    """The files of one key: each is `<stem>.<extension>` below the source."""

    key: str
    stem: str  # another string than the key where dots in it were replaced
    extensions: tuple[str, ...]  # as they are spelled, in the order of their fields
    listed: str = ""  # the version of each file, where a listing tells it
    origins: tuple[Origin, ...] = ()  # of all samples of the source

    def files(self) -> list[str]:
        """Return the paths of the sample's files below the source."""
        return [f"{self.stem}.{extension}" for extension in self.extensions]

    def fields(self) -> tuple[str, ...]:
        """Return the sample's fields, each of the file in its place."""
        return tuple(extension.lower() for extension in self.extensions)

    def members(self) -> list[str]:
        """Return the names of the sample's members in a shard, each of the file in its place."""
        return [f"{self.key}.{field}" for field in self.fields()]


class Samples(Sequence[Sample]):
    """Samples in order, of which a usual one costs no more than its key; odd ones stand apart.

    A usual sample has the usual extensions, and files named by its key.
    """

    __slots__ = ("keys", "listed", "odd", "origins", "usual")

    def __init__(
        self,
        keys: list[str],
        usual: tuple[str, ...],
        odd: Mapping[str, Sample] = {},
        listed: Mapping[str, str] = {},
        origins: tuple[Origin, ...] = (),
    ) -> None:
        """Take keys in order; the samples of some that are not usual; what else is known of files.

        Args:
            listed: key -> the version of each file, where a listing tells it; see `Sample.listed`.
            origins: what the files lie in, if they lie in others.
        """
        self.keys = keys
        self.usual = usual
        self.odd = odd
        self.listed = listed
        self.origins = origins

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """Return these samples, none of them taken for usual."""
        odd = {sample.key: sample for sample in samples}
        origins = next((sample.origins for sample in odd.values()), ())
        return cls(list(odd), (), odd, origins=origins)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> Sample | Samples:
        """Return one sample, or some of them with nothing that belongs to others."""
        if isinstance(place, int):
            return self._sample(self.keys[place])
        keys = self.keys[place]
        odd, listed = self.odd, self.listed
        if odd:
            odd = {key: odd[key] for key in keys if key in odd}
        if listed:
            listed = {key: listed[key] for key in keys if key in listed}
        return Samples(keys, self.usual, odd, listed, self.origins)

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, self.keys)

    def __eq__(self, other: object) -> bool:
        return list(self) == (list(other) if isinstance(other, Samples) else other)

    def _sample(self, key: str) -> Sample:
        odd = self.odd.get(key)
        if odd:
            return odd._replace(origins=self.origins) if self.origins else odd
        return Sample(key, key, self.usual, self.listed.get(key, ""), self.origins)

    def without_versions(self) -> Samples:
        """Return the same samples, whatever the versions of their files."""
        odd = {key: sample._replace(listed="") for key, sample in self.odd.items()}
        return Samples(self.keys, self.usual, odd)

    def plain(self) -> bool:
        """Tell whether all are usual, with nothing more than keys."""
        return not self.odd and not self.listed

    def files(self) -> list[str]:
        """Return the paths of all files below the source, sample by sample."""
        if self.odd:
            return [path for sample in self for path in sample.files()]
        return [f"{key}.{extension}" for key in self.keys for extension in self.usual]

    def members(self) -> list[str]:
        """Return the names of all members in a shard, each of the file in its place."""
        if self.odd:
            return [name for sample in self for name in sample.members()]
        fields = [extension.lower() for extension in self.usual]
        return [f"{key}.{field}" for key in self.keys for field in fields]


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


class Function(NamedTuple):
    """A function of the user's in a file, for `transform.py`."""

    name: str
    path: str  # of the file, which need not be there any more
    text: str  # of the file

    @property
    def digest(self) -> str:
        """What tells it from a function of another text."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()


Call = Callable[[dict[str, Any]], "Mapping[str, Any] | None"]
Transform = Function | Call  # a caller in Python may have the function itself


class Given(NamedTuple):
    """Flags that say what a sample is, as they were given."""

    fields: str = "jpg,txt"
    optional_fields: str = ""
    replace_dots: str | None = None
    skip_bad: bool = False
    shuffle: int | None = None  # the seed

    @classmethod
    def of(
        cls, fields: str | Iterable[str], optional_fields: str | Iterable[str], *others: Any
    ) -> Given:
        """Return flags whose fields may be given one by one."""
        return cls(_joined(fields), _joined(optional_fields), *others)

    def parsed(self) -> tuple[Any, ...]:
        """Return what they mean, which other spellings mean, too."""
        return parse_fields(self.fields, self.optional_fields), *self[2:]


class Listing(NamedTuple):
    """What a source holds."""

    started: float  # seconds since the epoch
    source: str
    fields: Fields
    samples: Samples  # in the order in which they are dealt to the shards
    ignored: dict[str, int]  # names that are no part of a sample: extension -> how many
    skipped: dict[str, int]  # what `skip_bad` dropped: reason -> how many
    shuffle: int | None = None  # the seed, if any
    transform: Transform | None = None  # on each sample
    given: Given = Given()


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and field of a member: 'cats/7.seg.png' -> ('cats/7', 'seg.png').

    The rule is webdataset's (`base_plus_ext` in `webdataset/tariterators.py`): the key ends at the
    first dot of the last component. (None, None) for a name that has no key or no field.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, field = file.partition(".")
    if stem and dot and "\n" not in name:  # as nearly all; in a third of the time
        return folder + slash + stem, field
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (None, None)


def is_field(name: str) -> bool:
    """Tell whether what follows a key and a dot can have this name."""
    return bool(_FIELD.fullmatch(name))


class Dealt(Protocol[T]):
    """Anything in order that can be dealt."""

    def __getitem__(self, place: slice, /) -> T: ...


def deal(samples: Dealt[T], shard_id: int, total_shards: int) -> T:
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


def _joined(fields: str | Iterable[str]) -> str:
    return fields if isinstance(fields, str) else ",".join(fields)


def _parse(name: str, fields: str | Iterable[str]) -> tuple[tuple[str, ...], ...]:
    named = _joined(fields)
    if not named and name == "optional_fields":
        return ()
    entries = [tuple(sorted(entry.split(";"))) for entry in named.lower().split(",")]
    for field in (field for entry in entries for field in entry):
        if not is_field(field) or NOT_UTF8.search(field):
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
