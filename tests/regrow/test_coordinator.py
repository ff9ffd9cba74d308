"""The coordinator over whole runs in memory: every transition, every trigger, every kind of aggregation, and one leader."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from regrow import coordinator as module
from regrow import topics, wire
from regrow.coordinator import TRANSITIONS, Coordinator, Phase
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Evaluated,
    Event,
    Measured,
    Note,
    Received,
    SetTimer,
    Standing,
    TrainingFailed,
    Woken,
)
from regrow.task import Task
from testbed.memory import COORDINATOR
from tests.regrow.fleet import INITIAL, LAYOUT, LINKS, PROGRAMS, identity, new_coordinator, task, train
from tests.regrow.harness import NAMES, TWO, Tape, begin, check_run, feed, leftovers, phase_reached, restart_coordinator, snapshot

PAIR = task(fleet={"min_devices": 2}, stop={"aggregations": 4})


class Hits(dict[Any, Any]):
    """A transition table that remembers what was looked up in it."""

    def __init__(self, table: Any) -> None:
        super().__init__(table)
        self.used: Counter[Any] = Counter()

    def get(self, key: Any, default: Any = None) -> Any:
        self.used[key] += 1
        return super().get(key, default)


def messages() -> dict[str, Received]:
    """One good message of every kind that a coordinator hears."""
    me = identity("d0")
    head = wire.UpdateHead(1, 0, 0, 0, "int8", 1, 1, wire.digest(b"x"))
    return {
        "claim": Received(topics.claim("toy"), wire.encode(wire.Claim(run="r9", term=3))),
        "status": Received(topics.status("d0"), wire.encode(wire.Status())),
        "hello": Received(topics.hello("d0"), wire.encode(wire.Hello(boot=me.boot, install=me.install, uplink_bps=1e6))),
        "telemetry": Received(NAMES.telemetry("d0"), wire.encode(wire.Telemetry(install=me.install, phase="waiting"))),
        "update": Received(
            NAMES.update("d0", 99, 0), wire.encode(wire.UpdateChunk(install=me.install, count=1, chunk_bytes=16_384, head=head), b"x")
        ),
    }


def every_event() -> dict[Any, Event]:
    plain: list[Event] = [
        Connected(),
        Disconnected(),
        Woken(),
        Measured(1e6),
        Acknowledged(1, 0.0, 0.0, 1),
        Evaluated(1, {}),
        TrainingFailed(1, ""),
        Standing(frozenset({"d1"})),
    ]
    return {**messages(), **{type(event): event for event in plain}}


def in_phase(phase: Phase) -> Coordinator:
    """A coordinator with some history, in this phase."""
    world = begin(PAIR, TWO)
    if phase is Phase.OFFLINE:
        world.run(3.0)
        world.cut(COORDINATOR)
        world.run(3.1)
    elif phase is Phase.DONE:
        world.finish()
    elif phase is Phase.LEADING:
        world.run(3.0)
    else:
        world.run(3.0, stop=phase_reached(world, COORDINATOR, phase))
    found = world.coordinator()
    assert found.phase is phase
    return found


@pytest.mark.parametrize("phase", Phase)
def test_every_transition_is_in_the_table_and_what_is_not_changes_nothing(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = in_phase(phase)
    for kind, event in every_event().items():
        hits = Hits(TRANSITIONS)
        monkeypatch.setattr(module, "TRANSITIONS", hits)
        tried = copy.deepcopy(machine)
        before = snapshot(tried)
        effects = tried.step(event, machine.now + 1.0)
        assert hits.used[(phase, kind)] == 1, f"{kind} was not heard as such"
        if (phase, kind) not in TRANSITIONS:
            assert snapshot(tried) == before, f"{kind} in {phase} is not in the table but changed something"
            assert all(isinstance(effect, SetTimer) for effect in effects)
    assert {key for key in TRANSITIONS if key[0] is phase} <= {(phase, kind) for kind in every_event()}


def test_whole_runs_use_every_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = Hits(TRANSITIONS)
    monkeypatch.setattr(module, "TRANSITIONS", hits)
    world = begin(PAIR, TWO)
    feed(world, COORDINATOR, Standing())
    world.run(0.2)
    feed(world, COORDINATOR, Standing())
    world.cut(COORDINATOR)
    world.run(0.3)
    world.connect(COORDINATOR)
    world.run(3.0)
    feed(world, COORDINATOR, Standing())
    world.cut(COORDINATOR)
    world.run(3.5)
    world.connect(COORDINATOR)
    world.run(5.0)
    world.add("stranger", _Speaker([messages()["claim"], messages()["status"]]))
    world.finish()
    world.restart_broker()
    world.run(world.now + 2)
    feed(world, COORDINATOR, Standing())
    natural = {key for key in TRANSITIONS if key[1] is not Evaluated}
    assert natural <= {key for key, count in hits.used.items() if count}
    assert leftovers(world) == []


class _Speaker(Device):
    """Says what it is given, once."""

    def __init__(self, said: list[Received]) -> None:
        super().__init__(identity("stranger"), {})
        self._said = said

    def step(self, event: Event, now: float) -> list[Any]:  # noqa: ARG002 (the machine's signature)
        from regrow.machine import Publish

        return [Publish(item.topic, item.payload) for item in self._said] if isinstance(event, Connected) else []


# ---- the broker carries ----------------------------------------------------------------------------------------------------------------


def test_each_increment_leaves_once_per_version_however_many_devices_fetch_it() -> None:
    settings = task(stop={"aggregations": 15}, fleet={"min_devices": 8})
    links = {f"d{index}": 4_000_000.0 / (1 + index % 3) for index in range(8)}
    world = begin(settings, links)
    world.finish()
    said = Counter(
        topic for _, who, topic, payload in world.sent if who == COORDINATOR and payload and ("/chunk/" in topic or "/manifest/" in topic)
    )
    assert len(said) > 50
    assert set(said.values()) == {1}
    fetched = Counter(fields["version"] for fields in world.notes_of("fetching"))
    assert max(fetched.values()) >= 5, "several devices fetched the same version"
    check_run(world, settings)


def test_a_restored_density_fetches_only_its_increments() -> None:
    """Same version, higher level: what is already here is not fetched again."""
    world = begin(task(fleet={"min_devices": 1}, stop={"seconds": 60.0}, method={"full_density_bps": 8e7}), {"d0": 4e6})
    world.run(30, stop=lambda: world.device("d0").phase.value == "training")
    device, leader = world.device("d0"), world.coordinator()
    lease = leader.ledger.devices["d0"].lease
    assert lease is not None
    assert lease.level == 0
    have = dict(device._fetching.parts)
    order = leader.ledger.order
    assignment = wire.Assignment(
        term=device.term, number=lease.number + 1, version=lease.version, epoch=lease.epoch, level=2, steps=1, batch=1, learning_rate=0.1,
        seed=0, dtype="int8", chunk_bytes=16_384, deadline_s=30.0,
    )  # fmt: skip
    world._perform("d0", device.step(TrainingFailed(1, "enough"), world.now))
    world._perform("d0", device.step(Received(NAMES.assignment("d0"), wire.encode(assignment)), world.now))
    publication = leader.ledger.published[lease.version]
    leader.broadcast.version(lease.version)  # it may have been taken from the broker meanwhile
    world._perform(COORDINATOR, leader._flush())
    world.run(world.now + 5, stop=lambda: world.device("d0").phase.value == "training")
    new = sum(len(data) for digest, data in device._fetching.parts.items() if digest not in have)
    increments = publication.offset(order.lengths[2]) - publication.offset(order.lengths[0])
    sets = sum(len(data) for data in leader.ledger.orders[lease.epoch].levels[1:3])
    assert new == increments + sets


def live_versions(world: Tape) -> int:
    return len({topic for topic in world.retained if "/manifest/" in topic})


@pytest.mark.parametrize(("on_broker", "held"), [(1, 1), (1, 3), (2, 4), (4, 16)])
def test_versions_on_the_broker_and_versions_held_are_bounded(on_broker: int, held: int) -> None:
    settings = task(stop={"aggregations": 25}, wire={"versions_on_broker": on_broker, "versions_held": held})
    world = begin(settings, LINKS)
    most_on_broker = most_held = 0

    def watch() -> bool:
        nonlocal most_on_broker, most_held
        most_on_broker = max(most_on_broker, live_versions(world))
        most_held = max(most_held, len(world.coordinator().ledger.published))
        return world.ended()

    world.run(600, stop=watch)
    assert world.ended()
    # Order of publication: the new one is there before the old one is cleared, within one batch of effects.
    assert most_on_broker <= on_broker
    assert most_held <= held
    if held > 4:
        assert most_held > 1, "the bound was never tried"
    world.run(world.now + 5)
    check_run(world, settings)


def test_after_the_end_only_empty_task_lists_are_retained() -> None:
    world = begin(task(stop={"aggregations": 12}))
    world.finish()
    assert leftovers(world) == []
    assert len(world.retained) == len(LINKS)
    for name in LINKS:
        assert world.device(name).phase.value == "idle"


def test_a_device_that_was_told_but_never_joined_is_told_the_end() -> None:
    settings = task(fleet={"min_devices": 3}, stop={"seconds": 5.0})
    world = begin(settings, TWO)
    world.finish()
    assert world.coordinator().ledger.devices == {}
    assert leftovers(world) == []


# ---- who is waited for ----------------------------------------------------------------------------------------------------------------

TRIGGERS: dict[str, dict[str, Any]] = {
    "all": {"kind": "all"},
    "arrival": {"kind": "arrival"},
    "interval": {"kind": "interval", "interval_s": 2.0},
    "fastest": {"kind": "fastest"},
    "count": {"kind": "count", "count": 4},
}
STEADY = {"d0": 4e6, "d1": 4e6, "d2": 8e5, "d3": 4e5}


@pytest.mark.parametrize("kind", TRIGGERS)
@pytest.mark.parametrize("dead", [(), ("d0", "d1"), ("d0", "d1", "d2")], ids=["all alive", "fast class dead", "one left"])
def test_no_dead_device_stops_a_run(kind: str, dead: tuple[str, ...]) -> None:
    settings = task(stop={"aggregations": 8}, trigger=TRIGGERS[kind], fleet={"min_devices": 4})
    world = begin(settings, STEADY)
    world.run(4.0)
    for name in dead:
        world.kill(name)
    world.finish()
    assert world.now < 150
    check_run(world, settings)


@pytest.mark.parametrize("kind", TRIGGERS)
@pytest.mark.parametrize("lazy_ones", [("d0",), ("d0", "d2"), ("d0", "d1", "d3")])
def test_devices_that_talk_but_never_deliver_are_waited_for_until_one_deadline_only(kind: str, lazy_ones: tuple[str, ...]) -> None:
    settings = task(stop={"aggregations": 6}, trigger=TRIGGERS[kind], fleet={"min_devices": 4, "min_deadline_s": 10.0})

    def lazy(name: str, job: Any) -> Any:

        seconds, result = train(name, job)
        return (1e9 if name in lazy_ones else seconds), result

    world = begin(settings, STEADY, trainer=lazy)
    world.finish()
    assert world.now < 60
    assert not {who for who, device in world.coordinator().ledger.devices.items() if device.updates} & set(lazy_ones)
    if kind == "all":
        assert any(fields["reason"] == "deadline passed" for fields in world.notes_of("released"))
    check_run(world, settings)


def test_a_will_makes_a_device_silent_until_its_next_word() -> None:
    world = begin(PAIR, TWO)
    world.run(2.0)
    leader = world.coordinator()
    assert leader.live("d0")
    leader.step(messages()["status"], world.now)
    assert not leader.live("d0")
    leader.step(messages()["telemetry"], world.now)
    assert leader.live("d0")


# ---- one coordinator -------------------------------------------------------------------------------------------------------------------

RIVAL = "rival"


def rival(run: str = "r2", nonce: int = 9, *, takeover: bool = False, settings: Task = PAIR) -> Coordinator:
    return Coordinator(Ledger.start(settings, LAYOUT, INITIAL), run, PROGRAMS, nonce, takeover=takeover)


LONG = task(fleet={"min_devices": 2}, stop={"seconds": 60.0})


def test_a_second_coordinator_refuses_while_the_first_is_alive() -> None:
    world = begin(LONG, TWO)
    world.run(3.0)
    world.add(RIVAL, rival(settings=LONG))
    world.run(20.0)
    assert "another coordinator leads task toy (run r1)" in world.finished[RIVAL]
    assert "--takeover" in world.finished[RIVAL]
    assert not [topic for _, who, topic, _ in world.sent if who == RIVAL], "it has not said a word"
    world.finish()
    check_run(world, LONG)


def test_a_second_coordinator_takes_over_from_a_dead_one() -> None:
    world = begin(LONG, TWO)
    world.run(3.0)
    world.kill(COORDINATOR)
    world.add(RIVAL, rival())
    world.run(200.0, stop=lambda: RIVAL in world.finished)
    assert world.finished[RIVAL] == "4 aggregations"


@pytest.mark.parametrize("at_s", [0.7, 1.4, 2.0, 2.6, 3.3])
def test_takeover_wins_the_first_stops_and_the_devices_follow(at_s: float) -> None:
    world = begin(LONG, TWO)
    world.run(at_s)
    world.add(RIVAL, rival(takeover=True))
    world.run(300.0, stop=lambda: RIVAL in world.finished)
    assert "taken the task over" in world.finished[COORDINATOR]
    assert world.finished[RIVAL] == "4 aggregations"
    leader = world.clients[RIVAL].machine
    assert isinstance(leader, Coordinator)
    assert set(leader.ledger.devices) == set(TWO)
    assert world.now < 60, "the devices followed without waiting for patience to run out"


def test_an_own_restart_goes_on_at_once_with_a_higher_term() -> None:
    world = begin(LONG, TWO)
    world.run(3.0)
    term = world.coordinator().claim.term
    world.kill(COORDINATOR)
    again = restart_coordinator(world, LONG)
    world.run(world.now + 1.0)
    assert again.phase is Phase.LEADING
    assert again.claim.term > term
    world.finish()
    check_run(world, LONG)


@pytest.mark.parametrize("apart_s", [0.0, 0.005, 0.3, 0.49, 0.5, 0.505, 0.51])
@pytest.mark.parametrize("higher", [8, 6])
def test_of_a_simultaneous_start_exactly_one_survives_and_has_the_devices(apart_s: float, higher: int) -> None:
    world = Tape()
    world.add(COORDINATOR, new_coordinator(PAIR, nonce=7))
    world.run(apart_s)
    world.add(RIVAL, rival(nonce=higher))
    for name, bps in TWO.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    world.run(300.0, stop=lambda: len(world.finished) == 2)
    assert sorted(reason == "4 aggregations" for reason in world.finished.values()) == [False, True], world.finished


def test_a_lower_foreign_claim_is_answered_with_a_beat() -> None:
    leader = in_phase(Phase.LEADING)
    beat = leader.claim.beat
    leader.step(messages()["claim"], leader.now)
    assert leader.claim.beat == beat + 1
    assert leader.phase is Phase.LEADING


def test_bytes_that_are_no_message_are_noted_and_change_nothing() -> None:
    for phase in Phase:
        leader = in_phase(phase)
        before = snapshot(leader)
        for topic in (topics.hello("d0"), NAMES.telemetry("d0"), NAMES.update("d0", 0, 0), topics.claim("toy")):
            effects = leader.step(Received(topic, b"RG\x01\x63junk"), leader.now)
            assert any(isinstance(effect, Note) and effect.kind == "refused" for effect in effects)
        assert snapshot(leader) == before


def test_planned_points_hold_by_the_clock_however_rare_evaluations_are() -> None:
    settings = task(restoration={"trigger": "fixed", "planned_s": 20.0, "every": 10_000}, stop={"aggregations": 10_000, "seconds": 25.0})
    world = begin(settings)
    world.finish()
    rose = sorted({round(at_s, 1) for at_s, who, note in world.notes if who == COORDINATOR and note.kind == "restored"})
    led_s = world.coordinator()._lead_s
    assert [round(at_s - led_s) for at_s in rose] == [4, 8, 12, 16][: len(rose)]
    assert len(rose) >= 3
    assert {device.density for device in world.coordinator().ledger.devices.values()} == {1.0}
    assert world.coordinator().ledger.restoration.points == 5
    check_run(world, settings)
