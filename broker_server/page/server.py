"""The page's HTTP: static files from memory, JSON, one stream of events, and what a person tells the run.

Strategy: a thread for each connection, a bounded number of them, from the standard library; nothing of a request's path ever becomes a
path of a file. Every answer that is no file is JSON, errors too.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from broker_server.page.access import Access
from broker_server.page.board import Board
from broker_server.page.controls import Controls
from broker_server.page.past import Runs, curve_of, device_history, series_of
from broker_server.page.stream import EVERY_S, Stream
from regrow.errors import LocalError, UsageError
from regrow.topics import NAME

log = logging.getLogger(__name__)
CONNECTIONS = 64
MOST_LINE_BYTES = 2048
MOST_HEADERS = 50
MOST_BODY_BYTES = 4096
PATIENCE_S = 15.0
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file that is shown. tag: of its content."""

    kind: str
    data: bytes
    tag: str


def static_files() -> dict[str, File]:
    """Path -> what comes with the package; the page itself is "/"."""
    found = {}
    for entry in resources.files("broker_server.page").joinpath("static").iterdir():
        kind = TYPES.get(Path(entry.name).suffix, "text/plain; charset=utf-8")
        data = entry.read_bytes()
        file = File(kind, data, f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        found["/" if entry.name == "index.html" else f"/{entry.name}"] = file
    return found


class Page(ThreadingHTTPServer):
    """The page of one gateway.

    Args:
        address: where to listen.
        access: who may what.
        board, controls, runs: what there is to see and to do.
        home: the gateway's folder, with what devices have observed.
        run: folder of the run that is served.
        every_s: between two messages of the stream.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        access: Access,
        board: Board,
        controls: Controls,
        runs: Runs,
        home: Path,
        run: Path,
        every_s: float = EVERY_S,
    ) -> None:
        self.access, self.board, self.controls, self.runs, self.home, self.run = access, board, controls, runs, home, run
        self.files = static_files()
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._open: dict[socket.socket, threading.Thread] = {}
        self._open_lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.stream = Stream(board.whole, board.changes, every_s)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.2}, name="page", daemon=True)

    def start(self) -> None:
        """Answer, on threads of its own."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more; every connection and every thread has ended when this returns."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        self.stream.close()
        with self._open_lock:
            left = dict(self._open)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in left.values():
            thread.join(PATIENCE_S)

    def server_bind(self) -> None:
        """Without the look-up of this machine's name that the standard library makes, which can take long where there is no DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more connection, if there is room for it."""
        if not self._room.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(1.0)
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open[request] = threading.current_thread()
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._open_lock:
                self._open.pop(request, None)
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as the standard library calls it
        """A connection that broke is nobody's business; anything else is ours."""
        log.debug("the page's connection from %s ended", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Page
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Regrow", ""
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: object) -> None:
        log.debug("%s %s", self.address_string(), format % args)

    def parse_request(self) -> bool:
        """As the standard library does, with tighter bounds, and only for requests that are meant for this machine."""
        if len(self.raw_requestline) > MOST_LINE_BYTES:
            self.requestline, self.request_version, self.command = "", self.protocol_version, ""
            return self._refuse(HTTPStatus.REQUEST_URI_TOO_LONG, f"a request line has at most {MOST_LINE_BYTES} bytes")
        if not super().parse_request():
            return False
        if len(self.headers) > MOST_HEADERS:
            return self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {MOST_HEADERS} headers")
        if not self.server.access.is_for_us(self.headers):
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "one Host header must name this machine: open the page by its address")
        return True

    def _refuse(self, status: HTTPStatus, why: str) -> bool:
        self.close_connection = True
        self._json({"error": why}, status)
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors that the standard library finds, as all others."""
        self.close_connection, self.request_version = True, self.protocol_version  # else it answers as HTTP/0.9 would: without a head
        status = HTTPStatus(code)
        self._json({"error": explain or message or status.phrase}, status)

    # ---- looking ---------------------------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """A file, the stream, or JSON."""
        path = urlsplit(self.path).path
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads would be taken for the next request
        file = self.server.files.get(path)
        if not self.server.access.from_us(self.headers) and not (path == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"):
            self._refuse(HTTPStatus.FORBIDDEN, "another site asks: open the page itself")
        elif file is not None:
            self._file(file)
        elif not self.server.access.may_look(self.headers):
            self._needs_token()
        elif path == "/api/events":
            self._events()
        else:
            self._answer(lambda: self._look(path))

    def do_HEAD(self) -> None:
        """As GET, without what it would show."""
        self.do_GET()

    def _look(self, path: str) -> object:
        server = self.server
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "state"]:
                return server.board.whole()
            case ["api", "runs"]:
                return {"runs": server.runs.all(), "served": server.run.name}
            case ["api", "settings"]:
                return {**server.controls.table(), "local": server.access.local}
            case ["api", "token"]:
                return {"valid": server.access.may_act(self.headers)}
            case ["api", "run" | "curve" as what, name]:
                run = server.runs.path(name) if NAME.match(name) else None
                return None if run is None else curve_of(run) if what == "curve" else series_of(run, server.home)
            case ["api", "device", name] if NAME.match(name) and server.board.device(name) is not None:
                return device_history(server.run, server.home, name)
        return None

    def _file(self, file: File) -> None:
        if self.headers.get("If-None-Match") == file.tag:
            self._send(HTTPStatus.NOT_MODIFIED, file.kind, b"", {"ETag": file.tag})
        else:
            self._send(HTTPStatus.OK, file.kind, file.data, {"ETag": file.tag, "Cache-Control": "no-cache"})

    def _events(self) -> None:
        if self.command == "HEAD":
            self._send(HTTPStatus.OK, "text/event-stream", b"", {})
            return
        listener = self.server.stream.join()
        if listener is None:
            self._json({"error": "too many pages are open; close one, or wait"}, HTTPStatus.SERVICE_UNAVAILABLE)
            return
        self.close_connection = True
        try:
            self.send_response(HTTPStatus.OK)
            for name, value in {**SAFE, "Content-Type": "text/event-stream", "Cache-Control": "no-store", "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            while (data := listener.next()) is not None:
                self.wfile.write(data)
        except OSError:  # gone, or too slow
            log.debug("%s listens no more", self.address_string())
        finally:
            self.server.stream.leave(listener)

    # ---- doing -----------------------------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        """Do what a person says who has the token."""
        body = self._body()
        if body is None:
            return
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:1] != ["api"] or len(parts) != 2 or parts[1] not in self.server.controls.actions:
            self._json({"error": "there is nothing of this name"}, HTTPStatus.NOT_FOUND)
        elif not self.server.access.may_act(self.headers):
            self._needs_token()
        elif not self.server.access.from_us(self.headers):
            self._json({"error": "this was asked by the page of another site"}, HTTPStatus.FORBIDDEN)
        elif self.headers.get_content_type() != "application/json":
            self._json({"error": "the body is JSON: say Content-Type: application/json"}, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        else:
            self._answer(lambda: {"done": self.server.controls.do(parts[1], body)})

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say Content-Length")
            return None
        if int(length) > MOST_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MOST_BODY_BYTES} bytes")
            return None
        return self.rfile.read(int(length))

    # ---- answers ---------------------------------------------------------------------------------------------------------------------

    def _answer(self, work: Callable[[], object]) -> None:
        try:
            value = work()
        except UsageError as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except LocalError as error:
            self._json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            if value is None:
                self._json({"error": "there is nothing of this name"}, HTTPStatus.NOT_FOUND)
            else:
                self._json(value)

    def _needs_token(self) -> None:
        why = "this needs the page's token: `regrow page token` shows it"
        self._json({"error": why}, HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})

    def _json(self, value: object, status: HTTPStatus = HTTPStatus.OK, more: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", msgspec.json.encode(value), {"Cache-Control": "no-store", **(more or {})})

    def _send(self, status: HTTPStatus, kind: str, data: bytes, more: dict[str, str]) -> None:
        self.send_response(status)
        length = {} if status is HTTPStatus.NOT_MODIFIED else {"Content-Length": str(len(data))}
        closing = {"Connection": "close"} if self.close_connection else {}
        for name, value in {**SAFE, "Content-Type": kind, **length, **closing, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
