"""The two drivers: same bytes from both, honest about failure."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import DRIVERS, MOSTLY_BASH, ROOT, hashes, run_script, start_packing, write_pairs

import create_with_ray
from sharding.errors import PackError
from sharding.folder.dataset import staging_folders
from sharding.folder.mounts import lock_output
from sharding.folder.staging import staged_shards
from sharding.record import RECORD
from sharding.run import STOPPING, finish
from sharding.shards import shard_name

SUMMARY = r"1,003 samples in 5 shards, [\d,]+ bytes \(mean [\d,]+, largest [\d,]+\) in [\d.]+ s"


@pytest.fixture(scope="module")
def packed_by_bash(source_1003: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bash") / "new" / "output"
    done = run_script(
        "run_parallel.sh", "--source", source_1003, "--output", output, "--num-shards=5"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    counts = [201, 201, 201, 200, 200]
    assert sorted(lines[:5]) == [
        f"Shard {shard} created with {count} samples." for shard, count in enumerate(counts)
    ]
    assert lines[5] == "All shards created." and re.fullmatch(SUMMARY, lines[6]), lines
    assert not done.stderr
    return output


def test_output_holds_shards_and_their_record(packed_by_bash: Path) -> None:
    assert sorted(os.listdir(packed_by_bash)) == [RECORD, *map(shard_name, range(5))]


def test_ray_gives_the_same_bytes(
    packed_by_bash: Path, source_1003: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    """And tells nobody that it runs, as Ray would without this variable."""
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    argv = ["--source", str(source_1003), "--output", str(tmp_path / "output"), "--num-shards", "5"]
    assert create_with_ray.main([*argv, "--num-workers", "3"]) == 0
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    lines = capfd.readouterr().out.splitlines()
    assert "Shard 4 created with 200 samples." in lines[:5]
    assert lines[5] == "All shards created successfully with Ray."
    assert re.fullmatch(SUMMARY, lines[6])
    assert hashes(tmp_path / "output") == hashes(packed_by_bash)


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_worker_count_changes_nothing(
    workers: int, packed_by_bash: Path, source_1003: Path, tmp_path: Path
) -> None:
    flags = ["--source", source_1003, "--output", tmp_path, "--num-shards", "5"]
    for again in (False, True):  # the second run replaces what the first one wrote, and says so
        done = run_script("run_parallel.sh", *flags, "--num-workers", str(workers))
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert ("; replaced 5 shards\n" in done.stdout) == again
        assert hashes(tmp_path) == hashes(packed_by_bash)


def copy_project(project: Path) -> Path:
    project.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        shutil.copy(path, project)
    shutil.copytree(ROOT / "sharding", project / "sharding")
    return project


def test_defaults_from_any_directory(tmp_path: Path) -> None:
    """No arguments: the project's own folders, wherever it lies and wherever one stands."""
    project = copy_project(tmp_path / 'it\'s a "project" $HOME')
    environment = {**os.environ, "PYTHON": sys.executable, "CDPATH": "/"}
    for command in ("make_dummy_data.sh", "run_parallel.sh"):
        done = subprocess.run(
            [project / command], cwd="/", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert len(list((project / "source_data").iterdir())) == 20
    assert len(list((project / "webdataset_output").iterdir())) == 5


def test_the_digits_of_a_name_are_one_constant(tmp_path: Path) -> None:
    project, source = copy_project(tmp_path / "project"), write_pairs(tmp_path / "source", 4)
    path = project / "sharding" / "shards.py"
    path.write_text(path.read_text().replace("DIGITS = 6 ", "DIGITS = 8 "))
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=2"]
    done = run_script(project / "run_parallel.sh", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "o")) == [
        RECORD,
        "shard-00000000.tar",
        "shard-00000001.tar",
    ]
    read = ["--path", tmp_path / "o", "--source", source]
    done = run_script(project / "read_webdataset.py", *read)
    assert done.returncode == 0 and "4 samples in 2 shards" in done.stdout, done
    done = run_script(project / "run_parallel.sh", *flags[:4], "--num-shards=1", "--resume")
    left = [RECORD, "shard-00000000.tar"]
    assert sorted(os.listdir(tmp_path / "o")) == left, "an older, larger set goes"
    done = run_script("read_webdataset.py", *read[:2])
    assert done.returncode == 2 and "no shard-*.tar" in done.stderr


def test_shards_of_another_naming_are_named(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "o"
    output.mkdir()
    (output / "shard-00000000.tar").touch()
    done = run_script("run_parallel.sh", "--source", source, "--output", output)
    assert done.returncode == 0 and (output / "shard-00000000.tar").exists()
    assert "has 1 file ('shard-00000000.tar') not named like its shards" in done.stderr
    done = run_script("read_webdataset.py", "--path", output, "--quiet")
    assert done.returncode == 1 and "stray file" in done.stderr and ": 1 fault\n" in done.stdout


def test_most_samples_dropped(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 8)
    for number in range(187):
        (source / f"more-{number}.txt").touch()
    flags = ["--source", source, "--output", tmp_path / "o", "--skip-bad"]
    done = run_script("run_parallel.sh", *flags, "--num-shards=1")
    assert done.returncode == 0, done.stderr
    assert (
        "warning: 8 samples are left, besides 187 bad names; are the fields right?" in done.stderr
    )


@pytest.mark.parametrize("name", ["new\nline", "a#b?c;d", "run:1", "{0..3}", "'\"$(x)`y`", "--o"])
def test_odd_folder_names(name: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / f"{name}-source", 5)
    flags = [f"--source={source.name}", f"--output={name}-out", "--num-workers=2"]
    done = run_script("run_parallel.sh", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / f"{name}-out")) == 3


USAGE = [
    (["--num-workers", "0"], "--num-workers: 0 is not a number from 1"),
    (["--num-workers", "x"], "--num-workers: invalid number value: 'x'"),
    (["--num-workers", "9" * 30], "99 is not a number from 1 to 1,000,000"),
    (["--num-shards", "0"], "shards"),
    (["--num-shards", "1000001"], "--num-shards: 1000001 is not a number from 1 to 1,000,000"),
    (["--num-shards", "99"], "99 shards for 3 samples"),
    (["--num-shards"], "--num-shards"),
    (["--fields", "a b"], "cannot be a field"),
    (["--unknown", "x"], "--unknown"),
    (["--source", "nowhere"], "No such file"),
    ([], "4 shards for 3 samples"),
]


@pytest.mark.parametrize("script", DRIVERS)
@pytest.mark.parametrize(("flags", "message"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_usage(flags: list[str], message: str, script: str, tmp_path: Path, capfd) -> None:
    source = write_pairs(tmp_path / "source", 3)
    argv = ["--source", str(source), "--output", str(tmp_path / "output"), *flags]
    if script == "run_parallel.sh":
        done = run_script(script, *argv)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code = create_with_ray.main(argv)
        out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1, err
    assert script != "run_parallel.sh" or err.startswith("run_parallel.sh: error: "), err
    assert not (tmp_path / "output").exists()


def test_an_interpreter_behind_a_wrapper(tmp_path: Path) -> None:
    """The driver is then the parent of the wrapper, not of the worker."""
    source, wrapper = write_pairs(tmp_path / "source", 4), tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    flags = ["--source", source, "--output", tmp_path / "o"]
    done = run_script("run_parallel.sh", *flags, env={"PYTHON": str(wrapper)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", DRIVERS)
def test_nobody_reads_the_output(script: str, tmp_path: Path) -> None:
    """As with `... | head -1`: the reason is named, and nothing is published."""
    source, output = write_pairs(tmp_path / "source", 40), tmp_path / "o"
    reading, writing = os.pipe()
    os.close(reading)
    flags = ["--source", source, "--output", output, "--num-shards=40"]
    done = run_script(script, *flags, stdout=writing)
    os.close(writing)
    assert done.returncode == 1 and "the reader of this output has gone away" in done.stderr
    assert "Exception" not in done.stderr and "exit code" not in done.stderr
    assert not list(output.glob("shard-*"))


def test_progress_on_a_terminal(source_1003: Path, tmp_path: Path) -> None:
    """A bar on stderr, which does not tear the lines of stdout apart; test_usage sees no bar."""
    flags = ["--source", source_1003, "--output", tmp_path, "--num-workers", "2"]
    terminal, stderr = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen(
        [ROOT / "run_parallel.sh", *flags],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        os.close(stderr)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal, on Linux
            while piece := os.read(terminal, 1 << 16):
                shown += piece
        out, _ = process.communicate(timeout=120)
    os.close(terminal)
    assert process.returncode == 0 and b"502/502 [" in shown and b"Traceback" not in shown, shown
    counts = "Shard 0 created with 502 samples.", "Shard 1 created with 501 samples."
    assert sorted(out.splitlines()[:2]) == sorted(counts)


@pytest.mark.parametrize("script", DRIVERS)
def test_help(script: str) -> None:
    done = run_script(script, "--help")
    assert done.returncode == 0
    for flag in ("source", "output", "num-workers", "num-shards", "resume", "replace", "fields"):
        assert f"--{flag}" in done.stdout


@pytest.mark.parametrize("script", MOSTLY_BASH)
def test_samples_per_shard(script: str, tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 10), tmp_path / "o"
    flags = ["--source", source, "--output", output, "--samples-per-shard=3"]
    both = run_script(script, *flags, "--num-shards=2")
    assert both.returncode == 2 and "give one of them" in both.stderr and not output.exists()
    done = run_script(script, *flags)
    assert done.returncode == 0 and "10 samples in 4 shards" in done.stdout, done
    assert run_script("run_parallel.sh", *flags[:4], "--num-shards=4").returncode == 0
    assert (
        "10 samples in 1 shard,"
        in run_script("run_parallel.sh", *flags[:4], "--samples-per-shard=99").stdout
    )


def test_an_array_job(packed_by_bash: Path, source_1003: Path, tmp_path: Path) -> None:
    """Start, one job for each shard, publish: the source is listed once, the set appears whole."""
    output = tmp_path / "o"
    begin = ["start", "--source", source_1003, "--output", output, "--num-shards=5"]
    run = run_script("sharding", *begin).stdout.strip()
    for shard_id in (3, 0, 4):
        done = run_script("create_webdataset.py", "--run", run, f"--shard-id={shard_id}")
        assert re.fullmatch(rf"Shard {shard_id} created with 20\d samples.\n", done.stdout), done
    early = run_script("sharding", "publish", "--run", run)
    assert (early.returncode, early.stdout) == (
        1,
        "",
    ) and "not packed: 2 shards (1, 2)" in early.stderr
    look = run_script("read_webdataset.py", "--path", output)
    assert look.returncode == 2 and "an unfinished run is there: finish it" in look.stderr, look
    for again in (begin, [*begin, "--resume", "--shuffle=1"]):
        done = run_script("sharding", *again)
        assert done.returncode == 1 and "holds an array job that" in done.stderr, done
        assert staging_folders(output) == [run] and len(staged_shards(run)) == 3
    taken = run_script("sharding", *begin, "--resume").stdout.strip()
    late = run_script("create_webdataset.py", "--run", run, "--shard-id=1")
    assert late.returncode == 1 and "resumed in a new folder" in late.stderr
    done = run_script("create_webdataset.py", "--run", taken, "--shard-id=0", "--shard-step=1")
    assert re.findall(r"Shard (\d) (\w+)", done.stdout) == [
        ("0", "kept"), ("1", "created"), ("2", "created"), ("3", "kept"), ("4", "kept"),
    ]  # fmt: skip
    assert not list(output.glob("*.tar"))
    done = run_script("sharding", "publish", "--run", taken)
    assert done.returncode == 0 and re.fullmatch(SUMMARY + "\n", done.stdout)
    assert hashes(output) == hashes(packed_by_bash)


def test_an_array_job_with_relative_paths(tmp_path: Path) -> None:
    """Its tasks may run elsewhere."""
    write_pairs(tmp_path / "source", 3)
    flags = ["--source=source", "--output=o", "--num-shards=1"]
    run = run_script("sharding", "start", *flags, cwd=tmp_path).stdout.strip()
    for step in (["create_webdataset.py", "--shard-id=0"], ["sharding", "publish"]):
        done = run_script(*step, "--run", run, cwd="/")
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "o")) == [RECORD, shard_name(0)]


def test_a_run_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "plan").touch()
    for command in (["sharding", "publish"], ["create_webdataset.py", "--shard-id=0"]):
        done = run_script(*command, "--run", tmp_path)
        assert done.returncode == 1 and f"'{tmp_path}' is not a run: give what" in done.stderr
        assert done.stderr.count("\n") == 1
        empty = run_script(*command, "--run", "")
        assert empty.returncode == 2 and "--run is required" in empty.stderr, empty


def start_array(source: Path, output: Path, *more: str) -> str:
    """Start an array job of three shards, and pack them."""
    done = run_script("sharding", "start", "--source", source, "--output", output, *more)
    assert done.returncode == 0, done.stderr
    run = done.stdout.strip()
    pack = run_script("create_webdataset.py", "--run", run, "--shard-id=0", "--shard-step=1")
    assert pack.returncode == 0, pack.stderr
    return run


@pytest.mark.parametrize("by_its_new_name", [True, False])
@pytest.mark.parametrize("moved", [0, 2, 3])
def test_a_publishing_that_was_cut(moved: int, by_its_new_name: bool, tmp_path: Path) -> None:
    """Killed before, between and behind its renames; the same command again finishes it."""
    source, output = write_pairs(tmp_path / "source", 9), tmp_path / "o"
    run = start_array(source, output, "--num-shards=3")
    child = os.fork()
    if not child:
        rename, left = os.rename, [moved]

        def rename_or_die(old: str, new: str) -> None:
            if "shard-" in new or "gone-" in new:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            rename(old, new)

        os.rename = rename_or_die
        finish(run)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    late = run_script("create_webdataset.py", "--run", run, "--shard-id=0")
    assert late.returncode == 1, "no task changes what is published"
    (real,) = staging_folders(output)
    again = real if by_its_new_name else f"{run}/"
    if moved == 2:
        lock = lock_output(str(output))
        done = run_script("sharding", "publish", "--run", again)
        assert done.returncode == 1 and "another run is packing into" in done.stderr, done
        os.close(lock)
    done = run_script("sharding", "publish", "--run", again)
    said = "9 samples in 3 shards" if by_its_new_name else "now all shards are in place"
    assert done.returncode == 0 and said in done.stdout, done
    proof = run_script("read_webdataset.py", "--path", output, "--source", source, "--quiet")
    assert proof.returncode == 0, proof.stderr
    again = run_script("sharding", "publish", "--run", run)
    assert again.returncode == 1 and "is gone" in again.stderr


def test_two_versions_of_a_shard(tmp_path: Path) -> None:
    """As of two attempts, between which a file changed: the right one stays."""
    source, output = write_pairs(tmp_path / "source", 9), tmp_path / "o"
    run = Path(start_array(source, output, "--num-shards=3"))
    (run / f"shard-000001.{'0' * 32}").touch()
    early = run_script("sharding", "publish", "--run", run)
    assert early.returncode == 1 and "not packed: 1 shard (1)" in early.stderr
    assert "--run DIR --shard-id I, then publish" in early.stderr
    again = run_script("create_webdataset.py", "--run", run, "--shard-id=1")
    assert again.stdout == "Shard 1 kept with 3 samples.\n"
    (tmp_path / "link").symlink_to(run)
    done = run_script("sharding", "publish", "--run", tmp_path / "link")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(output)) == [RECORD, *map(shard_name, range(3))]


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    """As of another version of the scripts: nothing that was packed goes in silence."""
    source, output = write_pairs(tmp_path / "source", 9), tmp_path / "o"
    run = Path(start_array(source, output, "--num-shards=3"))
    (run / "plan").write_text('{"seed": null}\n')
    done = run_script("run_parallel.sh", "--source", source, "--output", output)
    assert done.returncode == 1 and "plan' cannot be read; to give up that run" in done.stderr
    assert len(staged_shards(str(run))) == 3


def test_an_output_that_is_not_utf_8(tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 9), os.fsdecode(bytes(tmp_path) + b"/\xff")
    flags = ["--source", source, "--output", output]
    done = run_script("run_parallel.sh", *flags)
    assert done.returncode == 0 and len(os.listdir(output)) == 5, done
    done = run_script("create_with_ray.py", *flags)
    assert done.returncode == 2 and "Ray cannot take a path that is not UTF-8" in done.stderr


def test_a_file_as_output(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 9)
    done = run_script("run_parallel.sh", "--source", source, "--output", source / "sample-0.txt")
    assert done.returncode == 2 and "sample-0.txt' is not a folder" in done.stderr, done


def make_unreadable(source: Path) -> None:
    """Make the sample of shard 1 impossible to pack, though it is listed: its read gives EIO."""
    (source / "sample-1.jpg").unlink()
    (source / "sample-1.jpg").symlink_to("/proc/self/mem")


@pytest.mark.parametrize("script", MOSTLY_BASH)
def test_a_failed_shard_is_named_and_nothing_is_published(script: str, tmp_path: Path) -> None:
    source, output = write_pairs(tmp_path / "source", 4), tmp_path / "output"
    flags = ["--source", source, "--output", output, "--num-workers", "2", "--num-shards", "4"]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    before = hashes(output)
    make_unreadable(source)
    done = run_script(script, *flags)
    assert done.returncode == 1
    failed = rf"^Shard 1 failed: '{source}/sample-1.jpg': Input/output error( \(on node [\d.]+\))?$"
    assert re.search(failed, done.stderr, re.M), done.stderr
    assert "not packed: 1 shard (1);" in done.stderr and "Traceback" not in done.stderr
    assert "All shards created" not in done.stdout
    assert {name: value for name, value in hashes(output).items() if "/" not in name} == {
        **before,
        ".webdataset.lock": hashes(output)[".webdataset.lock"],
    }


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_the_workers(sent: signal.Signals, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 3_000, largest=100_000)
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards", "300"]
    process = start_packing(*flags, "--num-workers", "2")
    start = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)  # ends when the last child has closed its end
    assert time.monotonic() - start < 2
    assert process.returncode == 128 + sent, err
    assert "Traceback" not in err
    assert not list((tmp_path / "o").glob("*.tar"))
    (staging,) = staging_folders(tmp_path / "o")
    assert len(staged_shards(staging)) < 300, "stopped, and not done"


def test_the_lock_goes_last(tmp_path: Path) -> None:
    """After Ctrl-C, workers take a moment to end; until then no other run may begin."""
    source, output = write_pairs(tmp_path / "source", 400), tmp_path / "o"
    flags = ["--source", source, "--output", output, "--num-shards=400", "--num-workers=1"]
    process = start_packing(*flags)

    def find(command: str) -> int:
        found = subprocess.check_output(["pgrep", "-f", command, "-s", str(process.pid)])
        return int(found.split()[0])

    worker, holder = find("create_webdataset.py .*--run"), find("sharding .*start --hold")
    os.kill(worker, signal.SIGSTOP)  # it would be done too soon
    try:
        for number in STOPPING:
            os.kill(holder, number)
        with pytest.raises(PackError, match="another run is packing"):
            lock_output(str(output))
    finally:
        os.kill(worker, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err


def test_a_signal_while_it_publishes(tmp_path: Path) -> None:
    """It is too late to stop then: the new dataset is whole, and it says so."""
    source, wrapper = write_pairs(tmp_path / "source", 4), tmp_path / "wrapper"
    lines = ['case "$*" in *" publish "*) kill -TERM 0;; esac', f'exec "{sys.executable}" "$@"']
    wrapper.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    wrapper.chmod(0o755)
    flags = ["--source", source, "--output", tmp_path / "o"]
    more = {"env": {"PYTHON": str(wrapper)}, "start_new_session": True}  # of which 0 is all
    done = run_script("run_parallel.sh", *flags, **more)
    assert done.returncode == 0 and "4 samples in 4 shards" in done.stdout, done
    assert not done.stderr and len(os.listdir(tmp_path / "o")) == 5


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    """As when memory runs out: the other ends its shards, and nothing is published."""
    source = write_pairs(tmp_path / "source", 2_000, largest=100_000)
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=100", "--num-workers=2"]
    process = start_packing(*flags)
    workers = subprocess.check_output(["pgrep", "-f", "shard-id 1 ", "-s", str(process.pid)])
    os.kill(int(workers.split()[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "worker 1 ended with exit code 137" in err, err
    assert "not packed: " in err and "All shards created" not in out
    assert not list((tmp_path / "o").glob("*.tar"))


def test_dummy_data(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "it's here"
    assert run_script("make_dummy_data.sh", "12", folder).returncode == 0
    assert sorted(os.listdir(folder)) == sorted(
        f"sample-{number}.{field}" for number in range(12) for field in ("jpg", "txt")
    )
    assert (folder / "sample-11.txt").read_text() == "This is the description for sample 11.\n"
    pictures = {Image.open(path).convert("RGB").tobytes() for path in folder.glob("*.jpg")}
    assert len(pictures) == 12
    (folder / "sample-3.jpg").write_bytes(b"mine")
    before = hashes(folder)
    done = run_script("make_dummy_data.sh", "013", folder)
    assert done.returncode == 0 and "2 files made" in done.stdout
    assert before.items() <= hashes(folder).items()
    assert run_script("make_dummy_data.sh", "--help").stdout.startswith("usage: ")
    for wrong in (["x"], ["-1"], ["1", "2", "3"]):
        assert run_script("make_dummy_data.sh", *wrong).returncode == 2
    assert run_script("make_dummy_data.sh", "1", "/proc/no").returncode == 1
