"""Nothing is promised before it is durable, and a coordinator that dies anywhere goes on where the log ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import records, topics, wire
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import Effect, Event, Finished, Persist, Persisted, Publish
from regrow.task import Task
from testbed.memory import COORDINATOR
from tests.regrow.fleet import INITIAL, LAYOUT, PROGRAMS, identity, task
from tests.regrow.harness import TWO, Tape, begin, check_run, fingerprint, leftovers, replay, restart_coordinator

SHORT = task(
    fleet={"min_devices": 2, "min_deadline_s": 5.0},
    stop={"aggregations": 5},
    method={"refresh_every": 2, "refresh_min_rounds": 0},
    restoration={"every": 2, "patience": 1, "min_delta": 0.5},
)


class Notary(Coordinator):
    """Checks with every step that what leaves rests on records that have come back as Persisted."""

    def __init__(self, settings: Task) -> None:
        super().__init__(Ledger.start(settings, LAYOUT, INITIAL), "r1", PROGRAMS, 7)
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self.durable: set[tuple[object, ...]] = {("order", 0)}
        self.promised: list[tuple[object, ...]] = []

    def step(self, event: Event, now: float) -> list[Effect]:
        effects = super().step(event, now)
        if isinstance(event, Persisted):
            for number in [number for number in self._waiting if number <= event.id]:
                for record in self._waiting.pop(number):
                    self._note(records.from_record(record))
        for effect in effects:
            if isinstance(effect, Persist):
                self._waiting[effect.id] = effect.records
            elif isinstance(effect, Publish) and len(effect.payload):
                self._check(effect.topic.split("/"), bytes(effect.payload))
            elif isinstance(effect, Finished):
                self._promise("finished")
        return effects

    def undecided(self) -> bool:
        return bool(self._waiting)

    def _note(self, entry: records.Entry) -> None:
        if isinstance(entry, (records.Accepted, records.Rejected)):
            self.durable.add((type(entry).__name__.lower(), entry.device, entry.install, entry.sequence))
        elif isinstance(entry, records.Assigned):
            self.durable.add(("assigned", entry.device, entry.number))
        elif isinstance(entry, records.Published):
            self.durable.add(("version", entry.version))
        elif isinstance(entry, records.Refreshed):
            self.durable.add(("order", entry.epoch))
        elif isinstance(entry, records.Finished):
            self.durable.add(("finished",))

    def _promise(self, *fact: object) -> None:
        assert fact in self.durable, f"{fact} left before it was durable"
        self.promised.append(fact)

    def _check(self, parts: list[str], payload: bytes) -> None:
        if parts[-1] == "receipt":
            said = wire.decode(payload, wire.Receipt)[0]
            if said.outcome != "missing" and "newer" not in said.reason:
                self._promise(said.outcome, parts[-2], said.install.hex(), said.sequence)
        elif parts[-1] == "assignment":
            self._promise("assigned", parts[-2], wire.decode(payload, wire.Assignment)[0].number)
        elif parts[4:5] in (["chunk"], ["manifest"]):
            self._promise("version", int(parts[5]))
        elif parts[4:5] == ["order"]:
            self._promise("order", int(parts[5]))


def notarised(settings: Task, persist_s: float) -> tuple[Tape, Notary]:
    world, notary = Tape(persist_s=persist_s), Notary(settings)
    world.add(COORDINATOR, notary)
    for name, bps in TWO.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    return world, notary


@settings(max_examples=8)
@given(st.sampled_from([0.0, 0.001, 0.2, 1.0, 3.0]), st.lists(st.tuples(st.sampled_from(["cut", "broker"]), st.floats(0.5, 4)), max_size=3))
def test_nothing_leaves_before_it_is_durable(persist_s: float, troubles: list[tuple[str, float]]) -> None:
    world, notary = notarised(SHORT, persist_s)
    for kind, after_s in troubles:
        world.run(world.now + after_s)
        if kind == "broker":
            world.restart_broker()
        else:
            world.cut(COORDINATOR)
            world.run(world.now + 0.5)
            world.connect(COORDINATOR)
    world.finish()
    kinds = {fact[0] for fact in notary.promised}
    assert kinds >= {"accepted", "assigned", "version", "order", "finished"}
    check_run(world, SHORT)


def test_a_disk_that_never_answers_lets_nothing_out() -> None:
    world, notary = notarised(SHORT, float("inf"))
    world.run(120)
    assert notary.undecided(), "the coordinator decided, but it must not say so"
    assert notary.promised == []
    loud = [topic for _, who, topic, _ in world.sent if who == COORDINATOR]
    allowed = (topics.claim("toy"), "/program/", "/tasks")
    assert all(any(word in topic for word in allowed) for topic in loud)
    last = max((at for at, who, _, _ in world.sent if who == COORDINATOR), default=0.0)
    assert last < 30, "whoever cannot write stops to beat, so that another may lead"


def boundaries() -> int:
    world = begin(SHORT, TWO)
    world.finish()
    check_run(world, SHORT)
    kinds = {record.kind for record in world.log}
    assert kinds >= {"joined", "published", "assigned", "accepted", "aggregated", "refreshed", "restored", "retired", "finished"}
    return world.persists


BOUNDARIES = boundaries()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, BOUNDARIES + 1))
def test_a_crash_at_every_durable_step(number: int, after: bool) -> None:
    for snapshot_at in (None, number, 10_000):
        world = begin(SHORT, TWO)
        world.crash_at = (number, after)
        world.run(300, stop=lambda world=world: world.crashed)  # type: ignore[misc]  # bound now, called in this loop
        assert world.crashed
        world.run(world.now + 1.0)
        restart_coordinator(world, SHORT, snapshot_at=snapshot_at)
        world.finish()
        check_run(world, SHORT)
        assert leftovers(world) == []
        assert world.coordinator().ledger.version == 5


def test_a_crash_in_every_life() -> None:
    """The coordinator dies again and again, every time a little later in its life, and the run still ends."""
    world = begin(SHORT, TWO)
    lives = 0
    while not world.ended() and lives < 40:
        world.crash_at, world.crashed, world.persists = (2 + lives % 3, lives % 2 == 0), False, 0
        world.run(world.now + 120, stop=lambda: world.crashed or world.ended())
        if world.crashed:
            lives += 1
            world.run(world.now + 0.3)
            restart_coordinator(world, SHORT, nonce=100 + lives)
    assert lives > 3
    assert world.ended()
    world.run(world.now + 5)
    check_run(world, SHORT)
    assert leftovers(world) == []


@pytest.mark.parametrize("at_s", [0.2, 0.6, 1.0, 1.5, 2.2, 3.1, 4.5])
def test_a_broker_that_forgets_everything_is_told_again(at_s: float) -> None:
    world = begin(SHORT, TWO)
    world.run(at_s)
    world.restart_broker()
    world.finish()
    check_run(world, SHORT)
    assert leftovers(world) == []


def test_coordinator_and_broker_die_together() -> None:
    world = begin(SHORT, TWO)
    world.run(2.0)
    world.kill(COORDINATOR)
    world.restart_broker()
    world.run(world.now + 10)
    restart_coordinator(world, SHORT)
    world.finish()
    check_run(world, SHORT)
    assert leftovers(world) == []


def test_elapsed_time_counts_leading_only_and_over_all_lives() -> None:
    limited = task(fleet={"min_devices": 2}, stop={"seconds": 20.0})
    world = begin(limited, TWO)
    world.run(8.0)
    world.kill(COORDINATOR)
    world.run(100.0)
    restart_coordinator(world, limited)
    world.finish()
    assert world.coordinator().ledger.finished == "20 s have passed"
    assert 110 < world.now < 130
    check_run(world, limited)


def test_a_rollback_replays_to_the_same_bits() -> None:
    world = begin(SHORT, TWO)
    world.finish()
    entry = records.RolledBack(version=6, to_version=2)
    log = [*world.log, records.to_record(entry, np.ascontiguousarray(INITIAL).tobytes())]
    ledger = replay(log, SHORT)
    assert ledger.finished == ""
    assert ledger.version == 6
    assert not ledger.buffer
    assert ledger.flat_weights.tobytes() == INITIAL.tobytes()
    assert fingerprint(ledger) == fingerprint(replay(log, SHORT))
