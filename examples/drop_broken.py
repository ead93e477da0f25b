"""Leave out samples whose picture Pillow cannot decode; all else is packed as it is.

    ./run_parallel.sh --source raw --output good --transform examples/drop_broken.py:whole
The last line says how many were dropped; stderr names them.
"""

import io
import sys

from PIL import Image

PICTURES = ("jpg", "jpeg", "png", "webp")


def whole(sample):
    """Return the sample, or None if one of its pictures is broken."""
    for field in PICTURES:
        if field in sample:
            try:
                Image.open(io.BytesIO(sample[field])).load()
            except Exception as error:  # Pillow raises many kinds
                print(f"{sample['__key__']}.{field}: {error}", file=sys.stderr)
                return None
    return sample
