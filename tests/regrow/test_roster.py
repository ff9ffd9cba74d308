"""What is kept as facts come is what looking at the whole fleet would give, after every step of runs in which everything happens."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from regrow import density, reference, wire
from regrow.budget import Allowed
from regrow.coordinator import Coordinator, Phase
from regrow.device import Device
from regrow.levels import densities_of
from regrow.machine import Effect, Event, Limited, Standing
from regrow.presence import QUIET_S
from regrow.roster import HEARTBEATS, Least, Ranked, Roster, Tally
from regrow.task import Task
from testbed.memory import COORDINATOR
from tests.regrow.fleet import PROGRAMS, identity, start_ledger, task
from tests.regrow.harness import Tape, begin, check_run, feed, restart_coordinator

LIMITS = (
    Allowed(),
    Allowed(train=False, said="hours: not now"),
    Allowed(density=0.25, said="joules"),
    Allowed(density=0.001, said="joules"),
)
FLEET = {f"d{number}": 4e6 / (1 + number % 5) for number in range(12)}


def expected(leader: Coordinator) -> dict[str, Any]:
    """Every quantity by its definition, over all devices; who is live and who is overdue are the facts that it starts from."""
    ledger, devices = leader.ledger, leader.ledger.devices
    method = ledger.task.method
    live = {who for who in devices if leader.live(who)}
    leased = {who for who, device in devices.items() if device.lease is not None}
    fit = [who for who in live if devices[who].rejections < ledger.task.fleet.max_rejections and devices[who].memory_density > 0.0]
    last = {who: telemetry.limit for who, telemetry in leader.telemetry.items()}
    assert leader.roster.limits == {who: limit for who, limit in last.items() if limit is not None}
    least = ledger.order.lengths[0] / ledger.order.size
    limited = {who for who, limit in leader.roster.limits.items() if (limit.density or 0.0) < least}
    resting = leader.roster.resting | limited
    working = [who for who in fit if who not in resting]
    first = [devices[who].first_density for who in working]
    transfers = {who: device.density / device.uplink_bps for who, device in devices.items()}
    rounds = [mean for device in devices.values() if (mean := density.mean_round_s(device.full_round_s)) is not None]
    lowest = min((device.density for device in devices.values() if not leader.roster.excluded(device)), default=1.0)
    slow = [devices[who].rounds_in_epoch for who in working if devices[who].density == lowest]
    top = len(densities_of(ledger.task)) - 1
    reports = [
        (ledger.density_of(level), device.reports[level].accuracy, device.reports[level].examples)
        for device in devices.values()
        for level in {ledger.level_of(device.density), top}
        if level in device.reports
    ]
    return {
        "idle": {who for who in working if who not in leased and who not in ledger.arrived},
        "outstanding": (leased & live) - leader.roster.overdue - resting,
        "fastest": first.count(max(first)) if first else 0,
        "leases": Counter(device.lease.version for device in devices.values() if device.lease is not None),
        "mean": float(np.mean([device.density for device in devices.values()])) if devices else None,
        "uplink": min((device.uplink_bps for device in devices.values()), default=None),
        "transfer": min(transfers.values(), default=None),
        "live transfer": min((transfers[who] for who in working), default=None),
        "rounds": min(rounds, default=None) if method.density == "relative" else None,
        "unready": bool(slow) and min(slow) < method.refresh_min_rounds,
        "scores": reference.score_levels(reports),
        "full": density.full_density_goodput_bps(sorted([3e5, *(devices[who].uplink_bps for who in working)])),
    }


def kept(leader: Coordinator) -> dict[str, Any]:
    roster = leader.roster
    mean = roster.mean_density() if leader.ledger.devices else None
    return {
        "idle": set(roster.idle),
        "outstanding": set(roster.outstanding),
        "fastest": roster.fastest_class(),
        "leases": Counter(roster.leases.counts),
        "mean": None if mean is None else pytest.approx(mean, rel=1e-12),
        "uplink": roster.uplinks.least(),
        "transfer": roster.transfers.least(),
        "live transfer": roster.live_transfers.least(),
        "rounds": roster.rounds.least(),
        "unready": min(roster.eligible.counts, default=1.0) in roster.unready.counts,
        "scores": roster.scores.means(),
        "full": roster.full_density_bps([3e5]),
    }


class Checked(Coordinator):
    """A coordinator whose roster is checked after every step."""

    steps = 0

    def step(self, event: Event, now: float) -> list[Effect]:
        effects = super().step(event, now)
        if self.phase is Phase.LEADING:
            self.steps += 1
            if self.steps % 3 == 0:
                assert kept(self) == expected(self)
            deadlines = self.roster.deadlines
            assert set(deadlines._entries) == {who for who, device in self.ledger.devices.items() if device.lease is not None}
        return effects


def troubled(settings: Task, seed: int) -> Tape:
    """Devices die, come back, are reinstalled or put to rest, the link of the coordinator breaks, and some never deliver."""
    world = begin(settings, {})
    chance = random.Random(seed)
    world.add(COORDINATOR, Checked(start_ledger(settings), "r1", PROGRAMS, 7))
    for name, bps in FLEET.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    for turn in range(1, 9):
        world.run(2.5 * turn, stop=world.ended)
        if world.ended():
            break
        who = chance.choice(sorted(FLEET))
        deed = chance.choice(["kill", "reboot", "reinstall", "cut", "offline"])
        feed(world, chance.choice(sorted(FLEET)), Limited(chance.choice(LIMITS)))
        resting = frozenset(chance.sample(sorted(FLEET), 2))
        feed(world, COORDINATOR, Standing(resting, resting ^ {who}))
        if deed == "kill":
            world.kill(who)
        elif deed == "cut":
            world.cut(who)
            world.connect(who)
        elif deed == "offline":
            world.cut(COORDINATOR)
            world.connect(COORDINATOR)
        else:
            world.reboot(who, turn, turn if deed == "reinstall" else 0)
    feed(world, COORDINATOR, Standing())
    for who in FLEET:
        feed(world, who, Limited(Allowed()))
    world.finish()
    return world


SETTINGS: dict[str, dict[str, Any]] = {
    "fastest": {"method": {"refresh_every": 4, "refresh_min_rounds": 1}, "restoration": {"every": 2, "patience": 1}},
    "arrival": {"method": {"name": "fedasync"}, "stop": {"aggregations": 150}, "wire": {"versions_on_broker": 1, "versions_held": 2}},
    "count": {"method": {"name": "fedbuff"}, "restoration": {"trigger": "plateau", "every": 2, "patience": 1}},
    "relative": {"method": {"name": "prfl", "refresh_every": 5}, "training": {"max_steps_factor": 3.0}},
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_roster_is_what_a_look_at_everybody_would_find(name: str, seed: int) -> None:
    fleet = {"min_devices": 5, "heartbeat_s": 1.0, "min_deadline_s": 4.0}
    settings = task(**{"fleet": fleet, "stop": {"aggregations": 40}, "training": {}, **SETTINGS[name]})
    world = troubled(settings, seed)
    leader = world.coordinator()
    assert isinstance(leader, Checked)
    assert leader.steps > 150
    check_run(world, settings)


def test_a_roster_from_a_replayed_log_is_the_one_before() -> None:
    settings = task(stop={"aggregations": 30})
    world = begin(settings)
    world.run(8.0)
    leader = world.coordinator()
    assert leader.roster.outstanding
    leader.roster.silence_all()  # nobody has been heard of by a new process
    again = restart_coordinator(world, settings)
    assert kept(again) == kept(leader)


def test_the_tallies_follow_any_history() -> None:
    chance = random.Random(3)
    tally, least, ranked = Tally(), Least(), Ranked()
    plain: dict[str, float] = {}
    for step in range(5000):
        who = f"d{chance.randrange(40)}"
        value = None if chance.random() < 0.3 else float(chance.randrange(25))
        for kept_values in (tally, least, ranked):
            kept_values.put(who, value)
        if value is None:
            plain.pop(who, None)
        else:
            plain[who] = value
        assert tally.counts == Counter(plain.values())
        assert len(tally) == len(plain)
        assert least.least() == min(plain.values(), default=None)
        assert ranked.ascending == sorted(plain.values())
        if step % 500 == 0:
            assert len(least._heap) <= 2 * len(plain) + 64


def test_what_is_taken_comes_in_the_order_in_which_it_was_put() -> None:
    least = Least()
    for who, value in [("c", 3.0), ("a", 9.0), ("b", 2.0), ("d", 1.0), ("e", 3.0)]:
        least.put(who, value)
    least.put("d", None)
    assert least.take(3.0) == ["c", "b", "e"]
    assert least.take(3.0) == []
    assert least.least() == 9.0


def test_a_device_at_rest_is_overdue_after_its_own_rare_heartbeats() -> None:
    ledger = start_ledger(task())
    roster, heartbeat_s = Roster(ledger), ledger.task.fleet.heartbeat_s
    for who in ("rests", "works"):
        roster.hear(who, 0.0)
    roster.limit("rests", wire.Limit("hours: not now"))
    roster.pass_time(HEARTBEATS * heartbeat_s + 1.0)
    assert not roster.live("rests")
    assert (roster.rests("rests"), roster.rests("works")) == (True, False)
    roster.pass_time(HEARTBEATS * QUIET_S - 1.0)
    assert roster.rests("rests")
    roster.pass_time(HEARTBEATS * QUIET_S + 1.0)
    assert not roster.rests("rests")
    roster.hear("rests", 4000.0)
    roster.silence_all()
    assert roster.rests("rests")
    roster.silence("rests")
    assert not roster.rests("rests")
