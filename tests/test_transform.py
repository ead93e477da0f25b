"""A user's function on each sample: same bytes from any driver; what goes wrong, in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import webdataset as wds
from conftest import (
    MOSTLY_BASH,
    Bucket,
    hashes,
    members,
    pack_shard_of,
    run_script,
    start_packing,
    write_pairs,
)

from create_webdataset import create_webdataset
from sharding.__main__ import main as start_main
from sharding.archive import FastTarWriter
from sharding.batch import Batch
from sharding.errors import InputError, PackError
from sharding.listing import list_samples
from sharding.messages import explain
from sharding.places import dataset_at
from sharding.record import RECORD
from sharding.run import Run, load, start
from sharding.samples import Samples
from sharding.shards import shard_name
from sharding.transform import (
    AHEAD_BYTES,
    FILE_BYTES,
    load_function,
    read_function,
    transformed,
)

# Bytes in, bytes out, so that a plain loop can do the same; a third is dropped.
TEXT = """
import sys
from beside import MARK  # a neighbour
print("loaded", file=sys.stderr)

def change(sample):
    assert list(sample) == ["__key__", "jpg", "txt"] and type(sample["jpg"]) is bytes
    print("seen", sample["__key__"])
    number = int(sample["__key__"].split("-")[-1])
    if number % 3 == 0:
        return None
    return {"seg.png": sample["jpg"][::-1], "cls": b"%d" % number, "mark": MARK}
"""


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A source of 40 samples, some of their files large; an output; the file of a function."""
    source = write_pairs(tmp_path / "source", 40)
    for number in (1, 2, 3, 11, 20):
        (source / f"sample-{number}.jpg").write_bytes(os.urandom(700_000 + number))
    (tmp_path / "beside.py").write_text("MARK = b'of beside.py'\n")
    (tmp_path / "own.py").write_text(TEXT)
    return source, tmp_path / "o", tmp_path / "own.py"


def plain_loop(
    source: Path, output: Path, call: Callable[[dict[str, Any]], Any], total: int, encoder: bool
) -> dict[str, str]:
    """Pack with webdataset alone, and return the hashes of the shards."""
    output.mkdir()
    keys = sorted(path.stem for path in source.glob("*.jpg"))
    for shard_id in range(total):
        with (
            open(output / shard_name(shard_id), "wb") as stream,
            wds.TarWriter(stream, encoder=encoder, mtime=0) as sink,
        ):
            for key in keys[shard_id::total]:
                files = {f: (source / f"{key}.{f}").read_bytes() for f in ("jpg", "txt")}
                if result := call({"__key__": key, **files}):
                    sink.write({**result, "__key__": key})
    return hashes(output)


def flags_of(place: tuple[Path, Path, Path], *more: str, name: str = "change") -> list[str]:
    source, output, file = place
    spec = f"--transform={file}:{name}"
    flags = ["--num-workers=2", "--num-shards=4", spec, *more]
    return ["--source", str(source), "--output", str(output), *flags]


def array_job(*flags: str) -> subprocess.CompletedProcess[str]:
    began = run_script("sharding", "start", *flags)
    run = began.stdout.strip()
    assert began.stdout.count("\n") == 1 and Path(run).is_dir(), "stdout is a protocol"
    for shard_id in range(4):
        done = run_script("create_webdataset.py", "--run", run, f"--shard-id={shard_id}")
        assert done.returncode == 0, done
    return run_script("sharding", "publish", "--run", run)


def in_python(*flags: str) -> subprocess.CompletedProcess[str]:
    source, output, (file, name) = flags[1], flags[3], flags[6].split("=")[1].rsplit(":", 1)
    call = load_function(read_function(f"{file}:{name}"))
    for shard_id in range(4):
        create_webdataset(source, output, shard_id, 4, transform=call)
    return subprocess.CompletedProcess([], 0, "", "")


def spec_in_python(*flags: str) -> subprocess.CompletedProcess[str]:
    for shard_id in range(4):
        create_webdataset(flags[1], flags[3], shard_id, 4, transform=flags[6].split("=")[1])
    return subprocess.CompletedProcess([], 0, "", "")


def by_one_command(*flags: str) -> subprocess.CompletedProcess[str]:
    numbers = ["--shard-id=0", "--total-shards=4", "--shard-step=1"]
    return run_script("create_webdataset.py", *flags[:4], flags[6], *numbers)


WAYS: dict[str, Callable[..., subprocess.CompletedProcess[str]]] = {
    "bash": lambda *flags: run_script("run_parallel.sh", *flags),
    "ray": lambda *flags: run_script("create_with_ray.py", *flags),
    "array job": array_job,
    "python": in_python,
    "python, by name": spec_in_python,
    "one command": by_one_command,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_of_a_plain_loop(way: str, place, tmp_path: Path) -> None:
    """From any driver; what is dropped keeps its place in the deal, and is counted."""
    source, output, file = place
    call = load_function(read_function(f"{file}:change"))
    expected = plain_loop(source, tmp_path / "plain", call, 4, encoder=False)
    done = WAYS[way](*flags_of(place))
    assert done.returncode == 0 and hashes(output) == expected, done
    if way == "one command":
        assert done.stdout.endswith("\n14 dropped by change\n"), done
    elif "python" not in way:
        assert "26 samples in 4 shards, " in done.stdout, done
        assert done.stdout.endswith(" s; 14 dropped by change\n"), done
    if way in ("bash", "ray"):  # what was packed, not what was dealt
        packed = [len(members(output / shard_name(n))) // 3 for n in range(4)]
        assert sum(packed) == 26 and len(set(packed)) > 1
        for shard_id, number in enumerate(packed):
            assert f"Shard {shard_id} created with {number} samples.\n" in done.stdout, done
    if way in ("bash", "ray", "array job"):
        leave((source, tmp_path / "o2", file), (0, 1, 2, 3)).finish()
        assert (output / RECORD).read_bytes() == (tmp_path / "o2" / RECORD).read_bytes()
    assert "seen" not in done.stdout
    if way in ("bash", "one command"):
        assert done.stderr.count("seen ") == 41, "one call in preflight, then one a sample"
        assert done.stderr.count("loaded") == (3 if way == "bash" else 2), "once a process"


def test_values_are_encoded_as_webdataset_does(place, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    def call(sample: dict[str, Any]) -> dict[str, Any]:
        picture = Image.new("RGB", (8, 8), "red")
        number = int(sample["__key__"].split("-")[-1])
        return {
            "__key__": sample["__key__"],
            **{"jpg": picture, "jpeg": picture, "png": picture, "seg.png": np.zeros((4, 4), "f")},
            **{"cls": number, "index": np.int64(3), "txt": "é\n", "json": {"é": [1, None]}},
            **{"npy": np.arange(3), "npz": {"a": np.ones(2)}, "pyd": (1, "a"), "mp": {"b": 2}},
            **{
                "ten": [np.ones(2, "float32")],
                "bin": bytearray(b"abc"),
                "raw.gz": b"left as it is",
            },
        }

    def plain(sample: dict[str, Any]) -> dict[str, Any]:
        return {k: bytes(v) if k == "bin" else v for k, v in call(sample).items() if k != "raw.gz"}

    expected = plain_loop(place[0], tmp_path / "plain", plain, 1, encoder=True)
    with_gz, wanted = call, plain

    def without_gz(sample: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in with_gz(sample).items() if k in wanted(sample)}

    create_webdataset(place[0], place[1], 0, 1, transform=without_gz)
    assert hashes(place[1]) == expected
    create_webdataset(place[0], place[1], 0, 1, transform=call)
    assert members(place[1] / shard_name(0))["sample-0.raw.gz"] == b"left as it is"


def test_what_is_compressed_holds_no_time(place, monkeypatch) -> None:
    """As webdataset's own encoder lets it; so no second run would give the same bytes."""

    def call(_: dict[str, Any]) -> dict[str, Any]:
        return {"txt.gz": "a" * 99}

    found = []
    for now in (1e9, 1.5e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        create_webdataset(place[0], place[1], 0, 1, transform=call)
        found.append(hashes(place[1]))
    assert found[0] == found[1]


def test_bytes_need_no_package(place) -> None:
    """webdataset is imported for what must be encoded alone."""
    for name in ("numpy", "torch", "webdataset", "PIL", "obstore"):
        (place[2].parent / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    environment = {"PYTHONPATH": str(place[2].parent)}
    done = run_script("run_parallel.sh", *flags_of(place), env=environment)
    assert done.returncode == 0, done
    place[2].write_text("def change(sample):\n    return {'cls': 7}\n")
    done = run_script("run_parallel.sh", *flags_of(place), env=environment)
    assert done.returncode == 2 and "SystemExit: webdataset was imported" in done.stderr, done


class Watched:
    """A large content that takes its time, and notes what is read and not used yet."""

    read: ClassVar[list[int]] = []

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size

    def pieces(self, _: memoryview) -> Iterator[memoryview]:
        """Yield the content."""
        time.sleep(0.02)
        self.read.append(self.number)
        yield memoryview(bytes(self.size))


@pytest.mark.parametrize("size", [1 << 10, 8 << 20])
def test_reading_goes_on_while_the_function_runs(size: int) -> None:
    """Large contents are read ahead, in order, and no more of them than fit the bound."""
    count, most = 60, 0
    samples = Samples([str(n) for n in range(count)], ("jpg",))
    batches = (Batch(1, [f"{n}.jpg"], [Watched(n, size)], [0, 0]) for n in range(count))
    Watched.read.clear()
    seen = []

    def call(sample: dict[str, Any]) -> dict[str, Any]:
        nonlocal most
        seen.append(int(sample["__key__"]))
        most = max(most, len(Watched.read) - len(seen))
        time.sleep(0.02)
        return {"txt": b""}

    began = time.monotonic()
    names = [name for batch in transformed(batches, samples, call) for name in batch.names]
    assert names == [f"{n}.txt" for n in range(count)] and seen == list(range(count))
    if size < FILE_BYTES:  # else the time goes into copies
        assert time.monotonic() - began < 0.85 * count * 0.04, "it read or worked, but not both"
    assert 1 <= most <= max(AHEAD_BYTES // size if size > FILE_BYTES else 64, 1)


def test_a_large_file_that_changes(place) -> None:
    """As without a function."""
    source, output, _ = place

    def call(sample: dict[str, Any]) -> dict[str, Any]:
        (source / "sample-1.jpg").write_bytes(bytes(800_000))
        return sample

    (source / "sample-0.jpg").write_bytes(bytes(70 << 20))  # so that the other one has to wait
    with pytest.raises((PackError, OSError), match=r"sample-1.jpg' changed while it was packed"):
        create_webdataset(source, output, 0, 1, transform=call)
    assert not list(output.glob("*.tar"))


def test_a_run_needs_a_file(place) -> None:
    listing = list_samples(place[0], transform=lambda sample: sample)
    with pytest.raises(InputError, match="a run takes its transform as FILE"):
        start(listing, output=place[1], total_shards=4)
    assert not place[1].exists()


# ---------------------------------------------------------------- what is refused


REFUSED = [
    # the text of own.py, the name, what is said
    (None, "change", "own.py': No such file or directory"),
    ("def change(sample:\n", "change", r"own.py', line 1: SyntaxError: '\(' was never closed"),
    ("# coding: nonsense\n", "change", r"own.py', line 1: SyntaxError: unknown encoding"),
    (b"x = '\xff'\n", "change", r"own.py', line 1: SyntaxError: invalid or missing encoding"),
    ("x = 1\n", "x", "own.py' has no function 'x'"),
    ("x = 1\n", "change", "own.py' has no function 'change'"),
    ("x = 1\n", "ch ange", "ch ange': give FILE.py:FUNCTION"),
    ("\nimport not_there\n", "change", "own.py', line 2: ModuleNotFoundError: No module named"),
    ("\n\nraise SystemExit(3)\n", "change", "own.py', line 3: SystemExit: 3"),
    ("import os\nos._exit(3)\n", "change", "change ended its process .* .exit code 3."),
    ("import os\nos._exit(0)\n", "change", "change ended its process .* .exit code 0."),
    ("import os\nos.kill(os.getpid(), 9)\n", "change", "ended its process .* .killed by signal 9."),
    (
        "def change(sample):\n    return deeper(sample)\ndef deeper(s):\n    return s['png']\n",
        "change",
        "sample 'sample-0': '.*own.py', line 4: KeyError: 'png'",
    ),
    (
        "import json\ndef change(sample):\n    return json.loads(b'[')\n",
        "change",
        "'sample-0': '.*own.py', line 3: JSONDecodeError: .*",
    ),
    (
        "def change(sample):\n    return [sample]\n",
        "change",
        "line 1: change returned a list; return a dict of fields, or None to drop the sample",
    ),
]


def assert_refused(done: tuple[int, str, str], said: str, output: Path) -> None:
    """Exit 2, one line that names the file, and nothing is written."""
    code, out, err = done
    assert (code, out, err.count("\n")) == (2, "", 1), done
    assert_matches(said, err)
    assert not output.exists()


@pytest.mark.parametrize(("text", "name", "said"), REFUSED)
def test_preflight(text: str | bytes | None, name: str, said: str, place, capfd) -> None:
    file: Path = place[2]
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    code = start_main(["start", *flags_of(place, name=name)])
    assert_refused((code, *capfd.readouterr()), said, place[1])


@pytest.mark.parametrize("script", ["run_parallel.sh", "create_webdataset.py"])
def test_preflight_of_each_script(script: str, place) -> None:
    place[2].write_text("def change(sample):\n    return sample['png']\n")
    flags = flags_of(place)
    if script == "create_webdataset.py":
        flags = [*flags[:4], flags[6], "--shard-id=0", "--total-shards=4"]
    done = run_script(script, *flags)
    said = "sample 'sample-0': '.*own.py', line 2: KeyError: 'png'"
    assert_refused((done.returncode, done.stdout, done.stderr), said, place[1])


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_preflight_may_drop_and_print(place) -> None:
    """None is fine for the first sample; what is printed, by whatever means, is no protocol."""
    place[2].write_text(
        "import os\n"
        "def change(sample):\n"
        "    print('a line\\0another')\n"
        "    os.system('echo a shell')\n"
        "    return sample if sample['__key__'] > 'sample-0' else None\n"
    )
    done = run_script("run_parallel.sh", *flags_of(place))
    assert done.returncode == 0 and "\n39 samples in 4 shards" in done.stdout, done
    assert "line" not in done.stdout and "shell" not in done.stdout, done
    assert done.stderr.count("a line") == done.stderr.count("a shell") == 41
    done = run_script(
        "read_webdataset.py",
        "--path",
        place[1],
        "--source",
        place[0],
        "--quiet",
        flags_of(place)[6],
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done


def numbered(source: Path, shard_id: int, total: int, place_in_shard: int) -> str:
    return sorted(path.stem for path in source.glob("*.jpg"))[shard_id::total][place_in_shard]


def wrong(sample: dict[str, Any], what: Any) -> Any:
    """Return a good sample for the first one, and then what a test says."""
    if sample["__key__"] == "sample-0":
        return sample
    if isinstance(what, BaseException):
        raise what
    return what


class Unprintable(Exception):
    """An error without words."""

    def __str__(self) -> str:
        raise ValueError


FIELD = "a field is a lower-case name such as"
WRONG: list[tuple[Any, str]] = [
    (ValueError("two\nlines"), "ValueError: two lines"),
    (SystemExit(5), "SystemExit: 5"),
    (GeneratorExit(), "GeneratorExit"),
    (Unprintable(), "Unprintable"),
    (OSError(5, "Input/output error", "/table"), "OSError: .*Input/output error: '/table'"),
    (5, "lambda. returned a int; return a dict"),
    ({}, "returned no field; return a dict"),
    ({"__key__": "sample-2"}, "returned the key 'sample-2'; leave the key as it is"),
    ({"__key__": None, "txt": b""}, "returned the key None; leave"),
    ({"__url__": "x", "txt": b""}, f"returned the field '__url__'; {FIELD}"),
    ({"JPG": b""}, f"returned the field 'JPG'; {FIELD}"),
    ({"": b""}, f"returned the field ''; {FIELD}"),
    ({".jpg": b""}, f"returned the field '.jpg'; {FIELD}"),
    ({"a/b": b""}, f"returned the field 'a/b'; {FIELD}"),
    ({"a b": b""}, f"returned the field 'a b'; {FIELD}"),
    ({"a\0": b""}, f"returned the field 'a.x00'; {FIELD}"),
    ({"a\udcff": b""}, f"returned the field 'a.udcff'; {FIELD}"),
    ({3: b"", "txt": b""}, f"returned the field 3; {FIELD}"),
    ({"bin": 5}, "a int as 'bin', which cannot be encoded: ValueError: no handler found for bin"),
    ({"txt": 5}, "a int as 'txt', which cannot be encoded: AttributeError"),
    ({"json": {1, 2}}, "a set as 'json', which cannot be encoded: TypeError"),
    ({"jpg": "no picture", "png": [1]}, "a list as 'png', which cannot be encoded: AssertionError"),
    ({"cls": None}, "a NoneType as 'cls', which cannot be encoded: .*leave the field out instead"),
    ({"txt": "\udcff"}, "a str as 'txt', which cannot be encoded: UnicodeEncodeError"),
]


@pytest.mark.parametrize(("what", "said"), WRONG)
def test_errors_in_work(what: Any, said: str, place) -> None:
    """One line, with key, file and line; no shard, and the previous one stays."""
    source, output, _ = place
    create_webdataset(source, output, 1, 4)
    before = hashes(output)
    with pytest.raises(PackError) as caught:
        create_webdataset(source, output, 1, 4, transform=lambda s: wrong(s, what))
    line, key = explain(caught.value), numbered(source, 1, 4, 0)
    assert "\n" not in line and line.startswith(f"sample '{key}': '{__file__}', line "), line
    assert_matches(said, line)
    assert hashes(output) == before


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_other_shards_go_on(driver: str, place) -> None:
    """Exit 1, the shard named; nothing is published, what was there stays; then it goes on."""
    source, output, file = place
    assert run_script("run_parallel.sh", *flags_of(place)).returncode == 0
    before, key = hashes(output), numbered(source, 2, 4, 5)
    file.write_text(
        "import os, sys\n"
        "def change(sample):\n"
        f"    if sample['__key__'] == {key!r} and not os.path.exists(__file__ + '.off'):\n"
        "        sys.exit('no good')\n"
        "    return sample\n"
    )
    done = run_script(driver, *flags_of(place, "--skip-bad"))
    assert done.returncode == 1, done
    where = f"Shard 2 failed: sample '{key}': '{file}', line 4: SystemExit: no good"
    assert where in done.stderr and done.stderr.count("Shard ") == 1, done
    assert done.stdout.count("created with 10 samples") == 3, done
    assert {k: v for k, v in hashes(output).items() if k.startswith("shard-")} == before
    Path(f"{file}.off").touch()
    done = run_script("run_parallel.sh", *flags_of(place, "--skip-bad"))
    assert done.returncode == 0 and done.stdout.count("kept with 10 samples") == 3, done


def test_a_shard_that_would_be_empty(place) -> None:
    source, output, file = place
    gone = {numbered(source, 3, 4, n) for n in range(10)}
    file.write_text(f"def change(s):\n    return None if s['__key__'] in {gone!r} else s\n")
    done = run_script("run_parallel.sh", *flags_of(place))
    assert done.returncode == 1 and not list(output.glob("*.tar")), done
    cure = "Shard 3 failed: no sample is left: change dropped 10 samples, all there are; use fewer"
    assert cure in done.stderr
    done = run_script("run_parallel.sh", *flags_of(place, "--num-shards=3", "--replace"))
    assert done.returncode == 0 and "; 10 dropped by change\n" in done.stdout, done


# ---------------------------------------------------------------- the plan


def test_an_edit_in_mid_run_changes_nothing(place) -> None:
    """Nor that the file goes; `__file__` is the planned path."""
    _, output, file = place
    file.write_text("def change(sample):\n    return {'txt': __file__, 'x': sample['txt']}\n")
    began = run_script("sharding", "start", *flags_of(place))
    run = began.stdout.strip()
    for shard_id in range(4):
        done = run_script("create_webdataset.py", "--run", run, f"--shard-id={shard_id}")
        assert done.returncode == 0, done
        file.write_text("def change(sample):\n    return {'txt': 'other'}\n")
        if shard_id:
            file.unlink()
    assert run_script("sharding", "publish", "--run", run).returncode == 0
    for shard_id in range(4):
        found = members(output / shard_name(shard_id))
        assert {v for k, v in found.items() if k.endswith(".txt")} == {os.fsencode(file)}


def leave(place, finished: tuple[int, ...] = (0, 2)) -> Run:
    """Leave what a run leaves that dies when it has finished these shards."""
    source, output, file = place
    listing = list_samples(source, transform=f"{file}:change")
    run = start(listing, output=output, total_shards=4, driver=os.getpid())
    for shard_id in finished:
        pack_shard_of(run, shard_id)
    run.release()
    return run


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_going_on(driver: str, place) -> None:
    """Kept shards tell what was dropped, though another process packed them."""
    leave(place)
    done = run_script(driver, *flags_of(place))
    assert done.returncode == 0 and done.stdout.count(" kept with ") == 2, done
    assert "26 samples in 4 shards" in done.stdout and "; 14 dropped by change" in done.stdout
    (fresh := place[0].parent / "fresh").mkdir()
    assert run_script("run_parallel.sh", *flags_of((place[0], fresh, place[2]))).returncode == 0
    assert hashes(place[1]) == hashes(fresh)
    assert (place[1] / RECORD).read_bytes() == (fresh / RECORD).read_bytes()
    for shard_id in (0, 2):
        packed = len(members(fresh / shard_name(shard_id))) // 3
        assert f"Shard {shard_id} kept with {packed} samples.\n" in done.stdout


@pytest.mark.parametrize("change", ["text", "name", "none"])
def test_another_function_is_refused(change: str, place) -> None:
    """Where shards are finished; never a mixture."""
    leave(place)
    file, flags = place[2], flags_of(place)
    if change == "text":
        file.write_text(f"{file.read_text()}\n# another")
    if change == "name":
        file.write_text(file.read_text().replace("def change", "other = len\ndef change"))
        leave((place[0], place[1].parent / "o2", file))
        file.write_text(TEXT.replace("def change", "other = 1\ndef change"))
    if change == "none":
        flags = [flag for flag in flags if "--transform" not in flag]
    before = hashes(place[1])
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 2 and hashes(place[1]) == before, done
    assert_matches(
        "2 finished shards, has another transform .change [0-9a-f]{12}, not ", done.stderr
    )
    done = run_script("run_parallel.sh", *flags, "--replace")
    assert done.returncode == 0 and "kept" not in done.stdout, done


def test_the_same_text_elsewhere_is_the_same(place) -> None:
    leave(place)
    moved = place[2].rename(place[2].parent / "moved.py")
    done = run_script("run_parallel.sh", *flags_of((place[0], place[1], moved)))
    assert done.returncode == 0 and done.stdout.count(" kept ") == 2, done


def test_the_count_survives_a_cut_while_publishing(place) -> None:
    """When shards have their final names already, those say no more what was dropped."""
    run = leave(place, (0, 1, 2, 3))
    done = run_script("sharding", "publish", "--run", run.path)
    assert "; 14 dropped by change" in done.stdout, done
    second = leave((place[0], place[1].parent / "o2", place[2]), (0, 1, 2, 3))
    from sharding.folder import run as wing

    wing._begin_publishing(second.path)
    for path in list(Path(second.path).glob("shard-000000.*")):
        path.rename(Path(second.path).parent / shard_name(0))
    assert "; 14 dropped by change" in load(second.path).finish()


def slow_function(place) -> None:
    """A function of 20 ms a sample."""
    place[2].write_text(
        "import time\ndef change(sample):\n    time.sleep(0.02)\n    return {'x': sample['txt']}\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(number: int, place) -> None:
    """While the function runs; the same command goes on."""
    slow_function(place)
    flags = flags_of(place, "--num-shards=10")
    process = start_packing(*flags)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (130, -9), err
    assert not list(place[1].glob("*.tar")) and "Traceback" not in err
    if number == signal.SIGINT:
        assert "stopped; nothing was published; to continue" in err
    time.sleep(0.3)  # until the lock has died with its holders
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 0 and done.stdout.count(" kept ") >= 1, done


# ---------------------------------------------------------------- buckets


def test_a_bucket_at_either_end(bucket: Bucket, place, tmp_path: Path) -> None:
    """Kept shards included: an interrupted run's count is in the name of its record."""
    source, output, file = place
    assert run_script("run_parallel.sh", *flags_of(place)).returncode == 0
    url = bucket.upload(source, "raw/")
    done = run_script("run_parallel.sh", *flags_of((url, tmp_path / "o2", file)))
    assert done.returncode == 0 and hashes(tmp_path / "o2") == hashes(output), done
    expected = (tmp_path / "o2" / RECORD).read_bytes()
    there = f"{bucket.url}/out"
    listing = list_samples(url, transform=f"{file}:change")
    run = start(listing, output=there, total_shards=4, driver=os.getpid())
    for shard_id in (0, 2):
        pack_shard_of(run, shard_id)
    flags = flags_of((url, there, file), "--resume")
    text = file.read_text()
    file.write_text(f"{text}# another\n")
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 2 and "has another transform (change " in done.stderr, done
    file.write_text(text)
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 0 and done.stdout.count(" kept ") == 2, done
    assert "26 samples in 4 shards" in done.stdout and "; 14 dropped by change" in done.stdout
    assert dataset_at(there).read_record(there) == expected
    assert bucket.hashes("out/") == hashes(output)


# ---------------------------------------------------------------- the proof


@pytest.fixture
def packed(place) -> tuple[Path, Path, Path]:
    """The same, packed."""
    leave(place, (0, 1, 2, 3)).finish()
    return place


def prove(place, *more: str) -> subprocess.CompletedProcess[str]:
    source, output, file = place
    flags = ["--path", output, "--source", source, "--quiet", f"--transform={file}:change"]
    return run_script("read_webdataset.py", *flags, *more)


@pytest.mark.parametrize("more", [[], ["--num-workers=2"], ["--decode"]])
def test_the_proof(more: list[str], packed) -> None:
    if more == ["--decode"]:  # which random bytes are not fit for
        text = "def change(s):\n    return {'cls': b'7'} if s['__key__'] < 'sample-3' else None\n"
        packed[2].write_text(text)
        assert run_script("run_parallel.sh", *flags_of(packed)).returncode == 0
    done = prove(packed, *more)
    assert done.returncode == 0, done
    said = f"OK, each sample of {packed[0]} once, as change makes it, byte for byte; "
    dropped = 17 if more == ["--decode"] else 14
    assert said + f"{dropped} dropped by change" in done.stdout, done
    assert f"{40 - dropped} samples in 4 shards, " in done.stdout


def test_the_proof_needs_the_function(packed) -> None:
    """No code is run from a record or a shard; without either, files and shards differ."""
    flags = ["--path", packed[1], "--source", packed[0], "--quiet"]
    done = run_script("read_webdataset.py", *flags)
    assert done.returncode == 2 and "give --transform FILE.py:change" in done.stderr, done
    (packed[1] / RECORD).unlink()
    done = run_script("read_webdataset.py", *flags)
    assert done.returncode == 1 and "fields differ from the source" in done.stderr, done
    done = run_script(
        "read_webdataset.py", "--path", packed[1], "--quiet", f"--transform={packed[2]}:change"
    )
    assert done.returncode == 2 and "--transform needs --source" in done.stderr, done
    packed[2].write_text("def change(s):\n    return s['no']\n")
    done = prove(packed)
    assert done.returncode == 2 and "line 2: KeyError: 'no'" in done.stderr, done


def repack(
    shard: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]
) -> None:
    """Write a shard again, with other members, and no record that says so at once."""
    (shard.parent / RECORD).unlink()
    some = change(list(members(shard).items()))
    with open(shard, "wb") as stream, FastTarWriter(stream) as sink:
        sink.write_members(*map(list, zip(*some, strict=True)))


def without_first(some: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return some[3:]


FAULTS = [
    (without_first, r"missing sample: 'sample-\d+' of shard-000001.tar"),
    (lambda some: some[1:], "fields differ from the source: shard-000001.tar: 'sample-"),
    (
        lambda some: [(some[0][0], b"other"), *some[1:]],
        r"bytes differ from the source: shard-000001.tar: 'sample-\d+.cls'",
    ),
    (lambda some: [*some, ("no.cls", b"1")], "extra sample, not in the source: 'no' in shard-0000"),
    (
        lambda some: [*some, ("sample-0.cls", b"0")],
        "sample that the function drops: 'sample-0' in shard-000001.tar",
    ),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
def test_faults_of_what_a_function_made(change, said: str, packed) -> None:
    """One fault, named as it would be without a function; nothing else is."""
    repack(packed[1] / shard_name(1), change)
    done = prove(packed)
    assert done.returncode == 1 and ": 1 fault; 14 dropped by change" in done.stdout, done
    assert_matches(said, done.stderr)
    assert done.stderr.replace("seen ", "").count("shard-000001") == 1


def test_another_function_is_a_fault(packed) -> None:
    """Unless it gives the same: the record names it, and the proof goes on."""
    packed[2].write_text(f"{TEXT}\n# more words")
    done = prove(packed)
    said = r"warning: --transform is change [0-9a-f]{12}; its record says that change [0-9a-f]{12} "
    assert done.returncode == 0, done
    assert_matches(said, done.stderr)
    packed[2].write_text(TEXT.replace("[::-1]", "[:]"))
    done = prove(packed)
    assert done.returncode == 1 and "bytes differ from the source: and 21 more" in done.stderr, done


@pytest.mark.parametrize("gone", [[3], [0], [2, 3]])
def test_shards_that_are_missing(gone: list[int], packed) -> None:
    """Though shards are uneven, the proof finds out how many there were."""
    for shard_id in gone:
        (packed[1] / shard_name(shard_id)).unlink()
    done = prove(packed)
    assert done.returncode == 1, done
    for shard_id in range(4):
        assert (f"missing shard: {shard_name(shard_id)}" in done.stderr) == (shard_id in gone)
    lost = sum(1 for line in done.stderr.splitlines() if line.startswith("missing sample"))
    assert lost and "misplaced" not in done.stderr


@pytest.mark.parametrize("odd", ["os.fork()", "sys.stdin.read()"])
def test_a_function_that_forks_or_reads(odd: str, place) -> None:
    """Its child does not go on with our work, and nothing keeps it waiting."""
    source, output, file = place
    file.write_text(f"import os, sys\ndef change(sample):\n    {odd}\n    return sample\n")
    done = run_script("run_parallel.sh", *flags_of(place), timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    plain = source.parent / "plain"
    assert run_script("run_parallel.sh", "--source", source, "--output", plain).returncode == 0
    assert hashes(output, "shard-*") == hashes(plain, "shard-*")
