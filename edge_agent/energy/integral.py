"""From readings to joules: trapezoids between two values of power, differences of a counter, and nothing where it is not known.

Every moment after the first reading is in exactly one piece, known or not; what lies between two values too far apart is not bridged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

from edge_agent.energy.meter import Joules, Reading, Unmeasured, Watts, implausible


@dataclass(frozen=True, slots=True)
class Segment:
    """Power over a stretch of time, a straight line in it. Monotonic seconds, watts."""

    began_s: float
    ended_s: float
    began_w: float
    ended_w: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    @property
    def joules(self) -> float:
        return (self.began_w + self.ended_w) / 2 * self.seconds

    def split(self, at_s: float) -> tuple[Segment, Segment]:
        """The two parts before and after a moment in it."""
        part = (at_s - self.began_s) / self.seconds
        watts = self.began_w + part * (self.ended_w - self.began_w)
        return Segment(self.began_s, at_s, self.began_w, watts), Segment(at_s, self.ended_s, watts, self.ended_w)


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of time in which power is not known, and why."""

    began_s: float
    ended_s: float
    reason: str

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    def split(self, at_s: float) -> tuple[Gap, Gap]:
        return Gap(self.began_s, at_s, self.reason), Gap(at_s, self.ended_s, self.reason)


Piece = Union[Segment, Gap]  # noqa: UP007 (3.10 evaluates it)


class Integral:
    """Turns one meter's readings into pieces, in order and without holes.

    Args:
        gap_s: values further apart than this are not bridged.
        correct: true watts from what the meter says.
    """

    def __init__(self, gap_s: float, correct: Callable[[float], float] = lambda watts: watts) -> None:
        self.gap_s, self._correct = gap_s, correct
        self._until_s: float | None = None  # pieces reach to here
        self._power: tuple[float, float] | None = None  # (when, watts) of the last value of power
        self._count: tuple[float, float] | None = None  # (when, joules) of the last value of a counter
        self._why = ""

    def add(self, reading: Reading, now: float) -> Piece | None:
        """The piece up to this reading; None at the first one, and where a meter that tells by itself has told nothing new.

        Args:
            now: monotonic, when it was read; never goes back.
        """
        if isinstance(reading, Unmeasured):
            self._power = self._count = None
            self._why = reading.reason
            return self._unknown(now, reading.reason)
        if isinstance(reading, Joules):
            return self._counted(reading.joules, now)
        return self._told(reading, now if reading.at_s is None else reading.at_s, now)

    def _told(self, reading: Watts, at_s: float, now: float) -> Piece | None:
        before, watts, self._count = self._power, self._correct(reading.watts), None
        if before is not None and at_s <= before[0]:  # nothing new
            if now - before[0] <= self.gap_s:
                return None
            self._power, self._why = None, f"no new value for {now - before[0]:.0f} s"
            return self._unknown(now, self._why)
        why = implausible(watts)
        if why:
            self._power, self._why = None, f"after calibration {why}"
            return self._unknown(at_s, self._why)
        if before is None:  # perhaps a value from before what is told of already
            self._power = (max(at_s, self._until_s or at_s), watts)
            return self._unknown(at_s, self._why)
        self._power = (at_s, watts)
        if at_s - before[0] > self.gap_s:
            return self._unknown(at_s, f"no value for {at_s - before[0]:.1f} s")
        return self._known(before[0], at_s, before[1], watts)

    def _counted(self, joules: float, now: float) -> Piece | None:
        before, self._count, self._power = self._count, (now, joules), None
        if before is None or now <= before[0]:
            return self._unknown(now, self._why)
        if now - before[0] > self.gap_s:
            return self._unknown(now, f"no value for {now - before[0]:.1f} s")
        watts = (joules - before[1]) / (now - before[0])
        why = implausible(watts)
        if not why:
            watts = self._correct(watts)
            why = implausible(watts)
        return self._unknown(now, f"the energy counter {why}") if why else self._known(before[0], now, watts, watts)

    def _known(self, began_s: float, ended_s: float, began_w: float, ended_w: float) -> Piece:
        self._until_s = ended_s
        return Segment(began_s, ended_s, began_w, ended_w)

    def _unknown(self, until_s: float, why: str) -> Piece | None:
        began_s, self._until_s = self._until_s, max(until_s, self._until_s or until_s)
        return None if began_s is None or until_s <= began_s else Gap(began_s, until_s, why or "no earlier value")
