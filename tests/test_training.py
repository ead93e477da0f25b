"""The training pipeline, without torch: every sample once, in an order that the seed decides."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from conftest import touch, write_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset import autodecode

from create_webdataset import create_webdataset
from read_webdataset import count_samples, open_webdataset
from read_webdataset import main as read
from sharding.errors import InputError, PackError
from sharding.reading import count_shard, read_samples

NAMES = st.lists(
    st.tuples(
        st.one_of(
            st.text("ab/é", min_size=1, max_size=6), st.text("x/", min_size=90, max_size=200)
        ),
        st.lists(st.sampled_from(["jpg", "TXT", "seg.png", "x"]), min_size=1, unique=True),
    ),
    max_size=8,
)


@given(NAMES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@example([("__x__/a", ["jpg"]), ("b", ["jpg", "x"]), ("__c", ["x"])], tarfile.PAX_FORMAT)
@settings(max_examples=200, deadline=None)
def test_samples_are_those_of_webdataset(tmp_path_factory, named, kind: int) -> None:
    """Same keys, fields, bytes and order, whatever made the archive."""
    shard = str(tmp_path_factory.getbasetemp() / "equal.tar")
    seen = set()
    with tarfile.open(shard, "w", format=kind, pax_headers={}) as tar:
        for key, fields in named:
            if key in seen or "//" in key or key[0] == "/" or key[-1] == "/":
                continue
            seen.add(key)
            for field in fields:
                info = tarfile.TarInfo(f"{key}.{field}")
                data = f"{key}.{field}".encode() * (len(key) % 3)
                info.size, info.mtime = len(data), 1.5
                try:
                    tar.addfile(info, io.BytesIO(data))
                except ValueError:  # a name that ustar cannot hold
                    continue
    theirs = list(wds.WebDataset([shard], shardshuffle=False, empty_check=False))
    assert list(read_samples(shard)) == theirs
    assert count_shard(shard) == len(theirs)
    chosen = [{f: v for f, v in sample.items() if f[:2] == "__" or f == "txt"} for sample in theirs]
    assert list(read_samples(shard, {"txt"})) == chosen


MAKERS = {
    "GNU tar": ["tar", "-cf"],
    "GNU tar, pax": ["tar", "--format=pax", "-cf"],
    "bsdtar": ["bsdtar", "-cf"],
}


@pytest.mark.parametrize("maker", [*MAKERS, "ShardWriter"])
def test_shards_of_other_tools(maker: str, tmp_path: Path) -> None:
    """Long and other names, folders in the archive, empty files: as webdataset reads them."""
    source = write_pairs(tmp_path / "source", 20)
    (source / "d.e").mkdir()
    for key in ("d.e/nested", "é" * 70, "x" * 120):
        (source / f"{key}.jpg").write_bytes(key.encode())
        (source / f"{key}.seg.PNG").touch()
    shard = str(tmp_path / "shard.tar")
    if maker == "ShardWriter":
        with wds.ShardWriter(str(tmp_path / "%d.tar"), encoder=False, verbose=0) as sink:
            for path in sorted(source.glob("*.jpg")):
                sink.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": b""})
        os.rename(tmp_path / "0.tar", shard)
    elif not shutil.which(MAKERS[maker][0]):
        pytest.skip(f"needs {maker}")
    else:
        names = sorted(os.listdir(source))
        subprocess.run([*MAKERS[maker], shard, *names], cwd=source, check=True)
    theirs = list(wds.WebDataset([shard], shardshuffle=False))
    assert len(theirs) >= 20 and list(read_samples(shard)) == theirs


@pytest.mark.parametrize("left", [0, 600, 5_000, -20_480])
def test_a_damaged_shard_is_no_short_epoch(left: int, tmp_path: Path) -> None:
    """Also one that is cut between two members, where webdataset ends without a word."""
    source, output = write_pairs(tmp_path / "source", 40), tmp_path / "o"
    create_webdataset(source, output, 0, 1)
    path = output / "shard-000000.tar"
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(PackError, match=r"shard-000000.tar': cut short"):
        list(open_webdataset(output, decode=None))


def test_a_field_that_occurs_twice(tmp_path: Path) -> None:
    """webdataset refuses it, too; one of the two would be lost."""
    shard = str(tmp_path / "shard-000000.tar")
    with tarfile.open(shard, "w") as tar:
        for name in ("a.jpg", "a.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(PackError, match=r"shard-000000.tar': field 'jpg' occurs twice in .* 'a'"):
        list(open_webdataset(tmp_path, "jpg", decode=None))
    with pytest.raises(ValueError, match="duplicate file name"):
        list(wds.WebDataset([shard], shardshuffle=False))


REPLACED = r"shard-000000.tar': it was replaced while it was read"


def write_letters(folder: Path, letter: str) -> Path:
    """Write pairs of one letter: of each letter, they make a shard of the same size."""
    folder.mkdir()
    for number in range(60):
        for field in ("jpg", "txt"):
            (folder / f"{number:02d}.{field}").write_bytes(letter.encode() * 100_000)
    return folder


def replace_shard(old: Path, new: Path, how: str) -> None:
    """Replace a shard: by another file, or in the same one, as mounts may have it."""
    assert old.stat().st_size == new.stat().st_size
    if how == "renamed":
        new.rename(old)
    else:
        shutil.copyfile(new, old)


@pytest.mark.parametrize("how", ["renamed", "same inode"])
def test_a_shard_that_is_replaced_meanwhile(how: str, tmp_path: Path) -> None:
    """By one of the same size: while it is read, and before what was passed over is read."""
    for name in ("old", "new", "newer"):
        create_webdataset(write_letters(tmp_path / f"{name}-s", name[-1]), tmp_path / name, 0, 1)
    old, new, newer = (tmp_path / name / "shard-000000.tar" for name in ("old", "new", "newer"))
    samples = iter(open_webdataset(tmp_path / "old", decode=None, shuffle_buffer=0))
    next(samples)
    replace_shard(old, new, how)
    with pytest.raises(PackError, match=REPLACED):
        list(samples)
    later = [sample["txt"] for sample in read_samples(str(old), later=lambda: True)]
    assert later[0].read() == b"w" * 100_000
    replace_shard(old, newer, how)
    with pytest.raises(PackError, match=REPLACED):
        later[1].read()


def test_an_epoch_taken_up_in_a_shard_that_is_replaced(tmp_path: Path) -> None:
    """What a shuffle holds of the samples that were passed over is of one version, too."""
    for name in ("old", "new"):
        create_webdataset(write_letters(tmp_path / f"{name}-s", name[-1]), tmp_path / name, 0, 1)
    whole = open_webdataset(tmp_path / "old", "txt", decode=None, shuffle_buffer=60)
    list(itertools.islice(whole, 20))
    again = open_webdataset(tmp_path / "old", "txt", decode=None, shuffle_buffer=60)
    again.load_state_dict(whole.state_dict())
    samples = iter(again)
    assert next(samples) == (b"d" * 100_000,)
    shards = (tmp_path / name / "shard-000000.tar" for name in ("old", "new"))
    replace_shard(*shards, "same inode")
    with pytest.raises(PackError, match=REPLACED):
        list(samples)


def test_errors_name_the_sample(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "o"
    source.mkdir()
    for key, text in {"a": b"good", "b": b"\xe9", "c": b"good"}.items():
        (source / f"{key}.txt").write_bytes(text)
    create_webdataset(source, output, 0, 1, "txt")
    options = {"decode": "pilrgb", "shuffle_buffer": 0}
    with pytest.raises(PackError, match=r"shard-000000.tar': sample 'b', field 'txt'") as caught:
        list(open_webdataset(output, "txt", **options))
    assert "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.warns(UserWarning) as warned:
        found = list(open_webdataset(output, "txt", handler=wds.warn_and_continue, **options))
    assert found == [("good",), ("good",)]
    stopped = open_webdataset(output, "txt", handler=wds.warn_and_stop, **options)
    with pytest.warns(UserWarning):
        assert list(stopped) == [("good",)]
    said = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert "sample 'b', field 'txt'" in said[0] and said[-1] == "1 sample skipped in this epoch"


@pytest.mark.parametrize("decode", ["PIL", "pillow", "torchRGB", "", True])
def test_spellings_of_decode(decode: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"choose None, or one of .*pilrgb, .*torchrgb"):
        open_webdataset(touch(tmp_path, "shard-000000.tar"), decode=decode)  # type: ignore[arg-type]


@pytest.mark.skipif(bool(importlib.util.find_spec("torch")), reason="torch is here")
def test_torch_is_missed_at_once(tmp_path: Path) -> None:
    for decode in ("torchrgb", {"jpg": "torchl8"}):
        with pytest.raises(InputError, match=r"No module named 'torch'; run: pip install torch"):
            open_webdataset(touch(tmp_path, "shard-000000.tar"), decode=decode)


def test_training_pipeline_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_pairs(tmp_path / "source", 53), tmp_path / "output"
    for shard_id in range(5):
        create_webdataset(source, output, shard_id, 5)
    everything = sorted(path.stem for path in source.glob("*.jpg"))
    epochs = []
    dataset = open_webdataset(output, ("__key__", "jpg", "txt"), decode=None, shuffle_buffer=10)
    for _ in range(2):
        epochs.append([key for key, _, _ in dataset])
        assert sorted(epochs[-1]) == everything
    assert epochs[0] != epochs[1] != everything
    again = open_webdataset(output, ("__key__",), decode=None, shuffle_buffer=10)
    assert [key for (key,) in again] == epochs[0], "the seed decides"
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("NUM_WORKERS", "2")
    for rank in "01":
        for worker in "01":
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORKER", worker)
            part = open_webdataset(output, ("__key__",), decode=None)
            seen += [key for (key,) in part]
    assert sorted(seen) == everything, "ranks and workers share the samples out, each once"
    monkeypatch.setenv("NUM_WORKERS", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORKER", "0")
    with pytest.warns(
        UserWarning, match=r"5 shards for 6 readers \(ranks: 2, workers of each: 3\)"
    ):
        list(open_webdataset(output, decode=None))


def test_only_what_is_asked_for_is_decoded(tmp_path: Path) -> None:
    """A text that is not UTF-8 harms nobody who wants no text; a pickle is not even looked at."""
    source = tmp_path / "source"
    source.mkdir()
    for field, data in {"cls": b"7", "txt": b"\xe9", "pyd": b"cos\nsystem\n(S'exit'\ntR."}.items():
        (source / f"a.{field}").write_bytes(data)
    create_webdataset(source, tmp_path / "o", 0, 1, "cls,txt,pyd")
    assert list(open_webdataset(tmp_path / "o", "cls")) == [(7,)]
    with pytest.raises(PackError, match=r"shard-000000.tar': sample 'a' has no field 'json'"):
        list(open_webdataset(tmp_path / "o", "cls,json"))


class Bomb:
    """What makes whoever unpickles it write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_shard_is_run(tmp_path: Path, monkeypatch, capfd) -> None:
    """Of no field that webdataset decodes, nor by --decode; PostScript is a program, too."""
    mark, source, shards = tmp_path / "mark", tmp_path / "source", tmp_path / "o"
    source.mkdir()
    array = io.BytesIO()
    np.save(array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    contents = dict.fromkeys(autodecode.decoders, pickle.dumps(Bomb(mark)))
    contents |= {"x.npy": array.getvalue(), "pyd.gz": gzip.compress(contents["pyd"])}
    contents |= dict.fromkeys(("jpg", "eps", "depth.png"), b"%!PS-Adobe-3.0 EPSF-3.0\n")
    contents["jpg"] += b"%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    contents["tif.gz"] = gzip.compress(contents["jpg"])
    for field, data in contents.items():
        (source / f"a.{field}").write_bytes(data)
    create_webdataset(source, shards, 0, 1, list(contents))
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\nmkdir {mark}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    for field in contents:
        with contextlib.suppress(InputError, PackError):
            list(open_webdataset(shards, field))
        assert not mark.exists(), field
    assert read(["--path", str(shards), "--decode", "--quiet"]) == 1
    assert "pyd" in capfd.readouterr().out.partition("not decoded: ")[2]
    assert not mark.exists()
    with pytest.raises(PackError, match=r"sample 'a', field 'jpg' .* it is PostScript, a program"):
        list(open_webdataset(shards, "jpg"))


def test_pickles_are_loaded_on_demand_alone(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "o"
    source.mkdir()
    stored = pickle.dumps({"caption": "é"})
    for field, data in {"txt": b"x", "pyd": stored, "b.pyd.gz": gzip.compress(stored)}.items():
        (source / f"a.{field}").write_bytes(data)
    create_webdataset(source, output, 0, 1, "txt,pyd,b.pyd.gz")
    for fields, options in {
        "txt,pyd": {},
        "txt;pyd": {"decode": {"txt": None}},
        "PYD": {"decode": {"pyd": "torchrgb"}},
        "pkl": {"decode": "rgb8"},
        "x.pickle": {},
        "b.pyd.gz": {},
        "txt": {"optional_fields": "pth"},
    }.items():
        cure = r"field '.*' is a pickle: .* decode=\{'.*': None\}.* decode=\{'.*': pickle.loads\}"
        with pytest.raises(InputError, match=cure):
            open_webdataset(output, fields, **options)
    assert list(open_webdataset(output, "pyd", decode=None)) == [(stored,)]
    assert list(open_webdataset(output, "txt,pyd", decode={"pyd": None})) == [("x", stored)]
    loaded = open_webdataset(output, "txt,pyd", decode={"pyd": pickle.loads})
    assert list(loaded) == [("x", {"caption": "é"})]


def read_depth(data: bytes) -> Any:
    """Keep all 16 bits."""
    return np.asarray(Image.open(io.BytesIO(data)))


def test_each_field_is_decoded_in_its_own_way(tmp_path: Path) -> None:
    """And every spelling makes 8-bit RGB of a depth map and of ids, as its docstring says."""
    source, output = tmp_path / "source", tmp_path / "o"
    source.mkdir()
    depth = np.array([[0, 255, 256, 65_520]], dtype=np.uint16)
    mask = Image.new("P", (4, 1), 3)
    mask.putpalette([9 * number % 256 for number in range(768)])
    Image.new("RGBA", (4, 1), (10, 20, 30, 40)).save(source / "a.png")
    Image.fromarray(depth).save(source / "a.depth.png")
    mask.save(source / "a.mask.png")
    (source / "a.txt").write_text("é", encoding="utf-8")
    fields = "png,depth.png,mask.png,txt"
    create_webdataset(source, output, 0, 1, fields)
    ways = {"PNG": "rgba8", "depth.png": read_depth, "mask.png": None}
    dataset = pickle.loads(pickle.dumps(open_webdataset(output, fields, decode=ways)))
    ((image, deep, ids, text),) = dataset
    assert image.tolist() == [[[10, 20, 30, 40]] * 4] and text == "é"
    assert deep.dtype == np.uint16 and (deep == depth).all()
    assert ids == (source / "a.mask.png").read_bytes()
    ((image, deep, ids, text),) = open_webdataset(output, fields, decode={"txt": bytes.upper})
    assert image.getpixel((0, 0)) == (10, 20, 30) and text == b"\xc3\xa9"
    assert [deep.getpixel((x, 0))[0] for x in range(4)] == [0, 255, 255, 255]
    assert ids.getpixel((0, 0)) == tuple(9 * number % 256 for number in (9, 10, 11))
    ((floats,),) = open_webdataset(output, "png", decode="l")
    assert floats.shape == (1, 4) and 0 < floats.max() < 1
    ((both,),) = open_webdataset(output, "jpg;png", decode={"jpg;png": "rgb8"})
    assert both.shape == (1, 4, 3)


def test_ways_to_decode_that_cannot_be(tmp_path: Path) -> None:
    create_webdataset(write_pairs(tmp_path / "s", 1), tmp_path / "o", 0, 1)
    for ways in ({"jpg": "RGB16"}, {"jpg": 7}, bytes):
        with pytest.raises(InputError, match=r"choose None, or one of .*or a function of its"):
            open_webdataset(tmp_path / "o", decode=ways)  # type: ignore[arg-type]
    for ways in ({"jpeg": None}, {"__key__": str}):
        with pytest.raises(InputError, match=r"decode names '.*', a field that is not asked for"):
            open_webdataset(tmp_path / "o", "__key__,jpg", decode=ways)
    failing = open_webdataset(tmp_path / "o", "txt", decode={"txt": {}.__getitem__})
    with pytest.raises(PackError, match=r"sample 'sample-0', field 'txt' .*decoded: KeyError"):
        list(failing)


@pytest.mark.parametrize("fields", ["jpg, txt", "jpg,", [""], "jpg;,txt", "a b"])
def test_fields_that_cannot_be(fields, tmp_path: Path) -> None:
    create_webdataset(write_pairs(tmp_path / "s", 1), tmp_path / "o", 0, 1)
    with pytest.raises(InputError, match="is not a field"):
        open_webdataset(tmp_path / "o", fields, decode=None)


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 10, 1_000])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_stopped_epoch_is_taken_up_exactly(tmp_path: Path, shuffle_buffer, shards: int) -> None:
    """Stopped at many places of three epochs: the rest, and the next epoch, are as if unbroken."""
    source, output = write_pairs(tmp_path / "source", 43), tmp_path / "o"
    for shard_id in range(shards):
        create_webdataset(source, output, shard_id, shards)

    def open_it() -> Any:
        return open_webdataset(
            output, "__key__,jpg", decode=None, shuffle_buffer=shuffle_buffer, seed=3
        )

    unbroken = open_it()
    epochs = [list(unbroken) for _ in range(4)]
    if shuffle_buffer > 1:
        assert len({tuple(key for key, _ in epoch) for epoch in epochs}) == 4
    for place in [0, 1, 5, 11, 12, 30, 42, 43]:
        for epoch in range(3):
            dataset = open_it()
            for _ in range(epoch):
                list(dataset)
            if place:  # else between two epochs, or before the first sample
                list(itertools.islice(dataset, place))
            state = json.loads(json.dumps(dataset.state_dict()))
            assert len(json.dumps(state)) < 200
            again = open_it()
            again.load_state_dict(state)
            assert list(again) == epochs[epoch][place:], (place, epoch)
            assert list(again) == epochs[epoch + 1]
            counted = open_it()
            counted.load_state_dict({"epoch": epoch, "batches": place, "batch_size": 1})
            assert list(counted) == epochs[epoch][place:]
            chosen = open_it()
            chosen.set_epoch(epoch)
            assert list(chosen) == epochs[epoch]


@pytest.mark.parametrize("batches", range(7))
def test_batches_of_two_workers_are_counted(batches: int, tmp_path: Path, monkeypatch) -> None:
    """A loader takes a batch of each in turn, and asks its first worker first when it goes on."""
    source, output = write_pairs(tmp_path / "source", 40), tmp_path / "o"
    for shard_id in range(4):
        create_webdataset(source, output, shard_id, 4)
    monkeypatch.setenv("NUM_WORKERS", "2")

    def read(worker: int, state: dict[str, int] | None = None) -> list[Any]:
        monkeypatch.setenv("WORKER", str(worker))
        dataset = open_webdataset(output, "__key__", decode=None, seed=3)
        if state:
            dataset.load_state_dict(state)
        return list(dataset)

    whole = [read(worker) for worker in range(2)]
    state = {"epoch": 0, "batches": batches, "batch_size": 3}
    for worker in range(2):
        turn = (worker + batches) % 2  # whose batch this worker's first one is
        taken = (batches + 1 - turn) // 2
        assert read(worker, state) == whole[turn][3 * taken :]


def test_states_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_pairs(tmp_path / "source", 12), tmp_path / "o"
    for shard_id in range(4):
        create_webdataset(source, output, shard_id, 4)
    dataset = open_webdataset(output, decode=None)
    list(dataset)
    state = dataset.state_dict()
    for wrong in ({}, {"epoch": "x"}, {"epoch": 1, "batches": 3}, 7):
        with pytest.raises(InputError, match="not a state of a dataset"):
            dataset.load_state_dict(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    other = open_webdataset(output, decode=None)
    other.load_state_dict(state)
    with pytest.raises(PackError, match="the state is of 1 ranks with 1 workers each, not of 2"):
        list(other)
    monkeypatch.undo()
    dataset = open_webdataset(output, decode=None)
    list(itertools.islice(dataset, 5))
    other = open_webdataset(output, decode=None)
    other.load_state_dict(dataset.state_dict())
    (source / "sample-0.jpg").write_bytes(bytes(50_000))
    create_webdataset(source, output, 0, 4)
    with pytest.raises(PackError, match="the shards have changed since the state was saved"):
        list(other)


def test_several_folders_and_chosen_shards(tmp_path: Path, capfd) -> None:
    everything = {}
    for name in ("one", "two"):
        source = write_pairs(tmp_path / f"{name}-source", 12)
        for path in list(source.iterdir()):
            path.rename(source / f"{name}-{path.name}")
        for shard_id in range(4):
            create_webdataset(source, tmp_path / name, shard_id, 4)
        everything[name] = sorted(path.stem for path in source.glob("*.jpg"))
        assert count_samples(tmp_path / name) == 12
    both = [tmp_path / "one", str(tmp_path / "two")]
    found = [key for (key,) in open_webdataset(both, "__key__", decode=None)]
    assert sorted(found) == everything["one"] + everything["two"]
    assert count_samples(both) == 24
    some = str(tmp_path / "one" / "shard-00000[13].tar")
    found = [key for (key,) in open_webdataset(some, "__key__", decode=None)]
    assert sorted(found) == sorted(everything["one"][1::4] + everything["one"][3::4])
    assert count_samples(some) == 6
    capfd.readouterr()
    assert read(["--path", some, "--quiet"]) == 0, "no shard is missed"
    assert capfd.readouterr().out.startswith("6 samples in 2 shards")
    assert read(["--path", some, "--source", str(tmp_path / "one-source")]) == 2
    assert "give their folder as --path" in capfd.readouterr().err
    (tmp_path / "one" / "notes.tar").touch()
    assert read(["--path", str(tmp_path / "one" / "*.tar")]) == 2
    os.truncate(tmp_path / "one" / "shard-000001.tar", 600)
    with pytest.raises(PackError, match=r"shard-000001.tar': cut short"):
        count_samples(some)


def test_an_evaluation_on_more_ranks_than_shards(tmp_path: Path, monkeypatch) -> None:
    source, output = write_pairs(tmp_path / "source", 37), tmp_path / "o"
    for shard_id in range(3):
        create_webdataset(source, output, shard_id, 3)
    monkeypatch.setenv("WORLD_SIZE", "5")
    found = []
    for rank in "01234":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(PackError, match="3 shards for 5 ranks"):
            list(open_webdataset(output, decode=None))
        dataset = open_webdataset(output, "__key__", decode=None, shuffle_buffer=0, even=False)
        found += [key for (key,) in dataset]
    assert sorted(found) == sorted(path.stem for path in source.glob("*.jpg"))


def test_ranks_that_are_left_to_the_loader(tmp_path: Path, monkeypatch) -> None:
    """Each reads all, in the same order, for a loader that deals samples to ranks."""
    source, output = write_pairs(tmp_path / "source", 12), tmp_path / "o"
    create_webdataset(source, output, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        dataset = open_webdataset(output, "__key__", decode=None, split_by_node=False)
        found.append([list(pickle.loads(pickle.dumps(dataset))) for _ in range(2)])
    assert found[0] == found[1]
    assert sorted(found[0][0]) == sorted((path.stem,) for path in source.glob("*.jpg"))


def test_a_pipeline_takes_its_rank_along(tmp_path: Path, monkeypatch) -> None:
    """A worker that is spawned gets the pipeline by pickle, and has no process group."""
    source, output = write_pairs(tmp_path / "source", 12), tmp_path / "o"
    for shard_id in range(4):
        create_webdataset(source, output, shard_id, 4)
    dataset = open_webdataset(output, "__key__", decode=None, shuffle_buffer=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    expected, pickled = list(dataset), pickle.dumps(dataset)
    monkeypatch.undo()
    again = pickle.loads(pickled)
    again.set_epoch(0)
    assert list(again) == expected and len(expected) == 6


def test_pipelines_can_be_mixed(tmp_path: Path) -> None:
    mixed = []
    for name, number in (("one", 40), ("two", 10)):
        source = write_pairs(tmp_path / f"{name}-source", number)
        create_webdataset(source, tmp_path / name, 0, 1)
        mixed.append(open_webdataset(tmp_path / name, "__key__,txt", decode=None))
    found = list(wds.RandomMix(mixed, [0.8, 0.2], longest=True))
    assert len(found) == 50
