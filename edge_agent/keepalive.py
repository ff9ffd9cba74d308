"""When a connection wants a ping and when it counts as dead, from nothing but the bytes that came and went.

Any byte is a sign of life: on a slow link the answer to a ping queues behind the chunks that are coming down.
"""

from __future__ import annotations

from typing import Literal


class KeepAlive:
    """Of one link, over all its connections; times are monotonic seconds.

    Args:
        keepalive_s: a direction that is quiet for so long is worth a ping; a peer that is silent for twice as long is dead.
    """

    def __init__(self, keepalive_s: float) -> None:
        self._keepalive_s = keepalive_s
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A connection begins, and its bytes with it."""
        self._heard_bytes = self._said_bytes = 0
        self._heard_s = self._said_s = self._pinged_s = now

    def turn(self, bytes_up: int, bytes_down: int, now: float) -> Literal["", "ping", "dead"]:
        """What is to be done now; to be called at least once a second. bytes_up, bytes_down: of the connection, so far."""
        if bytes_down != self._heard_bytes:
            self._heard_bytes, self._heard_s = bytes_down, now
        if bytes_up != self._said_bytes:
            self._said_bytes, self._said_s = bytes_up, now
        if self.silent_s(now) >= 2 * self._keepalive_s:
            return "dead"
        if now - max(self._pinged_s, min(self._heard_s, self._said_s)) >= self._keepalive_s:
            self._pinged_s = now
            return "ping"
        return ""

    def silent_s(self, now: float) -> float:
        """How long nothing came."""
        return now - self._heard_s
