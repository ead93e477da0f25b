"""How the scripts are started: by any Python, from any place, by a program."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SOAK, run_script, write_pairs

SCRIPTS = ["create_webdataset.py", "create_with_ray.py", "read_webdataset.py", "sharding"]
LIAR = """#!/bin/sh
[ "$1" = -S ] && shift
exec "%s" -c '
import sys, runpy
sys.version_info = (3, 9, 18)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
"""


def real_interpreters(*versions: str) -> list[str]:
    """Return one of each of these versions, of those that are installed, by pyenv for one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = {}
    for version in versions:
        for path in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")):
            if path and not subprocess.run([path, "-V"], capture_output=True).returncode:
                found[version] = str(path)
    return list(found.values())


OLD, ANCIENT = real_interpreters("3.8", "3.9"), real_interpreters("2.7", "3.6", "3.7")


@pytest.fixture
def liar(tmp_path: Path) -> str:
    """This Python, saying that it is 3.9: it refuses what 3.9 refuses, where none is installed."""
    path = tmp_path / "liar"
    path.write_text(LIAR % sys.executable)
    path.chmod(0o755)
    return str(path)


def copy_project(folder: Path) -> Path:
    """Copy what a user runs."""
    folder.mkdir()
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("*.sh"),
        ROOT / "Makefile",
        ROOT / ".gitattributes",
    ]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "sharding", folder / "sharding")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("python", ["a liar", *OLD])
def test_an_old_python(python: str, script: str, liar: str) -> None:
    command = [liar if python == "a liar" else python, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    path = sys.executable if python == "a liar" else python
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: Python 3.10 or newer is needed; this is 3."), done.stderr
    assert done.stderr.endswith(f" ({path})\n") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("python", ["a liar", *OLD, *ANCIENT])
def test_an_old_python_behind_bash_and_make(python: str, liar: str, tmp_path: Path) -> None:
    """Any that there ever was, and before anything starts."""
    project = copy_project(tmp_path / "project")
    (project / "requirements.txt").touch()
    python = liar if python == "a liar" else python
    for command in ("run_parallel.sh", "make_dummy_data.sh"):
        done = run_script(project / command, env={"PYTHON": python})
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("error: Python 3.10 or newer is needed; this is "), done
        assert done.stderr.count("\n") == 1, done
    for target in (".venv/ready", ".venv-interop/ready"):
        path = "tests/interop/requirements.txt"
        command = ["make", "-C", str(project), target, f"PYTHON={python}", "-o", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode and "error: Python 3.10 or newer is needed" in done.stderr, done
        assert not (project / target).parent.exists()
    assert not (project / "source_data").exists() and not (project / "webdataset_output").exists()


def test_old_pythons_can_read_what_refuses_them() -> None:
    """3.8 reads each script until it imports sharding; all read the room that checks."""
    for name in (*SCRIPTS[:3], "sharding/__main__.py"):
        text = (ROOT / name).read_text()
        ast.parse(text, name, feature_version=(3, 8))
        assert "import sharding" in text or "from sharding" in text
    first = ast.parse((ROOT / "sharding" / "__init__.py").read_text())
    for node in ast.walk(first):
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.ImportFrom)
        assert getattr(node, "annotation", None) is getattr(node, "returns", None) is None
    assert (ROOT / "sharding" / "__init__.py").read_bytes().isascii()


def test_a_program_of_an_old_python() -> None:
    """It imports the scripts as modules, and catches what an import raises."""
    code = "import sys; sys.version_info = (3, 9, 18)\nimport read_webdataset"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: Python 3.10 or newer is needed; this is 3.9" in done.stderr


def test_a_program_beside_the_scripts_keeps_its_ctrl_c(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    (project / "train.py").write_text(
        "import signal\nimport read_webdataset\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, project / "train.py"], check=True)


def test_a_link_to_a_script(tmp_path: Path) -> None:
    """As in ~/bin: it runs in its project, whatever the links are relative to."""
    project = copy_project(tmp_path / "the project")
    (tmp_path / "bin").mkdir()
    for name in ("make_dummy_data.sh", "run_parallel.sh"):
        (tmp_path / name).symlink_to(f"the project/{name}")
        (tmp_path / "bin" / name).symlink_to(f"../{name}")
        done = run_script(tmp_path / "bin" / name, cwd="/")
        assert done.returncode == 0, done.stderr
    assert len(list((project / "webdataset_output").iterdir())) == 5


def test_a_copy_of_run_parallel(tmp_path: Path) -> None:
    """As a batch system makes one."""
    copy = shutil.copy(ROOT / "run_parallel.sh", tmp_path / "slurm_script.sh")
    done = run_script(copy, "--num-workers=2")
    assert done.returncode == 2 and f"{tmp_path} has no folder 'sharding'" in done.stderr, done
    assert 'sbatch --wrap "/path/run_parallel.sh' in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_clone_where_git_changes_line_ends(tmp_path: Path) -> None:
    project, clone = copy_project(tmp_path / "project"), tmp_path / "clone"
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-c", "core.autocrlf=true"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=project, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", str(project), str(clone)], check=True)
    assert b"\r" not in (clone / "make_dummy_data.sh").read_bytes()
    done = run_script(clone / "run_parallel.sh", "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not SOAK, reason="makes a .venv with pip: `make soak`")
def test_a_venv_without_pip(tmp_path: Path) -> None:
    """As Debian makes one where python3-venv is missing; a second `make` used to stop there."""
    project = copy_project(tmp_path / "project")
    (project / "requirements.txt").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    command = ["make", "-C", str(project), ".venv/ready", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done
    python = project / ".venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True)


CALLER = """
import os, sys, threading
sys.path.insert(0, {root!r})
import create_with_ray

flags = ["--source", {source!r}, "--output", "o", "--num-workers=1"]
codes = []
home = os.environ["HOME"]
os.environ["HOME"] = "/proc/none"
codes.append(create_with_ray.main(flags))
os.environ["HOME"] = home
thread = threading.Thread(target=lambda: codes.append(create_with_ray.main(flags)))
thread.start()
thread.join()
import ray
ray.init(num_cpus=1, include_dashboard=False, logging_level=40)
codes.append(create_with_ray.main(flags))
print(codes, ray.is_initialized(), "PYTHONPATH" in os.environ)
"""


def test_a_program_that_calls_the_ray_driver(tmp_path: Path) -> None:
    """In any folder and thread, again after a failure, and without an end to its own tasks."""
    source = write_pairs(tmp_path / "source", 4)
    (tmp_path / "caller.py").write_text(CALLER.format(root=str(ROOT), source=str(source)))
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "caller.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("[1, 0, 2] True False\n"), done
    assert "set HOME to a folder that may be written (now '/proc/none')" in done.stderr
    assert "Ray is in use in this process already" in done.stderr
    assert "Shard 0 created with 4 samples." in done.stdout and "Traceback" not in done.stderr
