"""Ray with several nodes: all work, losing one changes nothing, none is joined by accident."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import ray
from conftest import KEYS, ROOT, hashes, run_script, without_privileges, write_pairs
from ray.cluster_utils import Cluster

import create_with_ray
from sharding import cluster as nodes
from sharding.errors import PackError
from sharding.listing import list_samples
from sharding.shards import Shard

pack_on_node = create_with_ray.pack_on_node
SHARDS = 64
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("cluster") / "source", 5_000, largest=4_000)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    """The hashes of the shards that bash packs."""
    output = source.parent / "bash"
    done = run_script(
        "run_parallel.sh", "--source", source, "--output", output, f"--num-shards={SHARDS}"
    )
    assert done.returncode == 0, done.stderr
    return hashes(output)


@pytest.fixture(scope="module")
def cluster(server: dict[str, str]) -> Iterator[Cluster]:
    """Three nodes with one CPU each, with a bucket's credentials in their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        yield from start_cluster()


def start_cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def pack(source: Path | str, output: Path | str, cluster: Cluster, *more: str) -> int:
    flags = ["--source", str(source), "--output", str(output), "--address", cluster.address]
    return create_with_ray.main([*flags, f"--num-shards={SHARDS}", *more])


def once(path: Path) -> bool:
    """Tell whether this is the first call, in any process, with this path."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def test_all_nodes_work(source, expected, cluster, tmp_path, monkeypatch, capfd) -> None:
    nodes = tmp_path / "nodes"
    nodes.mkdir()

    def noting(folder: str, shard_id: int) -> Shard:
        once(nodes / ray.get_runtime_context().get_node_id())
        deadline = time.monotonic() + 20
        while len(os.listdir(nodes)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)  # two nodes could do it all before the third has started a worker
        shipped = [path for path in sys.path if "py_modules_files" in path]
        for name in ("create_with_ray.py", "create_webdataset.py", "sharding/run.py"):
            assert any(os.path.exists(f"{path}/{name}") for path in shipped), name
        return pack_on_node(folder, shard_id)

    monkeypatch.setattr(create_with_ray, "pack_on_node", noting)
    assert pack(source, tmp_path / "o", cluster) == 0, capfd.readouterr().err
    assert hashes(tmp_path / "o") == expected
    assert len(os.listdir(nodes)) == 3
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("Shard ") for line in lines) == SHARDS


def test_a_cluster_of_another_python(source, cluster, tmp_path, monkeypatch, capfd) -> None:
    """Ray refuses it; the versions are what a user needs to know."""
    real = sys.version_info
    monkeypatch.setattr(sys, "version_info", (3, real.minor - 1, 1, *real[3:]))
    assert pack(source, tmp_path / "o", cluster) == 1
    err = capfd.readouterr().err
    assert f"Python: 3.{real.minor}.{real.micro} This process" in err, err
    assert f"Python: 3.{real.minor - 1}.1" in err and err.count("\n") == 1, err


def test_the_command_of_the_docs(source, expected, cluster, tmp_path) -> None:
    """As docs/cluster.md gives it, on this cluster."""
    steps = [step.command for step in pages.steps(pages.PAGES["cluster.md"])]
    command, again = (c for c in steps if "create_with_ray.py --address" in c)
    assert again.endswith(command)
    command = command.replace("10.99.1.1:6379", cluster.address)
    command = command.replace("/shared/raw", str(source)).replace("/shared", str(tmp_path))
    command = command.replace("--num-shards 16", f"--num-shards {SHARDS}")
    project = pages.make_project(tmp_path / "wds-example")
    printed = pages.run(command, project)
    assert "All shards created successfully with Ray." in printed, printed
    assert hashes(tmp_path / "shards") == expected


def test_hiccups_are_retried_and_nothing_else(cluster, tmp_path, monkeypatch, capfd) -> None:
    """A real EIO that is gone at the second attempt; a file that became a FIFO stays one."""
    source = write_pairs(tmp_path / "source", 128)
    listing = list_samples(source).samples
    sick, broken = (source / f"{listing[shard_id].key}.jpg" for shard_id in (3, 7))
    healthy = sick.rename(tmp_path / "healthy")
    sick.symlink_to("/proc/self/mem")  # listed as a file, but its read gives EIO

    def noting(folder: str, shard_id: int) -> Shard:
        with (tmp_path / f"tries-{shard_id}").open("a") as stream:
            stream.write("x")
        if shard_id == 7:
            broken.unlink(missing_ok=True)
            os.mkfifo(broken)
        try:
            return pack_on_node(folder, shard_id)
        except create_with_ray.Hiccup:
            os.replace(healthy, sick)
            raise

    monkeypatch.setattr(create_with_ray, "pack_on_node", noting)
    assert pack(source, tmp_path / "o", cluster) == 1
    err = capfd.readouterr().err
    assert re.search(r"Shard 7 failed: '[^']+' changed while .* \(on node [\d.]+\)", err), err
    assert "not packed: 1 shard (7);" in err
    tries = {n: (tmp_path / f"tries-{n}").read_text() for n in range(SHARDS)}
    assert {n: t for n, t in tries.items() if t != "x"} == {3: "xx"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_which_errors_are_hiccups(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Shard:
        raise OSError(number, os.strerror(number), "name")

    monkeypatch.setattr(create_with_ray, "load", fail)
    expected = PackError if number == errno.EACCES else create_with_ray.Hiccup
    with pytest.raises(expected, match=f"'name': {os.strerror(number)}.*on node"):
        create_with_ray.pack_on_node("", 0)


def test_paths_that_nodes_do_not_share(source, cluster, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(nodes, "node_problem", lambda _: "gone")
    assert pack(source, tmp_path / "o", cluster) == 1
    err = capfd.readouterr().err
    assert "must be on storage that all nodes share" in err and err.count("\n") == 1
    assert not list((tmp_path / "o").glob("*.tar"))


def test_what_a_node_cannot_do(tmp_path: Path) -> None:
    """It reads a file of the source and begins a shard, of which nothing stays."""
    source = write_pairs(tmp_path / "source", 4)
    flags = ["--source", source, "--output", tmp_path / "o", "--num-shards=2"]
    run = Path(run_script("sharding", "start", *flags).stdout.rstrip("\n"))
    code = "import sys; from sharding.cluster import node_problem; print(node_problem(sys.argv[1]))"

    def ask() -> str:
        done = subprocess.run(
            [*without_privileges(), sys.executable, "-c", code, run],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.rstrip("\n")

    assert ask() == "" and os.listdir(run) == ["plan"]
    run.chmod(0o555)
    assert str(run) in ask() and ask().endswith(": Permission denied")
    run.chmod(0o755)
    source.rename(tmp_path / "elsewhere")
    assert ask().endswith(".jpg': No such file or directory")
    run.rename(tmp_path / "away")
    assert str(run) in ask()


def test_a_function_of_the_user(source, cluster, tmp_path, capfd) -> None:
    """Its text travels; it is tried on every node, and what it prints stays in their logs."""
    file, output = tmp_path / "own.py", tmp_path / "o"
    file.write_text(
        "def change(sample):\n"
        "    print('a line')\n"
        "    return {'txt': sample['txt']} if sample['jpg'] else None\n"
    )
    spec = f"--transform={file}:change"
    assert pack(source, output, cluster, spec) == 0, capfd.readouterr().err
    told = capfd.readouterr()
    assert "a line" not in told.out and told.err.count("a line") == 1, "the preflight's"
    flags = ["--source", source, "--output", tmp_path / "p", f"--num-shards={SHARDS}", spec]
    done = run_script("run_parallel.sh", *flags)
    assert hashes(output) == hashes(tmp_path / "p"), done
    said = done.stdout.splitlines()[-1].partition("; ")[2]
    assert said == told.out.splitlines()[-1].partition("; ")[2] and "dropped by change" in said


def test_a_function_that_fails_on_the_nodes(source, cluster, tmp_path, capfd) -> None:
    """As where a package is missing there: exit 2, before any work."""
    file = tmp_path / "own.py"
    file.write_text(
        "import sys\n"
        "if 'ray' in sys.modules:\n"
        "    import not_there\n"
        "def change(sample):\n"
        "    return sample\n"
    )
    assert pack(source, tmp_path / "o", cluster, f"--transform={file}:change") == 2
    err = capfd.readouterr().err
    assert "error: --transform fails on node " in err, err
    assert f"'{file}', line 3: ModuleNotFoundError: No module named 'not_there'\n" in err
    assert err.count("\n") == 1 and not list((tmp_path / "o").glob("*.tar"))


def test_buckets(cluster, bucket, tmp_path, capfd) -> None:
    """Each node uses the credentials of its environment; none is in Ray's logs."""
    source, few = write_pairs(tmp_path / "raw", 100), "--num-shards=8"
    flags = ["--source", source, "--output", tmp_path / "o", few]
    assert run_script("run_parallel.sh", *flags).returncode == 0
    url = bucket.upload(source, "raw/")
    assert pack(url, f"{bucket.url}/a", cluster, few) == 0, capfd.readouterr().err
    assert bucket.hashes("a") == hashes(tmp_path / "o")
    logs = Path(tempfile.gettempdir(), "ray", "session_latest", "logs").resolve()
    assert list(logs.iterdir())
    for path in logs.rglob("*"):
        secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
        assert not path.is_file() or secret not in path.read_bytes(), path


def test_modules_of_a_submitted_job(source, expected, cluster, tmp_path) -> None:
    """`ray job submit` with a runtime environment of its own: ours travels beside it."""
    module = tmp_path / "theirs"
    module.mkdir()
    (module / "__init__.py").touch()
    with ray.init(cluster.address, runtime_env={"py_modules": [str(module)]}):
        theirs = ray.get_runtime_context().runtime_env["py_modules"]
        job = {"runtime_env": {"py_modules": theirs, "env_vars": {"A": "1"}}, "metadata": {}}
        flags = ["--source", source, "--output", tmp_path / "o", "--address", cluster.address]
        done = run_script(
            "create_with_ray.py",
            *flags,
            f"--num-shards={SHARDS}",
            env={"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)},
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "o") == expected


def test_a_cluster_that_the_environment_names(source, expected, cluster, tmp_path) -> None:
    flags = ["--source", source, "--output", tmp_path / "o"]
    address = {"RAY_ADDRESS": cluster.address}
    done = run_script("create_with_ray.py", *flags, env=address)
    assert done.returncode == 2 and "RAY_ADDRESS needs --num-shards" in done.stderr
    done = run_script("create_with_ray.py", *flags, f"--num-shards={SHARDS}", env=address)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "o") == expected


def test_losing_workers_and_a_node(source, expected, cluster, tmp_path, monkeypatch, capfd) -> None:
    """The last test on this cluster: it loses a node and three worker processes midway."""

    def dying(folder: str, shard_id: int) -> Shard:
        if shard_id in (5, 20, 40) and once(tmp_path / str(shard_id)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return pack_on_node(folder, shard_id)

    finished: list[str] = []
    plain_report = Shard.report

    def report(shard: Shard) -> str:
        finished.append(plain_report(shard))
        if len(finished) == 10:
            cluster.remove_node(cluster.list_all_nodes()[-1])
        return finished[-1]

    monkeypatch.setattr(create_with_ray, "pack_on_node", dying)
    monkeypatch.setattr(Shard, "report", report)
    assert pack(source, tmp_path / "o", cluster, "--num-workers=6") == 0, capfd.readouterr().err
    assert len(finished) == SHARDS and len(cluster.list_all_nodes()) == 2
    assert hashes(tmp_path / "o") == expected


def test_a_running_cluster_is_not_joined(source, expected, cluster, tmp_path) -> None:
    """`--address local` while a cluster is up, and named in the environment, starts its own."""
    command = [sys.executable, ROOT / "create_with_ray.py", "--source", source, "--output"]
    process = subprocess.Popen(
        [*map(str, command), str(tmp_path / "o"), f"--num-shards={SHARDS}", "--address=local"],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    while process.poll() is None and not process.stdout.readline().startswith("Shard"):
        pass
    own = subprocess.run(["pgrep", "-s", str(process.pid), "raylet"], capture_output=True)
    assert own.stdout, "it has a raylet of its own"
    process.communicate(timeout=60)
    assert process.returncode == 0 and hashes(tmp_path / "o") == expected
    deadline = time.monotonic() + 5  # what was just ended may still be on its way out
    while left := subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--address=auto"], "--address needs --num-shards or --samples-per-shard", 2),
        (["--address=ray://127.0.0.1:1", "--num-shards=2"], "Ray's client is not used here", 2),
        (["--address=http://127.0.0.1:1", "--num-shards=2"], "Ray's client is not used here", 2),
        (["--address=127.0.0.1:1", "--num-shards=2"], "Connection refused", 1),
        (["--address=nonsense", "--num-shards=2"], "give HOST:PORT, auto or local", 2),
    ],
)
def test_addresses(flags, message, code, tmp_path, capfd) -> None:
    source = write_pairs(tmp_path / "source", 4)
    argv = [*flags, "--source", str(source), "--output", str(tmp_path / "o")]
    assert create_with_ray.main(argv) == code
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1, err
