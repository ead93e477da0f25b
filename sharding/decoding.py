"""What `--decode` judges: whether a training could decode a field, by its name and content.

Fields are decoded as webdataset does it (`webdataset/autodecode.py`), images by Pillow.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable
from typing import BinaryIO

TEXTS = {"txt", "text", "transcript"}
DECODERS: dict[str, Callable[[bytes], object]] = {
    **dict.fromkeys(TEXTS, lambda data: data.decode("utf-8")),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
}


def decodes(field: str) -> bool:
    """Tell whether a field is one that `decode_member` decodes."""
    from sharding import images  # here: Pillow is needed for this alone

    ending = _ending(field.removesuffix(".gz"))
    return ending in DECODERS or images.is_image(ending)


def is_text(field: str) -> bool:
    """Tell whether a field holds a text."""
    return _ending(field) in TEXTS


def decode_member(member: str, stream: BinaryIO, size: int) -> tuple[str, str] | None:
    """Decode a member; return what is wrong with it, if anything: its kind, and what is shown.

    Args:
        member: its name, with the field in lower case.
        stream: is at its content, and stays somewhere in it.
        size: of the content.
    """
    from sharding import images

    shown = member
    try:
        if _ending(member) == "gz":
            member, stream = member[:-3], io.BytesIO(gzip.decompress(stream.read(size)))
            size = len(stream.getbuffer())
        if decoder := DECODERS.get(_ending(member)):
            decoder(stream.read(size))
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        text = f"{shown!r} ({type(error).__name__}: {error})"[:200]
        return "field that cannot be decoded", text
    if images.is_image(member):
        large = size > images.MAX_IMAGE
        data = b"" if large else stream.read(size)
        problem = "too large" if large else images.use_image(data, images.decode)[1]
        if problem:
            return "image that cannot be decoded", f"{member!r} ({problem})"
    return None


def _ending(field: str) -> str:
    return field.rpartition(".")[2]
