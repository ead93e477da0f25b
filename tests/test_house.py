"""The house: imports point down, heavy modules stay in their rooms, and scripts start at once."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script, write_pairs

SCRIPTS = ["create_webdataset", "create_with_ray", "read_webdataset"]
ROOMS = sorted(path.stem for path in (ROOT / "sharding").glob("*.py"))
HEAVY = {"PIL", "obstore", "ray", "tqdm", "webdataset"}
# Where a heavy module may be imported, and whether at the top.
ALLOWED = {
    ("bucket", "obstore", True),
    ("bucket_run", "obstore", True),
    ("claim", "obstore", True),
    ("images", "PIL", True),
    ("store", "obstore", True),
    ("objects", "obstore", True),
    ("streams", "obstore", True),
    ("pipeline", "webdataset", True),
    ("training", "webdataset", False),
    ("command", "tqdm", False),
    ("cluster", "ray", False),
    ("create_with_ray", "ray", False),
    ("read_webdataset", "webdataset", False),
}


def imports(name: str) -> set[tuple[str, bool]]:
    """Return what a module imports, and whether whoever imports it imports that, too."""
    path = ROOT / f"{name}.py" if name in SCRIPTS else ROOT / "sharding" / f"{name}.py"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "sharding":
                names = [f"sharding.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {(name, node not in later) for name in names}
    return found


def rooms_below(name: str) -> set[str]:
    """Return the modules of sharding/ that a module imports, sooner or later."""
    return {n.removeprefix("sharding.") for n, _ in imports(name) if n.startswith("sharding.")}


def test_arrows_point_down() -> None:
    """No circle, and nothing in sharding/ imports a script."""
    order: list[str] = []
    left = {name: rooms_below(name) for name in ROOMS}
    while left:
        free = sorted(name for name, below in left.items() if below <= set(order))
        assert free, f"a circle among {left}"
        order += free
        left = {name: below for name, below in left.items() if name not in order}
    for name in ROOMS:
        assert not {module for module, _ in imports(name)} & set(SCRIPTS), name
    assert rooms_below("archive") == set(), "archive knows tar alone"
    assert "argparse" not in {
        m for n in ROOMS for m, _ in imports(n) if n not in ("command", "__main__")
    }
    assert not {"run", "plan", "files"} & rooms_below("training"), "training knows no packing"


@pytest.mark.parametrize("name", [*SCRIPTS, *ROOMS])
def test_heavy_modules_stay_in_their_rooms(name: str) -> None:
    for module, at_the_top in imports(name):
        top = module.partition(".")[0]
        if top in HEAVY:
            assert {(name, top, True), (name, top, at_the_top)} & ALLOWED, (name, module)


@pytest.mark.parametrize("name", [*SCRIPTS, *ROOMS])
def test_the_name_of_a_program_is_passed(name: str) -> None:
    """Not written into sys.argv, which belongs to the process: others read it."""
    path = ROOT / f"{name}.py" if name in SCRIPTS else ROOT / "sharding" / f"{name}.py"
    assert "sys.argv[0]" not in path.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_to_import_a_script_changes_nothing(name: str, tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "before = [signal.getsignal(n) for n in (2, 13, 15)]\n"
        f"import {name}\n"
        "assert [signal.getsignal(n) for n in (2, 13, 15)] == before\n"
        f"assert not {HEAVY | {'numpy', 'torch'}} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("name", [*(f"{name}.py" for name in SCRIPTS), "sharding"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--nonsense", 2)])
def test_without_any_package(name: str, flag: str, code: int, tmp_path: Path) -> None:
    """Help, and a complaint, need the standard library alone, and so hardly any time."""
    command = [sys.executable, "-S", "-E", str(ROOT / name), flag]
    began = time.process_time(), os.times().children_user + os.times().children_system
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert os.times().children_user + os.times().children_system - began[1] < 0.5


@pytest.mark.parametrize("name", ["create_with_ray", "read_webdataset"])
def test_a_missing_package_says_how_to_install(name: str, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").touch()
    command = [sys.executable, "-S", "-E", str(ROOT / f"{name}.py")]
    more = ["--path", str(tmp_path)] if name == "read_webdataset" else []
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install -r requirements.txt" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script", ["create_webdataset.py", "run_parallel.sh", "create_with_ray.py"]
)
def test_packing_needs_the_standard_library_alone(script: str, tmp_path: Path) -> None:
    """With stand-ins that end whoever imports them, a Ray worker included."""
    for name in ("numpy", "torch", "webdataset", "PIL", "obstore"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    source, last = write_pairs(tmp_path / "source", 4), ["--num-shards=1"]
    if script == "create_webdataset.py":
        last = ["--shard-id=0", "--total-shards=1"]
    flags = ["--source", source, "--output", tmp_path / "o", *last]
    done = run_script(script, *flags, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
