"""Devices that send what no honest one would: it is refused with its reason, counted, and never reaches the model.

The attacker has a valid identity and whatever the broker's ACL lets a device write: below its own id. Every attack is a message to the
coordinator's `step`, which must neither raise nor grow, and the run must end as if the attacker were a device that never delivers.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.fuzz_wire import mutate
from regrow import personal, records, topics, uploads, values, wire
from regrow.local_rules import LocalRule
from regrow.machine import Received
from regrow.task import Trigger
from regrow.values import WireDtype
from testbed.memory import COORDINATOR
from tests.regrow.fleet import LAYOUT, identity, task
from tests.regrow.harness import NAMES, Tape, begin, check_run, feed, inject, leftovers, receipts

EVIL = "evil"
LINKS = {"d0": 4e6, "d1": 2e6, EVIL: 4e6}
ME = identity(EVIL)
SETTINGS = task(fleet={"min_devices": 3, "max_rejections": 3, "heartbeat_s": 1000.0, "min_deadline_s": 50.0}, stop={"aggregations": 15})


def attacked(up: WireDtype = "int8", trigger: str = "fastest", local: LocalRule = "plain") -> Tape:
    """A run in which the attacker has been assigned something; its process is gone, its voice is ours."""
    settings = msgspec.structs.replace(
        SETTINGS, wire=msgspec.structs.replace(SETTINGS.wire, up=up), trigger=msgspec.convert({"kind": trigger}, Trigger)
    )
    settings = msgspec.structs.replace(settings, method=msgspec.structs.replace(settings.method, local=local))
    world = begin(settings, LINKS)
    world.run(30, stop=lambda: world.device(EVIL).phase.value == "training")
    world.kill(EVIL)
    return world


def lease(world: Tape) -> Any:
    found = world.coordinator().ledger.devices[EVIL].lease
    assert found is not None, "the attacker has no assignment"
    return found


def good_payload(world: Tape, scale: float = 0.01) -> bytes:
    held = lease(world)
    publication = world.coordinator().ledger.published[held.version]
    length = publication.order.lengths[held.level]
    up = world.coordinator().ledger.task.wire.up
    base = publication.base(length)
    change = np.full(length, scale, np.float32)
    return values.encode(change if up in values.DELTA_DTYPES else base + change, up, publication.order.always_kept)


def head_of(world: Tape, payload: bytes, **fields: Any) -> wire.UpdateHead:
    held = lease(world)
    known: dict[str, Any] = {
        "assignment": held.number, "version": held.version, "epoch": held.epoch, "level": held.level,
        "dtype": world.coordinator().ledger.task.wire.up,
        "examples": 10, "size": len(payload), "digest": wire.digest(payload),
    }  # fmt: skip
    return wire.UpdateHead(**{**known, **fields})


def send(world: Tape, sequence: int, payload: bytes, install: bytes = ME.install, **fields: Any) -> None:
    head = head_of(world, payload, **fields)
    for index, part in enumerate(wire.pieces(payload, wire.MIN_CHUNK_BYTES)):
        count = -(-len(payload) // wire.MIN_CHUNK_BYTES)
        chunk = wire.UpdateChunk(install=install, count=count, chunk_bytes=wire.MIN_CHUNK_BYTES, head=head if index == 0 else None)
        inject(world, NAMES.update(EVIL, sequence, index), wire.encode(chunk, part))


def outcome(world: Tape, sequence: int) -> wire.Receipt:
    world.run(world.now + 0.05)
    found = [said for who, said in receipts(world) if who == EVIL and said.sequence == sequence]
    assert found, "no answer"
    return found[-1]


def untouched(world: Tape) -> None:
    """The run ends, and nothing of the attacker's is in it."""
    world.finish()
    ledger = world.coordinator().ledger
    assert ledger.version == 15
    assert EVIL not in ledger.buffer
    assert not [entry for entry in map(records.from_record, world.log) if isinstance(entry, records.Accepted) and entry.device == EVIL]
    check_run(world, ledger.task)
    assert leftovers(world) == []


def test_the_attackers_tools_work_when_it_is_honest() -> None:
    """Otherwise every attack below would be refused for the wrong reason."""
    for up in ("int8", "int4", "float16", "float32"):
        world = attacked(up)
        send(world, 0, good_payload(world))
        assert outcome(world, 0).outcome == "accepted"


def not_finite(world: Tape, number: float) -> bytes:
    held = lease(world)
    publication = world.coordinator().ledger.published[held.version]
    data = bytearray(good_payload(world))
    kept = publication.order.always_kept
    np.frombuffer(data, np.float32, kept)[3] = number  # always-kept values travel as float32 in every dtype
    return bytes(data)


@pytest.mark.parametrize("up", ["int8", "int4", "float16", "float32"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(up: WireDtype, number: float) -> None:
    world = attacked(up)
    send(world, 0, not_finite(world, number))
    said = outcome(world, 0)
    assert (said.outcome, said.blame) == ("rejected", True)
    assert "not finite" in said.reason
    assert world.coordinator().ledger.devices[EVIL].rejections == 1
    untouched(world)


@pytest.mark.parametrize("up", ["int8", "int4", "float16", "float32"])
def test_an_update_a_hundred_times_too_large(up: WireDtype) -> None:
    world = attacked(up)
    honest = [norm for norms in world.coordinator().ledger.norms.values() for norm in norms]
    world.run(world.now + 3)
    honest = [norm for norms in world.coordinator().ledger.norms.values() for norm in norms]
    length = world.coordinator().ledger.published[lease(world).version].order.lengths[lease(world).level]
    send(world, 0, good_payload(world, scale=100 * max(honest) / length**0.5))
    said = outcome(world, 0)
    assert (said.outcome, said.blame) == ("rejected", True)
    assert "norm" in said.reason
    untouched(world)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"size": 12}, "missing"),
    ({"level": 0}, "not what was assigned"),
    ({"level": 2**53}, "not what was assigned"),
    ({"version": 2**53}, "not what was assigned"),
    ({"epoch": 1}, "not what was assigned"),
    ({"assignment": 2**53}, "never given"),
    ({"dtype": "float32"}, "takes int8"),
    ({"dtype": "int4"}, "takes int8"),
]


@pytest.mark.parametrize(("fields", "why"), WRONG)
def test_a_head_that_is_not_what_was_assigned(fields: dict[str, Any], why: str) -> None:
    world = attacked()
    send(world, 0, good_payload(world), **fields)
    said = outcome(world, 0)
    if why == "missing":
        assert said.outcome == "missing", "it is asked for again: its bytes are not what its head promised"
    else:
        assert (said.outcome, said.blame) == ("rejected", True)
        assert why in said.reason
        assert world.coordinator().ledger.devices[EVIL].rejections == 1
    untouched(world)


MASKS: dict[str, tuple[bytes, str]] = {
    "no mask": (b"", "is left out"),
    "a mask of nothing": (bytes(personal.bitmap_bytes(LAYOUT.size)), "is left out"),
    "a mask of one position too few": (
        personal.bitmap(np.arange(LAYOUT.size) != LAYOUT.size - 1),
        "keeps 1519 positions, its level has 1520",
    ),
    "a mask one byte too long": (personal.bitmap(np.ones(LAYOUT.size + 8, np.bool_)), "bytes, 1520 values"),
}


@pytest.mark.parametrize("up", ["int8", "float16", "float32"])
def test_personal_masks_that_no_device_has(up: WireDtype) -> None:
    world = attacked(up, local="personal_masks")
    assert LAYOUT.size % 8 == 0, "the padding is tried in tests/regrow/test_personal.py"
    for sequence, (mask, why) in enumerate(MASKS.values()):
        payload = mask + good_payload(world)
        send(world, sequence, payload)
        said = outcome(world, sequence)
        assert (said.outcome, said.blame) == ("rejected", True)
        assert why in said.reason
        world.coordinator().ledger.devices[EVIL].rejections = 0  # so that it gets work again, for the next attack
        world.run(world.now + 1.0)
    world.finish()
    assert EVIL not in world.coordinator().ledger.buffer
    assert np.isfinite(world.coordinator().ledger.flat_weights).all()


def test_an_honest_personal_mask_is_accepted() -> None:
    """Otherwise the masks above would be refused for the wrong reason."""
    world = attacked(local="personal_masks")
    send(world, 0, personal.bitmap(np.ones(LAYOUT.size, np.bool_)) + good_payload(world))
    assert outcome(world, 0).outcome == "accepted"


def test_an_older_assignment_with_a_version_that_never_was() -> None:
    world = attacked()
    world.coordinator().ledger.devices[EVIL].number += 5
    send(world, 0, good_payload(world), assignment=1, version=10**9)
    assert outcome(world, 0).blame is True


def test_a_payload_of_the_wrong_size() -> None:
    world = attacked()
    send(world, 0, good_payload(world) + b"\0")
    assert "bytes, level" in outcome(world, 0).reason
    untouched(world)


def test_a_dtype_that_does_not_exist_is_no_message() -> None:
    world = attacked()
    before = len(world.notes_of("refused"))
    send(world, 0, good_payload(world), dtype="float64")
    assert len(world.notes_of("refused")) > before
    untouched(world)


def test_a_replayed_sequence_gets_the_old_answer_and_counts_once() -> None:
    world = attacked()
    payload = good_payload(world)
    head = head_of(world, payload)
    send(world, 0, payload)
    assert outcome(world, 0).outcome == "accepted"
    world.run(world.now + 2)
    counted = world.coordinator().ledger.devices[EVIL].updates
    for _ in range(5):
        chunk = wire.UpdateChunk(
            install=ME.install, count=1, chunk_bytes=wire.MIN_CHUNK_BYTES,
            head=head,
        )  # fmt: skip
        inject(world, NAMES.update(EVIL, 0, 0), wire.encode(chunk, payload))
    assert outcome(world, 0).outcome == "accepted"
    assert world.coordinator().ledger.devices[EVIL].updates == counted
    world.finish()
    check_run(world, SETTINGS)


def test_another_installations_nonce_is_not_heard() -> None:
    world = attacked()
    before = len(world.log)
    send(world, 0, good_payload(world), install=bytes(16))
    inject(
        world,
        NAMES.telemetry(EVIL),
        wire.encode(wire.Telemetry(install=bytes(16), phase="diverged", assignment=lease(world).number, failed="x")),
    )
    assert len(world.log) == before
    assert world.coordinator().assemblies == {}
    untouched(world)


def test_a_device_that_never_joined_is_not_heard() -> None:
    world = attacked()
    payload = good_payload(world)
    chunk = wire.UpdateChunk(install=bytes(16), count=1, chunk_bytes=wire.MIN_CHUNK_BYTES, head=head_of(world, payload))
    before = len(world.log)
    inject(world, NAMES.update("stranger", 0, 0), wire.encode(chunk, payload))
    inject(world, NAMES.telemetry("stranger"), wire.encode(wire.Telemetry(install=bytes(16), phase="sending", pending=wire.Pending(0, 9))))
    assert len(world.log) == before
    assert "stranger" not in world.coordinator().assemblies
    untouched(world)


def test_too_many_rejections_exclude_until_the_next_boot() -> None:
    world = attacked()
    leader = world.coordinator()
    for sequence in range(3):
        send(world, sequence, not_finite(world, float("nan")))
        world.run(world.now + 3.0)
        assert leader.ledger.devices[EVIL].rejections == sequence + 1
    assert leader.ledger.devices[EVIL].lease is None
    hello = wire.Hello(boot=ME.boot, install=ME.install, uplink_bps=1e6)
    inject(world, topics.hello(EVIL), wire.encode(hello))
    world.run(world.now + 1.0)
    assert leader.ledger.devices[EVIL].lease is None, "the same boot stays excluded"
    again = wire.Hello(boot=identity(EVIL, 1).boot, install=ME.install, uplink_bps=1e6)
    inject(world, topics.hello(EVIL), wire.encode(again))
    world.run(world.now + 1.0)
    assert leader.ledger.devices[EVIL].rejections == 0
    assert leader.ledger.devices[EVIL].lease is not None
    untouched(world)


@pytest.mark.parametrize(
    ("count", "chunk_bytes"), [(wire.MAX_CHUNKS, wire.MAX_CHUNK_BYTES), (wire.MAX_CHUNKS, wire.MIN_CHUNK_BYTES), (3, wire.MAX_CHUNK_BYTES)]
)
def test_a_giant_update_is_refused_at_its_first_chunk(count: int, chunk_bytes: int) -> None:
    world = attacked()
    chunk = wire.UpdateChunk(install=ME.install, count=count, chunk_bytes=chunk_bytes)
    inject(world, NAMES.update(EVIL, 0, 1), wire.encode(chunk, bytes(chunk_bytes)))
    assert world.coordinator().assemblies == {}
    assert "this run's updates" in world.notes_of("refused")[-1]["reason"]
    untouched(world)


def test_half_sent_updates_do_not_pile_up() -> None:
    world = attacked()
    leader = world.coordinator()
    chunk = wire.UpdateChunk(install=ME.install, count=1, chunk_bytes=wire.MIN_CHUNK_BYTES)
    quota = uploads.quota_bytes(leader.ledger)
    for sequence in range(500):
        for index in (0, 1, 2, 65_535, 10**15):
            inject(world, NAMES.update(EVIL, sequence, index), wire.encode(chunk, bytes(1000)))
        held = sum(len(part) for assembly in leader.assemblies.values() for part in assembly.chunks.values())
        assert held <= quota + wire.MAX_CHUNK_BYTES
    assert len(leader.assemblies) <= len(leader.ledger.devices)


@pytest.mark.parametrize("number", [5e-324, 1e-300, 1.0, 1e12])
def test_numbers_at_the_edge_of_their_range_stay_numbers(number: float) -> None:
    """Whatever link, step time or duration a device claims, what is recorded and promised is finite, and the log replays."""
    world = attacked()
    hello = wire.Hello(boot=identity(EVIL, 1).boot, install=identity(EVIL, 0, 1).install, uplink_bps=number, step_s=number, examples=2**53)
    inject(world, topics.hello(EVIL), wire.encode(hello))
    install = identity(EVIL, 0, 1).install
    inject(world, NAMES.telemetry(EVIL), wire.encode(wire.Telemetry(install=install, phase="training", uplink_bps=number, step_s=number)))
    world.run(world.now + 3)
    send(world, 0, good_payload(world), install=install, seconds=number, loss=1.7e308, examples=2**53)
    assert outcome(world, 0).outcome == "accepted"
    world.finish()
    check_run(world, SETTINGS)
    assert b'null,"uplink' not in b"".join(record.header for record in world.log)


def test_a_newcomer_with_an_impossible_link_does_not_break_the_fleet() -> None:
    """With a trigger that waits, the slowest claim holds the others for a day at most; here nobody waits."""
    world = attacked(trigger="arrival")
    for name, number in (("tiny", 5e-324), ("huge", 1e12)):
        inject(world, topics.hello(name), wire.encode(wire.Hello(boot=bytes(16), install=bytes(16), uplink_bps=number)))
    world.run(world.now + 2)
    for _, who, topic, payload in world.sent:
        if who == COORDINATOR and topic.endswith("/assignment") and payload:
            assert wire.decode(payload, wire.Assignment)[0].deadline_s <= 86_400
    world.finish()
    check_run(world, SETTINGS)
    assert leftovers(world) == []


def test_mutated_messages_to_a_leading_coordinator() -> None:
    """10 000 mutations of everything that a device may say: no exception, no growth, and the run ends as it should."""
    world = attacked()
    leader = world.coordinator()
    payload = good_payload(world)
    chunk = wire.UpdateChunk(install=ME.install, count=1, chunk_bytes=wire.MIN_CHUNK_BYTES, head=head_of(world, payload))
    corpus = [
        (topics.hello(EVIL), wire.encode(wire.Hello(boot=ME.boot, install=ME.install, uplink_bps=1e6, step_s=0.1))),
        (topics.status(EVIL), wire.encode(wire.Status())),
        (
            NAMES.telemetry(EVIL),
            wire.encode(wire.Telemetry(install=ME.install, phase="sending", assignment=1, uplink_bps=1e6, pending=wire.Pending(3, 2))),
        ),
        (NAMES.update(EVIL, 1, 0), wire.encode(chunk, payload)),
    ]
    rng = random.Random(7)
    for index in range(10_000):
        topic, data = corpus[index % len(corpus)]
        if "/update/" in topic:
            topic = NAMES.update(EVIL, 1 + index, rng.choice((0, 0, 0, 1, 2**40)))
        feed(world, COORDINATOR, Received(topic, mutate(data, rng)))
    assert set(leader.ledger.devices) == set(LINKS)
    world.finish()
    check_run(world, SETTINGS)
    assert np.isfinite(leader.ledger.flat_weights).all()
    assert leader.ledger.flat_weights.size == LAYOUT.size
