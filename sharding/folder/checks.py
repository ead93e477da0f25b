"""What is refused of an output before a run, while nothing has been written."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from sharding.errors import InputError
from sharding.messages import argument, explain
from sharding.samples import Listing
from sharding.shards import SHARD_PATTERN, STRAY_PATTERN, inside_source, warn_of_strays


def check_output(output: str, listing: Listing) -> None:
    """Refuse an output where writing shards would fail or overwrite something."""
    name = f"{argument('output')} {output!r}"
    _check_folder(output, name)
    if os.path.isdir(listing.source):
        _check_outside(output, name, listing)
    strays = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(output):
            if SHARD_PATTERN.fullmatch(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    raise InputError(
                        f"{entry.path!r} is a folder with a shard's name; move it away"
                    )
            elif STRAY_PATTERN.fullmatch(entry.name):
                strays.append(entry.name)
    warn_of_strays(output, "file", strays)


def _check_folder(output: str, name: str) -> None:
    """Refuse an output that is no folder, and cannot become one."""
    try:
        if not stat.S_ISDIR(os.stat(output).st_mode):
            raise InputError(f"{name} is not a folder")
    except FileNotFoundError:
        for path in (Path(output), *Path(output).parents):
            if path.is_symlink() and not path.exists():
                leads = f"the link {str(path)!r} leads to {os.readlink(path)!r}"
                raise InputError(f"{name}: {leads}, which is not there") from None
    except OSError as error:
        raise InputError(f"{name}: {explain(error)}") from None


def _check_outside(output: str, name: str, listing: Listing) -> None:
    """Refuse an output in a folder of the source, even one that a link leads to."""
    here = os.path.realpath(output)
    folders = {os.path.realpath(listing.source), *_linked_folders(listing)}
    if any(map(Path(here).is_relative_to, folders)):
        raise inside_source(output)
    if "tar" in listing.fields.known():  # a link may lead to a shard in the output
        for file in (file for sample in listing.samples for file in sample.files()):
            folder, base = os.path.split(os.path.realpath(os.path.join(listing.source, file)))
            if folder == here and SHARD_PATTERN.fullmatch(base):
                raise InputError(f"{name} holds {file!r} of {argument('source')}; choose another")


def _linked_folders(listing: Listing) -> set[str]:
    """Return where links lead that stand for folders with samples."""
    seen, linked = {""}, set()
    for folder in {sample.stem.rpartition("/")[0] for sample in listing.samples}:
        while folder not in seen:
            seen.add(folder)
            path = os.path.join(listing.source, folder)
            if os.path.islink(path):
                linked.add(os.path.realpath(path))
            folder = folder.rpartition("/")[0]
    return linked
