"""A field run as it was recorded: every repetition with its run's course and what each device observed, ready to be tabled and drawn."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from broker_server.field.observed import TRAINING, Energy, Observed, Span, added, observe, observed_devices
from broker_server.field.plan import Repetition, repetitions_of
from broker_server.field.progress import FieldFolder, Step
from broker_server.run_record import Course, Point, course_of, facts_of
from broker_server.runs import read_task
from regrow.errors import LocalError
from regrow.scoring import score_name


@dataclass(frozen=True, slots=True)
class Reached:
    """The state of a repetition at one moment of its run: bytes of all devices, and joules as far as they are known (None: nothing is)."""

    elapsed_s: float
    score: float
    bytes: float
    joules: float | None


@dataclass(frozen=True)
class Recorded:
    """One repetition that ran to its end. observed: by device; baseline: what they observed in the idle phase before it."""

    repetition: Repetition
    step: Step
    path: Path
    course: Course
    observed: dict[str, Observed]
    baseline: dict[str, Observed]

    @property
    def devices(self) -> list[str]:
        """Everybody who trained or sent rows in it."""
        seen = [name for name, observed in self.observed.items() if any(observed.rows.values())]
        return sorted({*self.course.devices, *seen})

    @cached_property
    def spent(self) -> list[tuple[float, float | None]]:
        """(bytes, joules) at every point of the course."""
        points = self.course.points
        return list(zip(bytes_until(self.course, self.observed, points), self.joules_until([each.wall_s for each in points]), strict=True))

    @cached_property
    def curve(self) -> list[Reached]:
        """Score, bytes and joules at every version that was scored anew."""
        found: list[Reached] = []
        for point, (spent_bytes, joules) in zip(self.course.points, self.spent, strict=True):
            if point.score is not None and (not found or point.score != found[-1].score or point is self.course.points[-1]):
                found.append(Reached(point.wall_s - self.step.start_s, point.score, spent_bytes, joules))
        return found

    @cached_property
    def bytes_in_all(self) -> float:
        """Of the whole run, as `energy` is."""
        return bytes_in_all(self.course, self.observed)

    def transferred(self, column: str, what: Collection[str]) -> float:
        """packet_bytes or payload_bytes of these kinds of transfers, of all devices, up and down."""
        return transferred(self.observed, column, what)

    @property
    def has_transfers(self) -> bool:
        """Whether all devices that trained have observed transfers."""
        return have_transfers(self.course, self.observed)

    def joules_until(self, times: Sequence[float]) -> list[float | None]:
        """Of all devices that know theirs; None where one that trained does not, for a sum without it would look small."""
        parts = [self.observed[name].joules_until(times) if name in self.observed else [None] * len(times) for name in self.devices]
        at_each = [[part[index] for part in parts] for index in range(len(times))]
        return [sum(each) if each and None not in each else None for each in at_each]  # type: ignore[arg-type]

    @property
    def metered(self) -> list[str]:
        """Those of `devices` that know joules of their own."""
        seen = {name: observed.energy().values() for name, observed in self.observed.items()}
        return [name for name in self.devices if any(energy.joules is not None for energy in seen.get(name, ()))]

    def energy(self) -> Energy | None:
        """Of all devices and phases; None where one of the devices knows no joules, for a sum without it would look small."""
        if self.metered != self.devices:
            return None
        return added(energy for observed in self.observed.values() for energy in observed.energy().values())

    def mean_density(self) -> float | None:
        """Over time, of all devices that joined."""
        return time_mean([(point.wall_s, point.mean_density) for point in self.course.points], self.step.end_s)


@dataclass(frozen=True, slots=True)
class FieldRecord:
    """All of a field run. score: what the task's scores are called; marks: (unix seconds, device or "", text)."""

    field: FieldFolder
    score: str
    runs: tuple[Recorded, ...]
    interrupted: tuple[Step, ...]
    marks: tuple[tuple[float, str, str], ...]
    observed: bool

    @property
    def methods(self) -> list[str]:
        """Those of the plan of which at least one repetition was run."""
        there = {recorded.repetition.method for recorded in self.runs}
        return [method for method in self.field.plan.methods if method in there]

    def of(self, method: str) -> list[Recorded]:
        """The repetitions of one method."""
        return [recorded for recorded in self.runs if recorded.repetition.method == method]

    @property
    def devices(self) -> list[str]:
        """The plan's, and whoever else took part."""
        return list(dict.fromkeys([*self.field.plan.devices, *(name for recorded in self.runs for name in recorded.devices)]))

    @property
    def span(self) -> Span:
        """(first, last) unix seconds of the phases that are over."""
        steps = [step for step in self.field.steps if step.kind in ("baseline", "run")]
        return min((step.start_s for step in steps), default=0.0), max((step.end_s for step in steps), default=0.0)

    @property
    def deleted(self) -> list[str]:
        """Runs that were made and are no longer there."""
        there = {recorded.step.run for recorded in self.runs}
        return [step.run for step in self.field.done().values() if step.run not in there]

    @property
    def outsiders(self) -> list[str]:
        """Who took part without being in the plan."""
        return [name for name in self.devices if name not in self.field.plan.devices]


def read_record(field: FieldFolder, db: sqlite3.Connection | None) -> FieldRecord:
    """Everything that was recorded of a field run.

    Args:
        db: observations, as broker_server.observations opens them; None where no device has sent any.

    Raises:
        LocalError: no repetition was run to its end, or a run cannot be read.
    """
    done, runs = field.done(), field.path.parent.parent
    if not done:
        raise LocalError(f"{field.plan.name}: no repetition has been run to its end yet; `regrow field run` goes on with it")
    baselines = {step.run: step for step in field.steps if step.kind == "baseline"}
    there = set() if db is None else set(observed_devices(db))
    recorded = []
    for repetition in repetitions_of(field.plan):
        step = done.get(repetition.number)
        path = runs / (step.run if step is not None else repetition.name)
        if step is None or not (path / "log.sqlite").is_file():
            continue
        devices = sorted(there & {*field.plan.devices, *facts_of(path).devices})
        baseline = baselines.get(step.run)
        recorded.append(
            Recorded(
                repetition,
                step,
                path,
                course_of(path),
                {} if db is None else {name: observe(db, name, step.start_s, step.end_s) for name in devices},
                {} if db is None or baseline is None else {name: observe(db, name, baseline.start_s, baseline.end_s) for name in devices},
            )
        )
    if not recorded:
        raise LocalError(f"{field.plan.name}: all of its runs were deleted from {runs}")
    task = read_task(recorded[0].path / "task")
    interrupted = tuple(step for step in field.steps if step.kind == "interrupted")
    marks = tuple(_marks(db, field)) if db is not None else ()
    return FieldRecord(field, score_name(task.training), tuple(recorded), interrupted, marks, bool(there))


def _marks(db: sqlite3.Connection, field: FieldFolder) -> Iterator[tuple[float, str, str]]:
    """What people and devices have marked from the first phase to the last; a person's are the gateway's time already."""
    steps = [step for step in field.steps if step.kind in ("baseline", "run")]
    start_s, end_s = min(step.start_s for step in steps), max(step.end_s for step in steps)
    mine = db.execute("SELECT at_s, text FROM annotations WHERE at_s BETWEEN ? AND ? ORDER BY at_s", (start_s, end_s))
    found = [(at_s, "", text) for at_s, text in mine]
    for device in observed_devices(db):
        found += [(row["at_s"], device, row["text"]) for row in observe(db, device, start_s, end_s, ("marks",)).rows["marks"]]
    yield from sorted(found)


def transferred(observed: Mapping[str, Observed], column: str, what: Collection[str]) -> float:
    """packet_bytes or payload_bytes of these kinds of transfers, of all devices, up and down."""
    return sum(each.bytes_until(column, what, [each.end_s])[0] for each in observed.values())


def bytes_until(course: Course, observed: Mapping[str, Observed], points: Sequence[Point]) -> list[float]:
    """Up and down, by each point: packets of training, where every device has observed its transfers, else payload by telemetry."""
    if not have_transfers(course, observed):
        return [float(point.bytes_up + point.bytes_down) for point in points]
    parts = [each.bytes_until("packet_bytes", TRAINING, [point.wall_s for point in points]) for each in observed.values()]
    return [sum(each) for each in zip(*parts, strict=True)]


def bytes_in_all(course: Course, observed: Mapping[str, Observed]) -> float:
    """The same of all that was observed, or of the last telemetry, which may be later than the last point."""
    if have_transfers(course, observed):
        return transferred(observed, "packet_bytes", TRAINING)
    return float(sum(device.bytes_up + device.bytes_down for device in course.devices.values()))


def have_transfers(course: Course, observed: Mapping[str, Observed]) -> bool:
    """Whether all devices that trained in a run have observed transfers."""
    trained = [name for name, device in course.devices.items() if device.updates]
    return bool(trained) and all(name in observed and observed[name].rows["transfers"] for name in trained)


def time_mean(values: Sequence[tuple[float, float]], end_s: float) -> float | None:
    """The mean over time of a value that holds from each time to the next, the last until end_s; None for none."""
    if not values:
        return None
    edges = [*(at_s for at_s, _ in values[1:]), max(end_s, values[-1][0])]
    spans = [max(until - at_s, 0.0) for (at_s, _), until in zip(values, edges, strict=True)]
    total = sum(spans)
    if total <= 0.0:
        return values[-1][1]
    return sum(value * seconds for (_, value), seconds in zip(values, spans, strict=True)) / total


def reach(curve: Sequence[Reached], target: float) -> Reached | None:
    """Where the curve first has the target's score; None if it never does."""
    return next((point for point in curve if point.score >= target), None)
