"""A recorded run again in virtual time, with the links and step times that were measured: how close simulation comes to the field.

Everything else is the run's own: its task.toml, its seed, its devices in the order of their names. Data are the caller's, for a gateway
has none of its devices'; what the links carried and how long steps took hardly depends on them, what is learned does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import msgspec
import tomllib
from msgspec import UNSET

from broker_server.field.observed import TRAINING
from broker_server.field.record import Recorded, reach
from broker_server.field.traces import write_traces
from broker_server.html_report import Table
from broker_server.runs import load_task
from export.task import read_model
from export.work import relative_work
from regrow import wire
from regrow.errors import LocalError
from regrow.fetching import PART
from regrow.intervals import half_interval
from regrow.levels import unit_densities_of
from regrow.publication import PIECE_BYTES
from testbed.memory import COORDINATOR
from testbed.outcome import Spec
from testbed.scenario import TRACES
from testbed.simulate import Earlier, Simulation, task_of

SLICES = 200


@dataclass(frozen=True)
class Likeness:
    """Simulated by measured: None where one of the two is not known or 0. Updates: of each device that delivered some."""

    run: str
    method: str
    seconds_to_target: float | None
    payload: float | None
    updates: Mapping[str, float]


@dataclass(frozen=True)
class Replayed:
    """A simulated run: (elapsed_s, score of the global model) as the coordinator had it, payload bytes up and down, updates by device."""

    curve: Sequence[tuple[float, float]]
    payload_bytes: int
    updates: Mapping[str, int]


def replay(run: Recorded, folder: Path, data: Spec, others: Sequence[Recorded] = ()) -> tuple[Replayed, list[str]]:
    """Simulate a recorded run; returns the devices whose traces were taken, in order.

    Args:
        folder: the traces are written there and stay.
        others: all runs of the field run, as in write_traces; of the one before, devices still have the programs.
        data: of which data, data_folder, split, validation and trainer count.

    Raises:
        LocalError: the run lacks what a trace is made of, or the data do not fit its model.
    """
    task_folder = load_task(run.path / "task")
    densities = unit_densities_of(task_folder.task)
    work = {} if densities is None else dict(relative_work(read_model(task_folder.model_path), densities))
    names = write_traces(run, folder, others, work)
    spec = msgspec.structs.replace(
        data,
        method=None,
        settings={},
        seed=task_folder.task.seed,
        clients=len(names),
        links=f"{TRACES}{folder / 'links'}",
        steps_trace=str(folder / "steps"),
        latency=(0.0, 0.0),  # a transfer was measured to its acknowledgement, so its rate has the way there and back in it
        outages=None,
        seconds=run.step.end_s - run.step.start_s,
        step_by_density=UNSET,
    )
    tables = tomllib.loads((task_folder.path / "task.toml").read_text())
    tables["fleet"] = {**tables.get("fleet", {}), "min_devices": min(tables.get("fleet", {}).get("min_devices", 1), len(names))}
    simulation = Simulation(task_folder, task_of(task_folder, tables, spec), spec, earlier=_earlier(run, names, others))
    return _simulated(simulation, spec.seconds, names), names


def _earlier(run: Recorded, names: Sequence[str], others: Sequence[Recorded]) -> Earlier:
    """What the devices had when the run began: programs of the run before, and their uplinks where they did not probe."""
    before = [other for other in others if other.repetition.number < run.repetition.number]
    parts: dict[str, bytes] = {}
    if before:
        for program in load_task(max(before, key=lambda other: other.repetition.number).path / "task").programs.values():
            parts |= {PART + wire.digest(piece).hex(): bytes(piece) for piece in wire.pieces(program, PIECE_BYTES)}
    uplinks = {}
    for index, name in enumerate(names):
        told = run.course.devices[name].uplinks
        probed = any(row["what"] == "probe" for row in run.observed[name].rows["transfers"])
        if told and not probed:
            uplinks[f"device-{index:04d}"] = told[0][1]
    return Earlier(parts, uplinks)


def _simulated(simulation: Simulation, seconds: float, names: Sequence[str]) -> Replayed:
    """Run to the end, and keep what the coordinator noted, as the store of a real one does."""
    world, curve = simulation.world, list[tuple[float, float]]()
    updates = dict.fromkeys(names, 0)
    called = dict(zip(simulation.names, names, strict=True))
    for index in range(1, SLICES + 1):
        world.run(index * seconds / SLICES, stop=lambda: COORDINATOR in world.finished)
        for _, _, note in world.notes:
            if note.kind == "aggregated" and note.fields["global_score"] is not None:
                curve.append((float(note.fields["elapsed_s"]), float(note.fields["global_score"])))
            elif note.kind == "update":
                updates[called[note.fields["device"]]] += 1
        world.notes.clear()
    sent = sum(client.sent_bytes + client.received_bytes for name, client in world.clients.items() if name in called)
    return Replayed(curve, sent, updates)


def likeness(run: Recorded, replayed: Replayed, target: float) -> Likeness:
    """How the simulated run compares with the measured one."""
    measured = reach(run.curve, target)
    simulated = next((elapsed_s for elapsed_s, score in replayed.curve if score >= target), None)
    payload = _payload(run)
    counts = {name: len(device.updates) for name, device in run.course.devices.items() if device.updates}
    return Likeness(
        run.step.run,
        run.repetition.method,
        None if measured is None or simulated is None or not measured.elapsed_s else simulated / measured.elapsed_s,
        replayed.payload_bytes / payload if payload else None,
        {name: replayed.updates.get(name, 0) / count for name, count in counts.items()},
    )


def _payload(run: Recorded) -> float:
    """Payload bytes of the measured run, for the simulation counts payload, too."""
    if run.has_transfers:
        return run.transferred("payload_bytes", (*TRAINING, "telemetry"))
    return float(sum(device.bytes_up + device.bytes_down for device in run.course.devices.values()))


def table(found: Sequence[Likeness], target: float, failed: Mapping[str, str], *, held_out: bool = False) -> Table:
    """A line a run and one for each method's mean; 1.00 is as measured. held_out: the gateway of the field scored on data of its own."""
    if not found and not failed:
        raise LocalError("no run was replayed")
    lines = []
    for method in dict.fromkeys(each.method for each in found):
        mine = [each for each in found if each.method == method]
        lines += [[each.run, method, *_cells([each])] for each in mine]
        if len(mine) > 1:
            lines.append([f"mean of {len(mine)}", method, *_cells(mine)])
    lines += [[run, "not replayed", why, "", ""] for run, why in failed.items()]
    head = ["run", "method", f"time to {target:g}", "payload bytes", "updates per device: mean, least to most"]
    caption = "Simulated by measured; 1.00 is as measured"
    if held_out:
        caption += " (the field's scores are on the gateway's held-out data, the simulation's on the devices' validation data)"
    return Table(caption, head, lines)


def _cells(found: Sequence[Likeness]) -> list[str]:
    cells = []
    for values, otherwise in (([each.seconds_to_target for each in found], "not reached in both"), ([each.payload for each in found], "-")):
        known = [value for value in values if value is not None]
        half = half_interval(known)
        cells.append(otherwise if not known else f"{mean(known):.2f}" + ("" if half is None else f" ± {half:.2f}"))
    ratios = [ratio for each in found for ratio in each.updates.values()]
    cells.append(f"{mean(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-")
    return cells
