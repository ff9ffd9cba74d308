"""The uplink meter on shaped, changing, lossy and cut links, and training over links that are slow, far away or forgetful; as root.

The truth is what TCP received in the hub; testbed/uplink_trials.py says how. bench/uplink.py tries more rates, for longer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from export.models import digits_mlp
from testbed.namespaces import RELAY_HUB_ADDRESS, Namespaces, relay
from testbed.uplink_trials import PORT, Step, Trial, broker_in, run
from tests.testbed.processes import Fleet, notes, task_text, until, write_digits

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


def errors(trial: Trial, folder: Path, when: str) -> list[float]:
    steps: list[dict[str, Any]] = run(trial, folder)["steps"]
    print(trial.name, steps)
    return [step[when]["error"] for step in steps if when in step]


@pytest.mark.parametrize(("rate_bps", "loss"), [(250e3, 0.0), (20e6, 0.0), (2e6, 0.05)])
def test_within_five_percent_when_nothing_changes(rate_bps: float, loss: float, tmp_path: Path) -> None:
    (error,) = errors(Trial("steady", [Step(12.0, rate_bps)], loss), tmp_path, "at_end")
    assert abs(error) < 0.05


def test_within_twenty_percent_ten_seconds_after_a_change(tmp_path: Path) -> None:
    changed = errors(Trial("changes", [Step(6.0, 20e6), Step(11.0, 250e3), Step(11.0, 5e6)]), tmp_path, "after_10_s")
    assert len(changed) == 2
    assert all(abs(error) < 0.2 for error in changed)


def test_a_cut_of_ten_seconds_leaves_the_estimate_as_it_was(tmp_path: Path) -> None:
    before, after = errors(Trial("cut", [Step(8.0, 2e6), Step(10.0, 0), Step(11.0, 2e6)]), tmp_path, "at_end")
    assert max(abs(before), abs(after)) < 0.05


@pytest.fixture
def far(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A gateway in a hub, and a device d1 behind a relay of packets, which trains for some seconds."""
    link, steps = request.param
    with ExitStack() as stack:
        namespaces = stack.enter_context(Namespaces())
        namespace, process = relay(namespaces, "far", **link)
        stack.callback(process.wait)
        stack.callback(process.kill)
        slow = task_text("far", stop="seconds = 3600").replace("local_steps = 3", f"local_steps = {steps}")
        patient = slow.replace("heartbeat_s = 0.5", "heartbeat_s = 10").replace("min_deadline_s = 3", "min_deadline_s = 30")
        fleet = Fleet(tmp_path / "fleet", digits_mlp(seed=1), patient, kind="mosquitto")
        fleet.credentials.add_device("d1")
        stack.enter_context(broker_in(namespaces.hub, tmp_path / "broker", fleet.credentials))
        stack.enter_context(fleet)
        fleet.credentials.write_bundle("d1", f"mqtt://{RELAY_HUB_ADDRESS}:{PORT}", fleet.folder)
        write_digits(fleet.folder / "d1.npz", seed=1)
        fleet._links["d1"] = 0.0
        url = f"mqtt://coordinator:{fleet.credentials.coordinator_password}@127.0.0.1:{PORT}"
        command = ["serve", fleet.task, "--plain", "--runs", fleet.runs, "--broker", url]
        fleet.start(command, "serve.log", prefix=namespaces.inside(namespaces.hub)).said("^run ")
        device = ["--log", "agent", "--bundle", "d1.json", "--data", "d1.npz", "--state", "d1.state"]
        fleet.devices["d1"] = fleet.start(device, "d1.log", prefix=namespaces.inside(namespace))
        yield fleet


@pytest.mark.parametrize("far", [({"bps": 30e3, "delay_s": 1.0}, 3)], indirect=True)
def test_at_30_kbit_and_2_s_round_trips_it_still_trains(far: Fleet) -> None:
    until(lambda: len(notes(far.devices["d1"].text(), "accepted")) >= 2, lambda: far.devices["d1"].text()[-2000:], 90)
    far.check()
    assert "lost" not in far.devices["d1"].text()


@pytest.mark.parametrize("far", [({"bps": 2e6, "delay_s": 0.02, "idle_s": 1.0}, 12_000)], indirect=True)
def test_through_a_nat_that_forgets_idle_flows_it_still_trains(far: Fleet) -> None:
    """One second: less than between two beats of the coordinator, so that no connection lives longer than a job."""
    said = far.devices["d1"].text
    until(lambda: notes(said().partition("connection lost")[2], "accepted"), lambda: said()[-2000:], 150)
    far.check()
