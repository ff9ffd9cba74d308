"""The coordinator changes its signing key: who may announce another one, and what becomes of a device that did not hear of it.

A fleet without a broker: what the gateway says is kept as a broker keeps it, and handed to the device by the test. Each attack has a
control: the same thing, said by whom it must be said by, is taken.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("amqtt")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker_server.durable import write_private
from broker_server.fleet import coordinator_key, members
from broker_server.fleet.authority import SIGNING_KEY, Authority
from broker_server.fleet.registry import Registry
from broker_server.fleet.sealing import sealing_of
from broker_server.fleet.steward import Steward
from edge_agent import identity
from edge_agent.control import Control
from edge_agent.identity import Identity
from edge_agent.sealing import Sealing
from regrow import seal, topics, wire
from regrow.errors import LocalError
from regrow.machine import Connected, Effect, Publish, Received
from tests.attacks.sealed_fleet import enrolled

TOPIC = topics.coordinator_keys("one")


class Device:
    """What hears the fleet on a device: its seals and its control."""

    busy = cleared = False

    def __init__(self, owner: Identity) -> None:
        self.owner = owner
        self.sealing = Sealing(owner, identity.verify, 0.0, since_ms=1000 * owner.about.since_s)
        self.control = Control(owner, self, lambda: float(owner.about.since_s))

    def clear(self) -> None: ...

    def change(self, identity: Identity) -> None: ...

    def hear(self, event: Connected | Received, now: float) -> list[Effect]:
        heard = self.sealing.open(event, now)
        return [] if heard is None else self.control.step(heard, now)

    def refused(self, kind: str) -> int:
        return self.sealing._guard.refusals.times(kind)


class World:
    """A gateway, what the broker keeps, and the devices that are on."""

    def __init__(self, folder: Path) -> None:
        members.init(folder / "fleet", "meadow", ["127.0.0.1"])
        self.registry, self.authority = Registry(folder / "fleet"), Authority(folder / "fleet")
        self.sealing = sealing_of(self.registry, self.authority, "serve")
        self.steward = Steward(self.registry, self.authority)
        self.owners = {name: enrolled(self.registry, name, folder / name) for name in ("one", "two")}
        self.kept: dict[str, bytes] = {}
        self.devices: dict[str, Device] = {}
        self.now = 0.0
        self._publish(self.steward.step(Connected(), self.now))
        for name in self.owners:
            self.switch_on(name)

    def switch_on(self, name: str) -> Device:
        device = self.devices[name] = Device(Identity.load(self.owners[name].folder))
        self._answer(name, device.hear(Connected(), self.now))
        for topic, payload in list(self.kept.items()):
            self._hand(topic, payload, only=name)
        return device

    def switch_off(self, name: str) -> None:
        self.devices.pop(name).sealing.close(self.now)

    def tick(self, seconds: float = 2.0) -> None:
        """Time passes on the gateway: it says what is due, and ends a change that is over."""
        self.now += seconds
        coordinator_key.finish_if_due(self.registry)
        self._publish(self.steward.step(None, self.now))
        self._publish(self.sealing.tend(self.now))

    def say(self, topic: str, message: wire.Message) -> None:
        self._publish([Publish(topic, wire.encode(message), retain=True)])

    def _publish(self, effects: object) -> None:
        for effect in effects:  # type: ignore[attr-defined]
            if isinstance(effect, Publish):
                sealed = self.sealing.seal(effect, self.now)
                self.kept[effect.topic] = bytes(sealed.payload)
                self._hand(effect.topic, bytes(sealed.payload))

    def _hand(self, topic: str, payload: bytes, only: str = "") -> None:
        for name, device in self.devices.items():
            if topics.device_of(topic) == name and (only or name) == name:
                self._answer(name, device.hear(Received(topic, payload), self.now))

    def _answer(self, name: str, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                heard = self.sealing.open(
                    Received(effect.topic, bytes(self.devices[name].sealing.seal(effect, self.now).payload)), self.now
                )
                if heard is not None:
                    self._publish(self.steward.step(heard, self.now))

    def heeds(self, name: str) -> bool:
        """The control: work that the coordinator seals now is heard by this device."""
        topic = topics.tasks(name)
        sealed = self.sealing.seal(Publish(topic, wire.encode(wire.Tasks()), retain=True), self.now)
        return self.devices[name].sealing.open(Received(topic, bytes(sealed.payload)), self.now) is not None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def announcement(number: int, *keys: bytes) -> wire.CoordinatorKeys:
    return wire.CoordinatorKeys(number=number, keys=list(keys))


def sealed_by(key: Ed25519PrivateKey, message: wire.Message, *, topic: str = TOPIC, at_ms: int | None = None) -> bytes:
    at_ms = int(1000 * time.time()) + 60_000 if at_ms is None else at_ms
    public = key.public_key().public_bytes_raw()
    return seal.seal(topic, wire.encode(message), stamp=at_ms, expires_s=0, key=public, sign=key.sign)


def private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


def test_all_who_are_there_follow_and_the_old_key_goes_as_soon_as_they_do(world: World) -> None:
    old = world.authority.signing_key
    world.switch_off("two")
    coordinator_key.begin(world.registry)
    world.tick()
    following = world.authority.next_key()
    one = world.devices["one"]
    assert one.owner.coordinator_keys == (old, following)
    assert Identity.load(one.owner.folder).coordinator_keys == (old, following), "durable"
    assert world.authority.signing_key == old, "it waits for the device that is off"
    assert coordinator_key.awaited(world.registry.fleet(), world.registry.devices()) == ["two"]
    assert world.heeds("one")
    world.switch_on("two")
    world.tick()
    world.tick()
    assert world.authority.signing_key == following
    assert [device.owner.coordinator_keys for device in world.devices.values()] == [(following,)] * 2
    assert world.heeds("one")
    assert world.heeds("two")
    assert world.registry.fleet().key_change_until_s is None
    assert coordinator_key.missed(world.registry.fleet(), world.registry.devices()) == []


def test_what_is_live_is_sealed_by_the_new_key_at_once(world: World) -> None:
    world.say(topics.tasks("one"), wire.Tasks())
    coordinator_key.begin(world.registry)
    world.tick()
    world.tick()
    world.tick()
    world.switch_off("one")
    again = world.switch_on("one")
    assert again.refused(seal.UNKNOWN_KEY) == 0, "everything that the broker keeps is sealed by the key that counts"
    (opened,) = [
        seal.open_seal(topic, data, [world.authority.signing_key], identity.verify)
        for topic, data in world.kept.items()
        if "tasks" in topic
    ]
    assert opened.frame == wire.encode(wire.Tasks())


def test_a_device_that_was_off_hears_of_it_within_the_overlap(world: World) -> None:
    world.switch_off("two")
    coordinator_key.begin(world.registry)
    for _ in range(5):
        world.tick(3600.0)
    two = world.switch_on("two")
    assert two.owner.coordinator_keys == (world.authority.signing_key, world.authority.next_key())


def test_a_device_that_missed_it_says_what_to_do_and_so_does_the_fleet(world: World) -> None:
    world.switch_off("two")
    coordinator_key.begin(world.registry)
    world.tick()
    assert coordinator_key.finish(world.registry) == ["two"]
    world.tick()
    two = world.switch_on("two")
    assert not world.heeds("two")
    assert world.heeds("one")
    (note,) = [note for note in two.sealing.tend(world.now) if note.fields["kind"] == seal.UNKNOWN_KEY]
    assert "`regrow fleet revoke two` and `regrow fleet add two` on the gateway" in note.fields["cure"]
    assert f"`regrow join two.claim.json --identity {two.owner.folder}`" in note.fields["cure"]
    assert coordinator_key.missed(world.registry.fleet(), world.registry.devices()) == ["two"]
    members.revoke(world.registry, "two")  # and that helps
    world.switch_off("two")
    world.owners["two"] = enrolled(world.registry, "two", world.owners["two"].folder)
    world.switch_on("two")
    assert world.heeds("two")
    assert coordinator_key.missed(world.registry.fleet(), world.registry.devices()) == []


# ---- attacks -------------------------------------------------------------------------------------------------------------------------


def refused(world: World, payload: bytes, kind: str, *, to: str = "one") -> None:
    """It is not heard, for this reason; nothing has changed; and the coordinator still is."""
    device = world.devices[to]
    before, keys = device.refused(kind), device.owner.coordinator_keys
    device.hear(Received(topics.coordinator_keys(to), payload), world.now)
    assert device.refused(kind) == before + 1
    assert device.owner.coordinator_keys == keys == Identity.load(device.owner.folder).coordinator_keys
    assert world.heeds(to)


def test_a_key_that_somebody_else_announces_is_not_believed(world: World) -> None:
    evil = Ed25519PrivateKey.generate()
    mine = announcement(9, evil.public_key().public_bytes_raw())
    refused(world, wire.encode(mine), "unsealed")
    refused(world, sealed_by(evil, mine), seal.UNKNOWN_KEY)
    refused(world, sealed_by(private_key(world.owners["two"].folder / "signing.key"), mine), seal.UNKNOWN_KEY)
    refused(world, sealed_by(private_key(world.owners["one"].folder / "signing.key"), mine), seal.UNKNOWN_KEY)
    coordinator_key.begin(world.registry)
    world.tick()
    genuine = world.kept[TOPIC]
    assert world.devices["one"].owner.about.keys_number == 1, "the control: the coordinator's own is believed"
    altered = genuine.replace(world.authority.signing_key, evil.public_key().public_bytes_raw())
    assert altered != genuine
    refused(world, altered, "altered")
    refused(world, genuine, "altered", to="two")  # it was said to another device


def test_a_key_that_a_revoked_key_announces_is_not_believed(world: World) -> None:
    """Somebody has found the old key after the change: on an old backup, for example."""
    stolen = private_key(world.registry.folder / SIGNING_KEY)
    evil = Ed25519PrivateKey.generate()
    coordinator_key.begin(world.registry)
    for _ in range(3):
        world.tick()
    assert world.devices["one"].owner.coordinator_keys == (world.authority.signing_key,)
    refused(world, sealed_by(stolen, announcement(99, evil.public_key().public_bytes_raw())), seal.UNKNOWN_KEY)
    refused(world, sealed_by(stolen, announcement(99, stolen.public_key().public_bytes_raw())), seal.UNKNOWN_KEY)
    topic = topics.tasks("one")
    sealed = sealed_by(stolen, wire.Tasks(), topic=topic)
    assert world.devices["one"].sealing.open(Received(topic, sealed), world.now) is None, "nor anything else that it says"


def test_an_older_announcement_changes_nothing_back(world: World) -> None:
    """Neither by its stamp, nor, where a power cut took the stamps, by its number; not even sealed by a key that still counts."""
    coordinator_key.begin(world.registry)
    world.tick()
    first = world.kept[TOPIC]
    world.tick()
    world.tick()
    assert world.devices["one"].owner.about.keys_number == 2
    refused(world, first, seal.UNKNOWN_KEY)
    second = world.kept[TOPIC]
    coordinator_key.begin(world.registry)
    world.switch_off("two")
    world.tick()
    one = world.devices["one"]
    assert one.owner.about.keys_number == 3
    keys = one.owner.coordinator_keys
    refused(world, second, "older")
    one.sealing._guard._others.clear()  # as after a power cut
    assert one.hear(Received(TOPIC, second), world.now) == []
    assert one.owner.coordinator_keys == keys == Identity.load(one.owner.folder).coordinator_keys


@pytest.mark.parametrize("keys", [[], [b"short"], [bytes(32)] * 3])
def test_an_announcement_that_is_none_changes_nothing(world: World, keys: list[bytes]) -> None:
    before = world.devices["one"].owner.coordinator_keys
    world.say(TOPIC, wire.CoordinatorKeys(number=5, keys=keys))
    assert world.devices["one"].owner.coordinator_keys == before
    assert world.heeds("one")


# ---- cuts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["release.key", "rename", "fleet.json"])
def test_a_cut_while_the_change_ends_is_made_good(world: World, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    old = world.authority.signing_key
    coordinator_key.begin(world.registry)
    world.tick()
    following = world.authority.next_key()

    def gone(*_: object) -> None:
        raise KeyboardInterrupt

    place = {"release.key": "write_private", "rename": "sync_folder", "fleet.json": "write_fleet"}[cut]
    with monkeypatch.context() as patched:
        patched.setattr(coordinator_key, place, gone)
        with pytest.raises(KeyboardInterrupt):
            coordinator_key.finish_if_due(world.registry)
    assert world.registry.fleet().key_change_until_s is not None
    assert world.authority.signing_key == (old if cut == "release.key" else following)
    assert world.heeds("one"), "both keys count until it is over"
    world.tick()
    assert world.authority.signing_key == following
    assert world.authority.release_key == old
    assert world.devices["one"].owner.coordinator_keys == (following,)


def test_a_cut_while_it_begins_leaves_the_old_key_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.authority.signing_key

    def gone(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(coordinator_key, "write_fleet", gone)
        with pytest.raises(KeyboardInterrupt):
            coordinator_key.begin(world.registry)
    world.tick()
    assert coordinator_key.believed(world.registry.fleet(), world.authority) == [old]
    assert world.devices["one"].owner.coordinator_keys == (old,)
    coordinator_key.begin(world.registry)
    for _ in range(3):
        world.tick()
    assert world.authority.signing_key != old
    assert world.heeds("one")


def test_a_backup_from_within_the_change_works_again_after_finish(world: World) -> None:
    coordinator_key.begin(world.registry)
    world.tick()
    kept = {path.name: path.read_bytes() for path in world.registry.folder.iterdir() if path.is_file()}
    world.tick()
    world.tick()
    assert world.devices["one"].owner.coordinator_keys == (world.authority.signing_key,)
    for name in kept:
        write_private(world.registry.folder / name, kept[name])
    assert not world.heeds("one"), "the old key"
    coordinator_key.finish(world.registry)
    assert world.heeds("one")


def test_a_signing_key_that_is_damaged_meanwhile_does_not_end_a_fleet_at_work(world: World, caplog: pytest.LogCaptureFixture) -> None:
    write_private(world.registry.folder / SIGNING_KEY, b"damaged")
    assert world.heeds("one")
    assert world.heeds("two")
    assert caplog.text.count("going on with the key of before") == 1
    with pytest.raises(LocalError, match=r"signing\.key: .*restore the fleet's folder from its backup"):
        Authority(world.registry.folder)
