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
WINGS = ("bucket", "folder", "tars")
ROOMS = sorted(
    ".".join(path.relative_to(ROOT / "sharding").with_suffix("").parts)
    for path in (ROOT / "sharding").rglob("*.py")
    if path.name != "__init__.py"
)
HEAVY = {"PIL", "braceexpand", "obstore", "ray", "tqdm", "webdataset"}
# Where a heavy module may be imported, and whether at the top. obstore: anywhere in its wing.
ALLOWED = {
    ("images", "PIL", True),
    ("epochs", "webdataset", True),
    ("pipeline", "webdataset", True),
    ("training", "webdataset", False),
    ("transform", "webdataset", False),
    ("command", "tqdm", False),
    ("stages", "tqdm", False),
    ("urls", "braceexpand", False),
    ("cluster", "ray", False),
    ("create_with_ray", "ray", False),
    ("read_webdataset", "webdataset", False),
}


def file_of(name: str) -> Path:
    """Return the file of a script or a room."""
    folder = ROOT if name in SCRIPTS else ROOT / "sharding"
    return folder / f"{name.replace('.', '/')}.py"


def imports(name: str) -> set[tuple[str, bool]]:
    """Return all that a module imports, and whether at its top; for type checking counts, too."""
    tree = ast.parse(file_of(name).read_text())
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
            if node.module in ("sharding", *(f"sharding.{wing}" for wing in WINGS)):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {(name, node not in later) for name in names}
    return found


def rooms_below(name: str) -> set[str]:
    """Return the rooms that a room imports, but for the wings among which `places` chooses."""
    found = {(n.removeprefix("sharding."), top) for n, top in imports(name) if n != "sharding"}
    rooms = {(room, top) for room, top in found if room in ROOMS}
    return {room for room, top in rooms if top or name != "places"}


def all_below(name: str) -> set[str]:
    """Return the rooms that a room imports, sooner or later."""
    found: set[str] = set()
    left = [name]
    while left:
        new = rooms_below(left.pop()) - found
        found |= new
        left += new
    return found


def wing(name: str) -> str:
    return name.partition(".")[0] if name.startswith(WINGS) else ""


def test_arrows_point_down() -> None:
    """No circle, and nothing in sharding/ imports a script."""
    for name in ROOMS:
        assert name not in all_below(name), f"a circle through {name}"
        assert not {module for module, _ in imports(name)} & set(SCRIPTS), name
    assert all_below("archive") == set(), "archive knows tar alone"
    assert "argparse" not in {
        m for n in ROOMS for m, _ in imports(n) if n not in ("command", "__main__")
    }


def test_wings_know_nothing_of_each_other() -> None:
    """And nobody else looks into one; who needs what is there asks `places`."""
    for name in [*SCRIPTS, *ROOMS]:
        seen = {room for room, _ in imports(name)}
        inside = {wing(room.removeprefix("sharding.")) for room in seen} - {""}
        assert inside <= {wing(name)} or name == "places", name
        if "obstore" in {room.partition(".")[0] for room in seen}:
            assert wing(name) == "bucket", name


def test_training_knows_no_packing() -> None:
    packing = {"pack", "run", "listing", "command"}
    assert not packing & all_below("training"), all_below("training")


@pytest.mark.parametrize("name", [*SCRIPTS, *ROOMS])
def test_heavy_modules_stay_in_their_rooms(name: str) -> None:
    for module, at_the_top in imports(name):
        top = module.partition(".")[0]
        if top in HEAVY and wing(name) != "bucket":
            assert {(name, top, True), (name, top, at_the_top)} & ALLOWED, (name, module)


@pytest.mark.parametrize("name", [*SCRIPTS, *ROOMS])
def test_the_name_of_a_program_is_passed(name: str) -> None:
    """Not written into sys.argv, which belongs to the process: others read it."""
    assert "sys.argv[0]" not in file_of(name).read_text()


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
