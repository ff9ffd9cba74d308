"""What the steward says to devices and to the coordinator, and what it makes of what devices say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import members
from broker_server.fleet.authority import PROOF_DOMAIN, Authority
from broker_server.fleet.registry import Registry, read_seen
from broker_server.fleet.steward import LOOK_S, SEEN_S, Steward, serial_bytes, speaking_for
from regrow import topics, wire
from regrow.machine import Connected, Disconnected, Effect, Publish, Received, Standing, Subscribe
from tests.broker_server.fleet.test_members import Keys, joined, revoked_serials


class Desk:
    """A steward of two devices, and its time."""

    def __init__(self, folder: Path, *, speaks: bool = True) -> None:
        members.init(folder, "farm", ["192.0.2.1"])
        self.registry, self.authority = Registry(folder), Authority(folder)
        self.keys = {name: joined(self.registry, self.authority, name) for name in ("d1", "d2")}
        self.steward = Steward(self.registry, self.authority, speaks=speaks, clock=lambda: 1000)
        self.now = 0.0

    def look(self, seconds: float = LOOK_S) -> list[Effect]:
        self.now += seconds
        return self.steward.step(None, self.now)

    def hear(self, topic: str, message: wire.Message) -> list[Effect]:
        return self.steward.step(Received(topic, wire.encode(message)), self.now)

    def answer(self, device: str, asked: wire.CertificateRequest) -> wire.Certificate:
        (said,) = [effect for effect in self.hear(topics.certificate_request(device), asked) if isinstance(effect, Publish)]
        assert (said.topic, said.retain) == (topics.certificate(device), False)
        return wire.decode(bytes(said.payload), wire.Certificate)[0]

    def serial(self, name: str, at: int = 0) -> bytes:
        return serial_bytes(self.registry.device(name).good[at].serial)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "fleet")


def controls(effects: list[Effect]) -> dict[str, wire.Control | None]:
    """device -> what it is told, None for what is cleared."""
    found = [effect for effect in effects if isinstance(effect, Publish) and effect.topic.endswith("/control")]
    assert all(effect.retain for effect in found)
    return {effect.topic.split("/")[3]: wire.decode(bytes(effect.payload), wire.Control)[0] if effect.payload else None for effect in found}


def test_everybody_is_told_at_every_connect_and_only_news_after_that(desk: Desk) -> None:
    first = desk.steward.step(Connected(), 0.0)
    assert Subscribe((topics.control_report("+"), topics.certificate_request("+"))) in first
    assert {name: said.action for name, said in controls(first).items() if said} == {"d1": "work", "d2": "work"}
    assert desk.look() == []
    members.stand(desk.registry, "d1", "paused")
    said = controls(desk.look())
    assert list(said) == ["d1"]
    assert said["d1"] is not None
    assert (said["d1"].action, said["d1"].number) == ("pause", desk.registry.device("d1").number)
    desk.steward.step(Disconnected("x"), desk.now)
    assert set(controls(desk.steward.step(Connected(), desk.now))) == {"d1", "d2"}


def test_the_coordinator_hears_who_rests_even_before_there_is_a_link(desk: Desk) -> None:
    assert desk.look() == [Standing()]
    members.stand(desk.registry, "d1", "draining")
    members.claim(desk.registry, "d3")
    assert desk.look() == [Standing(frozenset({"d3"}), frozenset({"d1"}))]
    members.revoke(desk.registry, "d2")
    assert desk.look() == [Standing(frozenset({"d2", "d3"}), frozenset({"d1"}))]


def test_who_is_out_finds_nothing_any_more(desk: Desk) -> None:
    desk.steward.step(Connected(), 0.0)
    members.revoke(desk.registry, "d1")
    assert controls(desk.look()) == {"d1": None}


def test_a_report_ends_the_claim_and_the_old_certificate(desk: Desk) -> None:
    desk.steward.step(Connected(), 0.0)
    old = desk.serial("d1")
    desk.hear(topics.control_report("d1"), wire.ControlReport(number=1, doing="working", serial=old))
    assert desk.registry.device("d1").claim is None
    keys = Keys("d1")
    csr = keys.csr
    asked = wire.CertificateRequest(
        csr=csr, signing_key=keys.signing.public_key().public_bytes_raw(), proof=keys.signing.sign(PROOF_DOMAIN + csr)
    )
    assert desk.answer("d1", asked).certificate.decode() == desk.registry.device("d1").good[1].pem
    desk.hear(topics.control_report("d1"), wire.ControlReport(number=1, doing="working", serial=desk.serial("d1", 1)))
    assert revoked_serials(desk.registry) == {old.hex().lstrip("0")}


def test_nobody_is_certified_for_another(desk: Desk) -> None:
    keys = Keys("d2")
    csr = keys.csr
    asked = wire.CertificateRequest(
        csr=csr, signing_key=keys.signing.public_key().public_bytes_raw(), proof=keys.signing.sign(PROOF_DOMAIN + csr)
    )
    said = desk.answer("d1", asked)
    assert said.certificate == b""
    assert "not 'd1'" in said.reason
    assert len(desk.registry.device("d1").certificates) == len(desk.registry.device("d2").certificates) == 1


@pytest.mark.parametrize("payload", [b"", b"nonsense", b"RG\x01\x0d\x00\x00\x00\x00"])
def test_bytes_that_are_no_message_change_nothing(desk: Desk, payload: bytes) -> None:
    before = desk.registry.devices()
    assert desk.steward.step(Received(topics.control_report("d1"), payload), 0.1) in ([], [Standing()])
    assert desk.registry.devices() == before


def test_a_report_of_a_stranger_changes_nothing(desk: Desk) -> None:
    assert desk.hear(topics.control_report("d9"), wire.ControlReport(number=1, doing="working")) in ([], [Standing()])
    assert "d9" not in read_seen(desk.registry.folder)


def test_who_was_heard_of_is_written_at_once_when_it_is_news_and_seldom_otherwise(desk: Desk) -> None:
    def report(doing: str) -> None:
        desk.hear(topics.control_report("d1"), wire.ControlReport(number=1, doing=doing, serial=desk.serial("d1")))

    report("working")
    desk.look()
    assert read_seen(desk.registry.folder)["d1"]["doing"] == "working"
    (desk.registry.folder / "seen.json").unlink()
    report("working")
    desk.look()
    assert read_seen(desk.registry.folder) == {}
    desk.look(SEEN_S)
    assert read_seen(desk.registry.folder)["d1"] == {"seen_s": 1000, "doing": "working", "serial": desk.serial("d1").hex().lstrip("0")}


def test_wiped_ends_the_membership_of_one_that_was_to_be(desk: Desk) -> None:
    desk.steward.step(Connected(), 0.0)
    serial = desk.serial("d1")
    desk.hear(topics.control_report("d1"), wire.ControlReport(number=1, doing="wiped", serial=serial))
    assert desk.registry.device("d1").state == "active"
    members.stand(desk.registry, "d1", "wiping")
    told = controls(desk.look())["d1"]
    assert told is not None
    assert told.action == "wipe"
    desk.hear(topics.control_report("d1"), wire.ControlReport(number=2, doing="wiped", serial=serial))
    assert desk.registry.device("d1").state == "wiped"
    assert controls(desk.look()) == {"d1": None}


def test_one_process_speaks_and_another_only_tells_its_own_coordinator(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "fleet", speaks=False)
    assert [type(effect) for effect in desk.steward.step(Connected(), 0.0)] == [Standing]
    with speaking_for(desk.registry) as first, speaking_for(desk.registry) as second:
        assert (first, second) == (True, False)
    with speaking_for(desk.registry) as again:
        assert again


def test_a_damaged_registry_does_not_end_the_gateway(desk: Desk) -> None:
    desk.steward.step(Connected(), 0.0)
    file = desk.registry.folder / "devices.json"
    shutil.copy(file, file.with_suffix(".kept"))
    file.write_text("{")
    assert desk.look() == []
    shutil.move(file.with_suffix(".kept"), file)
    members.stand(desk.registry, "d1", "paused")
    assert controls(desk.look())["d1"] is not None
