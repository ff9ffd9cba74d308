"""Every row behind a field run's report, as tables for one's own analysis; times are on the gateway's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from broker_server.field.observed import TABLES, length_of
from broker_server.field.record import FieldRecord, Recorded, time_mean
from broker_server.field.summary import PHASES, UNMEASURED, goodput_bps
from broker_server.tabular import Frame, frame

Rows = Iterator[dict[str, Any]]


def frames_of(record: FieldRecord) -> list[Frame]:
    """Every row behind the report: runs, curves, devices, updates, densities, and what devices observed, on the gateway's clock."""
    keys = ("run", "method", "block", "number")
    return [
        frame("runs", (_run_row(run) for run in record.runs), keys),
        frame("curves", _rows(record, _curve_rows), keys),
        frame("devices", _rows(record, _device_rows), keys),
        frame("updates", _rows(record, _update_rows), keys),
        frame("densities", _rows(record, _density_rows), keys),
        *(frame(table, _rows(record, _observed_rows(table)), (*keys, "phase_of_plan", "device", "at_s", "elapsed_s")) for table in TABLES),
        frame("annotations", ({"at_s": at_s, "by": who, "text": text} for at_s, who, text in record.marks), ("at_s", "by", "text")),
    ]


def _rows(record: FieldRecord, of_run: Callable[[Recorded], Rows]) -> Rows:
    for run in record.runs:
        for row in of_run(run):
            yield {**_key(run), **row}


def _key(run: Recorded) -> dict[str, Any]:
    repetition = run.repetition
    return {"run": run.step.run, "method": repetition.method, "block": repetition.block, "number": repetition.number}


def _run_row(run: Recorded) -> dict[str, Any]:
    curve, energy, step = run.curve, run.energy(), run.step
    return _key(run) | {
        "start_s": step.start_s,
        "end_s": step.end_s,
        "final_score": curve[-1].score if curve else None,
        "versions": run.course.points[-1].version if run.course.points else 0,
        "updates": sum(len(device.updates) for device in run.course.devices.values()),
        "bytes": run.bytes_in_all,
        "bytes_of": "packets" if run.has_transfers else "payload by telemetry",
        "joules": None if energy is None else energy.joules,
        "joules_low": None if energy is None else energy.low_j,
        "joules_high": None if energy is None else energy.high_j,
        "joules_certainty": UNMEASURED if energy is None else energy.certainty,
        "devices": len(run.devices),
        "devices_with_joules": len(run.metered),
        "absent": " ".join(step.absent),
        "ended_by": step.reason,
    }


def _curve_rows(run: Recorded) -> Rows:
    for point, (spent_bytes, joules) in zip(run.course.points, run.spent, strict=True):
        yield {
            "elapsed_s": point.wall_s - run.step.start_s,
            "version": point.version,
            "score": point.score,
            "mean_density": point.mean_density,
            "bytes": spent_bytes,
            "joules": joules,
        }


def _device_rows(run: Recorded) -> Rows:
    for name in run.devices:
        course, observed = run.course.devices.get(name), run.observed.get(name)
        offset = None if observed is None else observed.offset
        row: dict[str, Any] = {
            "device": name,
            "up_bps": goodput_bps(run, name, True),
            "down_bps": goodput_bps(run, name, False),
            "updates": 0 if course is None else len(course.updates),
            "staleness": None if course is None else course.staleness,
            "density": None if course is None else time_mean(course.densities, run.step.end_s),
            "clock_offset_s": None if offset is None or not offset.known else offset.seconds,
            "clock_error_s": None if offset is None else offset.error_s,
            "missing_s": None if observed is None else length_of(observed.unknown()),
        }
        energies = {} if observed is None else observed.energy()
        for phase in PHASES:
            energy = energies.get(phase)
            row |= {
                f"{phase}_s": None if energy is None else energy.seconds,
                f"{phase}_j": None if energy is None else energy.joules,
                f"{phase}_low_j": None if energy is None else energy.low_j,
                f"{phase}_high_j": None if energy is None else energy.high_j,
                f"{phase}_certainty": UNMEASURED if energy is None else energy.certainty,
            }
        yield row


def _update_rows(run: Recorded) -> Rows:
    for name, device in run.course.devices.items():
        for update in device.updates:
            yield {
                "device": name,
                "elapsed_s": update.wall_s - run.step.start_s,
                "version": update.version,
                "staleness": update.staleness,
                "bytes": update.bytes,
                "seconds": update.seconds,
                "density": update.density,
            }


def _density_rows(run: Recorded) -> Rows:
    for name, device in run.course.devices.items():
        for at_s, density in device.densities:
            yield {"device": name, "elapsed_s": at_s - run.step.start_s, "density": density}


def _observed_rows(table: str) -> Callable[[Recorded], Rows]:
    def rows(run: Recorded) -> Rows:
        for phase, all_observed in (("baseline", run.baseline), ("run", run.observed)):
            for observed in all_observed.values():
                for row in observed.within(table):
                    # "run" of a row is the run that a transfer or phase belonged to; the frame's own is the repetition.
                    own = {("task_run" if name == "run" else name): value for name, value in row.items()}
                    yield {"phase_of_plan": phase, **own, "elapsed_s": row["at_s"] - run.step.start_s}

    return rows
