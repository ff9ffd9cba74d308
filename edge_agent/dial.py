"""From a broker's address to a connected socket, in a thread of its own: name look-up, TCP and TLS all block."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable

from edge_agent.pacing import KERNEL_BUFFER_BYTES
from regrow.broker_url import BrokerAddress

CONNECT_TIMEOUT_S = 10.0
# What was sent and not acknowledged by the other end's TCP for so long ends the connection: a flow that a NAT has forgotten is never
# answered, and TCP alone would go on for a quarter of an hour. Longer than an outage of 10 s and the wait that TCP makes of it.
UNACKNOWLEDGED_TIMEOUT_S = 20.0


class Dial:
    """One attempt, under way from construction; `result()` is a socket, the reason for none, or None for not yet.

    Args:
        address: where to.
        tls: context for a TLS address; None = the system's certificates.
        limited: the link is paced: keep the kernel's buffers small.
        done: called from the dialling thread when there is a result.
    """

    def __init__(self, address: BrokerAddress, tls: ssl.SSLContext | None, limited: bool, done: Callable[[], None]) -> None:
        self._box: queue.SimpleQueue[socket.socket | str] = queue.SimpleQueue()
        self._abandoned = threading.Event()

        def dial() -> None:
            try:
                self._box.put(_connect(address, tls, limited))
            except (OSError, ValueError) as err:  # ValueError: a host name that IDNA cannot encode
                self._box.put(f"cannot connect to {address.host}:{address.port}: {err}")
            if self._abandoned.is_set():
                self._close_late()
            done()

        threading.Thread(target=dial, name="regrow-dial", daemon=True).start()

    def result(self) -> socket.socket | str | None:
        try:
            return self._box.get_nowait()
        except queue.Empty:
            return None

    def abandon(self) -> None:
        """Nobody will ask again: a socket that still comes is closed."""
        self._abandoned.set()
        self._close_late()

    def _close_late(self) -> None:
        with contextlib.suppress(queue.Empty):
            late = self._box.get_nowait()
            if isinstance(late, socket.socket):
                late.close()


def _connect(address: BrokerAddress, tls: ssl.SSLContext | None, limited: bool) -> socket.socket:
    """A connected socket, TLS handshake done; blocks for at most about CONNECT_TIMEOUT_S per step."""
    error: OSError = OSError("the name has no address")
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    for family, kind, proto, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            if limited:  # before connect: the receive window is agreed on then
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BUFFER_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNACKNOWLEDGED_TIMEOUT_S))
            sock.settimeout(max(0.1, deadline_s - time.monotonic()))
            sock.connect(where)
            if address.tls:
                context = tls if tls is not None else ssl.create_default_context()
                return context.wrap_socket(sock, server_hostname=address.host)
            return sock
        except OSError as err:
            sock.close()
            error = err
    raise error
