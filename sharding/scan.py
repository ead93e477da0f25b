"""From the names of files to samples: what each name is part of, what is refused or left out.

Sources hand over names, folder by folder; they know nothing of samples, and this room nothing of
where names come from.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from sharding import faults, hints
from sharding.errors import InputError
from sharding.faults import Kind, Odd, Report, Tally, quote
from sharding.messages import argument
from sharding.samples import Fields, Origin, Sample, Samples, judge, name_fault, origin_of
from sharding.stages import Stage
from sharding.urls import canonical

MAX_GROWN = 100_000  # entries of a table that only counts what is left out
MayRead = Callable[[list[str]], bool]  # tells whether the files at these paths may be read


class Scan:
    """What has been found so far in a source."""

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
        self.stage = Stage("listing", "names", None)
        self.usual: tuple[str, ...] = ()  # extensions of the first complete sample
        self.keys: list[str] = []  # of all complete samples
        self.odd: dict[str, Sample] = {}  # those of them that are not usual
        self.listed: dict[str, str] = {}  # versions of the files of those that are
        self.origins: list[Origin] = []  # what the files lie in, if they lie in others
        self.tallies: dict[Kind, Tally] = defaultdict(Tally)
        self.ignored: Counter[str] = Counter()  # by extension
        self.dotted: Counter[str] = Counter()  # names with a dot before the field, from the first
        self.archives = ""  # a pattern for those that were ignored, in a folder that has some
        self.loose = hints.Loose()
        self.forms: dict[str, str] = {}  # NFC form of an incomplete key -> the key
        self.same_form: tuple[str, str] | None = None  # two of these that look the same
        self.verdicts: dict[tuple[str, ...], tuple[Kind | None, tuple[str, ...]]] = {}

    def folder(self, prefix: str) -> FolderScan:
        """Begin a folder: "" for the source itself, else "cats/"."""
        return FolderScan(self, prefix)

    def samples(self) -> Samples:
        """Return the complete samples, as they were found."""
        origins = tuple(one._replace(path=canonical(one.path)) for one in self.origins)
        return Samples(self.keys, self.usual, self.odd, self.listed, origins)

    def name(self, path: str, version: str) -> str:
        """Return what a file is called in messages."""
        if not self.origins:
            return path
        return f"{self.origins[origin_of(version)].path}: {path}"

    def judge(self, extensions: tuple[str, ...]) -> tuple[Kind | None, tuple[str, ...]]:
        """Return what `samples.judge` says of a stem's files; it is asked once for each set."""
        try:
            return self.verdicts[extensions]
        except KeyError:
            verdict = self.verdicts[extensions] = judge(extensions, self.fields)
        return verdict

    def add(self, key: str, stem: str, extensions: tuple[str, ...], versions: str) -> None:
        """Note a complete sample."""
        self.usual = self.usual or extensions
        self.keys.append(key)
        if extensions != self.usual or key != stem:
            self.odd[key] = Sample(key, stem, extensions, versions)
        elif versions:
            self.listed[key] = versions

    def ignore(self, name: str, what: str) -> None:
        """Note a name that is left alone."""
        what = what or "without extension"
        if what not in self.ignored and len(self.ignored) > MAX_GROWN:
            what = "of other extensions"
        self.ignored[what] += 1
        self.report.add(name, "ignored", what)

    def ignore_file(self, prefix: str, name: str, version: str) -> None:
        """Note a file that is no part of a sample."""
        called = self.name(prefix + name, version)
        stem, _, rest = name.partition(".")
        if self.replace_dots is None:
            self.loose.add(prefix + stem, (rest,))
        else:
            self.loose.add(prefix + os.path.splitext(name)[0], (name.rpartition(".")[2],))
        if name.lower().endswith(self.endings):
            rest = rest.lower()
            if rest in self.dotted or len(self.dotted) < MAX_GROWN:
                self.dotted[rest] += 1
            self.fault(faults.DOTTED, called)
        else:
            if not self.archives and name.endswith(".tar"):
                self.archives = f"{os.path.join(self.source, prefix)}*.tar"
            self.ignore(called, name[name.rindex(".") :] if "." in name else "")

    def fault(self, kind: Kind, name: str, detail: str = "") -> None:
        """Note a name that is refused."""
        self.tallies[kind].add(f"{quote(name)} {detail}".rstrip())
        self.report.add(name, kind.reason, detail)

    def add_odd(self, odd: Odd) -> None:
        """Note what is no file, and no field of a sample."""
        if odd.kind is faults.INCOMPLETE:
            self.ignore(odd.name, "not a regular file")
        else:
            self.fault(odd.kind, odd.name, odd.detail)

    def fault_of_stem(
        self,
        kind: Kind,
        stem: str,
        extensions: tuple[str, ...],
        which: tuple[str, ...],
        odd: Sequence[Odd],
        versions: str,
    ) -> None:
        """Note all the files of a stem, which are refused together."""
        each = versions.split(" ") if versions else [""] * len(extensions)
        pairs = zip(extensions, each, strict=True)
        names = [self.name(f"{stem}.{extension}", version) for extension, version in pairs]
        detail, shown = "", quote(self.name(stem, each[0]) if each else stem)
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
            shown = " and ".join(map(quote, wrong[:2]))
        self.tallies[kind].add(shown)
        for name in (*names, *(one.name for one in odd)):
            self.report.add(name, kind.reason, detail)

    def skipped(self) -> dict[str, int]:
        """Return how many names are bad, by reason."""
        return {kind.reason: tally.number for kind, tally in self.tallies.items()}

    def refuse(self, nothing: str) -> None:
        """Raise an InputError if the source has faults, or no complete sample.

        Args:
            nothing: what is said where there are no names; "{cure}" stands for the usual cure.
        """
        where = f"{argument('source')} {self.source!r}"
        lines = []
        for kind, tally in self.tallies.items():
            first, cure = ", ".join(tally.first()), kind.cure
            if kind is faults.INCOMPLETE:
                cure += self.hint() or faults.left_out("also there", self.ignored)
                cure += hints.table(self.ignored)
            if kind is faults.DOTTED:
                rest, number = self.dotted.most_common(1)[0]
                if number == tally.number and hints.is_optional(
                    rest, self.fields, self.loose, self.samples()
                ):
                    cure += f", or {argument('optional_fields')} {rest}"
            if self.keys:
                cure += f"; {argument('skip_bad')} drops them"
            lines.append(f"{where} has {kind.what}: {tally.number:,} ({first}); {cure}")
        if lines and not self.skip_bad:
            raise InputError("\n".join(lines))
        if not self.keys:
            pair = [f"sample-0.{entry[0]}" for entry in self.fields.required]
            cure = f"put pairs such as {' + '.join(pair)} there, or give other {argument('fields')}"
            cure += self.hint() + faults.left_out("ignored", self.ignored)
            cure += hints.table(self.ignored)
            cure += faults.left_out("skipped", self.skipped())
            if self.archives and "tar" not in self.known:
                cure = f'to pack what is in the archives: {argument("source")} "{self.archives}"'
            if not self.ignored and not self.tallies:
                cure = nothing.format(cure=cure)
            raise InputError(f"{where} has no complete sample: {cure}")

    def hint(self) -> str:
        """Return what may be behind samples that lack a field, or nothing."""
        if self.same_form:
            one, two = map(quote, self.same_form)
            return (
                f"; {one} and {two} differ only in Unicode form (NFC, NFD): use one form for both"
            )
        return hints.hint(self.fields, self.loose, self.samples())


class Stems:
    """The stems of the files of a folder with one extension.

    They are held as text, since a string for each would cost as much as the samples themselves.
    """

    def __init__(self) -> None:
        self.number = 0
        # The sum of their hashes: names of a folder are all different, so two extensions with equal
        # numbers and sums have the same stems. Python hashes with a secret key; were this ever
        # wrong, a file of a sample would be missing when it is opened.
        self.sum = 0
        self.texts: list[str] = []
        self.listed: list[str] = []  # the versions of the files, likewise, with a space between two

    def add(self, stems: list[str], versions: list[str]) -> None:
        """Take some more, and the versions of the files if there are any."""
        self.number += len(stems)
        self.sum += sum(map(hash, stems))
        self.texts.append("/".join(stems))
        if versions:
            self.listed.append(" ".join(versions))

    def text(self) -> str:
        """Return all of them in one text, with a slash between two."""
        return "/".join(self.texts)

    def each(self) -> Iterator[str]:
        """Yield all of them, one by one."""
        return chain.from_iterable(text.split("/") for text in self.texts)

    def versions(self) -> Iterator[str]:
        """Yield the versions of the files, if there are any."""
        return chain.from_iterable(text.split(" ") for text in self.listed)


class FolderScan:
    """The names of one folder: many at a time, in any order, then `close`."""

    def __init__(self, scan: Scan, prefix: str) -> None:
        self.scan = scan
        self.prefix = prefix
        self.found: dict[str, Stems] = defaultdict(Stems)  # by extension
        self.odd: dict[str, list[Odd]] = defaultdict(list)  # stem -> fields that are no files
        scan.stage.add(0, folders=1)

    def add(self, names: Sequence[str], versions: Sequence[str] = ()) -> None:
        """Take names of files, and their versions where a listing tells them."""
        self.scan.stage.add(len(names))
        split, known = self._split(), self.scan.known
        stems: dict[str, list[str]] = {field: [] for field in known}
        listed: dict[str, list[str]] = {field: [] for field in known}
        for place, name in enumerate(names):  # this loop sees each file of a dataset
            stem, _, extension = split(name, ".")
            try:
                stems[extension].append(stem)
            except KeyError:
                if extension.lower() not in known:
                    version = versions[place] if versions else ""
                    self.scan.ignore_file(self.prefix, name, version)
                    continue
                stems[extension], listed[extension] = [stem], []  # another spelling of a field
            if versions:
                listed[extension].append(versions[place])
        for extension, some in stems.items():
            if some:
                self.found[extension].add(some, listed[extension])

    def add_odd(self, name: str, odd: Odd) -> None:
        """Take the name of what is no file: if it is a field, its sample lacks it."""
        stem, _, extension = self._split()(name, ".")
        if extension.lower() in self.scan.known:
            self.odd[stem].append(odd)
        else:
            self.scan.add_odd(odd)

    def close(self, may_read: MayRead | None = None) -> None:
        """Judge the files of this folder.

        Args:
            may_read: where bad samples are skipped, is asked for each of them.
        """
        if not self._close_usual():
            self._close_each(may_read if self.scan.skip_bad else None)

    def _split(self) -> Callable[[str, str], tuple[str, str, str]]:
        return str.partition if self.scan.replace_dots is None else self._split_at_field

    def _split_at_field(self, name: str, dot: str) -> tuple[str, str, str]:
        """Split the name of a file whose stem may hold dots."""
        place = name.find(dot)
        while place > 0:
            if name[place + 1 :].lower() in self.scan.known:
                return name[:place], dot, name[place + 1 :]
            place = name.find(dot, place + 1)
        return name, "", ""

    def _close_usual(self) -> bool:
        """Note all samples at once, if all have the same extensions and plain names.

        Returns:
            Whether that is so.
        """
        scan, stems = self.scan, list(self.found.values())
        extensions = tuple(sorted(self.found, key=str.lower))
        if self.odd or scan.skip_bad or scan.replace_dots is not None or not stems:
            return False
        if len({(one.number, one.sum) for one in stems}) > 1 or scan.judge(extensions)[0]:
            return False
        text = stems[0].text()
        reserved = text.startswith("__") or "/__" in text
        if reserved or not text.isprintable() or name_fault(self.prefix, ""):
            return False
        if stems[0].listed and any(one.text() != text for one in stems):  # in another order
            return False
        scan.usual = scan.usual or extensions
        if extensions != scan.usual:
            return False
        if not stems[0].listed:  # before as much again is made of it
            self.found.clear()
            stems.clear()
        keys = text.split("/")
        if self.prefix:
            keys = [self.prefix + key for key in keys]
        if stems:
            before = len(scan.listed)
            versions = (self.found[extension].versions() for extension in extensions)
            scan.listed.update(zip(keys, map(" ".join, zip(*versions, strict=True)), strict=True))
            if len(scan.listed) - before < len(keys):  # some are there twice: see `_close_each`
                for key in keys:
                    scan.listed.pop(key, None)
                return False
        self.found.clear()
        scan.keys += keys
        return True

    def _close_each(self, may_read: MayRead | None) -> None:
        """Note the complete samples, and what is wrong with the others."""
        scan, prefix = self.scan, self.prefix
        files = self._files()
        plain_prefix = not name_fault(prefix, "")
        meeting = Counter(map(self._key, files)) if scan.replace_dots is not None else None
        left = list(reversed(files))
        while left:  # what was looked at takes no memory any more
            stem = left.pop()
            extensions, versions = files.pop(stem)
            name = stem if meeting is None else self._key(stem)
            kind, which = scan.judge(extensions)
            odd = self.odd.get(stem, ())
            plain = plain_prefix and name.isprintable() and name[:2] != "__"
            if not plain and (fault := name_fault(prefix + name, name)):
                kind, which = fault, ()
            elif meeting and meeting[name] > 1:
                kind, which = faults.MEETING, ()
            elif odd:
                kind = odd[0].kind if kind in (None, faults.INCOMPLETE) else kind
            elif not kind and may_read:
                paths = [f"{prefix}{stem}.{extension}" for extension in extensions]
                kind, which = (None, ()) if may_read(paths) else (faults.DENIED, ())
            if kind:
                scan.fault_of_stem(kind, prefix + stem, extensions, which, odd, versions)
            else:
                scan.add(prefix + name, prefix + stem, extensions, versions)

    def _key(self, stem: str) -> str:
        """Return the last part of a stem's key once its dots are replaced."""
        return stem.replace(".", self.scan.replace_dots or "")

    def _files(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Return the extensions of each stem, in the order of their fields, and the versions."""
        files: dict[str, tuple[tuple[str, ...], str]] = dict.fromkeys(self.odd, ((), ""))
        grown: dict[tuple[tuple[str, ...], str], tuple[str, ...]] = {}
        for extension in sorted(self.found, key=str.lower):
            one = self.found.pop(extension)
            versions = one.versions()
            for stem in one.each():
                before, listed = files.get(stem, ((), ""))
                try:
                    after = grown[before, extension]
                except KeyError:
                    after = grown[before, extension] = (*before, extension)
                version = next(versions, "")
                files[stem] = after, f"{listed} {version}" if listed else version
        return files
