"""When a connection wants a ping and when it counts as dead, from nothing but the bytes that came and went.

Any byte is a sign of life: on a slow link the answer to a ping queues behind the chunks that are coming down.

A NAT that drops idle flows without a word kills a connection by its being quiet. So where one died in the longest quiet that it had
ever had, the next ones are pinged after half of that; an outage, which strikes a connection that had been as quiet before, changes nothing.
"""

from __future__ import annotations

from typing import Literal

PING_LEAST_S = 2.0
LONGER = 1.5


class KeepAlive:
    """Of one link, over all its connections; times are monotonic seconds.

    Args:
        keepalive_s: a direction that is quiet for so long is worth a ping; a peer that is silent for twice as long is dead.

    Attributes:
        ping_s: after how much quiet a ping is due; at most keepalive_s.
    """

    def __init__(self, keepalive_s: float) -> None:
        self.ping_s = self._keepalive_s = float(keepalive_s)
        self._heard_bytes = self._said_bytes = 0
        self._heard_s = self._said_s = self._pinged_s = 0.0
        self._quiet_s = self._survived_s = 0.0

    def begin(self, now: float) -> None:
        """A connection begins, and its bytes with it."""
        self._heard_bytes = self._said_bytes = 0
        self._heard_s = self._said_s = self._pinged_s = now
        self._quiet_s = self._survived_s = 0.0

    def turn(self, bytes_up: int, bytes_down: int, now: float) -> Literal["", "ping", "dead"]:
        """What is to be done now; to be called at least once a second. bytes_up, bytes_down: of the connection, so far."""
        quiet_s = now - max(self._heard_s, self._said_s)
        if bytes_down != self._heard_bytes:
            self._heard_bytes, self._heard_s = bytes_down, now
            self._survived_s, self._quiet_s = max(self._survived_s, self._quiet_s, quiet_s), 0.0
        elif bytes_up != self._said_bytes:
            self._quiet_s = max(self._quiet_s, quiet_s)
        if bytes_up != self._said_bytes:
            self._said_bytes, self._said_s = bytes_up, now
        if now - self._heard_s >= 2 * self._keepalive_s:
            return "dead"
        if now - max(self._pinged_s, min(self._heard_s, self._said_s)) >= self.ping_s:
            self._pinged_s = now
            return "ping"
        return ""

    def silent_s(self, now: float) -> float:
        """How long nothing came."""
        return now - self._heard_s

    def lost(self) -> None:
        """The connection is gone."""
        if self._quiet_s > LONGER * self._survived_s:  # what was said after a new long quiet was never answered
            self.ping_s = min(max(self._quiet_s / 2, PING_LEAST_S), self._keepalive_s)
        self._quiet_s = self._survived_s = 0.0
