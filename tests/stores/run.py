"""Run the tests of buckets against every store that can be had here, and print what holds on which.

Usage: python tests/stores/run.py [STORE ...]; `make stores` runs it in an environment of its own.
SOAK=1 adds the tests with Ray, those of stores that lie, and more kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from stores.servers import SERVERS, missing, title  # noqa: E402

READ, OUTPUT, KILLED, MEMORY = "read", "output", "killed, resumed", "memory < 200 MB"
OF_ONE = ("test_azure", "test_google")
# What the columns of the table stand for: which tests.
COLUMNS = {
    READ: ("test_bucket", "test_braces"),
    "source": ("test_objects", "test_bucket_listing", "test_tars"),
    OUTPUT: ("test_bucket_run", "test_stores", "test_transform", "test_record", *OF_ONE),
    KILLED: (),  # by the name of the test
    MEMORY: (),
}
READING = ["test_bucket.py", "test_bucket_listing.py", "test_objects.py"]
READING += ["test_braces.py::test_in_a_bucket"]
WRITING = ["test_bucket_run.py", "test_transform.py::test_a_bucket_at_either_end"]
WRITING += [
    f"test_tars.py::test_{name}" for name in ("bucket_to_bucket", "a_changed_archive_in_a_bucket")
]
WRITING += [
    f"test_record.py::test_{name}_in_a_bucket"
    for name in ("kills", "a_single_shard", "checksums", "already_complete")
]
READ_ALONE = {"fake-gcs-server"}
SOAK = bool(os.environ.get("SOAK"))


def column(case: xml.Element) -> str:
    """Return the column that a test belongs to."""
    name = case.get("name", "")
    if "memory" in name or "few_parts" in name:
        return MEMORY
    if "killed_runs" in name or "kills" in name or "cut_while" in name or "resume_keeps" in name:
        return KILLED
    module = case.get("classname", "").rpartition(".")[2]
    return next(each for each, modules in COLUMNS.items() if module in modules)


def run(store: str, folder: Path) -> dict[str, str]:
    """Run the tests against one store; return the cells of its row."""
    names = READING if store in READ_ALONE else [*READING, *WRITING]
    if SOAK and store not in READ_ALONE:
        names = [*names, "test_stores.py"]
    report = folder / f"{store}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    command += [*(f"tests/{name}" for name in names), "tests/stores"]
    if not SOAK:
        command += ["-k", "not create_with_ray"]
    environment = {name: value for name, value in os.environ.items() if name != "SOAK"}
    environment |= {"STORE": store, "KILLS": "40" if SOAK else "6"}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if not report.exists():
        return {READ: "does not start"}
    passed = dict.fromkeys(COLUMNS, 0)
    failed = dict.fromkeys(COLUMNS, 0)
    for case in xml.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            (failed if bad else passed)[column(case)] += 1
    row = {each: cell(passed[each], failed[each]) for each in COLUMNS}
    if store in READ_ALONE and row[OUTPUT] == "yes":
        row[OUTPUT] = "refused"
    row["tests"] = str(sum(passed.values()) + sum(failed.values()))
    return row


def cell(passed: int, failed: int) -> str:
    """Return what the table says of some tests."""
    if failed:
        return f"{failed} of {failed + passed} fail"
    return "yes" if passed else "-"


def main(stores: list[str]) -> int:
    """Run the tests; return 1 if any fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    rows, skipped = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for store in stores or SERVERS:
            if reason := missing(store):
                skipped[store] = reason
                continue
            began = time.monotonic()
            print(f"--- {title(store)}", flush=True)
            rows[store] = run(store, Path(folder))
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    columns = [*COLUMNS, "tests"]
    print("\n| Server |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for store, row in rows.items():
        print(f"| {title(store)} |", " | ".join(row.get(each, "-") for each in columns), "|")
    for store, reason in skipped.items():
        print(f"skipped: {store}: {reason}")
    cells = [cell for row in rows.values() for cell in row.values()]
    return int(any("fail" in cell or "start" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
