"""Make a folder of links, from pictures and captions that are not side by side yet.

    python examples/link_pairs.py images captions links            # a/7.jpg and a/7.txt
    python examples/link_pairs.py images captions.csv links        # or .tsv, with column names
    python examples/link_pairs.py photos photos/metadata.jsonl links
Then pack the links: ./run_parallel.sh --source links --output shards

Paths in a table start at the folder of the pictures. A picture with several captions becomes
several samples: 7, 7-2, 7-3. Pictures are not copied, so leave them where they are.
"""

import argparse
import csv
import io
import json
import os
import sys
from typing import NamedTuple

FILE_COLUMNS = ["file_name", "file", "filename", "filepath", "image", "image_path", "path"]
TEXT_COLUMNS = ["text", "caption", "captions", "description", "prompt", "label"]


class Pairs(NamedTuple):
    """What is to be made below the folder of links, and what has no partner."""

    links: dict  # name -> the file it leads to
    texts: dict  # name -> what is in it
    pictures: list  # without a caption
    captions: list  # without a picture


def fail(error):
    """Let a folder that cannot be listed end the command."""
    raise error


def files_below(folder):
    """Yield the files below a folder, in order, without hidden ones."""
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def pair_folders(pictures, captions):
    """Pair the files whose paths differ in their extensions alone."""
    sides = {pictures: {}, captions: {}}
    for folder, stems in sides.items():
        for name in files_below(folder):
            stems.setdefault(os.path.splitext(name)[0], []).append(name)
    both = sides[pictures].keys() & sides[captions].keys()
    links, alone = {}, {pictures: [], captions: []}
    for folder, stems in sides.items():
        for stem, names in stems.items():
            if stem in both:
                links.update({name: os.path.abspath(os.path.join(folder, name)) for name in names})
            else:
                alone[folder] += names
    return Pairs(links, {}, alone[pictures], alone[captions])


def read_table(path):
    """Return the rows of a table; the byte-order mark that Excel writes is no part of it."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            table = stream.read()
        if path.endswith((".jsonl", ".ndjson")):
            return [dict(json.loads(line)) for line in table.split("\n") if line.strip()]
        header = table.partition("\n")[0]
        return list(csv.DictReader(io.StringIO(table), delimiter=max(",;\t", key=header.count)))
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path!r} is not a UTF-8 table: {error}") from None


def choose(there, names):
    """Return the first of these columns that the table has."""
    for name in names:
        if name in there:
            return name
    columns = ", ".join(map(str, there))
    raise ValueError(
        f"no column {' or '.join(names)}, but {columns}; name two: --columns FILE,TEXT"
    )


def pair_table(pictures, table, columns, field):
    """Pair each row's picture with its text."""
    rows = read_table(table)
    there = list(dict.fromkeys(column for row in rows for column in row))
    named = [[name] for name in columns.split(",")] if columns else [FILE_COLUMNS, TEXT_COLUMNS]
    if len(named) != 2:
        raise ValueError("--columns takes two columns: FILE,TEXT")
    file, text = (choose(there, names) for names in named)
    pairs, known = Pairs({}, {}, [], []), {os.path.relpath(table, pictures)}
    for number, row in enumerate(rows, 1):
        path = os.path.join(pictures, row.get(file) or "")
        name, caption = os.path.relpath(path, pictures), row.get(text)
        if name.startswith("..") or not os.path.isfile(path):
            pairs.captions.append(row.get(file) or f"row {number}")
        elif caption is not None:
            stem, extension = os.path.splitext(name)
            key, copies = stem, 1
            while f"{key}{extension}" in pairs.links or f"{key}.{field}" in pairs.texts:
                copies += 1
                key = f"{stem}-{copies}"
            pairs.links[f"{key}{extension}"] = os.path.abspath(path)
            text_of = caption if isinstance(caption, str) else json.dumps(caption)
            pairs.texts[f"{key}.{field}"] = text_of
            known.add(name)
    pairs.pictures.extend(name for name in files_below(pictures) if name not in known)
    return pairs


def make_links(pairs, folder):
    """Make the folder, whole or not at all."""
    new = f"{folder.rstrip(os.sep)}.new"
    os.mkdir(new)
    for name, target in pairs.links.items():
        os.makedirs(os.path.dirname(os.path.join(new, name)), exist_ok=True)
        os.symlink(target, os.path.join(new, name))
    for name, text in pairs.texts.items():
        with open(os.path.join(new, name), "x", encoding="utf-8") as stream:
            stream.write(text)
    os.rename(new, folder)


def name_alone(names, lacks):
    """Say which of these have no partner."""
    if names:
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        print(
            f"left out, without a {lacks}: {', '.join(map(repr, names[:5]))}{more}", file=sys.stderr
        )


def run(args):
    """Do what the flags say."""
    if os.path.lexists(args.links) and (not os.path.isdir(args.links) or os.listdir(args.links)):
        raise ValueError(f"{args.links!r} is there already; choose another place, or remove it")
    if os.path.isfile(args.pictures):
        raise ValueError(f"{args.pictures!r} is not a folder: the pictures come first")
    for folder in (args.pictures, args.captions):
        if not os.path.exists(folder):
            raise ValueError(f"{folder!r} does not exist")
        if os.path.realpath(args.links).startswith(os.path.join(os.path.realpath(folder), "")):
            raise ValueError(f"{args.links!r} is inside {folder!r}; choose another place")
    if os.path.isdir(args.captions):
        pairs = pair_folders(args.pictures, args.captions)
    else:
        pairs = pair_table(args.pictures, args.captions, args.columns, args.field)
    name_alone(pairs.pictures, "caption")
    name_alone(pairs.captions, "picture")
    if not pairs.links:
        raise ValueError("nothing has a partner")
    make_links(pairs, args.links)
    made = len(pairs.texts) or len({os.path.splitext(name)[0] for name in pairs.links})
    print(f"{made:,} {'pair' if made == 1 else 'pairs'} in {args.links}")


def main():
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("pictures", help="folder of the pictures")
    parser.add_argument("captions", help="folder, .csv, .tsv or .jsonl of the captions")
    parser.add_argument("links", help="folder to make")
    parser.add_argument("--columns", metavar="FILE,TEXT", help="of a table (default: usual names)")
    parser.add_argument("--field", default="txt", help="what texts become (default: %(default)s)")
    try:
        run(parser.parse_args())
    except (OSError, ValueError) as error:
        print(f"link_pairs.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
