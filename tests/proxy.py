"""A store that lies: a proxy before the real server, which changes requests or loses answers."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import re
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit


class Request(NamedTuple):
    """A request on its way to the server; who lies may change its headers."""

    method: str
    path: str  # with the query, as it was sent
    headers: dict[str, str]  # names in lower case
    body: bytes

    def asks(self, method: str, end: str) -> bool:
        """Tell whether it has this method, and a path, with its query, that ends so."""
        return self.method == method and re.search(f"({end})$", self.path) is not None


class Answer(NamedTuple):
    """What the proxy answers itself, while the server never hears of the request."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Lost(NamedTuple):
    """The server does what it is asked, but its answer is lost."""


class Reset(NamedTuple):
    """The connection breaks, and the server never hears of the request."""


Lie = Callable[[Request], "Answer | Lost | Reset | None"]


def start_proxy(server: str, secret: str, lie: Lie) -> str:
    """Return the URL of a proxy before a server.

    Args:
        server: its URL.
        secret: signs requests that were changed.
        lie: is asked about each request, by many threads.
    """
    where = urlsplit(server).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            request = Request(self.command, self.path, dict(headers), body)
            said = lie(request)
            if isinstance(said, Answer):
                self.answer(said)
                return
            if isinstance(said, Reset):
                self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
                self.close_connection = True
                return
            if request.headers != headers:
                sign(request, secret)
            answer = forward(where, request)
            if isinstance(said, Lost):
                self.close_connection = True
            else:
                self.answer(answer)

        def answer(self, answer: Answer) -> None:
            self.send_response_only(answer.status)
            given = {name.lower() for name, _ in answer.headers}
            for name, value in answer.headers:
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            if "content-length" not in given:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_CONNECT = handle_any

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{proxy.server_address[1]}"


def forward(where: str, request: Request) -> Answer:
    """Return what the server says; it checks the signature against the host that was asked."""
    connection = http.client.HTTPConnection(where, timeout=60)
    connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers.items():
        connection.putheader(name, value)
    connection.endheaders(request.body)
    response = connection.getresponse()
    answer = Answer(response.status, response.read(), tuple(response.getheaders()))
    connection.close()
    return answer


def sign(request: Request, secret: str) -> None:
    """Sign a request again: its signature covers the headers that were changed."""
    headers = request.headers
    scope, names = re.findall(
        r"Credential=[^/]*/(\S+), SignedHeaders=([^,]+),", headers["authorization"]
    )[0]
    names = ";".join(name for name in names.split(";") if name in headers)
    path, _, query = request.path.partition("?")
    pairs = sorted(parse_qsl(query, keep_blank_values=True))
    lines = [
        request.method,
        path,
        "&".join(
            f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs
        ),
        *(f"{name}:{headers[name].strip()}" for name in names.split(";")),
        "",
        names,
        headers["x-amz-content-sha256"],
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{digest}"
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    before = headers["authorization"].partition("SignedHeaders=")[0]
    headers["authorization"] = f"{before}SignedHeaders={names}, Signature={signature}"


# ---------------------------------------------------------------- lies


def knows_no_quotes(request: Request) -> Answer | None:
    """Compare the etag of a conditional write without its quotes, as Ceph 16 does."""
    if request.method == "PUT" and '"' in request.headers.get("if-match", ""):
        return Answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
    return None


def drops(header: str) -> Lie:
    """Ignore the headers of a request that begin so."""

    def lie(request: Request) -> None:
        for name in list(request.headers):
            if name.startswith(header):
                del request.headers[name]

    return lie


def cannot(header: str) -> Lie:
    """Answer to a header that it is not implemented."""
    no = Answer(501, b"<Error><Code>NotImplemented</Code></Error>")
    return lambda request: no if header in request.headers else None


def deletes_nothing(request: Request) -> Answer | None:
    """Say that all is deleted."""
    if not request.asks("POST", r"\?delete=?"):
        return None
    keys = re.findall(b"<Key>.*?</Key>", request.body)
    return Answer(
        200,
        b"<DeleteResult>%s</DeleteResult>" % b"".join(b"<Deleted>%s</Deleted>" % k for k in keys),
    )


def once(lie: Lie) -> Lie:
    """Lie about each request once, and not about another attempt."""
    seen: set[tuple[str, str, bytes]] = set()

    def first(request: Request) -> Answer | Lost | Reset | None:
        what = request.method, request.path, request.body
        if what in seen:
            return None
        said = lie(request)
        if said is not None:
            seen.add(what)
        return said

    return first
