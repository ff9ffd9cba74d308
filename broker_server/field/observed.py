"""What devices observed during a stretch of time: their rows from observations.sqlite, on the gateway's clock, and sums of them.

A device's times are moved by its clock's offset, taken from where it is known best: the offset's own error and 100 ppm of drift since it
was found. Rows that reach over the edges of the stretch count by their share. What no row tells of is missing, never 0.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.observations import FILE, open_observations
from regrow.observations import Certainty

DRIFT = 100e-6
ONE_WAY_S = 1.0  # what an offset without an error may be wrong by
LONGEST_S = 3600.0  # of a row, so that one is found that began before the stretch
EDGE_S = 1.0  # around a stretch, so that rounding leaves out no row that touches it
HEARD_GAP_S = 1.0  # between two rows that follow one another
ORDER: tuple[Certainty, ...] = ("measured", "estimated", "modelled", "unmeasured")
# at_s of these is where the interval ends; of the others, where it begins.
ENDING = ("links", "power")
TABLES = ("transfers", "uplinks", "links", "power", "phases", "missing", "marks")
# What a part of a row has a part of.
DIVIDED = ("joules", "low_j", "high_j", "payload_bytes", "packet_bytes", "sent_bytes", "received_bytes")
Span = tuple[float, float]
TRAINING = ("update", "model", "probe")  # what a transfer is for
TELLING = ("telemetry", "observations")


@dataclass(frozen=True, slots=True)
class Offset:
    """A device's clock minus the gateway's; error_s: its largest error, None where only the way here is known, which makes it less.

    known: whether they were ever compared.
    """

    at_s: float
    seconds: float
    error_s: float | None
    known: bool = True


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of one phase of one device. joules covers known_s of the seconds; None where no meter and no model knew any.

    low_j, high_j: the interval, None where nothing was modelled. certainty: the weakest of what the sum is made of.
    """

    seconds: float
    known_s: float
    joules: float | None
    low_j: float | None
    high_j: float | None
    certainty: Certainty


@dataclass(frozen=True, slots=True)
class Observed:
    """The rows of one device in one stretch, `start_s` to `end_s` on the gateway's clock, by table; at_s is on that clock, too."""

    device: str
    start_s: float
    end_s: float
    offset: Offset
    rows: dict[str, list[dict[str, Any]]]

    def spans(self, table: str) -> Iterator[tuple[float, float, dict[str, Any]]]:
        """(begin, end, row) within the stretch."""
        for row in self.rows[table]:
            begin, end = _interval(table, row["at_s"], row.get("seconds") or 0.0)
            yield max(begin, self.start_s), min(end, self.end_s), row

    def within(self, table: str) -> Iterator[dict[str, Any]]:
        """The rows, those that reach over an edge cut there: at_s, seconds, joules and bytes of what lies within, `share` says how much."""
        for begin, end, row in self.spans(table):
            share = _share(begin, end, row.get("seconds") or 0.0)
            if share == 1.0:
                yield {**row, "share": share}
                continue
            parts = {name: None if row[name] is None else row[name] * share for name in DIVIDED if name in row}
            yield {**row, **parts, "at_s": end if table in ENDING else begin, "seconds": end - begin, "share": share}

    def energy(self) -> dict[str, Energy]:
        """Joules of each phase that was seen."""
        found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for begin, end, row in self.spans("phases"):
            found.setdefault(row["phase"], []).append((end - begin, row))
        return {phase: _sum(rows) for phase, rows in sorted(found.items())}

    def joules_until(self, times: Sequence[float]) -> list[float | None]:
        """What is known to have been used from the start to each of these times; None where nothing is."""
        known = [(begin, end, row["seconds"], row["joules"]) for begin, end, row in self.spans("phases") if row["joules"] is not None]
        first_s = min((begin for begin, *_ in known), default=math.inf)
        return [used if at_s > first_s else None for at_s, used in zip(times, _sums_until(known, times), strict=True)]

    def goodput_bps(self, up: bool) -> float | None:
        """Payload bits by the seconds in which transfers were under way; None without any."""
        mine = [(begin, end, row) for begin, end, row in self.spans("transfers") if bool(row["up"]) is up and row["payload_bytes"]]
        busy_s = length_of([(begin, end) for begin, end, _ in mine])
        bits = sum(8 * row["payload_bytes"] * _share(begin, end, row["seconds"]) for begin, end, row in mine)
        return bits / busy_s if busy_s > 0 else None

    def bytes_until(self, column: str, what: Collection[str], times: Sequence[float]) -> list[float]:
        """payload_bytes or packet_bytes of these kinds of transfers, up and down, from the start to each of these times."""
        counted = [(begin, end, row["seconds"], row[column]) for begin, end, row in self.spans("transfers") if row["what"] in what]
        return _sums_until(counted, times)

    def lost(self) -> list[Span]:
        """Where the device's journal was full and let rows go, merged."""
        return merged([(begin, end) for begin, end, _ in self.spans("missing")])

    def unknown(self) -> list[Span]:
        """Every stretch of which neither a phase, watts nor the link's counters tell: lost, not sent yet, or the device was off."""
        told = [(begin, end) for table in ("phases", "power", "links") for begin, end, _ in self.spans(table)]
        known = merged([(begin - HEARD_GAP_S / 2, end + HEARD_GAP_S / 2) for begin, end in told])
        gaps, at_s = [], self.start_s
        for begin, end in known:
            if begin > at_s:
                gaps.append((at_s, min(begin, self.end_s)))
            at_s = max(at_s, end)
        return [*gaps, (at_s, self.end_s)] if at_s < self.end_s else gaps


def observe(db: sqlite3.Connection, device: str, start_s: float, end_s: float, tables: Sequence[str] = TABLES) -> Observed:
    """One device's rows of a stretch.

    Args:
        db: as broker_server.observations opens it for reading.
        start_s, end_s: unix seconds on the gateway's clock.
        tables: the only ones that are read; the others are left empty.
    """
    offset = offset_at(offsets_of(db, device), (start_s + end_s) / 2)
    rows: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES}
    first_s, last_s = start_s + offset.seconds, end_s + offset.seconds
    for table in tables:
        columns = [column[0] for column in db.execute(f"SELECT * FROM {table} LIMIT 0").description]
        sign = "-" if table in ENDING else "+"
        other = f"at_s {sign} coalesce(seconds, 0)"
        reaches = f"AND max(at_s, {other}) >= ? AND min(at_s, {other}) <= ?" if "seconds" in columns else ""
        query = f"SELECT * FROM {table} WHERE device = ? AND at_s BETWEEN ? AND ? {reaches} ORDER BY at_s"
        edges = (first_s - EDGE_S, last_s + EDGE_S) if reaches else ()
        found = db.execute(query, (device, first_s - LONGEST_S, last_s + LONGEST_S, *edges))
        moved = (_moved(dict(zip(columns, values, strict=True)), offset.seconds) for values in found)
        rows[table] = [row for row in moved if _within(table, row, start_s, end_s)]
    return Observed(device, start_s, end_s, offset, rows)


def offsets_of(db: sqlite3.Connection, device: str) -> list[Offset]:
    """Everything that is known of a device's clock."""
    rows = db.execute("SELECT at_s, offset_s, error_s FROM clocks WHERE device = ? ORDER BY at_s", (device,))
    return [Offset(at_s, offset_s, error_s) for at_s, offset_s, error_s in rows]


def offset_at(offsets: Sequence[Offset], at_s: float) -> Offset:
    """The offset whose error, grown by drift until this time, is the least; 0 without any."""
    if not offsets:
        return Offset(at_s, 0.0, None, known=False)
    return min(offsets, key=lambda offset: (ONE_WAY_S if offset.error_s is None else offset.error_s) + DRIFT * abs(offset.at_s - at_s))


def observed_devices(db: sqlite3.Connection) -> list[str]:
    """Every device that has sent a batch."""
    return [row[0] for row in db.execute("SELECT DISTINCT device FROM batches ORDER BY device")]


def told_until(home: Path, devices: Iterable[str]) -> dict[str, float]:
    """Of each device the time (gateway's clock) of its newest row; rows come oldest first, so all before it are there, too."""
    if not (home / FILE).is_file():
        return {}
    newest = " UNION ALL ".join(f"SELECT max(at_s) AS at_s FROM {table} WHERE device = :device" for table in TABLES)
    found = {}
    with closing(open_observations(home)) as db:
        for device in devices:
            (at_s,) = db.execute(f"SELECT max(at_s) FROM ({newest})", {"device": device}).fetchone()
            if at_s is not None:
                found[device] = at_s - offset_at(offsets_of(db, device), at_s).seconds
    return found


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same stretches without overlaps, ascending."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif end > begin:
            joined.append((begin, end))
    return joined


def length_of(spans: Iterable[Span]) -> float:
    """Seconds that the stretches cover together."""
    return sum(end - begin for begin, end in merged(spans))


def added(energies: Iterable[Energy]) -> Energy | None:
    """All of them together; None for none. Intervals add up as if they erred together, which makes them no narrower than they are."""
    parts = list(energies)
    known = [part for part in parts if part.joules is not None]
    if not parts:
        return None
    ranged = any(part.low_j is not None for part in known)
    return Energy(
        seconds=sum(part.seconds for part in parts),
        known_s=sum(part.known_s for part in parts),
        joules=sum(part.joules or 0.0 for part in known) if known else None,
        low_j=sum(_or(part.low_j, part.joules) for part in known) if ranged else None,
        high_j=sum(_or(part.high_j, part.joules) for part in known) if ranged else None,
        certainty=max((part.certainty for part in known), key=ORDER.index, default="unmeasured"),
    )


def _sum(rows: Sequence[tuple[float, dict[str, Any]]]) -> Energy:
    """Of the rows of one phase, each with the seconds of it that count."""
    parts = []
    for seconds, row in rows:
        share = _share(0.0, seconds, row["seconds"])
        known = row["joules"] is not None
        low_j, high_j = (None if row[name] is None or not known else row[name] * share for name in ("low_j", "high_j"))
        joules = row["joules"] * share if known else None
        parts.append(Energy(seconds, seconds if known else 0.0, joules, low_j, high_j, row["certainty"] if known else "unmeasured"))
    total = added(parts)
    return total or Energy(0.0, 0.0, None, None, None, "unmeasured")


def _sums_until(parts: Sequence[tuple[float, float, float, float]], times: Sequence[float]) -> list[float]:
    """How much of all parts had come by each time; a part is (begin, end, seconds of the whole row, amount of the whole row)."""
    if not parts:
        return [0.0] * len(times)
    begin, end, seconds, amount = np.asarray(parts, np.float64).T
    lasting = np.where(seconds > 0, seconds, 1.0)
    found = []
    for at_s in times:
        share = np.where(seconds > 0, np.clip((np.minimum(end, at_s) - begin) / lasting, 0.0, 1.0), 1.0)
        found.append(float((amount * share)[begin <= at_s].sum()))
    return found


def _or(value: float | None, other: float | None) -> float:
    return (other or 0.0) if value is None else value


def _share(begin: float, end: float, seconds: float) -> float:
    return max(min((end - begin) / seconds, 1.0), 0.0) if seconds > 0 else 1.0


def _interval(table: str, at_s: float, seconds: float) -> Span:
    return (at_s - seconds, at_s) if table in ENDING else (at_s, at_s + seconds)


def _within(table: str, row: dict[str, Any], start_s: float, end_s: float) -> bool:
    begin, end = _interval(table, row["at_s"], row.get("seconds") or 0.0)
    return begin < end_s and (end > start_s or (begin == end and begin >= start_s))


def _moved(row: dict[str, Any], offset_s: float) -> dict[str, Any]:
    row["at_s"] -= offset_s
    return row
