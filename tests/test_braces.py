"""Braces name shards, as every webdataset user writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import Bucket, run_script, write_pairs

from read_webdataset import count_samples, open_webdataset
from read_webdataset import main as read


def pack(folder: Path) -> Path:
    """Pack 40 samples into four shards."""
    source = write_pairs(folder / "source", 40)
    flags = ["--source", source, "--output", folder / "o", "--num-shards=4"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    return folder / "o"


def test_in_a_folder(tmp_path: Path, capfd) -> None:
    output = pack(tmp_path)
    path = f"{output}/shard-{{000000..000002}}.tar"
    assert read(["--path", path, "--quiet"]) == 0
    assert "30 samples in 3 shards" in capfd.readouterr().out
    assert count_samples(path) == 30
    assert len(list(open_webdataset(path, decode=None))) == 30
    for missing in ("{000003..000004}", "{000000,x*}"):
        assert read(["--path", f"{output}/shard-{missing}.tar"]) == 2
        assert "No such file" in capfd.readouterr().err
    shutil.copytree(output, tmp_path / "{a,b}")  # that is its name
    assert count_samples(tmp_path / "{a,b}") == 40


def test_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.upload(pack(tmp_path), "o/")
    flags = ["--path", f"{url}/shard-{{000000..000002}}.tar", "--quiet"]
    assert "30 samples in 3 shards" in run_script("read_webdataset.py", *flags).stdout
    done = run_script("read_webdataset.py", "--path", f"{url}/shard-{{000000,9}}.tar", "--quiet")
    assert done.returncode == 2 and "No such file" in done.stderr
