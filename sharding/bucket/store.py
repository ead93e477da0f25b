"""A connection to an object store: time limits, errors in one line; see schemes.py for which.

A URL is "s3://bucket/key", or has another scheme. Uses obstore's native API
(https://developmentseed.org/obstore); without it, `import` says how to install it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from sharding.bucket.schemes import NO_OBJECT, Scheme, Store, scheme_of
from sharding.errors import InputError, PackError, StopRun
from sharding.shards import REPLACED

T = TypeVar("T")
# Seconds: for a request with its body, for its retries, and for each of the two in a first probe.
REQUEST_TIME, RETRY_TIME, PROBE_TIME = 60, 120, 20
# obstore's own classes for some of the answers.
_STATUS: dict[type[Exception], str] = {
    UnauthenticatedError: "401",
    PermissionDeniedError: "403",
    FileNotFoundError: "404",
    AlreadyExistsError: "409",
    PreconditionError: "412",
}
_used_by: int | None = None  # id of the process that was first to use a store


def split(url: str) -> tuple[str, str]:
    """Return bucket and key: "s3://photos/raw/" -> ("s3://photos", "raw").

    Raises:
        InputError: it names no bucket, or a key that cannot be named.
    """
    scheme = scheme_of(url)
    bucket, _, key = url[len(scheme.prefix) :].partition("/")
    key = key.rstrip("/")
    if not bucket:
        raise InputError(f"{url!r} names no {scheme.bucket}; write {scheme.where}")
    odd = key and not set(key.split("/")).isdisjoint(("", ".", ".."))
    if odd or not f"a{key}".isprintable():
        raise InputError(f"{url!r}: a key can have no empty part, '.', '..' or control character")
    return scheme.prefix + bucket, key


def connect(bucket: str, patient: bool = True) -> Store:
    """Return the store of a bucket, whose paths are whole keys.

    Args:
        bucket: as `split` gives it.
        patient: retry for two minutes; else for a few seconds, to find out what does not work.

    Raises:
        PackError: this process was forked from one that had used a store; requests would hang.
    """
    global _used_by
    if _used_by not in (None, os.getpid()):
        raise PackError(
            "this process was forked from one that had used a bucket, so it cannot use any; "
            'start workers anew: DataLoader(..., multiprocessing_context="spawn")'
        )
    _used_by = os.getpid()
    return _connect(bucket, patient)


@functools.lru_cache(maxsize=16)
def _connect(bucket: str, patient: bool) -> Store:
    scheme = scheme_of(bucket)
    http = scheme.endpoint().startswith("http:")
    client: Any = {"connect_timeout": "5s", "allow_http": http}
    client["timeout"] = f"{REQUEST_TIME if patient else PROBE_TIME}s"
    retry: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=PROBE_TIME)}
    if patient:  # obstore's own ten retries are over in a few seconds
        backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10)}
        retry = {"max_retries": 1_000, "retry_timeout": timedelta(seconds=RETRY_TIME)}
        retry["backoff"] = {**backoff, "base": 2}
    name = bucket[len(scheme.prefix) :]
    return scheme.open(name, client_options=client, retry_config=retry)


@contextlib.contextmanager
def saying(
    url: str,
    kind: type[Exception] = PackError,
    also: type[Exception] = BaseError,
) -> Iterator[None]:
    """Turn what goes wrong with a store into an error of one line that names the URL.

    obstore's own text goes on to describe the whole request; that never appears here.

    Args:
        kind: of the error; `PackError` becomes `StopRun` if the store does not answer at all.
        also: another error that is the store's: a writer of obstore's raises OSError.
    """
    try:
        yield
    except (InputError, PackError):
        raise
    except (BaseError, FileNotFoundError, PermissionError, also) as error:
        reason, silent = _reason(scheme_of(url), error)
        raise (StopRun if silent and kind is PackError else kind)(f"{url!r}: {reason}") from None


def insist(url: str, call: Callable[[], T]) -> T:
    """Return what a request gives; ask again where obstore does not: when a connection breaks."""
    began = time.monotonic()
    while True:
        try:
            with saying(url):
                return call()
        except StopRun:
            if time.monotonic() - began > RETRY_TIME:
                raise
            time.sleep(1)


def _reason(scheme: Scheme, error: BaseException) -> tuple[str, bool]:
    """Return what an error of obstore's means, and whether the store gave no answer.

    Its class tells, where there is one for that. Much has none: a listing raises GenericError
    whatever the status, a writer OSError, and the code in the body of an answer, which alone tells
    a wrong key from a wrong secret, stands in the text and nowhere else. So the rest is read there.
    """
    text = str(error)
    if isinstance(error, InvalidPathError):
        key = re.search('ath "([^"]*)"', text)
        which = f"the key {key[1]!r}" if key else "a key"
        return f"{which} has an empty part, '.', '..' or a control character; rename it", False
    if "169.254.169.254" in text or "CredentialsError" in text:
        return f"no credentials; {scheme.credentials}", False
    if "token request" in text:
        return f"no token is given for the credentials; {scheme.credentials}", False
    status = status_of(error)
    if code := re.search("<Code>(\\w+)</Code>", text):
        return scheme.cures.get(code[1], f"the store says {code[1]}"), status[:1] == "5"
    if status in ("404", "416"):
        return NO_OBJECT if status == "404" else REPLACED, False
    if status or "HTTP error" in text or "error sending request" in text:
        return _blame(scheme, text, status), status[:1] in ("", "5")
    if "non-partial response" in text:
        return "the store ignores ranges of an object", False
    words = next((words for words in scheme.cures if " " in words and words in text), None)
    own = re.split(r"[\n:]", re.sub("^Generic \\w+ error: ", "", text))[0]
    return scheme.cures[words] if words else own, False


def status_of(error: BaseException) -> str:
    """Return the status of the answer that an error is about; "" if there was none."""
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), "")
    found = None if status else re.search(r"status code: (\d+)", str(error))
    return found[1] if found else status


def _blame(scheme: Scheme, text: str, status: str) -> str:
    """Return who gave no answer that is a store's, and what to do: the store, or a proxy."""
    store, proxy = _host(scheme.endpoint() or scheme.usual()), _proxy(scheme, text)
    which = f"the store, or {proxy}," if proxy else "the store"
    if status == "407" or "ProxyAuth" in text:
        return f"{proxy or 'a proxy'} asks for a user name and a password"
    if status in ("301", "400") and scheme.misplaced:
        return f"{which} says {status}; {scheme.misplaced}"
    if status:
        cure = f"; {scheme.credentials}" if status in ("401", "403") else ""
        return f"{which} says {status}{cure}"
    if not proxy:
        return f"{store} does not answer; check {scheme.check} and the network"
    fails = f"does not connect to {store}" if "TunnelUnsuccessful" in text else "does not answer"
    return f"{proxy} {fails}; check it, or add the store's host to NO_PROXY"


def _proxy(scheme: Scheme, text: str) -> str:
    """Return the proxy that requests go by, if any: "the proxy HOST:PORT (HTTPS_PROXY)".

    Args:
        text: of an error; it may tell which address was tried.
    """
    from urllib.request import proxy_bypass  # here: it is slow to import

    endpoint = urlsplit(scheme.endpoint() or scheme.usual())
    names = [f"{endpoint.scheme}_proxy".upper(), f"{endpoint.scheme}_proxy", "ALL_PROXY"]
    name = next(filter(os.environ.get, [*names, "all_proxy"]), "")
    if not name or proxy_bypass(endpoint.hostname or ""):
        return ""
    host = _host(os.environ[name])
    tried = re.search(r'"tcp connect error",\s+[^\s,]+:(\d+),', text)
    if tried and not f"{host}:80".endswith((f":{tried[1]}", f":{tried[1]}:80")):
        return ""  # a network in NO_PROXY, which Python does not read
    return f"the proxy {host} ({name})"


def _host(url: str) -> str:
    """Return host and port in a URL, without what may be secret."""
    return urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2]


def quoted(etag: str | None) -> str:
    """Return an etag in quotes, which some stores leave out in some answers."""
    return f'"{etag}"' if etag and '"' not in etag else etag or ""


def version_of(item: Any) -> str:
    """Return what tells a version of an object from others: its size, and a hash of its etag."""
    tag = hashlib.blake2b(quoted(item["e_tag"]).encode(), digest_size=4).hexdigest()
    return f"{item['size']}.{tag}"


def delete(url: str, keys: str | Sequence[str]) -> None:
    """Delete objects of the bucket of a URL, of which some may be gone already.

    obstore takes those for an error on Azure, and repeats no such request there if a connection
    breaks.
    """
    store = connect(split(url)[0])

    def ask() -> None:
        try:
            obstore.delete(store, keys)
        except FileNotFoundError:
            if not isinstance(keys, str):  # some of the others may still be there
                with ThreadPoolExecutor(16) as pool:
                    list(pool.map(functools.partial(delete, url), keys))

    insist(url, ask)


def check_bucket(url: str) -> None:
    """Find out whether a bucket answers, before any work.

    Raises:
        InputError: it does not, or its credentials are wrong.
    """
    bucket, _ = split(url)
    with saying(url, InputError):
        next(iter(obstore.list(connect(bucket, patient=False), chunk_size=1)), None)
