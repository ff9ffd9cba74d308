"""What a recorded run's links carried and how long its steps took, as the CSV files that `regrow simulate` takes.

    links/DEVICE.up.csv, links/DEVICE.down.csv    seconds,bits_per_second: goodput of payload while something was under way
    steps/DEVICE.csv                              seconds_per_step, of a step of the full model, one a job

A simulation gives file i to device i, in the order of the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from broker_server.field.observed import Observed, length_of
from broker_server.field.record import Recorded
from broker_server.runs import read_task
from broker_server.tabular import frame, write_frames
from regrow.errors import LocalError

BIN_S = 5.0
Rates = list[tuple[float, float]]


def write_traces(run: Recorded, folder: Path, others: Sequence[Recorded] = (), work: Mapping[float, float] | None = None) -> list[str]:
    """Write the traces of one run; returns the devices that have them, in the order in which a simulation takes them.

    Args:
        others: runs whose mean goodput stands in where a device had nothing to measure in one direction, as for a very small part.
        work: what a step costs by density, relative to the full model; nothing: the same at each, as with masks of single weights.

    Raises:
        LocalError: a device that trained has no transfer in one direction in any of the runs, or no update: it could not be replayed.
    """
    task, devices = read_task(run.path / "task"), sorted(name for name, device in run.course.devices.items() if device.updates)
    if not devices:
        raise LocalError(f"{run.step.run}: nobody delivered an update, so there is nothing to replay")
    for name in devices:
        for up, direction in ((True, "up"), (False, "down")):
            rates = rates_of(run.observed[name], up) if name in run.observed else []
            rates = rates or _stand_in(others, name, up)
            if not rates:
                raise LocalError(f"{run.step.run}: {name} observed no transfer {direction}, so its link cannot be replayed")
            rows = ({"seconds": f"{at:.3f}", "bits_per_second": f"{bps:.1f}"} for at, bps in rates)
            write_frames([frame(f"{name}.{direction}", rows)], folder / "links", ["csv"])
        seconds = steps_of(run, name, task.training.local_steps, work or {})
        write_frames([frame(name, ({"seconds_per_step": f"{each:.6f}"} for each in seconds))], folder / "steps", ["csv"])
    return devices


def rates_of(observed: Observed, up: bool) -> Rates:
    """(seconds since the start, bit/s) of every BIN_S in which payload moved; it holds until the next one. Empty without any.

    A bin's rate is its bits by the seconds in which at least one transfer was under way: what the link gave, not what was asked of it.
    """
    bins: dict[int, tuple[float, list[tuple[float, float]]]] = {}
    for begin, end, row in observed.spans("transfers"):
        if bool(row["up"]) is not up or not row["payload_bytes"] or row["seconds"] <= 0:
            continue
        bps = 8 * row["payload_bytes"] / row["seconds"]
        for index in range(int((begin - observed.start_s) // BIN_S), int((end - observed.start_s) // BIN_S) + 1):
            first = max(begin, observed.start_s + index * BIN_S)
            last = min(end, observed.start_s + (index + 1) * BIN_S)
            if last > first:
                bits, busy = bins.setdefault(index, (0.0, []))
                bins[index] = bits + bps * (last - first), [*busy, (first, last)]
    rates = [(index * BIN_S, bits / length_of(busy)) for index, (bits, busy) in sorted(bins.items())]
    return [(0.0, rates[0][1]), *rates[1:]] if rates else []


def _stand_in(others: Sequence[Recorded], name: str, up: bool) -> Rates:
    found = [bps for other in others if name in other.observed and (bps := other.observed[name].goodput_bps(up)) is not None]
    return [(0.0, mean(found))] if found else []


def steps_of(run: Recorded, device: str, local_steps: int, work: Mapping[float, float]) -> list[float]:
    """Seconds of a full step, one for each job: as observed by phase "train" where steps were counted there, else from the updates."""
    course = run.course.devices[device]
    density = course.densities[-1][1] if course.densities else 1.0
    phases: Sequence[dict[str, Any]] = run.observed[device].rows["phases"] if device in run.observed else []
    seen = [
        (row["seconds"] / row["steps"], row["density"] or density)
        for row in phases
        if row["phase"] == "train" and row["steps"] and row["seconds"] > 0 and not row["marked"]
    ]
    if not seen:
        seen = [(update.seconds / local_steps, update.density or density) for update in course.updates if update.seconds > 0]
    if not seen:
        raise LocalError(f"{run.step.run}: no update of {device} says how long it trained, so its steps cannot be replayed")
    return [seconds / work.get(at, 1.0) for seconds, at in seen]
