"""A field run from plan to report, with a real gateway, its embedded broker, and agents as processes."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from broker_server.field.progress import read_field
from broker_server.run_record import facts_of
from cli.main import main
from tests.testbed.processes import Child, Fleet, task_text, until, wide_mlp

DEVICES = {"pi-1": 6000.0, "pi-2": 1500.0}
METHODS = ("fedgmr", "fedavg")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two agents that run, and a broker that outlives the gateway's processes."""
    text = task_text("digits", stop="aggregations = 3").replace("every = 5", "every = 1")
    with Fleet(tmp_path, wide_mlp(1), text, shared=True) as fleet:
        fleet.add(DEVICES)
        for name in DEVICES:
            fleet.device(name)
        yield fleet


def plan(fleet: Fleet, methods: tuple[str, ...], *, run_s: float) -> Path:
    file = fleet.folder / "orchard.toml"
    words = ["field", "plan", file, "--task", fleet.task, "--devices", ",".join(DEVICES), "--methods", ",".join(methods)]
    words += ["--repetitions", 1, "--run-s", run_s, "--baseline-s", 1, "--lead-s", 2]
    assert main([str(word) for word in words]) == 0
    return file


def execute(fleet: Fleet, file: Path, log: str = "field.log") -> Child:
    return fleet.start(["field", "run", file, "--runs", fleet.runs, "--broker", fleet.broker_url, "--patience-s", 40], log)


def rows(file: Path) -> list[dict[str, Any]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def pooled(fleet: Fleet, folder: Path) -> Path:
    """The devices' data as `--data npz` takes them: a user a device, in the order of their names."""
    folder.mkdir()
    parts = []
    for name in sorted(DEVICES):
        with np.load(fleet.folder / f"{name}.npz") as arrays:
            parts.append((arrays["x"], arrays["y"]))
    user = np.repeat(np.arange(len(parts)), [len(y) for _, y in parts])
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.savez(folder / "train.npz", x=x, y=y, user=user)
    np.savez(folder / "test.npz", x=x[:100], y=y[:100])
    return folder


@pytest.mark.timeout(240)
def test_a_field_run_from_plan_to_report(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    conductor = execute(fleet, plan(fleet, METHODS, run_s=8))
    conductor.said(r"^run .*orchard-1-")
    assert main(["field", "annotate", "moved", "behind", "the", "wall", "--runs", str(fleet.runs)]) == 0
    assert conductor.ended(150.0) == 0
    field = read_field(fleet.runs, "orchard")
    assert not field.lacking()
    assert {facts_of(fleet.runs / step.run).updates > 0 for step in field.done().values()} == {True}
    attempts = [step for step in field.steps if step.kind in ("run", "interrupted")]  # on a slow machine more than the plan has
    assert {step.reason for step in attempts if step.kind == "interrupted"} <= {"nothing was aggregated"}
    assert [step.run for step in field.steps if step.kind == "baseline"] == [step.run for step in attempts]
    assert [step.number for step in attempts if step.kind == "run"] == [1, 2]
    assert {name for step in field.steps if step.kind == "heard" for name in step.facts} == set(DEVICES)

    out = fleet.folder / "report"
    data = pooled(fleet, fleet.folder / "pooled")
    words = ["field", "report", "orchard", "--runs", fleet.runs, "--out", out, "--data", "npz", "--data-folder", data, "--target", 0.2]
    assert main([str(word) for word in words]) == 0
    page = (out / "report.html").read_text()
    for part in (
        "Methods: means over repetitions",
        "Differences to fedgmr within the same block",
        "fedgmr: devices",
        "fedavg: devices",
        "Accuracy over time",
        "Accuracy over bytes",
        "Bandwidth of each device",
        "Density of each device",
        "Staleness of each device",
        "Simulated by measured",
        "moved behind the wall",
        "Clocks: device minus gateway",
        "Missing intervals",
        "Gateway, each time the plan was taken up",
        "task.toml of fedavg",
    ):
        assert part in page, part
    assert {file.stem for file in (out / "figures").glob("*.png")} == {file.stem for file in (out / "figures").glob("*.pdf")}
    transfers = rows(out / "data" / "transfers.csv")
    assert {(row["device"], row["method"]) for row in transfers} == {(name, method) for name in DEVICES for method in METHODS}
    for row in rows(out / "data" / "runs.csv"):
        assert row["bytes_of"] == "packets"
        assert float(row["bytes"]) > 0
    simulated = rows(out / "data" / "simulated.csv")
    assert {row["method"] for row in simulated} == set(METHODS), simulated
    for row in simulated:
        assert 0.2 < float(row["payload bytes"]) < 5.0, row  # processes on a busy machine are no field
    table = parquet.read_table(out / "data" / "transfers.parquet")
    assert table.num_rows == len(transfers)

    assert main(["field", "traces", "orchard", "--runs", str(fleet.runs), "--out", str(fleet.folder / "traces")]) == 0
    said = capsys.readouterr().out
    assert "regrow simulate" in said
    run = field.done()[1].run
    links, steps = fleet.folder / "traces" / run / "links", fleet.folder / "traces" / run / "steps"
    words = ["simulate", fleet.runs / run / "task", "--clients", 2, "--data", "npz", "--data-folder", data, "--split", "user"]
    words += [
        "--links",
        f"trace:{links}",
        "--steps-trace",
        steps,
        "--latency",
        0,
        "--seconds",
        5,
        "--points",
        2,
        "--out",
        fleet.folder / "again",
    ]
    assert main([str(word) for word in words]) == 0


@pytest.mark.timeout(240)
def test_a_field_run_that_is_killed_goes_on_with_what_lacks(fleet: Fleet) -> None:
    file = plan(fleet, ("fedavg",), run_s=5)
    first = execute(fleet, file)
    first.said(r"^run .*orchard-1-fedavg$")
    first.kill()
    assert not read_field(fleet.runs, "orchard").done()
    again = execute(fleet, file, "again.log")
    again.said(r"^run .*orchard-1-fedavg-2$")
    assert again.ended(120.0) == 0
    field = read_field(fleet.runs, "orchard")
    assert field.done()[1].run == "orchard-1-fedavg-2"
    (interrupted,) = (step for step in field.steps if step.kind == "interrupted")
    assert (interrupted.run, interrupted.reason) == ("orchard-1-fedavg", "the process died")
    before = len(field.steps)
    assert execute(fleet, file, "third.log").ended() == 0
    assert len(read_field(fleet.runs, "orchard").steps) == before


@pytest.mark.timeout(240)
def test_ctrl_c_stops_what_it_has_started_and_does_not_count_the_run(fleet: Fleet) -> None:
    conductor = execute(fleet, plan(fleet, ("fedavg",), run_s=60))
    conductor.said(r"^run .*orchard-1-fedavg$")
    conductor.process.send_signal(signal.SIGINT)
    assert conductor.ended(60.0) == 130
    (interrupted,) = (step for step in read_field(fleet.runs, "orchard").steps if step.kind == "interrupted")
    assert interrupted.run == "orchard-1-fedavg"
    assert not list((fleet.runs / ".gateway" / "field").glob("*.json"))


@pytest.mark.timeout(240)
def test_a_device_that_goes_in_the_baseline_is_not_waited_for_in_the_run(fleet: Fleet) -> None:
    file = plan(fleet, ("fedavg",), run_s=8)
    file.write_text(file.read_text().replace("baseline_s = 1\n", "baseline_s = 3\n"))
    conductor = execute(fleet, file)
    conductor.said("keeping still for 3 s")
    until(lambda: len(read_field(fleet.runs, "orchard").steps) >= 3, "both devices to have answered for the baseline")
    fleet.devices["pi-2"].kill()
    conductor.said("waiting for the devices' last observations")
    done = read_field(fleet.runs, "orchard").done()[1]
    assert done.absent == ("pi-2",)
    assert facts_of(fleet.runs / done.run).version > 0


@pytest.mark.timeout(240)
def test_a_run_in_which_nothing_was_aggregated_does_not_count(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    settings = fleet.task / "task.toml"
    settings.write_text(settings.read_text().replace("[fleet]\n", "[fleet]\nmin_devices = 3\n"))
    conductor = execute(fleet, plan(fleet, ("fedavg",), run_s=2))
    assert conductor.ended(120.0) == 1
    assert "1 run lacks" in conductor.text()
    field = read_field(fleet.runs, "orchard")
    assert [each.number for each in field.lacking()] == [1]
    assert [(step.run, step.reason) for step in field.steps if step.kind == "interrupted"] == [
        ("orchard-1-fedavg", "nothing was aggregated"),
        ("orchard-1-fedavg-2", "nothing was aggregated"),
    ]
    assert main(["field", "report", "orchard", "--runs", str(fleet.runs)]) == 1
    assert "no repetition has been run" in capsys.readouterr().err
