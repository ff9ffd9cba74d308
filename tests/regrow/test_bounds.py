"""What binds a device's first density, and that nothing ever takes it above what its memory holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from regrow import records, restoration
from regrow.coordinator import Coordinator
from regrow.density import tightest
from regrow.device import Device
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.programs import MEMORY
from regrow.restoration import RestorationConfig, RestorationState
from regrow.step_memory import JobBytes, StepMemory, largest_density, memory_of, needs_bytes
from regrow.task import Task
from testbed.memory import COORDINATOR
from tests.regrow.fleet import identity, programs_of, start_ledger, task
from tests.regrow.harness import Tape, fingerprint, replay, replay_with_snapshot

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)
LEVELS = StepMemory([JobBytes(100 + 100 * level, 1, 0) for level in range(1, 6)])
"""With batches of 20: 220, 320, 420, 520 and 620 bytes."""


def unit_task(stop: int = 12, **method: Any) -> Task:
    fleet = {"min_devices": 4, "heartbeat_s": 3.0}
    restored = {"trigger": "pace", "every": 1, "full_model_every": 2}
    return task(method={"granularity": "unit", **method}, fleet=fleet, restoration=restored, stop={"aggregations": stop})


def leader(settings: Task, ledger: Ledger | None = None, nonce: int = 7, memory: StepMemory = LEVELS) -> Coordinator:
    programs = {**programs_of(settings), MEMORY: memory.to_json()}
    return Coordinator(start_ledger(settings) if ledger is None else ledger, "r1", programs, nonce)


def device(name: str, bps: float, step_s: float | None, memory_bytes: int | None, boot: int = 0) -> Device:
    made = Device(replace(identity(name, boot), memory_bytes=memory_bytes), {}, bps)
    made.meters.full_step_s = step_s
    return made


FLEET = {
    "d0": (4e6, 0.1, None),
    "d1": (4e5, 0.1, 10_000),  # a tenth of the link: 0.9 x 0.1 asks for 0.1
    "d2": (4e6, 0.5, 10_000),  # a fifth of the speed: 0.9 x 0.2 asks for 0.2
    "d3": (4e6, 0.1, 399),  # holds 320 bytes, not 420: 0.1
}


def fleet(settings: Task, coordinator: Coordinator | None = None) -> Tape:
    world = Tape()
    world.add(COORDINATOR, coordinator or leader(settings))
    for name, (bps, step_s, memory_bytes) in FLEET.items():
        world.add(name, device(name, bps, step_s, memory_bytes), up_bps=bps, down_bps=4 * bps)
    return world


def assigned(world: Tape, name: str) -> list[records.Assigned]:
    entries = [records.from_record(record) for record in world.log]
    return [entry for entry in entries if isinstance(entry, records.Assigned) and entry.device == name]


def test_the_tightest_of_three_binds_and_the_first_of_equal_ones_is_named() -> None:
    assert tightest(0.1, 0.2, 0.5) == (0.1, "link")
    assert tightest(0.5, 0.2, 1.0) == (0.2, "compute")
    assert tightest(0.5, 0.2, 0.05) == (0.05, "memory")
    assert tightest(0.2, 0.2, 0.2) == (0.2, "link")


def test_what_a_job_takes_by_level() -> None:
    settings = unit_task()
    needs = needs_bytes(LEVELS, settings)
    assert needs == (220, 320, 420, 520, 620)
    scoring = StepMemory([JobBytes(100 * level, 1, 2) for level in range(1, 6)])
    assert needs_bytes(scoring, settings)[0] == 100 + 20 + 2 * 256, "whatever validation data a device says that it has"
    assert [largest_density(needs, LADDER, offer) for offer in (219, 220, 419, 620)] == [0.0, 0.05, 0.1, 1.0]
    dropout = task(method={"name": "fjord"})
    assert needs_bytes(LEVELS, dropout) == (220, 540, 960, 1480, 2100), "every width up to its own has a program"
    assert needs_bytes(StepMemory([JobBytes(7, 0, 0)]), task()) == (7,) * 5
    assert needs_bytes(memory_of({}, settings), settings) == (0,) * 5, "a build of before says nothing"
    for wrong in (StepMemory(LEVELS.levels[:3]).to_json(), b"{}"):
        with pytest.raises(LocalError, match="task build"):
            memory_of({MEMORY: wrong}, settings)


def test_link_compute_and_memory_each_bind_one_device() -> None:
    world = fleet(unit_task())
    world.run(3.0)
    joined = {fields["device"]: (fields["density"], fields["bound_by"]) for fields in world.notes_of("joined")}
    assert joined == {"d0": (1.0, "link"), "d1": (0.1, "link"), "d2": (0.2, "compute"), "d3": (0.1, "memory")}
    assert MEMORY not in world.coordinator().programs, "devices have no use for it"


def test_masked_steps_cost_what_full_ones_do_so_only_the_link_counts() -> None:
    world = fleet(task(fleet={"min_devices": 3}), leader(task(fleet={"min_devices": 3}), memory=StepMemory([JobBytes(400, 0, 0)])))
    world.finish()
    joined = {fields["device"]: (fields["density"], fields["bound_by"]) for fields in world.notes_of("joined")}
    assert joined == {"d0": (1.0, "link"), "d1": (0.1, "link"), "d2": (1.0, "link")}
    assert world.notes_of("declined") == [{"device": "d3", "needs_bytes": 400, "memory_bytes": 399}]
    assert "d3" not in world.coordinator().ledger.devices


@pytest.mark.parametrize("trigger", ["plateau", "pace", "fixed", "mixed"])
def test_restoration_never_goes_above_the_memory(trigger: Any) -> None:
    config = RestorationConfig(trigger=trigger, patience=1, ladder=LADDER, planned=(0.5, 1.0))
    state, densities, limits = RestorationState(), {"a": 0.05, "b": 0.05, "c": 0.1}, {"a": 0.2, "c": 0.1}
    flat = dict.fromkeys(LADDER, 0.5)
    finished = False
    for turn in range(1, 60):
        state, densities, finished, _ = restoration.evaluate(
            state,
            config,
            densities,
            flat,
            0.5,
            turn / 20,
            elapsed_s=100.0 * turn,
            full_round_s=dict.fromkeys(densities, 1.0),
            limits=limits,
        )
        assert densities["a"] <= 0.2
        assert densities["c"] == 0.1
        assert state.minimum.get("a", 0.0) <= 0.2
    assert finished
    assert densities == {"a": 0.2, "b": 0.2 if trigger == "fixed" else 1.0, "c": 0.1}


@pytest.mark.parametrize("rule", ["class", "relative"])
def test_no_assignment_exceeds_the_memory_and_none_asks_for_the_full_model(rule: str) -> None:
    settings = unit_task(stop=30, density=rule)
    offer = 399
    memory = LEVELS if rule == "class" else StepMemory([JobBytes(200 + 40 * level, 1, 0) for level in range(64)])
    world = fleet(settings, leader(settings, memory=memory))
    world.finish()
    ledger = world.coordinator().ledger
    limit = ledger.devices["d3"].memory_density
    assert limit == largest_density(needs_bytes(memory, settings), _densities(ledger), offer)
    mine = assigned(world, "d3")
    assert len(mine) > 5
    assert max(ledger.density_of(each.level) for each in mine) == limit < 0.2
    assert all(each.evaluate_level is None for each in mine)
    others = [each for name in ("d1", "d2") for each in assigned(world, name)]
    assert max(ledger.density_of(each.level) for each in others) > limit
    assert any(each.evaluate_level is not None for each in others)


def _densities(ledger: Ledger) -> list[float]:
    return [ledger.density_of(level) for level in range(len(ledger.order.lengths))]


def test_a_restarted_coordinator_keeps_the_limit_and_what_bound() -> None:
    settings = unit_task(stop=30)
    world = fleet(settings)
    world.run(4.0)
    replayed = replay(world.log, settings)
    assert fingerprint(replay_with_snapshot(world.log, settings, len(world.log) // 2)) == fingerprint(replayed)
    kept = replayed.devices["d3"]
    assert (kept.memory_density, kept.bound_by, replayed.devices["d2"].bound_by) == (0.1, "memory", "compute")
    world.add(COORDINATOR, leader(settings, replayed, nonce=8))
    world.finish()
    assert {replayed.density_of(each.level) for each in assigned(world, "d3")} == {0.1}
    assert len([fields for fields in world.notes_of("joined") if fields["device"] == "d3"]) == 1


def test_a_device_that_starts_with_other_memory_has_another_limit() -> None:
    settings = unit_task(stop=200)
    world = fleet(settings)
    world.run(4.0)
    known = world.coordinator().ledger.devices["d0"]
    assert known.density == 1.0
    for boot, offer, density in ((1, 430, 0.2), (2, 10_000, None), (3, 10, None)):
        world.kill("d0")
        world.add("d0", device("d0", 4e6, 0.1, offer, boot), up_bps=4e6, down_bps=16e6)
        world.run(world.now + 3.0)
        assert known.memory_density == largest_density((220, 320, 420, 520, 620), LADDER, offer)
        assert density is None or known.density == density
    assert world.notes_of("declined") == [{"device": "d0", "needs_bytes": 220, "memory_bytes": 10}]
    last = known.number
    world.run(world.now + 5.0)
    assert known.number == last, "what holds no level has no work"
