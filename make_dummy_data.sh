#!/usr/bin/env bash
# Make sample data: make_dummy_data.sh [count=10] [directory=source_data]
# Files that are there already are left as they are.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

count=${1:-10}
directory=${2:-$here/source_data}
if (($# > 2)) || ! [[ $count =~ ^[0-9]{1,9}$ ]]; then
  echo 'usage: make_dummy_data.sh [count=10] [directory=source_data]' >&2
  exit 2
fi

exec "$python" - "$((10#$count))" "$directory" <<'EOF'
import colorsys
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from PIL import Image, ImageDraw
except ModuleNotFoundError:
    sys.exit("error: pillow is not installed; run: pip install -r requirements.txt")

count, directory = int(sys.argv[1]), sys.argv[2]
made = 0
try:
    os.makedirs(directory, exist_ok=True)
    for number in range(count):
        base = os.path.join(directory, f"sample-{number}")
        hue = number * 0.618 % 1  # the golden ratio keeps neighbours apart
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.9))
        picture = Image.new("RGB", (64, 64), colour)
        ImageDraw.Draw(picture).text((32, 32), str(number), fill="black", anchor="mm")
        for name, save in (
            (f"{base}.jpg", lambda file: picture.save(file, "JPEG")),
            (f"{base}.txt", lambda file: file.write(b"This is the description for sample %d.\n" % number)),
        ):
            try:
                with open(name, "xb") as file:
                    save(file)
                made += 1
            except FileExistsError:
                pass
    print(f"{made:,} files made in {directory}, {2 * count - made:,} were there already", flush=True)
except (OSError, UnicodeError) as error:
    sys.exit(f"make_dummy_data.sh: error: {error}")
EOF
