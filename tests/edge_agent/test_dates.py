"""The server's certificate is held against the fleet's time, whatever this machine's clock says."""

from __future__ import annotations

import datetime
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from edge_agent.identity import fleet_context
from edge_agent.transport import MqttLink
from regrow.errors import LocalError
from regrow.machine import Connected, Disconnected
from tests.broker_server.scenarios import DEADLINE_S, wait_for
from tests.edge_agent.small_authority import SmallAuthority

HOST = "localhost"


def june(year: int) -> float:
    return datetime.datetime(year, 6, 2, tzinfo=datetime.timezone.utc).timestamp()


class Server:
    """Says CONNACK to whoever gets through."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._context = context
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        try:
            with self._context.wrap_socket(sock, server_side=True) as secured:
                while secured.recv(4096):
                    secured.sendall(b"\x20\x02\x00\x00")
        except OSError:
            pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def serving(authority: SmallAuthority, folder: Path, years: tuple[int, int]) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server(folder, HOST, years))
    server = Server(context)
    yield server
    server.close()


@pytest.fixture
def authority() -> SmallAuthority:
    return SmallAuthority()


@pytest.mark.parametrize(
    ("years", "now", "gets_in"),
    [
        ((2026, 2027), june(2026), True),
        ((2026, 2027), june(2025), False),  # not yet valid
        ((2026, 2027), june(2027), False),  # expired, in the fleet's time
        ((2020, 2021), june(2020), True),  # expired by this machine's clock only
        ((2037, 2038), june(2037), True),  # not yet valid by this machine's clock only
    ],
)
def test_the_fleets_time_decides(authority: SmallAuthority, tmp_path: Path, years: tuple[int, int], now: float, gets_in: bool) -> None:
    for server in serving(authority, tmp_path, years):
        link = MqttLink(
            f"mqtts://{HOST}:{server.port}",
            device_id="d1",
            password=None,
            rng=random.Random(1),
            tls=fleet_context(authority.pem, lambda: now),
        )
        if gets_in:
            wait_for(link, Connected)
        else:
            said = wait_for(link, Disconnected)
            assert isinstance(said, Disconnected)
            assert "certificate is valid from" in said.reason
        link.close()


def test_another_certificate_is_shown_at_once_and_once(authority: SmallAuthority, tmp_path: Path) -> None:
    """After `use` the connection at hand ends, and the next one is made without waiting."""
    for server in serving(authority, tmp_path, (2020, 2040)):
        url = f"mqtts://{HOST}:{server.port}"
        link = MqttLink(url, device_id="d1", password=None, rng=random.Random(1), tls=fleet_context(authority.pem, lambda: june(2030)))
        wait_for(link, Connected)
        seen: list[object] = []
        link.use(fleet_context(authority.pem, lambda: june(2031)))
        assert link.retry_at_s <= link._clock()
        wait_for(link, Disconnected, seen)
        wait_for(link, Connected, seen)
        assert not [event for event in seen if isinstance(event, Disconnected)]
        link.close()


def test_a_ca_that_is_none_is_named() -> None:
    with pytest.raises(LocalError, match=r"\(ca\) does not check out"):
        fleet_context("-----BEGIN nonsense")
