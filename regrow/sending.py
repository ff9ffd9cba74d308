"""What a device has on its way up: probes or an update's chunks, two unacknowledged at most, then the question for the receipt."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from regrow import wire

UNACKNOWLEDGED = 2
PROBE_S = 1.0
PROBE_MAX_BYTES = 256 * 1024
RECEIPT_WAIT_S = 5.0
RECEIPT_WAIT_MAX_S = 60.0
_A_PROBE = -1


@dataclass(slots=True)
class Sending:
    """So few publishes under way that pings pass and a change of rate shows.

    Args:
        queue: chunks that are still to be sent.
        in_flight: token -> chunk of what the broker has not acknowledged.
        ask_s: when to ask for the receipt, monotonic seconds.
    """

    queue: deque[int] = field(default_factory=deque)
    in_flight: dict[int, int] = field(default_factory=dict)
    ask_s: float = float("inf")
    _token: int = 0
    _receipt_wait_s: float = RECEIPT_WAIT_S
    _probe_start_s: float = 0.0
    _probe_bytes: int = 0
    _probe_most_bytes: int = PROBE_MAX_BYTES

    def stop(self) -> None:
        """Forget what was under way: the link is cut, or there is nothing to send any more."""
        self.queue.clear()
        self.in_flight.clear()
        self.ask_s = float("inf")

    def acknowledged(self, token: int) -> bool:
        """Whether this was one of ours."""
        return self.in_flight.pop(token, None) is not None

    def start(self, chunks: Iterable[int]) -> None:
        """Send these chunks, but for those under way."""
        self.queue = deque(sorted(set(chunks) - set(self.in_flight.values())))
        self._receipt_wait_s = RECEIPT_WAIT_S

    def next_chunks(self, now: float) -> list[tuple[int, int]]:
        """(token, chunk) of what may leave now; when nothing is under way any more, the wait for the receipt begins."""
        leaving = []
        while self.queue and len(self.in_flight) < UNACKNOWLEDGED:
            index = self.queue.popleft()
            leaving.append((self._token_for(index), index))
        self.ask_s = float("inf") if self.in_flight else now + self._receipt_wait_s
        return leaving

    def asked(self, now: float) -> None:
        """The receipt was asked for: ask again later and later."""
        self.ask_s = now + self._receipt_wait_s
        self._receipt_wait_s = min(2 * self._receipt_wait_s, RECEIPT_WAIT_MAX_S)

    def begin_probe(self, now: float, most_bytes: int = PROBE_MAX_BYTES) -> None:
        self._probe_bytes, self._probe_start_s, self._probe_most_bytes = 0, now, most_bytes

    def next_probes(self, boot: bytes, now: float) -> list[tuple[int, bytes]]:
        """(token, noise) of what may leave now; nothing any more after a second, or all bytes of the probe."""
        leaving = []
        while len(self.in_flight) < UNACKNOWLEDGED and now - self._probe_start_s < PROBE_S and self._probe_bytes < self._probe_most_bytes:
            noise = hashlib.shake_128(boot + bytes([self._probe_bytes % 251])).digest(wire.MIN_CHUNK_BYTES)
            self._probe_bytes += len(noise)
            leaving.append((self._token_for(_A_PROBE), noise))
        return leaving

    def _token_for(self, index: int) -> int:
        self._token += 1
        self.in_flight[self._token] = index
        return self._token
