"""Hints at other fields: each is followed, as a user would, and what it packs is looked at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import members, touch

import create_webdataset as core
from sharding import hints
from sharding.errors import InputError
from sharding.listing import list_samples


@pytest.mark.parametrize(
    ("fields", "names", "hint"),
    [
        ("jpg,png,txt", ["a.jpg", "a.txt", "b.png", "b.txt"], '"jpg;png,txt"'),
        ("jpg,txt", ["a.jpg", "a.txt", "b.png", "b.txt"], '"jpg;png,txt"'),
        ("jpg,txt", ["b.png", "b.txt"], '"png,txt"'),
    ],
)
def test_hints(fields: str, names: list[str], hint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=hint):
        list_samples(touch(tmp_path, *names), fields)


def test_hints_that_work_when_followed(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    touch(one, "a.jpg", "a.txt", "c.jpg", "d.json")
    with pytest.raises(InputError) as caught:
        list_samples(one, optional_fields="json")
    assert "files are there" not in str(caught.value), "json is known already"
    touch(two, "a.jpg", "a.caption.md")
    with pytest.raises(InputError, match=r'fields "jpg,caption\.md"'):
        list_samples(two)
    assert len(list_samples(two, "jpg,caption.md").samples) == 1
    touch(three, "7.jpg", "7.txt", "7.seg.jpg", "8.jpg", "8.txt")
    with pytest.raises(InputError, match=r"or optional_fields seg\.jpg"):
        list_samples(three)
    assert len(list_samples(three, optional_fields="seg.jpg").samples) == 2


def hint_of(source: Path, fields: str = "jpg,txt") -> str:
    """Return what is said after the cure, of a source that is refused."""
    with pytest.raises(InputError) as caught:
        list_samples(source, fields)
    (line,) = (li for li in str(caught.value).split("\n") if "lack a field" in li or "has no" in li)
    return line


def test_no_hint_rather_than_a_bad_one(tmp_path: Path) -> None:
    """Each of these used to be told fields that pack half samples, or none."""
    pictures = [f"{n}.jpg" for n in range(30)]
    for number, (names, left) in enumerate(
        {
            ("captions.csv", *pictures): ".csv",
            ("a.tar", "b.tar", *pictures): ".tar",
            ("data/part-0.parquet", *pictures): ".parquet",
            ("a.tar", "b.tar"): ".tar",
            ("x.jpeg", "x.webp", "y.jpeg", "y.webp", "notes.md"): ".md",
            (*pictures, *(f"{n}.json" for n in range(10))): ".json",
        }.items()
    ):
        for fields in ("jpg,txt", "jpg,txt,cls"):
            said = hint_of(touch(tmp_path / f"{number}", *names), fields)
            assert 'fields "' not in said and left in said, said
            assert ("link_pairs.py" in said) == (left == ".csv")


def follow(source: Path, output: Path, said: str) -> dict[str, bytes]:
    """Pack with the fields that a hint names, as a user would; return the members."""
    found = re.search(r'fields "([^"]*)"\?', said)
    assert found, said
    flags = [f"--source={source}", f"--output={output}", f"--fields={found[1]}"]
    assert core.main([*flags, "--shard-id=0", "--total-shards=1", "--skip-bad"]) == 0
    return members(output / "shard-000000.tar")


FOLLOWED = [
    # stems and the extensions of each, fields, what is packed of each, what is said
    ({"abc": "jpeg txt", "d": "jpg txt"}, "jpg,txt", "jpeg jpg txt", "3)"),
    ({"abc": "png caption json"}, "jpg,txt", "png caption", "3, 3)"),
    ({"abc": "wav txt"}, "jpg,txt", "wav txt", "3)"),
    ({"abcdef": "jpg txt", "gh": "jpg"}, "jpg,txt,cls", "jpg txt", "no .cls is there"),
    ({"abc": "jpeg"}, "jpg,txt", "jpeg", ".jpeg files are there"),
    ({"abc": "jpg"}, "jpg,txt", "jpg", "no .txt is there"),
    ({"abc": "jpg txt", "def": "jpg caption"}, "jpg,txt", "jpg txt caption", "3)"),
    ({"abc": "jpg txt", "def": "png txt"}, "jpg,png,txt", "jpg png txt", "jpg;png"),
    ({"abcdefg": "png txt", "h": "png", "i": "txt"}, "jpg,txt", "png txt", "(7 of 9 complete)"),
    ({"abc": "JPEG TXT"}, "jpg,txt", "jpeg txt", "3)"),
]  # fmt: skip


@pytest.mark.parametrize(("stems", "fields", "expected", "said"), FOLLOWED)
def test_hints_are_followed(stems, fields: str, expected: str, said: str, tmp_path: Path) -> None:
    names = [f"{stem}.{e}" for many, kind in stems.items() for stem in many for e in kind.split()]
    source = touch(tmp_path / "source", *names)
    hint = hint_of(source, fields)
    assert said in hint
    whole = {name.lower() for name in names if name.lower().split(".")[1] in expected.split()}
    if "complete)" in said:
        whole -= {"h.png", "i.txt"}
    if fields.endswith("cls"):
        whole -= {"g.jpg", "h.jpg"}
    assert follow(source, tmp_path / "o", hint).keys() == whole


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(
    "pair",
    [
        ("images/{}.jpg", "captions/{}.txt"),
        ("images/cats/{}.jpg", "captions/cats/{}.txt"),
        ("cats/images/{}.jpg", "cats/captions/{}.txt"),
        ("images/{}.png", "captions/{}.caption"),
    ],
)
def test_pictures_and_captions_apart(pair, many: bool, tmp_path: Path, monkeypatch) -> None:
    if many:
        monkeypatch.setattr(hints, "MAX_STEMS", 20)
    source = touch(tmp_path / "source", *(one.format(n) for n in range(300) for one in pair))
    said = hint_of(source)
    example = re.search(
        r"; ('[^']*/(\d+)\.[a-z]+') and ('[^']*/(\d+)\.[a-z]+') are in different folders: py", said
    )
    assert example and example[2] == example[4] and "jpg;txt" not in said, said
    assert ('fields "png,caption"?' in said) == (pair[0].endswith("png")), said
    (tmp_path / "links").mkdir()
    for path in source.rglob("*.*"):  # as it says
        (tmp_path / "links" / path.name).symlink_to(path)
    fields = "png,caption" if pair[0].endswith("png") else "jpg,txt"
    assert len(list_samples(tmp_path / "links", fields).samples) == 300


def test_class_folders_are_not_apart(tmp_path: Path) -> None:
    names = [f"{folder}/{n}.{f}" for folder, f in (("cats", "jpg"), ("dogs", "jpg"), ("t", "txt"))
             for n in range(30)]  # fmt: skip
    assert "apart" not in hint_of(touch(tmp_path, *names))


def test_an_optional_field_that_would_hide_pictures(tmp_path: Path) -> None:
    """A single dotted name is seldom a field."""
    source = touch(tmp_path, "a.jpg", "a.txt", "photo.2020.jpg")
    with pytest.raises(InputError) as caught:
        list_samples(source)
    assert "optional_fields" not in str(caught.value)


def test_many_loose_names_are_cheap(monkeypatch) -> None:
    monkeypatch.setattr(hints, "MAX_STEMS", 100)
    loose = hints.Loose()
    for number in range(20_000):
        loose.add(f"a/{number}", ("png",))
        loose.add(f"b/{number}", ("txt",))
        loose.add("note", (str(number),))
    assert len(loose.stems) <= 100 and all(len(kind) <= 16 for kind in loose.stems.values())
    assert abs(loose.kinds([])[("png",)] - 20_000) < 5_000
    assert {s[2:] for s in loose.stems if s[0] == "a"} == {
        s[2:] for s in loose.stems if s[0] == "b"
    }
