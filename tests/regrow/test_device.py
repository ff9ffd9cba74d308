"""The device through kills, cuts, lies and reboots: it goes on where it was, and never with what it could not check."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import numpy as np
import pytest

from regrow import device as module
from regrow import topics, values, wire
from regrow.budget import Allowed
from regrow.device import TRANSITIONS, Device, Phase
from regrow.machine import (
    Acknowledged,
    Connected,
    DataChanged,
    Disconnected,
    Event,
    Limited,
    Measured,
    Note,
    Persisted,
    Publish,
    Received,
    SetTimer,
    Subscribe,
    Told,
    Train,
    Trained,
    TrainingFailed,
    Woken,
)
from regrow.presence import COMPLAINT_S, FIRST_COMPLAINT_S
from testbed.memory import COORDINATOR
from tests.regrow.device_worlds import RUN, SLOW, accepted_by, ended, running, until
from tests.regrow.fleet import LAYOUT, identity, task, train
from tests.regrow.harness import NAMES, TWO, Tape, begin, check_run, feed, phase_reached, snapshot
from tests.regrow.test_coordinator import Hits, rival

CUT_PHASES = [Phase.PROBING, Phase.WAITING, Phase.FETCHING, Phase.TRAINING, Phase.SAVING, Phase.SENDING]


# ---- transitions ---------------------------------------------------------------------------------------------------------------------


def assignment(number: int, **fields: Any) -> wire.Assignment:
    plain = wire.Assignment(
        term=1 << 40, number=number, version=0, epoch=0, level=0, steps=1, batch=1, learning_rate=0.1, seed=0, dtype="int8",
        chunk_bytes=16_384, deadline_s=30.0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


def sent(device: Device) -> int:
    """How many updates it has made."""
    return 0 if device.outgoing is None else device.outgoing.sequence + 1


def events_for(world: Tape, name: str) -> dict[Any, Event]:
    """One event of every kind that this device, where it is now, would take in."""
    device = world.device(name)
    version = device.assignment.version if device.assignment is not None else 0
    run = device.names or NAMES
    manifest = world.retained.get(run.manifest(version), wire.encode(wire.Claim(run="x", term=1)))
    part = next(iter(sorted(device._fetching.subscribed)), "none")
    sequence = device.outgoing.sequence if device.outgoing is not None else 0
    receipt = wire.Receipt(term=1 << 40, install=device.identity.install, sequence=sequence, outcome="accepted")
    ref = wire.TaskRef(task="toy", run="r1", term=1 << 40)
    token = next(iter(device._sending.in_flight), 1)
    plain: list[Event] = [
        Connected(),
        Disconnected(),
        Measured(9e5),
        Woken(),
        DataChanged(bytes(16), 5, 1),
        Acknowledged(token, 0.0, 0.0, 1),
        Persisted(device._save_id),
        Told("pause"),
        Limited(Allowed(train=False, said="hours: not now")),
    ]
    plain += [Trained(-1, np.zeros(1, np.float32), 1, 0.0, 0.0, ()), TrainingFailed(-1, "x")]
    return {
        **{type(event): event for event in plain},
        "tasks": Received(topics.tasks(name), wire.encode(wire.Tasks(tasks=[ref]))),
        "claim": Received(topics.claim("toy"), wire.encode(wire.Claim(run="r1", term=1 << 40))),
        "assignment": Received(run.assignment(name), wire.encode(assignment(500))),
        "receipt": Received(run.receipt(name), wire.encode(receipt)),
        "manifest": Received(run.manifest(version), manifest),
        "part": Received(part, b"x"),
    }


def prepared(phase: Phase) -> Tape:
    if phase is not Phase.IDLE:
        return until(phase)
    world = running()
    world.run(0.001)
    return world


# Without a task, or without having asked for it, these topics are nobody's: they are not even recognised.
UNKNOWN = {
    Phase.IDLE: {"claim", "assignment", "receipt", "manifest", "part"},
    Phase.PROBING: {"manifest", "part"},
    Phase.WAITING: {"manifest", "part"},
}
NO_PARTS = {Phase.TRAINING, Phase.SAVING, Phase.SENDING}


@pytest.mark.parametrize("phase", Phase)
def test_every_transition_is_tried_and_what_is_not_in_the_table_changes_nothing(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    world = prepared(phase)
    machine = world.device("d1")
    assert machine.phase is phase
    tried_kinds = set()
    for kind, event in events_for(world, "d1").items():
        hits = Hits(TRANSITIONS)
        monkeypatch.setattr(module, "TRANSITIONS", hits)
        tried = copy.deepcopy(machine)
        before = snapshot(tried)
        effects = tried.step(event, machine.now + 0.01)
        if hits.used[(phase, kind)]:
            tried_kinds.add(kind)
        if (phase, kind) not in TRANSITIONS:
            assert snapshot(tried) == before, f"{kind} in {phase} is not in the table but changed something"
            assert all(isinstance(effect, (SetTimer, Note)) for effect in effects)
    wanted = {kind for at, kind in TRANSITIONS if at is phase} - UNKNOWN.get(phase, set())
    missing = wanted - tried_kinds - ({"part"} if phase is Phase.FETCHING else set())
    assert missing == set()


def test_whole_runs_use_every_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between them, runs with cuts in every phase and the steps of the test above go through the whole table."""
    hits = Hits(TRANSITIONS)
    monkeypatch.setattr(module, "TRANSITIONS", hits)
    for phase in Phase:
        world = prepared(phase)
        for event in events_for(world, "d1").values():
            copy.deepcopy(world.device("d1")).step(event, world.now)
        feed(world, "d1", TrainingFailed(world.device("d1")._job, "no data today"))
        world.run(world.now + 30)
    idle = {(Phase.IDLE, kind) for kind in ("claim", "assignment")}  # in the table for all phases; an idle device has no such topic
    assert set(TRANSITIONS) - idle <= {key for key, count in hits.used.items() if count}


# ---- cuts, kills and restarts in every phase -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", CUT_PHASES)
def test_a_link_that_is_away_for_ten_seconds(phase: Phase) -> None:
    world = until(phase)
    world.cut("d1")
    world.run(world.now + 10)
    assert not [at for at, who, *_ in world.sent if who == "d1" and at > world.now - 9.9], "it speaks without a link"
    world.connect("d1")
    ended(world)


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.TRAINING, Phase.SENDING])
def test_a_link_that_is_away_for_longer_than_patience(phase: Phase) -> None:
    world = begin(
        task(fleet={"min_devices": 2}, stop={"aggregations": None, "seconds": 200.0}, method={"ladder": (1.0,)}), SLOW, persist_s=0.05
    )
    world.run(100, stop=phase_reached(world, "d1", phase))
    before = accepted_by(world, "d1")
    world.cut("d1")
    world.run(world.now + 65)
    world.connect("d1")
    world.run(world.now + 20)
    assert not world.notes_of("gave up", "d1"), "patience runs while there is a link"
    assert accepted_by(world, "d1") > before


def test_patience_with_a_download_runs_only_while_there_is_a_link() -> None:
    world = until(Phase.FETCHING)
    device, begun = world.device("d1"), world.now
    device.step(Disconnected("cut"), begun)
    device.step(Connected(), begun + 100)
    device.step(Woken(), begun + 110)
    assert device.phase is Phase.FETCHING
    device.step(Woken(), begun + 170)
    assert device.phase.value == "waiting"


@pytest.mark.parametrize("phase", CUT_PHASES)
def test_a_device_that_dies_and_starts_again(phase: Phase) -> None:
    world = until(phase)
    world.reboot("d1", uplink_bps=40_000.0 if phase is not Phase.PROBING else None)
    ended(world)


@pytest.mark.parametrize("phase", CUT_PHASES)
def test_a_device_that_dies_and_has_forgotten_its_link(phase: Phase) -> None:
    world = until(phase)
    world.reboot("d1", uplink_bps=None)
    ended(world)
    assert not [fields for fields in world.notes_of("released") if fields["reason"] == "deadline passed"]


@pytest.mark.parametrize("phase", CUT_PHASES)
def test_a_broker_that_restarts(phase: Phase) -> None:
    world = until(phase)
    world.restart_broker()
    ended(world)


@pytest.mark.parametrize("phase", CUT_PHASES)
def test_a_device_that_was_wiped_joins_as_a_new_installation(phase: Phase) -> None:
    world = until(phase)
    world.clients["d1"].saved.clear()
    world.reboot("d1", install=1)
    ended(world)
    assert world.coordinator().ledger.devices["d1"].install == identity("d1", 0, 1).install.hex()


# ---- terms, probing, receipts --------------------------------------------------------------------------------------------------------


def test_lower_terms_are_the_past() -> None:
    world = until(Phase.WAITING)
    device = world.device("d1")
    for low in (1, device.term - 1):
        old = assignment(700, term=low)
        device.step(Received(NAMES.assignment("d1"), wire.encode(old)), world.now)
        assert device.phase is Phase.WAITING
    world = until(Phase.SENDING)
    device = world.device("d1")
    assert device.outgoing is not None
    said = wire.Receipt(term=device.term - 1, install=device.identity.install, sequence=device.outgoing.sequence, outcome="accepted")
    device.step(Received(NAMES.receipt("d1"), wire.encode(said)), world.now)
    assert device.phase is Phase.SENDING
    world = until(Phase.FETCHING)
    device = world.device("d1")
    assert device.assignment is not None
    topic = NAMES.manifest(device.assignment.version)
    low_manifest = msgspec.structs.replace(wire.decode(world.retained[topic], wire.Manifest)[0], term=device.term - 1)
    before = device._fetching.wanted
    device.step(Received(topic, wire.encode(low_manifest)), world.now)
    assert device._fetching.wanted is before is None


def test_a_receipt_of_another_installation_or_sequence_is_not_mine() -> None:
    world = until(Phase.SENDING)
    device = world.device("d1")
    assert device.outgoing is not None
    mine, now = device.outgoing.sequence, world.now
    for install, sequence in ((bytes(16), mine), (device.identity.install, mine + 1), (device.identity.install, mine - 1 if mine else 7)):
        said = wire.Receipt(term=1 << 50, install=install, sequence=sequence, outcome="accepted")
        device.step(Received(NAMES.receipt("d1"), wire.encode(said)), now)
        assert device.phase is Phase.SENDING


@pytest.mark.parametrize(("bps", "most_s"), [(1e9, 1.5), (100_000.0, 4.0), (20_000.0, 15.0)])
def test_a_device_without_a_measured_link_probes_within_bounds(bps: float, most_s: float) -> None:
    world = begin(task(fleet={"min_devices": 1}, stop={"aggregations": 1}), {"d0": bps})
    world.run(60, stop=phase_reached(world, "d0", Phase.PROBING))
    begun = world.now
    world.run(60, stop=lambda: world.device("d0").phase not in (Phase.IDLE, Phase.PROBING))
    probed = sum(len(payload) for _, _, topic, payload in world.sent if topic.endswith("/probe"))
    assert wire.MIN_CHUNK_BYTES <= probed <= 256 * 1024 + wire.MIN_CHUNK_BYTES
    assert world.now - begun <= most_s
    assert world.device("d0").uplink_bps == bps
    world.finish()


def test_a_rebooted_device_that_still_has_an_assignment_begins_it_after_probing() -> None:
    world = until(Phase.FETCHING)
    device = world.reboot("d1", uplink_bps=None)
    world.run(world.now + 15, stop=lambda: device.phase is Phase.FETCHING)
    assert device.phase is Phase.FETCHING


def test_after_a_run_the_device_is_idle_and_a_new_run_starts_it_again() -> None:
    world = running()
    world.finish()
    assert world.device("d1").phase is Phase.IDLE
    world.add("next", rival(settings=RUN))
    world.run(world.now + 300, stop=lambda: "next" in world.finished)
    assert world.finished["next"] == "6 aggregations"
    assert sent(world.device("d1")) > 1


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.TRAINING, Phase.SENDING])
def test_a_device_at_work_for_a_coordinator_that_is_gone_is_found_by_another_task(phase: Phase) -> None:
    """Nothing was cleared, so the broker still holds what the dead one had given it to do."""
    world = until(phase)
    world.kill(COORDINATOR)
    other = msgspec.structs.replace(RUN, name="other")
    world.add("next", rival(settings=other))
    world.run(world.now + 300, stop=lambda: "next" in world.finished)
    assert world.finished["next"] == "6 aggregations"


def test_a_device_that_comes_back_from_another_run_still_has_its_mask_and_its_debt() -> None:
    world = begin(task(method={"name": "subfedavg"}, fleet={"min_devices": 2}, wire={"up": "int8"}), TWO)
    world.run(300, stop=lambda: sent(world.device("d1")) >= 4 and world.device("d1").phase is Phase.WAITING)
    device = world.device("d1")
    for run in ("other", "r1"):
        reference = wire.TaskRef(task="toy", run=run, term=device.term + 1)
        device.step(Received(topics.tasks("d1"), wire.encode(wire.Tasks(tasks=[reference], heartbeat_s=3.0))), world.now)
        last = device._last()
        assert (last is not None) == (run == "r1")
    assert last is not None
    assert last.mask is not None
    assert last.owed is not None


def test_a_device_whose_coordinator_is_alive_says_hello_once() -> None:
    world = begin(task(fleet={"min_devices": 2}, stop={"seconds": 400.0}), TWO)
    world.finish()
    hellos = [topic for _, who, topic, _ in world.sent if who == "d0" and topic.endswith("/hello")]
    assert len(hellos) <= 4, hellos


def test_a_device_that_gets_no_work_says_what_may_be_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator does not answer those whom it declines; they must not wait in silence."""
    world = begin(task(fleet={"min_devices": 3}), TWO)
    world.run(FIRST_COMPLAINT_S - 10)
    assert not world.notes_of("no work yet")
    world.run(FIRST_COMPLAINT_S + 15)
    (said,) = world.notes_of("no work yet", "d0")
    world.run(2 * COMPLAINT_S)
    assert (len(world.notes_of("no work yet", "d0")), len(world.notes_of("still no work", "d0"))) == (1, 1)
    assert said["memory_bytes"] == world.device("d0").identity.memory_bytes
    assert "declined" in said["reason"]
    monkeypatch.setattr("regrow.presence.COMPLAINT_S", 10.0)
    monkeypatch.setattr("regrow.presence.FIRST_COMPLAINT_S", 10.0)
    busy = begin(task(fleet={"min_devices": 2}, stop={"aggregations": None, "seconds": 40.0}), TWO)
    busy.finish()
    assert not busy.notes_of("no work yet")
    assert not busy.notes_of("still no work")


def test_a_device_without_a_link_waits_for_it_and_is_not_woken_again_and_again() -> None:
    """It gives up what it trained and has a next assignment, while the link is away."""
    world = until(Phase.TRAINING)
    device, now = world.device("d1"), world.now
    assert device.assignment is not None
    assert device.names is not None
    following = msgspec.structs.replace(device.assignment, number=device.assignment.number + 1)
    device.step(Received(device.names.assignment("d1"), wire.encode(following)), now)
    device.step(Disconnected("cut"), now + 1)
    device.step(TrainingFailed(device._job, "no data"), now + 2)
    assert device.phase is Phase.FETCHING
    timers = [effect.at_s for effect in device.step(Woken(), now + 100) if isinstance(effect, SetTimer)]
    assert timers == [float("inf")]


def test_a_fetch_begun_without_a_link_is_asked_for_when_the_link_is_back() -> None:
    world = until(Phase.TRAINING)
    device, now = world.device("d1"), world.now
    assert device.assignment is not None
    assert device.names is not None
    following = msgspec.structs.replace(device.assignment, number=device.assignment.number + 1)
    device.step(Received(device.names.assignment("d1"), wire.encode(following)), now)
    device.step(Disconnected("cut"), now + 1)
    device.step(TrainingFailed(device._job, "no data"), now + 2)
    assert device.phase is Phase.FETCHING
    effects = device.step(Connected(), now + 3)
    assert Subscribe((device.names.manifest(following.version),)) in effects


def test_a_result_of_an_earlier_job_is_not_taken_for_this_one() -> None:
    world = until(Phase.TRAINING)
    device = world.device("d1")
    job = device._job
    feed(world, "d1", Received(topics.tasks("d1"), wire.encode(wire.Tasks())))
    assert device.phase is Phase.IDLE
    reference = wire.TaskRef(task="toy", run="r1", term=device.term + 1 or 1)
    feed(world, "d1", Received(topics.tasks("d1"), wire.encode(wire.Tasks(tasks=[reference]))))
    world.run(world.now + 60, stop=lambda: device.phase is Phase.TRAINING and device._job > job)
    assert device._job > job
    feed(world, "d1", Trained(job, np.zeros(3, np.float32), 1, 0.0, 0.1, ()))
    feed(world, "d1", TrainingFailed(job, "old news"))
    assert device.phase.value == "training"


def test_training_that_diverges_gives_the_assignment_back_with_blame() -> None:
    def diverge(name: str, job: Train) -> tuple[float, Any]:
        seconds, result = train(name, job)
        if name == "d1" and isinstance(result, Trained):
            result.values[5] = np.nan
        return seconds, result

    world = begin(RUN, SLOW, trainer=diverge)
    world.finish()
    leader = world.coordinator()
    assert accepted_by(world, "d1") == 0
    assert leader.ledger.devices["d1"].rejections >= 1
    assert np.isfinite(leader.ledger.flat_weights).all()
    check_run(world, RUN)


def test_a_late_update_is_owed_again_and_nothing_is_blamed() -> None:
    settings = task(
        fleet={"min_devices": 2, "min_deadline_s": 4.0},
        stop={"aggregations": None, "seconds": 60.0},
        method={"ladder": (1.0,)},
        wire={"versions_held": 4},
    )

    def late(name: str, job: Train) -> tuple[float, Any]:
        seconds, result = train(name, job)
        return (25.0 if name == "d1" and job.number == 2 else seconds), result

    world = begin(settings, {"d0": 4e6, "d1": 4e5}, trainer=late)
    world.run(200, stop=lambda: bool(world.notes_of("rejected", "d1")))
    assert world.notes_of("rejected", "d1")
    device = world.device("d1")
    assert device.outgoing is not None
    assert device.outgoing.closed
    assert device.outgoing.owed is not None
    assert np.abs(device.outgoing.owed).max() > 0.01, "the whole delta is owed, not only a rounding"
    world.finish()
    known = world.coordinator().ledger.devices["d1"]
    assert known.rejections == 0
    check_run(world, settings)


def test_nothing_is_sent_before_it_is_saved() -> None:
    world = until(Phase.SAVING)
    sent = [topic for _, who, topic, _ in world.sent if who == "d1" and "/update/" in topic]
    assert sent == []
    assert world.device("d1").outgoing is not None


def test_the_model_that_travels_is_what_the_device_trains() -> None:
    """The base of a device is bit for bit the published one."""
    seen: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def look(name: str, job: Train) -> tuple[float, Any]:
        seen.append((job.values.copy(), job.coordinates.copy()))
        return train(name, job)

    world = begin(task(fleet={"min_devices": 2}, stop={"aggregations": 1}), TWO, trainer=look)
    world.finish()
    fresh = np.asarray(begin(task()).coordinator().ledger.flat_weights)
    for base, where in seen[:2]:
        always = np.isin(where, LAYOUT.always_kept_coordinates)
        assert np.array_equal(base[always], fresh[where[always]])
        assert np.array_equal(base, np.where(always, fresh[where], fresh[where].astype(np.float16).astype(np.float32)))
    assert values.FLOAT16_MAX > 0


def test_a_machine_offline_from_the_start_says_nothing() -> None:
    device = Device(identity("d0"), {})
    for at in range(20):
        effects = device.step(Woken(), float(at))
        assert not [effect for effect in effects if isinstance(effect, Publish)]


def test_the_link_is_needed_while_something_is_on_its_way_and_not_while_it_waits() -> None:
    needs = {phase: until(phase).device("d1").needs_link for phase in (Phase.WAITING, Phase.FETCHING, Phase.TRAINING, Phase.SENDING)}
    assert needs == {Phase.WAITING: False, Phase.FETCHING: True, Phase.TRAINING: False, Phase.SENDING: True}
    world = until(Phase.SENDING)
    device = world.device("d1")
    for token in list(device._sending.in_flight):
        device.step(Acknowledged(token, 0.0, 0.1, 10), world.now)
    while device._sending.in_flight:
        device.step(Acknowledged(next(iter(device._sending.in_flight)), 0.0, 0.1, 10), world.now)
    assert (device.phase, device.needs_link) == (Phase.SENDING, False)
