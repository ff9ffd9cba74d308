"""What to tell people of a link that comes and goes: a line when it is lost and one when it is back, however often it was tried."""

from __future__ import annotations

from dataclasses import dataclass

from regrow.machine import Disconnected

REMIND_S = 300.0


@dataclass(slots=True)
class Outage:
    """The outage at hand, if there is one; times are monotonic seconds."""

    _since_s: float | None = None
    _remind_s: float = 0.0

    def lost(self, event: Disconnected, now: float) -> str:
        """The line for this event, or nothing: failed attempts go without saying, but what needs help is said again now and then."""
        begins = self._since_s is None
        if begins:
            self._since_s = self._remind_s = now
        if not begins and not (event.needs_help and now >= self._remind_s):
            return ""
        if event.needs_help:
            self._remind_s = now + REMIND_S
        return event.reason if event.needs_help else f"{event.reason}; trying again"

    def over(self, now: float) -> str:
        """There is a connection: how long there was none, or nothing if this is no news."""
        since_s, self._since_s = self._since_s, None
        return "" if since_s is None else f" after {now - since_s:.0f} s without a connection"
