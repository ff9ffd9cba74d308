"""The device through kills, cuts, lies and reboots: it goes on where it was, and never with what it could not check."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import numpy as np
import pytest

from regrow import device as module
from regrow import records, topics, values, wire
from regrow.device import OUTGOING, TRANSITIONS, Device, Phase
from regrow.fetching import PART
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Event,
    Measured,
    Note,
    Persisted,
    Publish,
    Received,
    Save,
    SetTimer,
    Train,
    Trained,
    TrainingFailed,
    Woken,
)
from regrow.parameters import Layout, Tensor
from testbed.memory import COORDINATOR, saved_of
from tests.regrow.fleet import LAYOUT, identity, task, train
from tests.regrow.harness import NAMES, TWO, Tape, begin, check_run, feed, leftovers, phase_reached, snapshot
from tests.regrow.test_coordinator import Hits, rival

SLOW = {"d0": 400_000.0, "d1": 40_000.0}
"""d1 takes about a second for a full upload, so that every phase lasts."""
RUN = task(fleet={"min_devices": 2, "min_deadline_s": 30.0}, stop={"aggregations": 6}, method={"ladder": (1.0,)})
CUT_PHASES = [Phase.PROBING, Phase.WAITING, Phase.FETCHING, Phase.TRAINING, Phase.SAVING, Phase.SENDING]


def running() -> Tape:
    return begin(RUN, SLOW, persist_s=0.05)


def until(phase: Phase, name: str = "d1") -> Tape:
    world = running()
    world.run(100, stop=phase_reached(world, name, phase))
    assert world.device(name).phase is phase
    return world


def ended(world: Tape) -> None:
    world.finish()
    check_run(world, RUN)
    assert leftovers(world) == []
    assert accepted_by(world, "d1") >= 1


def accepted_by(world: Tape, name: str) -> int:
    entries = [records.from_record(record) for record in world.log]
    return sum(isinstance(entry, records.Accepted) and entry.device == name for entry in entries)


# ---- transitions ---------------------------------------------------------------------------------------------------------------------


def assignment(number: int, **fields: Any) -> wire.Assignment:
    plain = wire.Assignment(
        term=1 << 40, number=number, version=0, epoch=0, level=0, steps=1, batch=1, learning_rate=0.1, seed=0, dtype="int8",
        chunk_bytes=16_384, deadline_s=30.0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


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
    plain: list[Event] = [Connected(), Disconnected(), Measured(9e5), Woken(), Acknowledged(token, 0.0, 0.0, 1), Persisted(device._save_id)]
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


# ---- only what is missing is fetched and sent ----------------------------------------------------------------------------------------

BIG = Layout((Tensor("a.weight", (400, 500)), Tensor("a.bias", (400,), always_kept=True)))


def big_world(links: dict[str, float] | None = None) -> Tape:
    """A model of 200 000 parameters on slow links: several chunks each way."""
    from regrow.coordinator import Coordinator
    from regrow.ledger import Ledger

    settings = task(fleet={"min_devices": 1}, stop={"aggregations": 3}, method={"ladder": (1.0,)}, wire={"up": "float16"})

    def learn(_: str, job: Train) -> tuple[float, Trained]:
        return 0.5, Trained(job.number, job.values[: job.length] + np.float32(0.01), 10, 0.5, 0.5, ())

    initial = np.random.default_rng(4).normal(size=BIG.size).astype(np.float32)
    world = Tape(learn)
    world.add(COORDINATOR, Coordinator(Ledger.start(settings, BIG, initial), "r1", {"layout": BIG.to_json(), "train": b"T" * 150_000}, 7))
    for name, bps in (links or {"d0": 400_000.0}).items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=bps)
    return world


class Counting(Device):
    """Remembers which parts it took in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.took: list[bytes] = []

    def step(self, event: Event, now: float) -> list[Any]:
        effects = super().step(event, now)
        self.took += [bytes(effect.data) for effect in effects if isinstance(effect, Save) and effect.name.startswith(PART)]
        return effects


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_broken_download_fetches_only_the_missing_chunks(how: str) -> None:
    world = big_world({})
    first = Counting(identity("d0"), {}, 400_000.0)
    world.add("d0", first, up_bps=400_000.0, down_bps=400_000.0)
    world.run(60, stop=lambda: len(first.took) >= 6)
    assert first.phase is Phase.FETCHING
    if how == "cut":
        world.cut("d0")
        world.run(world.now + 3)
        world.connect("d0")
        second = first
    else:
        second = Counting(identity("d0", 1), saved_of(world, "d0"), 400_000.0)
        world.kill("d0")
        world.add("d0", second, up_bps=400_000.0, down_bps=400_000.0)
    world.run(world.now + 60, stop=lambda: second.phase is Phase.TRAINING)
    took = first.took if second is first else first.took + second.took
    wanted = second._fetching.wanted
    assert wanted is not None
    assert len(took) == len(set(took)) == len(wanted.parts), "a part was fetched twice"
    everything = sum(map(len, second._fetching.parts.values()))
    assert sum(map(len, took)) == everything


@pytest.mark.parametrize("how", ["cut", "kill", "broker"])
def test_a_broken_upload_sends_only_the_missing_chunks_again(how: str) -> None:
    world = big_world()
    world.run(60, stop=phase_reached(world, "d0", Phase.SENDING))
    leader = world.coordinator()
    world.run(world.now + 60, stop=lambda: "d0" in leader.assemblies and len(leader.assemblies["d0"].chunks) >= 3)
    arrived = set(leader.assemblies["d0"].chunks)
    count = leader.assemblies["d0"].count
    assert 3 <= len(arrived) < count - 3
    begun = len(world.sent)
    if how == "cut":
        world.cut("d0")
        world.run(world.now + 3)
        world.connect("d0")
    elif how == "kill":
        world.reboot("d0", uplink_bps=400_000.0)
    else:
        world.restart_broker()
    world.run(world.now + 60, stop=lambda: leader.ledger.devices["d0"].updates == 1)
    again = [int(topic.rsplit("/", 1)[1]) for _, who, topic, _ in world.sent[begun:] if who == "d0" and "/update/" in topic]
    assert arrived.isdisjoint(again)
    assert set(again) == set(range(count)) - arrived
    assert len(again) == len(set(again)), "a chunk was sent twice"


def test_a_missing_receipt_that_names_nonsense_sends_nothing_that_is_not_there() -> None:
    world = big_world()
    world.run(60, stop=phase_reached(world, "d0", Phase.SENDING))
    device = world.device("d0")
    assert device.outgoing is not None
    said = wire.Receipt(
        term=device.term, install=device.identity.install, sequence=device.outgoing.sequence, outcome="missing",
        missing=[wire.Range(2, 1), wire.Range(10**9, 2**53), wire.Range(0, 2**53)],
    )  # fmt: skip
    device.step(Received(NAMES.receipt("d0"), wire.encode(said)), world.now)
    assert set(device._sending.queue) | set(device._sending.in_flight.values()) == set(range(device.outgoing.count))


# ---- what does not check out ---------------------------------------------------------------------------------------------------------


def test_a_corrupt_part_on_disk_is_dropped_and_fetched_again() -> None:
    world = big_world()
    world.run(60, stop=lambda: len(world.device("d0")._fetching.parts) >= 6)
    saved = world.clients["d0"].saved
    name = next(name for name in saved if name.startswith(PART))
    saved[name] = saved[name][:-1] + b"\x00\x00"
    device = world.reboot("d0", uplink_bps=400_000.0)
    assert name not in {PART + digest.hex() for digest in device._fetching.parts}
    world.run(world.now + 60, stop=lambda: device.phase is Phase.TRAINING)
    assert device.phase is Phase.TRAINING
    assert wire.digest(saved_of(world, "d0")[name]).hex() == name.removeprefix(PART)


@pytest.mark.parametrize("damage", [b"", b"\xff\xff", b"\x98\xa2\x8d1\x00"])
def test_a_corrupt_outgoing_update_is_set_aside_and_the_device_rejoins(damage: bytes) -> None:
    world = until(Phase.SENDING)
    world.clients["d1"].saved[OUTGOING] = damage
    world.reboot("d1", install=1, uplink_bps=40_000.0)  # the agent makes a new installation of it, as its sequence is lost
    ended(world)
    assert world.notes_of("set aside", "d1")


def test_a_chunk_with_a_wrong_digest_is_never_used() -> None:
    world = big_world()
    device = world.device("d0")
    world.run(60, stop=lambda: len(device._fetching.parts) >= 4 and any("/chunk/" in topic for topic in device._fetching.subscribed))
    topic = next(topic for topic in sorted(device._fetching.subscribed) if "/chunk/" in topic)
    before = dict(device._fetching.parts)
    for bad in (world.retained[topic][:-1] + b"\x7f", b"", world.retained[topic] + b"\0", next(iter(before.values()))):
        effects = device.step(Received(topic, bad), world.now)
        assert not [effect for effect in effects if isinstance(effect, Save)]
        assert device._fetching.parts == before
        assert topic in device._fetching.subscribed, "the true one may still come"
    world.run(world.now + 60, stop=lambda: device.phase is Phase.TRAINING)
    assert device.phase is Phase.TRAINING


def test_parts_that_vanished_from_the_broker_end_in_another_assignment() -> None:
    world = until(Phase.FETCHING)
    for topic in [topic for topic in world.retained if "/chunk/" in topic]:
        del world.retained[topic]
    world.run(world.now + 1)
    world.clients["d1"].machine.step(Woken(), world.now)
    ended(world)


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
    assert world.device("d1").sequence > 0


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


def test_two_chunks_at_most_are_unacknowledged() -> None:
    world = big_world()
    most = 0

    def watch() -> bool:
        nonlocal most
        most = max(most, len(world.device("d0")._sending.in_flight))
        return world.ended()

    world.run(300, stop=watch)
    assert world.ended()
    assert most == 2


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
