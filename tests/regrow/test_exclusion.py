"""A device whose data does not fit the model fails every assignment: it is left alone after a few, until it starts anew."""

from __future__ import annotations

from functools import partial

from regrow import checkpoint
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.machine import DataChanged, Train, Trained, TrainingFailed
from regrow.presence import COMPLAINT_S
from regrow.task import Task
from testbed.memory import COORDINATOR, Deferred, Trainer
from tests.regrow import fleet


def _only_d2_fails(attempts: list[str], name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
    if name == "d2":
        attempts.append(name)
        return 0.001, TrainingFailed(job.number, "x: expected float32 [batch, 30], got float32 [300, 3, 30]")
    return fleet.train(name, job)


def _patient_fleet() -> Task:
    """For long virtual times: rounds of 100 s, and little to say."""
    return fleet.task(fleet={"max_rejections": 3, "min_deadline_s": 500.0, "heartbeat_s": 30.0}, stop={"aggregations": 100_000})


def _slowly(train: Trainer, name: str, job: Train) -> tuple[float, Trained | TrainingFailed | Deferred]:
    _, result = train(name, job)
    return (0.001 if isinstance(result, TrainingFailed) else 100.0), result


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


def test_an_excluded_device_keeps_saying_why_and_is_heard() -> None:
    world = fleet.start(_patient_fleet(), trainer=partial(_slowly, partial(_only_d2_fails, [])))
    world.run(20 + 4 * COMPLAINT_S)
    reason = "x: expected float32 [batch, 30], got float32 [300, 3, 30]"
    complaints = [(at, note.fields) for at, who, note in world.notes if who == "d2" and note.kind == "without work"]
    assert len(complaints) == 4
    assert all(fields["reason"] == reason and "start the agent again" in fields["cure"] for _, fields in complaints)
    heard = [note.fields["failed"] for _, _, note in world.notes if note.kind == "telemetry" and note.fields["device"] == "d2"]
    assert heard[-30:] == [reason] * 30
    assert {note.fields["failed"] for _, _, note in world.notes if note.kind == "telemetry" and note.fields["device"] == "d1"} == {""}


def test_other_data_are_tried_and_end_the_exclusion_and_the_complaints() -> None:
    attempts: list[str] = []
    repaired = False

    def train(name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
        return fleet.train(name, job) if repaired else _only_d2_fails(attempts, name, job)

    world = fleet.start(_patient_fleet(), trainer=partial(_slowly, train))
    world.run(20)
    coordinator, device = world.clients[COORDINATOR].machine, world.clients["d2"].machine
    assert isinstance(coordinator, Coordinator)
    assert isinstance(device, Device)
    for boot, tries in ((1, 6), (2, 9)):
        world.now += 1.0
        world._perform("d2", device.step(DataChanged(fleet.identity("d2", boot).boot, 7 + boot, 3), world.now))
        world.run(world.now + 20)
        assert len(attempts) == tries
        assert device.identity.examples == 7 + boot
    repaired = True
    world._perform("d2", device.step(DataChanged(fleet.identity("d2", 3).boot, 10, 3), world.now))
    world.notes.clear()
    world.run(world.now + 2 * COMPLAINT_S)
    assert coordinator.ledger.devices["d2"].updates > 0
    assert not [note for _, who, note in world.notes if who == "d2" and note.kind == "without work"]
    assert [note.fields["failed"] for _, _, note in world.notes if note.kind == "telemetry" and note.fields["device"] == "d2"][-1] == ""


def _declines(attempts: list[str], name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
    if name != "d2":
        return fleet.train(name, job)
    attempts.append(name)
    return 0.001, TrainingFailed(job.number, "d2.npz: row 17 (the first is 0): label 12", declined=True)


def test_a_device_whose_data_do_not_fit_declines_once_and_is_neither_restored_nor_waited_for() -> None:
    attempts: list[str] = []
    settings = fleet.task(
        method={"name": "fedgmr", "refresh_every": 10}, restoration={"every": 2, "patience": 1}, stop={"aggregations": 150}
    )
    world = fleet.start(settings, trainer=partial(_declines, attempts))
    world.run(20)
    coordinator = world.clients[COORDINATOR].machine
    assert isinstance(coordinator, Coordinator)
    density = coordinator.ledger.devices["d2"].density
    assert density < 1.0
    world.run(2000, stop=lambda: COORDINATOR in world.finished)
    assert world.finished[COORDINATOR] == "150 aggregations"
    assert len(attempts) == 1
    said = [(who, note.fields) for _, who, note in world.notes if note.kind == "declined"]
    assert len(said) == 2, "once there, once here"
    reasons = {who: fields["reason"] for who, fields in said}
    assert reasons == dict.fromkeys(("d2", COORDINATOR), "d2.npz: row 17 (the first is 0): label 12")
    assert not [note for _, who, note in world.notes if note.kind in ("without work", "gave up") and who == "d2"]
    assert coordinator.ledger.restoration.rho_min > density, "others were restored"
    assert coordinator.ledger.devices["d2"].density == density
    assert "d2" not in coordinator.ledger.restoration.clients
    assert not coordinator.roster.idle & {"d2"}


def test_what_was_declined_is_tried_again_after_the_devices_next_start_and_only_then() -> None:
    attempts: list[str] = []
    settings = fleet.task(stop={"aggregations": 200})
    world = fleet.start(settings, trainer=partial(_declines, attempts))
    world.run(20)
    world.kill(COORDINATOR)
    again = checkpoint.load(settings, fleet.LAYOUT, *checkpoint.dump(fleet.recovered(world, settings, nonce=10).ledger))
    world.add(COORDINATOR, Coordinator(again, "r1", fleet.PROGRAMS, 20))
    world.run(world.now + 20)
    assert len(attempts) == 1
    assert again.devices["d2"].declined
    device = world.clients["d2"].machine
    assert isinstance(device, Device)
    assert device.in_trouble
    world._perform("d2", device.step(DataChanged(fleet.identity("d2", 1).boot, 7, 3), world.now))
    world.run(world.now + 20)
    assert len(attempts) == 2
    assert len([note for _, who, note in world.notes if who == "d2" and note.kind == "declined"]) == 2


def test_another_task_is_tried() -> None:
    """What was wrong with the data for one run says nothing about another."""
    attempts: list[str] = []
    world = fleet.start(_patient_fleet(), trainer=partial(_slowly, partial(_only_d2_fails, attempts)))
    world.run(20)
    world.kill(COORDINATOR)
    world.add(COORDINATOR, fleet.new_coordinator(_patient_fleet(), run="r2", nonce=9))
    world.run(world.now + 120)
    assert len(attempts) == 6
