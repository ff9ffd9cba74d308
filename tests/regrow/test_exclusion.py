"""A device whose data does not fit the model fails every assignment: it is left alone after a few, until it starts anew."""

from __future__ import annotations

from functools import partial

from regrow import checkpoint
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.machine import Train, Trained, TrainingFailed
from testbed.memory import COORDINATOR
from tests.regrow import fleet


def _only_d2_fails(attempts: list[str], name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
    if name == "d2":
        attempts.append(name)
        return 0.001, TrainingFailed(job.number, "x: expected float32 [batch, 30], got float32 [300, 3, 30]")
    return fleet.train(name, job)


def test_a_device_that_cannot_train_gets_no_more_work_until_its_next_start() -> None:
    attempts: list[str] = []
    settings = fleet.task(fleet={"max_rejections": 4})
    world = fleet.start(settings, trainer=partial(_only_d2_fails, attempts))
    world.run(20)
    assert len(attempts) == 4
    assert world.clients[COORDINATOR].machine.ledger.devices["d2"].rejections == 4  # type: ignore[union-attr]
    world.add("d2", Device(fleet.identity("d2", boot=1), {}), up_bps=fleet.LINKS["d2"])
    world.run(30)
    assert 4 < len(attempts) <= 8
    world.run(300, stop=lambda: COORDINATOR in world.finished)
    assert world.finished[COORDINATOR] == "60 aggregations"


def test_a_coordinators_restart_ends_no_exclusion() -> None:
    """Neither from the log nor from a snapshot; the device's own next start still does."""
    settings = fleet.task(fleet={"max_rejections": 3}, stop={"aggregations": 200})
    attempts: list[str] = []
    world = fleet.start(settings, trainer=partial(_only_d2_fails, attempts))
    world.run(20)
    assert len(attempts) == 3
    for number, snapshot in enumerate((False, True)):
        world.kill(COORDINATOR)
        coordinator = fleet.recovered(world, settings, nonce=10 + number)
        if snapshot:
            again = checkpoint.load(settings, fleet.LAYOUT, *checkpoint.dump(coordinator.ledger))
            coordinator = Coordinator(again, "r1", fleet.PROGRAMS, 20)
        world.add(COORDINATOR, coordinator)
        before = coordinator.ledger.version
        world.run(world.now + 20)
        assert coordinator.ledger.version > before, "the others go on"
        assert len(attempts) == 3
        assert coordinator.ledger.devices["d2"].rejections == 3
    world.add("d2", Device(fleet.identity("d2", boot=1), {}), up_bps=fleet.LINKS["d2"])
    world.run(world.now + 20)
    assert len(attempts) == 6


def test_a_new_installation_ends_an_exclusion() -> None:
    settings = fleet.task(fleet={"max_rejections": 3}, stop={"aggregations": 200})
    attempts: list[str] = []
    world = fleet.start(settings, trainer=partial(_only_d2_fails, attempts))
    world.run(20)
    world.add("d2", Device(fleet.identity("d2", install=1), {}), up_bps=fleet.LINKS["d2"])
    world.run(40)
    assert len(attempts) == 6
