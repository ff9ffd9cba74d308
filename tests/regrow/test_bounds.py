"""What binds a device's first density, and that nothing ever takes it above what its memory holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from regrow import records, restoration, topics, wire
from regrow.checkpoint import dump, load
from regrow.coordinator import Coordinator
from regrow.density import tightest
from regrow.device import Device
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.machine import Train, Trained, TrainingFailed
from regrow.programs import MEMORY
from regrow.restarts import STARTS, STARTS_S
from regrow.restoration import RestorationConfig, RestorationState
from regrow.step_memory import JobBytes, StepMemory, largest_density, memory_of, needs_bytes
from regrow.task import Task
from testbed.memory import COORDINATOR, saved_of
from tests.regrow.fleet import UNITS, identity, programs_of, start_ledger, task, train
from tests.regrow.harness import Tape, fingerprint, inject, replay, replay_with_snapshot

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


def device(name: str, bps: float, step_s: float | None, memory_bytes: int | None) -> Device:
    made = Device(replace(identity(name), memory_bytes=memory_bytes), {}, bps)
    made.meters.full_step_s = step_s
    return made


FLEET = {
    "d0": (4e6, 0.1, None),
    "d1": (4e5, 0.1, 10_000),  # a tenth of the link: 0.9 x 0.1 asks for 0.1
    "d2": (4e6, 0.5, 10_000),  # a fifth of the speed: 0.9 x 0.2 asks for 0.2
    "d3": (4e6, 0.1, 399),  # holds 320 bytes, not 420: 0.1
}


def fleet(settings: Task, coordinator: Coordinator | None = None, trainer: Any = train) -> Tape:
    world = Tape(trainer)
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


def start_again(world: Tape, name: str, boot: int, offer: int | None, install: int = 0) -> None:
    made = Device(replace(identity(name, boot, install), memory_bytes=offer), saved_of(world, name), FLEET[name][0])
    made.meters.full_step_s = FLEET[name][1]
    world.kill(name)
    world.add(name, made, up_bps=FLEET[name][0], down_bps=4 * FLEET[name][0])
    world.run(world.now + 3.0)


def test_a_device_that_starts_with_other_memory_has_another_limit() -> None:
    settings = unit_task(stop=10_000)
    world = fleet(settings)
    world.run(4.0)
    known = world.coordinator().ledger.devices["d0"]
    assert (known.density, known.bound_by) == (1.0, "link")
    starts = ((1, 430, 0.2, "memory"), (2, 10_000, 1.0, "link"), (3, 10, 1.0, "memory"), (4, 320, 0.1, "memory"), (5, None, 1.0, "link"))
    for boot, offer, density, bound_by in starts:
        start_again(world, "d0", boot, offer)
        limit = 1.0 if offer is None else largest_density((220, 320, 420, 520, 620), LADDER, offer)
        assert (known.memory_density, known.density, known.bound_by) == (limit, density, bound_by)
        if limit == 0.0:
            number = known.number
            world.run(world.now + 5.0)
            assert known.number == number, "what holds no level has no work"
    assert world.notes_of("declined") == [{"device": "d0", "needs_bytes": 220, "memory_bytes": 10}]
    last = known.number
    world.run(world.now + 5.0)
    assert known.number > last, "and a memory that holds one has it again"
    assert world.coordinator().ledger.density_of(assigned(world, "d0")[-1].level) == 1.0
    assert fingerprint(replay_with_snapshot(world.log, settings, len(world.log) // 2)) == fingerprint(world.coordinator().ledger)


def test_memory_that_was_short_at_the_first_start_is_made_good_by_the_next() -> None:
    """Nothing restores here: what the memory has cut off comes back, and no more than that."""
    settings = task(
        method={"granularity": "unit"}, fleet={"min_devices": 4}, restoration={"trigger": "none"}, stop={"aggregations": 10_000}
    )
    world = fleet(settings)
    world.run(4.0)
    devices = world.coordinator().ledger.devices
    assert (devices["d3"].density, devices["d3"].bound_by) == (0.1, "memory")
    start_again(world, "d3", 1, 10_000)
    assert (devices["d3"].density, devices["d3"].bound_by) == (1.0, "link")
    for boot, offer, density, bound_by in ((1, 230, 0.05, "memory"), (2, 10_000, 0.2, "compute")):
        start_again(world, "d2", boot, offer)
        assert (devices["d2"].density, devices["d2"].bound_by) == (density, bound_by)


def test_restoration_counts_from_what_the_memory_has_cut_off() -> None:
    ledger = start_ledger(unit_task())
    cut = {"install": "00" * 16, "uplink_bps": 1e6, "density": 0.1, "memory_density": 0.1, "bound_by": "memory", "uncut_density": 0.2}
    ledger.apply(records.Joined(device="d", **cut))
    known = ledger.devices["d"]
    boots = iter(range(1, 9))

    def limited(memory_density: float) -> float:
        ledger.apply(
            records.Joined(device="d", install="00" * 16, boot=str(next(boots)), uplink_bps=1e6, density=0.0, memory_density=memory_density)
        )
        return known.density

    def restored(density: float) -> None:
        state = msgspec.Raw(msgspec.json.encode(RestorationState()))
        said = {"state": state, "scores": {}, "global_score": None, "reasons": [], "finished": False}
        ledger.apply(records.Restored(densities={"d": density}, **said))

    assert limited(0.5) == 0.2
    restored(0.5)
    assert [limited(0.1), limited(0.0), limited(1.0)] == [0.1, 0.1, 0.5]


def test_a_log_of_before_has_no_more_than_the_density() -> None:
    ledger = start_ledger(unit_task())
    ledger.apply(records.Joined(device="d", install="00" * 16, uplink_bps=1e6, density=0.5, bound_by="memory", memory_density=0.5))
    meta, arrays = dump(ledger)
    old = msgspec.json.decode(meta)
    for key in ("uncut_density", "uncut_by"):
        del old["devices"]["d"][key]
    known = load(ledger.task, ledger.layout, msgspec.json.encode(old), arrays, UNITS).devices["d"]
    assert known.uncut_density == ledger.devices["d"].uncut_density == 0.5
    assert known.bound_by == "memory"


@pytest.mark.parametrize("why", ["memory", "rejections"])
def test_who_gets_no_more_work_holds_no_refresh_back(why: str) -> None:
    """d3 is alone on the lowest rung, and stays connected."""
    settings = task(
        method={"granularity": "unit", "refresh_every": 5, "refresh_min_rounds": 2},
        fleet={"min_devices": 4, "heartbeat_s": 3.0, "max_rejections": 3},
        restoration={"trigger": "none"},
        stop={"aggregations": 10_000},
    )

    def fails(name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
        hopeless = name == "d3" and job.number > 2
        return (0.5, TrainingFailed(job.number, "no")) if hopeless and why == "rejections" else train(name, job)

    world = fleet(settings, trainer=fails)
    world.run(4.0)
    known = world.coordinator().ledger.devices["d3"]
    start_again(world, "d3", 1, 230 if why == "rejections" else 399)
    world.run(world.now + 4.0)
    if why == "memory":
        start_again(world, "d3", 2, 10)
    roster = world.coordinator().roster
    assert roster.excluded(known)
    refreshes = len(world.notes_of("refreshed"))
    world.run(world.now + 10.0)
    assert roster.live("d3")
    assert len(world.notes_of("refreshed")) >= refreshes + 2


def test_one_devices_claimed_speed_makes_nobody_smaller() -> None:
    settings = unit_task()
    world = fleet(settings)
    world.add("d3", device("d3", 4e6, 1e-12, None), up_bps=4e6, down_bps=16e6)
    world.run(3.0)
    joined = {fields["device"]: fields["density"] for fields in world.notes_of("joined")}
    assert joined == {"d0": 1.0, "d1": 0.1, "d2": 0.2, "d3": 1.0}


def test_computing_binds_only_where_it_takes_longer_than_the_upload() -> None:
    """Twenty steps of 0.5 ms are 10 ms; the upload of 1.5 kB is 60 ms at 0.2 Mbit/s and less than 1 ms at 16 Mbit/s."""
    settings = unit_task()
    for bps, expected in ((2e5, (1.0, "link")), (16e6, (0.2, "compute"))):
        world = Tape()
        world.add(COORDINATOR, leader(settings))
        for number, step_s in enumerate((1e-4, 1e-4, 1e-4, 5e-4)):
            world.add(f"d{number}", device(f"d{number}", bps, step_s, None), up_bps=bps, down_bps=4 * bps)
        world.run(3.0)
        joined = {fields["device"]: (fields["density"], fields["bound_by"]) for fields in world.notes_of("joined")}
        assert joined["d3"] == expected
        assert joined["d0"] == (1.0, "link")


def test_a_device_that_starts_again_and_again_is_taken_back_once_a_minute() -> None:
    settings = task(method={"granularity": "unit"}, fleet={"min_devices": 4, "heartbeat_s": 30.0}, stop={"aggregations": 10_000})
    world = fleet(settings, trainer=lambda name, job: (15.0, train(name, job)[1]))
    world.run(4.0)

    def joins() -> int:
        entries = [records.from_record(record) for record in world.log]
        return len([entry for entry in entries if isinstance(entry, records.Joined) and entry.device == "d0"])

    def releases() -> int:
        return len([fields for fields in world.notes_of("released") if fields["device"] == "d0"])

    for boot in range(1, STARTS + 1):
        start_again(world, "d0", boot, 430 if boot % 2 else None, install=boot % 3)
    assert joins() == 1 + STARTS
    before = (joins(), releases(), len(world.notes_of("declined")))
    for boot in range(STARTS + 1, STARTS + 11):
        hello = wire.Hello(
            boot=identity("d0", boot).boot, install=identity("d0").install, uplink_bps=4e6, memory_bytes=10 + 400 * (boot % 2)
        )
        inject(world, topics.hello("d0"), wire.encode(hello))
    assert (joins(), releases(), len(world.notes_of("declined"))) == before
    start_again(world, "d0", 99, None)
    (said,) = world.notes_of("restarting")  # once, not with every hello
    assert (said["device"], said["starts"], said["within_s"]) == ("d0", STARTS, STARTS_S)
    assert 0.0 < said["wait_s"] <= STARTS_S
    assert joins() == before[0]
    world.run(world.now + STARTS_S)
    assert world.coordinator().ledger.devices["d0"].boot == identity("d0", 99).boot.hex(), (
        "it counts later, and needs no other hello for it"
    )
    assert joins() == before[0] + 1
