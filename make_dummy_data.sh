#!/usr/bin/env bash
# Make sample data: make_dummy_data.sh [count=10] [directory=source_data]
# Files that are there already are left as they are.
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")") # of the script, not of a link to it
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

count=${1:-10}
directory=${2:-$here/source_data}
usage='usage: make_dummy_data.sh [count=10] [directory=source_data]'
if [[ $count == -h || $count == --help ]]; then
  echo "$usage"
  exit 0
elif (($# > 2)) || ! [[ $count =~ ^[0-9]{1,9}$ ]]; then
  echo "$usage" >&2
  exit 2
fi

[[ ! -e $here/sharding ]] || "$python" -S "$here/sharding/__init__.py" || exit # it is too old
exec "$python" - "$((10#$count))" "$directory" <<'EOF'
import colorsys
import io
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from PIL import Image, ImageDraw
except ModuleNotFoundError:
    sys.exit("error: pillow is not installed; run: pip install -r requirements.txt")


def draw(number: int) -> bytes:
    """Return a JPEG with the number on a colour of its own."""
    hue = number * 0.618 % 1  # the golden ratio keeps neighbours apart
    colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.9))
    picture, stream = Image.new("RGB", (64, 64), colour), io.BytesIO()
    ImageDraw.Draw(picture).text((32, 32), str(number), fill="black", anchor="mm")
    picture.save(stream, "JPEG")
    return stream.getvalue()


count, directory = int(sys.argv[1]), sys.argv[2]
made = 0
try:
    os.makedirs(directory, exist_ok=True)
    for number in range(count):
        text = f"This is the description for sample {number}.\n"
        for field, data in (("jpg", draw(number)), ("txt", text.encode())):
            path = os.path.join(directory, f"sample-{number}.{field}")
            if not os.path.lexists(path):
                with open(path, "xb") as file:
                    file.write(data)
                made += 1
    there = f"{2 * count - made:,} were there already"
    print(f"{made:,} files made in {directory}, {there}", flush=True)
except (OSError, UnicodeError) as error:
    sys.exit(f"make_dummy_data.sh: error: {error}")
EOF
