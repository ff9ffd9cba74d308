"""What a device's owner allows it: the limits, what was used of them, and what follows now. Pure: sensors, counts and times are passed in.

A limit that cannot be judged, because its sensor says nothing, holds: the device does not work, and says so. Bytes are counted by the
device's local day, as data plans are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from regrow.errors import LocalError

DAY_MINUTES = 24 * 60
COOLER_C = 3.0  # so much below the ceiling training goes on
FULLER_PERCENT = 2.0  # so much above the floor work begins again
KEPT_BACK = 0.05  # of a day's bytes, for heartbeats and what the fleet says
LONGEST_DAY_S = 25 * 3600.0  # with the hour that the end of summer time adds
UNMEASURED_MOST = 3  # rounds in a row
BYTES, JOULES, BATTERY, HEAT = "bytes a day", "joules a round", "battery floor", "temperature ceiling"
HOURS, UNMETERED = "hours", "unmetered only"


@dataclass(frozen=True, slots=True)
class Hours:
    """A stretch of every day, in minutes of the local day: from `start` on, until before `end`; it may go past midnight.

    Raises:
        LocalError: a time that no day has, or a stretch without length.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not (0 <= self.start < DAY_MINUTES and 0 <= self.end < DAY_MINUTES) or self.start == self.end:
            raise LocalError(f"hours {self}: two different times from 00:00 to 23:59 are needed, for example 22:00-06:00")

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Of "22:00-06:00"; "24:00" is midnight too.

        Raises:
            LocalError: it is not written so.
        """
        found = re.fullmatch(r"([01][0-9]|2[0-4]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])", text, re.ASCII)
        if found is None:
            raise LocalError(f"{text!r} are no hours: write them as 22:00-06:00")
        start, end = (60 * int(found[index]) + int(found[index + 1]) for index in (1, 3))
        return cls(0 if start == DAY_MINUTES else start, 0 if end == DAY_MINUTES else end)

    def wait_s(self, minute: float) -> float:
        """Seconds from this minute of the day until the stretch; 0.0 within it."""
        since = (minute - self.start) % DAY_MINUTES
        return 0.0 if since < (self.end - self.start) % DAY_MINUTES else 60.0 * (DAY_MINUTES - since)

    def __str__(self) -> str:
        return "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.end))


@dataclass(frozen=True, slots=True)
class Budget:
    """One device's limits; None, or False, is no limit.

    Args:
        bytes_per_day: sent and received by this device's agent.
        joules_per_round: of fetching, training and sending.
        battery_floor: percent; below it nothing is begun.
        max_temperature_c: of the hottest sensor; from there on training stands still.
        hours: when it may work.
        unmetered_only: not over a network that is paid by the byte.

    Raises:
        LocalError: a value is out of range; the message names the option.
    """

    bytes_per_day: int | None = None
    joules_per_round: float | None = None
    battery_floor: float | None = None
    max_temperature_c: float | None = None
    hours: Hours | None = None
    unmetered_only: bool = False

    def __post_init__(self) -> None:
        ranges = (
            ("max-bytes-per-day", self.bytes_per_day, 1, 2**53),
            ("max-joules-per-round", self.joules_per_round, 1e-3, 1e12),
            ("battery-floor", self.battery_floor, 0, 100),
            ("max-temperature", self.max_temperature_c, 0, 150),
        )
        for name, value, least, most in ranges:
            if value is not None and not least <= value <= most:  # false for NaN too
                raise LocalError(f"--{name} {value}: a number from {least:g} to {most:g} is needed")

    def __bool__(self) -> bool:
        return self != Budget()


@dataclass(frozen=True, slots=True)
class Seen:
    """What the sensors say now; None is unknown.

    Args:
        minute: of the local day; None while the clock is not set.
        day_left_s: until the next local day.
        battery: percent, of the emptiest.
        temperature_c: of the hottest.
        metered: the network that leads to the broker is paid by the byte.
    """

    minute: float | None = None
    day_left_s: float = 0.0
    battery: float | None = None
    temperature_c: float | None = None
    metered: bool | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """What was used, as it outlives a restart.

    Args:
        day: the local day, as 2026-11-21; "" before the first.
        counted_s: how long it was counted under this day.
        sent_received_bytes: on this day.
        run: whose rounds `joules` are of.
        joules: share of the model -> joules of the last round that trained so much.
        unmeasured: rounds in a row whose joules nobody knows.
        lost: what was used was written down and cannot be read, so until the next day limits hold as if they were reached.
    """

    day: str = ""
    counted_s: float = 0.0
    sent_received_bytes: int = 0
    run: str = ""
    joules: Mapping[float, float] | None = None
    unmeasured: int = 0
    lost: bool = False

    def at(self, day: str, passed_s: float, more_bytes: int) -> Used:
        """The same a moment later. A clock that goes back begins no new day, and one that had gone far ahead holds none for ever.

        Args:
            day: the local day now; "" where it must not be told, as by a clock that is not set after what was used was lost.
            passed_s: monotonic seconds since the last time.
            more_bytes: since then.
        """
        this = day if self.lost and not self.day else self.day  # what was lost was lost today
        if day > this or self.counted_s >= LONGEST_DAY_S:
            return replace(self, day=day, counted_s=0.0, sent_received_bytes=more_bytes, lost=False)
        return replace(self, day=this, counted_s=self.counted_s + passed_s, sent_received_bytes=self.sent_received_bytes + more_bytes)

    def round_done(self, run: str, share: float, joules: float | None) -> Used:
        """A round has ended. Another run's rounds say nothing of this one's; joules: None where nobody knows them."""
        known = dict(self.joules or {}) if run == self.run else {}
        if joules is None:
            return replace(self, run=run, joules=known, unmeasured=self.unmeasured + 1)
        return replace(self, run=run, joules={**known, share: joules}, unmeasured=0)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the limits allow from now on.

    Args:
        train: begin or go on with training; where not, a job at hand is given back.
        cool: False: training stands still between two steps.
        link: send and fetch what training needs; where not, heartbeats become rare.
        bytes_left: of today, for work; None: as many as it wants.
        density: the largest share of the model that may be trained.
        said: which limits hold and why; "" where none does.
        names: of the limits that hold.
        until_s: monotonic seconds when all of it may be over; None where nobody knows.
        day_end_s: monotonic seconds when the count of bytes begins anew.
    """

    train: bool = True
    cool: bool = True
    link: bool = True
    bytes_left: int | None = None
    density: float = 1.0
    said: str = ""
    names: frozenset[str] = frozenset()
    until_s: float | None = None
    day_end_s: float = math.inf


@dataclass(frozen=True, slots=True)
class _Holds:
    """A limit that holds, why, and for how long; None where nobody knows."""

    name: str
    why: str
    seconds: float | None = None


def judge(budget: Budget, seen: Seen, used: Used, before: Allowed, now: float) -> Allowed:
    """What follows from limits, sensors and what was used.

    Args:
        before: what followed last time, so that heat and battery do not switch to and fro.
        now: monotonic seconds.
    """
    train = [found for found in (_hours(budget, seen), _battery(budget, seen, before)) if found is not None]
    hot = _heat(budget, seen, before)
    left = None if budget.bytes_per_day is None else _left(budget.bytes_per_day, used)
    link = [found for found in (_network(budget, seen), _bytes(budget, seen, used, left)) if found is not None]
    share, tight = _joules(budget, seen, used)
    if tight is not None and share == 0.0:
        train.append(tight)
    holding = [*train, *([hot] if hot is not None else []), *link]
    waits = [found.seconds for found in holding]
    known = [wait for wait in waits if wait is not None]
    told = [*holding, *([tight] if tight is not None and tight not in holding else [])]
    return Allowed(
        train=not train,
        cool=hot is None,
        link=not link,
        bytes_left=None if left is None else max(left, 0),
        density=share,
        said="; ".join(f"{found.name}: {found.why}" for found in told),
        names=frozenset(found.name for found in told),
        until_s=now + max(known) if known and len(known) == len(waits) else None,
        day_end_s=math.inf if left is None else now + seen.day_left_s,
    )


def _hours(budget: Budget, seen: Seen) -> _Holds | None:
    if budget.hours is None:
        return None
    if seen.minute is None:
        return _Holds(HOURS, "the clock is not set, so nobody knows whether it is time")
    wait_s = budget.hours.wait_s(seen.minute)
    return _Holds(HOURS, f"it works from {str(budget.hours).replace('-', ' to ')} only", wait_s) if wait_s else None


def _battery(budget: Budget, seen: Seen, before: Allowed) -> _Holds | None:
    floor = budget.battery_floor
    if floor is None:
        return None
    if seen.battery is None:
        return _Holds(BATTERY, "the battery cannot be read")
    again = floor + FULLER_PERCENT if BATTERY in before.names else floor
    return _Holds(BATTERY, f"at {seen.battery:.0f} %, the floor is {floor:g} %") if seen.battery < min(again, 100.0) else None


def _heat(budget: Budget, seen: Seen, before: Allowed) -> _Holds | None:
    ceiling = budget.max_temperature_c
    if ceiling is None:
        return None
    if seen.temperature_c is None:
        return _Holds(HEAT, "no temperature can be read")
    again = ceiling - COOLER_C if HEAT in before.names else ceiling
    return _Holds(HEAT, f"{seen.temperature_c:.0f} C, the ceiling is {ceiling:g} C") if seen.temperature_c >= again else None


def _network(budget: Budget, seen: Seen) -> _Holds | None:
    if not budget.unmetered_only or seen.metered is False:
        return None
    return _Holds(UNMETERED, "nobody says whether this network is metered" if seen.metered is None else "this network is metered")


def _left(bytes_per_day: int, used: Used) -> int:
    """Of today's bytes, for work."""
    return 0 if used.lost else int((1 - KEPT_BACK) * bytes_per_day) - used.sent_received_bytes


def _bytes(budget: Budget, seen: Seen, used: Used, left: int | None) -> _Holds | None:
    if left is None or left > 0 or budget.bytes_per_day is None:
        return None
    if used.lost:
        return _Holds(BYTES, f"today's count was damaged, so all {budget.bytes_per_day} count as used until tomorrow", seen.day_left_s)
    return _Holds(BYTES, f"{used.sent_received_bytes} of {budget.bytes_per_day} used today", seen.day_left_s)


def _joules(budget: Budget, seen: Seen, used: Used) -> tuple[float, _Holds | None]:
    """(the largest share of the model that a round may train, why it is not all of it).

    What took too much is not tried again in this run: the next smaller share that did not, or one that would in proportion.
    """
    limit = budget.joules_per_round
    if limit is None:
        return 1.0, None
    if used.lost:
        return 0.0, _Holds(JOULES, "what rounds took was damaged on the disk, so it tries none until tomorrow", seen.day_left_s)
    if used.unmeasured >= UNMEASURED_MOST:
        why = f"the last {used.unmeasured} rounds were not measured, so it rests until one that is over turns out to be measured"
        return 0.0, _Holds(JOULES, f"{why}, or the agent is started again: look at the meter")
    known = used.joules or {}
    over = {share: joules for share, joules in known.items() if joules > limit}
    if not over:
        return 1.0, None
    least = min(over)
    within = max((share for share in known if share < least), default=0.0)
    share = max(within, least * limit / over[least])
    return share, _Holds(JOULES, f"a round with {100 * least:.2g} % of the parameters took {over[least]:.3g} J, {limit:g} J are allowed")
