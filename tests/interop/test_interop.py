"""Read our shards with readers that we did not write: each must see every key and every byte.

What a reader cannot take is asserted, too, with as few names as show it: the README's table rests
on these tests, and a new version of a reader that behaves otherwise makes one of them fail.
"""

from __future__ import annotations

import gzip
import importlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import webdataset as wds
from PIL import Image

from create_webdataset import create_webdataset
from sharding.listing import list_samples
from sharding.record import RECORD
from sharding.run import start
from sharding.shards import shard_name

needs_bsdtar = pytest.mark.skipif(not shutil.which("bsdtar"), reason="needs libarchive-tools")
os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")  # read on import
Sample = dict[str, bytes]  # field -> content
NAMES = [
    *(f"sample-{number}" for number in range(12)),
    *("cats", "cats/7", "a/b/c/d/deep", "v1.2/photo", "a.b/c.d/x", "UPPER", "SUB.1/UPPER"),
    *(" leading", "with space", "trailing /two  spaces", "it's", 'say "hi"', "back`tick", "a\\b"),
    *("a#b", "a?b", "a;b", "{a,b}", "{0..3}/x", "a::b", "c:/d", "pipe:ls", "http:/x", "[x]*"),
    *("-dash", "--help", "~tilde", "$HOME", "a|b&c", "<y>", "@x=1", "_one", "a__b", "x__/y"),
    *("tab\there", "naïve", "ключ", "日本/語", "😀/🐈", "%20"),
    *("n" * 96, "n" * 97, "x" * 200, "ж" * 110),  # with ".jpg": 100 bytes, 101, 204 and 224
    "/".join(f"folder-{level}-{'y' * 40}" for level in range(8)),
]


class Packed(NamedTuple):
    """A dataset: its shards, and what a reader must find in them."""

    shards: list[str]
    samples: dict[str, Sample]


def pack(folder: Path, samples: dict[str, Sample], total_shards: int = 1) -> Packed:
    """Write samples as files and pack them; a key in capitals gets its extensions in capitals."""
    source, output = folder / "source", folder / "output"
    for key, sample in samples.items():
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        for field, data in sample.items():
            Path(source, f"{key}.{field.upper() if key.isupper() else field}").write_bytes(data)
    fields = sorted(next(iter(samples.values())))
    run = start(list_samples(source, fields), output=output, total_shards=total_shards)
    for shard_id in range(total_shards):
        create_webdataset(run, run.path, shard_id, total_shards)
    run.finish()
    run.release()
    assert sorted(os.listdir(output))[0] == RECORD, "beside the shards, wherever they are read"
    return Packed([str(output / shard_name(n)) for n in range(total_shards)], samples)


def jpeg(width: int) -> bytes:
    Image.new("RGB", (width, 8)).save(stream := io.BytesIO(), "JPEG")
    return stream.getvalue()


def plain(*keys: str) -> dict[str, Sample]:
    """Return a sample for each key, no two alike."""
    return {key: {"jpg": f"image {key}".encode(), "txt": f"text {key}".encode()} for key in keys}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Names that are odd, and texts in UTF-8 that is easily damaged."""
    rng = random.Random(0)
    samples = {"empty": {"jpg": b"", "txt": b""}}
    for key in NAMES:
        text = f"\ufeff{key} é\r\n\0".encode()
        samples[key] = {"jpg": rng.randbytes(rng.randrange(3_000)), "txt": text}
    return pack(tmp_path_factory.mktemp("named"), samples, 4)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Texts that, but for the first, are not UTF-8."""
    texts = [b"good", *(b"\xe9t\xe9 \xff\xfe\0" + bytes([number]) for number in range(7))]
    samples = {f"sample-{n}": {"jpg": jpeg(8), "txt": text} for n, text in enumerate(texts)}
    return pack(tmp_path_factory.mktemp("binary"), samples, 4)


@pytest.fixture(params=["named", "binary"])
def packed(request: pytest.FixtureRequest) -> Packed:
    return request.getfixturevalue(request.param)


def reader(name: str) -> ModuleType:
    """Import a reader; one that is missing skips its tests, but fails them in `make interop`."""
    if "INTEROP" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="see `make interop`", exc_type=ImportError)


def check(rows: Iterable[dict[str, Any]], expected: dict[str, Sample], dot: str = "") -> None:
    """Check that every key is found, none twice and none besides, each with all its bytes."""
    found = [(row["__key__"], {f: row[dot + f] for f in ("jpg", "txt")}) for row in rows]
    assert sorted(key for key, _ in found) == sorted(expected)
    assert [key for key, sample in found if sample != expected[key]] == []


def files(samples: dict[str, Sample]) -> list[tuple[str, bytes]]:
    """Return (name, content) of every file of the samples."""
    return sorted((f"{k}.{field}", data) for k in samples for field, data in samples[k].items())


def test_tarfile(packed: Packed) -> None:
    found = []
    for shard in packed.shards:
        with tarfile.open(shard, "r:") as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    assert sorted(found) == files(packed.samples)


def extract(packed: Packed, folder: Path, *command: str, locale: str = "C.UTF-8") -> str:
    """Extract all shards into a folder; return what was said on stderr, and "failed" if it did."""
    said = ""
    for shard in packed.shards:
        line = ["env", f"LC_ALL={locale}", *command, shard]
        run = subprocess.run(line, cwd=folder, stderr=subprocess.PIPE)
        said += run.stderr.decode() + ("failed" if run.returncode else "")
    return said


def tree(folder: Path) -> list[tuple[str, bytes]]:
    """Return (name, content) of every file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted((str(path.relative_to(folder)), path.read_bytes()) for path in paths)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_gnu_tar(packed: Packed, tmp_path: Path, locale: str) -> None:
    tar = shutil.which("gtar") or "tar"
    if b"GNU tar" not in subprocess.run([tar, "--version"], stdout=subprocess.PIPE).stdout:
        pytest.skip("GNU tar is not installed")
    assert extract(packed, tmp_path, tar, "-xf", locale=locale) == ""
    assert tree(tmp_path) == files(packed.samples)


@needs_bsdtar
def test_bsdtar(packed: Packed, tmp_path: Path) -> None:
    assert extract(packed, tmp_path, "bsdtar", "-xPf") == ""
    assert tree(tmp_path) == files(packed.samples)


@needs_bsdtar
def test_bsdtar_without_p_or_utf8_locale(tmp_path: Path) -> None:
    """It takes c: for a drive and drops it; in locale C it fails, though it extracts all."""
    said = extract(pack(tmp_path, plain("c:d", "naïve")), tmp_path, "bsdtar", "-xf", locale="C")
    assert "can't be converted from UTF-8 to current locale" in said
    assert said.endswith("failed")
    assert (tmp_path / "d.txt").read_bytes() == b"text c:d"
    assert (tmp_path / "naïve.txt").read_bytes() == "text naïve".encode()


@pytest.mark.parametrize("loader", ["WebLoader", "DataLoader"])
def test_torch_workers(packed: Packed, loader: str) -> None:
    torch_data = reader("torch.utils.data")
    module = wds if loader == "WebLoader" else torch_data
    dataset = wds.WebDataset(packed.shards, shardshuffle=False)
    check(getattr(module, loader)(dataset, batch_size=None, num_workers=2), packed.samples)


def test_webdataset_decode_needs_utf8(binary: Packed) -> None:
    with pytest.raises(wds.autodecode.DecodingError):
        list(wds.WebDataset(binary.shards, shardshuffle=False).decode())


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Packed], Any]:
    options = {"split": "train", "streaming": request.param, "cache_dir": str(tmp_path / "cache")}
    return lambda packed: reader("datasets").load_dataset(
        "webdataset", data_files=packed.shards, **options
    )


def test_datasets(load: Callable, named: Packed) -> None:
    rows = load(named).cast_column("jpg", reader("datasets").Image(decode=False))
    encoded = ({**row, "jpg": row["jpg"]["bytes"], "txt": row["txt"].encode()} for row in rows)
    check(encoded, named.samples)


def test_datasets_needs_utf8(load: Callable, binary: Packed) -> None:
    with pytest.raises(UnicodeDecodeError):
        load(binary)


def test_datasets_drops_fields_that_come_late(load: Callable, tmp_path: Path) -> None:
    """It takes the fields of the first five samples for those of all, and these must agree."""
    for having in (5, 4):
        folder = tmp_path / str(having)
        (folder / "source").mkdir(parents=True)
        for number in range(6):
            (folder / "source" / f"{number}.txt").write_text("text")
        (folder / "source" / f"{having}.json").write_text("{}")
        create_webdataset(folder / "source", folder / "o", 0, 1, "txt", optional_fields="json")
        packed = Packed([str(folder / "o" / shard_name(0))], {})
        if having == 5:
            assert [set(row) for row in load(packed)] == [{"__key__", "__url__", "txt"}] * 6
        else:
            with pytest.raises(ValueError, match="don't share the same prefix or the same types"):
                load(packed)


def test_datasets_prefers_local_images(load: Callable, tmp_path: Path, monkeypatch: Any) -> None:
    """It tries `<key>.jpg` as a path first, so whoever runs it in the source reads the source."""
    packed = pack(tmp_path, {"a": {"jpg": jpeg(8), "txt": b""}})
    (tmp_path / "a.jpg").write_bytes(jpeg(16))
    monkeypatch.chdir(tmp_path)
    assert [row["jpg"].width for row in load(packed)] == [16]


def test_datasets_unpacks_compressed_fields(load: Callable, tmp_path: Path) -> None:
    packed = pack(tmp_path, {"a": {"txt.gz": gzip.compress(b"hello")}})
    assert [row["txt.gz"] for row in load(packed)] == ["hello"]


def wids_rows(shards: Any, cache: Path) -> Iterator[dict[str, Any]]:
    dataset = reader("wids").ShardListDataset(shards, cache_dir=str(cache), transformations=[])
    for row in map(dataset.__getitem__, range(len(dataset))):
        yield {field: row[field].read() if field[0] == "." else row[field] for field in row}


def test_wids(named: Packed, tmp_path: Path) -> None:
    reader("wids")
    keys = [k for k in NAMES if k.isascii() and len(k) <= 96 and "\n" not in k]
    packed = pack(tmp_path, {key: named.samples[key] for key in keys}, 4)
    widsindex, index = Path(sys.executable).with_name("widsindex"), str(tmp_path / "index.json")
    done = subprocess.run([widsindex, "create", *packed.shards, "--output", index])
    Path("/tmp/shard.tar").unlink(missing_ok=True)  # to which widsindex copies each shard
    assert done.returncode == 0
    check(wids_rows(index, tmp_path / "cache"), packed.samples, dot=".")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["a", "naïve", "z"], ["a.jpg.txt", "na?ve.jpg.txt", "z.jpg.txt"]),
        (["a", "m" * 97], ["a.jpg.txt", "m" * 97 + ".jp.tx"]),
        (["a", "m" * 100, "y", "z"], ["a.jpg.txt", "AssertionError"]),
        (["d/ключ", "d/тест", "e"], ["d/????.jpg.txt", "d/????.jpg.txt"]),
    ],
    ids=["not-ascii", "extension-cut", "too-long", "alike"],
)
def test_wids_sees_100_ascii_bytes(tmp_path: Path, keys: list[str], found: list[str]) -> None:
    """Names alike in what wids sees hide what follows in their shard: y and z, then e, are lost."""
    wids, seen = reader("wids.wids"), []
    try:
        samples = wids.IndexedTarSamples(path=pack(tmp_path, plain(*keys)).shards[0])
        for row in map(samples.__getitem__, range(len(samples))):
            seen.append("".join([row["__key__"], *(field for field in row if field[0] == ".")]))
    except (AssertionError, AttributeError) as error:
        seen.append(type(error).__name__)
    assert seen == found


def test_wids_reads_a_rebuilt_shard_from_its_cache(tmp_path: Path) -> None:
    for text in (b"old", b"new"):
        packed = pack(tmp_path, {"a": {"jpg": b"", "txt": text}})
        rows = wids_rows([{"url": packed.shards[0], "nsamples": 1}], tmp_path / "cache")
        assert [row[".txt"] for row in rows] == [b"old"]


def energon_rows(packed: Packed, folder: Path, decode: bool) -> list[dict[str, Any]]:
    """Prepare a copy of a dataset, for Energon puts its index among the shards, and read it."""
    energon = reader("megatron.energon")
    shutil.copytree(Path(packed.shards[0]).parent, folder := folder / "copy")
    options = ["--non-interactive", "--split-ratio=0,1,0", "--sample-type=CrudeWebdataset"]
    command = [Path(sys.executable).with_name("energon"), "prepare", *options, "--num-workers=2"]
    subprocess.run([*command, folder], check=True)
    encoder = energon.DefaultTaskEncoder()
    encoder.cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]
    encoder.decoder = encoder.decoder if decode else None
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=2)
    dataset = energon.get_val_dataset(
        folder, worker_config=workers, batch_size=None, task_encoder=encoder
    )
    return list(energon.get_loader(dataset))


def test_energon(packed: Packed, tmp_path: Path) -> None:
    check(energon_rows(packed, tmp_path, decode=False), packed.samples)


def test_energon_decoder_passes_over_text_that_is_not_utf8(binary: Packed, tmp_path: Path) -> None:
    assert [row["txt"] for row in energon_rows(binary, tmp_path, decode=True)] == ["good"]


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One local Ray for all; its tests are the last, since others fork and Ray brings threads."""
    reader("ray.data")
    ray = reader("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_ray(ray: ModuleType, packed: Packed) -> None:
    for paths in (packed.shards, str(Path(packed.shards[0]).parent)):
        check(ray.data.read_webdataset(paths, decoder=None).take_all(), packed.samples)


def test_ray_decoder_needs_utf8(ray: ModuleType, binary: Packed) -> None:
    with pytest.raises(UnicodeDecodeError):
        ray.data.read_webdataset(binary.shards, suffixes=["txt"]).take_all()
