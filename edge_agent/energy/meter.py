"""What a meter says: watts now, joules so far, or why it cannot tell. Never 0 for "don't know".

A meter's own module knows where its numbers lie and raises LocalError for what is absent, cut short or senseless; `look` makes that
`Unmeasured` with the reason, and refuses what no running device draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Union

from regrow.errors import LocalError
from regrow.observations import Certainty

MOST_W = 10_000.0  # above this a number is no power of a device that trains
REASON_MOST = 200


@dataclass(frozen=True, slots=True)
class Watts:
    """Power at one moment. at_s: monotonic, of a meter that tells by itself; None: now."""

    watts: float
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Joules:
    """A counter that only grows: what has been drawn since some moment, its wraps already taken out."""

    joules: float


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """Nothing is known, and why."""

    reason: str


Reading = Union[Watts, Joules, Unmeasured]  # noqa: UP007 (3.10 evaluates it)


class Meter(Protocol):
    """One sensor, or several whose sum is the device's power.

    Attributes:
        name: for people and for rows, at most 64 characters: "ina3221 VDD_IN".
        certainty: "measured" where it sees all that the device draws, "estimated" where it sees a part.
        gap_s: the longest time between two of its values over which power may be taken for known.
        most_hz: faster than this it has nothing new to say, or costs too much.
    """

    name: str
    certainty: Certainty
    gap_s: float
    most_hz: float

    def read(self) -> Reading: ...

    def close(self) -> None: ...


class NoMeter:
    """Stands where there is none: always unmeasured, for this reason."""

    name = "unmeasured"
    certainty: Certainty = "unmeasured"
    gap_s = 1.0
    most_hz = 1.0

    def __init__(self, reason: str) -> None:
        self.reason = reason[:REASON_MOST]

    def read(self) -> Reading:
        return Unmeasured(self.reason)

    def close(self) -> None:
        """Nothing is open."""


def look(read: Callable[[], Watts | Joules]) -> Reading:
    """What `read` gives, or why that is nothing to count on."""
    try:
        reading = read()
    except LocalError as error:
        return Unmeasured(str(error)[:REASON_MOST])
    except OSError as error:
        return Unmeasured(f"{error.filename or 'the sensor'}: {error.strerror or error}"[:REASON_MOST])
    if isinstance(reading, Watts):
        why = implausible(reading.watts)
        return Unmeasured(why) if why else reading
    return reading if math.isfinite(reading.joules) else Unmeasured("the energy counter says no number")


def implausible(watts: float) -> str:
    """Why a running device cannot draw this; nothing where it can."""
    if not math.isfinite(watts):
        return "says no number"
    if watts < 0:
        return f"says {watts:.3g} W: negative, so it is wired the other way round, or the device gives power back"
    if watts == 0:
        return "says 0 W, which no running device draws"
    return f"says {watts:.3g} W, more than a device draws" if watts > MOST_W else ""
