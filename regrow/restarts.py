"""Which starts of a known device count at once: each that counts is a durable record, and may cost a lease.

A device that crashes again and again, or pretends to, must not wear out the store or keep the coordinator busy.
"""

from __future__ import annotations

from collections import deque

from regrow import wire
from regrow.roster import Least

STARTS, STARTS_S = 5, 300.0  # so many in so many seconds: one a minute, but a person may try a few times in a row


class Restarts:
    """The latest starts of every device, and the last hello of those that must wait until another start of theirs counts."""

    def __init__(self) -> None:
        self._counted_s: dict[str, deque[float]] = {}
        self._late: dict[str, tuple[wire.Hello, float]] = {}
        self._due_s = Least()

    def counts(self, who: str, hello: wire.Hello, uplink_bps: float, now: float) -> bool:
        """Whether this start counts at `now`, monotonic seconds; if not, `take` returns it, or a later one, when it does."""
        counted_s = self._counted_s.setdefault(who, deque(maxlen=STARTS))
        if len(counted_s) == STARTS and now < counted_s[0] + STARTS_S:
            self._late[who] = (hello, uplink_bps)
            self._due_s.put(who, counted_s[0] + STARTS_S)
            return False
        counted_s.append(now)
        self.forget(who)
        return True

    def waits_s(self, who: str, now: float) -> float | None:
        """Seconds until a start of this device that waits counts, or None when none does."""
        return self._counted_s[who][0] + STARTS_S - now if who in self._late else None

    def forget(self, who: str) -> None:
        """Nothing of this device waits any more."""
        if self._late.pop(who, None) is not None:
            self._due_s.put(who, None)

    def due_s(self) -> float | None:
        """When the next start that waits counts, or None without any."""
        return self._due_s.least()

    def take(self, now: float) -> list[tuple[str, wire.Hello, float]]:
        """(device, hello, bit/s) of the starts that have waited long enough; they wait no longer."""
        return [(who, *self._late.pop(who)) for who in self._due_s.take(now)]
