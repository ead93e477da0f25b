"""The record of a finished dataset: what it was made of, and what its shards must be.

One hidden file beside the shards, which no reader globs: JSON, with a line for each shard. It holds
no time and no host, so the same run leaves the same record. What comes in is a plan or the bytes of
a record; what goes out are the bytes, or in words what differs. Where the bytes lie, the wings
know. Nothing in a record is ever run, or opened as a path.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sharding.errors import InputError, PackError
from sharding.messages import argument, count, warn
from sharding.plan import Made, Plan, differences, signed
from sharding.samples import Fields, Function, Given, Transform, deal, parse_fields
from sharding.shards import MAX_SHARDS, Found, shard_name, shard_number

RECORD = ".webdataset-record"  # its name, in a folder or at a prefix
MISSING = "is missing"
DISAGREES = "not as the dataset's record says"
_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{32}")
_SHA256 = re.compile("[0-9a-f]{64}")


class Packed(NamedTuple):
    """What a shard must be."""

    samples: int
    bytes: int
    stamp: str  # of the files that it was packed from
    dropped: int = 0  # samples, by the function
    sha256: str = ""  # if a proof was asked to write it


class MadeBy(NamedTuple):
    """A function of the user's that made the samples."""

    name: str
    hash: str  # of its file's text


class Record(NamedTuple):
    """What is known of a finished dataset."""

    source: str
    given: Given
    transform: MadeBy | None
    digest: str  # of the listing, see Plan
    packed: Mapping[str, int]  # field -> how many samples have it
    shards: Sequence[Packed]  # in order

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(shard.samples for shard in self.shards)

    @property
    def made(self) -> Made:
        """What the shards were made of."""
        listed = self.samples + sum(shard.dropped for shard in self.shards)
        fields = str(parse_fields(self.given.fields, self.given.optional_fields))
        made_by = signed(*self.transform) if self.transform else "none"
        shuffle = self.given.shuffle
        return Made(self.source, fields, len(self.shards), shuffle, made_by, listed, self.digest)

    def says(self, shard_id: int, packed: Packed) -> bool:
        """Tell whether a shard is what it must be."""
        return self.shards[shard_id]._replace(sha256="") == packed._replace(sha256="")


class Staged(NamedTuple):
    """What a finished shard of a run carries for the record."""

    size: int
    stamp: str
    dropped: int = 0
    fields: Mapping[str, int] = {}  # that came out of a function -> how many samples have them
    sha256: str = ""


def of_run(plan: Plan, shards: Iterable[Staged]) -> Record | None:
    """Return the record of a run, from its plan and its shards in order.

    None: the plan is of an older version, and does not tell.
    """
    if plan.packed is None:
        return None
    packed, made = [], Counter[str]()
    for number, (size, stamp, dropped, fields, sha256) in enumerate(shards):
        dealt = len(deal(range(plan.total_samples), number, plan.total_shards))
        packed.append(Packed(dealt - dropped, size, stamp, dropped, sha256))
        made.update(fields)
    function = plan.transform
    made_by = MadeBy(function.name, function.digest) if function else None
    having = made if function else plan.packed
    return Record(plan.source, plan.given, made_by, plan.digest, having, packed)


# ---------------------------------------------------------------- as text


def dump(record: Record | None) -> bytes | None:
    """Return a record as the bytes of its file."""
    if not record:
        return None
    head = {
        "version": _VERSION,
        "source": record.source,
        **record.given._asdict(),
        "transform": record.transform and record.transform._asdict(),
        "digest": record.digest,
        "packed": dict(sorted(record.packed.items())),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    shards = [
        f"{json.dumps(shard_name(number))}: {json.dumps(_without_nothing(shard))}"
        for number, shard in enumerate(record.shards)
    ]
    text = ",\n".join([*lines, '"shards": {\n' + ",\n".join(shards)])
    return f"{{{text}}}}}\n".encode()


def dump_fields(fields: Mapping[str, int]) -> bytes:
    """Return the fields of a staged shard as bytes, none as none."""
    return json.dumps(dict(sorted(fields.items()))).encode() if fields else b""


def load_fields(data: bytes) -> dict[str, int]:
    """Return what `dump_fields` was given.

    Raises:
        ValueError: it is damaged.
    """
    fields = json.loads(data)
    _insist(isinstance(fields, dict) and fields and all(map(_is_count, fields.values())))
    return dict(fields)


def _without_nothing(shard: Packed) -> dict[str, Any]:
    return {name: value for name, value in shard._asdict().items() if value}


def load(data: bytes, path: str) -> Record:
    """Return the record that these bytes hold.

    Args:
        path: of the dataset, for errors.

    Raises:
        PackError: it is damaged, or of a newer version.
    """
    where = f"{path.rstrip('/')}/{RECORD}"
    cure = "delete it: the shards are read, and checked against their source, without it"
    try:
        value = json.loads(data)
        version = value["version"]
        if type(version) is int and version > _VERSION:
            newer = f"written by a newer version of these scripts (format {version})"
            raise PackError(f"{where!r} was {newer}; use that one, or {cure}")
        return _parse(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PackError(f"{where!r} is damaged; {cure}") from None


def _parse(value: Any) -> Record:
    """Return a record from what is in its JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is damaged.
    """
    given = Given(*(value.pop(name) for name in Given._fields))
    transform = value.pop("transform")
    shards = value.pop("shards")
    _insist(value.pop("version") == _VERSION and value.keys() == {"source", "digest", "packed"})
    _insist(isinstance(value["source"], str) and _DIGEST.fullmatch(value["digest"]))
    dots = given.replace_dots
    _insist(dots is None or (isinstance(dots, str) and len(dots) == 1))
    _insist(type(given.skip_bad) is bool)
    _insist(given.shuffle is None or type(given.shuffle) is int)
    given.parsed()
    if transform is not None:
        transform = MadeBy(**transform)
        _insist(transform.name.isidentifier() and _DIGEST.fullmatch(transform.hash))
    for field, number in value["packed"].items():
        parse_fields(field)
        _insist(_is_count(number))
    packed = [Packed(**shard) for shard in shards.values()]
    _insist(0 < len(packed) <= MAX_SHARDS)
    _insist(list(shards) == [shard_name(number) for number in range(len(packed))])
    for shard in packed:
        _insist(_is_count(shard.samples) and _is_count(shard.bytes))
        _insist(shard.dropped == 0 or _is_count(shard.dropped))
        _insist(_DIGEST.fullmatch(shard.stamp))
        _insist(shard.sha256 == "" or _SHA256.fullmatch(shard.sha256))
    return Record(value["source"], given, transform, value["digest"], value["packed"], packed)


def _insist(true: object) -> None:
    if not true:
        raise ValueError


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


# ---------------------------------------------------------------- compared


def of_found(found: Found, path: str) -> Record | None:
    """Return the record of the shards that were found, if they have one.

    Raises:
        PackError: it is damaged, or of a newer version.
    """
    return None if found.record is None else load(found.record, path)


def disagreements(record: Record, found: Found) -> list[tuple[str, str]]:
    """Return what is wrong with the shards that were found: the name of each, and what."""
    sizes = {shard_number(path): size for path, size in zip(found.shards, found.sizes, strict=True)}
    wrong = []
    for number, shard in enumerate(record.shards):
        size = sizes.pop(number, None)
        if size is None:
            wrong.append((shard_name(number), MISSING))
        elif size != shard.bytes:
            wrong.append((shard_name(number), f"has {size:,} bytes, not {shard.bytes:,}"))
    return wrong + [(shard_name(number), "is one more") for number in sorted(sizes)]


def check_found(record: Record, found: Found, path: str) -> None:
    """Refuse shards that are not those of the record beside them.

    Raises:
        PackError: it names the first of them.
    """
    if wrong := disagreements(record, found):
        name, what = wrong[0]
        more = f" (and {count(len(wrong) - 1, 'other shard')})" if wrong[1:] else ""
        raise PackError(
            f"{path!r} is {DISAGREES}: {name} {what}{more}; get the whole dataset again, or "
            f"delete {RECORD!r} to read what is there"
        )


def changes(record: Record, plan: Plan) -> list[str]:
    """Return what a record has, in words, that a run by this plan would not leave.

    A file that has changed makes no difference: the stamp of its shard tells that.
    """
    found = differences(record.made, plan.made)
    before, now = record.given, plan.given
    for name, was, wanted in zip(Given._fields[2:4], before[2:4], now[2:4], strict=True):
        if was != wanted:
            found.append(f"another {argument(name)} ({was!r}, not {wanted!r})")
    return found


def fields_to_read(record: Record) -> tuple[str, str]:
    """Return the fields that every sample has, and those that some have, for `open_webdataset`.

    They are spelled as the flags were, if the samples have what these say.

    Raises:
        InputError: a function made samples that have no field in common.
    """
    given, packed = record.given, record.packed
    fields: Fields = parse_fields(given.fields, given.optional_fields)
    fit = fields.known().issuperset(packed) and all(
        sum(packed.get(field, 0) for field in entry) == record.samples for entry in fields.required
    )
    if fit:
        return given.fields, given.optional_fields
    if sum(packed.values()) == record.samples:  # one in each
        return ";".join(packed), ""
    every = [field for field, number in packed.items() if number == record.samples]
    if not every:
        raise InputError(
            f"no field is in all samples ({', '.join(packed)}): name the shards by a pattern, such "
            f"as 'out/*.tar', and give {argument('fields')} and {argument('optional_fields')}"
        )
    return ",".join(every), ",".join(field for field in packed if field not in every)


# ---------------------------------------------------------------- checks


def settle_flags(found: Found, flags: dict[str, Any]) -> Record | None:
    """Fill in what a command line for a check left out, and return the record of the dataset.

    Args:
        flags: name -> value, or None if it was not given.

    Raises:
        InputError: a flag says something else than the record; the function, or checksums lack.
        PackError: the record is damaged, or of a newer version.
    """
    record = of_found(found, flags["path"])
    proof, transform = flags["source"] is not None, flags["transform"]
    given = record.given if record else Given()
    for name, was in given._asdict().items():
        if flags[name] is None:
            flags[name] = was
        elif record and given._replace(**{name: flags[name]}).parsed() != given.parsed():
            raise _differs(name, flags[name], was)
    if record and transform and not record.transform:
        raise _differs("transform", transform, None)
    if record and record.transform and proof and not transform:
        name = record.transform.name
        raise InputError(
            f"the dataset was made by {name!r}, as its record says, and no code is run from a "
            f"record: give {argument('transform')} FILE.py:{name}"
        )
    if record and record.transform and not proof:  # samples have the fields that came out of it
        flags["fields"], flags["optional_fields"] = fields_to_read(record)
    if flags["checksums"]:
        _check_checksums(found, flags, record)
    return record


def _differs(name: str, value: object, was: object) -> InputError:
    packed = "without it" if was is None else f"with {was!r}"
    return InputError(
        f"{argument(name)} {value!r}: the dataset was packed {packed}, as its record says; "
        "leave the flag out"
    )


def compare_function(record: Record, function: Transform | None) -> None:
    """Say so if a proof calls a function of another text than the one that made the samples."""
    if isinstance(function, Function) and record.transform:
        now, was = signed(function.name, function.digest), signed(*record.transform)
        if record.transform != (function.name, function.digest):
            warn(f"{argument('transform')} is {now}; its record says that {was} made the dataset")


def _check_checksums(found: Found, flags: dict[str, Any], record: Record | None) -> None:
    """Refuse to write or compare checksums where that cannot be done."""
    if not found.whole:
        whole = f"are of whole datasets: give their folder as {argument('path')}"
        raise InputError(f"{argument('checksums')} {whole}")
    if flags["source"] is not None:
        return
    if flags["decode"]:
        alone = "without a source, looks at no sample: leave out"
        raise InputError(f"{argument('checksums')}, {alone} {argument('decode')}")
    if not record or not all(shard.sha256 for shard in record.shards):
        raise InputError(
            f"{flags['path']!r} has no checksums: where its source is, run this with "
            f"{argument('source')} DIR {argument('checksums')}; then copy the dataset with its "
            "hidden record"
        )
