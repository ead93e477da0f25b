"""What a refused source seems to mean: other fields, if these make complete samples of most names.

Knows the extensions of stems alone, and no folder. Whoever follows a hint must pack what he means,
so each is tried on these names first, as the listing would judge them.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product

from sharding import faults
from sharding.faults import quote
from sharding.messages import argument
from sharding.samples import Fields, Sample, judge

PICTURES = frozenset(("bmp", "gif", "heic", "heif", "jpeg", "jpg", "png", "tif", "tiff", "webp"))
LINK_PAIRS = "python examples/link_pairs.py PICTURES CAPTIONS LINKS puts links side by side"
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
TEXTS = ("txt", "text", "caption", "captions", "cap", "prompt", "json", "cls")  # likely ones first
MAX_STEMS = 50_000  # that are kept; of more, a part stands for all
MAX_EXTENSIONS = 16  # of a stem: there are folders of millions of `name.<number>`
FIELD = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # that needs no quotes
CHOICES, PROPOSALS, STEM_KINDS = 5, 500, 100  # that are tried, the most frequent first

Kind = tuple[str, ...]  # the extensions of a stem, sorted, in lower case
Required = tuple[tuple[str, ...], ...]  # see Fields


class Loose:
    """Stems with files that are in no sample, or a part of them, chosen by the file's own name.

    So all files of a name are kept or none, whichever folder they are in.
    """

    def __init__(self) -> None:
        self.stems: dict[str, Kind] = {}
        self.part = 1  # one of so many is kept

    def add(self, stem: str, extensions: Kind) -> None:
        """Note files of a stem."""
        if self.part > 1 and not self._is_kept(stem):
            return
        stems = self.stems
        before = stems.get(stem)
        if before is None:
            stems[stem] = extensions
            if len(stems) > MAX_STEMS:
                self.part *= 2
                self.stems = {one: kind for one, kind in stems.items() if self._is_kept(one)}
        elif len(before) < MAX_EXTENSIONS:
            stems[stem] = before + extensions

    def _is_kept(self, stem: str) -> bool:
        name = stem.rpartition("/")[2].encode("utf-8", "surrogateescape")
        return zlib.crc32(name) % self.part == 0

    def kinds(self, samples: Iterable[Sample]) -> Counter[Kind]:
        """Return how many stems have which extensions, those of complete samples included."""
        found: Counter[Kind] = Counter()
        more: dict[str, Kind] = {}
        for sample in samples:
            if sample.stem in self.stems:
                more[sample.stem] = sample.extensions
            else:
                found[sample.extensions] += 1
        for stem, extensions in self.stems.items():
            found[(*extensions, *more.get(stem, ()))] += self.part
        kinds: Counter[Kind] = Counter()
        for extensions, number in found.items():
            kinds[tuple(sorted(map(str.lower, extensions)))] += number
        return kinds

    def meeting(self) -> Iterator[dict[str, list[str]]]:
        """Yield the stems by what they are called without their first, or their last, folder."""
        for first in (True, False):
            groups: dict[str, list[str]] = {}
            for stem in self.stems:
                if "/" in stem:
                    folder, _, name = stem.rpartition("/")
                    rest = folder.partition("/")[2] if first else folder.rpartition("/")[0]
                    short = f"{rest}/{name}"
                    groups.setdefault(short, []).append(stem)
            yield groups


def hint(fields: Fields, loose: Loose, samples: Sequence[Sample]) -> str:
    """Return what may be behind samples that lack a field, or nothing."""
    return _other_fields(fields, loose.kinds(samples), loose) or _apart(fields, loose)


def table(ignored: Mapping[str, int]) -> str:
    """Return the hint that what is missing stands in a table, if there is one, or nothing.

    Args:
        ignored: how many files are no part of a sample, by extension: ".csv".
    """
    for extension in filter(ignored.get, TABLES):
        return f"; captions in the {extension}? {LINK_PAIRS}"
    return ""


def is_optional(extension: str, fields: Fields, loose: Loose, samples: Sequence[Sample]) -> bool:
    """Tell whether most stems that have this extension are complete without it."""
    having = [(kind, n) for kind, n in loose.kinds(samples).items() if extension in kind]
    whole = sum(n for kind, n in having if not _fault(kind, fields.required, fields))
    return 2 * whole > sum(n for _, n in having)


def _other_fields(fields: Fields, kinds: Counter[Kind], loose: Loose) -> str:
    """Return the hint that other fields are meant, or nothing."""
    best = _best(fields, kinds)
    if not best:
        return ""
    there = _extensions(kinds)
    about = "about " if loose.part > 1 else ""
    new = sorted(
        {one for entry in best for one in entry} - fields.known(),
        key=lambda one: (one not in PICTURES, -there[one], one),
    )
    said = ""
    if new:
        numbers = ", ".join(f"{about}{there[one]:,}" for one in new)
        said = f" {' and '.join(f'.{one}' for one in new)} files are there ({numbers}):"
    elif absent := [entry for entry in fields.required if not any(map(there.get, entry))]:
        said = f" no .{' or .'.join(absent[0])} is there:"
    complete, concerned = _count(best, fields, kinds)
    share = f" ({about}{complete:,} of {concerned:,} complete)" if complete < concerned else ""
    return f';{said} {argument("fields")} "{",".join(map(";".join, best))}"?{share}'


def _apart(fields: Fields, loose: Loose) -> str:
    """Return the hint that the files of most samples lie in several folders, or nothing."""
    for groups in loose.meeting():
        joined = {
            short: tuple(sorted(one.lower() for stem in stems for one in loose.stems[stem]))
            for short, stems in groups.items()
            if len(stems) > 1
        }
        kinds = Counter(joined.values())
        required = fields.required
        complete, concerned = _count(required, fields, kinds)
        if 2 * complete <= concerned or not complete:
            required = _best(fields, kinds) or required
        whole = [short for short, kind in joined.items() if not _fault(kind, required, fields)]
        known = {one for entry in (*fields.required, *required) for one in entry}
        kinds_apart = loose.stems.values()
        concerned = sum(not known.isdisjoint(map(str.lower, kind)) for kind in kinds_apart)
        if 2 * sum(len(groups[short]) for short in whole) > concerned:
            pair = sorted(f"{stem}.{loose.stems[stem][0]}" for stem in groups[min(whole)])
            names = " and ".join(map(quote, pair[:2]))
            also = "" if required is fields.required else _other_fields(fields, kinds, loose)
            return f"; {names} are in different folders: {LINK_PAIRS}{also}"
    return ""


def _best(fields: Fields, kinds: Counter[Kind]) -> Required | None:
    """Return the fields that make most samples complete, if better than these, and of most names.

    If names are refused now, most of them must be complete then.
    """
    kinds = Counter(dict(kinds.most_common(STEM_KINDS)))
    there = _extensions(kinds)
    asked = {one for entry in fields.required for one in entry}
    refused = [
        kind
        for kind in kinds
        if not asked.isdisjoint(kind) and _fault(kind, fields.required, fields)
    ]
    unknown = {one for kind in refused or kinds for one in kind if FIELD.fullmatch(one)}
    likely = {text: place for place, text in enumerate(TEXTS)}
    ranked = sorted(
        unknown - fields.known(), key=lambda one: (-there[one], likely.get(one, len(TEXTS)), one)
    )
    best, highest = None, (0, 0, 0)
    now, _ = _count(fields.required, fields, kinds)
    for required in islice(_proposals(fields, ranked, there), PROPOSALS):
        complete, concerned = _count(required, fields, kinds)
        mended = sum(kinds[kind] for kind in refused if not _fault(kind, required, fields))
        score = 2 * complete - concerned, len(required), -sum(map(len, required))
        if (
            complete > now
            and score > highest
            and 2 * mended >= sum(kinds[kind] for kind in refused)
        ):
            best, highest = required, score
    return best


def _proposals(
    fields: Fields, others: Sequence[str], there: Mapping[str, int]
) -> Iterator[Required]:
    """Yield fields that may be meant: others instead, or as alternatives, or some left out."""
    texts = [one for one in there if one not in PICTURES and one not in fields.known()]
    for entries in _merged(fields.required):
        for chosen in product(*(_choices(entry, others, there) for entry in entries)):
            required = tuple(entry for entry in chosen if entry)
            names = [one for entry in required for one in entry]
            if len(names) > len(set(names)):
                continue
            # Pictures alone, where nothing is there that may hold what is to go with them.
            if len(required) == len(chosen) or (not texts and not PICTURES.isdisjoint(names)):
                yield required


def _merged(required: Required) -> Iterator[Required]:
    """Yield entries as they are, then with those of pictures, of others, or of both made one."""
    pictures = tuple(entry for entry in required if not PICTURES.isdisjoint(entry))
    rest = tuple(entry for entry in required if entry not in pictures)
    one_picture, one_rest = ((sum(some, ()),) if some else () for some in (pictures, rest))
    yield from dict.fromkeys(
        (required, one_picture + rest, pictures + one_rest, one_picture + one_rest)
    )


def _choices(
    entry: tuple[str, ...], others: Sequence[str], there: Mapping[str, int]
) -> Iterator[tuple[str, ...]]:
    """Yield what may be meant by an entry; () if by chance nothing."""
    yield entry
    present = any(there[one] for one in entry)
    pictures = [one for one in others if one in PICTURES][:CHOICES]
    rest = [one for one in others if one.rpartition(".")[2] not in PICTURES][:CHOICES]
    for_pictures = not PICTURES.isdisjoint(entry)
    if for_pictures and len(pictures) > 1:
        yield (*entry, *pictures) if present else tuple(pictures)
    for one in pictures if for_pictures else rest:
        yield (*entry, one) if present else (one,)
    if not present:
        if for_pictures:  # sounds, say
            yield from ((one,) for one in rest)
        yield ()


def _extensions(kinds: Counter[Kind]) -> Counter[str]:
    """Return how many stems have each extension."""
    found: Counter[str] = Counter()
    for kind, number in kinds.items():
        for extension in kind:
            found[extension] += number
    return found


def _count(required: Required, fields: Fields, kinds: Counter[Kind]) -> tuple[int, int]:
    """Return how many stems would be complete, of how many that have a field, old or new."""
    asked = {one for entry in (*fields.required, *required) for one in entry}
    complete = sum(n for kind, n in kinds.items() if not _fault(kind, required, fields))
    return complete, sum(n for kind, n in kinds.items() if not asked.isdisjoint(kind))


def _fault(kind: Kind, required: Required, fields: Fields) -> faults.Kind | None:
    """Return what would be wrong with a stem that has these extensions."""
    return judge(kind, Fields(required, fields.optional))[0]
