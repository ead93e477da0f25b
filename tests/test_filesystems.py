"""File systems of other kinds: layers, network mounts, folders of a group. Real ones, or played."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Bucket, hashes, run_script, start_packing, write_pairs

import read_webdataset
from sharding.errors import InputError
from sharding.folder import dataset as folder
from sharding.folder.mounts import LOCK
from sharding.plan import PLAN
from sharding.record import RECORD
from sharding.shards import shard_name

GROUP, COLLEAGUE = 64_001, 64_002  # ids that nobody has
FEW = [shard_name(number) for number in range(2)]


def flags(source: Path, output: Path, *more: str) -> list[str]:
    return [f"--source={source}", f"--output={output}", "--num-workers=2", *more]


def start_array(source: Path, output: Path, pack: int = 2) -> Path:
    """Start an array job of two shards, pack some, and return its folder."""
    started = run_script("sharding", "start", *flags(source, output, "--num-shards=2"))
    for shard_id in range(pack):
        done = run_script(
            "create_webdataset.py", "--run", started.stdout.strip(), f"--shard-id={shard_id}"
        )
        assert done.returncode == 0, done.stderr
    return Path(started.stdout.strip())


# ---------------------------------------------------------------- mounts that are played


def test_inode_numbers_that_change(preload: str, tmp_path: Path) -> None:
    """As on an rclone mount: at each look."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    for _ in range(2):
        done = run_script(
            "run_parallel.sh",
            *flags(source, output),
            env={"LD_PRELOAD": preload, "NEW_INODES": "1"},
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        assert sorted(os.listdir(output)) == [RECORD, *FEW]
    code = (
        "import sys; from sharding.folder.dataset import identify; "
        "assert identify(sys.argv[1:]) == identify(sys.argv[1:])"
    )
    subprocess.run(
        [sys.executable, "-c", code, *map(str, output.iterdir())],
        env={**os.environ, "LD_PRELOAD": preload, "NEW_INODES": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_a_dataset_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """Size and time of its files tell that, too."""
    found = []
    for seed in range(2):
        source = write_pairs(tmp_path / f"source-{seed}", 8, seed=seed)
        done = run_script("run_parallel.sh", *flags(source, tmp_path / "o", "--replace"))
        assert done.returncode == 0, done
        found.append(folder.identify([str(tmp_path / "o" / name) for name in FEW]))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("call", "path", "number", "told"),
    [
        ("UNLINK", LOCK, errno.EBUSY, "it stays, and does no harm"),  # SMB: it is open
        ("UNLINK", "-gone-", errno.ETXTBSY, "cannot be removed (Text file busy)"),
        ("UNLINK", "-gone-", errno.EPERM, "all shards are in place, but"),
        ("RMDIR", "-gone-", errno.ENOTEMPTY, "cannot be removed (Directory not empty)"),
    ],
)
def test_what_cannot_be_cleared_up(
    call: str, path: str, number: int, told: str, preload: str, tmp_path: Path
) -> None:
    """When all shards are in place, the run is done, and the next one begins."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    odd = {"LD_PRELOAD": preload, f"{call}_ERRNO": str(number), f"{call}_PATH": path}
    for _ in range(2):
        done = run_script("run_parallel.sh", *flags(source, output), env=odd)
        assert done.returncode == 0 and told in done.stderr, done
        assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
        assert "All shards created." in done.stdout
        assert read_webdataset.main(["--path", str(output), "--source", str(source)]) == 0
    assert len(os.listdir(output)) > 3
    done = run_script("run_parallel.sh", *flags(source, output))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(output)) == [RECORD, *FEW]


def test_a_path_that_answers_with_an_error(preload: str, tmp_path: Path) -> None:
    """As a link to a mount that has died."""
    dead, source = tmp_path / "dead", write_pairs(tmp_path / "source", 8)
    dead.symlink_to(tmp_path)
    odd = {"LD_PRELOAD": preload, "STAT_ERRNO": str(errno.EIO), "STAT_PATH": "dead"}
    done = run_script("read_webdataset.py", "--path", dead, env=odd)
    assert done.returncode == 2 and done.stderr.endswith("/dead': Input/output error\n")
    done = run_script("run_parallel.sh", *flags(source, dead), env=odd)
    assert done.returncode == 2 and "--output" in done.stderr, done
    assert done.stderr.endswith("/dead': Input/output error\n")
    for path in (tmp_path / "nothing", tmp_path / "none-*"):
        with pytest.raises(InputError, match="No such file"):
            folder.find_shards(str(path))
    (tmp_path / "bracket[1]").mkdir()
    (tmp_path / "bracket[1]" / FEW[0]).touch()
    assert len(folder.find_shards(str(tmp_path / "bracket[1]")).shards) == 1
    (tmp_path / FEW[0]).symlink_to("nothing")
    with pytest.raises(InputError, match="No such file"):
        folder.find_shards(str(tmp_path / FEW[0]))
    os.mkfifo(tmp_path / FEW[1])
    with pytest.raises(InputError, match="is not a file"):
        folder.find_shards(str(tmp_path / FEW[1]))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_dangling_link(below: str, tmp_path: Path) -> None:
    source, link = write_pairs(tmp_path / "source", 8), tmp_path / "link"
    link.symlink_to("/nowhere/at all")
    done = run_script("run_parallel.sh", *flags(source, link / below))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert f"the link '{link}' leads to '/nowhere/at all', which is not there" in done.stderr


def test_an_output_that_goes_away(tmp_path: Path) -> None:
    """It is no run that was published."""
    source, output = write_pairs(tmp_path / "source", 2_000), tmp_path / "o"
    process = start_packing(*flags(source, output, "--num-shards=1000"))
    output.rename(tmp_path / "away")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and f"'{output}' is gone: was it" in err, err
    assert "published, resumed" not in err and "Traceback" not in err
    assert err.count("is gone") == 3, "once for each worker, and at the end"


def test_a_lock_file_that_nobody_sees(preload: str, tmp_path: Path) -> None:
    """A run does not wait for ever."""
    source = write_pairs(tmp_path / "source", 8)
    odd = {"LD_PRELOAD": preload, "STAT_ERRNO": str(errno.ENOENT), "STAT_PATH": LOCK}
    began = time.monotonic()
    done = run_script("run_parallel.sh", *flags(source, tmp_path / "o"), env=odd, timeout=30)
    assert done.returncode == 1 and LOCK in done.stderr and time.monotonic() - began < 20


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EMFILE])
def test_a_mount_that_renames_no_folders(number: int, preload: str, tmp_path: Path) -> None:
    """As those of buckets: found out before any packing."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    assert run_script("run_parallel.sh", *flags(source, output)).returncode == 0
    before = hashes(output)
    odd = {"LD_PRELOAD": preload, "RENAME_ERRNO": str(number), "RENAME_PATH": ".webdataset"}
    for script, more in (("run_parallel.sh", []), ("sharding", ["start"])):
        done = run_script(script, *more, *flags(source, output), env=odd)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert "cannot rename folders" in done.stderr and done.stderr.count("\n") == 1
        assert hashes(output) == before and sorted(os.listdir(output)) == [RECORD, *FEW]


@pytest.mark.parametrize("publishing", [False, True])
def test_a_run_that_was_moved_in_part(publishing: bool, tmp_path: Path, capfd) -> None:
    """Its plan did not arrive: no later run stops there."""
    source, output = write_pairs(tmp_path / "source", 8), tmp_path / "o"
    run_script("run_parallel.sh", *flags(source, output))
    job = start_array(source, output)
    (job / PLAN).unlink()
    if publishing:
        (job / folder.MARKER).touch()
        assert read_webdataset.main(["--path", str(output), "--quiet"]) == 1
        assert "publishing was interrupted" in capfd.readouterr().err
    else:
        done = run_script("run_parallel.sh", *flags(source, output))
        assert done.returncode == 2 and "without a plan; --replace removes it" in done.stderr
    more = [] if publishing else ["--replace"]
    done = run_script("run_parallel.sh", *flags(source, output, *more))
    assert done.returncode == 0, done
    assert ("the plan is gone; packing all afresh" in done.stderr) is publishing
    assert sorted(os.listdir(output)) == [RECORD, *FEW]


def test_a_prefix_inside_the_source(bucket: Bucket, tmp_path: Path) -> None:
    """A later run would list the shards; the source may well be below the output."""
    source = bucket.upload(write_pairs(tmp_path / "raw", 4), "raw/")
    one = ["--shard-id=0", "--total-shards=1"]
    for output in (f"{source}/shards", f"{source}/"):
        done = run_script("create_webdataset.py", f"--source={source}", f"--output={output}", *one)
        assert done.returncode == 2 and "is inside --source: a later run" in done.stderr, done
    done = run_script("create_webdataset.py", f"--source={source}", f"--output={bucket.url}", *one)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- real mounts


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A layer over the folder `lower`: as in a container whose image was made of another."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    yield tmp_path / "merged"
    subprocess.run(["umount", "-l", tmp_path / "merged"], capture_output=True)


def mount_overlay(merged: Path) -> None:
    """Mount it, once the lower layer holds what it should."""
    layers = {f"{name}dir": merged.parent / name for name in ("lower", "upper", "work")}
    options = ",".join(f"{name}={path}" for name, path in layers.items())
    command = ["mount", "-t", "overlay", "-o", f"{options},redirect_dir=off", "overlay", merged]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")


def test_a_run_of_a_lower_layer_is_published(overlay: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 8)
    job = start_array(source, tmp_path / "lower" / "o")
    mount_overlay(overlay)
    with pytest.raises(OSError, match="cross-device"):
        os.rename(overlay / "o" / job.name, overlay / "o" / "elsewhere")
    done = run_script("sharding", "publish", "--run", overlay / "o" / job.name)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert sorted(os.listdir(overlay / "o")) == [RECORD, *FEW]


@pytest.mark.parametrize("more", [[], ["--replace"]], ids=["go on", "replace"])
def test_a_killed_run_of_a_lower_layer(more: list[str], overlay: Path, tmp_path: Path) -> None:
    """It is taken over, or removed as it says, though its folder cannot be renamed."""
    source, lower = write_pairs(tmp_path / "source", 2_000), tmp_path / "lower" / "o"
    kill_a_run(source, lower)
    mount_overlay(overlay)
    done = run_script("run_parallel.sh", *flags(source, overlay / "o", "--num-shards=200", *more))
    assert done.returncode == 0, done.stderr
    assert ("kept" in done.stdout) is (not more) and ("removed" in done.stderr) is bool(more), done
    assert len(os.listdir(overlay / "o")) == 201


def kill_a_run(source: Path, output: Path) -> Path:
    """Kill a run in the middle, and return the folder that it has left."""
    process = start_packing(*flags(source, output, "--num-shards=200"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = folder.staging_folders(str(output))
    return Path(left)


@pytest.fixture
def rclone_mount(tmp_path: Path) -> Iterator[Path]:
    """A folder, mounted with rclone and its cache of writes."""
    rclone, mount = Path(sys.executable).with_name("rclone"), tmp_path / "mount"
    if not rclone.exists() or not shutil.which("fusermount3") or not os.path.exists("/dev/fuse"):
        pytest.skip("needs rclone, and FUSE")
    (tmp_path / "store").mkdir()
    mount.mkdir()
    options = ["--vfs-cache-mode=writes", f"--cache-dir={tmp_path / 'cache'}", "--config=/dev/null"]
    command = [rclone, "mount", f":local:{tmp_path / 'store'}", mount, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not os.path.ismount(mount):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.skip("mounting is not allowed here")
            time.sleep(0.05)
        yield mount
        subprocess.run(["fusermount3", "-uz", mount], check=True)


def test_an_rclone_mount(rclone_mount: Path, tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 40), rclone_mount / "o"
    for _ in range(4):  # before, three of seven failed
        done = run_script("run_parallel.sh", *flags(source, output, "--num-shards=8"))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert len(os.listdir(output)) == 9
    assert read_webdataset.main(["--path", str(output), "--source", str(source), "--quiet"]) == 0


# ---------------------------------------------------------------- folders of a group


def group_member() -> list[str]:
    """Return what a command begins with to be run by a member of GROUP without other rights."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root, and setpriv")
    rights = ",".join(f"-{name}" for name in ("dac_override", "dac_read_search", "fowner", "chown"))
    return ["setpriv", f"--regid={GROUP}", "--clear-groups", f"--bounding-set={rights}"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """An output of a group."""
    if os.geteuid():
        pytest.skip("needs root")
    output = tmp_path / "o"
    output.mkdir()
    os.chown(output, COLLEAGUE, GROUP)
    output.chmod(0o2775)
    return output


def give_to_colleague(*paths: Path) -> None:
    for path in paths:
        os.chown(path, COLLEAGUE, GROUP)


def test_the_lock_of_a_colleague(shared: Path, tmp_path: Path) -> None:
    """Made by this version, by one that gave the group no right to it, or hidden from it."""
    source, member = write_pairs(tmp_path / "source", 8), group_member()
    lock = shared / LOCK
    run_script("sharding", "start", *flags(source, shared))
    assert (lock.stat().st_mode & 0o060, lock.stat().st_gid) == (0o060, GROUP)
    for path in shared.glob(".webdataset-*"):
        shutil.rmtree(path)
    for mode in (0o664, 0o644):
        lock.touch()
        lock.chmod(mode)
        give_to_colleague(lock)
        done = run_script("run_parallel.sh", *flags(source, shared), prefix=member)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert (shared / FEW[0]).stat().st_mode & 0o777 == 0o666 & ~umask()
    lock.touch()
    lock.chmod(0o600)
    give_to_colleague(lock)
    done = run_script("run_parallel.sh", *flags(source, shared), prefix=member)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert f"'{lock}': Permission denied: a run of user {COLLEAGUE} left it; ask" in done.stderr
    assert f"`chmod -R g+rwX {shared}`" in done.stderr


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("mode", [None, 0o755], ids=["of the group", "of the colleague"])
def test_a_killed_run_of_a_colleague(mode: int | None, shared: Path, tmp_path: Path) -> None:
    """Made by this version, or by one that gave the group no right to it."""
    source, member = write_pairs(tmp_path / "source", 2_000), group_member()
    for _ in range(2):  # the second one has taken over shards of the first
        left = kill_a_run(source, shared)
    if mode:
        left.chmod(mode)
    give_to_colleague(shared / LOCK, left, *left.rglob("*"))
    before = hashes(shared)
    again = flags(source, shared, "--num-shards=200")
    done = run_script("run_parallel.sh", *again, prefix=member)
    if mode:
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done
        assert f"'{left}': Permission denied: a run of user {COLLEAGUE} left it" in done.stderr
        assert f"`chmod -R g+rwX {left}`" in done.stderr
        assert hashes(shared) == before and left.exists()
        left.chmod(0o2775)
        done = run_script("run_parallel.sh", *again, prefix=member)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "kept" in done.stdout and len(os.listdir(shared)) == 201
