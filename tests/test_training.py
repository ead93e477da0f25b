"""The training pipeline, without torch: every sample once, in an order that the seed decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_pairs

from create_webdataset import create_webdataset
from read_webdataset import open_webdataset
from sharding.errors import InputError


@pytest.mark.parametrize("decode", ["PIL", "pillow", "torchRGB", "", True])
def test_spellings_of_decode(decode: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"choose None, or one of .*pilrgb, .*torchrgb"):
        open_webdataset(tmp_path, decode=decode)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="didn't find"):
        list(open_webdataset(tmp_path / "o", "cls,json"))


@pytest.mark.parametrize("fields", ["jpg, txt", "jpg,", [""], "jpg;,txt", "a b"])
def test_fields_that_cannot_be(fields, tmp_path: Path) -> None:
    create_webdataset(write_pairs(tmp_path / "s", 1), tmp_path / "o", 0, 1)
    with pytest.raises(InputError, match="is no field"):
        open_webdataset(tmp_path / "o", fields, decode=None)
