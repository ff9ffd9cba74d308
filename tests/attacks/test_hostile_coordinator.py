"""Whatever arrives on a coordinator's topics, a device neither raises, nor trains on what it could not check, nor forgets how to go on."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec
import pytest

from bench.fuzz_wire import mutate
from regrow import topics, wire
from regrow.device import Phase
from regrow.machine import Effect, Received, Save, Train
from tests.regrow.harness import NAMES, Tape, check_run, leftovers
from tests.regrow.test_device import RUN, assignment, until


def corpus(world: Tape, name: str) -> list[tuple[str, bytes]]:
    """Everything that a coordinator says to this device."""
    device = world.device(name)
    version = device.assignment.version if device.assignment is not None else 0
    sequence = device.outgoing.sequence if device.outgoing is not None else 0
    receipt = wire.Receipt(term=1 << 45, install=device.identity.install, sequence=sequence, outcome="missing", missing=[wire.Range(0, 4)])
    said = [
        (NAMES.assignment(name), wire.encode(assignment(900, version=version))),
        (NAMES.receipt(name), wire.encode(receipt)),
        (topics.claim("toy"), wire.encode(wire.Claim(run="r1", term=1 << 45))),
        (topics.tasks(name), wire.encode(wire.Tasks(tasks=[wire.TaskRef(task="toy", run="r1", term=1 << 45)], heartbeat_s=3.0))),
    ]
    if NAMES.manifest(version) in world.retained:
        said.append((NAMES.manifest(version), world.retained[NAMES.manifest(version)]))
    return said + [(topic, world.retained[topic]) for topic in sorted(device._fetching.subscribed) if topic in world.retained]


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.FETCHING, Phase.TRAINING, Phase.SAVING, Phase.SENDING])
def test_mutated_messages_never_raise(phase: Phase) -> None:
    world = until(phase)
    original, said = world.device("d1"), corpus(world, "d1")
    rng = random.Random(phase.value)
    for round_number in range(20):
        device = copy.deepcopy(original)
        for index in range(60):
            topic, data = said[(index + round_number) % len(said)]
            effects = device.step(Received(topic, mutate(data, rng)), world.now + index)
            nothing_unchecked(effects)


def nothing_unchecked(effects: list[Effect]) -> None:
    for effect in effects:
        if isinstance(effect, Save) and effect.name.startswith("part-"):
            assert effect.name == "part-" + wire.digest(effect.data).hex()
        assert not isinstance(effect, Train), "it trains on a manifest that nobody made"


BAD: dict[str, dict[str, Any]] = {
    "giant lengths": {"lengths": [2**31 - 1]},
    "giant blob": {"programs": [wire.Blob("layout", 2**31 - 1, bytes(16), [bytes(16)])]},
    "int8 base": {"dtype": "int8"},
    "int4 base": {"dtype": "int4"},
    "no programs": {"programs": []},
    "level beyond": {"lengths": [1, 2, 3], "levels": [wire.Blob("0", 0, bytes(16), [])] * 3},
}


@pytest.mark.parametrize("name", BAD)
def test_a_manifest_that_lies_only_costs_patience(name: str) -> None:
    world = until(Phase.FETCHING)
    device = world.device("d1")
    assert device.assignment is not None
    topic = NAMES.manifest(device.assignment.version)
    true = wire.decode(world.retained[topic], wire.Manifest)[0]
    world.retained[topic] = wire.encode(msgspec.structs.replace(true, **BAD[name]))
    effects = device.step(Received(topic, world.retained[topic]), world.now)
    nothing_unchecked(effects)
    world.finish()
    check_run(world, RUN)
    assert leftovers(world) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"level": 2**53},
        {"evaluate_level": 2**53},
        {"version": 2**53},
        {"epoch": 2**53},
        {"steps": 10**6},
        {"deadline_s": 1e12},
        {"dtype": "float32"},
    ],
)
def test_an_assignment_that_makes_no_sense_never_stops_the_device(fields: dict[str, Any]) -> None:
    world = until(Phase.WAITING)
    device = world.device("d1")
    bad = assignment(2, term=device.term, **fields)
    world._perform("d1", device.step(Received(NAMES.assignment("d1"), wire.encode(bad)), world.now))
    world.finish()
    check_run(world, RUN)


def test_a_number_that_jumps_ahead_makes_the_device_deaf_to_none_but_older_ones() -> None:
    """A forged huge number is the coordinator's word; a new term of the true one is still followed."""
    world = until(Phase.WAITING)
    device = world.device("d1")
    for number in (5, 4, 5, 1):
        device.step(Received(NAMES.assignment("d1"), wire.encode(assignment(number))), world.now)
    assert device.assignment is not None
    assert device.assignment.number == 5
