"""A link of a chosen rate, in user space: a socket that passes bytes no faster than the limit says.

Strategy: a virtual clock. A slice of s bytes occupies s * 8 / bps seconds and passes at the END of its slot, so that B
bytes take B * 8 / bps seconds from the first byte, however short the transfer: there is no initial burst. While there
is a backlog the next slot begins where the last one ended, even when the process woke late; idle time earns nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from regrow.errors import LocalError

SLICE_BYTES = 4096
# A real link keeps sending from its kernel buffer while the process sleeps; this much lateness is made up for, no more.
CATCH_UP_S = 0.25
# Enough for a slice in flight: a deep kernel buffer would hide the rate from whoever measures it.
KERNEL_BUFFER_BYTES = 16 * 1024


class RateLimiter:
    """The virtual clock of one direction of a link.

    Args:
        bps: bits per second, > 0; None = unlimited, every slot ends at once.
        clock: monotonic seconds.

    Raises:
        LocalError: bps is not positive.
    """

    def __init__(self, bps: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if bps is not None and not bps > 0:
            raise LocalError(f"a link's rate must be > 0 bit/s, got {bps!r}")
        self.bps = bps
        self._clock = clock
        self._free_at_s = 0.0
        self._backlog = False

    def reserve(self, size_bytes: int) -> float:
        """Take the next slot for a slice; returns the time at which the slice may pass."""
        now = self._clock()
        if self.bps is None:
            return now
        start_s = max(self._free_at_s, now - CATCH_UP_S) if self._backlog else max(self._free_at_s, now)
        self._backlog = True
        self._free_at_s = start_s + size_bytes * 8 / self.bps
        return self._free_at_s

    def idle(self) -> None:
        """Nothing waits to pass: the time until the next slice is no credit."""
        self._backlog = False


class PacedSocket:
    """A connected socket whose send() and recv() keep to a rate; looks like a socket to an MQTT client.

    send() passes at most one slice of 4 KiB when its slot has ended and raises BlockingIOError before that; recv()
    likewise for what comes in. `on_packet(head)` hears the moment at which the first byte of every message is offered
    to the link; a message is what the caller offers in one piece and goes on offering until it is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        uplink: RateLimiter,
        downlink: RateLimiter,
        clock: Callable[[], float] = time.monotonic,
        on_packet: Callable[[bytes | bytearray | memoryview, float], None] | None = None,
    ) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self._sock = sock
        self._clock = clock
        self._on_packet = on_packet
        self._uplink = uplink
        self._downlink = downlink
        self._up_slot_bytes = 0  # reserved, not yet sent
        self._up_ready_s = 0.0
        self._packet_left_bytes = 0
        self._arrived = b""  # read from the kernel, not yet through the downlink
        self._down_ready_s = 0.0

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send at most one slice; returns its length. BlockingIOError while the slot lasts or the kernel is full."""
        if self._packet_left_bytes == 0 and len(data) > 0:
            self._packet_left_bytes = len(data)
            if self._on_packet is not None:
                self._on_packet(data, self._clock())
        if self._uplink.bps is None:
            return self._sent(self._sock.send(data))
        if self._up_slot_bytes == 0:
            self._up_slot_bytes = min(len(data), SLICE_BYTES)
            self._up_ready_s = self._uplink.reserve(self._up_slot_bytes)
        if self._clock() < self._up_ready_s:
            raise BlockingIOError
        with memoryview(data) as view:
            sent_bytes = self._sock.send(view[: self._up_slot_bytes])
        self._up_slot_bytes -= sent_bytes  # what the kernel did not take has had its slot and passes with the next call
        return self._sent(sent_bytes)

    def recv(self, limit_bytes: int) -> bytes:
        """Read what has come through the downlink; b"" at end of stream. Raises BlockingIOError when nothing has."""
        if self._downlink.bps is None:
            data = self._sock.recv(limit_bytes)
            self.bytes_down += len(data)
            return data
        if not self._arrived:
            try:
                self._arrived = self._sock.recv(SLICE_BYTES)
            except OSError:
                self._downlink.idle()
                raise
            if not self._arrived:
                return b""
            self._down_ready_s = self._downlink.reserve(len(self._arrived))
            self.bytes_down += len(self._arrived)
        if self._clock() < self._down_ready_s:
            raise BlockingIOError
        data, self._arrived = self._arrived[:limit_bytes], self._arrived[limit_bytes:]
        return data

    def idle(self) -> None:
        """The caller has nothing more to send: the uplink's clock stands still."""
        self._uplink.idle()

    def next_ready_s(self) -> float | None:
        """When a slot ends for which something waits; None when only the kernel's readiness matters."""
        waits = [self._up_ready_s] if self._up_slot_bytes else []
        if self._arrived:
            waits.append(self._down_ready_s)
        return min(waits) if waits else None

    @property
    def up_waits(self) -> bool:
        """The uplink's slot has not ended: asking the kernel for writability would spin."""
        return self._up_slot_bytes > 0 and self._clock() < self._up_ready_s

    @property
    def down_waits(self) -> bool:
        """Bytes are here whose slot has not ended: asking the kernel for readability would spin."""
        return bool(self._arrived) and self._clock() < self._down_ready_s

    def pending(self) -> int:
        """Bytes that can be read although the kernel's socket may look empty (ours, or decrypted TLS records)."""
        inside_tls = getattr(self._sock, "pending", None)
        return len(self._arrived) + (inside_tls() if inside_tls is not None else 0)

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def close(self) -> None:
        self._sock.close()

    def _sent(self, sent_bytes: int) -> int:
        self._packet_left_bytes -= sent_bytes
        self.bytes_up += sent_bytes
        return sent_bytes
