"""Uneven memory and computing in simulated fleets, and the device seconds that outcomes count."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from broker_server.runs import load_task
from cli.main import main
from regrow.errors import LocalError
from regrow.step_memory import StepMemory
from testbed.comparison import reached_of
from testbed.compute import Busy
from testbed.outcome import Outcome
from testbed.simulate import Simulation, task_of
from tests.testbed.bars import outcome_of, spec

UNITS = {"training.local_steps": 3, "method.granularity": "unit", "method.full_density_bps": 1e6}


def test_a_small_memory_bounds_its_device_for_good_and_a_slow_one_only_its_beginning(task: Path, images: Path) -> None:
    fast = spec(images, method="fedgmr-pace", settings=UNITS, links="4000000", clients=3, seconds=60.0, slowdown=(1.0, 1.0, 4.0))
    outcome = outcome_of(task, msgspec.structs.replace(fast, memory=(10**9, 24_000_000, 10**9)))
    firsts = {name: first for name, (first, _) in outcome.densities.items()}
    assert firsts["device-0000"] == 1.0
    assert firsts["device-0001"] < 1.0
    assert firsts["device-0002"] == 0.5, "0.9 of a quarter of the speed asks for the rung above 0.2"
    assert outcome.densities["device-0001"] == (firsts["device-0001"],) * 2
    assert outcome.densities["device-0002"][1] == 1.0
    free = outcome_of(task, msgspec.structs.replace(fast, seconds=15.0))
    assert free.densities["device-0001"] == (1.0, 1.0)
    assert 0.0 < free.points[0].compute_s < free.points[-1].compute_s <= 3 * 15.0


def test_weights_decline_what_cannot_hold_the_full_step(task: Path, images: Path) -> None:
    assert len(StepMemory.from_json(load_task(task).programs["memory"]).levels) == 1
    outcome = outcome_of(task, spec(images, method="fedgmr", clients=3, memory=(10**9, 10**9, 17_000_000)))
    assert set(outcome.densities) == {"device-0000", "device-0001"}
    assert outcome.points[-1].version > 0
    nobody = spec(images, method="fedgmr", clients=3, memory=(1,))
    with pytest.raises(LocalError, match="more than any device has"):
        Simulation(load_task(task), task_of(load_task(task), {"name": "bars"}, nobody), nobody)


def test_the_option_says_what_is_wrong(task: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(task), "--data-folder", str(images), "--memory-mb", "64,none"]) != 0
    assert "--memory-mb '64,none': give megabytes" in capsys.readouterr().err
    assert main(["simulate", str(task), "--data-folder", str(images), "--memory-mb", "64,1e20"]) != 0
    assert "up to 9e9" in capsys.readouterr().err


def test_device_seconds_so_far() -> None:
    busy = Busy()
    busy.begin(0.0, 4.0)
    busy.begin(1.0, 10.0)
    assert busy.until(3.0) == 3.0 + 2.0
    assert busy.until(5.0) == 4.0 + 4.0
    assert busy.until(50.0) == 14.0


def test_seconds_of_computing_to_a_target(task: Path, images: Path) -> None:
    run = outcome_of(task, spec(images, method="fedasync"))
    last = run.points[-1]
    assert reached_of([run], [], run.final_accuracy).compute_s_to_target_median in [point.compute_s for point in run.points]
    old = msgspec.structs.replace(run, points=[msgspec.structs.replace(last, compute_s=0.0)])
    assert reached_of([old], [], run.final_accuracy).compute_s_to_target_median is None
    fields = msgspec.to_builtins(run)
    for point in fields["points"]:
        del point["compute_s"]
    assert msgspec.convert(fields, Outcome).points[-1].compute_s == 0.0
