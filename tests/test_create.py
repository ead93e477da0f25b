"""The core: what is refused, how samples become shards, and that bytes in are bytes out."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import webdataset as wds
from conftest import hashes, members, run_script, touch, write_pairs

import create_webdataset as core
from sharding import __main__ as steps
from sharding.errors import InputError
from sharding.listing import list_samples
from sharding.samples import Sample
from sharding.shards import shard_name, shard_number


def pack(source: Path, output: Path, *flags: str, total: int = 1) -> int:
    """Pack all shards of a source in this process."""
    argv = ["--source", str(source), "--output", str(output), "--total-shards", str(total)]
    return core.main([*argv, "--shard-id", "0", "--shard-step", "1", *flags])


def fifo(folder: Path) -> None:
    touch(folder, "a.txt")
    os.mkfifo(folder / "a.jpg")


def dangling(folder: Path) -> None:
    touch(folder, "a.txt")
    (folder / "a.jpg").symlink_to("nowhere")


def circle(folder: Path) -> None:
    touch(folder, "a.txt")
    (folder / "a.jpg").symlink_to("a.jpg")


def listener(folder: Path) -> None:
    touch(folder, "a.txt")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path must be short
        server.bind("a.jpg")
        os.chdir(here)


def files(*names: str):
    return lambda folder: touch(folder, *names)


PAIR = files("a.jpg", "a.txt")
REFUSED = [
    # what the source holds, flags, what the message says
    (lambda folder: folder.rmdir(), [], "No such file"),
    (lambda folder: (folder.rmdir(), folder.write_text("x")), [], "Not a directory"),
    (files(), [], "make_dummy_data.sh"),
    (files(".hidden.jpg", ".hidden.txt"), [], "make_dummy_data.sh"),
    (files("a.png", "notes"), [], "sample-0.jpg .+ sample-0.txt"),
    (
        files("a.jpg", "a.txt", "b.jpg"),
        [],
        "lack a field: 1 .'b.jpg' has no .txt.*; --skip-bad drops them",
    ),
    (
        files(*(f"{n}.txt" for n in range(7))),
        [],
        "lack a field: 7 .'0.txt' has no .jpg, .* '4.txt' has no .jpg.; add it",
    ),
    (files("a.txt", "b.txt"), ["--skip-bad"], "no complete sample.*skipped: 2 incomplete"),
    (files("a.jpg", "b.txt", "d/a.txt"), [], "lack a field: 3"),
    (
        files("a.jpg", "a.txt", "a.jpg.d/x"),
        ["--fields", "jpg,txt,cls"],
        "lack a field: 1 .'a.jpg' has no .cls.",
    ),
    (
        files(*(f"{n}.{field}" for n in range(6) for field in ("jpeg", "txt"))),
        [],
        r"6 .'0.txt' has no .jpg, .*; .jpeg files are there .6.: --fields .jpeg,txt.[?]",
    ),
    (
        files("a.jpg", "a.txt", "b.jpeg", "b.txt", "c.heic", "c.txt", "d.png", "d.caption"),
        [],
        r".heic and .jpeg files are there .1, 1.: --fields .jpg;heic;jpeg,txt.[?];",
    ),
    (  # a picture is no caption
        files("a.jpg", "a.txt", "b.jpg", "c.heic"),
        [],
        r"1 .'b.jpg' has no .txt.; add it, or give other --fields or --optional-fields; "
        "also there: 1 .heic; --skip",
    ),
    (
        files("a.jpeg", "a.caption", "b.png", "b.caption"),
        [],
        r"no complete sample.*; .jpeg and .png and .caption files are there .1, 1, 2.: "
        r"--fields .jpeg;png,caption.[?]; ignored:",
    ),
    (
        files(*(f"{n:04d}.jpg" for n in range(1_500))),
        [],
        "lack a field: 1,500 .'0000.jpg' has no .txt, .* '0004.jpg' has no .txt.; add it",
    ),
    (fifo, [], "lack a field: 1 .'a.jpg' is not a regular file."),
    (dangling, [], "reached, .*: 1 .'a.jpg' is a link to 'nowhere': No such file or directory."),
    (
        circle,
        [],
        "reached, .*: 1 .'a.jpg' is a link to 'a.jpg': Too many levels of symb.* links.",
    ),
    (listener, [], "lack a field: 1 .'a.jpg' is not a regular file."),
    (files("a.txt", "a.jpg/x"), [], "lack a field: 1 .'a.txt' has no .jpg."),
    (files("photo.2020.jpg", "photo.2020.txt"), [], "dot before the field.*'photo.2020.jpg'"),
    (files("a.jpg", "a.txt", "b/a.b.JPG"), [], "dot before the field.*'b/a.b.JPG'"),
    (files("a.jpg.jpg", "a.jpg", "a.txt"), [], "dot before the field"),
    (files("__a.jpg", "__a.txt"), [], "begin with __, .*'__a'"),
    (files("d/__a.jpg", "d/__a.txt"), [], "begin with __, .*'d/__a'"),
    (files("__d__/a.jpg", "__d__/a.txt"), [], "begin with __, .*'__d__/a'"),
    (
        files("a.JPG", "a.jpg", "a.txt"),
        [],
        "in upper or lower case: 1 .'a.(JPG|jpg)' and 'a.(JPG|jpg)'.",
    ),
    (files("a.jpg", "a.txt", "b\udcff.jpg", "b\udcff.txt"), [], "not UTF-8"),
    (files("d\udcff/a.jpg", "d\udcff/a.txt"), [], "not UTF-8"),
    (files("d.e\nf/a.jpg", "d.e\nf/a.txt"), [], r"hold a newline: 1 .'d.e\\nf/a'."),
    (files("a\nb.jpg", "a\nb.txt"), [], "hold a newline"),
    (PAIR, ["--fields", ""], "cannot be a field"),
    (PAIR, ["--fields", "jpg,"], "cannot be a field"),
    (PAIR, ["--fields", "jpg,jpg"], "twice"),
    (PAIR, ["--fields", "jpg,JPG"], "twice"),
    (PAIR, ["--fields", "a/b"], "cannot be a field"),
    (PAIR, ["--fields", "jpg, txt"], "cannot be a field"),
    (PAIR, ["--fields", "jpg\n"], "cannot be a field"),
    (PAIR, ["--fields", "_jpg"], "cannot be a field"),
    (PAIR, ["--fields", ".jpg"], "cannot be a field"),
    (PAIR, ["--total-shards", "0"], "0 is not a number from 1"),
    (PAIR, ["--total-shards", "-1"], "-1 is not a number from 1"),
    (PAIR, ["--total-shards", "1000001"], "not a number from 1 to 1,000,000"),
    (PAIR, ["--total-shards", "2"], "2 shards for 1 sample:"),
    (PAIR, ["--total-shards", "x"], "invalid number"),
    (PAIR, ["--sourc", "x"], "unrecognized arguments"),
]
SHARD_IDS = [  # a start has none
    (PAIR, ["--shard-id", "1"], "outside 0 to 0"),
    (PAIR, ["--shard-id", "-1"], "outside 0 to 0"),
    (PAIR, ["--shard-step", "0"], "--shard-step"),
]


@pytest.mark.parametrize(
    ("step", "make", "flags", "message"),
    [
        pytest.param(step, *row, id=f"{step}: {row[2]}")
        for step, rows in (("pack", REFUSED + SHARD_IDS), ("start", REFUSED))
        for row in rows
    ],
)
def test_refused(step: str, make, flags: list[str], message: str, tmp_path: Path, capfd) -> None:
    source, output = tmp_path / "source", tmp_path / "new" / "output"
    source.mkdir()
    make(source)
    if step == "start":
        flags = [flag.replace("--total-shards", "--num-shards") for flag in flags]
        start = ["start", f"--source={source}", f"--output={output}"]
        assert steps.main([*start, "--num-shards=1", *flags]) == 2
    else:
        assert pack(source, output, *flags) == 2
    out, err = capfd.readouterr()
    assert not out
    assert re.search(message, err) and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("total", [-1, 0, 1_000_001])
def test_a_call_with_a_wrong_number_of_shards(total: int, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 2)
    with pytest.raises(InputError, match="choose a number"):
        core.create_webdataset(source, tmp_path / "output", 0, total)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("flag", ["--source=s", "--output=o", "--total-shards=1"])
def test_a_run_has_a_plan(flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["--run", str(tmp_path), "--shard-id=0", flag]) == 2
    assert "--run names a run that is planned already: leave out" in capfd.readouterr().err


@pytest.mark.parametrize("step", [[], ["stop"], ["publish"]])
def test_steps_of_a_run(step: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert steps.main(step) == 2
    err = capfd.readouterr().err
    assert err.startswith("sharding: error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("missing", ["--source", "--output", "--total-shards", "--shard-id"])
def test_required_flags(missing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = {"--source": str(tmp_path), "--output": "o", "--total-shards": "1", "--shard-id": "0"}
    del flags[missing]
    assert core.main([part for pair in flags.items() for part in pair]) == 2
    assert f"{missing} is required" in capfd.readouterr().err


ODD_NAMES = [
    "with space", "quote'\"", "#", "?", ";", "{a,b}", "{0,1}{2}", "a::b", "~", "$HOME",
    "-rf", "naïve", "日本語", "👍🏽",
    "x" * 180, "é" * 100, "a:b", "run:1", "%41", "\\", "*", "\x01\x7f",
    "..a/..b/c", "a.b/c.d/e", "folder.jpg/x", "UPPER", "a/b/c/d/e/f", "__almost", "e\u0301",
]  # fmt: skip


def test_odd_names_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that shells, URLs, glob or tar treat in a special way are names like any other."""
    source = tmp_path / "source"
    keys = sorted(
        (name for name in ODD_NAMES if not name.startswith(("__", ".."))),
        key=lambda key: key.encode(),
    )
    for key in keys:
        touch(source, f"{key}.jpg", f"{key}.TxT")
    assert pack(source, tmp_path / "output", total=3) == 0
    expected = {f"{key}.{field}": None for key in keys for field in ("jpg", "txt")}
    found: dict[str, bytes] = {}
    for shard_id in range(3):
        shard = tmp_path / "output" / shard_name(shard_id)
        content = members(shard)
        assert list(content) == [
            f"{key}.{field}" for key in keys[shard_id::3] for field in ("jpg", "txt")
        ]
        found |= content
        monkeypatch.chdir(shard.parent)
        dataset = wds.WebDataset([shard.name], shardshuffle=False)
        assert [sample["__key__"] for sample in dataset] == keys[shard_id::3]
    assert found.keys() == expected.keys()
    for name, data in found.items():
        stem, _, extension = name.rpartition(".")
        assert data.decode() == f"{stem}.{'TxT' if extension == 'txt' else extension}"


@pytest.mark.parametrize("name", ["with 'quotes\" $(x)", "a#b?c;d", "run:1", "{0..3}", "ü", "x::y"])
def test_odd_output_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path / "source", 5)
    monkeypatch.chdir(tmp_path)
    assert pack(source, Path(name) / "deeper", total=2) == 0
    assert sorted(os.listdir(Path(name) / "deeper")) == ["shard-000000.tar", "shard-000001.tar"]


def test_modulo_worked_example(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten samples in four shards: sorted by key, sample i goes to shard i % 4."""
    source = write_pairs(tmp_path / "source", 10)
    assert pack(source, tmp_path / "output", total=4) == 0
    shards = [list(members(path)) for path in sorted((tmp_path / "output").iterdir())]
    assert [[name[7:-4] for name in names[::2]] for names in shards] == [
        ["0", "4", "8"],
        ["1", "5", "9"],
        ["2", "6"],
        ["3", "7"],
    ]
    assert capfd.readouterr().out.splitlines() == [
        "Shard 0 created with 3 samples.",
        "Shard 1 created with 3 samples.",
        "Shard 2 created with 2 samples.",
        "Shard 3 created with 2 samples.",
    ]


@pytest.mark.parametrize("shard_id", [0, 7, 999_999])
def test_a_name_gives_its_number_back(shard_id: int) -> None:
    assert shard_number(f"folder/{shard_name(shard_id)}") == shard_id


def test_function_returns_what_it_did(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 5)
    shard = core.create_webdataset(source, tmp_path / "output", 1, 2)
    assert (shard.shard_id, shard.samples, shard.how) == (1, 2, "created")
    assert shard.bytes == (tmp_path / "output" / "shard-000001.tar").stat().st_size
    with pytest.raises(InputError):
        core.create_webdataset(source, tmp_path / "output", 2, 2)


def test_union_is_the_source(source_1003: Path, tmp_path: Path) -> None:
    """Nothing lost, nothing doubled, sizes within one; and system tar gives the files back."""
    assert pack(source_1003, tmp_path / "output", total=5) == 0
    shards = sorted((tmp_path / "output").iterdir())
    counts = [len(members(shard)) // 2 for shard in shards]
    assert sum(counts) == 1_003 and max(counts) - min(counts) <= 1
    (tmp_path / "back").mkdir()
    for shard in shards:
        subprocess.run(["tar", "-xf", shard, "-C", tmp_path / "back"], check=True)
    assert hashes(tmp_path / "back") == hashes(source_1003)


def test_same_bytes_as_webdataset(source_1003: Path, tmp_path: Path) -> None:
    shard = core.create_webdataset(source_1003, tmp_path, 3, 7)
    keys = sorted(path.stem for path in source_1003.glob("*.jpg"))[3::7]
    expected = io.BytesIO()
    with wds.TarWriter(expected, encoder=False, mtime=0) as sink:
        for key in keys:
            data = {
                field: (source_1003 / f"{key}.{field}").read_bytes() for field in ("jpg", "txt")
            }
            sink.write({"__key__": key, **data})
    assert (tmp_path / "shard-000003.tar").read_bytes() == expected.getvalue()
    assert shard.samples == len(keys)


def test_a_shard_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named, with its file; the others are packed; the exit code is 1."""
    source = write_pairs(tmp_path / "source", 4)
    (source / "sample-1.jpg").unlink()
    (source / "sample-1.jpg").symlink_to("/proc/self/mem")  # its read gives EIO
    assert pack(source, tmp_path / "o", total=4) == 1
    out, err = capfd.readouterr()
    assert err == f"Shard 1 failed: '{source}/sample-1.jpg': Input/output error\n"
    assert out.count("created with 1 samples") == 3
    assert sorted(os.listdir(tmp_path / "o")) == [shard_name(shard_id) for shard_id in (0, 2, 3)]


def test_fields_and_incomplete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    touch(source, "a.seg.PNG", "a.json", "b.json", "c.seg.png", "c.json", "d.txt")
    assert pack(source, tmp_path / "o", "--fields", "seg.png,json", "--skip-bad") == 0
    assert list(members(tmp_path / "o" / "shard-000000.tar")) == [
        "a.json",
        "a.seg.png",
        "c.json",
        "c.seg.png",
    ]
    listing = list_samples(source, ("json", "seg.png"), skip_bad=True)
    assert listing.samples == [
        Sample("a", "a", ("json", "seg.PNG")),
        Sample("c", "c", ("json", "seg.png")),
    ]
    assert (listing.skipped, listing.ignored) == ({"incomplete": 1}, {".txt": 1})


def test_links_to_files_are_files(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    touch(source, "a.txt", "d/b.txt", "d/b.jpg")
    touch(elsewhere, "picture")
    (source / "a.jpg").symlink_to(elsewhere / "picture")
    assert pack(source, tmp_path / "o") == 0
    content = members(tmp_path / "o" / "shard-000000.tar")
    assert list(content) == ["a.jpg", "a.txt", "d/b.jpg", "d/b.txt"]
    assert content["a.jpg"] == b"picture"


def test_two_runs_same_bytes(source_1003: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert pack(source_1003, tmp_path / name, "--shuffle", "3", total=4) == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_other_files_in_output_stay(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "output"
    touch(output, "keep.me", "shard-1.tar", "shard-000000.tar.gz", "sub/shard-000000.tar")
    before = hashes(output)
    assert pack(source, output, total=2) == 0
    after = hashes(output)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"shard-000000.tar", "shard-000001.tar"}


def test_a_shard_of_a_smaller_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Beside shards of a larger one, it would make samples occur twice, and others never."""
    source, output = write_pairs(tmp_path / "source", 9), tmp_path / "output"
    assert pack(source, output, total=4) == 0 and not capfd.readouterr().err
    assert pack(source, output, total=3) == 0
    warning = f"{str(output)!r} also holds 'shard-000003.tar', of a dataset with more than 3 shards"
    assert warning in capfd.readouterr().err


def test_mode_follows_umask(tmp_path: Path) -> None:
    source, before = write_pairs(tmp_path / "source", 1), os.umask(0o027)
    try:
        assert pack(source, tmp_path / "output") == 0
    finally:
        os.umask(before)
    assert (tmp_path / "output" / "shard-000000.tar").stat().st_mode & 0o777 == 0o640


def test_as_a_script(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3)
    flags = ["--source", source, "--output", tmp_path / "o", "--shard-id=1", "--total-shards=2"]
    done = run_script("create_webdataset.py", *flags)
    assert (done.returncode, done.stdout) == (0, "Shard 1 created with 1 samples.\n"), done.stderr
    assert run_script("create_webdataset.py", "--help").returncode == 0


def test_a_warning_names_flags(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "o"
    flags = ["--source", source, "--output", output, "--shard-id=0"]
    for total in ("4", "2"):
        step = [f"--total-shards={total}", "--shard-step=1"]
        done = run_script("create_webdataset.py", *flags, *step)
    assert done.returncode == 0 and "warning: " in done.stderr
    assert "give the same --total-shards, or delete it\n" in done.stderr
    assert "\0" not in done.stderr and "\\x00" not in done.stderr
