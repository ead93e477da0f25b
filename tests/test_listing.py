"""Real folders, as their owners have them: nothing left out in silence, and a way for each.

What is packed is compared with a model of a few lines, which shares nothing with the project.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import (
    MOSTLY_BASH,
    SOAK,
    hashes,
    members,
    run_script,
    slow_opens,
    touch,
    without_privileges,
    write_pairs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import create_webdataset as core
import read_webdataset as reader
from sharding.errors import InputError
from sharding.faults import open_report
from sharding.folder import ahead as ahead_room
from sharding.folder import walk
from sharding.listing import list_samples
from sharding.record import RECORD


def packed(output: Path) -> dict[str, bytes]:
    """Return all members of all shards."""
    found: dict[str, bytes] = {}
    for shard in sorted(output.glob("shard-*.tar")):
        content = members(shard)
        assert not content.keys() & found.keys()
        found |= content
    return found


def pack_and_prove(driver: str, source: Path, output: Path, *flags: str) -> tuple[str, str]:
    """Pack, prove with the same flags, and return what both said."""
    base = ["--source", source, *flags]
    done = run_script(driver, *base, "--output", output, "--num-shards=2")
    assert done.returncode == 0, done.stderr
    proof = run_script("read_webdataset.py", *base, "--path", output, "--quiet")
    assert proof.returncode == 0 and "OK, each sample of" in proof.stdout, proof
    return done.stdout, proof.stdout


# Both list through the same call: a start of Ray for each row is for `make soak`.
both_drivers = pytest.mark.parametrize("driver", MOSTLY_BASH)


@both_drivers
def test_other_extensions_are_named(driver: str, tmp_path: Path) -> None:
    names = [f"{n}.{field}" for n in "abc" for field in ("jpg", "txt")]
    names += [f"p{n}.{field}" for n in range(5) for field in ("png", "caption")]
    names += [f"note.{letter}" for letter in "abcdefghijkl"]
    source = touch(tmp_path / "source", *names)
    for said in pack_and_prove(driver, source, tmp_path / "o"):
        assert "3 samples in 2 shards" in said and "; ignored: 5 .caption, 5 .png, 1 .a, " in said
        assert said.endswith(", 1 .h and 4 others\n")


@both_drivers
def test_alternatives(driver: str, tmp_path: Path) -> None:
    kinds = ["jpg"] * 4 + ["JPEG"] * 3 + ["png"] * 2 + ["webp"]
    names = [f"{n}.{kind}" for n, kind in enumerate(kinds)]
    source = touch(tmp_path / "source", *names, *(f"{n}.txt" for n in range(10)))
    fields = "--fields=jpg;jpeg;png;webp,txt"
    said = pack_and_prove(driver, source, tmp_path / "o", fields)[1]
    assert "10 samples in 2 shards" in said
    assert "; fields: 4 jpg+txt, 3 jpeg+txt, 2 png+txt, 1 txt+webp" in said
    expected = {p.name.lower(): p.name.encode() for p in source.iterdir()}
    assert packed(tmp_path / "o") == expected
    done = run_script("read_webdataset.py", "--path", tmp_path / "o", fields, "--quiet")
    assert done.returncode == 0, "counts, and no faults"
    (tmp_path / "o" / RECORD).unlink()
    done = run_script("read_webdataset.py", "--path", tmp_path / "o", "--quiet")
    assert done.returncode == 1 and "fields differ from those of other samples" in done.stderr
    touch(source, "3.png")
    done = run_script(driver, "--source", source, "--output", tmp_path / "p", fields)
    assert done.returncode == 2 and not (tmp_path / "p").exists()
    assert "two alternatives of one field: 1 ('3.jpg' and '3.png')" in done.stderr


@both_drivers
def test_optional_fields(driver: str, tmp_path: Path) -> None:
    source = touch(tmp_path / "source", *(f"{n}.{f}" for n in range(4) for f in ("jpg", "txt")))
    touch(source, "1.json", "3.JSON", "dataset.json")
    flags = ["--optional-fields=json"]
    for said in pack_and_prove(driver, source, tmp_path / "o", *flags):
        assert "; ignored: 1 .json" in said
    assert packed(tmp_path / "o").keys() == {
        *(f"{n}.{f}" for n in range(4) for f in ("jpg", "txt")), "1.json", "3.json",
    }  # fmt: skip
    found = reader.open_webdataset(
        tmp_path / "o", "__key__", optional_fields="json", decode=None, shuffle_buffer=0
    )
    expected = {"0": None, "1": b"1.json", "2": None, "3": b"3.JSON"}
    assert dict(found) == expected


@both_drivers
def test_linked_folders_are_followed(driver: str, tmp_path: Path) -> None:
    source, elsewhere = write_pairs(tmp_path / "source", 3), write_pairs(tmp_path / "train", 50)
    for name in ("train", "again"):  # a folder that is reached twice is two folders
        (source / name).symlink_to(elsewhere)
    (elsewhere / "sub").mkdir()
    assert "103 samples" in pack_and_prove(driver, source, tmp_path / "o")[0]
    linked = {f"{name}/{path}" for name in ("train", "again") for path in hashes(elsewhere)}
    expected = {path.name for path in source.glob("*.*")} | linked
    assert packed(tmp_path / "o").keys() == expected
    (elsewhere / "sub" / "loop").symlink_to(source)
    done = run_script(driver, "--source", source, "--output", tmp_path / "p")
    assert done.returncode == 2 and not (tmp_path / "p").exists()
    assert "symlink loops: 2 ('again/sub/loop', 'train/sub/loop')" in done.stderr
    assert "103 samples" in pack_and_prove(driver, source, tmp_path / "p", "--skip-bad")[0]


@both_drivers
def test_dots_are_replaced(driver: str, tmp_path: Path) -> None:
    source = touch(tmp_path / "source", "photo.2020.jpg", "photo.2020.txt", "a.SEG.png", "a.txt")
    touch(source, "b/v1.2.jpg", "b/v1.2.txt", "a.jpg", "notes.v2.md")
    flags = ["--replace-dots=_", "--optional-fields=seg.png"]
    said = pack_and_prove(driver, source, tmp_path / "o", *flags)[0]
    assert "3 samples" in said and "; ignored: 1 .md" in said
    assert packed(tmp_path / "o") == {
        "photo_2020.jpg": b"photo.2020.jpg", "photo_2020.txt": b"photo.2020.txt",
        "a.jpg": b"a.jpg", "a.seg.png": b"a.SEG.png", "a.txt": b"a.txt",
        "b/v1_2.jpg": b"b/v1.2.jpg", "b/v1_2.txt": b"b/v1.2.txt",
    }  # fmt: skip
    touch(source, "photo_2020.jpg", "photo_2020.txt")
    done = run_script(driver, "--source", source, "--output", tmp_path / "p", *flags)
    assert (
        done.returncode == 2 and "get the same key once their dots are replaced: 2" in done.stderr
    )
    assert "2 samples" in pack_and_prove(driver, source, tmp_path / "p", "--skip-bad", *flags)[0]


@pytest.mark.parametrize("char", ["", ".", "/", " ", "ab", "\n", "\\"])
def test_what_dots_may_become(char: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="replace_dots takes one character"):
        list_samples(write_pairs(tmp_path, 1), replace_dots=char)


def test_names_that_are_read_as_another_encoding(tmp_path: Path) -> None:
    """They would give other keys, and another order."""
    source = touch(tmp_path / "source", "\u00e9.jpg", "\u00e9.txt")
    flags = ["--source", source, "--output", tmp_path / "o", "--shard-id=0", "--total-shards=1"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("create_webdataset.py", *flags, env=ascii_only)
    assert done.returncode == 2 and "set PYTHONUTF8=1" in done.stderr, done
    assert run_script("create_webdataset.py", *flags, env={"LC_ALL": "C"}).returncode == 0


def test_unicode_forms(tmp_path: Path) -> None:
    source = touch(tmp_path, "caf\u00e9.jpg", "cafe\u0301.txt")
    with pytest.raises(InputError, match=r"differ only in Unicode form \(NFC, NFD\)"):
        list_samples(source)


@pytest.mark.parametrize("fields", ["jpg|png,txt", "jpg;,txt", "jpg;jpg,txt", "jpg,txt;jpg", ";"])
def test_alternatives_that_cannot_be(fields: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be a field|twice"):
        list_samples(write_pairs(tmp_path, 1), fields)


BAD = {
    "incomplete": ["lone.jpg"],
    "doubled": ["a.jpg", "a.JPG", "a.txt"],
    "dotted": ["p.1.jpg", "p.1.txt"],
    "reserved": ["__x.jpg", "__x.txt"],
    "unreadable name": ["n\udcff.jpg", "n\udcff.txt", "new\nline.jpg", "new\nline.txt"],
}


@both_drivers
def test_all_kinds_in_one_run(driver: str, tmp_path: Path) -> None:
    source = touch(tmp_path / "source", *(name for names in BAD.values() for name in names))
    touch(source, "good.jpg", "good.txt", "other.md", ".hidden")
    report = tmp_path / "report.jsonl"
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=1", "--report", report]
    done = run_script(driver, *flags)
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    lines = done.stderr.splitlines()
    assert len(lines) == 5 and all(line.startswith(f"{driver}: error: --source") for line in lines)
    read = [json.loads(line) for line in report.read_text().splitlines()]
    by_reason = {reason: sorted(names) for reason, names in BAD.items()} | {"ignored": ["other.md"]}
    found: dict[str, list[str]] = {}
    for line in read:
        assert line.keys() == {"name", "reason", "detail"}
        found.setdefault(line["reason"], []).append(line["name"])
    assert {reason: sorted(names) for reason, names in found.items()} == by_reason
    report.unlink()
    done = run_script(driver, *flags, "--skip-bad")
    assert done.returncode == 0, done.stderr
    expected = "; ignored: 1 .md; skipped: 2 dotted, 2 unreadable name, 1 doubled, 1 incomplete, 1 "
    assert expected + "reserved\n" in done.stdout, done.stdout
    assert packed(tmp_path / "o").keys() == {"good.jpg", "good.txt"}
    again = [json.loads(line) for line in report.read_text().splitlines()]
    assert again == read, "the same names, whether they are refused or dropped"
    proof = ["--path", tmp_path / "o", "--source", source, "--skip-bad", "--quiet"]
    assert expected in run_script("read_webdataset.py", *proof).stdout


@pytest.mark.parametrize("where", ["source", "source/sub", "o"])
def test_a_report_among_the_data(where: str, tmp_path: Path, capfd) -> None:
    source = write_pairs(tmp_path / "source", 1)
    path = tmp_path / where / "report"
    flags = ["--source", str(source), "--report", str(path)]
    pack = ["--output", str(tmp_path / "o"), "--shard-id=0", "--total-shards=1"]
    assert core.main([*flags[:2], *pack]) == 0
    for main, more in ((core.main, pack), (reader.main, ["--path", str(tmp_path / "o")])):
        assert main([*flags, *more]) == 2
        assert "is inside" in capfd.readouterr().err and not path.exists()


def test_many_faults_are_cheap(tmp_path: Path) -> None:
    """A hundred thousand names: their lines are written as they come."""
    with open_report(str(tmp_path / "report")) as report:
        began = time.process_time()
        for number in range(100_000):
            report.add(f"name-{number}.jpg", "incomplete", "has no .txt")
        assert time.process_time() - began < 2


URLS = ["hf://datasets/x", "http://127.0.0.1:9/x", "file:///tmp/x", "s3:/b/x"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("flag", ["--source", "--output"])
@both_drivers
def test_urls_are_refused(driver: str, flag: str, url: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "s", 4)
    flags = ["--source", source, "--output", "o", flag, url]
    done = run_script(driver, *flags, cwd=tmp_path)
    cure = "with two slashes" if url == "s3:/b/x" else "such URLs are not supported"
    assert done.returncode == 2 and f"{flag} '{url}': " in done.stderr and cure in done.stderr, done
    assert os.listdir(tmp_path) == ["s"]


def test_denied_folders_and_files(tmp_path: Path) -> None:
    prefix = without_privileges()
    source = write_pairs(tmp_path / "source", 4)
    (source / "d").mkdir(mode=0)
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=1"]
    done = run_script("run_parallel.sh", *flags, prefix=prefix)
    assert done.returncode == 2 and "may not be read: 1 ('d'); change their mode" in done.stderr
    (source / "sample-2.txt").chmod(0)
    done = run_script("run_parallel.sh", *flags, "--skip-bad", prefix=prefix)
    assert done.returncode == 0 and "; skipped: 2 permission denied" in done.stdout, done
    assert len(packed(tmp_path / "o")) == 6


class Model(NamedTuple):
    """What a model makes of a source."""

    samples: dict[str, dict[str, str]]  # key -> field -> path
    faults: Counter[str]  # paths that are refused
    ignored: Counter[str]
    hidden: int


def model_of(source: str, fields: str, optional: str, dots: str | None) -> Model:
    """List a folder in the plainest way; names are as os.fsdecode gives them."""
    required = [entry.split(";") for entry in fields.split(",")]
    extra = [entry.split(";") for entry in optional.split(",") if entry]
    known = {field for entry in required + extra for field in entry}
    groups: dict[tuple[str, str], list[tuple[str, str | None]]] = {}
    faults: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    hidden = 0
    todo = [("", [os.path.realpath(source)])]
    while todo:
        prefix, above = todo.pop()
        for name in os.listdir(os.path.join(source, prefix)):
            path = prefix + name
            full = os.path.join(source, path)
            if name.startswith("."):
                hidden += 1
                continue
            if os.path.isdir(full):
                real = os.path.realpath(full)
                if real in above:
                    faults[path] += 1
                else:
                    todo.append((path + "/", [*above, real]))
                continue
            pieces = name.split(".")
            cuts = range(1, len(pieces)) if dots else range(1, 2)
            split = [(".".join(pieces[:n]), ".".join(pieces[n:]).lower()) for n in cuts]
            matching = [(stem, field) for stem, field in split if field in known and stem]
            if matching:
                stem, field = matching[0]
                whole = os.path.isfile(full)
                groups.setdefault((prefix, stem), []).append((path, field if whole else None))
            elif not os.path.exists(full) or (
                os.path.isfile(full) and any(name.lower().endswith("." + f) for f in known)
            ):
                faults[path] += 1  # a link that leads nowhere, or a dot before the field
            else:
                ignored[path] += 1
    keys = Counter(p + (s.replace(".", dots) if dots else s) for p, s in groups)
    samples = {}
    for (prefix, stem), files in groups.items():
        name = stem.replace(".", dots) if dots else stem
        key = prefix + name
        found = [field for _, field in files if field]
        first = key.split("/")[0]
        good_name = not name.startswith("__") and "\n" not in key
        good_name = good_name and not (
            first.startswith("__") and first.endswith("__") and len(first) > 3
        )
        try:
            key.encode()
        except UnicodeEncodeError:
            good_name = False
        whole = len(found) == len(files)
        no_sample = whole and not any(f in e for e in required for f in found)
        doubled = len(found) > len(set(found)) or keys[key] > 1
        one_each = all(sum(f in entry for f in set(found)) == 1 for entry in required)
        one_most = all(sum(f in entry for f in set(found)) <= 1 for entry in required + extra)
        if not good_name or doubled or not one_most:
            faults.update(path for path, _ in files)
        elif no_sample:
            ignored.update(path for path, _ in files)
        elif not one_each or not whole:
            faults.update(path for path, _ in files)
        else:
            samples[key] = {field: path for path, field in files if field}
    return Model(samples, faults, ignored, hidden)


KINDS = st.sampled_from(["file"] * 9 + ["folder", "fifo", "link", "dangling", "self", "up", "side"])
STEMS = st.one_of(
    st.text("ab.J_-", max_size=5),
    st.sampled_from(
        ["__a__", "__init", ".hidden", "a.b", "a_b", "new\nline", "\udcff", "é", "e\u0301"]
    ),
    st.integers(0, 9).map(str),
)
ENDINGS = st.sampled_from(
    [".jpg", ".txt", ".JPG", ".Txt", ".png", ".json", ".seg.png", "", ".md", "."]
)
FOLDERS = st.sampled_from(["", "", "", "d", "d.e", "d/f", "__r__"])


def place(source: str, kind: str, folder: str, name: str) -> None:
    """Put one generated name into the source, whatever it is to be."""
    os.makedirs(os.path.join(source, folder), exist_ok=True)
    path = os.path.join(source, folder, name)
    if kind == "file":
        with open(path, "xb") as stream:
            stream.write(os.fsencode(path))
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        other = os.path.join(os.path.dirname(source), "other")
        target = {"link": os.path.join(other, "x.jpg"), "dangling": "nowhere", "self": name}
        os.symlink({**target, "up": source, "side": other}[kind], path)


@given(
    st.lists(st.tuples(KINDS, FOLDERS, STEMS, ENDINGS), min_size=1, max_size=30),
    st.sampled_from(["jpg,txt", "jpg;png,txt", "txt"]),
    st.sampled_from(["", "json", "json;seg.png"]),
    st.sampled_from([None, None, "_"]),
    st.integers(1, 3),
)
@settings(
    max_examples=1_500 if SOAK else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_as_the_model_says(tmp_path_factory, entries, fields, optional, dots, total: int) -> None:
    """Refused with nothing written, or each shard as the model has it; every name accounted for."""
    root = tmp_path_factory.mktemp("n")
    source = str(root / "source")
    os.mkdir(source)
    touch(root / "other", "x.jpg", "y.jpg", "y.txt")
    for kind, folder, stem, ending in entries:
        try:
            place(source, kind, folder, stem.replace("/", "~") + ending)
        except OSError:
            continue  # the name is taken, or is no name
    model = model_of(source, fields, optional, dots)
    report = str(root / "report")
    flags = ["--source", source, "--output", str(root / "o"), f"--total-shards={total}"]
    flags += ["--shard-id=0", "--shard-step=1", "--report", report]
    more = [f"--fields={fields}", f"--optional-fields={optional}"]
    more += [f"--replace-dots={dots}"] if dots else []
    flags += more
    code = core.main(flags)
    assert code == (2 if model.faults or len(model.samples) < total else 0)
    assert code == 0 or not (root / "o").exists()
    code = core.main([*flags, "--skip-bad"])
    assert code == (0 if len(model.samples) >= total else 2)
    with open(report) as stream:
        lines = list(map(json.loads, stream))
    assert Counter(li["name"] for li in lines if li["reason"] == "ignored") == model.ignored
    assert Counter(li["name"] for li in lines if li["reason"] != "ignored") == model.faults
    if code == 0:
        keys = sorted(model.samples)
        for number in range(total):
            expected = {}
            for key in keys[number::total]:
                for field, path in sorted(model.samples[key].items()):
                    with open(os.path.join(source, path), "rb") as stream:
                        expected[f"{key}.{field}"] = stream.read()
            content = members(root / "o" / f"shard-{number:06d}.tar")
            assert list(content.items()) == list(expected.items())
        proof = ["--path", str(root / "o"), "--source", source, "--quiet", "--skip-bad", *more]
        assert reader.main(proof) == 0
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("name", ["a.json", "a.png", "z.json", "z.md", "train"])
def test_a_dangling_link_is_not_left_out(name: str, tmp_path: Path) -> None:
    """As where a volume with the annotations is not mounted: also if the field is optional."""
    source = touch(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt")
    (source / name).symlink_to("/nowhere/x")
    flags = {"fields": "jpg;png,txt", "optional_fields": "json"}
    why = f"reached, .*: 1 .'{name}' is a link to '/nowhere/x': No such file or directory.; mount"
    with pytest.raises(InputError, match=why):
        list_samples(source, **flags)
    listing = list_samples(source, **flags, skip_bad=True)
    assert [s.key for s in listing.samples] == (["b"] if name[0] == "a" else ["a", "b"])
    assert listing.skipped == {"unreachable": 1} and not listing.ignored


def test_a_link_below_a_denied_folder(tmp_path: Path) -> None:
    prefix = without_privileges()
    source = write_pairs(tmp_path / "source", 2)
    write_pairs(tmp_path / "secret" / "in", 2)
    (source / "more").symlink_to(tmp_path / "secret" / "in")
    (tmp_path / "secret").chmod(0)
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=1"]
    done = run_script("run_parallel.sh", *flags, prefix=prefix)
    (tmp_path / "secret").chmod(0o700)
    assert done.returncode == 2 and "may not be read: 1 ('more')" in done.stderr, done


def test_a_report_harms_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "source", 2)
    before = hashes(source)
    (tmp_path / "link").symlink_to(source / "sample-0.jpg")
    (tmp_path / "old").write_text("of an earlier run")
    flags = ["--source", str(source), "--output", str(tmp_path / "o"), "--total-shards=1"]
    for path, message in (
        (tmp_path / "link", "is inside"),
        ("/dev/null", "is not a file"),
        (tmp_path / "no" / "folder", "its folder does not exist"),
        ("", "is not a file"),
    ):
        assert core.main([*flags, "--shard-id=0", "--report", str(path)]) == 2
        assert message in capfd.readouterr().err
    wrong = ["--replace-dots=__", "--report", str(tmp_path / "old")]
    assert core.main([*flags, "--shard-id=0", *wrong]) == 2
    assert (tmp_path / "old").read_text() == "of an earlier run" and hashes(source) == before


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that plays folders which cannot be reached."""
    library = tmp_path_factory.mktemp("preload") / "odd_folders.so"
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    source = Path(__file__).with_name("odd_folders.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def pack_oddly(preload: str, source: Path, output: Path, *flags: str, **odd: object):
    """Pack while system calls fail as these variables say."""
    environment = {"LD_PRELOAD": preload, **{name: str(value) for name, value in odd.items()}}
    base = ["--source", source, "--output", output, "--shard-id=0", "--total-shards=1"]
    return run_script("create_webdataset.py", *base, *flags, env=environment)


DEAD = [errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ENODEV, errno.ETIMEDOUT, errno.ELOOP]


@pytest.mark.parametrize("number", [*DEAD, errno.EACCES])
@pytest.mark.parametrize("call", ["STAT_ERRNO", "LSTAT_ERRNO", "OPENDIR_ERRNO"])
def test_a_folder_that_cannot_be_reached(call: str, number: int, preload: str, tmp_path) -> None:
    source = write_pairs(tmp_path / "source", 5)
    write_pairs(source / "train", 20)
    odd = {call: number, "ODD_NAME": "/train"}
    done = pack_oddly(preload, source, tmp_path / "o", **odd)
    assert done.returncode == 2 and not (tmp_path / "o").exists(), done
    reason = "permission denied"
    if number == errno.EACCES:
        assert "may not be read: 1 ('train'); change" in done.stderr
    else:
        reason = "unreachable"
        said = f"folders of samples: 1 ('train' is unreachable: {os.strerror(number)}); mount or"
        assert said in done.stderr and done.stderr.count("\n") == 1
    report = tmp_path / "report"
    flags = ["--skip-bad", f"--report={report}"]
    done = pack_oddly(preload, source, tmp_path / "o", *flags, **odd)
    assert done.returncode == 0 and len(packed(tmp_path / "o")) == 10, done
    (line,) = map(json.loads, report.read_text().splitlines())
    assert (line["name"], line["reason"]) == ("train", reason)
    proof = ["--path", tmp_path / "o", "--source", source, "--quiet"]
    assert run_script("read_webdataset.py", *proof).returncode == 1, "it is back"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_shortage_is_no_fault_of_a_name(number: int, preload: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 5)
    write_pairs(source / "train", 20)
    for call in ("STAT_ERRNO", "OPENDIR_ERRNO"):
        odd = {call: number, "ODD_NAME": "/train"}
        done = pack_oddly(preload, source, tmp_path / "o", "--skip-bad", **odd)
        said = f"--source cannot be listed: '{source}/train': {os.strerror(number)}"
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE])
@pytest.mark.parametrize("flags", [[], ["--skip-bad"]])
def test_a_listing_that_breaks_in_the_middle(flags, number: int, preload: str, tmp_path) -> None:
    """Nobody knows what it would have named, so nothing can be skipped."""
    source = write_pairs(tmp_path / "source" / "train", 20).parent
    odd = {"READDIR_ERRNO": number, "ODD_NAME": "/train"}
    done = pack_oddly(preload, source, tmp_path / "o", *flags, **odd)
    said = f"--source cannot be listed: '{source}/train': {os.strerror(number)}\n"
    assert done.returncode == 2 and done.stderr.endswith(said), done
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["sample-1.txt", "sample-1.json", "train"])
def test_a_file_system_that_tells_no_types(name: str, preload: str, tmp_path: Path) -> None:
    """There each file is looked at; one that cannot be is refused with its sample."""
    source = touch(
        write_pairs(tmp_path / "source", 5), "sample-1.json", "train/a.jpg", "train/a.txt"
    )
    optional = "--optional-fields=json"
    done = pack_oddly(preload, source, tmp_path / "all", optional, NO_TYPES=1)
    assert done.returncode == 0 and len(packed(tmp_path / "all")) == 13, done
    odd = {"NO_TYPES": 1, "LSTAT_ERRNO": errno.EIO, "ODD_NAME": f"/{name}"}
    done = pack_oddly(preload, source, tmp_path / "o", optional, **odd)
    said = f"1 ('{name}' is unreachable: Input/output error)"
    assert done.returncode == 2 and said in done.stderr, done
    done = pack_oddly(preload, source, tmp_path / "o", optional, "--skip-bad", **odd)
    gone = {key for key in packed(tmp_path / "all") if key.startswith(name.partition(".")[0])}
    assert packed(tmp_path / "o").keys() == packed(tmp_path / "all").keys() - gone


def test_names_that_vanish(preload: str, tmp_path: Path, monkeypatch) -> None:
    """Those that are listed no more are gone; what is listed but never found is refused."""
    source = write_pairs(tmp_path / "source", 2)
    for name in ("1.txt", "old.png", "folder"):
        (source / name).symlink_to(source)
    real = os.stat

    def removing(path, *args, **options):  # as a person does just after the listing
        if os.path.islink(path):
            os.unlink(path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", removing)
    listing = list_samples(source)
    assert len(listing.samples) == 2 and not listing.ignored and not listing.skipped
    monkeypatch.undo()
    touch(source, "x\u00e9/a.jpg", "x\u00e9/a.txt")
    for call in ("LSTAT_ERRNO", "OPENDIR_ERRNO"):
        odd = {call: errno.ENOENT, "LSTAT_ERRNO": errno.ENOENT, "ODD_NAME": "x\u00e9"}
        odd |= {"NO_TYPES": 1} if call == "LSTAT_ERRNO" else {}
        done = pack_oddly(preload, source, tmp_path / "o", **odd)
        assert done.returncode == 2, done
        assert "1 ('x\u00e9' is unreachable: No such file or directory)" in done.stderr


def test_a_folder_that_vanishes(tmp_path: Path, monkeypatch) -> None:
    source = write_pairs(tmp_path / "source", 2)
    (source / "old").mkdir()
    scandir = os.scandir

    def removing(path: str):
        if path.endswith("/old"):
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removing)
    assert len(list_samples(source).samples) == 2


@pytest.mark.parametrize("inodes", ["0", "new"])
def test_circles_without_inode_numbers(inodes: str, preload: str, tmp_path: Path) -> None:
    """Some mounts give new numbers each time, others the same to every folder."""
    source = touch(tmp_path / "source", *(f"{n}/in/a.{f}" for n in "xyz" for f in ("jpg", "txt")))
    done = pack_oddly(preload, source, tmp_path / "o", ODD_INODES=inodes)
    assert done.returncode == 0 and len(packed(tmp_path / "o")) == 6, done
    (source / "x" / "in" / "loop").symlink_to(source)
    (source / "y" / "up").symlink_to("../../source/y")
    done = pack_oddly(preload, source, tmp_path / "p", ODD_INODES=inodes)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "symlink loops: 2 ('x/in/loop', 'y/up'); remove" in done.stderr, done
    done = pack_oddly(preload, source, tmp_path / "p", "--skip-bad", ODD_INODES=inodes)
    assert done.returncode == 0 and packed(tmp_path / "p") == packed(tmp_path / "o")


def test_a_mount_that_has_died(tmp_path: Path) -> None:
    """A real one: its server ends, and the kernel knows."""
    source = write_pairs(tmp_path / "source", 5)
    (source / "train").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("no FUSE")
    options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    target = os.fsencode(source / "train")
    failed = libc.mount(b"test", target, b"fuse", 0, options.encode())
    os.close(fuse)
    if failed:
        pytest.skip("may not mount")
    try:
        flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=1"]
        done = run_script("run_parallel.sh", *flags)
        said = "1 ('train' is unreachable: Transport endpoint is not connected); mount or repair"
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "o").exists()
        done = run_script("run_parallel.sh", *flags, "--skip-bad")
        assert done.returncode == 0 and "; skipped: 1 unreachable" in done.stdout, done
        done = run_script("run_parallel.sh", *flags, "--source", source / "train", "--skip-bad")
        assert done.returncode == 2 and "cannot be listed" in done.stderr, done
    finally:
        libc.umount2(target, 2)


# ---------------------------------------------------------------- slow folders


@pytest.mark.parametrize("below", ["", "/a/b"])
def test_slow_folders_are_read_side_by_side(below: str, tmp_path: Path) -> None:
    """One after the other, the 300 of them take 3 s."""
    number = 100 if below else 300
    pairs = [f"sample-{n}{below}/x.{field}" for n in range(number) for field in ("jpg", "txt")]
    source = touch(tmp_path / "source", *pairs)
    code = (
        "import sys, threading, time; from sharding.listing import list_samples\n"
        "began = time.perf_counter(); found = list_samples(sys.argv[1]).samples\n"
        "print(len(found), time.perf_counter() - began, threading.active_count())"
    )
    env = slow_opens(tmp_path, 10_000)
    done = subprocess.check_output([sys.executable, "-c", code, source], env=env, text=True)
    samples, seconds, threads = done.split()
    assert (samples, threads) == (str(number), "1") and float(seconds) < 1.2, done


def untidy(source: Path, rng: random.Random) -> Path:
    """Make a tree with something of everything that a listing may meet."""
    places = [source]
    for number in range(40):
        places.append(rng.choice(places) / f"d{number}")
    for place in places:
        touch(place, *(f"{n}.{f}" for n in range(rng.randrange(9)) for f in ("jpg", "txt")))
        touch(place, *rng.sample(["x.jpg", "a.md", ".hidden", "p.1.jpg", "b.JPG", "c.png"], 3))
        if rng.random() < 0.3:
            (place / "loop").symlink_to(rng.choice(places))
        if rng.random() < 0.3:
            (place / rng.choice(["y.jpg", "gone"])).symlink_to("nowhere")
        if rng.random() < 0.2:
            os.mkfifo(place / "z.txt")
    return source


@pytest.mark.parametrize("ahead", [3, 40, 4_096])
@pytest.mark.parametrize("seed", range(4))
def test_reading_ahead_changes_nothing(seed: int, ahead: int, tmp_path: Path, monkeypatch) -> None:
    """The same samples, refusals and report, all in the same order; whatever waits, waits."""
    source = untidy(tmp_path / "source", random.Random(seed))
    monkeypatch.setattr(walk, "NAMES_AT_ONCE", 3)
    monkeypatch.setattr(ahead_room, "AHEAD", ahead)
    found, threads = [], set(threading.enumerate())  # servers of other tests
    for slow in (1 << 30, 0):
        monkeypatch.setattr(walk, "SLOW_FOLDERS", slow)
        report = tmp_path / "report"
        with open_report(str(report)) as opened:
            listing = list_samples(source, skip_bad=True, report=opened)
        with pytest.raises(InputError) as caught:
            list_samples(source)
        what = listing.samples.keys, listing.skipped, listing.ignored
        found.append((*what, str(caught.value), report.read_text()))
    assert found[0] == found[1] and found[0][2] and found[0][3]
    assert threads.issuperset(threading.enumerate())


def test_what_is_read_ahead_is_bounded(tmp_path: Path, monkeypatch) -> None:
    """No folder is held whole, however large it is, whether it is the next or not."""
    source, held = tmp_path / "source", []
    pairs = [f"{d}/{n}.{f}" for d in range(20) for n in range(100) for f in ("jpg", "txt")]
    touch(source, *pairs)
    monkeypatch.setattr(walk, "NAMES_AT_ONCE", 20)
    monkeypatch.setattr(ahead_room, "AHEAD", 200)
    monkeypatch.setattr(walk, "SLOW_FOLDERS", 0)
    parts = walk.Ahead.parts

    def looking(self, folder):
        for part in parts(self, folder):
            time.sleep(0.001)
            held.append(self.held)
            yield part

    monkeypatch.setattr(walk.Ahead, "parts", looking)
    assert len(list_samples(source).samples) == 2_000
    assert 200 <= max(held) <= 200 + 17 * 21, max(held)


def test_a_broken_folder_that_is_read_ahead(preload: str, tmp_path: Path) -> None:
    """It is named when its turn comes; what comes before it is listed."""
    source = touch(tmp_path / "source", *(f"sample-{n}/x.md" for n in range(30)))
    env = {"READDIR_ERRNO": str(errno.EIO), "ODD_NAME": "/sample-7"}
    touch(source, *(f"sample-7/{n}.md" for n in range(9)))
    env |= {"LD_PRELOAD": f"{slow_opens(tmp_path, 1_000)['LD_PRELOAD']} {preload}"}
    flags = [f"--source={source}", f"--output={tmp_path}/o", "--shard-id=0", "--total-shards=1"]
    done = run_script("create_webdataset.py", *flags, env=env)
    said = f"--source cannot be listed: '{source}/sample-7': {os.strerror(errno.EIO)}\n"
    assert done.returncode == 2 and done.stderr.endswith(said), done
