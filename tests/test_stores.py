"""Stores that lie, are old, or lose answers: refused before any work, or worked with, never lost.

All of them are the real server, behind a proxy that changes what it is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import proxy
import pytest
from conftest import (
    KEYS,
    MOSTLY_BASH,
    STORE,
    Bucket,
    hashes,
    of_s3,
    pack_shard_of,
    run_script,
    write_pairs,
)
from proxy import Answer, Lie, Lost, Request

from create_webdataset import create_webdataset
from create_webdataset import main as create
from read_webdataset import main as read
from sharding import run as runs
from sharding.bucket import claim, store, streams
from sharding.bucket.dataset import PLAN
from sharding.bucket.run import PACKED
from sharding.errors import PackError
from sharding.listing import list_samples

pytestmark = of_s3  # the proxy signs what it passes on as S3 wants it
MakeLiar = Callable[[Lie], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("source") / "raw", 12)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of a run into a folder."""
    output = tmp_path_factory.mktemp("expected")
    for shard_id in range(2):
        create_webdataset(source, output, shard_id, 2)
    return hashes(output)


@pytest.fixture
def liar(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLiar]:
    """Make the store lie from now on."""
    assert bucket
    server = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("SERVER", server)

    def make(lie: Lie) -> None:
        url = proxy.start_proxy(server, KEYS["AWS_SECRET_ACCESS_KEY"], lie)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store._connect.cache_clear()

    yield make
    store._connect.cache_clear()


def start(source: Path | str, output: str, resume: bool = False) -> runs.Run:
    listing = list_samples(source)
    return runs.start(listing, output=output, total_shards=2, resume=resume)


def packed(source: Path | str, output: str, resume: bool = False) -> runs.Run:
    """A run that is not published yet."""
    run = start(source, output, resume)
    for shard_id in range(2):
        pack_shard_of(run, shard_id)
    return run


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_a_store_that_knows_etags_without_quotes(
    driver: str, source: Path, expected: dict[str, str], bucket: Bucket, liar: MakeLiar
) -> None:
    """As Ceph 16: a run is published, read, proved; one that was interrupted is resumed."""
    liar(proxy.knows_no_quotes)
    flags = ["--source", source, "--output", bucket.url, "--num-shards", "2"]
    pack_shard_of(start(source, bucket.url), 0)
    done = run_script(driver, *flags, "--resume")
    assert done.returncode == 0 and "Shard 0 kept with 6 samples." in done.stdout, done
    assert bucket.hashes() == expected
    assert read(["--path", bucket.url, "--source", str(source), "--quiet"]) == 0
    older = packed(source, f"{bucket.url}/o")
    packed(source, f"{bucket.url}/o", resume=True).finish()
    with pytest.raises(PackError, match="is gone"):
        older.finish()
    assert bucket.hashes("o") == expected


def lists(change: Callable[[bytes], bytes]) -> Lie:
    """Change what a listing says."""

    def lie(request: Request) -> Answer | None:
        if not request.asks("GET", "list-type=2.*"):
            return None
        said = proxy.forward(urlsplit(os.environ["SERVER"]).netloc, request)
        headers = tuple(pair for pair in said.headers if pair[0].lower() != "content-length")
        return Answer(said.status, change(said.body), headers)

    return lie


LACKS = {
    "lists late": (
        lists(lambda said: re.sub(b"<Contents><Key>[^<]*probe.*?</Contents>", b"", said)),
        "lists a new object late",
    ),
    "lists other etags": (
        lists(lambda said: re.sub(b"<ETag>.*?</ETag>", b"<ETag>0</ETag>", said)),
        "lists a new object with another ETag",
    ),
    "ignores If-Match": (proxy.drops("if-match"), "ignores conditional writes (If-Match)"),
    "ignores If-None-Match": (
        proxy.drops("if-none-match"),
        "ignores conditional writes (If-None-Match)",
    ),
    "drops metadata": (proxy.drops("x-amz-meta-"), "drops metadata (x-amz-meta-run)"),
    "has no If-None-Match": (
        proxy.cannot("if-none-match"),
        "refuses conditional writes (If-None-Match)",
    ),
    "has no If-Match": (proxy.cannot("if-match"), "refuses conditional writes (If-Match)"),
    "holds no etag for the same": (
        lambda request: Answer(412) if "if-match" in request.headers else None,
        "refuses conditional writes (If-Match)",
    ),
    "refuses etags in quotes, ignores others": (
        lambda request: proxy.knows_no_quotes(request) or proxy.drops("if-match")(request),
        "ignores conditional writes (If-Match)",
    ),
    "deletes nothing": (proxy.deletes_nothing, "deletes nothing (do the credentials allow"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", LACKS)
def test_what_a_store_lacks_is_found_out_before_any_work(
    what: str, resume: bool, source: Path, bucket: Bucket, liar: MakeLiar
) -> None:
    """One line that names it, exit code 2, and nothing is left behind, or changed."""
    lie, said = LACKS[what]
    if resume:
        pack_shard_of(start(source, bucket.url), 0)
    before = bucket.hashes()
    liar(lie)
    flags = ["--source", source, "--output", bucket.url, "--num-shards", "2"]
    done = run_script("run_parallel.sh", *flags, *(["--resume"] if resume else []))
    assert done.returncode == 2 and f"this store {said}" in done.stderr, done
    assert "pack into a folder, and copy that" in done.stderr and done.stderr.count("\n") == 1
    assert "created" not in done.stdout
    left = {
        n: v for n, v in bucket.hashes().items() if what != "deletes nothing" or "probe" not in n
    }
    assert left == before


def test_trying_a_store_takes_few_requests(source: Path, bucket: Bucket, liar: MakeLiar) -> None:
    seen = []

    def count(request: Request) -> None:
        if claim.PROBE[:-1] in request.path or request.asks("POST", "delete=?"):
            seen.append(request.method)

    liar(count)
    start(source, bucket.url)
    assert len(seen) <= (12 if STORE == "ceph" else 10), seen  # which knows etags in one spelling
    assert list(bucket.hashes()) == [PLAN]


def test_what_a_killed_probe_left_goes_with_the_plan(
    source: Path, expected: dict[str, str], bucket: Bucket
) -> None:
    bucket.put(f"{claim.PROBE}0123456789abcdef", b"first")
    packed(source, bucket.url).finish()
    assert bucket.hashes() == expected


@pytest.mark.parametrize("large", [False, True])
def test_each_answer_is_lost_once(
    large: bool, bucket: Bucket, liar: MakeLiar, tmp_path: Path
) -> None:
    """Of all that changes the store: what the first attempt did is not taken for another run's."""
    raw = write_pairs(tmp_path / "raw", 4, largest=(12 << 20) if large else 100)
    for shard_id in range(2):
        create_webdataset(raw, tmp_path / "o", shard_id, 2)
    lost = []

    def lose(request: Request) -> Lost | None:
        if request.method not in ("PUT", "POST", "DELETE"):
            return None
        lost.append(request.path)
        return Lost()

    liar(proxy.once(lose))
    start(raw, bucket.url)
    packed(raw, bucket.url, resume=True).finish()
    assert len(lost) > 10 and large == any("uploadId" in path for path in lost)
    assert bucket.hashes() == hashes(tmp_path / "o")


def test_an_upload_whose_end_got_no_answer_at_all(
    bucket: Bucket, liar: MakeLiar, tmp_path: Path
) -> None:
    """A second attempt finds no such upload any more, since the first one was completed."""
    raw, ended = write_pairs(tmp_path / "raw", 2, largest=30 << 20), []

    def lose(request: Request) -> Answer | Lost | None:
        if not request.asks("POST", "uploadId=[^&]*"):
            return None
        ended.append(request.path)
        if len(ended) > 1:
            return Answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        return Lost()

    liar(lose)
    assert create_webdataset(raw, bucket.url, 0, 1).bytes
    create_webdataset(raw, tmp_path / "o", 0, 1)
    assert len(ended) == 2 and bucket.hashes() == hashes(tmp_path / "o")


def test_another_run_whose_plan_has_the_same_run_id_or_size(source: Path, bucket: Bucket) -> None:
    """After a refusal the bytes decide: not the length, and not whose they are."""
    run = start(source, bucket.url)
    plan = bytes(obstore.get(bucket.store, f"{bucket.prefix}/{PLAN}").bytes())
    etag = claim.own_plan(run.path)[1]
    assert not claim.swap(run.path, b"a mark of this run", '"0123"')
    assert not claim.swap(run.path, plan[:-2] + b"x\n", '"0123"')
    assert claim.swap(run.path, plan, '"0123"'), "it stands there"
    assert claim.swap(run.path, b"a mark of this run", etag)


def ignored_mark(request: Request) -> Answer | None:
    mark = request.method == "PUT" and request.body.startswith(b"published")
    return Answer(200, headers=(("ETag", '"0"'),)) if mark else None


def refused_mark(request: Request) -> Answer | None:
    return Answer(412) if request.body.startswith(b"published") else None


def lost_shard(bucket: Bucket) -> Lie:
    def lie(request: Request) -> None:
        if request.body.startswith(b"published"):
            obstore.delete(bucket.store, f"{bucket.prefix}/shard-000001.tar")

    return lie


def replaced_shard(bucket: Bucket) -> Lie:
    def lie(request: Request) -> None:
        if request.body.startswith(b"published"):
            bucket.put("shard-000001.tar", b"another")

    return lie


ENDS: dict[str, tuple[Callable[[Bucket], Lie], str]] = {
    "mark ignored": (lambda _: ignored_mark, r"so is the plan of the run, '.webdataset-plan'"),
    "mark refused": (lambda _: refused_mark, r"refuses to replace '.webdataset-plan' \(If-Match\)"),
    "nothing deleted": (lambda _: proxy.deletes_nothing, r"so is '.webdataset-plan', which"),
    "shard lost": (lost_shard, r"'shard-000001.tar' is not there any more; delete all"),
    "shard replaced": (replaced_shard, r"'shard-000001.tar' was replaced meanwhile; delete all"),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_was_published_is_looked_at(
    what: str, source: Path, expected: dict[str, str], bucket: Bucket, liar: MakeLiar
) -> None:
    """A store that says yes and does no, at the last step: exit code 1, and what is there."""
    lie, said = ENDS[what]
    server = os.environ["AWS_ENDPOINT_URL"]
    run = packed(source, bucket.url)
    liar(lie(bucket))
    done = run_script("sharding", "publish", "--run", run.path)
    assert done.returncode == 1 and re.search(said, done.stderr), done
    assert "shards." not in done.stdout and done.stderr.count("\n") == 1
    if "shard" in what:
        return
    assert read(["--path", bucket.url]) == 1
    again = ["--source", source, "--output", bucket.url, "--num-shards", "2", "--resume"]
    done = run_script("run_parallel.sh", *again, env={"AWS_ENDPOINT_URL": server})
    assert done.returncode == 0 and bucket.hashes() == expected, "the cure holds"


def test_shards_beyond_that_are_not_deleted(source: Path, bucket: Bucket, liar: MakeLiar) -> None:
    """With them and without the plan, the dataset would pass for one of more shards."""
    run = packed(source, bucket.url)
    bucket.put("shard-000005.tar", b"of a run into more shards")
    liar(proxy.deletes_nothing)
    with pytest.raises(PackError, match=r"so is 'shard-000005.tar', which the store had said"):
        run.finish()
    assert PLAN in bucket.hashes()


def test_a_record_that_was_never_written(source: Path, bucket: Bucket, liar: MakeLiar) -> None:
    """Then a shard is not known to be finished: it is packed again, and nothing is published."""

    def lie(request: Request) -> Answer | None:
        yes = Answer(200, headers=(("ETag", '"0"'),))
        return yes if request.method == "PUT" and PACKED in request.path else None

    liar(lie)
    run = packed(source, bucket.url)
    with pytest.raises(PackError, match=r"not packed: 2 shards \(0, 1\); nothing was published"):
        run.finish()


def test_a_single_shard_needs_metadata(
    source: Path, bucket: Bucket, liar: MakeLiar, capsys
) -> None:
    liar(proxy.drops("x-amz-meta-"))
    flags = ["--source", str(source), "--output", bucket.url, "--shard-id=0", "--total-shards=2"]
    assert create(flags) == 1
    assert "or the store drops metadata" in capsys.readouterr().err


def test_an_upload_that_is_refused_at_its_end(source: Path, bucket: Bucket, liar: MakeLiar) -> None:
    """Its reason is said, and not that nothing is there."""
    no = Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
    liar(lambda request: no if request.asks("PUT", "tar") else None)
    with pytest.raises(PackError, match=r"shard-000000.tar': these credentials do not allow it"):
        create_webdataset(source, bucket.url, 0, 2)


@pytest.mark.parametrize("deaf", [False, True])
def test_an_object_that_is_replaced_while_it_is_read(
    deaf: bool, bucket: Bucket, liar: MakeLiar
) -> None:
    """By one of the same size, or a smaller one; where If-Match is ignored, too."""
    if deaf:
        liar(proxy.drops("if-match"))
    for size in (3 << 20, 100):
        bucket.put("x", bytes(3 << 20))
        ranges = streams.Ranges(f"{bucket.url}/x")
        assert ranges.fetch(0, 10) == bytes(10)
        bucket.put("x", b"1" * size)
        with pytest.raises(PackError, match="it was replaced while it was read"):
            ranges.fetch(2 << 20, 10)


def test_a_store_that_ignores_ranges(bucket: Bucket, liar: MakeLiar) -> None:
    bucket.put("x", bytes(range(100)))
    liar(proxy.drops("range"))
    with pytest.raises(PackError, match=r"x': the store ignores ranges of an object"):
        streams.Ranges(f"{bucket.url}/x").fetch(10, 10)


def test_etags_are_compared_without_their_quotes() -> None:
    one = {"e_tag": '"0a"', "size": 1}
    assert store.version_of(one) == store.version_of({**one, "e_tag": "0a"})
    assert store.version_of(one) != store.version_of({**one, "e_tag": '"0b"'})
    assert store.version_of({**one, "e_tag": None}) == store.version_of({**one, "e_tag": ""})
