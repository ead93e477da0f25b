"""Which URLs there are, and what each kind of store says; needs no server but the loopback address.

`make stores` runs the stores themselves.
"""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_script, write_pairs
from obstore import exceptions

from sharding import urls
from sharding.bucket import schemes, store
from sharding.errors import InputError, PackError
from sharding.listing import list_samples
from sharding.messages import explain
from sharding.places import dataset_at, output_at, source_at

KEY = "aGlkZGVu"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials from outside."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "AZURITE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    store._connect.cache_clear()


def test_each_scheme_has_a_class() -> None:
    assert list(schemes._SCHEMES) == [f"{scheme}://" for scheme in urls.SCHEMES]
    for prefix, scheme in schemes._SCHEMES.items():
        assert schemes.scheme_of(f"{prefix}bucket/key") is scheme
        assert store.split(f"{prefix}bucket/a/b/") == (f"{prefix}bucket", "a/b")
        assert scheme.usual().startswith("https://") and scheme.spellings('"0a"')[0] == '"0a"'
        with pytest.raises(InputError, match=f"names no {scheme.bucket}; write {scheme.where}"):
            store.split(prefix)


def test_where_urls_can_stand() -> None:
    for url in ("s3://b/x", "az://b/x", "gs://b/x"):
        assert dataset_at(url).__name__ == "sharding.bucket.dataset"
        assert source_at(url).__name__ == "sharding.bucket.source"
    for url in ("s3://b/x", "az://b/x"):
        assert output_at(url).__name__ == "sharding.bucket.run"
    with pytest.raises(InputError, match="gs:// is only read here: no server that can be tested"):
        output_at("gs://b/x")


@pytest.mark.parametrize("script", ["create_webdataset.py", "run_parallel.sh", "sharding"])
def test_a_google_bucket_as_output(script: str, tmp_path: Path) -> None:
    """Refused with the way round, before the source is listed."""
    flags = ["--source", tmp_path / "missing", "--output", "gs://b/x"]
    more = ["--shard-id=0", "--total-shards=1"] if script.startswith("create") else []
    done = run_script(script, *(["start"] if script == "sharding" else []), *flags, *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "--output 'gs://b/x'" in done.stderr and "into a folder, and copy that" in done.stderr


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        (
            "https://acc.blob.core.windows.net/photos/raw?sv=1&sig=hidden",
            "give az://photos/raw, and set AZURE_STORAGE_ACCOUNT_NAME=acc",
        ),
        (
            "abfss://photos@acc.dfs.core.windows.net/raw",
            "give az://photos/raw, and set AZURE_STORAGE_ACCOUNT_NAME=acc",
        ),
        ("abfss://photos/raw", "give az://photos/raw"),
        ("azure://photos/raw", "give az://photos/raw"),
        ("gcs://photos/raw", "give gs://photos/raw"),
        ("https://storage.googleapis.com/photos/raw?X-Goog-Signature=hidden", "gs://photos/raw"),
        ("s3a://photos/raw", "give s3://photos/raw"),
        ("hf://photos", "give a folder or a URL (s3://, az://, gs://)"),
        ("az:/photos/raw", "give az://BUCKET/KEY, with two slashes"),
    ],
)
def test_what_others_call_it(url: str, cure: str) -> None:
    with pytest.raises(InputError) as caught:
        urls.is_url(url, "source")
    assert explain(caught.value).endswith(cure) and "hidden" not in str(caught.value)


def test_help_names_the_schemes() -> None:
    for script in ("create_webdataset.py", "run_parallel.sh"):
        said = run_script(script, "--help").stdout
        assert urls.URL in said and urls.OUTPUT_URL in said and "gs://" not in urls.OUTPUT_URL


CONNECTION = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=hidden"
WRONG = {
    "no account": ({}, "no account; set AZURE_STORAGE_ACCOUNT_NAME$"),
    "another name": ({"ACCOUNT": "acc"}, "ACCOUNT_NAME; AZURE_STORAGE_ACCOUNT is not read"),
    "connection string": ({"CONNECTION_STRING": CONNECTION}, "to its AccountName and AccountKey"),
    "and a name": (
        {"CONNECTION_STRING": CONNECTION, "ACCOUNT_NAME": "acc"},
        "AZURE_STORAGE_CONNECTION_STRING is not read; set AZURE_STORAGE_ACCOUNT_NAME and AZURE_",
    ),
    "no key": (
        {"ACCOUNT_NAME": "acc", "ACCOUNT_KEY": "hid den"},
        "AZURE_STORAGE_ACCOUNT_KEY is no key of an account",
    ),
    "no token": (
        {"ACCOUNT_NAME": "acc", "SAS_TOKEN": "hidden"},
        "AZURE_STORAGE_SAS_TOKEN is no SAS token",
    ),
    "no URL": (
        {"ACCOUNT_NAME": "acc", "ACCOUNT_KEY": KEY, "ENDPOINT": "127.0.0.1:1"},
        "AZURE_STORAGE_ENDPOINT: not a URL such as",
    ),
    "silence": (
        {"ACCOUNT_NAME": "acc", "ACCOUNT_KEY": KEY, "ENDPOINT": "http://127.0.0.1:1"},
        "127.0.0.1:1 does not answer; check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_user_of_azure_gets_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, said = WRONG[what]
    for name, value in given.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    with pytest.raises(InputError, match=said) as caught:
        store.check_bucket("az://photos/x")
    assert not any(word in str(caught.value) for word in ("hid", KEY, "\n"))


@pytest.mark.parametrize("emulator", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_an_emulator_that_is_not_there(emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", emulator)
    said = (
        "127.0.0.1:1 does not answer" if "http" in emulator else "BLOB_STORAGE_URL: not a URL such"
    )
    with pytest.raises(InputError, match=said):
        store.check_bucket("az://photos/x")


def test_an_account_in_the_url() -> None:
    with pytest.raises(InputError, match=r"'az://photos@acc': give az://CONTAINER/PREFIX, with no"):
        store.check_bucket("az://photos@acc/x")


def test_no_such_file_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file.json")
    with pytest.raises(InputError, match="cannot be read; check GOOGLE_APPLICATION_CREDENTIALS"):
        store.check_bucket("gs://photos/x")


def test_az_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gave is used where AZURE_USE_AZURE_CLI says so."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    monkeypatch.setenv("AZURE_USE_AZURE_CLI", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="`az` gives no token; run: az login"):
        store.check_bucket("az://photos/x")


class Account(http.server.BaseHTTPRequestHandler):
    """An account, and what gives a machine's identity its tokens."""

    seen: list[tuple[str, str]]
    refuses = False
    listing = b"<EnumerationResults><Blobs/><NextMarker/></EnumerationResults>"

    def do_GET(self) -> None:
        """Answer with a token, or with an empty listing."""
        self.seen.append((self.path, self.headers.get("Authorization", "")))
        body = self.listing
        if self.path.startswith("/token"):
            body = b'{"access_token": "a-token", "expires_on": "9999999999"}'
        refused = self.path.startswith("/token") and self.refuses
        self.send_response(401 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Account]]:
    """An account whose machine has an identity, as on a machine of Azure's: there is no key."""
    monkeypatch.setattr(Account, "seen", [], raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Account) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
        monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"{url}/token")
        yield Account
        server.shutdown()


def test_the_identity_of_a_machine(account: type[Account], monkeypatch: pytest.MonkeyPatch) -> None:
    """If it has none, the cures are named."""
    store.check_bucket("az://photos/x")
    assert account.seen[-1][1] == "Bearer a-token"
    store._connect.cache_clear()
    monkeypatch.setattr(account, "refuses", True)
    with pytest.raises(InputError, match="no token is given for the credentials; set AZURE_STORAG"):
        store.check_bucket("az://photos/x")


def test_a_key_that_cannot_be_named(
    account: type[Account], monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = b"<Blob><Name>x/a//b.jpg</Name><Properties>%s</Properties></Blob>" % (
        b"<Last-Modified>Sat, 28 Nov 2026 12:00:00 GMT</Last-Modified>"
        b"<Content-Length>1</Content-Length><Content-Type>x</Content-Type><Etag>0x1</Etag>"
    )
    monkeypatch.setattr(
        account, "listing", account.listing.replace(b"<Blobs/>", b"<Blobs>%s</Blobs>" % blob)
    )
    with pytest.raises(InputError, match=r"the key 'x/a//b\.jpg' has an empty part"):
        list_samples("az://photos/x")


@pytest.mark.parametrize(
    ("url", "text", "cure"),
    [
        ("az://c/x", "<Code>ContainerNotFound</Code>", "there is no such container; check its"),
        ("az://c/x", "<Code>AuthenticationFailed</Code>", "or AZURE_STORAGE_SAS_TOKEN, and wheth"),
        ("az://c/x", "<Code>InvalidBlockList</Code>", "another has written it meanwhile; run ag"),
        ("az://c/x", "<Code>PublicAccessNotPermitted</Code>", "it is not public; set AZURE_STOR"),
        ("az://c/x", "<Code>ServerBusy</Code>", "the store says ServerBusy"),
        ("az://c/x", "GET http://169.254.169.254/metadata", "no credentials; set AZURE_STORAGE_AC"),
        ("az://c/x", "status code: 400 Bad Request", "x': the store says 400$"),
        ("gs://b/x", "<Code>NoSuchBucket</Code>", "there is no such bucket; check its name$"),
        (
            "gs://b/x",
            "token request: GET http://169.254.169.254",
            "no credentials; set GOOGLE_APPL",
        ),
        ("gs://b/x", "status code: 403 Forbidden", "the store says 403; set GOOGLE_APPLICATION"),
    ],
)
def test_what_stores_say(url: str, text: str, cure: str) -> None:
    """Answers that only the stores themselves give."""
    with pytest.raises(PackError, match=cure), store.saying(url):
        raise exceptions.GenericError(f"Generic X error: {text}\nDebug: secret")


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        (exceptions.PermissionDeniedError, "x': the store says 403; set AWS_ACCESS_KEY_ID"),
        (exceptions.UnauthenticatedError, "x': the store says 401; set AWS_ACCESS_KEY_ID"),
        (exceptions.PreconditionError, "x': the store says 412$"),
        (exceptions.AlreadyExistsError, "x': the store says 409$"),
        (FileNotFoundError, "x': there is no such object$"),
        (exceptions.InvalidPathError, "x': a key has an empty part, "),
    ],
)
def test_classes_of_errors_need_no_words(kind: type[Exception], cure: str) -> None:
    """Whatever obstore's text is, or becomes."""
    with pytest.raises(PackError, match=cure), store.saying("s3://bucket/x"):
        raise kind("other words: 500")


def test_a_mistyped_url_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path / "source", 2)
    monkeypatch.chdir(tmp_path)
    for url in ("az:/photos/x", "abfss://photos/x", "gs:/photos/x"):
        flags = ["--source", source, "--output", url, "--num-shards", "1"]
        assert run_script("run_parallel.sh", *flags, cwd=tmp_path).returncode == 2
    assert os.listdir(tmp_path) == ["source"]
