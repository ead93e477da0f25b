"""From names to samples: the rule of keys, fields, the order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from sharding import scan
from sharding.errors import InputError
from sharding.faults import ALTERNATIVES, BAD_NAME, DOUBLED, INCOMPLETE, RESERVED
from sharding.listing import list_samples
from sharding.samples import judge, name_fault, parse_fields, split_name


@given(st.one_of(st.text(), st.text("a./\n_", max_size=9)))
@settings(max_examples=1_000)
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    assert split_name(name) == base_plus_ext(name)


@pytest.mark.parametrize("fields", ["jpg,txt", "TXT,jpg", ("txt", "jpg"), ["JPG", "txt"]])
def test_fields_as_a_caller_gives_them(fields, tmp_path: Path) -> None:
    assert parse_fields(fields).required == (("jpg",), ("txt",))
    assert len(list_samples(write_pairs(tmp_path, 3), fields).samples) == 3


def test_one_field_is_no_list_of_letters(tmp_path: Path) -> None:
    assert list_samples(write_pairs(tmp_path, 3), "jpg").samples[0].extensions == ("jpg",)


@pytest.mark.parametrize(
    ("extensions", "verdict"),
    [
        (("jpg", "txt"), (None, ())),
        (("PNG", "Txt"), (None, ())),
        (("json", "png", "txt"), (None, ())),
        (("jpg",), (INCOMPLETE, ("txt",))),
        (("txt",), (INCOMPLETE, ("jpg;png",))),
        ((), (INCOMPLETE, ("jpg;png", "txt"))),
        (("jpg", "png", "txt"), (ALTERNATIVES, ("jpg", "png"))),
        (("cls", "jpg", "json", "txt"), (ALTERNATIVES, ("cls", "json"))),
        (("JPG", "jpg", "txt"), (DOUBLED, ("jpg",))),
        (("JPG", "jpg"), (DOUBLED, ("jpg",))),
    ],
)
def test_what_is_wrong_with_a_stem(extensions, verdict) -> None:
    assert judge(extensions, parse_fields("png;jpg,txt", "json;cls")) == verdict


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("__a", RESERVED),
        ("d/__a", RESERVED),
        ("__d__/a", RESERVED),
        ("__d/a", None),
        ("__d__e/a", None),
        ("d/__e__/a", None),
        ("_a", None),
        ("a__", None),
        ("a\n", BAD_NAME),
        ("d\n/a", BAD_NAME),
        ("\udcff", BAD_NAME),
        ("\xe9", None),
    ],
)
def test_names_that_readers_lose(key: str, fault) -> None:
    assert name_fault(key, key.rpartition("/")[2]) == fault


def test_the_table_of_extensions_stays_small(tmp_path: Path, monkeypatch) -> None:
    """As with millions of `name.<number>`."""
    monkeypatch.setattr(scan, "MAX_GROWN", 10)
    write_pairs(tmp_path, 5)
    for number in range(100):
        (tmp_path / f"note.{number}").touch()
    found = list_samples(tmp_path)
    assert len(found.samples) == 5 and sum(found.ignored.values()) == 100
    assert len(found.ignored) == 12 and found.ignored["of other extensions"] == 89


def test_shuffle_is_a_permutation_that_the_seed_decides(source_1003: Path) -> None:
    plain = list_samples(source_1003).samples
    first, again, other = (list_samples(source_1003, shuffle=seed).samples for seed in (1, 1, 2))
    assert first == again != other
    assert plain != first
    assert plain == sorted(first) == sorted(other)
    assert [sample.key for sample in list_samples(source_1003, shuffle=7).samples[:3]] == [
        "sample-137",
        "sample-993",
        "sample-268",
    ], "the order must never change: people rely on it"


NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))


@given(st.lists(NAME, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_is_split_back(tmp_path_factory, parts: list[str]) -> None:
    """Any path is refused, or ignored, or readers split its member into the same key and field."""
    source = tmp_path_factory.mktemp("s")
    path = source.joinpath(*parts[:-1], parts[-1] + ".x.JPG"[len(parts[0]) % 2 * 2 :])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    try:
        (sample,) = list_samples(source, ("jpg",)).samples
    except InputError:
        return
    (file,), (member,) = sample.files(), sample.members()
    assert source / file == path
    assert base_plus_ext(member) == (sample.key, "jpg")
