"""A bucket as output: the same bytes, never a partial shard, one run at a time, resume, fencing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from conftest import (
    DRIVERS,
    ENDPOINT,
    KEYS,
    MOSTLY_BASH,
    ROOT,
    SCHEME,
    SOAK,
    Bucket,
    bucket_of,
    hashes,
    of_s3,
    of_seaweedfs,
    pack_shard_of,
    run_script,
    slow_proxy,
    start_packing,
    write_pairs,
)
from server import free_ports

from create_webdataset import create_webdataset
from create_webdataset import main as create
from read_webdataset import main as read
from sharding import run as runs
from sharding.bucket import claim, streams
from sharding.bucket import run as bucket_run
from sharding.bucket.dataset import PLAN
from sharding.errors import InputError, PackError
from sharding.listing import list_samples
from sharding.places import output_at
from sharding.shards import SHARD_PATTERN

KILLS = 40 if SOAK else int(os.environ.get("KILLS", 4))  # as `make stores` sets it


def pack(driver: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(driver, *flags)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("source") / "raw", 60)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of a run into a folder."""
    output = tmp_path_factory.mktemp("expected")
    for shard_id in range(5):
        create_webdataset(source, output, shard_id, 5)
    return hashes(output)


@pytest.mark.parametrize(
    ("remote", "driver"), [(False, DRIVERS[0]), *((True, driver) for driver in MOSTLY_BASH)]
)
def test_the_same_bytes(
    remote: bool, driver: str, source: Path, expected: dict[str, str], bucket: Bucket
) -> None:
    """From a folder and from a bucket; nothing but the shards is left; a second run is refused."""
    start = bucket.upload(source, "raw/") if remote else source
    flags = ["--source", start, "--output", f"{bucket.url}/out#1/", "--num-shards", "5"]
    done = pack(driver, *flags)
    assert done.returncode == 0, done.stderr
    assert bucket.hashes("out#1") == expected
    proof = ["--path", f"{bucket.url}/out#1", "--source", start, "--quiet", "--num-workers", "2"]
    assert run_script("read_webdataset.py", *proof).returncode == 0
    again = pack(driver, *flags)
    assert again.returncode == 2 and "holds a dataset" in again.stderr, again
    assert bucket.hashes("out#1") == expected


def test_one_shard_is_packed_again(source: Path, expected: dict[str, str], bucket: Bucket) -> None:
    """As the reader proposes it for a damaged one; but not into a run that is not finished."""
    flags = ["--source", str(source), "--output", f"{bucket.url}/o", "--total-shards", "5"]
    assert create([*flags, "--shard-id", "0", "--shard-step", "1"]) == 0
    assert bucket.hashes("o") == expected
    bucket.put("o/shard-000003.tar", b"damaged")
    assert create([*flags, "--shard-id", "3"]) == 0
    assert bucket.hashes("o") == expected
    bucket.put(f"o/{PLAN}", b"{}")
    assert create([*flags, "--shard-id", "3"]) == 1


def start(
    source: Path | str, output: str, resume: bool = False, total: int = 5, **more
) -> runs.Run:
    options = {"output": output, "total_shards": total, "resume": resume, "driver": os.getpid()}
    return runs.start(list_samples(source), **{**options, **more})


def test_another_run(source: Path, bucket: Bucket, capsys) -> None:
    """Whose, since when, what to do; a reader is refused, too."""
    start(source, bucket.url)
    with pytest.raises(
        PackError, match=rf"a run of {socket.gethostname()} that began at 2.* ended"
    ):
        start(source, bucket.url)
    done = pack("run_parallel.sh", "--source", source, "--output", bucket.url)
    assert (
        done.returncode == 1 and "if it is dead, run the same command with --resume" in done.stderr
    )
    assert read(["--path", bucket.url]) == 1
    assert "a run is not finished" in capsys.readouterr().err


@pytest.mark.parametrize("done", [False, True])
def test_two_runs_that_begin_at_once(
    done: bool, source: Path, expected: dict[str, str], bucket: Bucket, monkeypatch
) -> None:
    """The other one begins, or is even published, behind this one's look at what is there."""
    look, looks, others = bucket_run.objects_at, [], []

    def late(url: str) -> dict:
        found = look(url)
        looks.append(url)
        if len(looks) == 2:  # the first was for stray objects
            others.append(packed(source, bucket.url))
            if done:
                others[0].finish()
        return found

    monkeypatch.setattr(bucket_run, "objects_at", late)
    said = "another run has just published there" if done else "another run has just begun there"
    with pytest.raises(PackError, match=said):
        start(source, bucket.url)
    if not done:
        others[0].finish()
    assert bucket.hashes() == expected


def test_resume_keeps_what_is_finished(
    source: Path, expected: dict[str, str], bucket: Bucket
) -> None:
    run = start(source, bucket.url)
    for shard_id in (1, 3):
        pack_shard_of(run, shard_id)
    with pytest.raises(PackError, match=r"not packed: 3 shards \(0, 2, 4\).*with --resume to"):
        run.finish()
    bucket.put("shard-000003.tar", b"was replaced")
    with pytest.raises(PackError, match=r"not packed: 4 shards \(0, 2, 3, 4\)"):
        run.finish()
    flags = ["--source", source, "--output", bucket.url, "--num-shards", "5", "--resume"]
    done = pack("run_parallel.sh", *flags)
    lines = done.stdout.splitlines()
    assert "Shard 1 kept with 12 samples." in lines, done
    assert "Shard 3 created again with 12 samples." in lines
    assert bucket.hashes() == expected


@pytest.mark.parametrize("remote", [False, True])
def test_a_changed_file_is_packed_again(remote: bool, bucket: Bucket, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "raw", 20)
    place = bucket.upload(folder, "raw/") if remote else folder
    run = start(place, f"{bucket.url}/o", total=2)
    for shard_id in range(2):
        pack_shard_of(run, shard_id)
    (folder / "sample-3.txt").write_bytes(b"another text, and another size")
    (folder / "sample-2.jpg").write_bytes(bytes((folder / "sample-2.jpg").stat().st_size))
    bucket.upload(folder, "raw/")
    second = start(place, f"{bucket.url}/o", resume=True, total=2)
    for shard_id in range(2):
        assert pack_shard_of(second, shard_id).how == "created again"
    second.finish()
    create_webdataset(folder, tmp_path / "o", 0, 2)
    create_webdataset(folder, tmp_path / "o", 1, 2)
    assert bucket.hashes("o") == hashes(tmp_path / "o")


def test_resume_with_other_shards(source: Path, bucket: Bucket, tmp_path: Path, capsys) -> None:
    """Refused if shards are finished; else nothing of the larger number of shards is left."""
    run = start(source, bucket.url, total=9)
    pack_shard_of(run, 0)
    before = bucket.hashes()
    refusal = r"with 1 finished shard, has another number of shards \(9, not 2\); give"
    with pytest.raises(InputError, match=refusal):
        start(source, bucket.url, resume=True, total=2)
    assert bucket.hashes() == before
    bucket.clear()
    start(source, bucket.url, total=9)
    bucket.put("shard-000008.tar", b"of a run that was killed before it could record it")
    second = start(source, bucket.url, resume=True, total=2)
    what = "packed afresh: the interrupted run has another number of shards (9, not 2)"
    assert what in capsys.readouterr().err
    for shard_id in range(2):
        assert pack_shard_of(second, shard_id).how == "created"
        create_webdataset(source, tmp_path, shard_id, 2)
    second.finish()
    assert bucket.hashes() == hashes(tmp_path)


def test_replace_in_a_bucket(source: Path, expected: dict[str, str], bucket: Bucket) -> None:
    """It declares nothing dead; with --resume, all is packed afresh, whatever is there."""
    pack_shard_of(start(source, bucket.url, total=9), 0)
    flags = ["--source", source, "--output", bucket.url, "--num-shards", "5"]
    before = bucket.hashes()
    for more, code, said in (
        (["--replace"], 1, "if it is dead, run the same command with --resume"),
        (["--resume"], 2, "with 1 finished shard, has another number of shards (9, not 5); give"),
    ):
        done = run_script("run_parallel.sh", *flags, *more)
        assert (done.returncode, done.stdout) == (code, "") and said in done.stderr, done
        assert bucket.hashes() == before
    assert "or --replace to pack afresh" in done.stderr
    pack_shard_of(start(source, bucket.url, resume=True, replace=True), 1)
    done = run_script("run_parallel.sh", *flags, "--resume", "--replace")
    assert done.returncode == 0 and done.stdout.count("created with") == 5, done
    assert done.stderr == "warning: 1 finished shard of the interrupted run will be packed afresh\n"
    assert bucket.hashes() == expected
    done = run_script("run_parallel.sh", *flags, "--resume", "--replace")
    assert done.returncode == 2 and "holds a dataset" in done.stderr
    assert bucket.hashes() == expected


def test_an_array_job_is_not_replaced(source: Path, bucket: Bucket) -> None:
    run = start(source, bucket.url, driver=None)
    pack_shard_of(run, 0)
    before = bucket.hashes()
    for more in ({"replace": True}, {"total": 2}):
        with pytest.raises(PackError, match=r"holds an array job that .*; publish it, go on with"):
            start(source, bucket.url, resume=True, **more)
    assert bucket.hashes() == before
    assert pack_shard_of(start(source, bucket.url, resume=True), 0).how == "kept"


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_not_looked_at_is_not_published(
    remote: bool, bucket: Bucket, tmp_path: Path
) -> None:
    """A shard of a dead run counts once this one has found that its files are as they were."""
    raw, output = write_pairs(tmp_path / "raw", 6), f"{bucket.url}/o"
    place = bucket.upload(raw, "raw/") if remote else raw
    packed(place, output, total=3)
    (raw / "sample-1.txt").write_bytes(b"changed meanwhile")
    bucket.put("raw/sample-1.txt", b"changed meanwhile")  # alone: Azure's etags change anyway
    run = start(place, output, resume=True, total=3)
    assert [pack_shard_of(run, shard_id).how for shard_id in (0, 2)] == ["kept"] * 2
    with pytest.raises(PackError, match=r"not packed: 1 shard \(1\)"):
        run.finish()
    assert pack_shard_of(run, 1).how == "created again"
    again = start(place, output, resume=True, total=3)
    assert [pack_shard_of(again, shard_id).how for shard_id in range(3)] == ["kept"] * 3
    again.finish()
    assert len(bucket.hashes("o")) == 3


def test_a_run_that_was_taken_over_completes_nothing(source: Path, bucket: Bucket) -> None:
    """Neither a shard that it begins nor one that it was about to complete, nor the dataset."""
    run = start(source, bucket.url)
    second = None

    def late(_: int) -> None:
        nonlocal second
        second = second or start(source, bucket.url, resume=True)

    with pytest.raises(PackError, match="is gone: the run was published, or another took it over"):
        pack_shard_of(run, 0, progress=late)
    assert not [name for name in bucket.hashes() if SHARD_PATTERN.fullmatch(name)]
    for call in (
        lambda: pack_shard_of(run, 1),
        lambda: run.finish(),
        lambda: runs.load(run.path),
    ):
        with pytest.raises(PackError, match="is gone"):
            call()
    assert second
    for shard_id in range(5):
        pack_shard_of(second, shard_id)
    with pytest.raises(PackError, match="is gone"):
        run.finish()
    second.finish()


def packed(source: Path | str, url: str, resume: bool = False, total: int = 5) -> runs.Run:
    """A run that is not published yet."""
    run = start(source, url, resume, total)
    for shard_id in range(total):
        pack_shard_of(run, shard_id)
    return run


class Killed(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("step", ["mark", "records"])
@pytest.mark.parametrize("driver", ["publish", *MOSTLY_BASH])
def test_cut_while_publishing(
    driver: str, step: str, source: Path, expected: dict[str, str], bucket: Bucket, monkeypatch
) -> None:
    """From the moment that the mark stands, whoever comes next finishes it, and says so."""
    run = packed(source, bucket.url)
    if step == "records":  # of an older run, of more shards
        bucket.put("shard-000008.tar")
        bucket.put(f"{bucket_run.PACKED}/0123456789abcdef/8-0-0-0")
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(bucket_run, "finish_cut", killed)
        if step == "records":
            patch.undo()
            patch.setattr(obstore, "delete", killed)
        run.finish()
    assert read(["--path", bucket.url]) == 1
    with pytest.raises(PackError, match="is gone"):
        pack_shard_of(run, 0)
    if driver == "publish":
        done = run_script("sharding", "publish", "--run", run.path)
    else:
        flags = ["--source", source, "--output", bucket.url, "--num-shards", "5", "--resume"]
        done = run_script(driver, *flags)
    assert done.returncode == 0 and "now all shards are in place" in done.stdout, done
    assert bucket.hashes() == expected
    assert not bucket_run.finish_cut(run.path)


def test_two_that_take_over_at_once(source: Path, expected, bucket: Bucket, monkeypatch) -> None:
    start(source, bucket.url)
    swap, others = claim.swap, []

    def late(*arguments: object) -> bool:
        monkeypatch.setattr(bucket_run, "swap", swap)
        others.append(packed(source, bucket.url, resume=True))
        return swap(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bucket_run, "swap", late)
    with pytest.raises(PackError, match="another run has just taken it over"):
        start(source, bucket.url, resume=True)
    others[0].finish()
    assert bucket.hashes() == expected


def test_strays_are_named(source: Path, bucket: Bucket, capsys) -> None:
    bucket.put("o/shard-1.tar")
    packed(source, f"{bucket.url}/o").finish()
    assert "has 1 object ('shard-1.tar') not named like its shards" in capsys.readouterr().err
    assert len(bucket.hashes("o")) == 6


def test_a_late_publisher_deletes_nothing(source: Path, bucket: Bucket, monkeypatch) -> None:
    """Of two runs with other numbers of shards, where the older one has just looked at the plan."""
    older = packed(source, bucket.url, total=2)
    swap = claim.swap

    def late(*arguments: object) -> bool:
        monkeypatch.setattr(claim, "swap", swap)
        bucket.clear()
        packed(source, bucket.url).finish()
        return swap(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(claim, "swap", late)
    with pytest.raises(PackError, match="is gone"):
        older.finish()
    assert len(bucket.hashes()) == 5


@pytest.mark.parametrize("large", [False, True])
def test_a_late_upload_is_noticed(large: bool, bucket: Bucket, tmp_path: Path, monkeypatch) -> None:
    """An older run that was stopped between its last look at the plan and the end of an upload."""
    raw = write_pairs(tmp_path / "raw", 4, largest=(12 << 20) if large else 100)
    older, look = start(raw, bucket.url, total=1), bucket_run.check_own
    calls = 0

    def late(folder: str) -> object:
        nonlocal calls
        item = look(folder)
        calls += folder == older.path
        if calls == 3 and folder == older.path:  # the last look before its upload is completed
            (raw / "sample-0.txt").write_bytes(b"changed meanwhile")
            packed(raw, bucket.url, resume=True, total=1)
        return item

    monkeypatch.setattr(bucket_run, "check_own", late)
    with pytest.raises(PackError, match="is gone"):
        pack_shard_of(older, 0)
    monkeypatch.setattr(bucket_run, "check_own", look)
    newest = start(raw, bucket.url, resume=True, total=1)
    # What is there is not what was recorded; only Azure has refused the late upload, if in parts.
    how = "kept" if SCHEME == "az" and large else "created again"
    assert pack_shard_of(newest, 0).how == how
    newest.finish()
    create_webdataset(raw, tmp_path / "o", 0, 1)
    assert bucket.hashes() == hashes(tmp_path / "o")


def test_a_lost_answer(source: Path, expected, bucket: Bucket, monkeypatch) -> None:
    """A conditional put whose answer is lost is tried again, and refused: it was ours."""
    put = obstore.put

    def twice(*arguments, mode=None, **options):
        if isinstance(mode, dict):
            put(*arguments, mode=mode, **options)
        return put(*arguments, mode=mode, **options)

    start(source, bucket.url)
    monkeypatch.setattr(obstore, "put", twice)
    packed(source, bucket.url, resume=True).finish()
    assert bucket.hashes() == expected


def test_empty_files_and_a_relative_source(bucket: Bucket, tmp_path: Path) -> None:
    for number in range(4):
        bucket.put(f"raw/{number}.jpg")
        bucket.put(f"raw/{number}.txt")
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / f"raw/{number}.jpg").touch()
        (tmp_path / f"raw/{number}.txt").touch()
    for name, place in (("a", "raw"), ("b", f"{bucket.url}/raw")):
        flags = ["--source", place, "--output", f"{bucket.url}/{name}", "--num-shards", "2"]
        done = run_script("run_parallel.sh", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert bucket.hashes("a") == bucket.hashes("b")


@of_s3
def test_an_upload_that_is_refused(source: Path, bucket: Bucket, monkeypatch) -> None:
    """One line with the reason, and no more tries if the store is not there at all."""
    run = start(source, bucket.url)

    def refused(*_: object, **__: object) -> None:
        raise OSError(
            "Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>"
        )

    monkeypatch.setattr(obstore, "open_writer", lambda *_, **__: Refusing(refused))
    with pytest.raises(PackError, match=r"shard-000000.tar': these credentials do not allow it$"):
        pack_shard_of(run, 0)


class Refusing:
    """A writer of a store that answers no request."""

    def __init__(self, answer) -> None:
        self.write = self.close = self.flush = self.__exit__ = answer


def test_an_array_job(source: Path, expected: dict[str, str], bucket: Bucket) -> None:
    flags = ["--source", source, "--output", bucket.url, "--num-shards", "5"]
    run = run_script("sharding", "start", *flags).stdout.strip()
    for shard_id in ("0", "1"):
        pack("create_webdataset.py", "--run", run, "--shard-id", shard_id, "--shard-step", "2")
    done = run_script("sharding", "publish", "--run", run)
    assert done.returncode == 0, done.stderr
    assert bucket.hashes() == expected
    again = run_script("sharding", "publish", "--run", run)
    assert again.returncode == 1 and "is gone" in again.stderr


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_killed_runs(driver: str, bucket: Bucket, tmp_path: Path) -> None:
    """At any moment: no partial shard, the plan stays, and --resume gives the same bytes."""
    raw = write_pairs(tmp_path / "raw", 300, largest=100_000)
    for shard_id in range(20):
        create_webdataset(raw, tmp_path / "o", shard_id, 20)
    expected = hashes(tmp_path / "o")
    rng, caught = random.Random(0), 0
    slow = driver == "create_with_ray.py"
    for number in range(KILLS // 4 if slow else KILLS):
        url = f"{bucket.url}/{number}"
        script = [ROOT / driver] if driver.endswith(".sh") else [sys.executable, ROOT / driver]
        flags = ["--source", raw, "--output", url, "--num-shards", "20", "--num-workers", "2"]
        process = subprocess.Popen(
            list(map(str, [*script, *flags])),
            env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while PLAN not in bucket.hashes(str(number)) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(1, 3.5) if slow else rng.uniform(0, 0.8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = bucket.hashes(str(number))
        shards = {name: value for name, value in left.items() if SHARD_PATTERN.fullmatch(name)}
        assert shards.items() <= expected.items()
        assert PLAN in left or shards in ({}, expected)
        caught += PLAN in left
        if shards != expected or PLAN in left:
            done = pack(driver, *flags, "--resume")
            assert done.returncode == 0 or "holds a dataset" in done.stderr, done
        assert bucket.hashes(str(number)) == expected
    assert caught


def test_ctrl_c(bucket: Bucket, tmp_path: Path) -> None:
    raw = write_pairs(tmp_path / "raw", 2_000, largest=100_000)
    flags = ["--source", raw, "--output", bucket.url, "--num-shards", "200", "--num-workers", "2"]
    process = start_packing(*flags)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert PLAN in bucket.hashes()


@pytest.fixture
def careless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that ignores If-None-Match."""
    (port,) = free_ports(1)
    (tmp_path / "data" / "tests").mkdir(parents=True)
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    command = f"serve s3 --addr 127.0.0.1:{port} --auth-key {keys} {tmp_path / 'data'}"
    rclone = str(Path(sys.executable).with_name("rclone"))
    process = subprocess.Popen([rclone, *command.split()], stderr=subprocess.DEVNULL)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    for _ in range(100):
        try:
            obstore.put(bucket_of({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}), "ready", b"")
            break
        except Exception:
            time.sleep(0.1)
    yield
    process.kill()
    process.wait()


@of_seaweedfs
@pytest.mark.usefixtures("careless")
def test_a_store_that_ignores_conditions_is_refused(source: Path, tmp_path: Path) -> None:
    done = pack("run_parallel.sh", "--source", source, "--output", "s3://tests/o")
    assert done.returncode == 2 and "ignores conditional writes" in done.stderr, done
    assert not list((tmp_path / "data" / "tests").glob("o/**/*"))


def test_a_reused_buffer_is_copied(bucket: Bucket) -> None:
    """obstore copies nothing: what it is given must not change before it is sent."""
    with output_at(bucket.url).new_shard(bucket.url, 0) as new:
        buffer = bytearray(1 << 20)
        for number in range(20):
            buffer[:] = bytes([number]) * len(buffer)
            new.stream.write(memoryview(buffer))
    data = bytes(obstore.get(bucket.store, f"{bucket.prefix}/shard-000000.tar").bytes())
    assert data == b"".join(bytes([number]) * (1 << 20) for number in range(20))


@pytest.mark.parametrize("size", [10, 30 << 20])
def test_an_upload_that_fails_leaves_nothing(size: int, bucket: Bucket) -> None:
    with (
        pytest.raises(RuntimeError, match="failed"),
        output_at(bucket.url).new_shard(bucket.url, 0) as new,
    ):
        new.stream.write(bytes(size))
        raise RuntimeError("failed")
    assert not bucket.hashes()


@pytest.mark.parametrize("who", ["run", "program"])
def test_an_upload_that_another_replaces(who: str, bucket: Bucket, monkeypatch) -> None:
    """Between its end and the look at what is there now."""
    get = obstore.get

    def late(*arguments, **options):
        key = f"{bucket.prefix}/shard-000000.tar"
        attributes = {who: "another"}
        obstore.put(bucket.store, key, b"of another run", attributes=attributes)
        return get(*arguments, **options)

    monkeypatch.setattr(obstore, "get", late)
    with (
        pytest.raises(PackError, match=f"another {who} has replaced it"),
        output_at(bucket.url).new_shard(bucket.url, 0) as new,
    ):
        new.stream.write(b"of this run...")


def test_a_shard_that_is_too_large(bucket: Bucket, monkeypatch) -> None:
    monkeypatch.setattr(streams, "MAX_PARTS", 2)
    with (
        pytest.raises(PackError, match=r"0.tar': larger than an upload can be; use more shards"),
        output_at(bucket.url).new_shard(bucket.url, 0) as new,
    ):
        for _ in range(17):
            new.stream.write(bytes(1 << 20))
    assert not bucket.hashes()


def test_a_backslash_in_an_output(source: Path, bucket: Bucket, capsys) -> None:
    flags = ["--source", str(source), "--output", f"{bucket.url}/a\\b", "--total-shards=1"]
    assert create([*flags, "--shard-id=0"]) == 2
    assert "some stores turn a backslash into /" in capsys.readouterr().err
    assert not bucket.hashes()


def test_tars_inside_the_source(bucket: Bucket, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.tar").write_bytes(b"a")
    url = bucket.upload(tmp_path, "raw/")
    flags = ["--source", url, "--output", url, "--fields", "tar"]
    assert create([*flags, "--shard-id=0", "--total-shards=1"]) == 2
    assert "is inside --source" in capsys.readouterr().err


def test_the_plan_tells_no_secret(source: Path, bucket: Bucket) -> None:
    start(source, bucket.url)
    data = bytes(obstore.get(bucket.store, f"{bucket.prefix}/{PLAN}").bytes())
    assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in data
    assert json.loads(data.split(b"\n")[0])["total_shards"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
def test_memory(bucket: Bucket, tmp_path: Path) -> None:
    """Of a worker, from store to store: 300 KB files, and one of 300 MB (5 GB in `make soak`)."""
    large = 5_000 if SOAK else 300
    data = os.urandom(1 << 20)
    with obstore.open_writer(bucket.store, f"{bucket.prefix}/raw/large.jpg") as writer:
        for _ in range(large):
            writer.write(data)
    bucket.put("raw/large.txt")
    for number in range(200):
        (tmp_path / f"{number}.jpg").write_bytes(data[:300_000])
        (tmp_path / f"{number}.txt").write_bytes(b"x")
    bucket.upload(tmp_path, "raw/")
    code = (
        "import re, sys, create_webdataset as c; "
        "code = c.main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], code)"
    )
    flags = ["--source", f"{bucket.url}/raw", "--output", f"{bucket.url}/o"]
    command = [sys.executable, "-c", code, *flags, "--shard-id=0", "--total-shards=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    peak, code = done.stdout.split()[-2:]
    print(f"{int(peak) // 1_000} MB")
    assert code == "0" and int(peak) < 200_000, done


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
def test_few_parts_wait_for_a_slow_store(bucket: Bucket, monkeypatch) -> None:
    """obstore's own 12 at a time, of 8 MB, would take 100 MB."""
    monkeypatch.setenv(ENDPOINT, slow_proxy(20_000_000))
    code = (
        "import os, re, sys; from sharding.bucket.run import new_shard\n"
        "with new_shard(sys.argv[1], 0) as new:\n"
        "    for _ in range(120): new.stream.write(os.urandom(1 << 20))\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, bucket.url]
    peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    print(f"{peak // 1_000} MB")
    assert peak < 100_000
