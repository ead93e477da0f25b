"""What a dead run had finished: kept by the same command, never lost, never published unseen."""

from __future__ import annotations

import functools
import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import DRIVERS, MOSTLY_BASH, hashes, members, pack_shard_of, run_script, write_pairs

import read_webdataset as reader
from sharding.errors import InputError, PackError
from sharding.folder.dataset import STAGING, staging_folders
from sharding.folder.staging import LEFT, all_shards
from sharding.listing import list_samples
from sharding.plan import PLAN
from sharding.record import RECORD
from sharding.run import Run, load
from sharding.run import start as start_run
from sharding.shards import shard_name

UNREADABLE = "/proc/self/mem"  # what links to it is listed, and its read fails


def leave(
    source: Path, output: Path, finished: Iterable[int] = (0, 2), total: int = 4, **flags
) -> Run:
    """Leave what a run leaves that dies when it has finished these shards."""
    listing = list_samples(source, **flags)
    run = start_run(listing, output=output, total_shards=total, driver=os.getpid())
    for shard_id in finished:
        pack_shard_of(run, shard_id)
    run.release()
    return run


def same(source: Path, output: Path, *more: str) -> list[str | Path]:
    """Return the flags of the run that `leave` leaves."""
    return ["--source", source, "--output", output, "--num-workers=2", "--num-shards=4", *more]


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A source of 40 samples, and an output."""
    return write_pairs(tmp_path / "source", 40), tmp_path / "o"


def prove(source: Path, output: Path) -> None:
    assert reader.main(["--path", str(output), "--source", str(source), "--quiet"]) == 0
    assert all(name.startswith((RECORD, "shard-")) for name in os.listdir(output))


@pytest.mark.parametrize("more", [[], ["--resume"]])
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_same_command_goes_on(driver: str, more: list[str], place) -> None:
    if driver == "create_with_ray.py" and more:
        pytest.skip("one start of Ray will do")
    leave(*place)
    done = run_script(driver, *same(*place, *more))
    assert (done.returncode, done.stderr) == (0, "") or "ray" in driver, done
    assert done.stdout.count("kept with 10 samples") == 2, done
    assert "Shard 0 kept" in done.stdout and "Shard 2 kept" in done.stdout
    prove(*place)
    again = run_script("run_parallel.sh", *same(*place, *more))
    assert again.returncode == 0 and again.stdout.count("created with") == (0 if more else 4)
    assert ("is already complete" in again.stdout) is bool(more)
    assert not again.stderr, "job scripts may always give --resume"


def add_one(source: Path) -> None:
    (source / "zzz.jpg").touch()
    (source / "zzz.txt").touch()


def rename_one(source: Path) -> None:
    for extension in ("jpg", "txt"):
        (source / f"sample-3.{extension}").rename(source / f"zzz.{extension}")


@pytest.mark.parametrize("driver", ["run_parallel.sh", "create_with_ray.py", "sharding"])
@pytest.mark.parametrize(
    ("change", "more", "differs"),
    [
        (add_one, [], "other samples (40, not 41)"),
        (rename_one, [], "other samples (as many, under other names)"),
        (None, ["--num-shards=5"], "another number of shards (4, not 5)"),
        (None, ["--fields=jpg"], "other fields ('jpg,txt', not 'jpg')"),
        (None, ["--shuffle=3"], "another shuffle seed (none, not 3)"),
        (None, ["--source={}/two"], "another source ('{0}/source', not '{0}/two')"),
        (None, ["--num-shards=5", "--resume"], "another number of shards (4, not 5)"),
        (
            add_one,
            ["--num-shards=3", "--fields=txt"],
            "other fields ('jpg,txt', not 'txt'), another number of shards (4, not 3), "
            "other samples (40, not 41)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    driver: str, change, more: list[str], differs: str, place, tmp_path: Path
) -> None:
    """What differs, how many shards are finished, what to do; nothing goes."""
    if driver != "run_parallel.sh" and not change:
        pytest.skip("they do the same")
    source, output = place
    leave(source, output)
    shutil.copytree(source, tmp_path / "two")
    if change:
        change(source)
    before, (root, flags) = hashes(output), (str(tmp_path), same(source, output))
    flags += [flag.format(root) for flag in more]
    begin = ["start"] if driver == "sharding" else []
    done = run_script(driver, *begin, *flags)
    assert done.returncode == 2 and not done.stdout, done
    said = f"{output}': the interrupted run, with 2 finished shards, has {differs.format(root)}; "
    assert f"{said}give the same as then, or --replace to pack afresh\n" in done.stderr, done
    assert done.stderr.count("\n") == 1 and hashes(output) == before
    if driver != "run_parallel.sh" or more:
        return
    done = run_script(driver, *flags, "--replace")
    assert done.returncode == 0 and "kept" not in done.stdout, done
    assert done.stderr == "warning: 2 finished shards of an interrupted run removed\n"
    assert not staging_folders(str(output))


@pytest.mark.parametrize("driver", MOSTLY_BASH)
def test_replace_packs_afresh(driver: str, place) -> None:
    """Also what fits; and it may always be given."""
    leave(*place)
    done = run_script(driver, *same(*place, "--replace"))
    assert done.returncode == 0 and done.stdout.count("created with") == 4, done
    assert "2 finished shards of an interrupted run removed" in done.stderr
    prove(*place)
    if driver == "run_parallel.sh":
        done = run_script(driver, *same(*place, "--replace"))
        assert (done.returncode, done.stderr) == (0, "")


def test_nothing_finished_is_nothing_lost(place) -> None:
    leave(*place, finished=())
    done = run_script("run_parallel.sh", *same(*place, "--num-shards=3"))
    assert (done.returncode, done.stderr) == (0, ""), done
    prove(*place)


def test_an_array_job_is_nobodys_to_replace(place) -> None:
    output = place[1]
    run = run_script("sharding", "start", *same(*place)).stdout.strip()
    pack_shard_of(load(run), 1)
    before = hashes(output)
    for more in (
        [],
        ["--replace"],
        ["--replace", "--resume"],
        ["--replace", "--num-shards=3"],
        ["--resume", "--num-shards=3"],
    ):
        done = run_script("run_parallel.sh", *same(*place, *more))
        assert done.returncode == 1 and "holds an array job that" in done.stderr, done
        other = ", with another number of shards (4, not 3); publish it"
        assert (other in done.stderr) == ("--num-shards=3" in more)
        assert hashes(output) == before
    done = run_script("run_parallel.sh", *same(*place, "--resume"))
    assert done.returncode == 0 and "Shard 1 kept" in done.stdout, done
    prove(*place)


def test_an_array_job_goes_on_from_a_dead_run(place) -> None:
    leave(*place)
    run = run_script("sharding", "start", *same(*place)).stdout.strip()
    done = run_script("create_webdataset.py", "--run", run, "--shard-id=0", "--shard-step=1")
    assert done.stdout.count("kept") == 2, done
    assert run_script("sharding", "publish", "--run", run).returncode == 0
    prove(*place)


def test_files_that_changed_are_packed_again(place) -> None:
    """What is kept is what is still true."""
    source, output = place
    (source / "sample-9.jpg").unlink()
    (source / "sample-9.jpg").symlink_to(UNREADABLE)  # in the last shard
    done = run_script("run_parallel.sh", *same(*place))
    assert done.returncode == 1 and "run the same command again to pack just these" in done.stderr
    look = run_script("read_webdataset.py", "--path", output)
    assert "an unfinished run is there: finish it with the same command" in look.stderr
    (source / "sample-9.jpg").unlink()
    (source / "sample-9.jpg").write_bytes(b"mended")
    keys = sorted(path.stem for path in source.glob("*.jpg"))
    before = (source / f"{keys[1]}.txt").stat()
    (source / f"{keys[1]}.txt").write_bytes(b"changed since it was packed, to another size")
    os.utime(source / f"{keys[1]}.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    (source / f"{keys[2]}.jpg").write_bytes(bytes((source / f"{keys[2]}.jpg").stat().st_size))
    done = run_script("run_parallel.sh", *same(*place))
    assert done.returncode == 0, done.stderr
    expected = {0: "kept", 1: "created again", 2: "created again", 3: "created"}
    assert keys.index("sample-9") % 4 == 3
    for shard_id, how in expected.items():
        assert f"Shard {shard_id} {how} with 10 samples.\n" in done.stdout, done.stdout
    content: dict[str, bytes] = {}
    for shard_id in range(4):
        content |= members(output / shard_name(shard_id))
    assert content == {path.name: path.read_bytes() for path in source.iterdir()}


def test_another_source_with_the_same_names(tmp_path: Path) -> None:
    """And the same sizes and times, but other bytes."""
    one, two = tmp_path / "one", tmp_path / "two"
    for source in (one, two):
        write_pairs(source, 8, seed=1)
    for path in two.glob("*.jpg"):
        path.write_bytes(bytes(path.stat().st_size))
    for path in [*one.iterdir(), *two.iterdir()]:
        os.utime(path, (1, 1))
    leave(one, tmp_path / "o")
    done = run_script("run_parallel.sh", *same(two, tmp_path / "o"))
    assert done.returncode == 2 and "another source" in done.stderr, done
    assert run_script("run_parallel.sh", *same(two, tmp_path / "o", "--replace")).returncode == 0
    prove(two, tmp_path / "o")


def test_what_is_not_looked_at_is_not_published(place) -> None:
    """A shard of a dead run counts once this one has found that its files are as they were."""
    source, output = place
    leave(*place, finished=range(4))
    run = leave(*place, finished=[0, 1])
    with pytest.raises(PackError, match=r"not packed: 2 shards \(2, 3\)"):
        run.finish()
    (source / "sample-11.txt").unlink()  # of shard 3
    with pytest.raises(OSError, match=r"sample-11\.txt"):
        pack_shard_of(run, 3)
    assert pack_shard_of(run, 2).how == "kept"
    with pytest.raises(PackError, match=r"not packed: 1 shard \(3\)"):
        run.finish()
    assert not list(output.glob("*.tar"))


def test_finished_shards_of_several_runs(place) -> None:
    """One that was killed while it took over another; those that ended before they packed."""
    output = place[1]
    first = Path(leave(*place, finished=[0]).path)
    copy = output / f"{STAGING}{'a' * 16}"
    shutil.copytree(first, copy)
    shutil.rmtree(first)
    second = Path(leave(*place, finished=[1, 2]).path)  # the first waits in its folder
    assert {path.name[:12] for path in (second / LEFT).iterdir()} == {"shard-000000"}
    third = output / f"{STAGING}{'b' * 16}"
    third.mkdir()
    shutil.copy(second / PLAN, third)
    (third / LEFT).mkdir()
    (moved,) = second.glob("shard-000001.*")
    moved.rename(third / LEFT / moved.name)
    (output / f"{STAGING}{'c' * 16}").mkdir()
    assert [sorted(all_shards(str(run))) for run in (second, third)] == [[0, 2], [1]]
    done = run_script("run_parallel.sh", *same(*place))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("kept") == 3, done
    prove(*place)


def test_a_folder_of_shards_without_a_plan(place) -> None:
    """As of an upload that was cancelled while it moved a folder, file by file."""
    output = place[1]
    run = leave(*place)
    os.unlink(Path(run.path, PLAN))
    before = hashes(output)
    done = run_script("run_parallel.sh", *same(*place, "--resume"))
    assert done.returncode == 2 and "2 finished shards without a plan; --replace" in done.stderr
    assert hashes(output) == before
    assert run_script("run_parallel.sh", *same(*place, "--replace")).returncode == 0
    prove(*place)


def test_a_run_that_fails_at_its_start_loses_nothing(place) -> None:
    """What the dead run had finished stays until the new plan is whole."""
    leave(*place)
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10, 10))
    done = run_script("run_parallel.sh", *same(*place), preexec_fn=full)
    assert done.returncode == 1 and "plan" in done.stderr and not done.stdout, done
    done = run_script("run_parallel.sh", *same(*place))
    assert done.returncode == 0 and done.stdout.count("kept") == 2, done


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_taking_over_that_is_cut(moves: int, place, monkeypatch) -> None:
    """By an error after some of its moves: the rest stays where it was, and all is found again."""
    leave(*place, finished=[0, 1, 2])
    rename, left = os.rename, [moves]

    def rename_or_fail(old: str, new: str) -> None:
        if not left[0]:
            raise OSError(5, "Input/output error", old)
        left[0] -= 1
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename_or_fail)
        with pytest.raises(OSError, match="Input/output"):
            leave(*place)
    done = run_script("run_parallel.sh", *same(*place))
    assert done.returncode == 0 and done.stdout.count("kept") == 3, done
    prove(*place)


def test_from_python(place) -> None:
    leave(*place)
    with pytest.raises(InputError, match="or replace to pack afresh"):
        start_run(list_samples(place[0]), output=place[1], total_shards=3)
    start_run(list_samples(place[0]), output=place[1], total_shards=3, replace=True)
