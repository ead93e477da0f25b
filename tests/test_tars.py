"""Archives as a source: what packing the files that are in them would give, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DRIVERS,
    MOSTLY_BASH,
    Bucket,
    hashes,
    members,
    run_script,
    start_packing,
    touch,
    write_pairs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from create_webdataset import create_webdataset
from read_webdataset import main as read
from sharding.archive import FastTarWriter
from sharding.errors import InputError, PackError
from sharding.listing import list_samples
from sharding.pack import write_samples
from sharding.run import start, start_direct
from sharding.samples import Listing
from sharding.tars import source as archives
from sharding.tars import walk

Files = dict[str, bytes]  # by name


def write_tar(
    path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT
) -> Path:
    """Write an archive as Python's tarfile does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Return the files below a folder, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in files]


class Count(io.BytesIO):
    """A stream to write to that keeps nothing but the size."""

    size = 0

    def write(self, data) -> int:
        self.size += len(data)
        return len(data)


def pack(source: str | Path, output: Path, *flags: str, driver: str = DRIVERS[0]) -> str:
    done = run_script(driver, "--source", source, "--output", output, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pack_here(source: str | Path, output: Path, total: int, **flags: Any) -> None:
    """Pack in this process, which is sooner than by a driver."""
    run = start_direct(list_samples(source, **flags), output, range(total), total)
    for shard_id in range(total):
        create_webdataset(run, output, shard_id, total)


def packed(listing: Listing, total: int = 3) -> list[bytes]:
    """Return the shards that a listing becomes."""
    shards = []
    for shard_id in range(total):
        stream = io.BytesIO()
        write_samples(stream, listing.source, listing.samples[shard_id::total])
        shards.append(stream.getvalue())
    return shards


def refusal(source: str, *flags: str, output: Path) -> str:
    """Return what is said when a source is refused with nothing written."""
    done = run_script(DRIVERS[0], "--source", source, "--output", output, *flags)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr, done
    assert not output.exists()
    return done.stderr


# ---------------------------------------------------------------- the bytes


def test_repacked_as_the_files_would_be(tmp_path: Path) -> None:
    """4 shards into 7: by a pattern, by braces, in the order of a shuffle; and the proof."""
    source = write_pairs(tmp_path / "source", 60)
    touch(source, "deep/er/a.jpg", "deep/er/a.txt", "b.jpg", "b.TXT", "a.json", "b.json", "x.md")
    (source / "large.jpg").write_bytes(os.urandom(3 << 20))
    touch(source, "large.txt", "a.jpg", "a.txt")
    pack_here(source, tmp_path / "old", 4, optional_fields="json")
    pack_here(source, tmp_path / "want", 7)
    flags = ["--num-shards=7", "--num-workers=2"]
    said = pack(f"{tmp_path}/old/shard-*.tar", tmp_path / "pattern", *flags)
    assert "ignored: 2 .json" in said
    assert hashes(tmp_path / "pattern") == hashes(tmp_path / "want")
    flags += ["--shuffle=5", "--optional-fields=json"]
    braces = f"{tmp_path}/old/shard-{{000000..000003}}.tar"
    pack_here(source, tmp_path / "shuffled", 7, shuffle=5, optional_fields="json")
    pack(braces, tmp_path / "braces", *flags, driver=MOSTLY_BASH[-1])
    assert hashes(tmp_path / "braces") == hashes(tmp_path / "shuffled")
    proof = ["--path", f"{tmp_path}/braces", "--source", braces, "--quiet", *flags[2:]]
    assert read(proof) == 0
    assert run_script("read_webdataset.py", *proof, "--num-workers=2").returncode == 0


def test_with_a_function(tmp_path: Path) -> None:
    """It is tried on a member of an archive before a run, and filters what is packed."""
    source = write_pairs(tmp_path / "source", 12)
    pack_here(source, tmp_path / "old", 2)
    code = "def f(sample):\n    return None if sample['__key__'].endswith('3') else sample\n"
    (tmp_path / "f.py").write_text(code)
    flags = ["--transform", f"{tmp_path}/f.py:f", "--shuffle=1"]
    said = pack(f"{tmp_path}/old/*.tar", tmp_path / "new", *flags, "--num-shards=3")
    assert "dropped by f" in said
    pack_here(source, tmp_path / "want", 3, transform=f"{tmp_path}/f.py:f", shuffle=1)
    assert hashes(tmp_path / "new") == hashes(tmp_path / "want")
    proof = ["--path", f"{tmp_path}/new", "--source", f"{tmp_path}/old/*.tar", "--quiet", *flags]
    assert read(proof) == 0
    (tmp_path / "f.py").write_text("def f(sample):\n    return sample['png']\n")
    said = refusal(f"{tmp_path}/old/*.tar", *flags, output=tmp_path / "o")
    assert "KeyError" in said


def test_growing_a_dataset(tmp_path: Path) -> None:
    """Shards, and new ones in a folder of their own, become one set."""
    both = tmp_path / "both"
    for place, numbers in (("shards", range(0, 20)), ("new", range(20, 31))):
        for folder in (tmp_path / f"raw-{place}", both):
            touch(folder, *(f"{n:02d}.{field}" for n in numbers for field in ("jpg", "txt")))
        pack_here(tmp_path / f"raw-{place}", tmp_path / place, 2)
    pack_here(both, tmp_path / "want", 3)
    pack_here(f"{tmp_path}/{{shards,new}}/*.tar", tmp_path / "all", 3)
    assert hashes(tmp_path / "all") == hashes(tmp_path / "want")


def test_members_of_a_key_are_joined(tmp_path: Path) -> None:
    """From several archives, in any order; one that is named twice counts once."""
    source = write_pairs(tmp_path / "source", 30)
    files = contents(source)
    for field in ("jpg", "txt"):
        some = [file for file in files if file[0].endswith(field)]
        random.Random(field).shuffle(some)
        write_tar(tmp_path / f"{field}-0.tar", some[:11])
        write_tar(tmp_path / f"{field}-1.tar", some[11:])
    joined = list_samples(f"{tmp_path}/{{jpg-*,txt-*,jpg-0}}.tar")
    assert packed(joined) == packed(list_samples(source))


stems = st.text("ab.é_", min_size=1, max_size=3) | st.sampled_from(
    ["x" * 120, "é" * 60, " a#?", "__a"]
)
names = st.builds(
    lambda folder, stem, extension: f"{folder}{stem}.{extension}",
    st.sampled_from(["", "", "d/", "d/e/", "d.x/", ".h/", "d/.h/"]),
    stems,
    st.sampled_from(["jpg", "txt", "jpg", "txt", "JPG", "json", "md"]),
)
sizes = st.integers(0, 3_000) | st.sampled_from([512, 1024, archives.WHOLE_SIZE + 1])


@settings(
    max_examples=400 if os.environ.get("SOAK") else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    files=st.dictionaries(names, sizes, max_size=14),
    pairs=st.sets(st.integers(0, 12), min_size=1),
    flags=st.fixed_dictionaries(
        {},
        optional={
            "skip_bad": st.just(True),
            "replace_dots": st.just("_"),
            "shuffle": st.integers(0, 3),
            "optional_fields": st.just("json"),
        },
    ),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    front=st.sampled_from(["", "./"]),
    seed=st.integers(0, 1 << 32),
    slow=st.booleans(),
)
def test_any_set_gives_what_its_files_give(
    files: dict[str, int],
    pairs: set[int],
    flags: dict[str, object],
    form: int,
    front: str,
    seed: int,
    slow: bool,
) -> None:
    """Whatever keys, fields and sizes there are, in whatever archives they lie, in any order."""
    rng = random.Random(seed)
    every = {name: rng.randbytes(size) for name, size in files.items()}
    every |= {f"p{n}.{field}": rng.randbytes(n * 40) for n in pairs for field in ("jpg", "txt")}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if slow:  # read ahead, by ranges
            patch.setattr(archives, "SLOW_READ", -1)
        raw, sets = Path(folder, "raw"), Path(folder, "set")
        parts: dict[int, list[tuple[str, bytes]]] = {rng.randrange(3): [] for _ in range(3)}
        for name, data in rng.sample(sorted(every.items()), len(every)):
            path = raw / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            parts[rng.choice(list(parts))].append((front + name, data))
        for number, part in parts.items():
            try:
                write_tar(sets / f"{number} [x].tar", part, form)
            except ValueError:  # a name that does not fit
                write_tar(sets / f"{number} [x].tar", part)
        found = []
        for source in (str(raw), f"{sets}/*.tar"):
            try:
                listing = list_samples(source, **flags)  # type: ignore[arg-type]
            except InputError as error:
                found.append([str(error).count("\n")])
                continue
            same = [sample[:3] for sample in listing.samples], listing.ignored, listing.skipped
            found.append([*same, packed(listing, len(listing.samples[:3]))])
        assert found[0] == found[1]


def test_reading_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of slow storage, many archives are listed side by side, and members read ahead."""
    source = write_pairs(tmp_path / "source", 400, largest=20_000)
    files = contents(source)
    for number in range(20):
        write_tar(tmp_path / f"{number}.tar", files[number * 40 : number * 40 + 40])
    monkeypatch.setattr(archives, "SLOW_READ", -1)
    monkeypatch.setattr(walk.time, "thread_time", lambda: 0)
    for shuffle in (None, 1):
        listing = list_samples(f"{tmp_path}/*.tar", shuffle=shuffle)
        assert packed(listing) == packed(list_samples(source, shuffle=shuffle))
    touch(tmp_path, "7.tar")
    with pytest.raises(InputError, match=r"7\.tar"):
        list_samples(f"{tmp_path}/*.tar")


def test_neighbours_are_read_at_once() -> None:
    """Never a request for a member where the next one is near."""
    places = [archives.Place(0, n * 70_000, 9_000) for n in range(50)]
    spans = archives._spans(places[::-1], archives.SLOW.gap)
    assert [(span.begin, span.end) for span in spans] == [(0, 49 * 70_000 + 9_000)]
    assert len(archives._spans(places, archives.FAST.gap)) == 50  # a disk reads what is asked for
    apart = [archives.Place(n % 2, n << 20, 10) for n in range(6)]
    assert len(archives._spans(apart, archives.SLOW.gap)) == 6


# ---------------------------------------------------------------- archives of others


@pytest.mark.parametrize(
    "command",
    [
        ["tar", "--format=gnu"],
        ["tar", "--format=pax"],
        ["tar", "--format=ustar"],
        ["bsdtar", "--format=pax"],
        ["bsdtar", "--format=gnutar"],
    ],
    ids=" ".join,
)
def test_archives_of_other_programs(command: list[str], tmp_path: Path) -> None:
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    source = write_pairs(tmp_path / "source", 20)
    long = "n" * (90 if "ustar" in command[1] else 150)
    touch(source, "cats/a.jpg", "cats/a.txt", f"{long}.jpg", f"{long}.txt", "é.jpg", "é.txt")
    names = ["."] if len(command[1]) % 2 else sorted(os.listdir(source))
    subprocess.run([*command, "-cf", tmp_path / "any name.tar", "-C", source, *names], check=True)
    listing = list_samples(tmp_path / "any name.tar")
    assert packed(listing) == packed(list_samples(source)) and not listing.ignored


def test_what_tars_hold_but_folders_do_not(tmp_path: Path) -> None:
    """Hidden names are passed over, as in a folder; paths that lead astray are refused."""
    pair = [("a.jpg", b"1"), ("a.txt", b"2")]
    path = write_tar(
        tmp_path / "a.tar", [*pair, (".b.jpg", b""), ("c/._d.jpg", b""), ("./.e/f.txt", b"")]
    )
    assert [sample.key for sample in list_samples(path).samples] == ["a"]
    for name in ("/b.jpg", "../b.jpg", "c//b.jpg", "c/./b.jpg"):
        write_tar(path, [*pair, (name, b"3")])
        with pytest.raises(InputError, match="unpack them") as refused:
            list_samples(path)
        assert f"{path}: {name}'"[-80:] in str(refused.value)
        assert list_samples(path, skip_bad=True).skipped == {"odd path": 1}


# ---------------------------------------------------------------- refusals


def add_member(kind: bytes) -> Callable[[Path], None]:
    """Return what adds a member of a kind that is not a regular file."""

    def add(path: Path) -> None:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("cats/odd.jpg")
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)

    return add


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: os.truncate(path, 700), "cut short"),
        (lambda path: os.truncate(path, 3_600), "cut short"),
        (lambda path: os.truncate(path, 0), "cut short"),
        (lambda path: path.write_bytes(b"x" * 10_240), "no tar header"),
        (
            lambda path: path.write_bytes(__import__("gzip").compress(path.read_bytes())),
            "compressed",
        ),
        (add_member(tarfile.LNKTYPE), "'cats/odd.jpg' is a hard link"),
        (add_member(tarfile.SYMTYPE), "'cats/odd.jpg' is a link"),
        (add_member(tarfile.GNUTYPE_SPARSE), "'cats/odd.jpg' is a sparse file"),
        (add_member(tarfile.FIFOTYPE), "'cats/odd.jpg' is a FIFO"),
        (add_member(b"V"), "'cats/odd.jpg' is of type V"),
    ],
)
def test_a_damaged_archive(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """All of them are named, in one run, whether bad samples are skipped or not."""
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", bytes(2_000)), (f"{name}.txt", b"")])
    for name in ("a", "c"):
        spoil(tmp_path / f"{name}.tar")
    for flags in ([], ["--skip-bad"]):
        lines = refusal(f"{tmp_path}/*.tar", *flags, output=tmp_path / "o").splitlines()
        assert len(lines) == 2 and all(said in line for line in lines), lines
        assert "a.tar" in lines[0] and "c.tar" in lines[1]


def test_what_is_refused_as_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And named by archive and member, in the report, too."""
    monkeypatch.chdir(tmp_path)
    files = ["cats/7.jpg", "b.2020.jpg", "b.2020.txt", "__d.jpg", "__d.txt", "x.md"]
    write_tar(Path("old/shard-0.tar"), [("a.jpg", b""), ("a.txt", b"")])
    write_tar(Path("old/shard-3.tar"), [(name, b"") for name in files])
    write_tar(Path("old/shard-4.tar"), [("a.jpg", b"")])
    said = refusal("old/*.tar", "--report=bad", output=tmp_path / "o")
    assert "'old/shard-3.tar: cats/7.jpg' has no .txt" in said
    assert "'old/shard-0.tar: a.jpg' and 'old/shard-4.tar: a.jpg'" in said
    assert "old/shard-3.tar: b.2020.jpg" in said and "old/shard-3.tar: __d" in said
    lines = map(json.loads, Path("bad").read_text().splitlines())
    report = {line["name"]: line["reason"] for line in lines}
    assert report["old/shard-3.tar: x.md"] == "ignored"
    assert report["old/shard-3.tar: cats/7.jpg"] == "incomplete"
    assert report["old/shard-4.tar: a.jpg"] == report["old/shard-0.tar: a.txt"] == "doubled"
    write_tar(Path("old/shard-5.tar"), [("e.jpg", b""), ("e.txt", b"")])
    out = pack("old/*.tar", tmp_path / "o", "--skip-bad", "--num-shards=1")
    assert "1 samples" in out and "2 dotted" in out and "1 doubled" in out


def test_archives_twice_in_equal_order(tmp_path: Path) -> None:
    """Each field of each key is there twice, so that all counts agree."""
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("k.jpg", b"1"), ("k.txt", b"2")])
    said = refusal(f"{tmp_path}/*.tar", output=tmp_path / "o")
    assert "a.tar: k.jpg' and " in said and "b.tar: k.jpg'" in said and "1 (" in said


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("none-*.tar", "none-*.tar': No such file"),
        ("{a,none}.tar", "No such file: "),
        ("{a,none-*}.tar", "none-*.tar'"),
        ("{a,b.tar", "its braces do not match"),
        ("{folder,a}.tar", "is not a file"),
        ("http://h/a.tar", "URLs are not supported"),
        ("{s3://b/a,c}.tar", "before the braces"),
        ("{/b/a,c}.tar", "before the braces"),
    ],
)
def test_what_names_no_archive(pattern: str, said: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.txt", b"")])
    (tmp_path / "folder.tar").mkdir()
    done = run_script(
        DRIVERS[0], "--source", pattern, "--output", "o", cwd=tmp_path, env={"PYTHONPATH": ""}
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "o").exists()


def test_a_mix_of_two_sets(tmp_path: Path) -> None:
    """A run was cut short while it moved its shards there: some of them are of the set before."""
    write_tar(tmp_path / "old/a.tar", [("a.jpg", b""), ("a.txt", b"")])
    write_tar(tmp_path / "new/b.tar", [("b.jpg", b""), ("b.txt", b"")])
    touch(tmp_path / "old", f".webdataset-{'0' * 16}/publishing")
    with pytest.raises(PackError, match="publishing was interrupted"):
        list_samples(f"{tmp_path}/{{new,old}}/*.tar")


def test_a_folder_named_like_an_archive(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "raw.tar", 3)
    assert len(list_samples(source).samples) == 3


def test_what_is_said_where_a_pattern_is_meant(tmp_path: Path) -> None:
    """Of a folder of tars, and of a pattern that the shell has expanded."""
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "old" / f"{name}.tar", [(f"{name}.jpg", b""), (f"{name}.txt", b"")])
    assert f'--source "{tmp_path}/old/*.tar"' in refusal(f"{tmp_path}/old", output=tmp_path / "o")
    hint = refusal(str(tmp_path), output=tmp_path / "o")
    assert f'--source "{tmp_path}/old/*.tar"' in hint
    shards = sorted(map(str, (tmp_path / "old").iterdir()))
    for script in (*DRIVERS, "create_webdataset.py", "read_webdataset.py"):
        done = run_script(
            script, "--source", *shards, "--path" if "read" in script else "--output", "o"
        )
        assert done.returncode == 2 and 'quote it: "DIR/*.tar"' in done.stderr


def test_an_output_that_an_archive_lies_in(tmp_path: Path) -> None:
    """Where a flag is wrong, fields would be lost for good."""
    pack_here(write_pairs(tmp_path / "source", 8), tmp_path / "old", 2)
    before = hashes(tmp_path / "old")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.tar").symlink_to(tmp_path / "old/shard-000000.tar")
    (tmp_path / "to-old").symlink_to(tmp_path / "old")
    for pattern in ("old/*.tar", "links/*.tar", "to-old/shard-*.tar", "{new,old}/*1.tar"):
        write_tar(tmp_path / "new/a1.tar", [("a.jpg", b"")])
        listing = list_samples(f"{tmp_path}/{pattern}", fields="jpg")
        for output in ("old", "to-old"):
            for begin in (start, functools.partial(start_direct, shard_ids=range(1))):
                with pytest.raises(InputError, match="would be lost"):
                    begin(listing, output=tmp_path / output, total_shards=1)
    assert (
        "would be lost"
        in run_script(DRIVERS[0], "--source=old/*.tar", "--output=old/", cwd=tmp_path).stderr
    )
    assert hashes(tmp_path / "old") == before and len(os.listdir(tmp_path / "old")) == 2


# ---------------------------------------------------------------- change, kill, memory


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_changed_archive_fails_the_run(
    when: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(write_pairs(tmp_path / "source", 100))
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", files[name == "b" :: 2])
    if slow:
        monkeypatch.setattr(archives, "SLOW_READ", -1)
    listing = list_samples(f"{tmp_path}/*.tar")

    def change(_: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(tmp_path / "b.tar", (1, 1))

    if when == "before":
        change()
    run = start_direct(listing, tmp_path / "o", range(1), 1)
    with pytest.raises(PackError, match=r"b\.tar'"):
        create_webdataset(run, tmp_path / "o", 0, 1, progress=change)
    assert not os.listdir(tmp_path / "o")
    (tmp_path / "b.tar").unlink()
    with pytest.raises(OSError, match=r"b\.tar"):
        create_webdataset(run, tmp_path / "o", 0, 1)


def test_a_changed_archive_in_a_run(tmp_path: Path) -> None:
    """The workers know the archives by the plan."""
    files = contents(write_pairs(tmp_path / "source", 100))
    path = write_tar(tmp_path / "a.tar", files)
    flags = ["--source", "*.tar", "--output", "o", "--num-shards=2"]
    run = run_script("sharding", "start", *flags, cwd=tmp_path).stdout.strip()
    assert run_script("create_webdataset.py", "--run", run, "--shard-id=0").returncode == 0
    write_tar(path, [*files, ("new.jpg", b"")])
    done = run_script("create_webdataset.py", "--run", run, "--shard-id=1")
    assert done.returncode == 1 and f"'{path}' changed while it was packed" in done.stderr


def test_killed_and_run_again(tmp_path: Path) -> None:
    """What was finished is kept, unless an archive of it has changed."""
    source = write_pairs(tmp_path / "source", 300)
    pack_here(source, tmp_path / "old", 3)  # each new shard has samples of one of them
    pack_here(source, tmp_path / "want", 60)
    flags = ["--source", f"{tmp_path}/old/*.tar", "--output", tmp_path / "o", "--num-shards=60"]
    process = start_packing(*flags, "--num-workers=1")
    assert process.stdout and [process.stdout.readline() for _ in range(5)][-1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.utime(tmp_path / "old/shard-000001.tar", (1, 1))
    said = run_script(DRIVERS[0], *flags).stdout.splitlines()
    again, kept = (
        {int(line.split()[1]) % 3 for line in said if how in line}
        for how in ("created again", "kept with")
    )
    assert again == {1} and kept and 1 not in kept, said
    assert hashes(tmp_path / "o") == hashes(tmp_path / "want")


def test_a_proof_finds_a_changed_byte(tmp_path: Path, capfd) -> None:
    source = write_pairs(tmp_path / "source", 12)
    (source / "large.jpg").write_bytes(os.urandom(2 << 20))
    (source / "large.txt").touch()
    pack_here(source, tmp_path / "old", 2)
    pack_here(f"{tmp_path}/old/*.tar", tmp_path / "new", 3)
    flags = ["--path", f"{tmp_path}/new", "--source", f"{tmp_path}/old/*.tar", "--quiet"]
    assert read([*flags, "--decode"]) == 1  # random bytes are no pictures
    capfd.readouterr()
    name, data = next((n, d) for n, d in members(tmp_path / "new/shard-000000.tar").items() if d)
    shard = tmp_path / "new/shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(data, bytes(len(data))))
    assert read(flags) == 1
    assert f"bytes differ from the source: shard-000000.tar: '{name}'" in capfd.readouterr().err
    shard.unlink()
    assert read(flags) == 1


@pytest.mark.parametrize("order", ["side by side", "joined", "joined in disorder"])
def test_memory_of_a_listing(order: str, tmp_path: Path) -> None:
    count = 10_000
    keys = [f"folder/sample-{n:08d}" for n in range(count)]
    for number, fields in enumerate((("jpg",), ("txt",)) if "j" in order else (("jpg", "txt"),)):
        if number and "disorder" in order:
            random.Random(1).shuffle(keys)
        with (tmp_path / f"{number}.tar").open("wb") as stream, FastTarWriter(stream) as tar:
            for key in keys:
                tar.write({"__key__": key, **dict.fromkeys(fields, b"x")})
    list_samples(tmp_path / "0.tar", "jpg")
    tracemalloc.start()
    try:
        listing = list_samples(f"{tmp_path}/*.tar")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing.samples) == count and peak < 300 * count + (1 << 20)


def test_a_large_member_is_never_in_memory(tmp_path: Path) -> None:
    """Sparse on the disk; what would be packed is only counted."""
    path = tmp_path / "a.tar"
    header = tarfile.TarInfo("a.jpg")
    header.size = 256 << 20
    with path.open("wb") as stream:
        stream.write(header.tobuf())
        stream.seek(header.size, os.SEEK_CUR)
        stream.write(tarfile.TarInfo("a.txt").tobuf())
        stream.write(bytes(10_240))
    out = Count()
    tracemalloc.start()
    try:
        listing = list_samples(path)
        write_samples(out, listing.source, listing.samples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.size > 256 << 20 and peak < 8 << 20


# ---------------------------------------------------------------- buckets


def test_bucket_to_bucket(bucket: Bucket, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 60)
    (source / "large.jpg").write_bytes(os.urandom(11 << 20))
    (source / "large.txt").touch()
    pack_here(source, tmp_path / "old", 4)
    pack_here(source, tmp_path / "want", 7, shuffle=2)
    url, new = bucket.upload(tmp_path / "old", "old/"), f"{bucket.url}/new"
    braces, flags = f"{url}/shard-{{000000..000003}}.tar", ["--num-shards=7", "--shuffle=2"]
    done = run_script(DRIVERS[0], "--source", braces, "--output", new, *flags)
    assert done.returncode == 0, done.stderr
    assert bucket.hashes("new") == hashes(tmp_path / "want")
    command = ["--path", new, "--source", braces, "--shuffle=2", "--quiet"]
    assert run_script("read_webdataset.py", *command, "--num-workers=2").returncode == 0
    listing = list_samples(f"{url}/shard-*.tar", shuffle=2)
    assert [sample.key for sample in listing.samples] == [
        sample.key for sample in list_samples(source, shuffle=2).samples
    ]
    with pytest.raises(InputError, match="would be lost"):
        start(listing, output=f"{url}/", total_shards=1)
    for pattern, said in (
        (f"{bucket.url}/o*/shard-000000.tar", "a pattern is the last part alone"),
        (f"{url}/shard-00000{{0,9}}.tar", "No such file: "),
        (f"{url}/none-*.tar", "No such file"),
    ):
        with pytest.raises(InputError, match=said):
            list_samples(pattern)
    bucket.put("old/.webdataset-plan", b"{}")
    with pytest.raises(PackError, match="a run is not finished"):
        list_samples(f"{url}/shard-*.tar")


def test_a_changed_archive_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    files = contents(write_pairs(tmp_path / "source", 50))
    write_tar(tmp_path / "old/a.tar", files)
    url = bucket.upload(tmp_path / "old", "old/")
    listing = list_samples(f"{url}/a.tar")
    bucket.put("old/a.tar", (tmp_path / "old/a.tar").read_bytes()[:-1] + b"x")
    run = start_direct(listing, tmp_path / "o", range(1), 1)
    with pytest.raises(PackError, match=r"a\.tar' changed"):
        create_webdataset(run, tmp_path / "o", 0, 1)
    with pytest.raises(InputError, match="trailing garbage"):
        list_samples(f"{url}/a.tar")
