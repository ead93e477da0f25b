"""A connection to an object store: credentials, time limits, errors in one line.

A URL is "s3://bucket/key", of anything that speaks S3: AWS_ENDPOINT_URL says where. Uses obstore's
native API (https://developmentseed.org/obstore); without it, `import` says how to install it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from sharding.errors import InputError, PackError, StopRun
from sharding.shards import REPLACED

T = TypeVar("T")
# Seconds: for a request with its body, for its retries, and for each of the two in a first probe.
REQUEST_TIME, RETRY_TIME, PROBE_TIME = 60, 120, 20
# Where credentials come from, if not from a profile or from the machine's role.
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_CURES = {
    "InvalidRange": REPLACED,
    "NoSuchKey": "there is no such object",
    "NoSuchBucket": "there is no such bucket; check its name, and AWS_ENDPOINT_URL",
    "InvalidBucketName": "no bucket can have that name",
    "InvalidAccessKeyId": "the store does not know this key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the key's secret is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
    "AccessDenied": "these credentials do not allow it",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region; set AWS_REGION",
    "NotImplemented": "the store cannot do that",
}
_used_by: int | None = None  # id of the process that was first to use a store


def split(url: str) -> tuple[str, str]:
    """Return bucket and key: "s3://photos/raw/" -> ("photos", "raw").

    Raises:
        InputError: it names no bucket, or a key that cannot be named.
    """
    bucket, _, key = url[len("s3://") :].partition("/")
    key = key.rstrip("/")
    if not bucket:
        raise InputError(f"{url!r} names no bucket; write s3://BUCKET/PREFIX")
    odd = key and not set(key.split("/")).isdisjoint(("", ".", ".."))
    if odd or not f"a{key}".isprintable():
        raise InputError(f"{url!r}: a key can have no empty part, '.', '..' or control character")
    return bucket, key


def connect(bucket: str, patient: bool = True) -> S3Store:
    """Return the store of a bucket, whose paths are whole keys.

    Args:
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
def _connect(bucket: str, patient: bool) -> S3Store:
    endpoint = _endpoint()
    options: dict[str, Any] = {}
    if endpoint:
        options["endpoint"] = endpoint
    if not any(map(os.environ.get, _KEYS)) and (provider := _profile()):
        options["credential_provider"] = provider
    elif not os.environ.get("AWS_REGION"):
        options["region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    client: Any = {"connect_timeout": "5s", "allow_http": endpoint.startswith("http:")}
    client["timeout"] = f"{REQUEST_TIME if patient else PROBE_TIME}s"
    retry: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=PROBE_TIME)}
    if patient:  # obstore's own ten retries are over in a few seconds
        backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10)}
        retry = {"max_retries": 1_000, "retry_timeout": timedelta(seconds=RETRY_TIME)}
        retry["backoff"] = {**backoff, "base": 2}
    return S3Store(
        bucket,
        client_options=client,
        retry_config=retry,
        conditional_put="etag",
        **options,
    )


def _endpoint() -> str:
    """Return where the store is, if it is not Amazon's.

    Raises:
        InputError: it is no URL; obstore itself would panic.
    """
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        endpoint = os.environ.get(name, "")
        if endpoint:
            if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
                raise InputError(f"{name}: not a URL such as http://127.0.0.1:9000 or https://HOST")
            return endpoint
    return ""


def _profile() -> Any:
    """Return what takes credentials from a profile, single sign-on included, if there is one.

    Raises:
        InputError: a profile is named, but boto3, which reads it, is not installed.
    """
    named = os.environ.get("AWS_PROFILE")
    if not named and not os.path.exists(os.path.expanduser("~/.aws/credentials")):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except ImportError:
        if named:
            cure = "run: pip install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise InputError(f"AWS_PROFILE {named!r} is read by boto3; {cure}") from None
        return None
    except Exception as error:  # boto3 raises many kinds
        raise InputError(f"AWS_PROFILE {named!r}: {error}") from None


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
        reason, silent = _reason(error)
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


def _reason(error: BaseException) -> tuple[str, bool]:
    """Return what an error of obstore's means, and whether the store gave no answer."""
    text = str(error)
    code = re.search("<Code>(\\w+)</Code>", text)
    found = re.search(r"status code: (\d+)", text)
    status = found[1] if found else ""
    if "169.254.169.254" in text or "CredentialsError" in text:
        return f"no credentials; {_SET_KEYS}", False
    if code:
        return _CURES.get(code[1], f"the store says {code[1]}"), status[:1] == "5"
    if isinstance(error, FileNotFoundError) or status == "404":  # a writer's error has no class
        return _CURES["NoSuchKey"], False
    if status == "416":
        return REPLACED, False
    if status or "HTTP error" in text or "error sending request" in text:
        return _blame(text, status), status[:1] in ("", "5")
    if "invalid path" in text or "arsing path" in text or "empty path segment" in text:
        key = re.search('ath "([^"]*)"', text)
        which = f"the key {key[1]!r}" if key else "a key"
        return f"{which} has an empty part, '.', '..' or a control character; rename it", False
    if "non-partial response" in text:
        return "the store ignores ranges of an object", False
    return re.split(r"[\n:]", text.removeprefix("Generic S3 error: "))[0], False


def _blame(text: str, status: str) -> str:
    """Return who gave no answer that is a store's, and what to do: the store, or a proxy."""
    store, proxy = _host(_endpoint()) or "Amazon's store", _proxy(text)
    which = f"the store, or {proxy}," if proxy else "the store"
    if status == "407" or "ProxyAuth" in text:
        return f"{proxy or 'a proxy'} asks for a user name and a password"
    if status in ("301", "400"):
        return f"{which} says {status}; is the bucket in another region (AWS_REGION)?"
    if status:
        return f"{which} says {status}" + (f"; {_SET_KEYS}" if status == "403" else "")
    if not proxy:
        return f"{store} does not answer; check AWS_ENDPOINT_URL and the network"
    fails = f"does not connect to {store}" if "TunnelUnsuccessful" in text else "does not answer"
    return f"{proxy} {fails}; check it, or add the store's host to NO_PROXY"


def _proxy(text: str) -> str:
    """Return the proxy that requests go by, if any: "the proxy HOST:PORT (HTTPS_PROXY)".

    Args:
        text: of an error; it may tell which address was tried.
    """
    from urllib.request import proxy_bypass  # here: it is slow to import

    endpoint = urlsplit(_endpoint() or "https://s3.amazonaws.com")
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


def check_bucket(url: str) -> None:
    """Find out whether a bucket answers, before any work.

    Raises:
        InputError: it does not, or its credentials are wrong.
    """
    bucket, _ = split(url)
    with saying(url, InputError):
        next(iter(obstore.list(connect(bucket, patient=False), chunk_size=1)), None)
