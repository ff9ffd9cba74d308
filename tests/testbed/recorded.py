"""A field run as it is left on disk, made in virtual time by the real machines: runs by the simulator, rows through the real recorder.

What devices observe is made from what the simulated ones did: a transfer for each update, phases around it. pi-1 has a meter, pi-2 a model
and a clock that is an hour ahead, pi-3 nothing that knows its joules; pi-1's journal was full for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tomllib

from broker_server.field.plan import Plan, checked, repetitions_of
from broker_server.field.progress import FieldFolder, Step, open_field, read_field, task_toml
from broker_server.observations import ClockSeen, Recorder, annotate
from broker_server.runs import create_run, load_task
from broker_server.store import Store
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import topics, wire
from regrow.fetching import PART
from regrow.machine import Received
from regrow.methods import named
from regrow.observations import Missing, Observations, PhaseSeen, PowerSeen, Row, TransferSeen, encode_rows
from regrow.publication import PIECE_BYTES
from testbed.memory import COORDINATOR
from testbed.outcome import Spec
from testbed.simulate import Earlier, Simulation, task_of
from tests.testbed.processes import task_text, write_digits

LINKS = {"pi-1": (300_000, 1_200_000), "pi-2": (150_000, 600_000), "pi-3": (60_000, 240_000)}  # bit/s up and down
DEVICES = tuple(LINKS)
BEGAN_S = 1_790_000_000.0
RUN_S, BASELINE_S = 20.0, 5.0
AHEAD_S = 3600.0
WATTS = {"train": 5.0, "transmit": 3.0, "idle": 2.0}
FULL_S = (4.0, 7.0)  # of each run, in which pi-1's journal was full


def recorded_field(folder: Path, methods: Sequence[str], repetitions: int, *, observed: bool = True) -> FieldFolder:
    """FOLDER/runs with a field run "orchard", FOLDER/data with the devices' data as `--data npz` takes them."""
    task, runs = folder / "task", folder / "runs"
    task.mkdir(parents=True)
    (task / "task.toml").write_text(task_text("digits", stop="seconds = 20", fleet="min_devices = 3").replace("every = 5", "every = 1"))
    save_model(digits_mlp(1), task / "model.onnx")
    _write_data(folder / "data")
    (runs / ".gateway").mkdir(parents=True)
    plan = Plan(name="orchard", task=str(task), devices=DEVICES, methods=tuple(methods), repetitions=repetitions, run_s=RUN_S,
                baseline_s=BASELINE_S, lead_s=1.0)  # fmt: skip
    recorder = Recorder(runs / ".gateway") if observed else None
    at_s, numbers, earlier = BEGAN_S, iter(range(1, 10_000)), Earlier()
    with open_field(runs, checked(plan, "here"), folder / "orchard.toml") as field:
        field.add(Step(kind="began", at_s=at_s, facts={"regrow": "0.1.0"}))
        heard = {"pi-1": {"software": "0.1.0", "meter": "ina3221 VDD_IN"}, "pi-2": {"software": "0.1.0", "meter": "model"}}
        field.add(Step(kind="heard", at_s=at_s, facts={**heard, "pi-3": {"software": "0.1.0", "meter": ""}}))
        for repetition in repetitions_of(field.plan):
            end_s = at_s + BASELINE_S
            field.add(Step(kind="baseline", at_s=end_s, number=repetition.number, run=repetition.name, start_s=at_s, end_s=end_s))
            begin_s = end_s + 1.0
            probed = not earlier.uplinks_bps
            arrivals, received, earlier = _simulate(folder, field, repetition.method, repetition.name, begin_s, earlier)
            if recorder is not None:
                for device in DEVICES:
                    _send(
                        recorder,
                        device,
                        next(numbers),
                        _rows(device, repetition.name, at_s, begin_s, arrivals[device], received[device], probed=probed),
                    )
                recorder.note_clock(ClockSeen("pi-2", begin_s + AHEAD_S, AHEAD_S, 0.02))
                annotate(runs / ".gateway", f"run {repetition.number} moved behind the wall", begin_s + 3.0)
            field.add(Step(kind="run", at_s=begin_s + RUN_S, number=repetition.number, run=repetition.name, start_s=begin_s,
                           end_s=begin_s + RUN_S, reason="20 s have passed"))  # fmt: skip
            at_s = begin_s + RUN_S + 1.0
    if recorder is not None:
        recorder.close()
    return read_field(runs, "orchard")


def _write_data(folder: Path) -> None:
    folder.mkdir()
    for name, seed, rows in (("train", 1, 600), ("test", 2, 100)):
        write_digits(folder / f"{name}.npz", seed=seed, rows=rows)
    with np.load(folder / "train.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    np.savez(folder / "train.npz", x=x, y=y, user=np.arange(600) % 3)


def _simulate(
    folder: Path, field: FieldFolder, method: str, name: str, begin_s: float, earlier: Earlier
) -> tuple[dict[str, list[tuple[float, int]]], dict[str, int], Earlier]:
    """Make the run's folder; (seconds since the start, bytes) of each device's updates, all bytes that it received, what it then has."""
    source = field.path / "tasks" / method
    source.mkdir(parents=True, exist_ok=True)
    tables = tomllib.loads((folder / "task" / "task.toml").read_text())
    for section in ("method", "trigger", "restoration"):
        tables.pop(section, None)
    (source / "task.toml").write_text(task_toml({**tables, **named(method), "stop": {"seconds": RUN_S}}, "orchard"))
    (source / "model.onnx").write_bytes((folder / "task" / "model.onnx").read_bytes())
    build_task(source, source / "model.onnx")
    loaded = load_task(source)
    path = create_run(field.path.parent.parent, loaded, name)
    spec = Spec(
        data="npz",
        data_folder=str(folder / "data"),
        split="user",
        clients=3,
        links=",".join(f"{up}/{down}" for up, down in LINKS.values()),
        step_s=0.05,
        seconds=RUN_S,
        points=1,
    )
    tables = tomllib.loads((source / "task.toml").read_text())
    simulation = Simulation(loaded, task_of(loaded, tables, spec), spec, earlier=earlier)
    simulation.world._keep_log = True
    simulation.world.run(RUN_S + 1.0, stop=lambda: COORDINATOR in simulation.world.finished)
    called = dict(zip(simulation.names, DEVICES, strict=True))
    arrivals: dict[str, list[tuple[float, int]]] = {device: [] for device in DEVICES}
    now_s = [begin_s]
    with Store.open(path, wall_clock=lambda: now_s[0]) as store:
        for at_s, who, note in simulation.world.notes:
            if who == COORDINATOR:
                now_s[0] = begin_s + at_s
                fields = {key: called.get(value, value) if key == "device" else value for key, value in note.fields.items()}
                store.metric(note.kind, fields)
                if note.kind == "update":
                    arrivals[fields["device"]].append((at_s, int(fields["bytes"])))
        store.append(simulation.world.log)
    received = {called[each]: simulation.world.clients[each].received_bytes for each in simulation.names}
    parts = {PART + wire.digest(piece).hex(): bytes(piece) for data in loaded.programs.values() for piece in wire.pieces(data, PIECE_BYTES)}
    return arrivals, received, Earlier(parts, {each: float(up) for each, (up, _) in zip(simulation.names, LINKS.values(), strict=True)})


def _rows(
    device: str, run: str, baseline_s: float, begin_s: float, arrivals: Sequence[tuple[float, int]], received: int, *, probed: bool
) -> list[Row]:
    """What the device would have seen, on its own clock."""
    ahead_s = AHEAD_S if device == "pi-2" else 0.0
    rows: list[Row] = [_phase(device, baseline_s + ahead_s, BASELINE_S, "baseline", "")]
    if device == "pi-1":
        rows.append(Missing(begin_s + FULL_S[0], FULL_S[1] - FULL_S[0], 12))
        rows += [PowerSeen(begin_s + second + 1.0, 1.0, 3.5, "ina3221", "measured") for second in range(int(RUN_S)) if not 4 <= second < 7]
    up_bps, down_bps = LINKS[device]
    rows.append(TransferSeen(begin_s + 0.1 + ahead_s, 8 * received / down_bps, False, "model", received, received + 60, run, 1))
    for at_s, done_s, size in _gaps(arrivals):
        up_s = min(8 * size / up_bps, 0.9 * (done_s - at_s))
        rows.append(TransferSeen(begin_s + done_s - up_s + ahead_s, up_s, True, "update", size, size + 60, run, 1))
        if device != "pi-1" or not (at_s < FULL_S[1] and done_s > FULL_S[0]):
            rows.append(_phase(device, begin_s + at_s + ahead_s, done_s - at_s - up_s, "train", run))
            rows.append(_phase(device, begin_s + done_s - up_s + ahead_s, up_s, "transmit", run))
    if probed:
        rows.append(TransferSeen(begin_s + 0.1 + ahead_s, 8 * 32_768 / up_bps, True, "probe", 32_768, 32_800, run, 1))
    rows.append(TransferSeen(begin_s + 1.0 + ahead_s, 0.1, True, "telemetry", 500, 560, run, 1))
    return rows


def _gaps(arrivals: Sequence[tuple[float, int]]) -> Iterator[tuple[float, float, int]]:
    before_s = 0.0
    for at_s, size in arrivals:
        yield before_s, at_s, size
        before_s = at_s


def _phase(device: str, at_s: float, seconds: float, phase: str, run: str) -> PhaseSeen:
    watts = WATTS.get(phase, WATTS["idle"])
    if device == "pi-3":
        return PhaseSeen(at_s, seconds, phase, None, "no meter", "unmeasured", run)  # type: ignore[arg-type]
    joules = watts * seconds
    if device == "pi-2":
        return PhaseSeen(at_s, seconds, phase, joules, "pi4 model", "modelled", run, low_j=0.9 * joules, high_j=1.1 * joules)  # type: ignore[arg-type]
    return PhaseSeen(at_s, seconds, phase, joules, "ina3221", "measured", run, steps=3 if phase == "train" else 0)  # type: ignore[arg-type]


def _send(recorder: Recorder, device: str, number: int, rows: list[Row]) -> None:
    """As it comes over the link: encoded, in batches, and received."""
    for part in range(0, len(rows), 100):
        said = Observations(journal=f"{number:08d}-{part:07d}".encode(), number=1, sent_s=time.time())
        recorder.step(Received(topics.observations(device), wire.encode(said, encode_rows(rows[part : part + 100]))), 0.0)
