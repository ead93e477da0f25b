"""Reading shards from a bucket of a real server: show, check, decode, preview, train, resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest
from conftest import (
    DRIVERS,
    ENDPOINT,
    KEYS,
    ROOT,
    Bucket,
    of_s3,
    of_seaweedfs,
    run_script,
    slow_proxy,
    through_proxies,
    write_pairs,
)
from proxy import Answer, start_proxy

from create_webdataset import create_webdataset
from read_webdataset import count_samples, open_webdataset
from read_webdataset import main as read
from sharding import show
from sharding.bucket import store, streams
from sharding.errors import InputError, PackError, StopRun
from sharding.reading import read_samples


@pytest.fixture
def shards(bucket: Bucket, tmp_path: Path) -> tuple[str, Path]:
    """40 samples in 3 shards, in a bucket and in a folder."""
    run_script("make_dummy_data.sh", "40", tmp_path / "source")
    for shard_id in range(3):
        create_webdataset(tmp_path / "source", tmp_path / "o", shard_id, 3)
    return bucket.upload(tmp_path / "o"), tmp_path


def test_shows_and_checks_what_a_folder_shows(shards, capsys) -> None:
    url, folder = shards
    look = ["--limit", "3"]
    for flags in (
        look,
        [*look, "--no-check"],
        ["--decode", "--quiet"],
        ["--quiet", "--num-workers=2"],
    ):
        assert read(["--path", str(folder / "o"), *flags]) == 0
        expected = capsys.readouterr()
        assert read(["--path", url + "/", *flags]) == 0
        assert capsys.readouterr() == expected
    done = run_script("read_webdataset.py", "--path", url, "--source", folder / "source")
    assert done.returncode == 0 and "each sample of" in done.stdout, done.stderr
    assert read(["--path", url, "--quiet", "--preview", str(folder / "p.png")]) == 0
    assert (folder / "p.png").stat().st_size > 1_000
    assert read(["--path", url, "--quiet", "--preview", f"{url}/p.png"]) == 2


def test_faults_are_found(shards, bucket: Bucket, capsys) -> None:
    url, folder = shards
    bucket.put("shard-000001.tar", (folder / "o/shard-000001.tar").read_bytes()[:-15_000])
    bucket.put("shard-00000.tar", b"")
    assert read(["--path", url, "--quiet"]) == 1
    said = capsys.readouterr()
    assert "damaged: shard-000001.tar: cut short" in said.err
    assert "stray file" in said.err and "2 faults" in said.out
    with pytest.raises(PackError, match="stray file"):
        open_webdataset(url)


def test_a_pattern_and_a_list(shards) -> None:
    url, folder = shards
    both = [
        open_webdataset(
            [f"{base}/shard-00000[01].tar", f"{base}/shard-000002.tar"],
            decode=None,
            shuffle_buffer=0,
        )
        for base in (url, folder / "o")
    ]
    ours, theirs = map(list, both)
    assert ours == theirs and len(ours) == 40
    assert count_samples(url) == 40 and count_samples(f"{url}/shard-000002.tar") == 13
    assert read(["--path", f"{url}/shard-00000[02].tar", "--quiet"]) == 0, "no shard is missed"
    with pytest.raises(InputError, match=r"has no shard-\*.tar"):
        open_webdataset(f"{url}/shard-00001*.tar")


def test_a_dataset_that_is_replaced_while_it_is_shown(
    shards, bucket: Bucket, capsys, monkeypatch
) -> None:
    url, folder = shards
    shown = show.print_sample

    def replaced(number: int, sample: dict) -> None:
        shown(number, sample)
        if number == 39:  # the last one: nothing more is read
            create_webdataset(folder / "source", folder / "other", 0, 3, "txt")
            bucket.upload(folder / "other")

    monkeypatch.setattr(show, "print_sample", replaced)
    assert read(["--path", url]) == 1
    out, err = capsys.readouterr()
    assert "the dataset was replaced while it was read; run again" in err and "OK" not in out


def test_an_unfinished_run_is_refused(shards, bucket: Bucket, capsys) -> None:
    url, _ = shards
    bucket.put(".webdataset-plan", b"{}")
    assert read(["--path", url]) == 1
    assert "a run is not finished" in capsys.readouterr().err
    with pytest.raises(PackError, match="a run is not finished"):
        count_samples(url)


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "a b+c%20", "é", "a:b"])
def test_odd_prefixes(name: str, bucket: Bucket, tmp_path: Path) -> None:
    """obstore's `from_url` would cut them at # and ?."""
    create_webdataset(write_pairs(tmp_path / "source", 3), tmp_path / "o", 0, 1)
    url = bucket.upload(tmp_path / "o", f"{name}/")
    assert count_samples(url) == 3 and read(["--path", url, "--quiet"]) == 0


def test_ranges(bucket: Bucket) -> None:
    """Any way to read gives the object's bytes; ranges grow while they follow each other."""
    data = bytes(range(256)) * (80 << 10)
    bucket.put("large", data)
    raw = streams.Ranges(f"{bucket.url}/large")
    got = bytearray()
    while part := raw.peek():
        got += part
        raw.seek(len(got))
    assert got == data and raw.length == streams.LARGEST_RANGE
    for place in (5 << 20, 100, (20 << 20) - 10, 7 << 20, (7 << 20) + 10, 0):
        raw.seek(place)
        assert raw.read(1_000) == data[place : place + 1_000]
    assert raw.seek(0, 2) == len(data) and raw.read(10) == b""
    raw.close()


def test_a_replaced_object_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    create_webdataset(write_pairs(tmp_path / "s", 100, 1_000_000), tmp_path / "o", 0, 1)
    url = bucket.upload(tmp_path / "o")
    samples = iter(open_webdataset(url, decode=None, shuffle_buffer=0))
    next(samples)
    bucket.put("shard-000000.tar", bytes(60 << 20))
    with pytest.raises(PackError, match="it was replaced while it was read"):
        list(samples)
    (tmp_path / "s" / "sample-0.jpg").write_bytes(b"")
    create_webdataset(tmp_path / "s", tmp_path / "o", 0, 1)
    bucket.upload(tmp_path / "o")
    shard = f"{url}/shard-000000.tar"
    later = [sample["jpg"] for sample in read_samples(shard, later=lambda: True)]
    read = [content.read() for content in later]
    assert read == [sample["jpg"] for sample in read_samples(shard)] and read[0] == b""
    bucket.put("shard-000000.tar", bytes(60 << 20))
    with pytest.raises(PackError, match="it was replaced while it was read"):
        later[1].read()
    bucket.delete("shard-000000.tar")
    with pytest.raises(PackError, match="no such object"):
        streams.Ranges(f"{url}/shard-000000.tar")


def test_exact_resume(shards) -> None:
    """What is left of an epoch, after a state that went through JSON."""
    url, _ = shards
    for place in (0, 1, 12, 14, 30):
        whole = open_webdataset(url, decode=None, seed=3)
        expected = list(whole)
        cut = open_webdataset(url, decode=None, seed=3)
        samples = iter(cut)
        before = [next(samples) for _ in range(place)]
        state = json.loads(json.dumps(cut.state_dict()))
        rest = open_webdataset(url, decode=None, seed=3)
        rest.load_state_dict(state)
        assert before + list(rest) == expected
        assert list(rest) == list(whole)


FORK = """
import os, sys
from read_webdataset import count_samples, open_webdataset
url, used = sys.argv[1:]
dataset = open_webdataset(url, decode=None)
count_samples(url)
if used == "used":
    next(iter(dataset))
process = os.fork()
if not process:
    try:
        os._exit(len(list(dataset)))
    except Exception as error:
        print(error, flush=True)
        os._exit(100)
sys.exit(os.waitpid(process, 0)[1] >> 8)
"""


def test_forked_workers(shards) -> None:
    """They read, as long as nobody has read before the fork: then obstore would hang."""
    command = [sys.executable, "-c", FORK, shards[0]]
    done = subprocess.run([*command, "fresh"], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 40, done
    done = subprocess.run([*command, "used"], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 100 and b'multiprocessing_context="spawn"' in done.stdout, done


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "hidden-one"}, "check AWS_SECRET_ACCESS_KEY"),
    "key": ({"AWS_ACCESS_KEY_ID": "hidden-key"}, "check AWS_ACCESS_KEY_ID"),
    "bucket": ({}, "there is no such bucket"),
    "endpoint": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "does not answer; check AWS_ENDPOINT"),
    "none": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID"),
    "no URL": ({"AWS_ENDPOINT_URL": "127.0.0.1:18401"}, "AWS_ENDPOINT_URL: not a URL such as"),
    "password": (
        {"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:1"},
        "127.0.0.1:1 does not answer",
    ),
    "proxy": (
        {"HTTP_PROXY": "http://me:hidden@127.0.0.1:1"},
        "the proxy 127.0.0.1:1 (HTTP_PROXY) does not answer; check it, or add",
    ),
    "proxy of all": ({"all_proxy": "127.0.0.1:1"}, "the proxy 127.0.0.1:1 (all_proxy) does not"),
    "no proxy": (
        {
            "HTTP_PROXY": "http://127.0.0.1:2",
            "NO_PROXY": "127.0.0.1",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        },
        "127.0.0.1:1 does not answer; check AWS_ENDPOINT_URL",
    ),
    "no proxy in a network": (
        {
            "HTTP_PROXY": "http://127.0.0.1:2",
            "NO_PROXY": "127.0.0.0/8",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        },
        "127.0.0.1:1 does not answer; check AWS_ENDPOINT_URL",
    ),
    "profile": ({"AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": "work"}, "AWS_PROFILE 'work'"),
}


@of_seaweedfs
@pytest.mark.parametrize("what", WRONG)
def test_what_a_user_gets_wrong(what: str, bucket: Bucket, tmp_path: Path) -> None:
    """One line with the cure, exit code 2, within 30 seconds, and never a secret."""
    environment, cure = WRONG[what]
    url = "s3://no-such-bucket/x" if what == "bucket" else bucket.url
    environment = {"HOME": str(tmp_path), **environment}
    done = run_script("read_webdataset.py", "--path", url, env=environment, timeout=30)
    assert done.returncode == 2 and cure in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "secret-of-tests" not in done.stderr
    assert "hidden" not in done.stderr and "Signature" not in done.stderr


@of_s3
@pytest.mark.parametrize(
    ("status", "scheme", "said"),
    [
        (403, "https", "HTTPS_PROXY) does not connect to 127.0.0.1:9; check it, or add the store"),
        (407, "https", "(HTTPS_PROXY) asks for a user name and a password"),
        (403, "http", "(HTTP_PROXY), says 403"),
        (407, "http", "(HTTP_PROXY) asks for a user name and a password"),
        (502, "http", "(HTTP_PROXY), says 502"),
    ],
)
def test_a_proxy_that_refuses(
    status: int, scheme: str, said: str, server: dict[str, str], tmp_path: Path
) -> None:
    """Is named as the proxy: the store knows nothing of it."""
    url = start_proxy(server["AWS_ENDPOINT_URL"], "", lambda _: Answer(status))
    environment = {
        **server,
        f"{scheme}_proxy".upper(): url,
        "AWS_ENDPOINT_URL": f"{scheme}://127.0.0.1:9",
        "HOME": str(tmp_path),
    }
    done = run_script("read_webdataset.py", "--path", "s3://b/x", env=environment, timeout=30)
    assert done.returncode == 2 and f"the proxy {urlsplit(url).netloc} " in done.stderr, done
    assert said in done.stderr and done.stderr.count("\n") == 1


@of_seaweedfs
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("flag", ["--source", "--output"])
def test_drivers_find_it_out_before_any_work(
    driver: str, flag: str, bucket: Bucket, tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "source", 4)
    flags = ["--source", source, "--output", tmp_path / "o", flag, bucket.url]
    environment = {"AWS_SECRET_ACCESS_KEY": "hidden-one"}
    done = run_script(driver, *flags, env=environment, timeout=30)
    assert done.returncode == 2 and "check AWS_SECRET_ACCESS_KEY" in done.stderr, done
    assert "hidden" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists() and not bucket.hashes()


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("<Code>AuthorizationHeaderMalformed</Code>", "in another region; set AWS_REGION"),
        ("status code: 301 Moved Permanently: ", "in another region"),
        ("<Code>SlowDown</Code>", "the store says SlowDown"),
        ("status code: 403 Forbidden", "set AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_other_stores_say(text: str, cure: str) -> None:
    """Answers that the server of the tests never gives."""
    with pytest.raises(PackError, match=cure), store.saying("s3://bucket/x"):
        raise obstore.exceptions.GenericError(f"Generic S3 error: {text}\nDebug: secret")


def test_a_listing_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out: it runs in a process of its own."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PackError, match="in a process of its own failed: exit code 1"):
        open_webdataset("s3://bucket/x")


def test_ctrl_c_ends_a_listing(tmp_path: Path) -> None:
    """Of a store that does not answer: nothing goes on, or complains, behind the prompt."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, ROOT / "read_webdataset.py", "--path", "s3://bucket/x", "--quiet"],
            env={**os.environ, **KEYS, "AWS_ENDPOINT_URL": endpoint, "HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        listener.accept()  # of the process that lists
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=10)  # ends when both have closed their ends
    assert (process.returncode, err) == (-signal.SIGINT, b"")


@through_proxies
def test_a_store_that_is_away_for_a_while(bucket: Bucket, monkeypatch) -> None:
    """obstore's own ten retries are over in less than five seconds."""
    bucket.put("x", b"data")
    monkeypatch.setenv(ENDPOINT, slow_proxy(1 << 30, from_when=6))
    store._connect.cache_clear()
    assert streams.Ranges(f"{bucket.url}/x").read(4) == b"data"
    monkeypatch.setenv(ENDPOINT, slow_proxy(1 << 30, from_when=60))
    monkeypatch.setattr(store, "RETRY_TIME", 2)
    store._connect.cache_clear()
    with pytest.raises(StopRun, match="does not answer"):
        streams.Ranges(f"{bucket.url}/x")
    store._connect.cache_clear()


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="takes a minute: `make soak`")
def test_a_slow_store(bucket: Bucket, monkeypatch) -> None:
    """obstore gives a request 30 seconds by default, its body included; a range may take longer."""
    data = os.urandom(12 << 20)
    bucket.put("large", data)
    monkeypatch.setenv(ENDPOINT, slow_proxy(200_000))
    store._connect.cache_clear()
    began = time.monotonic()
    with streams.Ranges(f"{bucket.url}/large") as ranges:
        assert ranges.fetch(0, streams.LARGEST_RANGE) == data[: streams.LARGEST_RANGE]
    assert time.monotonic() - began > 35
    store._connect.cache_clear()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://tests/a//b", "s3://tests/../x", "s3://t/\n"]
)
def test_urls_that_name_nothing(url: str, capsys) -> None:
    assert read(["--path", url]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("names no bucket" in err or "a key can have no empty" in err)


@pytest.mark.parametrize("url", ["hf://b/x", "AZ://b/x", "https://b/x", "file:///x", "S3://b/x"])
def test_other_schemes_are_refused(url: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(["--path", url]) == 2
    assert "such URLs are not supported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
