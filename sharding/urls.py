"""Which paths are URLs, and of which stores; no other module looks for "://" in a path."""

from __future__ import annotations

import os
import re

from sharding.errors import InputError
from sharding.messages import argument

SCHEMES = ("s3", "az", "gs")  # bucket/schemes.py has a class for each
WRITABLE = SCHEMES[:2]
# How help and messages name those that can be read, and those that can be written to.
URL, OUTPUT_URL = (f"URL ({', '.join(f'{s}://' for s in some)})" for some in (SCHEMES, WRITABLE))

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://")
_AZURE_HOST = r"([a-z0-9]+)[.](?:blob|dfs)[.]core[.]windows[.]net"
# What others call a place in a store that is supported -> how it is written here.
_OTHER_NAMES = {
    rf"https?://{_AZURE_HOST}/([^/?]+)(/[^?]*)?.*": (
        r"az://\2\3, and set AZURE_STORAGE_ACCOUNT_NAME=\1"
    ),
    rf"(?:abfss?|wasbs?)://([^/@]+)@{_AZURE_HOST}(/.*)?": (
        r"az://\1\3, and set AZURE_STORAGE_ACCOUNT_NAME=\2"
    ),
    r"(?:abfss?|adl|azure)://([^@]*)": r"az://\1",
    r"gcs://(.*)": r"gs://\1",
    r"https://storage[.](?:googleapis|cloud[.]google)[.]com/([^?]+).*": r"gs://\1",
    r"s3[an]://(.*)": r"s3://\1",
}


def is_url(path: str | os.PathLike[str], name: str = "") -> bool:
    """Tell whether a path is a URL of a bucket.

    Args:
        name: of the argument that gave it, for the error, and since not all can be written to.

    Raises:
        InputError: it is another URL; it would become a folder of that name.
    """
    text = os.fspath(path)
    found = _URL.match(text)
    which = f"{argument(name)} " if name else ""
    if not found:
        short = next((scheme for scheme in SCHEMES if text.startswith(f"{scheme}:/")), None)
        if short:
            raise InputError(f"{which}{text!r}: give {short}://BUCKET/KEY, with two slashes")
        return False
    if found[1] not in SCHEMES:
        cure = next(filter(None, map(_other_name, _OTHER_NAMES, [text] * len(_OTHER_NAMES))), "")
        cure = cure or f"give a folder or a {OUTPUT_URL if name == 'output' else URL}"
        raise InputError(f"{which}{_public(text)!r}: such URLs are not supported; {cure}")
    if name == "output" and found[1] not in WRITABLE:
        raise InputError(
            f"{which}{text!r}: {found[1]}:// is only read here: no server that can be tested has "
            "the conditional writes that keep two runs apart; pack into a folder, and copy that"
        )
    return True


def _other_name(pattern: str, text: str) -> str:
    """Return what to give in place of a URL that others know, if this pattern is of it."""
    match = re.fullmatch(pattern, text, re.DOTALL)
    return f"give {match.expand(_OTHER_NAMES[pattern])}" if match else ""


def _public(url: str) -> str:
    """Return a URL without its query, which may be a secret: Azure's tokens stand there."""
    return url.partition("?")[0]


def canonical(path: str | os.PathLike[str]) -> str:
    """Return a path that means the same in any process."""
    return os.fspath(path).rstrip("/") if is_url(path) else os.path.abspath(path)


def real(path: str | os.PathLike[str]) -> str:
    """Return a path with no link in it; a URL as it is."""
    return os.fspath(path) if is_url(path) else os.path.realpath(path)


def names_archives(path: str | os.PathLike[str]) -> bool:
    """Tell whether a source is a set of archives: a path, a pattern or braces that end in .tar."""
    name = without_slash(path)
    return name.endswith(".tar") and (is_url(path) or not os.path.isdir(path))


def expand_braces(pattern: str, name: str) -> list[str]:
    """Return what braces stand for, as webdataset reads them: "{old,new}/shard-{00..31}.tar".

    Args:
        name: of the argument that gave it, for the error.
    """
    if "{" not in pattern or (not is_url(pattern) and os.path.lexists(pattern)):
        return [pattern]
    from braceexpand import braceexpand

    try:
        found = list(dict.fromkeys(braceexpand(pattern)))
    except ValueError:
        raise InputError(f"{argument(name)} {pattern!r}: its braces do not match") from None
    # `canonical` could not tell where such a pattern begins.
    if any(is_url(one) != is_url(pattern) or one[:1] == "/" != pattern[:1] for one in found):
        raise InputError(f"{argument(name)} {pattern!r}: write / or the scheme before the braces")
    return found


def nothing_matches(name: str, pattern: str, one: str, why: str = "") -> InputError:
    """Return the error that a pattern, or one of its alternatives, names no file."""
    which = f": {one!r}" if one != pattern else ""
    return InputError(f"{argument(name)} {pattern!r}: No such file{which}{why}")


def without_slash(path: str | os.PathLike[str]) -> str:
    """Return a path as it is; a URL without a slash at its end."""
    return canonical(path) if is_url(path) else os.fspath(path)


def refuse_url(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a URL where a local path is wanted."""
    if _URL.match(os.fspath(path)):
        raise InputError(f"{argument(name)} {path!r}: a URL cannot be used here; give a local path")
