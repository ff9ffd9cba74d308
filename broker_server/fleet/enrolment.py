"""Where a device turns its claim into a certificate: one HTTPS request, answered while a claim is outstanding, else nothing listens.

`POST /v1/enrol` with JSON {device, token, csr, signing_key, proof} (the last three base64) answers {certificate} (PEM) or {error}.
The server is the standard library's, so everything is bounded here: connections, bytes, the time of one request, wrong guesses.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from typing import Annotated, Any

import msgspec

from broker_server.fleet import members
from broker_server.fleet.authority import Authority, check_request
from broker_server.fleet.registry import Device, Registry, now_s
from regrow.errors import LocalError, PeerError

log = logging.getLogger(__name__)
PATH = "/v1/enrol"
REQUEST_BYTES = 16 * 1024
REQUEST_S = 20.0
SILENCE_S = 10.0
CONNECTIONS = 16
GUESSES = 10  # wrong ones of one address, within
GUESSES_S = 60.0
_ADDRESSES = 1024


class _Asked(msgspec.Struct, frozen=True):
    device: Annotated[str, msgspec.Meta(max_length=63)]
    token: Annotated[str, msgspec.Meta(max_length=128)]
    csr: bytes
    signing_key: bytes
    proof: bytes


class Guesses:
    """How often each address was wrong lately; the oldest are forgotten, so that it stays small."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def too_many(self, address: str, now: float) -> bool:
        with self._lock:
            return len([at for at in self._wrong.get(address, ()) if now - at < GUESSES_S]) >= GUESSES

    def wrong(self, address: str, now: float) -> None:
        with self._lock:
            self._wrong[address] = [*(at for at in self._wrong.pop(address, ()) if now - at < GUESSES_S), now][-GUESSES:]
            if len(self._wrong) > _ADDRESSES:
                self._wrong.popitem(last=False)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, host: str, port: int, registry: Registry, authority: Authority) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.registry, self.authority, self.guesses = registry, authority, Guesses()
        self._places = threading.Semaphore(CONNECTIONS)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_certificate()
        super().__init__((host, port), _Handler)

    def load_certificate(self) -> None:
        """Show the broker's certificate as it is on the disk now."""
        folder = self.registry.folder
        self._context.load_cert_chain(folder / "broker.crt", folder / "broker.key")

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a peer that says nothing holds up nobody, and itself for REQUEST_S at most."""
        with _limited(request), suppress(OSError):  # of a peer that speaks no TLS, or goes away
            request.settimeout(SILENCE_S)
            with self._context.wrap_socket(request, server_side=True) as secured:
                _Handler(secured, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the standard library's signature
        log.exception("enrolment of %s", client_address[0])


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.0"  # one request a connection
    server_version, sys_version = "regrow", ""

    def do_POST(self) -> None:
        address, body = str(self.client_address[0]), self._body()  # first: an answer before it would be lost with the connection
        if self.server.guesses.too_many(address, time.monotonic()):
            self._answer(429, {"error": "too many wrong claims from this address; try again in a minute"})
            return
        try:
            asked = self._asked(body)
            request = check_request(asked.csr, asked.signing_key, asked.proof, asked.device)
            pem = members.enrol(self.server.registry, self.server.authority, asked.device, asked.token, request)
        except PeerError as error:
            self.server.guesses.wrong(address, time.monotonic())
            log.warning("enrolment refused to %s: %s", address, error)
            self._answer(403, {"error": str(error)})
        except (LocalError, OSError) as error:
            log.error("enrolment of %s: %s", address, error)
            self._answer(503, {"error": "the gateway cannot enrol anybody now; its log says why"})
        else:
            log.warning("%s enrolled from %s", asked.device, address)
            self._answer(200, {"certificate": pem})

    def _body(self) -> bytes | None:
        size = self.headers.get("Content-Length", "")
        return self.rfile.read(int(size)) if size.isascii() and size.isdecimal() and int(size) <= REQUEST_BYTES else None

    def _asked(self, body: bytes | None) -> _Asked:
        if self.path != PATH or body is None:
            raise PeerError(f"expected {PATH} with at most {REQUEST_BYTES} bytes")
        try:
            return msgspec.json.decode(body, type=_Asked)
        except (msgspec.DecodeError, ValueError) as error:
            raise PeerError(f"not an enrolment: {error}") from error

    def _answer(self, status: int, said: dict[str, str]) -> None:
        body = msgspec.json.encode(said)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """What matters is logged above; peers' own text is not."""


class Enrolment:
    """The server, in a thread of its own while it is open.

    Args:
        host, port: where devices find it; 0 picks a free port, which `port` then is.
    """

    def __init__(self, registry: Registry, authority: Authority, host: str, port: int) -> None:
        self._registry, self._authority, self.host, self.port = registry, authority, host, port
        self._server: _Server | None = None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def open(self) -> None:
        """Listen. Raises LocalError: another process listens there."""
        if self._server is not None:
            return
        try:
            self._server = _Server(self.host, self.port, self._registry, self._authority)
        except OSError as error:
            cure = "stop what listens there, or make the fleet with another --enrol-port"
            raise LocalError(f"cannot listen on {self.host}:{self.port} for devices that join: {error.strerror}; {cure}") from error
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="enrolment", daemon=True).start()

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def renew_certificate(self) -> None:
        if self._server is not None:
            self._server.load_certificate()


def wanted(devices: Mapping[str, Device]) -> bool:
    """Whether anybody may still enrol, or ask again for an answer that was lost."""
    return any(device.claim is not None and device.claim.expires_s >= now_s() for device in devices.values())


@contextmanager
def _limited(sock: socket) -> Iterator[None]:
    """Cut the connection off after REQUEST_S, however slowly it trickles."""

    def cut() -> None:
        with suppress(OSError):
            sock.shutdown(SHUT_RDWR)

    timer = threading.Timer(REQUEST_S, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
