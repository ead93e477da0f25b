"""What Azure has of its own, on Azurite: etags, deletion, two uploads to one blob, credentials."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import obstore
import proxy
import pytest
from conftest import SCHEME, Bucket, hashes, pack_shard_of, run_script, write_pairs
from stores.servers import ACCOUNT, ACCOUNT_KEY

from create_webdataset import create_webdataset
from read_webdataset import main as read
from sharding import run as runs
from sharding.bucket import store
from sharding.bucket.streams import Upload
from sharding.errors import PackError
from sharding.listing import list_samples

pytestmark = pytest.mark.skipif(SCHEME != "az", reason="of Azure")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two samples of 13 MB each, so that shards are uploaded in parts."""
    source = write_pairs(tmp_path / "raw", 2)
    for number in range(2):
        (source / f"sample-{number}.jpg").write_bytes(os.urandom(13 << 20))
    return source


def start(source: Path, output: str, resume: bool = False) -> runs.Run:
    return runs.start(list_samples(source), output=output, total_shards=1, resume=resume)


def test_etags_with_and_without_quotes(bucket: Bucket) -> None:
    """One version, however it is told of."""
    bucket.put("x", b"data")
    there = store.connect("az://tests")
    (listed,) = obstore.list(there, bucket.prefix).collect()
    head = obstore.head(there, f"{bucket.prefix}/x")
    assert listed["e_tag"] == head["e_tag"].strip('"') != head["e_tag"]
    assert store.version_of(listed) == store.version_of(head)


def test_what_is_gone_is_deleted(bucket: Bucket) -> None:
    """Alone, and among others, which are deleted as well."""
    there = store.connect("az://tests")
    for number in range(600):  # of which a request takes 256
        bucket.put(f"{number}")
    keys = [f"{bucket.prefix}/{number}" for number in (*range(600), 1_000)]
    with pytest.raises(FileNotFoundError):
        obstore.delete(there, keys[-1])
    store.delete(bucket.url, keys[-1])
    store.delete(bucket.url, [keys[-1], *keys])
    assert not bucket.hashes()


def test_two_attempts_of_one_run(raw: Path, bucket: Bucket) -> None:
    """Azure drops the parts of the second; what the first has made is what it would have made."""
    run = start(raw, bucket.url)
    samples = run.samples(0)
    one, other = (run.pack(0, samples, None) for _ in range(2))
    assert other.store().bytes == one.store().bytes
    run.finish()
    assert read(["--path", bucket.url, "--source", str(raw), "--quiet"]) == 0


def test_an_upload_of_a_run_that_was_taken_over(raw: Path, bucket: Bucket, monkeypatch) -> None:
    """Between its look at the plan and the end of its upload: that is what the error says."""
    older = start(raw, bucket.url)
    shard = older.pack(0, older.samples(0), None)
    complete = Upload.complete

    def late(upload: Upload) -> object:
        monkeypatch.setattr(Upload, "complete", complete)
        newer = start(raw, bucket.url, resume=True)
        pack_shard_of(newer, 0)
        newer.finish()
        return complete(upload)

    monkeypatch.setattr(Upload, "complete", late)
    with pytest.raises(PackError, match="is gone: the run was published, or another took it over"):
        shard.store()
    assert read(["--path", bucket.url, "--source", str(raw), "--quiet"]) == 0


def test_an_older_upload_that_comes_late(raw: Path, bucket: Bucket) -> None:
    """It drops the parts of the run that is at work: nothing is lost, and --resume goes on."""
    run = start(raw, bucket.url)
    shard = run.pack(0, run.samples(0), None)
    key = f"{bucket.prefix}/shard-000000.tar"
    with obstore.open_writer(bucket.store, key, buffer_size=5 << 20) as late:
        late.write(bytes(12 << 20))  # in parts, as the upload of the older run
    with pytest.raises(PackError, match=r"another has written it meanwhile; run again with --res"):
        shard.store()
    flags = ["--source", raw, "--output", bucket.url, "--num-shards", "1", "--resume"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    assert read(["--path", bucket.url, "--source", str(raw), "--quiet"]) == 0


@pytest.mark.parametrize("how", [proxy.Lost(), proxy.Reset()])
def test_each_request_fails_once(
    how: proxy.Lost | proxy.Reset, raw: Path, bucket: Bucket, tmp_path: Path, monkeypatch
) -> None:
    """Of all that changes the store: asked again, and not taken for what another run did."""
    lost: Counter[tuple[str, str]] = Counter()

    def lose(request: proxy.Request) -> proxy.Lost | proxy.Reset | None:
        if request.method not in ("PUT", "POST", "DELETE"):
            return None
        if isinstance(how, proxy.Reset) and {"if-match", "if-none-match"} & request.headers.keys():
            return None  # not repeated: the run ends, and --resume goes on
        what = request.method, request.path
        lost[what] += 1
        return how if lost[what] % 2 else None  # once, and not the second attempt

    url = proxy.start_proxy(os.environ["AZURITE_BLOB_STORAGE_URL"], "", lose)
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", url)
    store._connect.cache_clear()
    start(raw, bucket.url)
    run = start(raw, bucket.url, resume=True)
    pack_shard_of(run, 0)
    run.finish()
    store._connect.cache_clear()
    for part in ("comp=block&", "comp=blocklist", "comp=batch"):
        assert any(part in path for _, path in lost), (part, lost)
    create_webdataset(raw, tmp_path / "o", 0, 1)
    assert bucket.hashes() == hashes(tmp_path / "o")


def emulator(**more: str) -> dict[str, str]:
    """Return an environment that leads to it as to any account."""
    endpoint = f"{os.environ['AZURITE_BLOB_STORAGE_URL']}/{ACCOUNT}"
    return {
        "AZURE_STORAGE_USE_EMULATOR": "false",
        "AZURE_STORAGE_ENDPOINT": endpoint,
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        **more,
    }


def test_an_account_and_its_key(bucket: Bucket, tmp_path: Path) -> None:
    """In place of the emulator's own variables."""
    source = bucket.upload(write_pairs(tmp_path / "raw", 4), "raw/")
    flags = ["--source", source, "--output", f"{bucket.url}/o", "--num-shards", "2"]
    environment = emulator(AZURE_STORAGE_ACCOUNT_KEY=ACCOUNT_KEY)
    done = run_script("run_parallel.sh", *flags, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(bucket.hashes("o")) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"AZURE_STORAGE_ACCOUNT_KEY": "aGlkZGVu"}, "the credentials are wrong; check"),
        ({"AZURE_STORAGE_SAS_TOKEN": "?sv=2021-08-06&sig=hidden"}, "the credentials are wrong"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}, "there is no such container"),
    ],
)
def test_what_a_user_gets_wrong(given: dict[str, str], said: str, bucket: Bucket) -> None:
    url = "az://no-such-container/x" if "container" in said else bucket.url
    done = run_script("read_webdataset.py", "--path", url, env=emulator(**given), timeout=30)
    assert done.returncode == 2 and said in done.stderr, done
    assert done.stderr.count("\n") == 1 and "hidden" not in done.stderr
