"""The plan of a run as data: what every worker needs to know, and the samples of each shard.

A file of text: a line of JSON, a line for the place of each shard's samples, and then a line for
each sample, grouped by shard. So a worker reads its own samples and nothing more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from sharding.errors import InputError, PackError
from sharding.messages import argument, count
from sharding.samples import Function, Given, Origin, Sample, Samples, deal
from sharding.stages import stage

PLAN = "plan"  # the name of the file, in the folder of a run
_OFFSET = "%015d\n"  # where in the file the samples of a shard begin
_NO_DIGEST = "0" * 32


class Made(NamedTuple):
    """What shards are made of, whatever the files hold."""

    source: str
    fields: str  # this and the next four: see Plan
    total_shards: int
    shuffle: int | None
    transform: str
    total_samples: int
    digest: str


class Plan(NamedTuple):
    """The first line of a plan."""

    source: str
    fields: str  # as the flags spell them
    total_shards: int
    total_samples: int
    skipped: dict[str, int]  # this and the next: see Listing
    ignored: dict[str, int]
    started: float  # seconds since the epoch
    host: str
    driver: int | None  # the process without which no worker goes on; None for an array job
    usual: tuple[str, ...] = ()  # extensions of the samples whose line is their key alone
    run: str = ""  # in a bucket, the id of the run
    digest: str = _NO_DIGEST  # of the samples, as they are dealt, whatever their files hold
    shuffle: int | None = None  # the seed
    versions: bool = False  # a line is key, tab, versions of the files; such keys hold no tab
    transform: Function | None = None  # on each sample
    origins: tuple[Origin, ...] = ()  # of the samples
    given: Given = Given()  # the flags behind the fields
    packed: Mapping[str, int] | None = None  # field -> how many samples have it, as they are listed

    @property
    def made(self) -> Made:
        """What its shards are made of."""
        made_by = signed(self.transform.name, self.transform.digest) if self.transform else "none"
        return Made(
            self.source, self.fields, self.total_shards, self.shuffle, made_by,
            self.total_samples, self.digest,
        )  # fmt: skip

    @property
    def begun(self) -> str:
        """When the run began, for a message."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started))

    @property
    def again(self) -> str:
        """How to go on after it was stopped; a bucket has no lock that tells who is dead."""
        return "run the same command again" + (" with --resume" if self.run else "")


class Published(NamedTuple):
    """What publishing a run did."""

    plan: Plan
    sizes: list[int]  # of its shards, in bytes
    replaced: int = 0  # shards that were there before
    dropped: int = 0  # samples, by the transform


def dump_plan(stream: BinaryIO, plan: Plan, samples: Samples) -> Plan:
    """Write a plan to a stream that can seek, and return it with the digest of its samples."""
    total = plan.total_shards
    plan = _describe(plan, samples)
    seen = _new_digest(plan)
    stream.write(_header(plan))
    first, offsets = stream.tell(), []
    stream.write((_OFFSET * (total + 1) % ((0,) * (total + 1))).encode())
    with stage("planning", "samples", len(samples)) as planning:
        for shard_id in range(total):
            offsets.append(stream.tell())
            dealt = deal(samples, shard_id, total)
            lines = _to_text(dealt, plan.usual).encode()
            stream.write(lines)
            seen.update(_without_versions(dealt, plan.usual) or lines)
            planning.add(len(dealt))
    offsets.append(stream.tell())
    stream.seek(first)
    stream.write((_OFFSET * (total + 1) % tuple(offsets)).encode())
    plan = plan._replace(digest=seen.hexdigest())
    stream.seek(0)
    stream.write(_header(plan))
    return plan


def digest_plan(plan: Plan, samples: Samples) -> Plan:
    """Return what `dump_plan` does, and write nothing."""
    plan = _describe(plan, samples)
    seen = _new_digest(plan)
    for shard_id in range(plan.total_shards):
        dealt = deal(samples, shard_id, plan.total_shards)
        seen.update(_without_versions(dealt, plan.usual) or _to_text(dealt, plan.usual).encode())
    return plan._replace(digest=seen.hexdigest())


def _describe(plan: Plan, samples: Samples) -> Plan:
    """Return a plan with what all of its samples have, or how many of them."""
    having = Counter({field.lower(): len(samples) - len(samples.odd) for field in samples.usual})
    for sample in samples.odd.values():
        having.update(extension.lower() for extension in sample.extensions)
    packed = {field: number for field, number in sorted(having.items()) if number}
    first = samples[0]
    plan = plan._replace(usual=first.extensions, versions=bool(first.listed), packed=packed)
    return plan._replace(origins=samples.origins)


def _new_digest(plan: Plan) -> hashlib.blake2b:
    return hashlib.blake2b(repr(plan.usual).encode(), digest_size=len(_NO_DIGEST) // 2)


def load_plan(stream: BinaryIO, name: str, remove: str) -> Plan:
    """Return the plan that a stream begins with.

    Args:
        name: path or URL of the plan, for errors.
        remove: what to remove to give up a run whose plan is damaged, for errors.

    Raises:
        PackError: it is damaged.
    """
    with _reading(name, remove):
        return _from_header(stream.readline())


def load_samples(stream: BinaryIO, shard_id: int, name: str, remove: str) -> Samples:
    """Return the samples of a shard of the plan in a stream, which can seek; see `load_plan`.

    Raises:
        PackError: it is damaged.
    """
    with _reading(name, remove):
        plan = _from_header(stream.readline())
        size = len(_OFFSET % 0)
        stream.seek(shard_id * size, os.SEEK_CUR)
        begin, end = int(stream.read(size)), int(stream.read(size))
        stream.seek(begin)
        return _from_text(stream.read(end - begin).decode(), plan)


def no_run(folder: str) -> PackError:
    """Return the error that a folder is not named as a run is."""
    return PackError(f"{folder!r} is not a run: give what `python sharding start` printed")


def not_packed(plan: Plan, missing: Sequence[int]) -> PackError:
    """Return the error that says which shards a run still lacks."""
    first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    cure = f"{plan.again} to pack just these"
    if plan.driver is None:
        cure = "pack them with create_webdataset.py --run DIR --shard-id I, then publish"
    elif plan.transform:
        cure += f"; if {plan.transform.name} is at fault, mend it and add {argument('replace')}"
    shards = count(len(missing), "shard")
    return PackError(f"not packed: {shards} ({first}); nothing was published; {cure}")


def differences(before: Made, now: Made) -> list[str]:
    """Return what earlier shards were made of, in words, if others would be made now.

    A file that has changed makes no difference: the stamp of its shard tells that.
    """
    if before._replace(shuffle=now.shuffle) == now:
        return []

    def shown(made: Made) -> dict[str, str]:
        return {
            "another source": repr(made.source),
            "other fields": repr(made.fields),
            "another number of shards": f"{made.total_shards:,}",
            "another shuffle seed": "none" if made.shuffle is None else str(made.shuffle),
            "another transform": made.transform,
            "other samples": f"{made.total_samples:,}",
        }

    was, is_now = shown(before), shown(now)
    found = [
        f"{what} ({was[what]}, not {is_now[what]})" for what in was if was[what] != is_now[what]
    ]
    return found or ["other samples (as many, under other names)"]


def signed(name: str, digest: str) -> str:
    """Return how messages tell a function from one of another text."""
    return f"{name} {digest[:12]}"


def does_not_fit(output: str, finished: int, differs: Sequence[str]) -> InputError:
    """Return the error that an interrupted run would lose its shards, perhaps to a mistyped flag.

    Args:
        finished: how many they are.
        differs: see `differences`.
    """
    return InputError(
        f"{output!r}: the interrupted run, with {count(finished, 'finished shard')}, has "
        f"{', '.join(differs)}; give the same as then, or {argument('replace')} to pack afresh"
    )


def not_ended(output: str, before: Plan) -> PackError:
    """Return the error that a run is there of which nobody can tell whether it is dead."""
    return PackError(
        f"{output!r}: a run of {before.host} that began at {before.begun} has not ended; "
        "if it is dead, run the same command with --resume"
    )


def is_array_job(where: str, before: Plan, differs: Sequence[str], give_up: str) -> PackError:
    """Return the error that an array job is there, which may still be at work.

    Args:
        give_up: what to do to give it up.
    """
    other = f", with {', '.join(differs)}" if differs else ""
    return PackError(
        f"{where!r} holds an array job that {before.host} started at {before.begun}{other}; "
        f"publish it, go on with --resume and the same flags, or {give_up}"
    )


@contextlib.contextmanager
def _reading(name: str, remove: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError):
        message = f"{name!r} cannot be read; to give up that run, remove {remove}"
        raise PackError(message) from None


def _header(plan: Plan) -> bytes:
    return (json.dumps(plan._asdict()) + "\n").encode()


def _from_header(line: bytes) -> Plan:
    plan = Plan(**json.loads(line))
    function = Function(*plan.transform) if plan.transform else None
    origins = tuple(Origin(*origin) for origin in plan.origins)
    given, usual = Given(*plan.given), tuple(plan.usual)
    return plan._replace(usual=usual, transform=function, given=given, origins=origins)


def _to_text(samples: Samples, usual: tuple[str, ...]) -> str:
    """Return a line for each sample: of a usual one, its key."""
    if samples.plain() and samples.usual == usual:
        text = "\n".join([*samples.keys, ""])
        if text[:1] != "[" and "\n[" not in text:
            return text
    return "".join(_to_line(sample, usual) for sample in samples)


def _without_versions(samples: Samples, usual: tuple[str, ...]) -> bytes:
    """Return the lines of samples some of which have versions; nothing if none has.

    An object of another version is the same sample.
    """
    if not (samples.listed or samples.odd):
        return b""
    return _to_text(samples.without_versions(), usual).encode()


def _to_line(sample: Sample, usual: tuple[str, ...]) -> str:
    key, stem, extensions, listed, _ = sample
    if extensions == usual and key == stem and key[0] != "[":
        return f"{key}\t{listed}\n" if listed else f"{key}\n"
    return json.dumps([key, stem, extensions, listed], ensure_ascii=False) + "\n"


def _from_text(text: str, plan: Plan) -> Samples:
    lines = text.split("\n")[:-1]
    odd: dict[str, Sample] = {}
    listed: dict[str, str] = {}
    if text[:1] == "[" or "\n[" in text:
        for number, line in enumerate(lines):
            if line[0] == "[":
                key, stem, extensions, versions = json.loads(line)
                odd[key] = Sample(key, stem, tuple(extensions), versions)
                lines[number] = key
    if plan.versions:
        for number, line in enumerate(lines):
            if line not in odd:
                key, _, versions = line.rpartition("\t")
                lines[number], listed[key] = key, versions
    return Samples(lines, plan.usual, odd, listed, plan.origins)
