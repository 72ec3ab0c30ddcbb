"""An S3-compatible server on this machine, and a proxy before it that fails as real networks and stores do."""

import http.client
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

from llmt_shared import objects

BUCKET = "bucket"


@dataclass
class Faults:
    """What goes wrong, each with a chance of so much; all 0 passes everything on."""

    error: float = 0.0
    """503 instead of an answer."""
    refused: float = 0.0
    """403 instead of an answer, as to wrong credentials."""
    truncated: float = 0.0
    """The connection ends in the middle of the body."""
    flipped: float = 0.0
    """One bit of the body is another."""
    stalled: float = 0.0
    """Nothing for `stall` seconds."""
    stall: float = 2.0
    """Or until others are set; then the connection ends without an answer."""
    only: str = ""
    """Only requests whose path holds this."""
    dice: random.Random = field(default_factory=lambda: random.Random(0))


@dataclass
class Server:
    """A running store: what a test may ask and set."""

    endpoint: str
    faults: Faults
    seen: list[tuple[str, str, str]]
    """Method, path and range of each request that was passed on."""
    met: Counter[str]
    """Faults by name."""

    def url(self, key: str) -> objects.ObjectPath:
        return objects.ObjectPath(f"s3://{BUCKET}/{key}")

    def fetched(self, text: str) -> list[str]:
        """Paths of GET requests that hold a text."""
        return [path for method, path, _ in self.seen if method == "GET" and text in path]


@contextmanager
def serving(faults: Faults | None = None) -> Iterator[Server]:
    """Run the server and its proxy; the environment names it as the store of all s3:// URLs."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # one store in a process, not two
    server = Server("", faults or Faults(), [], Counter())
    proxy = _Proxy(server, f"{host}:{port}")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    server.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        objects._store.cache_clear()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
        try:
            yield server
        finally:
            objects._store.cache_clear()
            proxy.shutdown()
            proxy.server_close()
            moto.stop()


def environment(server: Server) -> dict[str, str]:
    """What other processes need to reach it."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
    }


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, store: Server, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.upstream = store, upstream


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    server: _Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._happens("error"):
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if self.server.store.faults.refused and self._happens("refused"):
            self._answer(403, {}, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
            return
        if self._happens("stalled") and not self._stall():
            self.close_connection = True
            return
        self.server.store.seen.append((self.command, urlsplit(self.path).path, self.headers.get("Range", "")))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        self._answer(answer.status, dict(answer.getheaders()), self._flipped(content))

    def _stall(self) -> bool:
        """Wait; whether the same faults hold afterwards."""
        faults = self.server.store.faults
        end = time.monotonic() + faults.stall
        while faults is self.server.store.faults and time.monotonic() < end:
            time.sleep(0.01)
        return faults is self.server.store.faults

    def _flipped(self, content: bytes) -> bytes:
        if self.command != "GET" or not content or not self._happens("flipped"):
            return content
        place = self.server.store.faults.dice.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    def _happens(self, name: str) -> bool:
        faults = self.server.store.faults
        happens = faults.only in self.path and faults.dice.random() < getattr(faults, name)
        self.server.store.met[name] += happens
        return happens

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in _OF_A_CONNECTION:
                self.send_header(key, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command == "GET" and len(content) > 1 and self._happens("truncated"):
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815  names that http.server asks for


_OF_A_CONNECTION = {"connection", "transfer-encoding", "content-length", "date", "server", "keep-alive"}


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Run a plain web server over a folder; gives its URL."""
    handler = partial(_Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:  # the standard library's knows no ranges
        if (asked := self.headers.get("Range")) is None:
            return super().do_GET()
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])
        return None


def upload(server: Server, folder: Path, key: str) -> objects.ObjectPath:
    """Copy a folder below a key."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.url(f"{key}/{path.relative_to(folder).as_posix()}").write_bytes(path.read_bytes())
    return server.url(key)
