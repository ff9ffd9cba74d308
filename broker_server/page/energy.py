"""Joules and watts as devices have observed them, from RUNS/.gateway/observations.sqlite where there is one. Unknown is None, never 0."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_server.observations import open_observations
from regrow.errors import LocalError

POINTS = 600


@dataclass(frozen=True, slots=True)
class Energy:
    """What a run took, over all phases that were measured. unmeasured_s: seconds of phases whose joules nobody knows."""

    joules: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    certainties: tuple[str, ...] = ()
    unmeasured_s: float = 0.0

    def table(self) -> dict[str, Any]:
        """For JSON."""
        how = ", ".join(self.certainties)
        return {"joules": self.joules, "phases": self.phases, "certainty": how, "unmeasured_s": self.unmeasured_s}


def _rows(home: Path, query: str, values: Sequence[object]) -> list[Any]:
    with suppress(sqlite3.Error, LocalError), closing(open_observations(home)) as db:  # not there yet, or being made: nothing is known
        return db.execute(query, values).fetchall()
    return []


def spent_on(home: Path, run: str, device: str | None = None) -> Energy:
    """What a run took, of all devices or of one."""
    query = """SELECT phase, certainty, sum(joules), sum(iif(joules IS NULL, seconds, 0)) FROM phases
               WHERE run = ? AND (? IS NULL OR device = ?) GROUP BY phase, certainty"""
    phases: dict[str, float] = {}
    certainties: set[str] = set()
    unmeasured_s = 0.0
    for phase, certainty, joules, unknown_s in _rows(home, query, (run, device, device)):
        unmeasured_s += unknown_s
        if joules is not None:
            phases[phase] = phases.get(phase, 0.0) + joules
            certainties.add(certainty)
    return Energy(sum(phases.values()) if phases else None, phases, tuple(sorted(certainties)), unmeasured_s)


def joules_at(home: Path, run: str, times_s: Sequence[float]) -> list[float | None]:
    """Joules of a run up to each of these times (unix seconds, ascending)."""
    query = "SELECT at_s + seconds, joules FROM phases WHERE run = ? AND joules IS NOT NULL ORDER BY 1"
    rows, found, total, at = _rows(home, query, (run,)), [], 0.0, 0
    for time_s in times_s:
        while at < len(rows) and rows[at][0] <= time_s:
            total += rows[at][1]
            at += 1
        found.append(total if at else None)
    return found


def power_of(home: Path, device: str) -> list[tuple[float, float | None, float | None]]:
    """(unix seconds, watts, degrees Celsius) of a device's journal, evenly thinned."""
    query = """SELECT at_s, watts, temperature_c FROM
               (SELECT at_s, watts, temperature_c, row_number() OVER (ORDER BY at_s) AS place, count(*) OVER () AS count
                FROM power WHERE device = ?) WHERE place % max(1, count / ?) = 0 ORDER BY at_s"""
    return _rows(home, query, (device, POINTS))
