"""The limits of this device's owner at work: keeps count of what was used, and says when what is allowed changes.

The count outlives every restart. While the agent runs it is written ahead, a hundredth of the day's bytes at a time, so that after a power
cut it is too high by that at most, and too low only by what passed in the last turn of the loop; an orderly end writes it as it is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec

from edge_agent.conditions import Reading
from edge_agent.doctor.host import EARLIEST_YEAR
from edge_agent.state import StateFolder, content_of
from regrow.budget import JOULES, Allowed, Budget, Hours, Seen, Used, judge
from regrow.errors import LocalError, UsageError
from regrow.findings import Finding
from regrow.observations import PhaseSeen, Row

log = logging.getLogger(__name__)
BUDGET = "budget"
LOOK_S = 1.0
LEAST_AHEAD_BYTES = 16 * 1024
NOTICED_S = 5.0  # a time that moves by less is the same
SETTLE_S = 5.0  # after its receipt, what a round took is still being added up
ROUNDS_KEPT = 16


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The state file: JSON. `limits`, `said`: for people, what is set and what holds; `lost`: as in `Used`."""

    day: Annotated[str, msgspec.Meta(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?\Z")]
    counted_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    sent_received_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**60)]
    run: str
    joules: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1e15)]]
    limits: str
    said: str
    lost: bool = False


class RoundJoules:
    """Joules of whole rounds, by the number of their assignment: the sum of their phases, measured or modelled. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[int, float | None] = {}

    def add(self, row: Row) -> None:
        """A row of what the device observes of itself; of a phase without joules the whole round's are unknown."""
        if not isinstance(row, PhaseSeen) or row.number == 0:
            return
        with self._lock:
            before = self._sums.pop(row.number, 0.0)
            self._sums[row.number] = None if before is None or row.joules is None else before + row.joules
            for number in list(self._sums)[:-ROUNDS_KEPT]:
                del self._sums[number]

    def of(self, number: int) -> float | None:
        """What the round took so far; None where nobody knows."""
        with self._lock:
            return self._sums.get(number)


def budget_of(
    *,
    max_bytes_per_day: int | None,
    max_joules_per_round: float | None,
    battery_floor: float | None,
    max_temperature: float | None,
    hours: str | None,
    unmetered_only: bool,
) -> Budget:
    """The limits that the agent's options say.

    Raises:
        UsageError: one is out of range.
    """
    try:
        stretch = None if hours is None else Hours.parse(hours)
        return Budget(max_bytes_per_day, max_joules_per_round, battery_floor, max_temperature, stretch, unmetered_only)
    except LocalError as error:
        said = str(error)
        raise UsageError(said if said.startswith("--") else f"--hours {said.removeprefix('hours ')}") from error


def in_words(budget: Budget) -> str:
    """What is set, for people; "" where nothing is."""
    said = {
        "{} bytes a day": budget.bytes_per_day,
        "{:g} J a round": budget.joules_per_round,
        "battery from {:g} %": budget.battery_floor,
        "below {:g} C": budget.max_temperature_c,
        "hours {}": budget.hours,
        "unmetered networks only": budget.unmetered_only or None,
    }
    return ", ".join(words.format(value) for words, value in said.items() if value is not None)


class Budgets:
    """One agent's limits.

    Args:
        budget: what is set.
        folder: where the count is kept; the agent's.
        read: the sensors, quickly.
        joules: of this device's rounds; None: nothing measures or models them.
        clock: unix seconds.

    Raises:
        LocalError: there is a limit of joules, and nothing that knows them.
    """

    def __init__(
        self,
        budget: Budget,
        folder: StateFolder,
        read: Callable[[], Reading],
        *,
        joules: RoundJoules | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if budget.joules_per_round is not None and joules is None:
            raise LocalError(
                "--max-joules-per-round: nothing here measures energy, and no model of this board is known; "
                "attach a meter (`regrow doctor` says what was found), or leave the option out"
            )
        self.budget = budget
        self.allowed = Allowed()
        self.used = self._load(folder)
        self._folder, self._read, self._joules, self._clock = folder, read, joules, clock
        limit = budget.bytes_per_day
        self._ahead_bytes = None if limit is None else max(limit // 100, LEAST_AHEAD_BYTES)
        self._written_bytes = self.used.sent_received_bytes  # of the day, what the folder says was used
        self._rounds: list[tuple[float, str, int, float]] = []  # (when it was over, run, number, share) of those to be added up
        self._counted: tuple[float, int] | None = None  # when it was last counted, and the bytes of this process then
        self._looked: tuple[float, int] | None = None  # the same of the last judgement
        if self.used.lost:
            self._write()  # before another start finds no file, as on a new device

    @staticmethod
    def _load(folder: StateFolder) -> Used:
        """What was used; where it was written down and does not check out, nobody knows, and the owner's limits are kept."""
        if not (folder.path / BUDGET).exists():
            return Used()
        data = folder.get(BUDGET)
        try:
            if data is None:
                raise ValueError(folder.rejected[-1][1])
            saved = msgspec.json.decode(data, type=Saved)
            joules = {float(share): value for share, value in saved.joules.items()}
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("what was used today is not known (%s): limits of bytes and joules hold until tomorrow", error)
            return Used(lost=True)
        return Used(saved.day, saved.counted_s, saved.sent_received_bytes, saved.run, joules, lost=saved.lost)

    def look(self, now: float, total_bytes: int) -> Allowed | None:
        """What is allowed from now on, where that has changed; None where not, or when hardly a byte or a second has passed.

        Args:
            now: monotonic seconds.
            total_bytes: sent and received since this process began.
        """
        self._count(now, total_bytes)
        first, little = self._looked is None, self._ahead_bytes or math.inf
        if self._looked is not None and now - self._looked[0] < LOOK_S and total_bytes - self._looked[1] < little:
            return None
        self._looked = now, total_bytes
        self._add_rounds(now - SETTLE_S)
        allowed = judge(self.budget, self._seen(), self.used, self.allowed, now)
        before, self.allowed = self.allowed, allowed
        if allowed.names != before.names or first:
            self._keep()
        return allowed if first or not _same(before, allowed) else None

    def round_done(self, run: str, number: int, share: float, now: float) -> None:
        """The round of assignment `number` of this run is over at monotonic `now`, and trained this share of the model."""
        self._rounds.append((now, run, number, share))

    def _add_rounds(self, over_s: float) -> None:
        """Look at what the rounds took that were over by then."""
        while self._rounds and self._rounds[0][0] <= over_s:
            _, run, number, share = self._rounds.pop(0)
            if self.budget.joules_per_round is None or self._joules is None:
                continue
            joules = self._joules.of(number)
            self.used = self.used.round_done(run, share, joules)
            if joules is None:
                log.warning("%s: nobody knows what the round of assignment %d took", JOULES, number)
            self._keep()

    def close(self) -> None:
        """Write what was used as it is."""
        self._add_rounds(math.inf)
        self._written_bytes = self.used.sent_received_bytes
        self._write()

    def _count(self, now: float, total_bytes: int) -> None:
        passed_s, more = now - (now if self._counted is None else self._counted[0]), total_bytes - (self._counted or (0, 0))[1]
        self._counted = now, total_bytes
        day, now_s = self.used.day, self._clock()
        knows = _is_set(now_s) or not self.used.lost
        self.used = self.used.at(_day(now_s) if knows else "", passed_s, more)
        if self.used.day != day:
            self._written_bytes = -1
        if self._ahead_bytes is not None and self.used.sent_received_bytes > self._written_bytes:
            self._keep()

    def _keep(self) -> None:
        """Write ahead, unless what was written is still more than what was used."""
        if self.used.sent_received_bytes > self._written_bytes:
            self._written_bytes = self.used.sent_received_bytes + (self._ahead_bytes or 0)
        self._write()

    def _seen(self) -> Seen:
        now_s, reading = self._clock(), self._read()
        local = time.localtime(now_s)
        minute = local.tm_hour * 60 + local.tm_min + local.tm_sec / 60
        tomorrow_s = time.mktime((local.tm_year, local.tm_mon, local.tm_mday + 1, 0, 0, 0, 0, 0, -1))
        return Seen(
            minute if _is_set(now_s) else None, max(tomorrow_s - now_s, 0.0), reading.battery, reading.temperature_c, reading.metered
        )

    def _write(self) -> None:
        used = self.used
        joules = {str(share): joules for share, joules in (used.joules or {}).items()}
        said = (in_words(self.budget), self.allowed.said)
        saved = Saved(used.day, used.counted_s, self._written_bytes, used.run, joules, *said, lost=used.lost)
        self._folder.put(BUDGET, msgspec.json.encode(saved))


def limits_in(folder: Path) -> Finding:
    """What the owner's limits are and what holds now, as the agent with this state folder last wrote it."""
    try:
        data = content_of((folder / BUDGET).read_bytes())
        saved = None if data is None else msgspec.json.decode(data, type=Saved)
    except FileNotFoundError:
        return Finding("limits", "ok", "none is set")
    except OSError as error:
        return Finding("limits", "unknown", f"{error.strerror}: {folder / BUDGET}", "ask as root, or as the user of the service")
    except (msgspec.DecodeError, ValueError):
        saved = None
    if saved is None:
        return Finding(
            "limits", "warn", f"{folder / BUDGET} is damaged", "limits of bytes and joules hold from the agent's next start until tomorrow"
        )
    used = f"; {saved.sent_received_bytes} bytes on {saved.day}" if saved.day else ""
    if saved.said:
        return Finding("limits", "warn", f"{saved.said} (set: {saved.limits}{used})", "it works again by itself; docs/budgets.md says when")
    return Finding("limits", "ok", f"none holds (set: {saved.limits}{used})")


def _is_set(unix_s: float) -> bool:
    return time.localtime(unix_s).tm_year >= EARLIEST_YEAR


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(unix_s))


def _same(one: Allowed, other: Allowed) -> bool:
    """Whether nobody need hear of the difference: the times of both are found anew with every look."""
    moved = [
        abs(a - b) > NOTICED_S if a is not None and b is not None and a != b else a != b
        for a, b in ((one.until_s, other.until_s), (one.day_end_s, other.day_end_s))
    ]
    return not any(moved) and replace(one, until_s=None, day_end_s=0.0) == replace(other, until_s=None, day_end_s=0.0)
