"""The fleet's time: unix milliseconds that never go back, from what is known for certain and the seconds that have passed since.

Expiries are the coordinator's word, in the coordinator's clock, so devices measure them with that clock: every sealed message tells it,
the monotonic clock carries it on, and it is saved now and then. A device's own clock is never asked. So one that starts in 1970, or
jumps to 2099, neither shuts the device out nor lets it take what has expired, and a gateway far from any time server whose clock is
days late keeps a working fleet. The price: a device that was off for long learns how long only from the first message after that.
"""

from __future__ import annotations


class FleetTime:
    """A lower bound that runs.

    Args:
        at_ms: what the time was at least, unix milliseconds, at monotonic `now` seconds.
    """

    def __init__(self, at_ms: int, now: float) -> None:
        self._at_ms, self._since_s = at_ms, now

    def at_ms(self, now: float) -> int:
        """Unix milliseconds at monotonic `now` seconds."""
        return self._at_ms + max(0, int(1000 * (now - self._since_s)))

    def raise_to(self, at_ms: int, now: float) -> None:
        """Somebody who can be trusted says that it is at least this late."""
        if at_ms > self.at_ms(now):
            self._at_ms, self._since_s = at_ms, now
