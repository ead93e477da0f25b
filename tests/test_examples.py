"""The examples that need no torch; `make interop` runs the training loops."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import hashes, run_script, touch


def link(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run link_pairs.py in a folder, as a user would."""
    return run_script("examples/link_pairs.py", *arguments, cwd=folder)


def texts(folder: Path) -> dict[str, str]:
    """Return what the files below a folder of links hold."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


def test_two_folders(tmp_path: Path) -> None:
    touch(tmp_path / "images", "x/a.jpg", "b.JPG", "lonely.jpg", ".hidden")
    touch(tmp_path / "captions", "x/a.txt", "b.txt", "left.txt")
    done = link(tmp_path, "images", "captions", "links")
    assert (done.returncode, done.stdout) == (0, "2 pairs in links\n")
    lonely = "left out, without a caption: 'lonely.jpg'\n"
    assert done.stderr == f"{lonely}left out, without a picture: 'left.txt'\n"
    names = ["b.JPG", "b.txt", "x/a.jpg", "x/a.txt"]
    assert texts(tmp_path / "links") == {name: name for name in names}
    packed = run_script(
        "run_parallel.sh", "--source", "links", "--output", "o", "--num-shards", "1", cwd=tmp_path
    )
    assert "2 samples in 1 shard," in packed.stdout, packed.stderr


ROWS = [("x/a.jpg", "one, é"), ("b.jpg", "two"), ("b.jpg", "again\nand again"), ("no.jpg", "3")]
LINKED = {
    "x/a.jpg": "x/a.jpg",
    "x/a.txt": "one, é",
    "b.jpg": "b.jpg",
    "b.txt": "two",
    "b-2.jpg": "b.jpg",
    "b-2.txt": "again\nand again",
}


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["commas.csv", "semicolons.csv", "tabs.tsv", "metadata.jsonl"])
def test_a_table(tmp_path: Path, name: str, mark: str) -> None:
    """With a byte-order mark, as Excel writes it, or without."""
    photos = touch(tmp_path / "photos", "x/a.jpg", "b.jpg", "lonely.jpg")
    if name == "metadata.jsonl":
        rows = [json.dumps({"file_name": file, "text": text}) for file, text in ROWS]
        (photos / name).write_text("\n".join(rows), encoding=mark)
    else:
        comma = {"commas.csv": ",", "semicolons.csv": ";", "tabs.tsv": "\t"}[name]
        rows = [f'{file}{comma}"{text}"' for file, text in (("file", "caption"), *ROWS)]
        (photos / name).write_text("\r\n".join(rows), encoding=mark, newline="")
    done = link(tmp_path, "photos", f"photos/{name}", "links")
    assert (done.returncode, done.stdout) == (0, "3 pairs in links\n"), done.stderr
    lonely = "left out, without a caption: 'lonely.jpg'\n"
    assert done.stderr == f"{lonely}left out, without a picture: 'no.jpg'\n"
    assert texts(tmp_path / "links") == LINKED


def test_classes_from_a_table(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a.jpg")
    (tmp_path / "labels.csv").write_text("id,picture,kind\n1,a.jpg,7\n")
    done = link(
        tmp_path, "photos", "labels.csv", "l", "--columns", "picture,kind", "--field", "cls"
    )
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "l") == {"a.jpg": "a.jpg", "a.cls": "7"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photos", "absent", "l"], "'absent' does not exist"),
        (["photos", "photos/t.csv", "photos/l"], "'photos/l' is inside 'photos'"),
        (["photos", "photos/t.csv", "full"], "'full' is there already"),
        (["photos", "photos/t.csv", "l"], "no column file_name or "),
        (["photos", "photos/t.csv", "l", "--columns", "name"], "two columns"),
        (["photos", "photos/bad.jsonl", "l"], "bad.jsonl"),
        (["photos", "photos/empty.csv", "l"], "no column"),
        (["photos", "full", "l"], "nothing has a partner"),
        (["photos", "photos/latin.csv", "l"], "latin.csv"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    photos = touch(tmp_path / "photos", "a.jpg")
    (photos / "t.csv").write_text("name,what\na.jpg,x\n")
    (photos / "bad.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n[1]\n')
    (photos / "latin.csv").write_bytes(b"file,text\na.jpg,\xe9\n")
    (photos / "empty.csv").write_text("")
    touch(tmp_path / "full", "other.txt")
    before = hashes(tmp_path)
    done = link(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("link_pairs.py: error: ")
    assert "Traceback" not in done.stderr
    assert hashes(tmp_path) == before and not (tmp_path / "l").exists()


def test_broken_pictures_go(tmp_path: Path) -> None:
    """Those that the report names, if told to, and nothing else."""
    source, packed, report = tmp_path / "source_data", tmp_path / "o", tmp_path / "faults.jsonl"
    run_script("make_dummy_data.sh", "10", source)
    (source / "sample-3.jpg").write_bytes(b"broken")
    whole = hashes(source)
    flags = ["--source", source, "--output", packed]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    (source / "sample-4.txt").write_text("changed")
    found = run_script(
        *("read_webdataset.py", "--path", packed, "--source", source),
        *("--decode", "--quiet", "--report", report),
    )
    assert found.returncode == 1
    assert len(report.read_text().splitlines()) == 2
    with report.open("a") as lines:  # by somebody who means no good
        for name in ("../outside", str(tmp_path / "outside"), "sample-99.jpg"):
            reason = "image that cannot be decoded"
            lines.write(json.dumps({"name": name, "reason": reason, "detail": ""}) + "\n")
    touch(tmp_path, "outside")
    show = ["examples/drop_faulty.py", report, source]
    shown = run_script(*show)
    assert shown.returncode == 0 and set(hashes(source)) == set(whole)
    assert shown.stdout.splitlines() == [
        f"{source}/sample-3.jpg: image that cannot be decoded",
        f"{source}/sample-99.jpg: it is not there",
        "1 file found; nothing is deleted without --delete",
    ]
    assert run_script(*show, "--delete").stdout.splitlines()[-1] == "1 file deleted"
    assert whole.keys() - hashes(source).keys() == {"sample-3.jpg"}
    assert (tmp_path / "outside").exists()
    assert "9 samples in 4 shards" in run_script("run_parallel.sh", *flags, "--skip-bad").stdout


def test_drop_faulty_refuses(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"file_name": "a"}\n')
    (tmp_path / "text").write_text("no JSON\n")
    for report, source in (
        ("absent", "."),
        ("other.jsonl", "."),
        ("text", "."),
        ("text", "s3://b"),
    ):
        done = run_script("examples/drop_faulty.py", report, source, "--delete", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("drop_faulty.py: error: ")
        assert done.stderr.count("\n") == 1
    done = run_script("examples/drop_faulty.py", "other.jsonl", "old/*.tar", "--delete")
    assert done.returncode == 2 and "nothing is deleted from archives" in done.stderr
