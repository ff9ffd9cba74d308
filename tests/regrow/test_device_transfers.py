"""The device's downloads and uploads: only what is missing travels again, and only what checks out is used."""

from __future__ import annotations

from typing import Any

import pytest

from regrow import wire
from regrow.device import OUTGOING, Device, Phase
from regrow.fetching import PART
from regrow.machine import (
    Event,
    Received,
    Save,
    Woken,
)
from testbed.memory import saved_of
from tests.regrow.device_worlds import big_world, ended, until
from tests.regrow.fleet import identity
from tests.regrow.harness import NAMES, phase_reached

# ---- only what is missing is fetched and sent ----------------------------------------------------------------------------------------


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
