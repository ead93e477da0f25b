"""What Google's store has of its own, on fake-gcs-server: it is read, and not written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCHEME, Bucket, run_script, write_pairs

from sharding.training import count_samples, open_webdataset

pytestmark = pytest.mark.skipif(SCHEME != "gs", reason="of Google")


def test_source_pack_from_there_and_prove(bucket: Bucket, tmp_path: Path) -> None:
    source = bucket.upload(write_pairs(tmp_path / "raw", 40), "raw/")
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards", "4"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    path = bucket.upload(tmp_path / "o", "o/")
    done = run_script("read_webdataset.py", "--path", path, "--source", source, "--quiet")
    assert done.returncode == 0 and "40 samples in 4 shards" in done.stdout, done
    assert count_samples(path) == 40
    assert len(list(open_webdataset(path, decode={"jpg": None, "txt": None}))) == 40


@pytest.mark.parametrize("script", ["create_webdataset.py", "run_parallel.sh"])
def test_an_output_there_is_refused(script: str, bucket: Bucket, tmp_path: Path) -> None:
    """With the way round, and nothing is written."""
    more = ["--shard-id=0", "--total-shards=1"] if script.startswith("create") else []
    flags = ["--source", write_pairs(tmp_path / "raw", 2), "--output", f"{bucket.url}/o", *more]
    done = run_script(script, *flags)
    assert done.returncode == 2 and "pack into a folder, and copy that" in done.stderr, done
    assert done.stderr.count("\n") == 1 and not bucket.hashes()


@pytest.mark.usefixtures("bucket")
def test_no_such_bucket() -> None:
    done = run_script("read_webdataset.py", "--path", "gs://no-such-bucket/x", timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
def test_memory_of_a_source(bucket: Bucket, tmp_path: Path) -> None:
    for number in range(200):
        bucket.put(f"raw/{number}.jpg", os.urandom(300_000 if number else 100 << 20))
        bucket.put(f"raw/{number}.txt", b"x")
    code = (
        "import re, sys, create_webdataset as c; "
        "code = c.main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], code)"
    )
    flags = ["--source", f"{bucket.url}/raw", "--output", tmp_path / "o"]
    command = [sys.executable, "-c", code, *map(str, flags), "--shard-id=0", "--total-shards=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    peak, code = done.stdout.split()[-2:]
    assert code == "0" and int(peak) < 200_000, done
