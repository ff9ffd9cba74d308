"""Real processes: an agent keeps to its owner's limits, tells them to the gateway, and counts on after a kill."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from edge_agent.agent import Agent
from edge_agent.budgets import BUDGET, Budgets, limits_in
from edge_agent.bundle import read_bundle
from edge_agent.conditions import Reading
from edge_agent.data.sources import open_source
from edge_agent.senses import Senses
from edge_agent.state import StateFolder, content_of
from export.models import digits_mlp
from regrow.budget import Budget
from tests.testbed.processes import Child, Fleet, accepted, notes, task_text, until


def limited(fleet: Fleet, name: str, *limits: object) -> Child:
    """A device as Fleet.device starts it, with limits."""
    command = ["--log", "agent", "--bundle", f"{name}.json", "--data", f"{name}.npz", "--state", f"{name}.state", *limits]
    return fleet.start(command, f"{name}.log")


def fleet_of(folder: Path, stop: str) -> Fleet:
    return Fleet(folder / "fleet", digits_mlp(1), task_text("digits", fleet="min_devices = 1", stop=stop))


def delivered(fleet: Fleet, name: str) -> int:
    return sum(device == name for device, _, _ in accepted(fleet.run))


def counted(fleet: Fleet, name: str) -> int:
    file = fleet.folder / f"{name}.state" / BUDGET
    return int(json.loads(content_of(file.read_bytes()) or b"{}")["sent_received_bytes"]) if file.exists() else 0


def test_a_days_bytes_hold_through_a_kill(tmp_path: Path) -> None:
    """The relay counts what really passes: MQTT without TLS, both ways."""
    limit = 500_000
    with fleet_of(tmp_path, "aggregations = 100000") as fleet:
        serve = fleet.serve()
        fleet.add({"d1": 8000.0})
        relay = fleet.relays["d1"]
        first = limited(fleet, "d1", "--max-bytes-per-day", limit)
        until(lambda: delivered(fleet, "d1") >= 1, "a first update")
        first.kill()
        passed = relay.bytes_up + relay.bytes_down
        assert counted(fleet, "d1") >= passed - 65_536, "what passed in the last turn of its loop at most is not counted"
        second = limited(fleet, "d1", "--max-bytes-per-day", limit)
        second.said(r"limited \{'reason': 'bytes a day: ")
        serve.said(r"limited device=d1 does=(rests|trains at most)")
        until(lambda: "rests" in serve.text(), "the smallest round is too large as well")
        before = delivered(fleet, "d1")
        assert before >= 2, "the second life had some of the day left"
        second.kill()
        last = limited(fleet, "d1", "--max-bytes-per-day", limit)
        last.said("limited ")
        assert relay.bytes_up + relay.bytes_down <= limit
        assert delivered(fleet, "d1") == before
        assert last.stop() == 0
        assert f"{limit} bytes a day" in limits_in(fleet.folder / "d1.state").said
        fleet.check()


def test_heat_stops_training_between_two_steps_and_cold_lets_it_go_on(tmp_path: Path) -> None:
    """The agent itself with its thread and its link, in this process, so that its thermometer can be held."""
    with fleet_of(tmp_path, "aggregations = 100000") as fleet:
        serve = fleet.serve()
        fleet.add({"d1": 8000.0, "d2": 8000.0})
        reading = [Reading(temperature_c=40.0)]
        with StateFolder(fleet.folder / "d1.state") as folder:
            budgets = Budgets(Budget(max_temperature_c=70.0), folder, lambda: reading[0])
            agent = Agent(
                read_bundle(fleet.folder / "d1.json"),
                folder,
                open_source(f"{fleet.folder / 'd1.npz'}", None),
                senses=Senses(budgets=lambda _: budgets),
            )
            running = threading.Thread(target=agent.run)
            running.start()
            try:
                fleet.device("d2")
                until(lambda: delivered(fleet, "d1") >= 2, "updates of the device")
                reading[0] = Reading(temperature_c=71.0)
                serve.said(r"limited device=d1 does=rests reason=temperature ceiling: 71 C, the ceiling is 70 C")
                before = delivered(fleet, "d1")
                fleet.reach_version(fleet.version() + 4)
                assert delivered(fleet, "d1") <= before + 1, "one may have been on its way"
                before = delivered(fleet, "d1")
                reading[0] = Reading(temperature_c=68.0)
                fleet.reach_version(fleet.version() + 4)
                assert delivered(fleet, "d1") == before, "not yet cool enough"
                reading[0] = Reading(temperature_c=66.0)
                serve.said("free again device=d1")
                until(lambda: delivered(fleet, "d1") > before, "it goes on")
            finally:
                agent.stop()
                running.join(30.0)
        assert not running.is_alive()


def test_outside_its_hours_an_agent_does_nothing_and_says_so_on_both_sides(tmp_path: Path) -> None:
    now = time.localtime(time.time() + 3 * 3600)
    hours = f"{now.tm_hour:02}:00-{(now.tm_hour + 1) % 24:02}:00"
    with fleet_of(tmp_path, "aggregations = 5") as fleet:
        serve = fleet.serve()
        fleet.add({"d1": 8000.0, "d2": 8000.0})
        idle = limited(fleet, "d2", "--hours", hours)
        idle.said(r"limited \{'reason': 'hours: it works from ")
        serve.said(r"limited device=d2 does=rests, \d+ s more reason=hours: ")
        fleet.device("d1")
        assert serve.ended() == 0, "the run ends without it"
        assert notes(idle.text(), "training") == []
        assert notes(idle.text(), "fetching") == []
        assert delivered(fleet, "d2") == 0
