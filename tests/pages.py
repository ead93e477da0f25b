"""Run what the README and the pages in docs/ show: each command and each program, in order.

A page is run in a copy of the project of its own. What it pastes below a command must be what the
command prints, apart from times and the order of lines. A last line "..." stands for any others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT, touch
from PIL import Image

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SCRIPTS = ["create_webdataset.py", "run_parallel.sh", "create_with_ray.py", "read_webdataset.py"]
REQUIREMENTS = ["requirements.txt", "requirements-dev.txt"]
# What is not run, and why not.
LEFT_OUT = {
    r"git clone ": "the project is here",
    r"export AWS_": "the tests have keys of their own",
    r"(aws|gcloud) ": "a program that is not the project's",
    r"export RAY_AUTH_MODE=token && ": "starts a cluster on several machines",
    r"ray start ": "starts a cluster on several machines",
    r".*python create_with_ray.py --address ": "test_cluster.py runs it",
}
# What needs torch is run by `make interop`.
NEEDS_TORCH = re.compile("torch|accelerate|examples/train|WebLoader")
OF_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}  # of the one that runs the tests
SBATCH = """#!/bin/sh
# Stands for a scheduler, which copies what it is given and runs it elsewhere.
for word; do
  case $word in
    --array=*) last=${word##*-} ;;
    --*) ;;
    *) command=$word ;;
  esac
done
copy=$(mktemp) && echo "$command" >"$copy" && cd / || exit
for SLURM_ARRAY_TASK_ID in $(seq 0 "${last:-0}"); do
  export SLURM_ARRAY_TASK_ID
  sh "$copy" || exit
done
rm "$copy"
"""


class Step(NamedTuple):
    """A command of a page, or a program, and what the page says that it prints."""

    command: str
    pasted: str | None = None
    is_python: bool = False

    def needs_torch(self) -> bool:
        """Tell whether the development environment is not enough."""
        return bool(NEEDS_TORCH.search(self.command))


def steps(page: Path) -> list[Step]:
    """Return what a page runs, in order."""
    found = []
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append(Step(block, is_python=True))
        elif language == "bash":
            lines = block.replace("\\\n", " ").splitlines()
            found += [Step(line) for line in lines]
        else:
            assert language == "console", language
            _, *commands = re.split(r"^\w*\$ ", block, flags=re.MULTILINE)
            for command in commands:
                line, _, pasted = command.partition("\n")
                found.append(Step(line, pasted))
    return found


def is_left_out(step: Step) -> bool:
    """Tell whether a step is one of those that are not run."""
    return any(re.match(pattern, step.command) for pattern in LEFT_OUT)


def make_project(folder: Path) -> Path:
    """Copy the project, as a clone is, with a .venv that leads to this interpreter."""
    for name in ("source_data", "webdataset_output", ".venv/bin", "bin"):
        (folder / name).mkdir(parents=True)
    for name in (
        *SCRIPTS,
        "make_dummy_data.sh",
        "Makefile",
        "requirements.txt",
        "requirements-dev.txt",
    ):
        shutil.copy(ROOT / name, folder / name)
    for name in ("sharding", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    interpreter = folder / ".venv" / "bin" / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv" / "bin" / "activate").write_text(f"PATH={interpreter.parent}:$PATH\n")
    (folder / ".venv" / "ready").touch()
    (folder / "bin" / "sbatch").write_text(SBATCH)
    for path in (interpreter, folder / "bin" / "sbatch"):
        path.chmod(0o755)
    return folder


def run(command: str, project: Path) -> str:
    """Run a command line in the project, and return what it prints."""
    bins = [project / ".venv" / "bin", project / "bin", Path(sys.executable).parent]
    path = ":".join(map(str, (*bins, os.environ["PATH"])))
    ours = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
    environment = {**ours, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(project)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return f"{done.stdout.rstrip()}\nexit code {done.returncode}\n".lstrip("\n")


def plain(text: str, project: Path) -> list[str]:
    """Return the lines of an output, without what differs from run to run."""
    text = text.replace(str(project), "/home/you/wds-example")
    text = re.sub(r"(Image size: 64x64,) \d+ bytes", r"\1 N bytes", text)
    text = re.sub(r"[\d,]+ bytes down", "N bytes down", text)
    return re.sub(r"in [\d.]+ s\b", "in N s", text).splitlines()


def check_paste(printed: str, step: Step, project: Path) -> None:
    """Compare what a command printed with what the page says; workers print in any order."""
    *lines, code = plain(printed, project)
    *pasted, last = plain(step.pasted or "", project)
    fails = re.search(r": error: |\d faults?$", step.pasted or "", re.MULTILINE)
    assert (code == "exit code 0") == (fails is None), (step.command, printed)
    if last == "...":
        assert Counter(pasted) <= Counter(lines), (step.command, printed)
    else:
        assert Counter([*pasted, last]) == Counter(lines), (step.command, printed)


def run_page(
    page: Path, project: Path, replacements: dict[str, str] | None = None, torch: bool = False
) -> int:
    """Run a page; return how many steps were run.

    Args:
        replacements: of texts on the page, such as the name of a bucket.
        torch: run what needs it, too.
    """
    number, variables = 0, ""
    for step in steps(page):
        if is_left_out(step) or (step.needs_torch() and not torch):
            continue
        number += 1
        command, pasted = step.command, step.pasted or ""
        for old, new in (replacements or {}).items():
            command, pasted = command.replace(old, new), pasted.replace(old, new)
        if step.is_python:
            (project / "page.py").write_text(command, encoding="utf-8")
            command = "python page.py"
        elif assigned := re.match(r"(\w+)=\$\(", command):  # the commands that follow use it
            command += f' && printf %s "${assigned[1]}" >variable'
        printed = run(variables + command, project)
        if not step.is_python and assigned:
            variables = f"{assigned[1]}=$(cat variable)\n"
        if step.pasted:
            check_paste(printed, Step(command, pasted), project)
        else:
            assert printed.endswith("exit code 0\n"), (step.command, printed)
    return number


def make_layouts(project: Path) -> None:
    """Make the folders that the pages speak of, beside the ten pairs in source_data."""
    assert run("./make_dummy_data.sh && ./run_parallel.sh", project).endswith("code 0\n")
    source = project / "source_data"
    pairs = [(path, path.with_suffix(".txt")) for path in sorted(source.glob("*.jpg"))]
    for folder in ("images", "captions", "photos", "pets/cats", "pets/dogs"):
        (project / folder).mkdir(parents=True)
    for picture, text in pairs:
        shutil.copy(picture, project / "images")
        shutil.copy(picture, project / "photos")
        if picture.stem != "sample-9":
            shutil.copy(text, project / "captions")
    for number, (picture, _) in enumerate(pairs[:4]):
        kind, name = divmod(number, 2)
        shutil.copy(picture, project / "pets" / ("cats", "dogs")[kind] / f"{name + 1}.jpg")
    lines = [{"file_name": picture.name, "text": text.read_text()} for picture, text in pairs]
    (project / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, column, values in (
        ("captions", "caption", [f'"one, {picture.stem}"' for picture, _ in pairs]),
        ("labels", "label", range(10)),
    ):
        lines = [
            f"{picture.name},{value}" for (picture, _), value in zip(pairs, values, strict=True)
        ]
        table = "\r\n".join([f"file,{column}", *lines])
        (project / f"{name}.csv").write_text(table, encoding="utf-8-sig")
    for number, pair in enumerate(pairs[:4]):
        for path in pair:
            (project / "new_data").mkdir(exist_ok=True)
            shutil.copy(path, project / "new_data" / f"new-{number}{path.suffix}")
    depth = project / "depth"
    depth.mkdir()
    shutil.copy(pairs[0][0], depth / "0.jpg")
    Image.new("I;16", (64, 64), 40_000).save(depth / "0.depth.png")
    Image.new("P", (64, 64), 3).save(depth / "0.mask.png")
    shutil.copytree(source, project / "broken_source")
    touch(project / "broken_source", "sample-3.jpg")
    for command in (
        "./run_parallel.sh --source broken_source --output broken",
        "cp -r webdataset_output cut && truncate -s 5000 cut/shard-000003.tar",
        "./run_parallel.sh --source depth --output depth-shards --fields jpg,depth.png,mask.png"
        " --num-shards 1",
        "./run_parallel.sh --source pets --output pet-shards --fields jpg --num-shards 2",
    ):
        assert run(command, project).endswith("code 0\n"), command
