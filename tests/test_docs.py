"""README and docs/: what they show runs, links lead somewhere, and no flag is missing."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Bucket, run_script
from pages import LEFT_OUT, PAGES, SCRIPTS, make_layouts, make_project, run, run_page, steps

README = PAGES["README.md"].read_text(encoding="utf-8")
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
LINKING = [*PAGES.values(), ROOT / "benchmarks" / "README.md", ROOT / "tests/interop/README.md"]


def test_lengths() -> None:
    """The README is read in six minutes, a page in four."""
    assert len(README.split()) <= 1_600
    for name, text in TEXTS.items():
        assert name == "README.md" or len(text.split()) <= 1_200, name


def test_files() -> None:
    """The README says what each script is, and each file of the packages what it is."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        assert re.search(rf"^{path.name} ", README, re.MULTILINE), path
    for path in [*ROOT.glob("sharding/**/*.py"), *ROOT.glob("examples/*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_each_page_is_linked_and_begins_with_a_command() -> None:
    for name, text in TEXTS.items():
        if name != "README.md":
            assert f"](docs/{name})" in README, name
            assert re.match(r"# .*\n\n```(bash|console)\n", text), name


@pytest.mark.parametrize("script", [*SCRIPTS, "sharding", "examples/link_pairs.py"])
def test_every_flag_is_there(script: str) -> None:
    flags = re.findall(r"--[a-z-]+", run_script(script, "--help").stdout)
    assert flags
    for flag in flags:
        assert flag == "--help" or any(flag in text for text in TEXTS.values()), flag


def test_what_is_left_out_is_there() -> None:
    """Else the list of what is not run grows stale, and hides more than it should."""
    commands = [step.command for page in PAGES.values() for step in steps(page)]
    for pattern in LEFT_OUT:
        assert any(re.match(pattern, command) for command in commands), pattern


def test_make(tmp_path: Path) -> None:
    """Its help fits a screen; whoever starts the tests learns how long they take."""
    project = make_project(tmp_path / "wds-example")
    lines = run("make help", project).splitlines()
    assert "demo" in lines[1] and len(lines) <= 24 and max(map(len, lines)) <= 80, lines
    said, *commands = run("make -n test", project).splitlines()[-3:]
    assert "minutes" in said and " -m pytest" in commands[0], (said, commands)


def test_readme(tmp_path: Path) -> None:
    """From an empty clone on, with data of one's own."""
    project = make_project(tmp_path / "wds-example")
    run("./make_dummy_data.sh 10 my_data", project)
    assert run_page(PAGES["README.md"], project) == 8


def test_programs_compile() -> None:
    """Those that need torch are run by `make interop`."""
    programs = [step.command for page in PAGES.values() for step in steps(page) if step.is_python]
    assert len(programs) >= 7
    for program in programs:
        compile(program, "page.py", "exec")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the folders of the pages, to be put where it was made."""
    project = make_project(tmp_path_factory.mktemp("pages") / "wds-example")
    make_layouts(project)
    return project.rename(project.with_name("clean"))


@pytest.mark.parametrize("page", ["packing.md", "repacking.md", "transform.md", "checking.md"])
def test_page(page: str, laid_out: Path) -> None:
    project = laid_out.with_name("wds-example")  # the records name its path
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(laid_out, project, symlinks=True)
    assert run_page(PAGES[page], project)


def test_buckets(tmp_path: Path, bucket: Bucket) -> None:
    project = make_project(tmp_path / "wds-example")
    run("./make_dummy_data.sh", project)
    bucket.upload(project / "source_data", "raw/")
    urls = dict.fromkeys(("s3://photos", "gs://photos"), bucket.url)
    assert run_page(PAGES["buckets.md"], project, urls) == 5


def test_cluster(tmp_path: Path) -> None:
    """The array job and the batch job, with a loop as the scheduler."""
    project = make_project(tmp_path / "wds-example")
    run(f"./make_dummy_data.sh 10 {tmp_path}/raw", project)
    fewer = {"-shards 1000": "-shards 4", "0-999": "0-3", "-workers 16": "-workers 4"}
    fewer["/shared/"] = f"{tmp_path}/"
    assert run_page(PAGES["cluster.md"], project, fewer) == 4
    for output in ("shards", "one-node"):
        assert len(list((tmp_path / output).glob("shard-*.tar"))) >= 4, output


def test_the_short_loop_is_the_example() -> None:
    (loop,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    example = (ROOT / "examples" / "train_short.py").read_text(encoding="utf-8")
    assert example.endswith(f'"""\n\n{loop}')


def test_worked_example(tmp_path: Path) -> None:
    """Ten samples in four shards, as the README draws them."""
    drawn = re.findall(r"\b([0-3]): samples ([\d, ]*\d)", README)
    assert len(drawn) == 4
    run_script("make_dummy_data.sh", "10", tmp_path / "s")
    run_script("run_parallel.sh", "--source", tmp_path / "s", "--output", tmp_path / "o")
    for shard, samples in drawn:
        path = tmp_path / "o" / f"shard-00000{shard}.tar"
        names = subprocess.check_output(["tar", "tf", path], text=True).split()
        assert [name[7:-4] for name in names[::2]] == samples.split(", ")


def test_a_shard_is_what_webdataset_writes(tmp_path: Path) -> None:
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
    project = make_project(tmp_path / "wds-example")
    run("./make_dummy_data.sh && ./run_parallel.sh", project)
    done = subprocess.run([sys.executable, "-c", loop], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = project / "webdataset_output" / "shard-000000.tar"
    assert (project / "shard-000000.tar").read_bytes() == ours.read_bytes()


def test_speeds() -> None:
    """Every figure of the README is one that the benchmark wrote down."""
    summary = (ROOT / "benchmarks" / "results" / "summary.md").read_text()
    section = README.split("## How fast")[1].split("\n## ")[0]
    figures = re.findall(r"\| (\d+\.\d+) \|$", section, re.MULTILINE)
    assert len(figures) >= 10
    for figure in figures:
        assert f"| {figure} (" in summary, figure
