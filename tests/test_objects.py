"""A bucket as a source: the same shards as from a folder, of the versions that were listed."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import obstore
import pytest
from conftest import MOSTLY_BASH, Bucket, hashes, pack_shard_of, run_script, touch, write_pairs
from obstore.exceptions import GenericError

from create_webdataset import main as create
from read_webdataset import main as read
from sharding.bucket import source as objects
from sharding.errors import InputError, PackError
from sharding.listing import list_samples
from sharding.pack import pack_shard
from sharding.run import start


def pack(driver: str, *flags: str | Path) -> str:
    done = run_script(driver, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_the_same_shards_as_from_a_folder(driver: str, bucket: Bucket, tmp_path: Path) -> None:
    """Folders, odd names, optional fields, large files."""
    source = write_pairs(tmp_path / "source", 60)
    for name in ("a b", "a#b", "a?b=1", "a%20b", "a+b", "é", "a:b", "deep/er/x", "[x", "x" * 120):
        touch(source, f"{name}.jpg", f"{name}.TXT")
    touch(source, "a b.json", "note.md", ".hidden/a.jpg", "deep/.er/a.jpg", ".b.jpg")
    (source / "large.jpg").write_bytes(os.urandom(11 << 20))
    (source / "large.txt").touch()
    url = bucket.upload(source, "raw/") + "/"
    flags = ["--num-shards", "3", "--num-workers", "2", "--optional-fields", "json", "--shuffle=1"]
    pack(driver, "--source", source, "--output", tmp_path / "a", *flags)
    said = pack(driver, "--source", url, "--output", tmp_path / "b", *flags)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert "ignored: 1 .md" in said
    proof = ["--path", str(tmp_path / "b"), "--quiet", "--source", url, *flags[4:]]
    assert read(proof) == 0
    assert run_script("read_webdataset.py", *proof, "--num-workers", "2").returncode == 0


def test_one_shard(bucket: Bucket, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 10)
    url = bucket.upload(source, "raw/")
    for place, path in (("a", str(source)), ("b", url)):
        flags = ["--output", str(tmp_path / place), "--shard-id", "1", "--total-shards", "3"]
        assert create(["--source", path, *flags]) == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_several_pages_and_folder_markers(bucket: Bucket, tmp_path: Path) -> None:
    """A page has 1,000 keys; consoles mark a folder by an object of no bytes."""
    keys = [f"cats/{n:04d}.{field}" for n in range(1_100) for field in ("jpg", "txt")]
    touch(tmp_path / "raw", *keys, "empty.jpg/x.jpg", "empty.jpg/x.txt")
    url = bucket.upload(tmp_path / "raw", "raw/")
    for marker in ("raw/", "raw/cats/", "raw/empty.jpg/"):
        bucket.put(marker)
    listing, same = list_samples(url), list_samples(tmp_path / "raw")
    assert len(listing.samples) == 1_101 and not listing.skipped and not listing.ignored
    assert [s[:3] for s in listing.samples] == [s[:3] for s in same.samples]


def test_what_is_refused_as_in_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    names = ["a.jpg", "b.2020.jpg", "b.2020.txt", "c.jpg", "c.JPG", "c.txt", "__d.jpg", "__d.txt"]
    said = []
    for source in (str(touch(tmp_path / "s", *names)), bucket.upload(tmp_path / "s", "s/")):
        with pytest.raises(InputError) as caught:
            list_samples(source)
        said.append(re.sub(r"'[^' ]*/s'", "SOURCE", str(caught.value)))
        assert [s.key for s in list_samples(source, replace_dots="_", skip_bad=True).samples] == [
            "b_2020"
        ]
    assert sorted(said[0].split("\n")) == sorted(said[1].split("\n"))


def change(bucket: Bucket, how: str, key: str) -> None:
    if how == "vanishes":
        bucket.delete(key)
    else:
        size = obstore.head(bucket.store, f"{bucket.prefix}/{key}")["size"]
        bucket.put(key, os.urandom(size - 1 if how == "shrinks" else size))


@pytest.mark.parametrize("size", [100, 3 << 20])
@pytest.mark.parametrize("how", ["changes", "shrinks", "vanishes"])
def test_an_object_that_is_not_as_it_was_listed(
    how: str, size: int, bucket: Bucket, tmp_path: Path
) -> None:
    for number in range(20):
        bucket.put(f"raw/{number}.jpg", os.urandom(size if number == 7 else 50))
        bucket.put(f"raw/{number}.txt", b"x")
    listing = list_samples(f"{bucket.url}/raw")
    change(bucket, how, "raw/7.jpg")
    with pytest.raises(PackError, match=r"/raw/7.jpg' changed while it was packed"):
        pack_shard(listing.source, listing.samples, tmp_path, 0).store()
    assert not list(tmp_path.iterdir())


def test_a_connection_that_breaks(bucket: Bucket, tmp_path: Path, monkeypatch) -> None:
    """While an answer is read obstore does not try again; and a retry is no other version."""
    url, get = bucket.upload(write_pairs(tmp_path / "source", 3), "raw/"), obstore.get
    answers = iter([GenericError("HTTP error: request or response body error"), None])

    def breaking(*arguments, **options):
        if error := next(answers, None):
            raise error
        return get(*arguments, **options)

    listing = list_samples(url)
    monkeypatch.setattr(obstore, "get", breaking)
    assert pack_shard(listing.source, listing.samples, tmp_path, 0).store().samples == 3
    pack_shard(tmp_path / "source", list_samples(tmp_path / "source").samples, tmp_path, 1).store()
    assert len({value for name, value in hashes(tmp_path).items() if name[:5] == "shard"}) == 1


def test_the_run_fails_if_an_object_changes(bucket: Bucket, tmp_path: Path) -> None:
    """Between listing and reading; the error names it, and nothing is published."""
    url = bucket.upload(write_pairs(tmp_path / "source", 4), "raw/")
    run = start(list_samples(url), output=tmp_path / "o", total_shards=1)
    bucket.put("raw/sample-2.txt", b"another text, and another size")
    with pytest.raises(PackError, match=r"/raw/sample-2.txt' changed while it was packed"):
        pack_shard_of(run, 0)
    with pytest.raises(PackError, match=r"not packed: 1 shard \(0\)"):
        run.finish()
    run.release()


def test_reads_are_ahead_and_bounded(bucket: Bucket, monkeypatch) -> None:
    """Many at a time, but no more than a few wait."""
    for number in range(300):
        bucket.put(f"raw/{number}.jpg", b"x")
        bucket.put(f"raw/{number}.txt", b"x")
    listing = list_samples(f"{bucket.url}/raw")
    begun, threads = [0], set()
    real = objects._read

    def counted(url: str, version: str) -> bytes:
        begun[0] += 1
        threads.add(threading.current_thread().name)
        return real(url, version)

    monkeypatch.setattr(objects, "_read", counted)
    batches = objects.read_batches(listing.source, listing.samples)
    for number, _ in enumerate(batches):
        if number in (0, 100):
            time.sleep(0.5)  # what is not held back goes on
            assert begun[0] > 2 * (number + 8)
        assert begun[0] <= 2 * (number + 1 + objects.AHEAD)
    assert begun[0] == 600 and len(threads) > 8


def test_an_empty_prefix(bucket: Bucket, capsys, tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "o"), "--shard-id=0", "--total-shards=1"]
    assert create(["--source", f"{bucket.url}/none", *flags]) == 2
    cure = "has no complete sample: there is nothing; are bucket and prefix right?"
    assert cure in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
