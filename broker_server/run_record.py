"""What a run's log and metrics say about its course: the curve, and what each device did. Read without the run's lock.

Facts that a run must not get wrong (version, state, updates) come from the log's headers; payloads, which are nearly all of it, are not
read. How the run went in between comes from the metrics table, of which a crash may lose the last rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from broker_server.run_files import CURE, connect
from broker_server.store import Metric, Store
from regrow import records
from regrow.errors import LocalError
from regrow.machine import Record
from regrow.task import Task


@dataclass(frozen=True, slots=True)
class Facts:
    """What the log is certain about. rolled_back: its newest version was made by a rollback, so earlier scores are not its own; last_s:
    unix seconds of the newest record, 0 without any."""

    version: int
    devices: frozenset[str]
    updates: int
    finished: str
    rolled_back: bool
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """The run when a version was made. score: of the global model, None before the first evaluation; bytes: payload of all devices."""

    elapsed_s: float
    wall_s: float
    version: int
    score: float | None
    mean_density: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Update:
    """One accepted update; density is that of the assignment it answers, None where no row of it was kept."""

    wall_s: float
    device: str
    version: int
    staleness: int
    bytes: int
    seconds: float
    density: float | None


@dataclass(slots=True)
class DeviceCourse:
    """One device in one run. Bytes are what it metered since its first word in the run."""

    densities: list[tuple[float, float]] = field(default_factory=list)
    """(wall_s, density) whenever it changed."""
    uplinks: list[tuple[float, float]] = field(default_factory=list)
    """(wall_s, bit/s) as it told."""
    updates: list[Update] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def staleness(self) -> float | None:
        """Mean over its updates, in versions."""
        return mean(update.staleness for update in self.updates) if self.updates else None


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went."""

    points: tuple[Point, ...]
    devices: dict[str, DeviceCourse]
    began_s: float | None
    ended_s: float | None
    """Unix seconds of the first and last metric."""


def facts_of(path: Path) -> Facts:
    """What a run's log says, without its payloads.

    Raises:
        LocalError: it cannot be read.
    """
    version, devices, finished, rolled_back = 0, set[str](), "", False
    try:
        with closing(connect(path, read_only=True)) as db:
            updates = int(db.execute("SELECT count(*) FROM log WHERE kind = 'accepted'").fetchone()[0])
            last_s = db.execute("SELECT wall_time FROM log ORDER BY id DESC LIMIT 1").fetchone()
            query = "SELECT kind, header FROM log WHERE kind IN ('joined', 'aggregated', 'rolledback', 'finished') ORDER BY id"
            for kind, header in db.execute(query):
                entry = records.from_record(Record(kind, header.encode()))
                if isinstance(entry, records.Joined):
                    devices.add(entry.device)
                elif isinstance(entry, records.Finished):
                    finished = entry.reason
                elif isinstance(entry, records.Aggregated):
                    version, rolled_back = entry.version, False
                elif isinstance(entry, records.RolledBack):
                    version, rolled_back, finished = entry.version, True, ""
    except sqlite3.Error as error:
        raise LocalError(f"cannot read {path / 'log.sqlite'}: {error}; {CURE}") from error
    return Facts(version, frozenset(devices), updates, finished, rolled_back, float(last_s[0]) if last_s else 0.0)


def newest_score(path: Path) -> float | None:
    """The newest score of the global model in the metrics; None before the first evaluation."""
    query = (
        "SELECT json_extract(fields, '$.global_score') FROM metrics WHERE kind = 'aggregated' "
        "AND json_extract(fields, '$.global_score') IS NOT NULL ORDER BY id DESC LIMIT 1"
    )
    try:
        with closing(connect(path, read_only=True)) as db:
            found = db.execute(query).fetchone()
    except sqlite3.Error as error:
        raise LocalError(f"cannot read {path / 'log.sqlite'}: {error}; {CURE}") from error
    return None if found is None else float(found[0])


def course_of(path: Path) -> Course:
    """How a run went, from its metrics.

    Raises:
        LocalError: it cannot be read.
    """
    with Store.open(path, read_only=True) as store:
        return _Reader().read(store.metrics())


class _Reader:
    """Folds metrics, oldest first, into a course."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._devices: dict[str, DeviceCourse] = {}
        self._assigned: dict[tuple[str, int], float] = {}
        self._meters: dict[str, tuple[int, int]] = {}

    def read(self, metrics: Iterable[Metric]) -> Course:
        began_s = ended_s = None
        for metric in metrics:
            began_s = metric.wall_time if began_s is None else began_s
            ended_s = metric.wall_time
            if metric.kind == "aggregated":
                self._take_version(metric)
            elif isinstance(metric.fields.get("device"), str):
                self._take_device(metric, metric.fields)
        return Course(tuple(self._points), self._devices, began_s, ended_s)

    def _take_version(self, metric: Metric) -> None:
        fields, devices = metric.fields, self._devices.values()
        self._points.append(
            Point(
                elapsed_s=float(fields["elapsed_s"]),
                wall_s=metric.wall_time,
                version=int(fields["version"]),
                score=fields.get("global_score"),
                mean_density=float(fields["mean_density"]),
                bytes_up=sum(device.bytes_up for device in devices),
                bytes_down=sum(device.bytes_down for device in devices),
            )
        )

    def _take_device(self, metric: Metric, fields: dict[str, Any]) -> None:
        who, at_s = str(fields["device"]), metric.wall_time
        device = self._devices.setdefault(who, DeviceCourse())
        if fields.get("density") is not None and (not device.densities or device.densities[-1][1] != fields["density"]):
            device.densities.append((at_s, float(fields["density"])))
        if fields.get("uplink_bps"):
            device.uplinks.append((at_s, float(fields["uplink_bps"])))
        if metric.kind == "assigned":
            self._assigned[who, int(fields["version"])] = float(fields["density"])
        elif metric.kind == "update":
            version = int(fields["version"])
            update = Update(at_s, who, version, int(fields["staleness"]), int(fields["bytes"]), float(fields["seconds"]),
                            self._assigned.get((who, version)))  # fmt: skip
            device.updates.append(update)
        elif metric.kind == "telemetry":
            up, down = int(fields["bytes_up"]), int(fields["bytes_down"])
            old_up, old_down = self._meters.get(who, (None, None))
            self._meters[who] = up, down
            device.bytes_up += grown(old_up, up)
            device.bytes_down += grown(old_down, down)


def grown(before: int | None, now: int) -> int:
    """What a device's counter has counted since its word before (None: there was none). One that says less than before began anew."""
    return 0 if before is None else now - before if now >= before else now


def why_unscored(path: Path, task: Task, version: int) -> str:
    """Why a run that made `version` shows no score, for whoever ends it; "" where it shows one or made nothing."""
    every = task.restoration.every
    if not version or newest_score(path) is not None:
        return ""
    made = f"{version} aggregation{'s' * (version != 1)}"
    if version < every:
        return f"no score yet: {made}, and every {every} of them (`every` in [restoration]) the model is scored"
    if task.evaluation.data is not None:
        return f"no score yet: no evaluation on {task.evaluation.data} ended before the last of {made}"
    return f"no score: in {made} no device reported one; --validation of `regrow agent` holds samples back for that"
