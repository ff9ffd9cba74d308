"""A device whose data does not fit the model fails every assignment: it is left alone after a few, until it starts anew."""

from __future__ import annotations

from regrow.device import Device
from regrow.machine import Train, Trained, TrainingFailed
from testbed.memory import COORDINATOR
from tests.regrow import fleet


def test_a_device_that_cannot_train_gets_no_more_work_until_its_next_start() -> None:
    attempts: list[str] = []

    def train(name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
        if name == "d2":
            attempts.append(name)
            return 0.001, TrainingFailed(job.number, "x: expected float32 [batch, 30], got float32 [300, 3, 30]")
        return fleet.train(name, job)

    settings = fleet.task(fleet={"max_rejections": 4})
    world = fleet.start(settings, trainer=train)
    world.run(20)
    assert len(attempts) == 4
    assert world.clients[COORDINATOR].machine.ledger.devices["d2"].rejections == 4  # type: ignore[union-attr]
    world.add("d2", Device(fleet.identity("d2", boot=1), {}), up_bps=fleet.LINKS["d2"])
    world.run(30)
    assert 4 < len(attempts) <= 8
    world.run(300, stop=lambda: COORDINATOR in world.finished)
    assert world.finished[COORDINATOR] == "60 aggregations"
