"""Devices whose owners limit them, in whole fleets: they decline or shrink work and say why; the coordinator lowers densities, or waits."""

from __future__ import annotations

import random
from typing import Any

import pytest

from regrow import coordinator as module
from regrow import records, topics, wire
from regrow.budget import BYTES, HOURS, JOULES, UNMETERED, Allowed, Budget, Seen, Used, judge
from regrow.device import Device, Phase
from regrow.machine import Limited, Steer, Train
from regrow.presence import COMPLAINT_S, QUIET_S
from regrow.reported import limit_note
from testbed.memory import COORDINATOR
from tests.regrow.device_worlds import RUN, SLOW, accepted_by, big_world, ended, running, until
from tests.regrow.fleet import LINKS, identity, task
from tests.regrow.harness import TWO, Tape, begin, check_run, feed, fingerprint, inject, replay_with_snapshot, restart_coordinator

NIGHT_ONLY = Allowed(train=False, said=f"{HOURS}: it works from 22:00 to 06:00 only", names=frozenset({HOURS}), until_s=1e6)
METERED = Allowed(link=False, said=f"{UNMETERED}: this network is metered", names=frozenset({UNMETERED}))
HOT = Allowed(cool=False, said="temperature ceiling: 81 C, the ceiling is 80 C")
LONG = task(fleet={"min_devices": 2, "min_deadline_s": 1000.0, "heartbeat_s": 1.0}, trigger={"kind": "all"}, stop={"aggregations": 12})


def allow(world: Tape, name: str, allowed: Allowed) -> None:
    feed(world, name, Limited(allowed))


def at_most(share: float) -> Allowed:
    return Allowed(density=share, said=f"{JOULES}: too many", names=frozenset({JOULES}))


def assigned(world: Tape, name: str) -> list[records.Assigned]:
    entries = [records.from_record(record) for record in world.log]
    return [entry for entry in entries if isinstance(entry, records.Assigned) and entry.device == name]


def limits_told(world: Tape, name: str) -> list[wire.Limit | None]:
    return [
        wire.decode(payload, wire.Telemetry)[0].limit
        for _, who, topic, payload in world.sent
        if who == name and topic.endswith("/telemetry")
    ]


def pass_rounds(world: Tape, rounds: int, within_s: float = 60.0) -> None:
    version = world.coordinator().ledger.version
    world.run(world.now + within_s, stop=lambda: world.coordinator().ledger.version >= version + rounds)
    assert world.coordinator().ledger.version >= version + rounds


# ---- rest ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.TRAINING, Phase.SENDING])
def test_outside_its_hours_a_device_has_no_work_and_holds_up_nobody(phase: Phase) -> None:
    world = until(phase)
    delivered = accepted_by(world, "d1")
    allow(world, "d1", NIGHT_ONLY)
    pass_rounds(world, 2)
    assert accepted_by(world, "d1") == delivered + (phase is Phase.SENDING), "an update that is ready still leaves"
    device, before = world.device("d1"), len(assigned(world, "d1"))
    assert device.phase is Phase.WAITING
    assert world.coordinator().ledger.devices["d1"].lease is None
    pass_rounds(world, 1)
    assert len(assigned(world, "d1")) == before
    told = limits_told(world, "d1")[-1]
    assert told is not None
    assert (told.said, told.density) == (NIGHT_ONLY.said, None)
    assert told.seconds == pytest.approx(1e6 - world.now, abs=20.0)
    assert world.notes_of("limited", COORDINATOR)[-1]["reason"] == NIGHT_ONLY.said
    allow(world, "d1", Allowed())
    ended(world)
    assert len(assigned(world, "d1")) > before
    assert world.notes_of("free again", COORDINATOR) == [{"device": "d1"}]


def test_a_device_that_is_limited_from_its_start_is_never_given_parts() -> None:
    world = running()
    allow(world, "d1", NIGHT_ONLY)
    pass_rounds(world, 3)
    assert world.notes_of("fetching", "d1") == []
    assert len(assigned(world, "d1")) <= 1, "the first may be on its way before the coordinator knows"
    allow(world, "d1", Allowed())
    ended(world)


def test_a_job_that_may_not_go_on_ends_in_the_training_thread_too() -> None:
    world = until(Phase.TRAINING)
    assert Steer("give up") in world.device("d1").step(Limited(NIGHT_ONLY), world.now)


def test_a_device_that_rests_does_not_wonder_why_it_has_no_work() -> None:
    world = begin(task(fleet={"min_devices": 2}, stop={"aggregations": 100_000}), TWO)
    world.run(3.0)
    for name in TWO:
        allow(world, name, NIGHT_ONLY)
    world.run(world.now + 3 * COMPLAINT_S)
    assert {world.device(name).phase for name in TWO} == {Phase.WAITING}
    assert [note for kind in ("no work yet", "still no work", "without work") for note in world.notes_of(kind)] == []


def test_work_whose_refusal_was_lost_is_taken_back_with_the_next_word() -> None:
    """The device gives it back while there is no link, so the coordinator hears only that it rests."""
    world = until(Phase.TRAINING)
    world.cut("d1")
    world.run(world.now + 0.2)
    allow(world, "d1", NIGHT_ONLY)
    leader = world.coordinator()
    assert leader.ledger.devices["d1"].lease is not None
    world.connect("d1")
    world.run(world.now + 2.0)
    assert leader.ledger.devices["d1"].lease is None
    assert NIGHT_ONLY.said in world.notes_of("released")[-1]["reason"]


def test_a_limited_device_says_so_before_its_hello() -> None:
    world = until(Phase.TRAINING)
    allow(world, "d1", NIGHT_ONLY)
    world.cut("d1")
    world.run(world.now + 1.0)
    sent = len(world.sent)
    world.connect("d1")
    world.run(world.now + 0.5)
    first, second = [topic for _, who, topic, _ in world.sent[sent:] if who == "d1"][:2]
    assert first.endswith("/telemetry")
    assert second.endswith("/hello")


def test_metered_networks_carry_next_to_nothing() -> None:
    world = begin(task(fleet={"min_devices": 2}, stop={"aggregations": 100_000}, method={"ladder": (1.0,)}), SLOW)
    world.run(100.0, stop=lambda: world.device("d1").phase is Phase.TRAINING)
    allow(world, "d1", METERED)
    client = world.clients["d1"]
    world.run(world.now + 5.0)
    assert world.device("d1").phase is Phase.SENDING, "training needs no link"
    before = (client.sent_bytes, client.received_bytes)
    version = world.coordinator().ledger.version
    world.run(world.now + QUIET_S)
    assert world.coordinator().ledger.version > version
    assert client.sent_bytes - before[0] < 2000
    assert client.received_bytes - before[1] < 2000, "no claim every two seconds"
    assert not world.device("d1").may_use_link
    world.cut("d1")
    world.connect("d1")
    world.run(world.now + 5.0)
    before = (client.sent_bytes, client.received_bytes)
    world.run(world.now + 300.0)
    assert client.received_bytes - before[1] < 500, "nor after another connect"


def test_what_waited_for_an_unmetered_network_leaves_when_there_is_one() -> None:
    world = big_world()
    world.run(100.0, stop=lambda: world.device("d0").phase is Phase.SENDING)
    sent = len(world.sent)
    allow(world, "d0", METERED)
    world.run(world.now + 5.0)
    world.cut("d0")
    world.connect("d0")
    world.run(world.now + 5.0)
    assert not [topic for _, who, topic, _ in world.sent[sent:] if who == "d0" and "/update/" in topic]
    assert accepted_by(world, "d0") == 0
    allow(world, "d0", Allowed())
    world.run(world.now + 20.0, stop=lambda: accepted_by(world, "d0") > 0)
    assert accepted_by(world, "d0") == 1
    world.finish()


@pytest.mark.parametrize("early", [True, False])
def test_a_probe_waits_for_the_link_too(early: bool) -> None:
    world = running() if early else until(Phase.PROBING)
    allow(world, "d1", METERED)
    sent = len(world.sent)
    world.run(world.now + 3.0)
    world.cut("d1")
    world.connect("d1")
    world.run(world.now + 10.0)
    assert world.device("d1").phase is Phase.PROBING
    assert not [topic for _, who, topic, _ in world.sent[sent:] if who == "d1" and "/probe" in topic]
    allow(world, "d1", Allowed())
    ended(world)


def test_a_probe_takes_an_eighth_of_what_is_left_at_most() -> None:
    world = running()
    allow(world, "d0", Allowed(bytes_left=300_000, day_end_s=1e5))
    world.run(10.0, stop=lambda: world.device("d0").phase is Phase.WAITING)
    probes = sum(len(payload) for _, who, topic, payload in world.sent if who == "d0" and topic.endswith("/probe"))
    assert 0 < probes <= 300_000 / 8 + 2 * wire.MIN_CHUNK_BYTES


# ---- heat ----------------------------------------------------------------------------------------------------------------------------


def test_training_stands_still_while_it_is_hot_and_its_update_counts() -> None:
    world = begin(LONG, TWO)
    world.run(100, stop=lambda: world.device("d1").phase is Phase.TRAINING)
    effects = world.device("d1").step(Limited(HOT), world.now)
    assert Steer("stand still") in effects
    world._perform("d1", effects)
    world.run(world.now + 0.1)
    leader = world.coordinator()
    assert leader.ledger.devices["d1"].lease is not None, "it goes on with this job"
    assert "d1" not in leader.roster.outstanding, "and is not waited for"
    assert Steer("go on") in world.device("d1").step(Limited(Allowed()), world.now)


# ---- smaller work --------------------------------------------------------------------------------------------------------------------


def test_the_density_goes_down_with_the_limit_and_up_again() -> None:
    settings = task(stop={"aggregations": 40}, restoration={"trigger": "none"})
    world = begin(settings)
    world.run(4.0)
    ledger = world.coordinator().ledger
    assert ledger.devices["d0"].density == 1.0
    allow(world, "d0", at_most(0.3))
    pass_rounds(world, 4)
    assert ledger.devices["d0"].density == 0.2, "of the ladder's rungs"
    assert {ledger.density_of(each.level) for each in assigned(world, "d0")[-2:]} == {0.2}
    assert world.notes_of("density limited") == [{"device": "d0", "density_from": 1.0, "density": 0.2}]
    again = restart_coordinator(world, settings)
    assert again.ledger.devices["d0"].density == 0.2
    before = len(assigned(world, "d0"))
    pass_rounds(world, 3)
    assert {again.ledger.density_of(each.level) for each in assigned(world, "d0")[before:]} == {0.2}
    allow(world, "d0", Allowed())
    pass_rounds(world, 3)
    assert again.ledger.devices["d0"].density == 1.0
    assert again.ledger.density_of(assigned(world, "d0")[-1].level) == 1.0
    world.finish()
    assert fingerprint(replay_with_snapshot(world.log, settings, len(world.log) // 2)) == fingerprint(again.ledger)
    check_run(world, settings)


def test_until_a_device_says_something_of_its_limits_the_last_ones_hold() -> None:
    """A gateway that has just been started hears its hello, and no telemetry yet."""
    settings = task(stop={"aggregations": 10_000}, restoration={"trigger": "none"})
    world = begin(settings)
    world.run(4.0)
    allow(world, "d0", at_most(0.3))
    pass_rounds(world, 4)
    world.kill("d0")
    again = restart_coordinator(world, settings)
    world.run(world.now + 30.0, stop=lambda: again.ledger.devices["d0"].lease is None and again.phase is module.Phase.LEADING)
    hello = wire.Hello(boot=identity("d0").boot, install=identity("d0").install, uplink_bps=4e6)
    before = len(assigned(world, "d0"))
    inject(world, topics.hello("d0"), wire.encode(hello))
    assert "d0" not in again.telemetry
    world.run(world.now + 8.0, stop=lambda: len(assigned(world, "d0")) > before)
    assert [again.ledger.density_of(each.level) for each in assigned(world, "d0")[before:]] == [0.2]


def test_telemetry_tells_of_link_and_power_where_the_runtime_measures_them() -> None:
    world = until(Phase.TRAINING)
    meters = world.device("d1").meters
    meters.link, meters.power = wire.LinkState(3e4, 5e4, 0.2), wire.PowerState(None, "unmeasured: no meter", 51.0, throttled=True)
    world.run(world.now + 5.0)
    told = world.coordinator().telemetry["d1"]
    assert (told.link, told.power) == (meters.link, meters.power)
    note = world.notes_of("telemetry")[-1]
    assert world.coordinator().telemetry["d0"].power is None
    assert {"watts", "rtt_s", "limit", "temperature_c"} <= note.keys()


def test_a_limit_below_every_level_means_rest() -> None:
    world = begin(task(stop={"aggregations": 10}))
    world.run(3.0)
    allow(world, "d4", at_most(0.001))
    world.run(world.now + 2.0)
    before = len(assigned(world, "d4"))
    world.finish()
    assert len(assigned(world, "d4")) == before
    assert world.coordinator().roster.allowed("d4") == 0.0


@pytest.mark.parametrize("method", ["prfl", "fedavg", "fjord", "subfedavg"])
def test_every_kind_of_method_keeps_to_a_limit(method: str) -> None:
    settings = task(method={"name": method}, stop={"aggregations": 12})
    world = begin(settings)
    world.run(2.0)
    allow(world, "d0", at_most(0.4))
    world.run(world.now + 1.0)
    before = len(assigned(world, "d0"))
    world.finish()
    ledger = world.coordinator().ledger
    later = [ledger.density_of(each.level) for each in assigned(world, "d0")[before + 1 :]]
    assert all(density <= 0.4 for density in later)
    check_run(world, settings)


def test_restoration_goes_on_above_a_limit_once_it_is_gone() -> None:
    settings = task(stop={"aggregations": 60}, restoration={"trigger": "plateau", "every": 1, "patience": 1, "min_delta": 0.5})
    world = begin(settings)
    world.run(3.0)
    allow(world, "d4", at_most(0.1))
    world.run(world.now + 4.0)
    assert world.coordinator().ledger.devices["d4"].density <= 0.1
    allow(world, "d4", Allowed())
    world.finish()
    assert world.coordinator().ledger.devices["d4"].density > 0.1
    check_run(world, settings)


# ---- bytes ---------------------------------------------------------------------------------------------------------------------------


class Metered:
    """What a runtime does for a device with so many bytes a day: looks at its counters every quarter of a second."""

    def __init__(self, world: Tape, name: str, bytes_per_day: int) -> None:
        self.world, self.name, self.budget = world, name, Budget(bytes_per_day=bytes_per_day)
        self.day, self.told, self.began = "2026-11-21", Allowed(), 0
        self.look()

    def used(self) -> int:
        client = self.world.clients[self.name]
        return client.sent_bytes + client.received_bytes - self.began

    def begin_day(self) -> None:
        self.began += self.used()

    def look(self) -> None:
        allowed = judge(self.budget, Seen(day_left_s=3600.0), Used(self.day, 0.0, self.used()), self.told, self.world.now)
        if allowed != self.told:
            self.told = allowed
            allow(self.world, self.name, allowed)
        self.world.at(self.world.now + 0.25, self.look)


def test_a_job_is_shrunk_to_what_the_bytes_of_the_day_hold() -> None:
    """400 kB of float16 values: the whole model is more than the day has, and is given back before any part of it came."""
    world = big_world({"d0": 4e6})
    metered = Metered(world, "d0", 600_000)
    world.run(60.0)
    assert world.notes_of("fetching", "d0")
    assert accepted_by(world, "d0") == 0, "this task has no smaller level"
    assert metered.used() < 120_000, "a probe, and no model"
    told = limits_told(world, "d0")[-1]
    assert told is not None
    assert told.said.startswith(f"{BYTES}: ")
    assert told.density is None
    assert told.seconds is not None


@pytest.mark.parametrize("per_day", [60_000, 200_000])
def test_no_day_has_more_bytes_than_it_may(per_day: int) -> None:
    settings = task(stop={"aggregations": 100_000}, fleet={"min_devices": 2, "heartbeat_s": 10.0})
    world = begin(settings, TWO)
    world.run(20.0, stop=lambda: world.device("d0").phase is Phase.WAITING)
    metered = Metered(world, "d0", per_day)
    metered.begin_day()
    rounds = []
    for _ in range(2):
        before = accepted_by(world, "d0")
        world.run(world.now + 200.0)
        assert metered.used() <= per_day
        rounds.append(accepted_by(world, "d0") - before)
        metered.begin_day()
    assert all(rounds), "each day has some work"
    densities = [world.coordinator().ledger.density_of(each.level) for each in assigned(world, "d0")]
    assert min(densities) < max(densities), "the last bytes of a day are for a small model"
    assert len(world.notes_of("gave up", "d0")) <= 9


def test_two_lives_of_one_day_have_the_bytes_of_one_day() -> None:
    settings = task(stop={"aggregations": 100_000}, fleet={"min_devices": 2, "heartbeat_s": 10.0})
    world = begin(settings, TWO)
    metered = Metered(world, "d0", 300_000)
    for boot in (1, 2, 3):
        world.run(world.now + 60.0)
        world.reboot("d0", boot, uplink_bps=4e6)
        metered.told = Allowed()
        metered_now = judge(metered.budget, Seen(day_left_s=3600.0), Used(metered.day, 0.0, metered.used()), Allowed(), world.now)
        allow(world, "d0", metered_now)
    assert metered.used() <= 300_000


# ---- any history ---------------------------------------------------------------------------------------------------------------------


class Watched(Tape):
    """Every job that begins is held against what was allowed at that moment."""

    def _perform(self, name: str, effects: Any) -> None:
        if name != COORDINATOR and any(isinstance(effect, Train) for effect in effects):
            device = self.device(name)
            limit = device._restraint.limit(self.now)
            resting = limit is not None and limit.density is None and device._restraint.allowed.cool
            assert not resting or not device._restraint.allowed.link
            share = device.share
            assert share is not None
            assert share <= device._restraint.allowed.density * (1 + 1e-9)
        super()._perform(name, effects)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_limits_come_and_go_the_run_checks_out(seed: int) -> None:
    settings = task(fleet={"min_devices": 3, "heartbeat_s": 1.0, "min_deadline_s": 8.0}, stop={"aggregations": 60})
    chance = random.Random(seed)
    world = Watched()
    tame = begin(settings, {})
    world.add(COORDINATOR, tame.coordinator())
    for name, bps in LINKS.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    kinds = [Allowed(), NIGHT_ONLY, METERED, HOT, at_most(0.05), at_most(0.25), at_most(0.9), Allowed(bytes_left=3000, day_end_s=1e5)]
    for turn in range(1, 40):
        world.run(world.now + chance.uniform(0.05, 1.0), stop=world.ended)
        if world.ended():
            break
        name = chance.choice(sorted(LINKS))
        allow(world, name, chance.choice(kinds))
        if chance.random() < 0.1:
            world.cut(name)
            world.connect(name)
        if chance.random() < 0.05:
            restart_coordinator(world, settings, nonce=100 + turn)
    for name in LINKS:
        allow(world, name, Allowed())
    world.finish(2000.0)
    check_run(world, settings)
    assert all(device.density <= device.ceiling for device in world.coordinator().ledger.devices.values())


def test_devices_that_may_do_everything_run_as_those_without_limits() -> None:
    plain, told = begin(RUN, TWO), begin(RUN, TWO)
    for name in TWO:
        allow(told, name, Allowed())
    plain.finish()
    told.finish()
    assert plain.log == told.log
    assert plain.sent == told.sent


def test_what_is_no_news_is_told_once() -> None:
    first = wire.Limit("bytes a day: 500 are left", 60.0, None)
    assert limit_note("d", None, None) is None
    assert limit_note("d", first, wire.Limit("bytes a day: 400 are left", 50.0, None)) is None
    changed = limit_note("d", first, wire.Limit("bytes a day: 400 are left", None, 0.5))
    assert changed is not None
    assert changed.fields["does"] == "trains at most 0.5 of the model"
    rests = limit_note("d", None, first)
    assert rests is not None
    assert rests.fields["does"] == "rests, 60 s more"
