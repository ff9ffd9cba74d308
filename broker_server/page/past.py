"""What runs have left in their stores, thinned to what a picture shows. Read without a lock, on the threads of the page.

Strategy: SQLite does the sums, since it leaves the interpreter to the coordinator meanwhile; only what is shown comes up to Python.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_server.page import energy
from broker_server.run_files import connect
from broker_server.run_record import facts_of, grown
from broker_server.runs import known_of, read_task, run_folders, run_info
from broker_server.view import in_words
from regrow.errors import LocalError
from regrow.levels import densities_of
from regrow.machine import Note
from regrow.presence import QUIET_S
from regrow.roster import HEARTBEATS

POINTS = 600
FRESH_S = 20.0
MOST_CHARACTERS = 300  # of an event: devices have a say in some
RECENT_ROWS = 300_000  # of the metrics table, for the history of one device
Table = dict[str, Any]
# A counter that is less than before has begun anew; what it said first was counted before this run heard of it.
_GROWN = """
WITH said AS (
    SELECT id, wall_time, json_extract(fields, '$.device') AS who, json_extract(fields, '$.bytes_up') AS up,
           json_extract(fields, '$.bytes_down') AS down
    FROM metrics WHERE kind = 'telemetry'),
before AS (
    SELECT id, wall_time, who, up, down, lag(up, 1, up) OVER each_one AS up_0, lag(down, 1, down) OVER each_one AS down_0
    FROM said WINDOW each_one AS (PARTITION BY who ORDER BY id)),
grown AS (
    SELECT id, wall_time, who, up, down, iif(up >= up_0, up - up_0, up) AS sent, iif(down >= down_0, down - down_0, down) AS received
    FROM before)
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """Bytes that a device spent on a run, and what its own counters said last."""

    sent_bytes: int = 0
    received_bytes: int = 0
    said_up: int | None = None
    said_down: int | None = None

    def after(self, up: int, down: int) -> Spent:
        """With what it says next."""
        return Spent(self.sent_bytes + grown(self.said_up, up), self.received_bytes + grown(self.said_down, down), up, down)


@contextmanager
def reading(run: Path) -> Iterator[sqlite3.Connection]:
    """The store of a run.

    Raises:
        LocalError: it cannot be read.
    """
    with closing(connect(run, read_only=True)) as db:
        try:
            yield db
        except sqlite3.Error as error:
            raise LocalError(f"cannot read {run / 'log.sqlite'}: {error}") from error


def spent_by_device(run: Path) -> dict[str, Spent]:
    """What every device has spent on a run so far."""
    query = f"{_GROWN} SELECT who, sum(sent), sum(received), up, down, max(id) FROM grown GROUP BY who"
    with reading(run) as db:
        return {who: Spent(sent, received, up, down) for who, sent, received, up, down, _ in db.execute(query)}


def updates_by_device(run: Path) -> dict[str, tuple[int, float]]:
    """(accepted updates, when the last one was, unix seconds) of every device."""
    query = "SELECT json_extract(fields, '$.device'), count(*), max(wall_time) FROM metrics WHERE kind = 'update' GROUP BY 1"
    with reading(run) as db:
        return {who: (count, at_s) for who, count, at_s in db.execute(query)}


def updates_by_level(run: Path) -> dict[int, tuple[int, int]]:
    """(accepted updates, the examples behind them) of every level."""
    query = """SELECT json_extract(fields, '$.level'), count(*), sum(json_extract(fields, '$.examples'))
               FROM metrics WHERE kind = 'update' GROUP BY 1"""
    with reading(run) as db:
        return {level: (count, examples or 0) for level, count, examples in db.execute(query)}


# ---- a run -------------------------------------------------------------------------------------------------------------------------------


def curve_of(run: Path) -> Table:
    """How a run went; lists have one value for each of `elapsed_s`.

    Raises:
        LocalError: the run cannot be read.
    """
    with reading(run) as db:
        return _curve(_made(db))


def series_of(run: Path, home: Path) -> Table:
    """A run's page: what it was, how it went, and what it cost; lists have one value for each of `elapsed_s`.

    Args:
        home: the gateway's folder, with what devices have observed.

    Raises:
        LocalError: the run cannot be read.
    """
    task = read_task(run / "task")
    with reading(run) as db:
        made = _made(db)
        (last,) = db.execute("SELECT coalesce(max(id), 1) FROM metrics").fetchone()
        sent, received = _bytes_at([row[0] for row in made], last, db)
    scores = json.loads(made[-1][2])["scores"] if made else {}
    spent = energy.spent_on(home, run.name)
    return {
        "run": run.name,
        "task": task.name,
        "method": task.method.name,
        **_curve(made),
        "newest_version": facts_of(run).version,  # of the log, as in the list: a crash may lose the last rows of the curve
        "sent_bytes": sent,
        "received_bytes": received,
        "joules": energy.joules_at(home, run.name, [at for _, at, _ in made]) if spent.joules is not None else None,
        "energy": spent.table(),
        "contributions": contributions(densities_of(task), updates_by_level(run), scores),
        "events": _events(run),
    }


def _made(db: sqlite3.Connection) -> list[tuple[int, float, str]]:
    """Versions as the store has them."""
    (count,) = db.execute("SELECT count(*) FROM metrics WHERE kind = 'aggregated'").fetchone()
    return _thinned(db, "kind = 'aggregated'", count)


def _curve(made: Sequence[tuple[int, float, str]]) -> Table:
    rows = [json.loads(fields) for _, _, fields in made]
    levels = sorted({level for row in rows for level in row["scores"]}, key=float)
    return {
        "at_s": [wall_time for _, wall_time, _ in made],
        "version": [row["version"] for row in rows],
        "elapsed_s": [row["elapsed_s"] for row in rows],
        "mean_density": [row["mean_density"] for row in rows],
        "score": [row["global_score"] for row in rows],
        "levels": {f"{float(level):g}": [row["scores"].get(level) for row in rows] for level in levels},
    }


def _thinned(db: sqlite3.Connection, where: str, count: int, values: Sequence[object] = ()) -> list[tuple[int, float, str]]:
    """At most about POINTS of the rows, evenly, and the last one."""
    step = max(1, count // POINTS)
    query = f"""SELECT id, wall_time, fields FROM
                (SELECT id, wall_time, fields, row_number() OVER (ORDER BY id) AS place FROM metrics WHERE {where})
                WHERE place % ? = 0 OR place = ? ORDER BY id"""
    return db.execute(query, (*values, step, count)).fetchall()


def _bytes_at(ids: Sequence[int], last: int, db: sqlite3.Connection) -> tuple[list[int], list[int]]:
    """What all devices had sent and received when these rows were written."""
    query = f"{_GROWN} SELECT id * {POINTS} / ?, sum(sent), sum(received) FROM grown GROUP BY 1 ORDER BY 1"
    steps = db.execute(query, (last,)).fetchall()
    sent, received, at, sums = [], [], 0, [0, 0]
    for id_ in ids:
        while at < len(steps) and steps[at][0] <= id_ * POINTS // last:
            sums = [sums[0] + steps[at][1], sums[1] + steps[at][2]]
            at += 1
        sent.append(sums[0])
        received.append(sums[1])
    return sent, received


def contributions(densities: Sequence[float], updates: dict[int, tuple[int, int]], scores: dict[Any, float]) -> list[Table]:
    """What each level in use has contributed: updates, examples, the accuracy of its prefix, and what that is above the level below."""
    found: list[Table] = []
    known = {float(density): score for density, score in scores.items()}
    below: float | None = None
    for level, density in enumerate(densities):
        count, examples = updates.get(level, (0, 0))
        score = next((score for each, score in known.items() if abs(each - density) < 1e-9), None)
        if not count and score is None:
            continue
        gain = None if score is None or below is None else score - below
        found.append({"density": density, "updates": count, "examples": examples, "score": score, "gain": gain})
        below = score if score is not None else below
    return found


def _events(run: Path) -> list[Table]:
    kinds = ("restored", "joined", "declined", "restarting", "rejected", "refreshed", "finished")
    query = f"SELECT wall_time, kind, fields FROM metrics WHERE kind IN ({','.join('?' * len(kinds))}) ORDER BY id DESC LIMIT 100"
    with reading(run) as db:
        rows = [(at, Note(kind, json.loads(fields))) for at, kind, fields in db.execute(query, kinds)]
    return [
        {"at_s": at, "kind": note.kind, "device": note.fields.get("device"), "text": in_words(note)[:MOST_CHARACTERS]} for at, note in rows
    ]


# ---- a device ----------------------------------------------------------------------------------------------------------------------------


def device_history(run: Path, home: Path, device: str) -> Table:
    """A device's page: its density, uplink, updates, and, where its journal tells, watts and temperature; each (unix seconds, value)s."""
    mine = "json_extract(fields, '$.device') = ? AND id > (SELECT max(id) FROM metrics) - ?"
    found: Table = {"device": device, "run": run.name}
    with reading(run) as db:
        for name, kinds, key in (
            ("density", ("joined", "restored", "assigned"), "density"),
            ("uplink_bps", ("telemetry",), "uplink_bps"),
            ("staleness", ("update",), "staleness"),
            ("loss", ("update",), "loss"),
        ):
            where = f"kind IN ({','.join('?' * len(kinds))}) AND {mine}"
            values = (*kinds, device, RECENT_ROWS)
            (count,) = db.execute(f"SELECT count(*) FROM metrics WHERE {where}", values).fetchone()
            rows = ((at, json.loads(fields).get(key)) for _, at, fields in _thinned(db, where, count, values))
            found[name] = [(at, value) for at, value in rows if value is not None]
        heartbeats = ("telemetry", device, RECENT_ROWS)
        (count,) = db.execute(f"SELECT count(*) FROM metrics WHERE kind = ? AND {mine}", heartbeats).fetchone()
        beats = [(at, json.loads(fields)) for _, at, fields in _thinned(db, f"kind = ? AND {mine}", count, heartbeats)]
    said = [(at, beat.get("watts"), beat.get("temperature_c")) for at, beat in beats]
    found["power"] = energy.power_of(home, device) or [each for each in said if each[1:] != (None, None)]
    found["energy"] = energy.spent_on(home, run.name, device).table()
    return found


# ---- all runs ----------------------------------------------------------------------------------------------------------------------------


class Runs:
    """The list of runs; a run is read again only when its log has changed, and not all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, ...], float, Table]] = {}

    def all(self) -> list[Table]:
        """A line for every run, the newest first."""
        return sorted(map(self._line, run_folders(self.folder)), key=lambda line: -line["started_s"])

    def path(self, name: str) -> Path | None:
        """The folder of a run, None where there is none of this name."""
        return next((run for run in run_folders(self.folder) if run.name == name), None)

    def _line(self, run: Path) -> Table:
        stamp = tuple(file.stat().st_mtime_ns for file in (run / "log.sqlite", run / "log.sqlite-wal") if file.exists())
        known = self._known.get(run)
        now = time.monotonic()
        if known is None or (known[0] != stamp and now - known[1] > FRESH_S):
            known = self._known[run] = stamp, now, _line_of(run)
        return known[2]


def _line_of(run: Path) -> Table:
    info = known_of(run)
    fields = ("task", "method", "started_s", "version", "devices", "updates", "score", "score_name", "finished")
    return {"run": run.name, **{name: getattr(info, name) for name in fields}}


# ---- a run without its gateway -----------------------------------------------------------------------------------------------------------


def last_state(run: Path) -> Table:
    """What a run's folder says of its fleet, in the fields of a page's state; as new as its store.

    Raises:
        LocalError: the run cannot be read.
    """
    info, task, now_s = run_info(run), read_task(run / "task"), time.time()
    spent, updates = spent_by_device(run), updates_by_device(run)
    last = "SELECT json_extract(fields, '$.device'), wall_time, fields, max(id) FROM metrics WHERE kind {} GROUP BY 1"
    with reading(run) as db:
        said = {who: (at, json.loads(fields)) for who, at, fields, _ in db.execute(last.format("= 'telemetry'"))}
        dense = {
            who: json.loads(fields).get("density") for who, _, fields, _ in db.execute(last.format("IN ('joined', 'restored', 'assigned')"))
        }
        made = db.execute("SELECT fields FROM metrics WHERE kind = 'aggregated' ORDER BY id DESC LIMIT 1").fetchone()
    newest = json.loads(made[0]) if made else {}
    silent_s = HEARTBEATS * task.fleet.heartbeat_s
    devices = {}
    for who in sorted({*said, *dense, *updates} - {None}):
        at, fields = said.get(who, (None, {}))
        row = {name: fields.get(name) for name in ("phase", "uplink_bps", "failed", "step_s", "memory_bytes")}
        resting = fields.get("limit") if fields.get("limit_density") is None else ""
        heard = at is not None and now_s - at <= (max(silent_s, HEARTBEATS * QUIET_S) if resting else silent_s) and not info.finished
        row |= {"online": heard and not resting, "resting": (resting or "") if heard else "", "heard_s": at, "density": dense.get(who)}
        bytes_of = spent.get(who, Spent())
        row |= {"sent_bytes": bytes_of.sent_bytes, "received_bytes": bytes_of.received_bytes}
        count, updated_s = updates.get(who, (0, None))
        devices[who] = row | {"updates": count, "updated_s": updated_s}
    about = {"run": run.name, "task": task.name, "method": task.method.name, "finished": info.finished, "version": info.version}
    about |= {"score": newest.get("global_score"), "mean_density": newest.get("mean_density"), "known": len(devices)}
    about |= {"online": sum(row["online"] for row in devices.values()), "resting": sum(bool(row["resting"]) for row in devices.values())}
    about |= {"sent_bytes": sum(each.sent_bytes for each in spent.values())}
    return {"now_s": now_s, "run": about, "devices": devices, "events": list(reversed(_events(run)))}
