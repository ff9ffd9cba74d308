"""Devices that were put to rest: they get no work, hold up no round, and what a draining one still delivers counts."""

from __future__ import annotations

import pytest

from regrow import records
from regrow.device import Device, Phase
from regrow.machine import Standing, Told
from testbed.memory import COORDINATOR
from tests.regrow.device_worlds import RUN, accepted_by, ended, running, until
from tests.regrow.fleet import identity, task
from tests.regrow.harness import TWO, Tape, begin, check_run, feed, restart_coordinator

PATIENT = task(fleet={"min_devices": 2, "min_deadline_s": 1000.0, "heartbeat_s": 1.0}, trigger={"kind": "all"}, stop={"aggregations": 12})


def rest(world: Tape, *, paused: str = "", draining: str = "") -> None:
    """Tell both sides, as a steward and a control message do."""
    sets = [frozenset(filter(None, (name,))) for name in (paused, draining)]
    feed(world, COORDINATOR, Standing(*sets))
    for name in ("d0", "d1"):
        feed(world, name, Told("pause" if name == paused else "drain" if name == draining else "work"))


def assigned(world: Tape, name: str) -> int:
    entries = [records.from_record(record) for record in world.log]
    return sum(isinstance(entry, records.Assigned) and entry.device == name for entry in entries)


def test_a_paused_device_loses_its_work_and_holds_up_no_round() -> None:
    world = until(Phase.TRAINING)
    rest(world, paused="d1")
    assert world.device("d1").phase is Phase.WAITING
    assert world.coordinator().ledger.devices["d1"].lease is None
    before, version = assigned(world, "d1"), world.coordinator().ledger.version
    world.run(world.now + 20.0, stop=lambda: world.coordinator().ledger.version >= version + 2)
    assert world.coordinator().ledger.version >= version + 2
    assert assigned(world, "d1") == before
    rest(world)
    ended(world)
    assert assigned(world, "d1") > before


def test_a_draining_device_delivers_what_it_has_and_gets_no_more() -> None:
    world = until(Phase.TRAINING)
    before, delivered = assigned(world, "d1"), accepted_by(world, "d1")
    rest(world, draining="d1")
    assert world.device("d1").phase is Phase.TRAINING
    world.run(world.now + 30.0, stop=lambda: accepted_by(world, "d1") > delivered)
    assert accepted_by(world, "d1") == delivered + 1
    world.finish()
    assert assigned(world, "d1") == before
    check_run(world, RUN)


def test_a_round_that_waits_for_everybody_does_not_wait_for_who_rests() -> None:
    world = begin(PATIENT, TWO)
    world.run(100, stop=lambda: world.coordinator().ledger.version >= 2)
    world.run(100, stop=lambda: "d1" in world.coordinator().roster.outstanding)
    world.kill("d1")
    rest_of_gateway = Standing(draining=frozenset({"d1"}))
    feed(world, COORDINATOR, rest_of_gateway)
    assert "d1" not in world.coordinator().roster.outstanding
    version = world.coordinator().ledger.version
    world.run(world.now + 20.0, stop=lambda: world.coordinator().ledger.version >= version + 3)
    assert world.coordinator().ledger.version >= version + 3


@pytest.mark.parametrize("phase", [Phase.PROBING, Phase.FETCHING, Phase.TRAINING, Phase.SENDING])
@pytest.mark.parametrize("action", ["pause", "drain"])
def test_whatever_it_was_doing_it_rests_and_comes_back(phase: Phase, action: str) -> None:
    world = until(phase)
    rest(world, **{"paused" if action == "pause" else "draining": "d1"})
    before = assigned(world, "d1")
    version = world.coordinator().ledger.version
    world.run(world.now + 30.0, stop=lambda: world.coordinator().ledger.version >= version + 2)
    assert world.device("d1").assignment is None
    assert assigned(world, "d1") == before
    rest(world)
    ended(world)


def test_a_device_that_rests_before_it_ever_worked_does_not_join_until_it_may() -> None:
    world = running()
    rest(world, paused="d1")
    world.run(15.0)
    assert "d1" not in world.coordinator().ledger.devices
    assert world.coordinator().waiting.keys() == {"d0"}  # min_devices is 2
    rest(world)
    world.run(world.now + 15.0, stop=lambda: "d1" in world.coordinator().ledger.devices)
    assert "d1" in world.coordinator().ledger.devices
    ended(world)


def test_a_device_that_waits_to_be_admitted_and_is_put_to_rest_waits_no_more() -> None:
    world = begin(task(fleet={"min_devices": 3}, stop={"aggregations": 4}), TWO)
    world.run(10.0, stop=lambda: len(world.coordinator().waiting) == 2)
    feed(world, COORDINATOR, Standing(paused=frozenset({"d1"})))
    assert world.coordinator().waiting.keys() == {"d0"}
    world.add("d2", Device(identity("d2"), {}), up_bps=1e6, down_bps=4e6)
    world.run(world.now + 10.0)
    assert not world.coordinator().ledger.devices  # two that may work, not three


def test_who_rests_is_said_before_the_coordinator_leads_and_after_its_restart() -> None:
    """The registry is read anew at every start, so nothing of it is in the log."""
    world = until(Phase.TRAINING)
    version = world.coordinator().ledger.version
    again = restart_coordinator(world, RUN)
    assert again.ledger.devices["d1"].lease is not None
    feed(world, COORDINATOR, Standing(paused=frozenset({"d1"})))
    feed(world, "d1", Told("pause"))
    world.run(world.now + 30.0, stop=lambda: again.ledger.version >= version + 2)
    assert again.ledger.devices["d1"].lease is None
    assert again.ledger.version >= version + 2


def test_the_result_of_a_job_that_was_given_up_is_not_looked_at() -> None:
    """It may come late from the training thread, even after the next job has begun."""
    world = until(Phase.TRAINING)
    rest(world, paused="d1")
    rest(world)
    world.run(world.now + 60.0, stop=lambda: accepted_by(world, "d1") >= 1)
    ended(world)
