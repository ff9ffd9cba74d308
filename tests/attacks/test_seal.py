"""Signed work against a broker in the attacker's hands: what nobody with a key has said, now and here, has no effect. Each with a control.

The attacker has every right that a broker can give, reads everything, alters what is on its way and hands anything to anybody, but has
no key. The table of these attempts is in docs/fleet.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

pytest.importorskip("cryptography")
pytest.importorskip("amqtt")

from broker_server.audit import audit
from broker_server.fleet import members
from broker_server.fleet.authority import verify
from edge_agent.identity import Identity
from edge_agent.model_folder import ModelFolder
from regrow import seal, topics, wire
from regrow.coordinator import Phase
from regrow.guards import RECENT
from regrow.machine import Received
from regrow.publication import blob
from tests.attacks.sealed_fleet import NAMES, RUN, TASK, Device, SealedFleet, enrolled
from tests.edge_agent.promotion_rig import linear
from tests.testbed.processes import until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=["amqtt", pytest.param("mosquitto", marks=pytest.mark.network)])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SealedFleet]:
    with SealedFleet(tmp_path_factory.mktemp("sealed"), request.param) as fleet:
        until(lambda: min(fleet.accepted("one"), fleet.accepted("two")) >= 1, lambda: f"two updates of each; {fleet.notes[-5:]}")
        yield fleet


def moves_on(fleet: SealedFleet) -> None:
    """The control of every attack: work goes on, so what was refused was not refused because nothing came through any more."""
    before = {who: fleet.accepted(who) for who in ("one", "two")}
    until(lambda: all(fleet.accepted(who) > before[who] for who in before), lambda: f"new updates; {fleet.notes[-5:]}")


def sealed(fleet: SealedFleet, topic: str, message: wire.Message, *, lasts_s: int = 600) -> bytes:
    """What the coordinator itself would say now; lasts_s < 0: it has expired."""
    now_ms, authority = fleet.sealing.time.at_ms(time.monotonic()), fleet.authority
    expires_s = now_ms // 1000 + lasts_s
    return seal.seal(topic, wire.encode(message), stamp=now_ms, expires_s=expires_s, key=authority.signing_key, sign=authority.sign)


def told(owner: Identity, topic: str, message: wire.Message) -> bytes:
    """What the owner of this identity can say, with a stamp above all others."""
    return seal.seal(topic, wire.encode(message), stamp=1 << 60, expires_s=0, key=owner.signing_key, sign=owner.sign)


def test_two_agents_and_a_gateway_finish_rounds_and_everything_that_is_said_is_sealed(fleet: SealedFleet) -> None:
    moves_on(fleet)
    said = [(topic, data) for topic, data in fleet.mallory.seen if data and topics.is_sealed(topic)]
    assert {topic.split("/")[-1] for topic, _ in said} >= {"hello", "tasks", "claim", "assignment", "telemetry", "receipt", "0"}
    for topic, data in said:
        who = topics.device_of(topic)
        keys = [fleet.authority.signing_key, *([fleet.owners[who].signing_key] if who is not None else [])]
        assert seal.open_seal(topic, data, keys, verify).frame[:2] == b"RG"
    assert not any(topic.endswith("/status") for topic, _ in fleet.mallory.seen)
    assert not [note for note in fleet.notes if note.kind == "seal refused"]
    for device in fleet.devices.values():
        assert not [note for note in device.notes if note.kind == "seal refused"]


# ---- what a device is told -----------------------------------------------------------------------------------------------------------


def led_away(run: str) -> wire.Tasks:
    return wire.Tasks(tasks=[wire.TaskRef(task=TASK, run=run, term=1)])


def works_for(device: Device) -> str:
    names = device.agent.device.names
    return "" if names is None else names.run


def attempt(device: Device, kind: str, act: Callable[[], None]) -> None:
    """Do it, wait until it was refused for this reason, and see that the device still works for its coordinator."""
    before = device.refused(kind)
    act()
    until(lambda: device.refused(kind) > before, f"refused as {kind!r}")
    assert works_for(device) == RUN


@pytest.mark.parametrize("name", ["one", "two"])
def test_unsigned_altered_older_expired_and_moved_work_is_refused(fleet: SealedFleet, name: str) -> None:
    device, mallory, topic = fleet.devices[name], fleet.mallory, topics.tasks(name)
    other = topics.tasks({"one": "two", "two": "one"}[name])
    genuine, (_, old) = sealed(fleet, topic, led_away("evil")), mallory.last(topic)
    attempts = {
        "unsealed": wire.encode(led_away("evil")),
        "altered": genuine[:-1] + bytes([genuine[-1] ^ 1]),
        "expired": sealed(fleet, topic, led_away("evil"), lasts_s=-1),
        "unknown key": told(fleet.owners[name], topic, led_away("evil")),
    }
    for kind, payload in attempts.items():
        attempt(device, kind, lambda payload=payload: mallory.say(topic, payload))  # type: ignore[misc]
    attempt(device, "altered", lambda: mallory.hand(name, topic, sealed(fleet, other, led_away("evil"))))
    if fleet.kind == "amqtt":  # whose hands give what nobody asked for
        attempt(device, "another device's", lambda: mallory.hand(name, other, sealed(fleet, other, led_away("evil"))))
    later = sealed(fleet, topic, led_away(RUN))
    mallory.hand(name, topic, later)
    attempt(device, "older", lambda: mallory.hand(name, topic, old))

    def taken() -> bool:
        """The control: what the coordinator seals now is taken (and soon after replaced by what it says itself)."""
        mallory.hand(name, topic, sealed(fleet, topic, msgspec.structs.replace(led_away(RUN), heartbeat_s=0.25)))
        return device.agent.device._presence.heartbeat_s == 0.25

    until(taken, "the genuine message is heard")
    moves_on(fleet)


def test_an_older_state_of_the_broker_is_refused_after_a_restart_of_the_device(fleet: SealedFleet) -> None:
    """What was said a while ago, to a device that has just started."""
    mallory, name = fleet.mallory, "one"
    old = [mallory.last(topics.tasks(name)), mallory.last(NAMES.assignment(name)), mallory.last(topics.claim(TASK))]
    until(lambda: mallory.last(topics.claim(TASK)) != old[2], "another beat")
    mallory.hand(name, topics.tasks(name), sealed(fleet, topics.tasks(name), led_away(RUN)))
    moves_on(fleet)
    device = fleet.restart_device(name)
    for topic, data in old:
        before = device.refused("older")

        def refused(topic: str = topic, data: bytes = data, before: int = before) -> bool:
            mallory.hand(name, topic, data)  # again and again: the device may not be connected yet
            return device.refused("older") > before

        until(refused, f"{topic} is refused")
    moves_on(fleet)


def test_an_older_manifest_in_the_place_of_a_new_one_is_refused(fleet: SealedFleet) -> None:
    _, old = fleet.mallory.last(lambda topic: "/manifest/" in topic)
    before = {name: device.refused("altered") for name, device in fleet.devices.items()}
    with fleet.mallory.spoiling("/manifest/", lambda _topic, _data: old):
        until(lambda: any(device.refused("altered") > before[name] for name, device in fleet.devices.items()), "a device refuses it")
    for name in fleet.devices:  # what it has asked for does not come again: a restart asks anew
        fleet.restart_device(name)
    moves_on(fleet)


def test_an_altered_chunk_is_never_trained_on(fleet: SealedFleet) -> None:
    before = {name: len(device.notes) for name, device in fleet.devices.items()}

    def refused() -> bool:
        return any(note.kind == "refused" for name, device in fleet.devices.items() for note in device.notes[before[name] :])

    with fleet.mallory.spoiling("/chunk/", lambda _topic, data: data[:-1] + bytes([data[-1] ^ 1])):
        until(refused, "a device refuses an altered chunk")
    for name in fleet.devices:
        fleet.restart_device(name)
    moves_on(fleet)
    assert audit(fleet.run).worst <= 1.0, "the model is the one that honest updates give"


def test_a_promotion_that_nobody_signed_off_is_not_placed(fleet: SealedFleet) -> None:
    model, topic, device = linear(), topics.promotion(TASK), fleet.devices["one"]
    announced = wire.Promotion(number=9, run=RUN, model=blob("model", model))
    assert announced.model is not None
    fleet.mallory.say(topics.promoted_file(TASK, announced.model.digest, 0), model, retain=True)
    attempt(device, "unsealed", lambda: fleet.mallory.say(topic, wire.encode(announced)))
    assert ModelFolder(fleet.folder / "one.state", TASK).current() is None
    fleet.promotions.sign_off(model, run=RUN, version=1, who="ada", file="m.onnx")
    until(lambda: ModelFolder(fleet.folder / "one.state", TASK).current(), "the control: the same model, signed off, is placed")
    until(lambda: {"one", "two"} <= fleet.promotions.reports().keys(), "and both devices say so")


# ---- what the gateway is told --------------------------------------------------------------------------------------------------------


def refuse(fleet: SealedFleet, kind: str, act: Callable[[], None]) -> None:
    before, again_s = fleet.refused(kind), 0.0

    def refused() -> bool:
        nonlocal again_s
        if time.monotonic() > again_s:  # it may have come before the gateway had subscribed
            again_s = time.monotonic() + 2.0
            act()
        return fleet.refused(kind) > before

    until(refused, f"the gateway refuses it as {kind!r}")


def updates_of(fleet: SealedFleet, name: str) -> tuple[str, bytes]:
    return fleet.mallory.last(lambda topic: topic.startswith(f"{NAMES.root}/device/{name}/update/"))


def test_updates_that_are_replayed_or_moved_count_nowhere(fleet: SealedFleet) -> None:
    topic, data = updates_of(fleet, "one")
    until(lambda: fleet.accepted("one") >= int(topic.split("/")[-2]), "it has counted once")
    say, repeated = fleet.mallory.say, fleet.sealing._devices.refusals.repeated
    say(topic, data)  # at once, it may be the broker's: QoS 1 delivers again
    until(lambda: fleet.sealing._devices.refusals.repeated > repeated, "refused quietly")
    moves_on(fleet)
    words = (f"{NAMES.root}/device/one/update/", NAMES.telemetry("one"))
    until(lambda: sum(each.startswith(words) for each, _ in fleet.mallory.seen) > 2 * RECENT, "enough was said since")
    first, old = next((each, held) for each, held in fleet.mallory.seen if each.startswith(words))
    refuse(fleet, "older", lambda: say(first, old))
    refuse(fleet, "unknown key", lambda: say(topic.replace("/device/one/", "/device/two/"), data))
    sequence = fleet.accepted("one") + 50
    refuse(fleet, "altered", lambda: say(NAMES.update("one", sequence, 0), data))
    refuse(fleet, "altered", lambda: say(topic, data[:-1] + bytes([data[-1] ^ 1])))
    refuse(fleet, "unsealed", lambda: say(NAMES.update("one", sequence, 0), data[seal.SEAL_BYTES :]))
    assert fleet.accepted("one") < sequence
    for elsewhere in (topics.Run(TASK, "another"), topics.Run("another", RUN)):  # another run or task of the same fleet
        moved = topic.replace(NAMES.root, elsewhere.root)
        before = fleet.sealing._devices.refusals.times("altered")
        assert fleet.sealing._devices.open(Received(moved, data), time.monotonic()) is None
        assert fleet.sealing._devices.refusals.times("altered") > before
    moves_on(fleet)


def test_an_update_of_another_version_is_refused_whoever_sealed_it(fleet: SealedFleet) -> None:
    """With the device's own key, so this is what the coordinator itself checks; one bit of the version, without the key, is `altered`."""
    _, data = updates_of(fleet, "one")
    chunk, values = wire.decode(data[seal.SEAL_BYTES :], wire.UpdateChunk)
    assert chunk.head is not None
    sequence = fleet.accepted("one") + 1
    head = msgspec.structs.replace(chunk.head, version=chunk.head.version + 1000)
    frame = wire.encode(msgspec.structs.replace(chunk, head=head), values)
    refuse(fleet, "altered", lambda: fleet.mallory.say(NAMES.update("one", sequence, 0), data[: seal.SEAL_BYTES] + frame))
    moves_on(fleet)


def test_nobody_speaks_for_a_device_that_is_not_theirs_and_strangers_not_at_all(fleet: SealedFleet) -> None:
    install = fleet.gateway.coordinator.ledger.devices["one"].install
    hello = wire.Hello(boot=bytes(16), install=bytes(16), uplink_bps=1e6)
    say, topic = fleet.mallory.say, topics.hello("one")
    refuse(fleet, "unsealed", lambda: say(topic, wire.encode(hello)))
    refuse(fleet, "unknown key", lambda: say(topic, told(fleet.owners["two"], topic, hello)))
    refuse(fleet, "unknown key", lambda: say(topic, sealed(fleet, topic, hello)))
    refuse(fleet, "not in the fleet", lambda: say(topics.hello("mallory"), wire.encode(hello)))
    fleet.mallory.say(topics.status("one"), wire.encode(wire.Status(online=False)))
    refuse(fleet, "unsealed", lambda: say(topics.claim(TASK), wire.encode(wire.Claim(run="evil", term=1 << 50))))
    assert fleet.gateway.coordinator.ledger.devices["one"].install == install
    assert fleet.gateway.coordinator.live("one"), "a last will is a hint that a fleet with keys does not take"
    assert set(fleet.gateway.coordinator.ledger.devices) == {"one", "two"}
    moves_on(fleet)
    words = ("a stranger", "not in the fleet")
    until(lambda: any((note.fields.get("peer"), note.fields.get("kind")) == words for note in list(fleet.notes)), "it is told")


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_replays_are_refused_after_a_restart_of_the_gateway(fleet: SealedFleet, killed: bool) -> None:
    """All that was said before, said once more, while the devices are away; one that was killed could not save what it heard last."""
    moves_on(fleet)
    for device in fleet.devices.values():
        device.close()
    replayed = {topic: data for topic, data in fleet.mallory.seen[-300:] if data and topic.startswith(f"{NAMES.root}/device/one/update/")}
    replayed |= {topic: fleet.mallory.last(topic)[1] for topic in (topics.hello("one"), NAMES.telemetry("one"))}
    fleet.stop_gateway(killed=killed)
    counted = fleet.accepted("one")
    fleet.start_gateway()
    until(lambda: fleet.gateway.coordinator.phase is Phase.LEADING, "the gateway leads again")
    assert replayed
    for topic, data in replayed.items():
        refuse(fleet, "older", lambda topic=topic, data=data: fleet.mallory.say(topic, data))  # type: ignore[misc]
    assert fleet.accepted("one") == counted
    assert not fleet.gateway.coordinator.live("one")
    fleet.devices = {name: fleet.device(name) for name in fleet.devices}
    moves_on(fleet)
    assert audit(fleet.run).worst <= 1.0


def test_a_flood_is_told_rarely_and_work_goes_on(fleet: SealedFleet) -> None:
    told_before = len([note for note in fleet.notes if note.kind == "seal refused" and note.fields["kind"] == "unsealed"])
    before = fleet.refused("unsealed")
    for _ in range(500):
        fleet.mallory.say(NAMES.telemetry("two"), b"RG\x01\x09")
    until(lambda: fleet.refused("unsealed") >= before + 500, "all of them refused")
    moves_on(fleet)
    told_of = [note for note in fleet.notes if note.kind == "seal refused" and note.fields["kind"] == "unsealed"]
    assert len(told_of) <= told_before + 1


def test_a_device_that_is_put_out_is_not_heard_any_more_and_comes_back_with_other_keys(fleet: SealedFleet) -> None:
    topic, hello = topics.hello("two"), wire.Hello(boot=bytes(16), install=bytes(16), uplink_bps=1e6)
    members.revoke(fleet.registry, "two")
    refuse(fleet, "not in the fleet", lambda: fleet.mallory.say(topic, told(fleet.owners["two"], topic, hello)))
    fleet.devices["two"].close()
    old, fleet.owners["two"] = fleet.owners["two"], enrolled(fleet.registry, "two", fleet.folder / "two.new")
    refuse(fleet, "unknown key", lambda: fleet.mallory.say(topic, told(old, topic, hello)))
    fleet.devices["two"] = fleet.device("two")
    moves_on(fleet)


def test_at_the_end_the_model_is_what_the_accepted_updates_give(fleet: SealedFleet) -> None:
    fleet.stop_gateway()
    outcome = audit(fleet.run)
    assert outcome.updates > 10
    assert outcome.worst <= 1.0
