"""A field run from plan to report, with a real gateway, its embedded broker, and agents as processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import main
from export.models import digits_mlp
from tests.testbed.processes import Child, Fleet, task_text

DEVICES = {"pi-1": 2000.0, "pi-2": 400.0}
METHODS = "fedgmr,fedavg"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two agents that run, a broker that outlives the gateway's processes, a plan of two methods."""
    text = task_text("digits", fleet="min_devices = 2", stop="seconds = 600")
    with Fleet(tmp_path, digits_mlp(1), text, shared=True) as fleet:
        fleet.add(DEVICES)
        for name in DEVICES:
            fleet.device(name)
        yield fleet


def plan(fleet: Fleet, *more: str) -> Path:
    file = fleet.folder / "orchard.toml"
    words = ["field", "plan", str(file), "--task", str(fleet.task), "--devices", ",".join(DEVICES), "--methods", METHODS]
    assert main([*words, "--run-s", "6", "--baseline-s", "2", "--lead-s", "2", *more]) == 0
    return file


def execute(fleet: Fleet, file: Path) -> Child:
    return fleet.start(["field", "run", file, "--runs", fleet.runs, "--broker", fleet.broker_url, "--patience-s", 40], "field.log")


def test_a_field_run_from_plan_to_report(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    file = plan(fleet, "--repetitions", "1")
    conductor = execute(fleet, file)
    conductor.said(r"run .*orchard-1-")
    assert main(["field", "annotate", "moved", "behind", "the", "wall", "--runs", str(fleet.runs)]) == 0
    assert conductor.ended(90.0) == 0
    print(conductor.text())
