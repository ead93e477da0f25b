"""The record of a dataset: what it says, what it keeps from happening, what needs no flags."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    MOSTLY_BASH,
    ROOT,
    Bucket,
    hashes,
    members,
    pack_shard_of,
    run_script,
    touch,
    write_pairs,
)

import create_webdataset as core
import read_webdataset as reader
from sharding import record
from sharding.errors import AlreadyDone, InputError, PackError
from sharding.folder import dataset as folder
from sharding.listing import list_samples
from sharding.places import dataset_at
from sharding.record import RECORD
from sharding.run import start
from sharding.shards import shard_name


def pack(
    source: Path | str, output: Path | str, total: int = 3, *, start_flags=None, **flags
) -> None:
    """Pack a dataset in this process."""
    listing = list_samples(source, **flags)
    run = start(listing, output=output, total_shards=total, driver=os.getpid(), **start_flags or {})
    try:
        for shard_id in range(total):
            pack_shard_of(run, shard_id)
        run.finish()
    finally:
        run.release()


def text_of(output: Path) -> str:
    return (output / RECORD).read_text()


def check(path: Path | str, *more: str | Path) -> int:
    return reader.main(["--path", str(path), "--quiet", *map(str, more)])


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A source of ten samples, and the dataset of three shards that was made of it."""
    source = write_pairs(tmp_path / "source", 10)
    pack(source, tmp_path / "o")
    return source, tmp_path / "o"


# ---------------------------------------------------------------- what it says


def test_what_it_holds(tmp_path: Path) -> None:
    source = touch(tmp_path / "source", *(f"{n}.{e}" for n in range(5) for e in ("PNG", "json")))
    touch(source, "0.cls", "4.cls")
    flags = {"fields": "png;jpg,json", "optional_fields": "cls", "shuffle": 7}
    pack(source, tmp_path / "o", 2, **flags)
    said = json.loads(text_of(tmp_path / "o"))
    shards, digest = said.pop("shards"), said.pop("digest")
    assert said == {
        "version": 1, "source": str(source), **flags, "replace_dots": None, "skip_bad": False,
        "transform": None, "packed": {"cls": 2, "json": 5, "png": 5},
    }  # fmt: skip
    assert list(shards) == [shard_name(0), shard_name(1)] and re.fullmatch("[0-9a-f]{32}", digest)
    for name, shard in shards.items():
        assert shard["bytes"] == (tmp_path / "o" / name).stat().st_size
        assert shard["samples"] == len({n.split(".")[0] for n in members(tmp_path / "o" / name)})
    assert text_of(tmp_path / "o").count("\n") == 11 + len(shards), "a line for each shard"


def test_every_driver_leaves_the_same(place: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = place
    flags = ["--source", source, "--num-shards=3"]
    for script in MOSTLY_BASH:
        done = run_script(script, *flags, "--output", tmp_path / script)
        assert done.returncode == 0, done
    job = run_script("sharding", "start", *flags, "--output", tmp_path / "job").stdout.strip()
    for shard_id in ("2", "0", "1"):
        run_script("create_webdataset.py", "--run", job, f"--shard-id={shard_id}", cwd="/")
    run_script("sharding", "publish", "--run", job, cwd="/")
    for name in (*MOSTLY_BASH, "job"):
        assert text_of(tmp_path / name) == text_of(output), name


DAMAGE: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "cut": lambda text: text[:-9],
    "a list": lambda _: "[]",
    "no number": lambda text: text.replace('"samples": 4', '"samples": "4"'),
    "true": lambda text: text.replace('"samples": 4', '"samples": true'),
    "a shard less": lambda text: text.replace(shard_name(1), shard_name(5)),
    "a path": lambda text: text.replace(shard_name(0), "../" + shard_name(0)),
    "fields": lambda text: text.replace('"jpg,txt"', '"jpg,jpg"'),
    "more": lambda text: text.replace('"digest"', '"run": "rm -r /", "digest"'),
    "dots": lambda text: text.replace('"replace_dots": null', '"replace_dots": ["_"]'),
    "deep": lambda _: "[" * 100_000,
    "digits": lambda text: text.replace('"samples": 4', '"samples": ' + "9" * 10_000),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_one(how: str, place: tuple[Path, Path], capfd) -> None:
    """Never a crash, never a guess."""
    source, output = place
    (output / RECORD).write_text(DAMAGE[how](text_of(output)))
    for call in (reader.open_webdataset, reader.count_samples):
        with pytest.raises(PackError, match="is damaged; delete it"):
            call(output)
    assert check(output) == 1 and RECORD in capfd.readouterr().err
    with pytest.raises(PackError, match="is damaged; delete it"):
        pack(source, output)
    assert reader.main(["--path", str(output), "--no-check", "--limit=1"]) == 0
    (output / RECORD).unlink()
    assert check(output, "--source", source) == 0


def test_a_newer_one(place: tuple[Path, Path], capfd) -> None:
    _, output = place
    (output / RECORD).write_text('{"version": 2, "shards": "elsewhere"}')
    assert check(output) == 1
    assert "by a newer version of these scripts (format 2)" in capfd.readouterr().err


# ---------------------------------------------------------------- published with the shards


def whole(output: Path) -> bool:
    """Tell whether a dataset is seen; where a record is seen, it must describe the shards."""
    try:
        found = folder.find_shards(str(output))
    except (InputError, PackError):
        return False
    if said := record.of_found(found, str(output)):
        record.check_found(said, found, str(output))
        assert reader.count_samples(output) == said.samples
    assert check(output) == 0
    return True


def die_at_call(step: int) -> None:
    """Let this process be killed at one of the calls that change or settle names."""
    left = [step]

    def dying(call):
        def wrapped(*arguments, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **options)

        return wrapped

    for call in ("rename", "unlink", "rmdir", "fsync"):
        setattr(os, call, dying(getattr(os, call)))


def test_kills_between_shards_and_record(place: tuple[Path, Path], tmp_path: Path) -> None:
    """At each call of publishing that changes names: whoever sees a record sees its set."""
    source, old = place
    for name in ("sample-99.jpg", "sample-99.txt"):
        (source / name).write_bytes(b"more")
    pack(source, tmp_path / "new", 2)
    step, seen = 0, set()
    while True:
        output = tmp_path / f"killed-{step}"
        shutil.copytree(old, output)
        run = start(list_samples(source), output=output, total_shards=2, driver=os.getpid())
        for shard_id in range(2):
            pack_shard_of(run, shard_id)
        child = os.fork()
        if not child:
            die_at_call(step)
            run.finish()
            os._exit(0)
        run.release()
        killed = os.waitpid(child, 0)[1] != 0
        if RECORD in os.listdir(output):  # also for those who know no mark: never a mixture
            before = (old, tmp_path / "new")[text_of(output) == text_of(tmp_path / "new")]
            assert text_of(output) == text_of(before) and hashes(output, "*.tar") == hashes(before)
        seen.add(whole(output))
        if killed:
            pack(source, output, 2)
        assert whole(output) and sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "new"))
        assert text_of(output) == text_of(tmp_path / "new")
        if not killed:
            break
        step += 1
    assert step > 10 and seen == {True, False}


PUBLISH_AND_DIE = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import obstore
left = [{step}]
def dying(call):
    def wrapped(*arguments, **options):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return call(*arguments, **options)
    return wrapped
from sharding.run import load
run = load({run!r})
for name in ("put", "delete"):
    setattr(obstore, name, dying(getattr(obstore, name)))
run.finish()
"""


def test_kills_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    """At each request of publishing that changes something."""
    source = write_pairs(tmp_path / "source", 7)
    pack(source, tmp_path / "o", 2)
    step = 0
    while True:
        url = f"{bucket.url}/{step}"
        run = start(list_samples(source), output=url, total_shards=2)
        for shard_id in range(2):
            pack_shard_of(run, shard_id)
        code = PUBLISH_AND_DIE.format(root=str(ROOT), step=step, run=run.path)
        killed = subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
        if killed:
            with pytest.raises(PackError, match="a run is not finished"):
                dataset_at(url).find_shards(url)
            with contextlib.suppress(AlreadyDone):
                run.finish()
        data = dataset_at(url).read_record(url)
        assert data and data.decode() == text_of(tmp_path / "o")
        assert check(url) == 0 and set(bucket.hashes(str(step))) == set(hashes(tmp_path / "o"))
        if not killed:
            break
        step += 1
    assert step > 2


CHANGES: dict[str, Callable[[Path], object]] = {
    "shard-000002.tar is missing": lambda o: (o / shard_name(2)).unlink(),
    "shard-000003.tar is one more": lambda o: shutil.copy(o / shard_name(0), o / shard_name(3)),
    "shard-000001.tar has 10 bytes": lambda o: (o / shard_name(1)).write_bytes(bytes(10)),
    "shard-000001.tar has 99,999 bytes": lambda o: os.truncate(o / shard_name(1), 99_999),
}


@pytest.mark.parametrize("what", CHANGES)
def test_shards_that_are_not_the_records(what: str, place: tuple[Path, Path], capfd) -> None:
    """A folder is refused; a pattern or a list of shards needs no record."""
    _, output = place
    CHANGES[what](output)
    for call in (reader.open_webdataset, reader.count_samples):
        with pytest.raises(PackError, match=f"as the dataset's record says: {what}"):
            call(output)
    reader.open_webdataset(output / "shard-*.tar")
    assert reader.count_samples([output / shard_name(0)]) == 4
    assert check(output) == 1
    assert what.split()[0] in capfd.readouterr().err
    assert check(output / shard_name(0)) == 0


def test_fewer_samples_in_as_many_bytes(place: tuple[Path, Path], capfd) -> None:
    _, output = place
    (output / RECORD).write_text(text_of(output).replace('"samples": 4', '"samples": 5'))
    assert check(output) == 1
    assert "shard-000000.tar: has 4 samples, not 5" in capfd.readouterr().err


# ---------------------------------------------------------------- single shards


def test_a_single_shard_that_comes_out_as_recorded(place: tuple[Path, Path]) -> None:
    source, output = place
    before = text_of(output)
    (output / shard_name(1)).write_bytes(b"damaged")
    core.create_webdataset(source, output, 1, 3)
    assert text_of(output) == before and reader.count_samples(output) == 10
    (source / "sample-1.txt").write_bytes(b"changed")
    core.create_webdataset(source, output, 0, 3)
    assert text_of(output) == before, "of another shard"
    core.create_webdataset(source, output, 1, 3)
    assert RECORD not in os.listdir(output)


@pytest.mark.parametrize("other", [{"total_shards": 4}, {"shuffle": 1}, {"optional_fields": "cls"}])
def test_a_single_shard_with_other_flags(other: dict, place: tuple[Path, Path]) -> None:
    source, output = place
    core.create_webdataset(source, output, 0, **{"total_shards": 3, **other})
    assert RECORD not in os.listdir(output)


def test_a_single_shard_of_another_source(place: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = place
    other, before = write_pairs(tmp_path / "other", 10, seed=1), hashes(output)
    with pytest.raises(InputError, match="holds a dataset of another source"):
        core.create_webdataset(other, output, 0, 3)
    assert hashes(output) == before and RECORD in os.listdir(output)


def test_no_record_stands_beside_a_new_shard(place: tuple[Path, Path], monkeypatch) -> None:
    """It is away before the shard appears, not behind it."""
    source, output = place
    seen = []
    rename = os.rename

    def spy(old: str, new: str) -> None:
        seen.append(RECORD in os.listdir(output))
        rename(old, new)

    monkeypatch.setattr(os, "rename", spy)
    core.create_webdataset(source, output, 0, 5)
    assert seen == [False]


def test_a_single_shard_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 6)
    pack(source, tmp_path / "o", 2)
    url = bucket.upload(tmp_path / "o")
    for total, stays in ((2, True), (3, False)):
        flags = ["--source", source, "--output", url, "--shard-id=0", f"--total-shards={total}"]
        done = run_script("create_webdataset.py", *flags)
        assert done.returncode == 0, done
        assert (dataset_at(url).read_record(url) is not None) is stays


def test_checksums_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 6)
    pack(source, tmp_path / "o", 2)
    url = bucket.upload(tmp_path / "o")
    assert check(url, "--source", source, "--checksums") == 0
    assert check(url, "--checksums") == 0
    bucket.put(shard_name(1), (tmp_path / "o" / shard_name(1)).read_bytes().replace(b"a", b"b"))
    assert check(url, "--checksums") == 1


# ---------------------------------------------------------------- checks need no flags


def test_a_check_without_flags(tmp_path: Path, capfd) -> None:
    """Of a dataset that has faults by the usual flags."""
    source = touch(tmp_path / "source", *(f"{n}.{e}" for n in range(9) for e in ("png", "txt")))
    for number in range(5):
        (source / f"{number}.png").rename(source / f"{number}.a.jpg")
        (source / f"{number}.txt").rename(source / f"{number}.a.txt")
    touch(source, "alone.txt")
    flags = {"fields": "jpg;png,txt", "replace_dots": "_", "skip_bad": True, "shuffle": 3}
    pack(source, tmp_path / "o", 2, **flags)
    assert check(tmp_path / "o") == 0
    assert check(tmp_path / "o", "--source", source) == 0
    assert "each sample of" in capfd.readouterr().out
    assert check(tmp_path / "o", "--fields=txt,png;jpg", "--shuffle=3") == 0, "means the same"
    for flag in ("--fields=jpg,txt", "--replace-dots=-", "--shuffle=4", "--optional-fields=cls"):
        assert check(tmp_path / "o", flag) == 2
        error = capfd.readouterr().err
        assert flag.partition("=")[0] in error and "as its record says; leave the flag" in error
    (tmp_path / "o" / RECORD).unlink()
    assert check(tmp_path / "o") == 1


def test_the_number_of_shards_comes_from_it(place: tuple[Path, Path], capfd) -> None:
    _, output = place
    (output / shard_name(2)).unlink()
    assert check(output) == 1
    assert "missing shard: shard-000002.tar" in capfd.readouterr().err


# ---------------------------------------------------------------- open_webdataset


def first(dataset) -> tuple:
    return next(iter(dataset))


def test_fields_default_to_what_was_packed(tmp_path: Path) -> None:
    source = touch(tmp_path / "source", *(f"{n}.{e}" for n in range(4) for e in ("txt", "json")))
    for path in source.glob("*.json"):
        path.write_text("{}")
    pack(source, tmp_path / "o", 2, fields="json,txt", optional_fields="cls")
    dataset = reader.open_webdataset(tmp_path / "o", shuffle_buffer=0, even=False)
    assert first(dataset)[::2] == ({}, None)
    named = reader.open_webdataset(tmp_path / "o", "txt", shuffle_buffer=0, even=False)
    assert len(first(named)) == 1
    assert reader.count_samples(tmp_path / "o") == 4
    pack(source, tmp_path / "other", 2, fields="json")
    with pytest.raises(InputError, match="have other fields each: 'json' and 'json,txt'"):
        reader.open_webdataset([tmp_path / "o", tmp_path / "other"])


def test_samples_are_counted_without_reading_them(place: tuple[Path, Path]) -> None:
    _, output = place
    size = (output / shard_name(0)).stat().st_size
    (output / shard_name(0)).write_bytes(bytes(size))
    assert reader.count_samples(output) == 10
    (output / RECORD).unlink()
    assert reader.count_samples(output) < 10


# ---------------------------------------------------------------- nothing replaced by accident


def refused(source: Path, output: Path, match: str, total: int = 3) -> None:
    before, names = hashes(output), sorted(os.listdir(output))
    with pytest.raises(InputError, match=match) as caught:
        pack(source, output, total)
    assert hashes(output) == before and sorted(os.listdir(output)) == names
    assert "another \0output\0, or give \0replace\0" in caught.value.args[0]


def test_a_dataset_of_another_source(place: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where its samples have the same names."""
    source, output = place
    other = write_pairs(tmp_path / "other", 10, seed=1)
    keys = "'sample-0', 'sample-3', 'sample-6', 'sample-9'"
    refused(other, output, rf"of another source \(.*\); it has 10 samples \({keys}\)")
    pack(other, output, start_flags={"replace": True})
    assert check(output, "--source", other) == 0
    refused(source, output, "of another source")


@pytest.mark.parametrize("recorded", [True, False])
def test_other_files_in_the_same_source(recorded: bool, place: tuple[Path, Path]) -> None:
    """More, fewer and changed files replace; a source where none is left does not."""
    source, output = place
    if not recorded:
        (output / RECORD).unlink()
    (source / "sample-0.txt").write_bytes(b"changed")
    (source / "sample-9.txt").unlink()
    (source / "sample-9.jpg").unlink()
    pack(source, output, 2)
    if not recorded:
        (output / RECORD).unlink()
    shutil.rmtree(source)
    touch(source, *(f"new-{n}.{e}" for n in range(50) for e in ("jpg", "txt")))
    refused(source, output, "other samples: none of its first shard.* it has 9 samples ", 2)
    pack(source, output, 2, start_flags={"replace": True})
    assert check(output, "--source", source) == 0


def test_a_run_that_was_allowed_goes_on(place: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = place
    other = write_pairs(tmp_path / "other", 10, seed=1)
    flags = {"output": output, "total_shards": 3, "driver": os.getpid()}
    run = start(list_samples(other), **flags, replace=True)
    pack_shard_of(run, 0)
    run.release()
    pack(other, output)
    assert check(output, "--source", other) == 0


def test_a_refused_run_allows_no_other(place: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed while it finds that out, it leaves no plan that fits."""
    _, output = place
    other = write_pairs(tmp_path / "other", 10, seed=1)
    child = os.fork()
    if not child:
        from sharding import previous

        previous.dataset_at = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        start(list_samples(other), output=output, total_shards=3, driver=os.getpid())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and folder.staging_folders(str(output))
    with pytest.raises(InputError, match="of another source"):
        pack(other, output)


# ---------------------------------------------------------------- --resume of a finished dataset


def test_already_complete(place: tuple[Path, Path], capfd) -> None:
    source, output = place
    before, names = (output / shard_name(0)).stat(), sorted(os.listdir(output))
    flags = ["--source", source, "--output", output, "--num-shards=3", "--resume"]
    for driver in ("run_parallel.sh", "create_with_ray.py"):
        done = run_script(driver, *flags)
        assert done.returncode == 0 and not done.stderr, done
        assert done.stdout == f"{str(output)!r} is already complete: 10 samples in 3 shards\n"
    assert (output / shard_name(0)).stat() == before and sorted(os.listdir(output)) == names
    (source / "sample-1.txt").write_bytes(b"changed")
    pack(source, output, start_flags={"resume": True})
    error = capfd.readouterr().err
    assert "packed anew: the dataset there has 1 shard whose files have changed" in error
    with pytest.raises(AlreadyDone):
        pack(source, output, start_flags={"resume": True})
    pack(source, output, 2, start_flags={"resume": True})
    assert "another number of shards (3, not 2)" in capfd.readouterr().err
    (output / shard_name(1)).unlink()
    pack(source, output, 2, start_flags={"resume": True})
    assert "1 shard not as the dataset's record says" in capfd.readouterr().err


def test_already_complete_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    source, url = write_pairs(tmp_path / "source", 6), f"{bucket.url}/o"
    flags = ["--source", source, "--output", url, "--num-shards=2"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    done = run_script("run_parallel.sh", *flags, "--resume")
    assert done.returncode == 0 and "is already complete: 6 samples" in done.stdout, done
    (source / "sample-1.txt").write_bytes(b"changed")
    done = run_script("run_parallel.sh", *flags, "--resume")
    assert done.returncode == 2 and "holds a dataset with 1 shard whose files" in done.stderr, done


# ---------------------------------------------------------------- what a function made


FUNCTION = """
def change(sample):
    number = int(sample["__key__"].split("-")[-1])
    if number % 5 == 0:
        return None
    return {"cls": number} | ({"txt": sample["txt"]} if number % 2 else {})
"""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, str]:
    """A source of ten samples, what a function made of it, and that function."""
    source = write_pairs(tmp_path / "source", 10)
    (tmp_path / "own.py").write_text(FUNCTION)
    function = f"{tmp_path / 'own.py'}:change"
    pack(source, tmp_path / "o", transform=function)
    return source, tmp_path / "o", function


def test_what_came_out_of_a_function(made: tuple[Path, Path, str], capfd) -> None:
    """Not what went in; and checks look for that."""
    source, output, function = made
    said = json.loads(text_of(output))
    text = FUNCTION.encode()
    digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    assert said["transform"] == {"name": "change", "hash": digest}
    assert said["packed"] == {"cls": 8, "txt": 4} and said["fields"] == "jpg,txt"
    shards = said["shards"].values()
    assert [(s["samples"], s.get("dropped", 0)) for s in shards] == [(3, 1), (3, 0), (2, 1)]
    assert reader.count_samples(output) == 8
    assert check(output) == 0
    proof = "--source", source, "--transform", function
    assert check(output, *proof) == 0
    assert "; 2 dropped by change; fields: 4 cls, 4 cls+txt" in capfd.readouterr().out
    dataset = list(reader.open_webdataset(output, decode=None, shuffle_buffer=0, even=False))
    assert len(dataset) == 8 and sorted(dataset)[0][0] == b"1" and (b"2", None) in dataset
    (output / RECORD).unlink()
    assert check(output, *proof, "--checksums") == 0
    again = json.loads(text_of(output))
    for shard in again["shards"].values():
        assert len(shard.pop("sha256")) == 64
    assert again == said, "a proof makes the same"
    assert check(output, "--checksums") == 0


def test_no_function_made_it(place: tuple[Path, Path], made, capfd) -> None:
    pack(*place, start_flags={"replace": True})
    assert check(place[1], "--source", place[0], "--transform", made[2]) == 2
    assert "was packed without it, as its record says" in capfd.readouterr().err


def test_already_made(made: tuple[Path, Path, str], tmp_path: Path, capfd) -> None:
    source, output, function = made
    with pytest.raises(AlreadyDone):
        pack(source, output, transform=function, start_flags={"resume": True})
    (tmp_path / "own.py").write_text(FUNCTION + "# another")
    pack(source, output, transform=function, start_flags={"resume": True})
    assert "has another transform (change " in capfd.readouterr().err
    pack(source, output, start_flags={"resume": True})
    assert re.search(r"another transform \(change \w+, not none\)$", capfd.readouterr().err, re.M)


def test_a_single_shard_that_a_function_makes(made: tuple[Path, Path, str]) -> None:
    """The one in the record, or another: what is no file has no hash, and may be any."""
    source, output, function = made
    before = text_of(output)
    core.create_webdataset(source, output, 1, 3, transform=function)
    assert text_of(output) == before
    core.create_webdataset(source, output, 1, 3, transform=lambda sample: sample)
    assert RECORD not in os.listdir(output)


@pytest.mark.parametrize("lost", [True, False])
def test_what_a_kept_shard_carries(lost: bool, made: tuple[Path, Path, str]) -> None:
    """One that has lost it, in a power cut, say, is packed again."""
    source, output, function = made
    before = text_of(output)
    listing = list_samples(source, transform=function)
    flags = {"output": output, "total_shards": 3, "driver": os.getpid()}
    run = start(listing, **flags)
    pack_shard_of(run, 0)
    if lost:
        next(Path(run.path).glob("*.fields")).write_bytes(b"")
    run.release()
    run = start(listing, **flags)
    assert pack_shard_of(run, 0).how == ("created again" if lost else "kept")
    for shard_id in (1, 2):
        pack_shard_of(run, shard_id)
    run.finish()
    run.release()
    assert text_of(output) == before and sorted(os.listdir(output)) == [RECORD, *hashes(output)]


# ---------------------------------------------------------------- is this copy whole?


@pytest.mark.parametrize("recorded", [True, False])
def test_checksums(recorded: bool, place: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    source, output = place
    before = text_of(output)
    if not recorded:
        (output / RECORD).unlink()
    assert check(output, "--checksums") == 2
    assert "has no checksums: where its source is, run" in capfd.readouterr().err
    assert check(output, "--source", source, "--checksums") == 0
    assert "byte for byte; checksums written" in capfd.readouterr().out
    assert re.sub(', "sha256": "[0-9a-f]*"', "", text_of(output)) == before
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shutil.rmtree(source)
    assert check(copy, "--checksums", "--num-workers=2") == 0
    said = capfd.readouterr().out
    assert "10 samples in 3 shards" in said and "OK, as its checksums say" in said
    shard = copy / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[5_000] ^= 1
    shard.write_bytes(data)
    assert check(copy, "--checksums", "--num-workers=2") == 1
    said = capfd.readouterr().err
    assert said.startswith("bytes differ from the checksum: shard-000001.tar: SHA-256 is not ")
    assert said.count("\n") == 1
    shard.unlink()
    assert check(copy, "--checksums") == 1
    assert "missing shard: shard-000001.tar" in capfd.readouterr().err


def test_no_checksums_of_a_set_that_is_not_proved(place: tuple[Path, Path]) -> None:
    source, output = place
    (source / "sample-1.txt").write_bytes(b"another")
    before = text_of(output)
    assert check(output, "--source", source, "--checksums") == 1
    assert text_of(output) == before


def test_sha256sum_can_be_fed(place: tuple[Path, Path]) -> None:
    """As the page on checking shows it."""
    source, output = place
    assert check(output, "--source", source, "--checksums") == 0
    line = r"""sed -n 's/"\(shard-.*\.tar\)": .*"sha256": "\([0-9a-f]*\)".*/\2  \1/p' """
    command = f"{line} {RECORD} | sha256sum --check"
    done = subprocess.run(command, shell=True, cwd=output, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3, done


@pytest.mark.parametrize("what", ["folder", "dangling", "unreadable"])
def test_one_that_cannot_be_read(what: str, place: tuple[Path, Path], preload: str) -> None:
    """It is no reason to take the dataset for one without a record, and to replace it."""
    source, output = place
    name, odd, said = output / RECORD, {}, "is damaged; delete it"
    if what == "folder":
        name.unlink()
        name.mkdir()
    elif what == "dangling":  # as tools leave it that keep files elsewhere, and have not got it
        name.unlink()
        name.symlink_to("elsewhere")
        said = "cannot be read: No such file or directory"
    else:
        odd = {"LD_PRELOAD": preload, "STAT_ERRNO": str(errno.EIO), "STAT_PATH": RECORD}
        said = "cannot be read: Input/output error"
    before = hashes(output)
    other = write_pairs(source.parent / "other", 6, seed=9)
    flags = ["--source", other, "--output", output]
    for script, *given in (
        ["read_webdataset.py", "--path", output, "--quiet"],
        ["run_parallel.sh", *flags],
        ["create_webdataset.py", *flags, "--shard-id=0", "--total-shards=3"],
    ):
        done = run_script(script, *given, env=odd)
        assert done.returncode == 1 and said in done.stderr, done
        assert RECORD in done.stderr and "Traceback" not in done.stderr
    assert {k: v for k, v in hashes(output).items() if "lock" not in k} == before


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        ("{'jpg' if odd else 'png': b''}", "jpg;png"),
        ("dict.fromkeys('ab' if odd else 'a', b'')", "a"),
    ],
)
def test_a_function_that_makes_uneven_samples(made: str, fields: str, tmp_path: Path) -> None:
    """The check needs no flags then, either."""
    source, file = write_pairs(tmp_path / "source", 8), tmp_path / "f.py"
    file.write_text(f"def f(s):\n    odd = int(s['__key__'][-1]) % 2\n    return {made}\n")
    flags = ["--source", source, "--output", tmp_path / "o", f"--transform={file}:f"]
    assert run_script("run_parallel.sh", *flags, "--num-workers=2").returncode == 0
    assert check(tmp_path / "o") == 0
    assert len(list(reader.open_webdataset(tmp_path / "o", decode=None))) == 8
    found = record.load((tmp_path / "o" / RECORD).read_bytes(), "o")
    assert record.fields_to_read(found)[0] == fields
