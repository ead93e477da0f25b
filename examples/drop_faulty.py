"""Delete the source files that cannot be decoded; without --delete, show which these are.

    python read_webdataset.py --path webdataset_output --source source_data --decode --quiet \\
        --report faults.jsonl
    python examples/drop_faulty.py faults.jsonl source_data
    python examples/drop_faulty.py faults.jsonl source_data --delete
Then pack again with --skip-bad, which drops the other files of these samples.
"""

import argparse
import json
import os
import sys

USAGE = "python examples/drop_faulty.py REPORT SOURCE [--delete]"
RAW = argparse.RawDescriptionHelpFormatter


def faulty_files(report, source):
    """Return the paths of what the report says cannot be decoded, each with the reason."""
    found, folder = {}, os.path.join(os.path.normpath(source), "")
    with open(report, encoding="utf-8") as lines:
        for fault in map(json.loads, lines):
            path = os.path.normpath(os.path.join(source, fault["name"]))
            if fault["reason"].endswith("cannot be decoded") and path.startswith(folder):
                found[path] = fault["reason"]
    return found


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(None, USAGE, __doc__, formatter_class=RAW)
    parser.add_argument("report", metavar="REPORT", help="what read_webdataset.py --report wrote")
    parser.add_argument("source", metavar="SOURCE", help="the folder that was packed")
    parser.add_argument("--delete", action="store_true", help="delete these files")
    args = parser.parse_args()
    try:
        if args.source.endswith(".tar") and not os.path.isdir(args.source):
            cure = "pack again with --transform examples/drop_broken.py:whole"
            raise ValueError(f"{args.source!r}: nothing is deleted from archives; {cure}")
        if not os.path.isdir(args.source):
            raise ValueError(f"{args.source!r} is not a folder")
        found = faulty_files(args.report, args.source)
        there = [path for path in found if os.path.lexists(path)]
        for path, reason in found.items():
            print(f"{path}: {reason if os.path.lexists(path) else 'it is not there'}")
        for path in there if args.delete else ():
            os.remove(path)  # of a link, the link alone
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"drop_faulty.py: error: {error}", file=sys.stderr)
        return 2
    done = "deleted" if args.delete else "found; nothing is deleted without --delete"
    print(f"{len(there):,} {'file' if len(there) == 1 else 'files'} {done}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
