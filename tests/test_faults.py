"""Real faults: kills, signals, full disks, hostile names. Nothing lost, nothing half-written.

`make soak` sets SOAK=1 and runs the long counts.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import (
    DRIVERS,
    MOSTLY_BASH,
    ROOT,
    SOAK,
    hashes,
    pack_shard_of,
    run_script,
    without_privileges,
    write_pairs,
)

import create_webdataset as core
import read_webdataset
from sharding.errors import InputError, PackError
from sharding.folder import dataset as folder
from sharding.folder import mounts, staging
from sharding.folder import run as folder_run
from sharding.listing import list_samples
from sharding.messages import explain
from sharding.plan import PLAN
from sharding.record import RECORD
from sharding.run import STOPPING
from sharding.run import start as start_run
from sharding.shards import PARTIAL_PATTERN, SHARD_PATTERN, STAGED_PATTERN, shard_name

SHARDS = 12


def shards(output: Path) -> dict[str, str]:
    """Return the hashes of what lies under shard names in an output."""
    found = hashes(output, "shard-*.tar")  # and no staged file, which may vanish meanwhile
    return {name: value for name, value in found.items() if SHARD_PATTERN.match(name)}


def flags(source: Path, output: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--output", str(output), "--num-workers", "2", *more]


def start(driver: str, *arguments: str) -> subprocess.Popen[str]:
    command = [str(ROOT / driver)] if driver.endswith(".sh") else [sys.executable, ROOT / driver]
    return subprocess.Popen(
        [*map(str, command), *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, its previous dataset (15 shards, another order), and its new one (12 shards)."""
    place = tmp_path_factory.mktemp("faults")
    source = write_pairs(place / "source", 2_400, largest=60_000)
    for name, more in (("old", ["--num-shards=15", "--shuffle=1"]), ("new", ["--num-shards=12"])):
        done = run_script("run_parallel.sh", *flags(source, place / name, *more))
        assert done.returncode == 0, done.stderr
    return source, place / "old", place / "new"


def wait_for_lock(output: Path) -> None:
    """Wait until orphaned workers have noticed that their driver is gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.close(mounts.lock_output(str(output)))
            return
        except PackError:
            time.sleep(0.05)
    raise AssertionError("the lock of a killed run is still held")


def kill_and_resume(
    driver: str, whole_group: bool, rng: random.Random, setup: tuple[Path, Path, Path], output: Path
) -> str:
    """Kill a run once or twice, look, run it again; return how far the killed runs had come."""
    source, old, new = setup
    shutil.copytree(old, output)
    run = flags(source, output, f"--num-shards={SHARDS}")
    for _ in range(rng.randint(1, 2)):
        process = start(driver, *run)
        for _ in range(rng.randrange(SHARDS + 1)):
            process.stdout.readline()  # type: ignore[union-attr]
        time.sleep(rng.uniform(0, 0.1) if rng.random() < 0.8 else rng.uniform(0, 2))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        wait_for_lock(output)

    interrupted = folder.cut_short(output)
    if interrupted:
        assert read_webdataset.main(["--path", str(output), "--quiet"]) == 1
    else:
        assert shards(output) in (shards(old), shards(new))
    whole = hashes(new)
    finished = set()
    for name in folder.staging_folders(output):
        for shard, value in hashes(Path(name)).items():
            if match := STAGED_PATTERN.fullmatch(os.path.basename(shard)):
                assert value == whole[shard_name(int(match[1]))], "a partial shard"
                finished.add(match[1])
            elif shard == folder.MARKER:
                assert interrupted == [name]
            else:
                assert shard in (PLAN, f"{PLAN}-new") or PARTIAL_PATTERN.fullmatch(shard), shard

    done = run_script(driver, *run)
    assert done.returncode == 0, done.stderr
    assert hashes(output) == whole, "same bytes as a clean run, and nothing else left behind"
    verbs = Counter(line.split()[2] for line in done.stdout.splitlines() if line[:6] == "Shard ")
    if not interrupted:
        assert (verbs["kept"], verbs["created"]) == (len(finished), SHARDS - len(finished)), (
            done.stdout
        )
    shutil.rmtree(output)
    return "publishing" if interrupted else f"{len(finished)} packed"


@pytest.mark.parametrize(
    ("whole_group", "driver"),
    [*((False, driver) for driver in DRIVERS), *((True, driver) for driver in MOSTLY_BASH)],
)
def test_sigkill_at_any_moment(
    whole_group: bool, driver: str, old_and_new: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    rng = random.Random(f"{driver} {whole_group}")
    bash = driver == "run_parallel.sh"
    rounds = (40 if bash else 10) if SOAK else (3 if bash else 1)
    reached = Counter(
        kill_and_resume(driver, whole_group, rng, old_and_new, tmp_path / "o")
        for _ in range(rounds)
    )
    print(driver, "killed at:", dict(reached))


@pytest.mark.parametrize("moved", range(0, 13, 1 if SOAK else 6))
def test_kill_in_the_middle_of_publishing(
    moved: int, old_and_new: tuple[Path, Path, Path], tmp_path: Path, monkeypatch, capfd
) -> None:
    """Publishing takes milliseconds, so this stops it after each of its renames in turn."""
    source, old, new = old_and_new
    output = tmp_path / "output"
    shutil.copytree(old, output)
    child = os.fork()
    if not child:  # a process of its own, killed in the middle
        rename, left = os.rename, [moved]

        def rename_or_die(source: str, target: str) -> None:
            if SHARD_PATTERN.fullmatch(os.path.basename(target)) and folder.STAGING in source:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            rename(source, target)

        run = start_run(
            list_samples(source), output=output, total_shards=SHARDS, driver=os.getpid()
        )
        for shard_id in range(SHARDS):
            pack_shard_of(run, shard_id)
        os.rename = rename_or_die
        os.unlink = lambda _path: os.kill(os.getpid(), signal.SIGKILL)
        run.finish()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL

    for path in (output, output / "shard-*.tar"):
        assert read_webdataset.main(["--path", str(path)]) == 1
        assert "publishing was interrupted" in capfd.readouterr().err
    direct = ["--source", str(source), "--output", str(output)]
    assert core.main([*direct, "--shard-id=0", f"--total-shards={SHARDS}"]) == 1
    assert "publishing was interrupted" in capfd.readouterr().err
    bad = run_script("run_parallel.sh", *flags(source, output, "--num-shards=99999"))
    assert bad.returncode == 2 and folder.cut_short(output)

    monkeypatch.setenv("PYTHON", sys.executable)
    process = start("run_parallel.sh", *flags(source, output, f"--num-shards={SHARDS}"))
    assert process.stdout and process.stdout.readline()  # by now the new dataset is complete
    assert shards(output) == hashes(new)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=10)


def test_many_missing_shards_are_counted(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "source", 1_000, largest=1)
    run = start_run(list_samples(path), output=tmp_path / "o", total_shards=1_000, driver=1)
    with pytest.raises(
        PackError, match=r"1,000 shards \(0, 1, 2, 3, 4, \.\.\.\).*same command again to"
    ):
        run.finish()


def test_one_line_for_each_fault() -> None:
    assert explain(PackError("one\n  error")) == "one error"
    assert explain(InputError("one\ntwo")) == "one\ntwo"


def test_a_worker_whose_driver_died_first_packs_nothing(tmp_path: Path) -> None:
    """As after kill -9 of run_parallel.sh while its workers import."""
    source = write_pairs(tmp_path / "source", 2)
    with subprocess.Popen("true") as dead:
        pass
    run = start_run(list_samples(source), output=tmp_path / "o", total_shards=2, driver=dead.pid)
    run.release()
    for script, name in (
        ([], "create_webdataset.py"),
        (["--as", "run_parallel.sh"], "run_parallel.sh"),
    ):
        done = run_script("create_webdataset.py", *script, "--run", run.path, "--shard-id=0")
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith(f"{name}: error: the driver is gone"), done
    assert os.listdir(run.path) == [PLAN]


def test_workers_whose_driver_is_a_zombie(old_and_new, tmp_path: Path) -> None:
    """Nobody has waited for it yet, so its id is still in use."""
    output = tmp_path / "o"
    process = start("run_parallel.sh", *flags(old_and_new[0], output, "--num-shards=1200"))
    assert process.stdout and process.stdout.readline()
    process.kill()
    wait_for_lock(output)
    (left,) = folder.staging_folders(output)
    assert len(staging.staged_shards(left)) < 1200
    process.communicate()


def test_second_run_stops_at_once(old_and_new: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, new = old_and_new
    run = flags(source, tmp_path / "o", f"--num-shards={SHARDS}")
    first = start("run_parallel.sh", *run)
    assert first.stdout and first.stdout.readline()
    os.killpg(first.pid, signal.SIGSTOP)  # it would be done too soon
    second = run_script("run_parallel.sh", *run)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 1 and "another run is packing" in second.stderr
    assert second.stderr.count("\n") == 1
    first.communicate(timeout=60)
    assert first.returncode == 0 and hashes(tmp_path / "o") == hashes(new)
    lock = mounts.lock_output(str(tmp_path / "o"))
    second = run_script("create_with_ray.py", *run)
    assert second.returncode == 1 and "another run is packing" in second.stderr
    os.close(lock)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_ray_too(sent: signal.Signals, old_and_new, tmp_path: Path) -> None:
    if sent != signal.SIGTERM and not SOAK:
        pytest.skip("a Ray start each: make soak runs all three")
    source, old, _ = old_and_new
    shutil.copytree(old, tmp_path / "o")
    process = start("create_with_ray.py", *flags(source, tmp_path / "o", "--num-shards=600"))
    assert process.stdout and process.stdout.readline()
    began = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + sent and "Traceback" not in err, err
    assert err.endswith("to continue, run the same command again\n"), err
    assert shards(tmp_path / "o") == hashes(old)
    assert not ray_processes(process.pid)


def test_interrupted_while_it_imports(source_1003: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs /proc to see what is imported")
    process = start("create_with_ray.py", f"--source={source_1003}", f"--output={tmp_path}")
    maps = Path(f"/proc/{process.pid}/maps")
    while "_raylet" not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


def ray_processes(session: int) -> list[str]:
    """Return the processes that a driver's session has left; not those (Z) that have ended."""
    command = ["ps", "-o", "stat=,args=", "-s", str(session)]
    done = subprocess.run(command, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line[0] != "Z"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_full_disk(driver: str, small_disk: Path, old_and_new, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few", 10)
    assert run_script("run_parallel.sh", *flags(few, small_disk / "o")).returncode == 0
    before = hashes(small_disk / "o")
    done = run_script(driver, *flags(old_and_new[0], small_disk / "o", "--replace"))
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert all(line.startswith(("Shard ", driver, "create_")) for line in done.stderr.splitlines())
    assert shards(small_disk / "o") == before
    again = run_script("run_parallel.sh", *flags(few, small_disk / "o", "--replace"))
    assert again.returncode == 0 and hashes(small_disk / "o") == before, "a later run clears it"


def test_file_size_limit(old_and_new, tmp_path: Path) -> None:
    output = tmp_path / "o"
    done = run_script(
        "run_parallel.sh",
        *flags(old_and_new[0], output),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 1 and "File too large; a file grew beyond the limit" in done.stderr
    assert re.search(r"Shard 0 failed: '.*/\.shard-000000-[0-9a-f]{8}': File", done.stderr)
    assert "Traceback" not in done.stderr and not shards(output)


def test_read_only_output(small_disk: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 4)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run_script("run_parallel.sh", *flags(source, small_disk / "o"))
    assert done.returncode == 1 and "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["file", "output"])
def test_permission_denied(where: str, tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "o"
    output.mkdir(mode=0o500 if where == "output" else 0o700)
    if where == "file":
        (source / "sample-2.txt").chmod(0)
    prefix = without_privileges()
    done = subprocess.run(
        [*prefix, str(ROOT / "run_parallel.sh"), *flags(source, output, "--num-shards=2")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Permission denied" in done.stderr
    assert ("sample-2.txt" if where == "file" else str(output)) in done.stderr
    assert not shards(output) and "Traceback" not in done.stderr


def test_too_many_open_files(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 4)
    os.close(lowest := os.dup(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            core.create_webdataset(source, tmp_path / "o", 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert "raise the limit of open files (ulimit -n)" in explain(caught.value)


def test_synced_before_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard on the disk, then its name; all names on the disk, then the marker goes."""
    source, calls = write_pairs(tmp_path / "source", 2), []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def path_of(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))[:12]

    def shown(path: str) -> str:
        return re.sub("[0-9a-f]{16,32}", "STAMP", os.path.basename(path))

    def sync(fd: int) -> None:
        calls.append(f"sync {path_of(fd)}")
        fsync(fd)
        if path_of(fd) == "plan-new":
            synced.write_bytes(Path(f"/proc/self/fd/{fd}").read_bytes())

    synced = tmp_path / "synced"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"show {shown(b)}"), rename(a, b)))
    monkeypatch.setattr(
        os, "unlink", lambda p, **o: (calls.append(f"drop {os.path.basename(p)}"), unlink(p, **o))
    )
    run = start_run(list_samples(source), output=tmp_path / "out", total_shards=1)
    assert synced.read_bytes() == Path(run.path, PLAN).read_bytes()
    pack_shard_of(run, 0)
    run.finish()
    assert calls[:15] == [
        "show .webdataset-STAMP",  # empty: so folders can be renamed there
        "sync plan-new",
        "sync .shard-00000",
        "show shard-000000.STAMP",  # in the staging folder
        "show .webdataset-STAMP",  # late tasks find their folder gone
        *("sync .webdataset-", "show .webdataset-record", "sync .webdataset-"),
        "sync .webdataset-",  # with the mark that they are being moved
        *("drop .webdataset-record", "sync out"),  # that of the shards that go
        "show shard-000000.tar",
        "show .webdataset-record",
        "sync out",
        "show .webdataset-gone-STAMP",
    ]
    direct = ["sync .shard-00000", "show shard-000000.tar", "sync direct"]
    flags = [f"--source={source}", f"--output={tmp_path / 'direct'}", "--shard-id=0"]
    for pack_one in (
        lambda: core.create_webdataset(source, tmp_path / "direct", 0, 1),
        lambda: core.main([*flags, "--total-shards=1"]),
    ):
        calls.clear()
        pack_one()
        assert calls == direct


def home(place: Path) -> Path:
    """A folder full of what people have, some of it named nearly like ours."""
    for name in (
        ".ssh/id", ".bashrc", "shard-0000000.tar", "shard-000000.tar.bak", "SHARD-000000.tar",
        "shard-00000a.tar", "thesis.tex", ".webdataset-notes/x", ".shard-000000",
        "work/shard-000001.tar", "shard-००००९९.tar", ".shard-०००००१-01234567",
        ".webdataset-0123/publishing", "plan", "publishing",
    ):  # fmt: skip
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    return place


def test_unrelated_files_stay(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 9), home(tmp_path / "home")
    before = hashes(output)
    for more in (["--num-shards=3"], ["--num-shards=2"], ["--num-shards=9", "--resume"]):
        assert run_script("run_parallel.sh", *flags(source, output, *more)).returncode == 0
        after = hashes(output)
        assert before.items() <= after.items()
        assert len(after) - len(before) == int(more[0][-1])


def test_output_in_or_above_the_source(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 9)
    (source / "sub").mkdir()
    (tmp_path / "link").symlink_to(source / "sub")
    before = hashes(source)
    for where in ("source", "source/sub/deeper", "link/deeper"):
        for driver in MOSTLY_BASH:
            done = run_script(driver, *flags(source, tmp_path / where))
            assert done.returncode == 2 and "is inside --source: a later run" in done.stderr, done
        assert hashes(source) == before and not (source / "sub/deeper").exists()
    for shards_wanted in (4, 3):
        done = run_script(
            "run_parallel.sh", *flags(source, tmp_path, f"--num-shards={shards_wanted}")
        )
        assert done.returncode == 0, done.stderr
        assert before.items() <= hashes(source).items()
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_tars_of_the_source_are_safe(tmp_path: Path) -> None:
    (tmp_path / "shard-000007.tar").write_bytes(b"mine")
    done = run_script(
        "run_parallel.sh", *flags(tmp_path, tmp_path, "--fields=tar", "--num-shards=1")
    )
    assert done.returncode == 2 and "inside --source" in done.stderr
    direct = ["--source", str(tmp_path), "--output", str(tmp_path), "--fields=tar"]
    assert core.main([*direct, "--shard-id=0", "--total-shards=1"]) == 2
    with pytest.raises(InputError, match="is inside source: a later run would find"):
        core.create_webdataset(tmp_path, tmp_path, 0, 1, "tar")
    assert hashes(tmp_path).keys() == {"shard-000007.tar"}


def test_planted_links_and_folders(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "output"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    output.mkdir()
    (output / "shard-000001.tar").symlink_to(precious / "file")
    (output / "shard-000009.tar").symlink_to(precious / "file")
    (output / f"{folder.STAGING}{'0' * 16}").symlink_to(precious)
    assert run_script("run_parallel.sh", *flags(source, output, "--num-shards=4")).returncode == 0
    assert hashes(precious).keys() == {"file"} and (precious / "file").read_text() == "precious"
    assert not (output / "shard-000001.tar").is_symlink()
    (output / mounts.LOCK).symlink_to(precious / "file")
    done = run_script("run_parallel.sh", *flags(source, output))
    assert done.returncode == 1 and mounts.LOCK in done.stderr
    (output / mounts.LOCK).unlink()
    (output / "shard-000123.tar").mkdir()
    done = run_script("run_parallel.sh", *flags(source, output))
    assert done.returncode == 2 and "shard-000123.tar" in done.stderr
    assert (precious / "file").read_text() == "precious"


def test_direct_packing_clears_its_own_leftovers(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "o"
    output.mkdir()
    for name in (".shard-000000-01234567", ".shard-000001-01234567", ".shard-000000-mine"):
        (output / name).touch()
    flags = [f"--source={source}", f"--output={output}", "--shard-id=0", "--total-shards=2"]
    assert core.main(flags) == 0
    left = [".shard-000000-mine", ".shard-000001-01234567", "shard-000000.tar"]
    assert sorted(os.listdir(output)) == left
    assert run_script("run_parallel.sh", *flags[:2], "--num-shards=1").returncode == 0
    assert sorted(os.listdir(output)) == [left[0], RECORD, left[2]], "a run clears all"


@pytest.mark.parametrize("driver", MOSTLY_BASH)
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(driver: str, number: int, preload: str, tmp_path) -> None:
    if driver == "create_with_ray.py" and number != errno.ENOLCK:
        pytest.skip("one start of Ray will do")
    source = write_pairs(tmp_path / "source", 8)
    environment = {"LD_PRELOAD": preload, "FLOCK_ERRNO": str(number)}
    done = run_script(driver, *flags(source, tmp_path / "o"), env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "two runs would not see each other" in done.stderr
    assert len(os.listdir(tmp_path / "o")) == 3


def test_a_dead_run_without_locks(preload: str, tmp_path: Path) -> None:
    """Nobody can tell that it is dead, so a person must."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    run = start_run(list_samples(source), output=output, total_shards=2, driver=os.getpid())
    pack_shard_of(run, 1)
    run.release()
    environment = {"LD_PRELOAD": preload, "FLOCK_ERRNO": str(errno.ENOLCK)}
    before = hashes(output)
    done = run_script("run_parallel.sh", *flags(source, output), env=environment)
    assert done.returncode == 1 and "has not ended; if it is dead, run the same" in done.stderr
    assert hashes(output) == before
    shutil.copytree(output, tmp_path / "copy")
    done = run_script("run_parallel.sh", *flags(source, output, "--resume"), env=environment)
    assert done.returncode == 0 and "Shard 1 kept" in done.stdout, done
    afresh = flags(source, tmp_path / "copy", "--replace", "--num-shards=1")
    done = run_script("run_parallel.sh", *afresh, env=environment)
    assert done.returncode == 0 and "kept" not in done.stdout, done
    assert run_script("run_parallel.sh", *flags(source, output), env=environment).returncode == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder(number: int, preload: str, tmp_path) -> None:
    source = write_pairs(tmp_path / "source", 8)
    environment = {"LD_PRELOAD": preload, "FSYNC_ERRNO": str(number)}
    done = run_script("run_parallel.sh", *flags(source, tmp_path / "o"), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(os.listdir(tmp_path / "o")) == 3
    direct = ["--source", source, "--output", tmp_path / "o", "--shard-id=0", "--total-shards=2"]
    done = run_script("create_webdataset.py", *direct, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    environment["FSYNC_ERRNO"] = str(errno.EIO)
    done = run_script("run_parallel.sh", *flags(source, tmp_path / "p"), env=environment)
    assert done.returncode == 1 and "Input/output error" in done.stderr


def test_signals_wait_until_all_is_published(tmp_path: Path, monkeypatch) -> None:
    """To end between two renames would leave neither the old dataset nor the new one."""
    run = start_run(
        list_samples(write_pairs(tmp_path / "source", 4)), output=tmp_path / "o", total_shards=2
    )
    for shard_id in range(2):
        pack_shard_of(run, shard_id)
    heard: list[int] = []
    before = [signal.signal(number, lambda n, _: heard.append(n)) for number in STOPPING]
    rename = os.rename

    def interrupted(source: str, target: str) -> None:
        for number in STOPPING:
            os.kill(os.getpid(), number)
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    try:
        run.finish()
        assert not heard and len(shards(tmp_path / "o")) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "they work again"
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


def test_a_task_that_is_at_work_while_it_publishes(tmp_path: Path, monkeypatch) -> None:
    """It keeps its folder if shards are missing; what it adds at the last moment is noticed."""
    source, output, new = write_pairs(tmp_path / "s", 4), tmp_path / "o", folder_run.new_staging
    run = start_run(list_samples(source), output=output, total_shards=2)
    pack_shard_of(run, 0)
    monkeypatch.setattr(folder_run, "new_staging", None)
    with pytest.raises(PackError, match=r"not packed: 1 shard \(1\)"):
        run.finish()
    pack_shard_of(run, 1)
    second = Path(run.path, f"shard-000001.{'0' * 32}")

    def late(output: str) -> str:
        second.touch()
        return new(output)

    monkeypatch.setattr(folder_run, "new_staging", late)
    with pytest.raises(PackError, match=r"not packed: 1 shard \(1\)"):
        run.finish()
    second.unlink()
    assert not shards(output)
    monkeypatch.undo()
    run.finish()
    assert len(shards(output)) == 2


@pytest.mark.parametrize("what", ["files", "folder"])
def test_tars_that_links_lead_to_are_safe(what: str, tmp_path: Path) -> None:
    source, real = tmp_path / "source", tmp_path / "real"
    source.mkdir()
    real.mkdir()
    for number in range(4):
        (real / f"shard-00000{number}.tar").write_bytes(b"precious")
        if what == "files":
            (source / f"{number}.tar").symlink_to(real / f"shard-00000{number}.tar")
    if what == "folder":
        (source / "linked").symlink_to(real)
    done = run_script("run_parallel.sh", *flags(source, real, "--fields=tar"))
    assert (
        done.returncode == 2
        and ("inside --source" if what == "folder" else "of --source; choose another")
        in done.stderr
    ), done
    assert len(hashes(real)) == 4


def test_a_publishing_that_cannot_begin(preload: str, tmp_path: Path) -> None:
    """The run stays where it was, for the same command to publish it later; so does the old one."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    core.create_webdataset(source, output, 0, 1)
    begin = ["--source", source, "--output", output, "--num-shards=2"]
    run = run_script("sharding", "start", *begin).stdout.strip()
    run_script("create_webdataset.py", "--run", run, "--shard-id=0", "--shard-step=1")
    broken = {"LD_PRELOAD": preload, "FSYNC_ERRNO": str(errno.EIO)}
    done = run_script("sharding", "publish", "--run", run, env=broken)
    assert done.returncode == 1 and "Input/output error" in done.stderr
    assert read_webdataset.main(["--path", str(output), "--quiet"]) == 0
    done = run_script("sharding", "publish", "--run", run)
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(output)) == 3
