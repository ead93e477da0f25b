"""Turn class folders, train/cat/7.JPEG, into `jpg` and `cls`, the number of the class.

First write the list of classes, one a line; a line's number is the class, so keep the file:
    (cd train && ls -d */ | tr -d /) >examples/classes.txt
Then, in one run for each of train and val, with the same list:
    ./run_parallel.sh --source train --fields "jpg;jpeg" --output out \\
        --transform examples/classes.py:number
"""

from pathlib import Path

CLASSES = Path(__file__).with_name("classes.txt").read_text(encoding="utf-8").splitlines()
NUMBERS = {name: number for number, name in enumerate(CLASSES)}  # once a process


def number(sample):
    """{"__key__": "cat/7", "jpeg": b"..."} -> {"jpg": b"...", "cls": 0}."""
    folder = sample["__key__"].rpartition("/")[0].rpartition("/")[2]
    if folder not in NUMBERS:
        raise ValueError(f"no class {folder!r} in classes.txt")
    picture = sample["jpg"] if "jpg" in sample else sample["jpeg"]
    return {"jpg": picture, "cls": NUMBERS[folder]}
