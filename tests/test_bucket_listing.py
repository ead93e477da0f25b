"""Listing a bucket: prefixes side by side, each object once, whatever the tree."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from conftest import KEYS, Bucket, of_s3
from obstore.exceptions import PermissionDeniedError
from proxy import Request, start_proxy

from sharding.bucket import store, walk
from sharding.bucket.store import version_of
from sharding.errors import InputError
from sharding.faults import open_report
from sharding.listing import list_samples

NAMES = [
    "a",
    "a!",
    "a-b",
    "a.b",
    "a b",
    "0",
    "~",
    "é",
    "e\u0301",
    "日本",
    "a%2Fb",
    "a#b",
    "a?b",
    ".h",
]


def put_all(bucket: Bucket, *keys: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: bucket.put(key, key.encode()), keys))


def listed(bucket: Bucket, below: str = "") -> Counter[tuple[str, bool, str]]:
    """Return what is at a prefix, as one plain listing of obstore's has it."""
    prefix = f"{bucket.prefix}/{below}".rstrip("/")
    items = [item for page in obstore.list(bucket.store, prefix) for item in page]
    return Counter((i["path"][len(prefix) + 1 :], i["size"] > 0, version_of(i)) for i in items)


class Slow:
    """A proxy that answers late, and what it saw."""

    def __init__(self) -> None:
        self.seconds, self.lock = 0.0, threading.Lock()
        self.asked: list[str] = []
        self.now = self.most = 0
        server = os.environ["AWS_ENDPOINT_URL"]
        self.url = start_proxy(server, KEYS["AWS_SECRET_ACCESS_KEY"], self.lie)

    def lie(self, request: Request) -> None:
        with self.lock:
            self.asked.append(request.path)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1


@pytest.fixture
def slow(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Lead all requests of the project through a proxy."""
    assert bucket.url  # so that the environment leads to the server
    proxy = Slow()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store._connect.cache_clear()
    yield proxy
    store._connect.cache_clear()


def untidy(rng: random.Random, deep: int, number: int) -> list[str]:
    """Return keys of a tree: even or not, with files beside folders, and with markers."""
    keys: list[str] = []
    places = [""]
    while len(places) < 30:
        place = rng.choice(places)
        if place.count("/") < deep:
            places.append(f"{place}{rng.choice(NAMES)}{len(places)}/")
    for place in places:
        for n in range(rng.choice([0, 1, 2, number])):
            keys += [f"{place}{rng.choice(NAMES)}{n}.{field}" for field in ("jpg", "txt")]
    return list(dict.fromkeys(keys)) + [place for place in places[1:] if rng.random() < 0.2]


@pytest.mark.parametrize("page", [1, 3, 20, 1_000])
def test_each_object_once(page: int, bucket: Bucket, monkeypatch) -> None:
    monkeypatch.setattr(walk, "PAGE", page)
    for seed, (large, few) in enumerate([(10, 64), (1, 2), (0, 0)]):
        keys = untidy(random.Random(seed), seed + 1, 12)
        put_all(bucket, *(f"{seed}/{key}" for key in keys))
        monkeypatch.setattr(walk, "LARGE", large)
        monkeypatch.setattr(walk, "FEW", few)
        url = f"{bucket.url}/{seed}"
        pages = list(walk._Prefixes(url).pages())
        expected = listed(bucket, f"{seed}/")
        assert len(expected) > 80 and Counter(one for page in pages for one in page) == expected
        assert max(expected.values()) == 1
    deadline = time.monotonic() + 5
    while any("_work" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline


@of_s3
def test_prefixes_are_listed_side_by_side(bucket: Bucket, slow: Slow, monkeypatch) -> None:
    """Where the first page shows folders; one of them that holds more is split again."""
    keys = [f"{p:02d}/{n}.{f}" for p in range(24) for n in range(3) for f in ("jpg", "txt")]
    put_all(bucket, *keys, *(f"05/{p:02d}/x.{f}" for p in range(24) for f in ("jpg", "txt")))
    monkeypatch.setattr(walk, "PAGE", 5)
    slow.seconds = 0.1
    began = time.monotonic()
    assert len(list_samples(bucket.url).samples) == 96
    assert slow.most >= 16 and len(slow.asked) < 120, (slow.most, slow.asked)
    assert time.monotonic() - began < 2.5
    assert slow.most <= walk.SIDE_BY_SIDE


@of_s3
def test_a_flat_prefix_is_listed_as_before(bucket: Bucket, slow: Slow) -> None:
    """A page after the other; no list with a delimiter, which obstore would hold whole."""
    put_all(bucket, *(f"{n:04d}.{field}" for n in range(600) for field in ("jpg", "txt")))
    assert len(list_samples(bucket.url).samples) == 600
    assert len(slow.asked) == 3 and not any("delimiter" in path for path in slow.asked)


@of_s3
def test_many_files_beside_a_folder(bucket: Bucket, slow: Slow, monkeypatch) -> None:
    """A list of what is right below a prefix is given up once it proves long."""
    put_all(bucket, "0/a.jpg", "0/a.txt")
    put_all(bucket, *(f"{n:04d}.{field}" for n in range(1_600) for field in ("jpg", "txt")))
    slow.seconds = 0.2
    monkeypatch.setattr(walk, "LONGEST", 1.5)
    assert len(list_samples(bucket.url).samples) == 1_601
    assert 2 <= sum("delimiter" in path for path in slow.asked) <= 3 < len(slow.asked)


def test_the_report_says_the_same(bucket: Bucket, tmp_path, monkeypatch) -> None:
    keys = [f"{p}/{n}.{f}" for p in range(6) for n in range(4) for f in ("jpg", "txt", "md")]
    put_all(bucket, *keys, *(f"{p}/x.jpg" for p in range(6)), *(f"{p}/p.1.jpg" for p in range(3)))
    found = []
    for page in (1_000, 4):
        monkeypatch.setattr(walk, "PAGE", page)
        with open_report(str(tmp_path / "report")) as report:
            listing = list_samples(bucket.url, skip_bad=True, report=report)
        with pytest.raises(InputError) as caught:
            list_samples(bucket.url)
        lines = sorted((tmp_path / "report").read_text().splitlines())
        found.append((list(listing.samples), listing.ignored, str(caught.value), lines))
    assert found[0] == found[1] and len(found[0][3]) == 33


def test_an_error_in_a_prefix_ends_all(bucket: Bucket, monkeypatch) -> None:
    put_all(bucket, *(f"{p}/{n}.{f}" for p in range(9) for n in range(4) for f in ("jpg", "txt")))
    monkeypatch.setattr(walk, "PAGE", 4)
    whole = obstore.list

    def failing(store, prefix, **options):
        if prefix.endswith("/7"):
            raise PermissionDeniedError("no")
        return whole(store, prefix, **options)

    monkeypatch.setattr(obstore, "list", failing)
    with pytest.raises(InputError, match="the store says 403"):
        list_samples(bucket.url)
