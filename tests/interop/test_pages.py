"""README and docs/training.md with torch: each loop and command, as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES, make_layouts, make_project, run, run_page

pytest.importorskip("accelerate", reason="see `make interop`")


@pytest.mark.parametrize(("page", "steps"), [("README.md", 9), ("training.md", 7)])
def test_page(page: str, steps: int, tmp_path: Path) -> None:
    project = make_project(tmp_path / "wds-example")
    run("./make_dummy_data.sh 10 my_data", project)
    if page != "README.md":
        make_layouts(project)
    assert run_page(PAGES[page], project, torch=True) == steps
