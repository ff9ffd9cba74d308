"""Joules from what devices say with their heartbeats: the mean watts since the one before."""

from __future__ import annotations

from regrow.roster import HEARTBEATS
from regrow.wire import Telemetry


class Joules:
    """What each device has taken since this began; one that says no watts, or was silent for longer than a few heartbeats, adds nothing."""

    def __init__(self, heartbeat_s: float) -> None:
        self._longest_s = HEARTBEATS * heartbeat_s
        self._heard_s: dict[str, float] = {}
        self.by_device: dict[str, float] = {}

    def hear(self, who: str, telemetry: Telemetry, now: float) -> float | None:
        """The joules since its last heartbeat, None where they are not known."""
        before, self._heard_s[who] = self._heard_s.get(who), now
        power = telemetry.power
        if power is None or power.watts is None or before is None or now - before > self._longest_s:
            return None
        joules = power.watts * (now - before)
        self.by_device[who] = self.by_device.get(who, 0.0) + joules
        return joules
