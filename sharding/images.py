"""What needs Pillow: the size of an image, decoding it in full, and the contact sheet.

Input: encoded images, as bytes. Kept separate so that nothing else has to import Pillow.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageOps, ImageSequence

from sharding.errors import InputError, naming
from sharding.messages import argument

# Formats that Pillow decodes itself, and their endings: for some others (EPS) it runs programs.
FORMATS = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
IMAGE_FIELDS = {
    "apng", "bmp", "gif", "ico", "j2c", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpf", "jpg", "jpx",
    "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp",
}  # fmt: skip
MAX_IMAGE = 256 << 20  # bytes of an image that is decoded in full
THUMBNAIL = 144  # pixels of each side of a picture in a contact sheet
MAX_PREVIEW = 1_000  # samples: more make an image larger than JPEG can be


def is_image(field: str) -> bool:
    """Tell whether a field, such as png or seg.png, holds an image."""
    return field.rpartition(".")[2] in IMAGE_FIELDS


def use_image(
    data: bytes, use: Callable[[Image.Image], Any], bombs: Literal["error", "ignore"] = "error"
) -> tuple[Any, str]:
    """Return use(image), and what is wrong with the image, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data and the like
            warnings.simplefilter(bombs, Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return use(image), ""
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on hostile data
        return None, type(error).__name__


def decode(image: Image.Image) -> None:
    """Decode an image in full."""
    for frame in ImageSequence.Iterator(image):
        frame.load()


def image_size(data: bytes) -> str:
    """Return the size of an image, and a note where Pillow cannot read it."""
    size, problem = use_image(data, lambda image: image.size, bombs="ignore")
    if problem:
        return f"{len(data)} bytes (not readable: {problem})"
    return f"{size[0]}x{size[1]}, {len(data)} bytes"


def check_preview(target: str, limit: int) -> None:
    """Refuse a contact sheet that cannot be drawn, before any work."""
    Image.init()
    flag = argument("preview")
    if Image.EXTENSION.get(os.path.splitext(target)[1].lower()) not in Image.SAVE:
        raise InputError(f"{flag} {target!r}: not the name of an image, such as x.png")
    if not os.path.isdir(os.path.dirname(target) or os.curdir):
        raise InputError(f"{flag} {target!r}: its folder does not exist; make it")
    if limit > MAX_PREVIEW:
        smaller = f"choose a smaller {argument('limit')}"
        raise InputError(f"{flag} draws at most {MAX_PREVIEW:,} samples; {smaller}")


def draw_preview(pictures: Sequence[tuple[bytes, Sequence[str]]], target: str) -> None:
    """Draw a contact sheet.

    Args:
        pictures: an encoded image and up to three lines of caption for each.
        target: the file for the sheet; its ending gives the format.
    """
    side, caption, columns = THUMBNAIL + 16, 44, min(4, max(1, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * side, rows * (side + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(pictures):
        left, top = number % columns * side, number // columns * (side + caption)
        small, problem = use_image(image, _thumbnail)
        if problem:
            draw.rectangle((left + 8, top + 8, left + side - 8, top + side - 8), outline="red")
            draw.text((left + side / 2, top + side / 2), "not readable", fill="red", anchor="mm")
        else:
            sheet.paste(small, (left + 8, top + 8))
        for line, text in enumerate(lines):
            draw.text((left + 8, top + side + 13 * line), text, fill="black")
    with naming(target):
        sheet.save(target)


def _thumbnail(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image.convert("RGB"), (THUMBNAIL, THUMBNAIL), color="white")
