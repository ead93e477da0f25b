"""The functions in examples/: packed, proved, opened."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, jpeg, members, run_script
from PIL import Image

from read_webdataset import main as read
from read_webdataset import open_webdataset
from sharding.shards import shard_name

EXAMPLES = ROOT / "examples"


def pack_and_prove(source: Path, output: Path, spec: str, *flags: str) -> dict[str, bytes]:
    """Pack with two workers, prove what is there; return the members."""
    given = ["--source", source, f"--transform={spec}", *flags]
    done = run_script(
        "run_parallel.sh", *given, "--output", output, "--num-workers=2", "--num-shards=2"
    )
    assert done.returncode == 0, done
    assert read(["--path", str(output), *map(str, given), "--decode", "--quiet"]) == 0
    return members(output / shard_name(0)) | members(output / shard_name(1))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Six pictures, one of which lies on its side."""
    for name in ("cats/1", "cats/2", "cats/3", "dogs/1", "dogs/2", "dogs/3"):
        path = tmp_path / "pets" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(640, 320))
    side = Image.new("RGB", (640, 320), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    side.save(tmp_path / "pets" / "cats" / "2.JPEG", exif=exif)
    return tmp_path / "pets"


def test_shrink(pets: Path, tmp_path: Path) -> None:
    for path in list(pets.rglob("*.JPEG")):
        path.rename(path.with_suffix(".jpg"))
    found = pack_and_prove(pets, tmp_path / "o", f"{EXAMPLES}/shrink.py:shrink", "--fields=jpg")
    assert len(found) == 12 and found["cats/1.cls"] == b"0" and found["dogs/3.cls"] == b"1"
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in found.items() if "j" in name}
    assert sizes.pop("cats/2.jpg") == (128, 256), "upright"
    assert set(sizes.values()) == {(256, 128)}
    data = open_webdataset(tmp_path / "o", ("jpg", "cls"), decode="pil")
    assert sorted(label for _, label in data) == [0, 0, 0, 1, 1, 1]
    (pets / "birds").mkdir()
    (pets / "birds" / "1.jpg").write_bytes(jpeg(8, 8))
    spec = f"--transform={EXAMPLES}/shrink.py:shrink"
    done = run_script(
        "run_parallel.sh", "--source", pets, "--fields=jpg", "--output", pets / "../p", spec
    )
    assert done.returncode == 2 and "sample 'birds/1': " in done.stderr, "a class that is not there"
    assert "shrink.py', line 23: ValueError: " in done.stderr, done


def test_classes(pets: Path, tmp_path: Path) -> None:
    """As ImageNet comes; and each of train and val by the same list."""
    shutil.copy(EXAMPLES / "classes.py", tmp_path)
    (tmp_path / "classes.txt").write_text("birds\ncats\ndogs\n")
    spec = f"{tmp_path}/classes.py:number"
    found = pack_and_prove(pets, tmp_path / "o", spec, "--fields=jpg;jpeg")
    assert found["cats/1.jpg"] == jpeg(640, 320), "the picture's own bytes"
    assert [found[f"{name}/1.cls"] for name in ("cats", "dogs")] == [b"1", b"2"]
    data = open_webdataset(tmp_path / "o", ("jpg", "cls"), decode="pil")
    assert sorted(label for _, label in data) == [1, 1, 1, 2, 2, 2]
    (tmp_path / "classes.txt").write_text("birds\ncats\n")
    flags = ["--source", pets, "--output", tmp_path / "p", "--fields=jpg;jpeg"]
    done = run_script("run_parallel.sh", *flags, f"--transform={spec}")
    assert done.returncode == 1 and "no class 'dogs' in classes.txt" in done.stderr, done


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_captions(table: str, pets: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(pets)) for path in pets.rglob("*.JPEG"))
    rows = [{"file_name": n, "text": f"é, {n}", "license": "CC0"} for n in names]
    lines = [json.dumps(row) for row in rows]
    if table == "metadata.csv":
        lines = ["file_name,text,license", *(f'{n},"é, {n}",CC0' for n in names)]
    (pets / table).write_text("\n".join([*lines, ""]), encoding="utf-8")
    text = (EXAMPLES / "captions.py").read_text().replace('sample["jpg"]', 'sample["jpeg"]')
    (pets / "captions.py").write_text(text)
    spec = f"{pets}/captions.py:caption"
    found = pack_and_prove(pets, tmp_path / "o", spec, "--fields=jpeg")
    assert found["cats/1.txt"].decode() == "é, cats/1.JPEG"
    assert json.loads(found["dogs/2.json"]) == {"license": "CC0"}
    data = open_webdataset(tmp_path / "o", ("jpg", "txt", "json"), decode="pil")
    assert {meta["license"] for _, _, meta in data} == {"CC0"}
    flags = ["--source", pets, "--output", tmp_path / "p", "--fields=jpeg", f"--transform={spec}"]
    (pets / table).write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 1 and "the table has no row for this picture" in done.stderr, done
    assert f"5 rows in {pets / table}\n" in done.stderr
    (pets / table).write_text("\n".join([*lines, lines[-1], ""]), encoding="utf-8")
    done = run_script("run_parallel.sh", *flags, "--replace")
    assert done.returncode == 2 and "ValueError: two rows for 'dogs/3' in" in done.stderr, done


def test_drop_broken(pets: Path, tmp_path: Path) -> None:
    whole = (pets / "cats" / "1.JPEG").read_bytes()
    (pets / "cats" / "1.JPEG").write_bytes(whole[: len(whole) // 2])
    (pets / "dogs" / "2.JPEG").write_bytes(b"no picture")
    spec = f"{EXAMPLES}/drop_broken.py:whole"
    found = pack_and_prove(pets, tmp_path / "o", spec, "--fields=jpeg")
    assert set(found) == {f"{n}.jpeg" for n in ("cats/2", "cats/3", "dogs/1", "dogs/3")}
    assert found["cats/3.jpeg"] == whole, "the picture's own bytes"
    flags = ["--source", pets, "--output", tmp_path / "o", "--fields=jpeg", f"--transform={spec}"]
    done = run_script("run_parallel.sh", *flags, "--num-workers=2")
    assert done.stdout.endswith("; 2 dropped by whole\n"), done
    assert "cats/1.jpeg: " in done.stderr and "dogs/2.jpeg: " in done.stderr
