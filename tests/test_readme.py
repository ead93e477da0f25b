"""The README: its commands run, what it pastes is what they print, and no flag is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Bucket, hashes, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["create_webdataset.py", "run_parallel.sh", "create_with_ray.py", "read_webdataset.py"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, as a clone is, with `python` leading to this interpreter."""
    folder = tmp_path_factory.mktemp("readme") / "wds-example"
    names = [*SCRIPTS, "make_dummy_data.sh"]
    for name in ("source_data", "webdataset_output", "bin"):
        (folder / name).mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "sharding", folder / "sharding")
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def run(command: str, project: Path) -> str:
    """Run a line of the README in the project, and return what it prints on stdout."""
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable}
    done = subprocess.run(
        command,
        shell=True,
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def plain(text: str, project: Path) -> list[str]:
    """Return the lines of an output, without what differs from run to run."""
    text = text.replace(str(project), "/home/you/wds-example")
    text = re.sub(r"(Image size: 64x64,) \d+ bytes", r"\1 N bytes", text)
    return re.sub(r"in [\d.]+ s$", "in N s", text, flags=re.M).splitlines()


def test_length_and_files() -> None:
    """Readable in one sitting, and each file of the project has its line."""
    assert len(README.splitlines()) <= 300
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("sharding/*.py")]:
        assert path.name == "__init__.py" or re.search(
            rf"^ .*{path.name},? |^{path.name} ", README, re.M
        ), path


def test_quick_start(project: Path) -> None:
    """`make demo`, line by line, and then each command of the sections that follow."""
    block = README.split("$ make demo\n")[1].split("```")[0]
    *pasted, dots = block.splitlines()
    assert dots == "..."
    commands = [n for n, line in enumerate(pasted) if line.startswith(("./", ".venv/"))]
    for begin, end in zip(commands, [*commands[1:], len(pasted)], strict=True):
        printed = plain(run(pasted[begin].replace(".venv/bin/", ""), project), project)
        expected = plain("\n".join(pasted[begin + 1 : end]), project)
        assert sorted(printed[: len(expected)]) == sorted(expected)


def test_commands(project: Path) -> None:
    run("./make_dummy_data.sh && ./run_parallel.sh", project)
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    commands = [
        line
        for block in blocks
        for line in block.splitlines()
        if line.startswith(("python ", "./", "(cd "))
    ]
    assert len(commands) == 7
    for command in commands:
        run(command, project)
    proofs = re.findall(r"^\$ (python read.* --source [^:\n]*)\n(.*)$", README, re.M)
    assert proofs
    for command, pasted in proofs:
        assert run(command, project).splitlines()[-1] == pasted
    (preview,) = re.findall(
        r"^`(python read_webdataset.py .*--preview preview.png)` draws", README, re.M
    )
    run(preview, project)
    assert (project / "preview.png").stat().st_size > 1_000


def test_broken_pictures_go(project: Path) -> None:
    """The two lines that delete what cannot be decoded, and nothing else."""
    run("./make_dummy_data.sh", project)
    (project / "source_data" / "sample-3.jpg").write_bytes(b"broken")
    run("./run_parallel.sh", project)
    find, delete = re.findall(r"^python .*faults\.jsonl.*", README, re.MULTILINE)
    run(f"! {find}", project)
    run(delete, project)
    assert "9 samples in 4 shards" in run("./run_parallel.sh --skip-bad", project)
    assert run("ls source_data/*.jpg", project).count("\n") == 9


def test_worked_example(tmp_path: Path) -> None:
    """Ten samples in four shards, as the README draws them."""
    drawn = re.findall(r" ([0-3]): samples ([\d, ]*\d)", README)
    assert len(drawn) == 4
    run_script("make_dummy_data.sh", "10", tmp_path / "s")
    run_script("run_parallel.sh", "--source", tmp_path / "s", "--output", tmp_path / "o")
    for shard, samples in drawn:
        path = tmp_path / "o" / f"shard-00000{shard}.tar"
        names = subprocess.check_output(["tar", "tf", path], text=True).split()
        assert [name[7:-4] for name in names[::2]] == samples.split(", ")


def test_buckets(project: Path, bucket: Bucket) -> None:
    """The session, but for its keys, with another bucket."""
    (block,) = re.findall(r"^```console\n(\$ export AWS_ACCESS.*?)^```", README, re.DOTALL | re.M)
    run("./make_dummy_data.sh 10 ten", project)
    bucket.upload(project / "ten", "raw/")
    _, *steps = re.split(r"^\$ ", block, flags=re.M)
    assert len(steps) == 3
    for step in steps[1:]:
        command, _, expected = step.replace("s3://photos", bucket.url).partition("\n")
        printed = [plain(text, project) for text in (run(command, project), expected)]
        printed = [[re.sub(r"in N s.*|in [\d.]+ s.*", "in N s", x) for x in t] for t in printed]
        assert sorted(printed[0]) == sorted(printed[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_there(script: str) -> None:
    flags = re.findall(r"--[a-z-]+", run_script(script, "--help").stdout)
    assert flags
    for flag in flags:
        assert flag == "--help" or flag in README, f"{script} {flag}"


def test_speeds() -> None:
    """Every figure of the README is one that the benchmark wrote down."""
    summary = (ROOT / "benchmarks" / "results" / "summary.md").read_text()
    (table,) = re.findall(r"\| Packs the same files \|.*?\n\n", README, re.DOTALL)
    figures = re.findall(r"\d+\.\d+", table)
    assert len(figures) >= 10
    for figure in figures:
        assert f"| {figure} (" in summary, figure


def test_training_loop_is_python() -> None:
    (loop,) = re.findall(r"```python\n(import os\nimport torch .*?)```", README, re.DOTALL)
    compile(loop, "train.py", "exec")


def test_a_folder_of_links(project: Path) -> None:
    """The recipe for folders that no flag fits: it packs, and JSON lines are read the same way."""
    (loop,) = re.findall(r"```python\n(import csv.*?)```", README, re.DOTALL)
    (project / "pictures" / "x").mkdir(parents=True)
    for name in ("x/a.jpg", "b.jpg"):
        (project / "pictures" / name).write_bytes(name.encode())
    (project / "captions.csv").write_text(
        'file,caption\nx/a.jpg,"one, é"\nb.jpg,two\n', "utf-8-sig"
    )
    subprocess.run([sys.executable, "-c", loop], cwd=project, check=True)
    said = run("./run_parallel.sh --source links --output linked --num-shards 1", project)
    assert "2 samples in 1 shard," in said
    lines = [{"file": "x/a.jpg", "caption": "one, é"}, {"file": "b.jpg", "caption": "two"}]
    (project / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (rows,) = re.findall(r"loop over `(map\(json.*?)`", README)
    csv_rows = re.search(r"csv.DictReader\(.*?\)\)", loop)[0]  # type: ignore[index]
    loop = "import json\n" + loop.replace(csv_rows, rows).replace('"links"', '"links2"')
    subprocess.run([sys.executable, "-c", loop], cwd=project, check=True)
    assert hashes(project / "links2") == hashes(project / "links")


def test_a_shard_is_what_webdataset_writes(project: Path) -> None:
    """The README names the writer, the choice of keys and the sample: a loop of these packs."""
    (writer,) = re.findall(r"`(wds\.TarWriter\(.*?\))`", README, re.DOTALL)
    (chosen,) = re.findall(r"`(keys\[.*?\])`", README)
    (sample,) = re.findall(r"`(\{\"__key__\".*?\})`", README)
    loop = f"""
import os
import webdataset as wds
keys = sorted(name[:-4] for name in os.listdir("source_data") if name.endswith(".jpg"))
with {writer} as sink:
    for key in {chosen}:
        image, text = (open(f"source_data/{{key}}.{{f}}", "rb").read() for f in ("jpg", "txt"))
        sink.write({sample})
"""
    run("./make_dummy_data.sh && ./run_parallel.sh", project)
    done = subprocess.run([sys.executable, "-c", loop], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = project / "webdataset_output" / "shard-000000.tar"
    assert (project / "shard-000000.tar").read_bytes() == ours.read_bytes()
