"""Read WebDataset shards back: look at the samples, check the shards, prove them complete."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tarfile
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, pairwise
from typing import Any, BinaryIO, Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported
try:
    import webdataset as wds
    from PIL import Image, ImageDraw, ImageOps, ImageSequence
    from tqdm import tqdm

    import create_webdataset as core
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run: pip install -r requirements.txt")
from sharding.archive import Damaged, read_members
from sharding.errors import InputError, PackError, explain, naming
from sharding.samples import list_samples, parse_fields, sample_files, sample_key, split_name

IMAGE_FIELDS = {"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"}
# Formats that Pillow decodes itself: for some others (EPS) it runs programs.
FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
TEXT_LIMIT = 200  # characters of a text that are printed
MAX_IMAGE = 256 << 20  # bytes of an image that --decode takes into memory
MISPLACED = "sample in another shard than this source and its flags say"
THUMBNAIL = 144  # pixels of each side of a picture in a contact sheet
MAX_PREVIEW = 1_000  # samples: more make an image larger than JPEG can be
SHOWN = 5  # faults of one kind that are named; the rest are counted

Faults = defaultdict[str, list[str]]  # what is wrong -> where

# ---------------------------------------------------------------- finding the shards


def find_shards(path: str, faults: Faults) -> list[str]:
    """Return the paths of the shards of a dataset, in order; note strays and folders.

    Raises:
        InputError: there are none.
        PackError: a run was cut short while its shards replaced the previous ones.
    """
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        if core.interrupted_publishing(path):
            raise PackError(f"{path!r}: {core.INTERRUPTED}")
    except OSError as error:
        raise InputError(f"--path: {explain(error)}") from None
    shards = []
    for entry in entries:
        if core.SHARD_PATTERN.fullmatch(entry.name):
            if entry.is_file():
                shards.append(entry.path)
            else:
                faults["not a file"].append(entry.name)
        elif re.fullmatch(r"shard-.*\.tar", entry.name, re.DOTALL):
            faults["stray file, which readers may take for a shard"].append(entry.name)
    if not shards:
        cure = "pack some with ./run_parallel.sh"
        if core.staging_folders(path):
            cure = "an unfinished run is there: end it with --resume"
        raise InputError(f"--path {path!r} has no shard-*.tar; {cure}")
    return shards


def open_shards(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard as the plain file it is; this takes the place of webdataset's own opener.

    webdataset takes a path for a URL: it cuts "a#b" or "a?b" short, and runs "pipe:..." in a shell.
    """
    for url in urls:
        with open(url["url"], "rb") as stream:
            yield {"url": url["url"], "stream": stream}


def plain_dataset(shards: Sequence[str], **options: Any) -> wds.WebDataset:
    """Return a wds.WebDataset over shards whose paths are plain paths, whatever they look like."""
    dataset = wds.WebDataset(list(shards), **options)
    dataset.pipeline = [
        open_shards if isinstance(stage, wds.cache.StreamingOpen) else stage
        for stage in dataset.pipeline
    ]
    return dataset


# ---------------------------------------------------------------- checking one shard


class Task(NamedTuple):
    """What a process needs to check one shard."""

    path: str
    decode: bool = False
    source: str = ""
    fields: Sequence[str] = ()
    samples: Sequence[str] = ()  # that the source, if any, has for this shard


class Report(NamedTuple):
    """What a shard holds, and what is wrong with it."""

    path: str
    size: int
    keys: Sequence[str]  # in order; none where it is proved: they are those of the source
    samples: int
    field_sets: Mapping[tuple[str, ...], str]  # fields -> a key that has them
    faults: Sequence[tuple[str, str]]  # kind and detail of each
    sound: bool = True  # webdataset can read it
    proved: bool = False  # byte for byte what the source makes it


class Comparison(io.BytesIO):
    """A stream to write to that compares what is written with what a file holds."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream = stream

    def write(self, data: Any) -> int:
        """Compare the next bytes."""
        if self.stream.read(len(data)) != data:
            raise Damaged("differs")
        return len(data)


def check_shard(task: Task) -> Report:
    """Check one shard; a shard that is, byte for byte, what it must be is not looked at twice."""
    with naming(task.path), open(task.path, "rb", buffering=1 << 16) as stream:
        size = os.fstat(stream.fileno()).st_size
        if task.samples and not task.decode:
            try:
                core.write_samples(Comparison(stream), task.source, task.samples, task.fields)
                if not stream.read(1):
                    usual = {tuple(task.fields): sample_key(task.samples[0])}
                    return Report(task.path, size, (), len(task.samples), usual, (), proved=True)
            except Damaged:
                stream.seek(0)
        return take_apart(task, stream, size)


def take_apart(task: Task, stream: BinaryIO, size: int) -> Report:
    """Read a shard member by member, and note what is wrong with it."""
    faults: list[tuple[str, str]] = []
    keys: list[str] = []
    field_sets: dict[tuple[str, ...], str] = {}
    expected = {sample_key(sample): sample for sample in task.samples}
    current: set[str] = set()
    seen: set[str] = set()

    def finish_sample() -> None:
        if keys:
            field_sets.setdefault(tuple(sorted(current)), keys[-1])
            if keys[-1] in expected and sorted(current) != sorted(task.fields):
                faults.append(("fields differ from the source", repr(keys[-1])))
        current.clear()

    sound = False
    try:
        for name, length in read_members(stream, size):
            key, field = split_name(name)
            if field is not None and field.startswith("__"):
                raise Damaged(f"member {name!r}, whose field is reserved")
            if key is None or field is None or re.match(r"__[^/]*__($|/)", name):
                faults.append(("member that readers drop", repr(name)))
                continue
            if not keys or key != keys[-1]:
                finish_sample()
                if key in seen:
                    faults.append(("key occurs twice", repr(key)))
                seen.add(key)
                keys.append(key)
            if field.lower() in current:
                raise Damaged(f"field {field!r} occurs twice in sample {key!r}")
            current.add(field.lower())
            if expected or task.decode:
                sample = expected.get(key)
                faults.extend(check_content(task, sample, key, field.lower(), stream, length))
        sound = True
        if not keys:
            faults.append(("empty shard", "which makes some readers fail"))
    except Damaged as error:
        faults.append(("damaged", str(error)))
    finish_sample()
    return Report(task.path, size, keys, len(keys), field_sets, faults, sound)


def check_content(
    task: Task, sample: str | None, key: str, field: str, stream: BinaryIO, length: int
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the content of a member, compared with its file and with Pillow."""
    if sample is not None and field in task.fields:
        path = sample_files(sample, task.fields)[task.fields.index(field)]
        with open(os.path.join(task.source, path), "rb") as file:
            start = stream.tell()
            pieces = iter(lambda: file.read(1 << 20), b"")
            left = length - os.fstat(file.fileno()).st_size
            if left or any(piece != stream.read(len(piece)) for piece in pieces):
                yield "bytes differ from the source", repr(f"{key}.{field}")
            stream.seek(start)
    if task.decode and is_image(field):
        large = length > MAX_IMAGE
        problem = "too large" if large else use_image(stream.read(length), decode)[1]
        if problem:
            yield "image that cannot be decoded", f"{f'{key}.{field}'!r} ({problem})"


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
    except Exception as error:  # Pillow raises nearly anything on hostile data
        return None, type(error).__name__


def decode(image: Image.Image) -> None:
    """Decode an image in full."""
    for frame in ImageSequence.Iterator(image):
        frame.load()


# ---------------------------------------------------------------- checking a dataset


def check_dataset(shards: Sequence[str], args: argparse.Namespace, faults: Faults) -> list[Report]:
    """Check every shard, in `--num-workers` processes, and what only shows across shards."""
    fields = parse_fields(args.fields)
    listed: Sequence[str] = ()  # a source that holds none is refused
    if args.source is not None:
        listed = list_samples(args.source, fields, args.skip_incomplete, args.shuffle).samples
    total = count_shards(shards, listed)
    tasks = (
        Task(shard, args.decode, args.source, fields, listed[shard_id(shard) :: total])
        for shard in shards
    )
    for number in sorted(set(range(total)) - set(map(shard_id, shards))):
        faults["missing shard"].append(core.shard_name(number))
    reports: list[Report] = []
    with tqdm(total=len(shards), unit=" shards", disable=None) as bar:
        for report in check_in_parallel(tasks, min(args.num_workers, len(shards))):
            bar.update()
            reports.append(report)
            for kind, detail in report.faults:
                faults[kind].append(f"{os.path.basename(report.path)}: {detail}")
    compare_shards(reports, listed, total, faults)
    return reports


def check_in_parallel(tasks: Iterator[Task], num_workers: int) -> Iterator[Report]:
    """Yield the report of each task, in order, from this process or from several."""
    if num_workers == 1:
        return map(check_shard, tasks)
    ignore = signal.SIGINT, signal.SIG_IGN
    pool = ProcessPoolExecutor(num_workers, initializer=signal.signal, initargs=ignore)
    return core.in_order(pool, check_shard, tasks, 2 * num_workers)


def shard_id(path: str) -> int:
    """Return the number in a shard's name: 'folder/shard-000007.tar' -> 7."""
    return int(path[-10:-4])


def count_shards(shards: Sequence[str], listed: Sequence[str]) -> int:
    """Return how many shards the dataset must have had.

    The last ones may be missing; the first keys of a shard, which lie `total` apart in the source
    that it was packed from, tell.
    """
    total = shard_id(shards[-1]) + 1
    for shard in shards[:5] if listed else ():
        keys = set()
        with open(shard, "rb") as stream, contextlib.suppress(Damaged):
            for name, _ in islice(read_members(stream, os.fstat(stream.fileno()).st_size), 64):
                keys.add(split_name(name)[0])
        places = [place for place, sample in enumerate(listed) if sample_key(sample) in keys]
        steps = {after - before for before, after in pairwise(places)}
        if places[:1] == [shard_id(shard)] and len(steps) == 1:  # else damaged, or another source
            return max(total, *steps)
    return total


def compare_shards(
    reports: Sequence[Report], listed: Sequence[str], total: int, faults: Faults
) -> None:
    """Note keys in two shards, differing fields, and what a source has that they have not."""
    places: dict[str, str] = {}
    for report in reports:
        name = os.path.basename(report.path)
        for key in report.keys:
            if key in places and places[key] != name:
                faults["key in two shards"].append(f"{key!r} in {places[key]} and {name}")
            places[key] = name
    field_sets = Counter(fields for report in reports for fields in report.field_sets)
    usual = field_sets.most_common(1)[0][0] if field_sets else ()
    for report in reports:
        for fields, key in report.field_sets.items():
            if fields != usual:
                detail = f"{os.path.basename(report.path)}: {key!r} has {', '.join(fields)}"
                faults["fields differ from those of other samples"].append(detail)
    if not listed:
        return
    homes = [core.shard_name(number) for number in range(total)]
    proved = {os.path.basename(report.path) for report in reports if report.proved}
    for place, sample in enumerate(listed):
        key, home = sample_key(sample), homes[place % total]
        found = places.pop(key, None)
        if home in proved:
            if found:
                faults["key in two shards"].append(f"{key!r} in {home} and {found}")
        elif not found:
            faults["missing sample"].append(f"{key!r} of {home}")
        elif found != home:
            faults[MISPLACED].append(f"{key!r} is in {found}, not {home}")
    for key, name in places.items():
        faults["extra sample, not in the source"].append(f"{key!r} in {name}")


def identify(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return what tells these shards from others that take their places."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)]


def print_faults(faults: Faults) -> None:
    """Print the first few faults of each kind on stderr, and count the others."""
    for kind, details in faults.items():
        for detail in details[:SHOWN]:
            print(f"{kind}: {one_line(detail)}", file=sys.stderr)
        if len(details) > SHOWN:
            print(f"{kind}: and {len(details) - SHOWN:,} more", file=sys.stderr)


# ---------------------------------------------------------------- looking at samples


def read_samples(shards: Sequence[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield the first samples, whatever a training job's RANK or WORKER in the environment say."""
    if not shards:  # webdataset takes no empty list
        return iter(())
    dataset = plain_dataset(
        shards, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    return islice(dataset, limit)


def one_line(text: str) -> str:
    """Return the beginning of a text as one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:TEXT_LIMIT])


def sample_text(sample: Mapping[str, Any]) -> str:
    """Return the beginning of a sample's text as one line."""
    data = sample["txt"].strip()
    text = data[: 4 * TEXT_LIMIT].decode("utf-8", "backslashreplace")  # 4 bytes a character at most
    return one_line(text) + (f"... ({len(data):,} bytes)" if len(text) > TEXT_LIMIT else "")


def image_size(data: bytes) -> str:
    """Return the size of an image, and a note where Pillow cannot read it."""
    size, problem = use_image(data, lambda image: image.size, bombs="ignore")
    if problem:
        return f"{len(data)} bytes (not readable: {problem})"
    return f"{size[0]}x{size[1]}, {len(data)} bytes"


def print_sample(number: int, sample: Mapping[str, Any]) -> None:
    """Print a sample: its key, text and image size, and the size of any other field."""
    print(f"--- Sample {number} ---\nKey: {one_line(sample['__key__'])}")
    if "txt" in sample:
        print(f"Text: {sample_text(sample)}")
    for field, data in sample.items():
        if is_image(field):
            print(f"Image size: {image_size(data)}")
        elif field != "txt" and not field.startswith("__"):
            print(f"{one_line(field)}: {len(data)} bytes")


def check_preview(target: str, limit: int) -> None:
    """Refuse a contact sheet that cannot be drawn, before any work."""
    Image.init()
    if Image.EXTENSION.get(os.path.splitext(target)[1].lower()) not in Image.SAVE:
        raise InputError(f"--preview {target!r}: no ending of an image, such as .png")
    if limit > MAX_PREVIEW:
        raise InputError(
            f"--preview draws at most {MAX_PREVIEW:,} samples; choose a smaller --limit"
        )


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image in the size that a contact sheet has room for."""
    return ImageOps.pad(image.convert("RGB"), (THUMBNAIL, THUMBNAIL), color="white")


def draw_preview(shards: Sequence[str], limit: int, target: str) -> None:
    """Draw a contact sheet of the first samples of the shards: thumbnail, key and first words."""
    each, rest = divmod(limit, max(1, len(shards)))
    shares = [(shard, each + (place < rest)) for place, shard in enumerate(shards)]
    samples = [sample for shard, share in shares for sample in read_samples([shard], share)]
    side, caption, columns = THUMBNAIL + 16, 44, min(4, max(1, len(samples)))
    rows = max(1, -(-len(samples) // columns))
    sheet = Image.new("RGB", (columns * side, rows * (side + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = number % columns * side, number // columns * (side + caption)
        images = [data for field, data in sample.items() if is_image(field)]
        small, problem = use_image(images[0] if images else b"", thumbnail)
        if problem:
            draw.rectangle((left + 8, top + 8, left + side - 8, top + side - 8), outline="red")
            draw.text((left + side / 2, top + side / 2), "not readable", fill="red", anchor="mm")
        else:
            sheet.paste(small, (left + 8, top + 8))
        words = textwrap.wrap(sample_text(sample) if "txt" in sample else "", 24)
        for line, text in enumerate((one_line(sample["__key__"])[-24:], *words[:2])):
            draw.text((left + 8, top + side + 13 * line), text, fill="black")
    sheet.save(target)


# ---------------------------------------------------------------- training


class SplitShards:
    """A stage of a pipeline that shuffles the shards and deals them to all ranks and workers.

    Every epoch has another order, the same in every rank, so that each worker meets all shards
    over time; a worker that is started anew for each epoch begins at the first one again.
    """

    def __init__(self, shuffle: bool, seed: int) -> None:
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = -1
        self.node = 0, 1  # rank and world size

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along to workers that are spawned: they have no process group."""
        return {**self.__dict__, "node": wds.utils.pytorch_worker_info()[:2]}

    def __call__(self, urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the shards of this rank and worker."""
        self.epoch += 1
        shards = list(urls)
        rank, world_size, worker, num_workers = wds.utils.pytorch_worker_info()
        if world_size == 1:
            rank, world_size = self.node
        readers, reader = world_size * num_workers, rank * num_workers + worker
        if len(shards) < world_size:
            raise PackError(f"{len(shards)} shards for {world_size} ranks: pack at least as many")
        if len(shards) < readers and reader == 0 and self.epoch == 0:
            warnings.warn(
                f"{len(shards)} shards for {readers} readers (ranks: {world_size}, "
                f"workers of each: {num_workers}): some get no samples; pack more shards",
                stacklevel=2,
            )
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(shards)
        yield from shards[reader::readers]


def open_webdataset(
    path: str | os.PathLike[str],
    fields: Sequence[str] = ("jpg", "txt"),
    decode: str | None = "pilrgb",
    shuffle: int = 1_000,
    seed: int = 0,
) -> wds.WebDataset:
    """Return a training pipeline over a dataset, for a DataLoader or wds.WebLoader.

    Args:
        path: folder of the shards.
        fields: what a sample is given as, in this order.
        decode: what images become: "pilrgb", "torchrgb", ... as `decode` of webdataset says;
            None leaves every field as bytes.
        shuffle: samples that a worker holds to shuffle them; 0 keeps the order of the shards.
        seed: of both shuffles.

    Raises:
        InputError, PackError: there are no shards, or not just shards.
    """
    faults: Faults = defaultdict(list)
    shards = find_shards(os.fspath(path), faults)
    for kind, details in faults.items():
        raise PackError(f"{kind}: {details[0]}")
    dataset = plain_dataset(
        shards,
        shardshuffle=False,  # SplitShards does it, before it deals
        nodesplitter=SplitShards(shuffle > 0, seed),
        workersplitter=None,
        empty_check=False,
    )
    if shuffle > 0:  # anew from seed and epoch, however much of the last epoch was read
        dataset = dataset.compose(wds.detshuffle(shuffle, seed=seed))
    return (dataset.decode(decode) if decode else dataset).to_tuple(*fields)


# ---------------------------------------------------------------- command line


USAGE = "read_webdataset.py --path DIR [options]"
EXAMPLES = """examples:
  python read_webdataset.py --path webdataset_output --limit 3
  python read_webdataset.py --path webdataset_output --source source_data --quiet --num-workers 8
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = core.Parser(USAGE, __doc__ or "", EXAMPLES)
    parser.add_argument("--path", required=True, metavar="DIR", help="folder of the shards")
    add = parser.add_argument_group("what to show").add_argument
    number = core.number_from
    add("--limit", metavar="N", type=number(0), help="show the first N samples (default: all)")
    add("--quiet", action="store_true", help="print the summary alone")
    add("--preview", metavar="FILE", help="draw the first samples (--limit, or 16) of all shards")
    add = parser.add_argument_group("what to check").add_argument
    add("--decode", action="store_true", help="decode every image in full")
    workers = "processes (default: %(default)s)"
    add("--num-workers", metavar="N", type=number(1, core.MAX_SHARDS), default=1, help=workers)
    core.add_source_arguments(parser, "the source to prove the shards against, if any")
    return parser


@core.one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see --help."""
    args = build_parser().parse_args(argv)
    faults: Faults = defaultdict(list)
    drawn = 16 if args.limit is None else args.limit
    if args.preview is not None:
        check_preview(args.preview, drawn)
    shards = find_shards(args.path, faults)
    before = identify(shards)
    try:
        reports = check_dataset(shards, args, faults)
    except BrokenProcessPool:
        raise PackError(
            "a checking process was killed; is there memory for --num-workers?"
        ) from None
    sound = [report.path for report in reports if report.sound]
    try:
        for number, sample in enumerate(read_samples([] if args.quiet else sound, args.limit)):
            print_sample(number, sample)
    except (tarfile.TarError, ValueError) as error:
        raise PackError(f"webdataset cannot read a shard: {explain(error)}") from None
    if args.preview is not None:
        draw_preview(sound, drawn, args.preview)
    if identify(shards) != before:
        raise PackError(f"{args.path!r}: the dataset was replaced while it was read; run again")
    print_faults(faults)
    verdict = "OK" if not faults else f"{sum(map(len, faults.values())):,} faults"
    if args.source is not None and not faults:
        verdict = f"OK, each sample of {one_line(args.source)} once, byte for byte"
    print(
        f"{sum(report.samples for report in reports):,} samples in {len(reports):,} shards, "
        f"{sum(report.size for report in reports):,} bytes: {verdict}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` has seen enough: end in silence
    raise SystemExit(main())
