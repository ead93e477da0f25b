"""The plan of a run: every sample comes back, shard by shard, and damage is named."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import PackError
from sharding.folder.staging import read_plan, read_samples, write_plan
from sharding.plan import PLAN, Plan, load_samples
from sharding.samples import Sample, Samples, deal

KEYS = st.text('a/[,"\r\x85\u2028é ', min_size=1, max_size=6)
EXTENSIONS = st.lists(st.text("JPGjpg\x01", min_size=1, max_size=3), min_size=1, max_size=2)
SAMPLES = st.builds(
    lambda key, stem, extensions: Sample(key, stem or key, tuple(extensions)),
    KEYS,
    st.one_of(st.none(), KEYS),
    EXTENSIONS,
)


def plan_of(samples: Samples, total: int = 3) -> Plan:
    return Plan("a\nb", "jpg", total, len(samples), {}, {".x": 2}, 0.5, "host", 7)


@given(st.lists(SAMPLES, min_size=1, max_size=20, unique_by=lambda s: s.key), st.integers(1, 4))
def test_every_sample_comes_back(some: list[Sample], total: int) -> None:
    samples = Samples.of(some)
    with tempfile.TemporaryDirectory() as folder:
        plan = write_plan(folder, plan_of(samples, total), samples)
        assert read_plan(folder) == plan
        for shard_id in range(total):
            assert read_samples(folder, shard_id) == deal(samples, shard_id, total)


def test_the_digest_tells_samples_apart(tmp_path: Path) -> None:
    one, two = Sample("a", "a", ("jpg",)), Sample("b", "b", ("jpg",))
    lists = ([one, two], [two, one], [one], [one, two._replace(extensions=("JPG",))])
    renamed = [sample._replace(extensions=("png",)) for sample in (one, two)]
    lists += (renamed,)  # with "jpg;png", another member in the same shard

    def digest(some: list[Sample]) -> str:
        samples = Samples.of(some)
        return write_plan(str(tmp_path), plan_of(samples), samples).digest

    digests = set(map(digest, lists))
    again = digest([one, two])
    assert len(digests) == 5 and again in digests


@pytest.mark.parametrize("content", ["", "{}", "5", "[1]", '{"source": 1}', None])
def test_damage_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PLAN).write_text(content)
    message = "plan' is gone" if content is None else "plan' cannot be read; to give up that run"
    with pytest.raises(PackError, match=message):
        read_plan(str(tmp_path))
    with pytest.raises(PackError, match=message):
        read_samples(str(tmp_path), 0)


def test_a_damaged_plan_in_a_bucket() -> None:
    with pytest.raises(PackError, match="remove it and all objects beside it"):
        load_samples(
            io.BytesIO(b"{}"), 0, "s3://photos/.webdataset-plan", "it and all objects beside it"
        )
