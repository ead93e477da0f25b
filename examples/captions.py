"""Take captions from a table: `txt` from one column, `json` from the rest.

The table is metadata.jsonl or metadata.csv, with a row for each picture:
    {"file_name": "a/1.jpg", "text": "A red square.", "license": "CC0"}
Put a copy of this file beside it, in the folder that `file_name` starts from:
    cp examples/captions.py photos
    ./run_parallel.sh --source photos --fields jpg --output out \\
        --transform photos/captions.py:caption
"""

import csv
import json
import os
import sys
from pathlib import Path

NAME, TEXT = "file_name", "text"  # the columns; change them in your copy


def read_table(folder):
    """Return the rows of a table, by the path of the picture without its extension."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        path = folder / "metadata.csv"
    rows = {}
    with open(path, encoding="utf-8-sig", newline="") as stream:
        lines = map(json.loads, stream) if path.suffix == ".jsonl" else csv.DictReader(stream)
        for row in lines:
            key = os.path.splitext(row.pop(NAME))[0]
            if key in rows:
                raise ValueError(f"two rows for {key!r} in {path}")
            rows[key] = row
    print(f"{len(rows):,} rows in {path}", file=sys.stderr)
    return rows


ROWS = read_table(Path(__file__).parent)  # at the top: once a process, not once a sample


def caption(sample):
    """{"__key__": "a/1", "jpg": ...} -> {"jpg": ..., "txt": "A red square.", "json": {...}}."""
    if sample["__key__"] not in ROWS:
        raise ValueError("the table has no row for this picture")
    rest = dict(ROWS[sample["__key__"]])
    return {"jpg": sample["jpg"], "txt": rest.pop(TEXT), "json": rest}
