"""What a device makes of what its fleet tells it, step by step; the agent and the link are not needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from edge_agent import identity, identity_folder
from edge_agent.control import ASK_AGAIN_S, RENEW_S, WIPE_PATIENCE_S, Control
from edge_agent.identity import Identity
from regrow import topics, wire
from regrow.machine import Acknowledged, Connected, Disconnected, Effect, Finished, Publish, Received, Subscribe, Told
from tests.edge_agent.small_authority import SmallAuthority


class Device:
    """Control, with an agent that does what it is told at once, or when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.authority = SmallAuthority()
        identity_folder.adopt(folder, self.authority.claim(folder.parent, "d1"))
        self.me = identity.accept(folder, self.authority.certify(identity.request(folder).csr))
        self.busy, self.cleared, self.clearing = True, False, False
        self.now, self.wall = 0.0, self.me.not_after_s - RENEW_S - 10.0
        self.control = self.started()

    def started(self) -> Control:
        return Control(self.me, self, lambda: self.wall)

    def clear(self) -> None:
        self.clearing = True

    def change(self, identity: Identity) -> None:
        self.me = identity

    def tick(self, seconds: float = 1.0) -> list[Effect]:
        self.now += seconds
        return self.control.step(None, self.now)

    def connect(self) -> list[Effect]:
        return self.control.step(Connected(), self.now)

    def hear(self, message: wire.Message) -> list[Effect]:
        topic = topics.control("d1") if isinstance(message, wire.Control) else topics.certificate("d1")
        return self.control.step(Received(topic, wire.encode(message)), self.now)

    @property
    def serial(self) -> bytes:
        return bytes.fromhex(self.me.serial.zfill(len(self.me.serial) + len(self.me.serial) % 2))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "id")


def reports(effects: list[Effect]) -> list[tuple[int, str]]:
    found = [effect for effect in effects if isinstance(effect, Publish) and effect.topic == topics.control_report("d1")]
    return [(said.number, said.doing) for said in (wire.decode(bytes(effect.payload), wire.ControlReport)[0] for effect in found)]


def requests(effects: list[Effect]) -> list[wire.CertificateRequest]:
    found = [effect for effect in effects if isinstance(effect, Publish) and effect.topic == topics.certificate_request("d1")]
    return [wire.decode(bytes(effect.payload), wire.CertificateRequest)[0] for effect in found]


def test_it_says_at_every_connect_what_it_does_and_with_which_certificate(device: Device) -> None:
    said = device.connect()
    assert Subscribe((topics.control("d1"), topics.certificate("d1"), topics.coordinator_keys("d1"), topics.older("d1"))) in said
    assert reports(said) == [(0, "working")]
    report = next(effect for effect in said if isinstance(effect, Publish))
    assert wire.decode(bytes(report.payload), wire.ControlReport)[0].serial == device.serial
    assert device.tick() == []
    device.control.step(Disconnected("x"), device.now)
    assert device.tick() == []
    assert reports(device.connect()) == [(0, "working")]


def test_pause_drain_and_resume_are_passed_on_once(device: Device) -> None:
    device.connect()
    said = device.hear(wire.Control(number=2, action="pause"))
    assert Told("pause") in said
    assert reports(said) == [(2, "paused")]
    assert device.hear(wire.Control(number=2, action="pause")) == []  # the same again after a reconnect
    said = device.hear(wire.Control(number=3, action="drain"))
    assert Told("drain") in said
    assert reports(said) == [(3, "finishing")]
    device.busy = False
    assert reports(device.tick()) == [(3, "drained")]
    said = device.hear(wire.Control(number=4, action="work"))
    assert Told("work") in said
    assert reports(said) == [(4, "working")]


def test_what_was_said_before_is_not_heard_again(device: Device) -> None:
    device.connect()
    device.hear(wire.Control(number=5, action="pause"))
    assert device.hear(wire.Control(number=4, action="work")) == []
    assert device.hear(wire.Control(number=4, action="wipe")) == []
    assert not identity_folder.is_wiping(device.me.folder)


def test_bytes_that_are_no_message_and_cleared_topics_change_nothing(device: Device) -> None:
    device.connect()
    for payload in (b"", b"nonsense", wire.encode(wire.Tasks())):
        assert device.control.step(Received(topics.control("d1"), payload), device.now) == []
    assert device.control.step(Received(topics.control("d2"), wire.encode(wire.Control(number=9, action="pause"))), device.now) == []


def test_it_asks_for_another_certificate_when_a_third_of_its_life_is_left(device: Device) -> None:
    assert requests(device.connect()) == []
    device.wall = device.me.not_after_s - RENEW_S + 1.0
    (asked,) = requests(device.tick())
    assert requests(device.tick()) == []
    (again,) = requests(device.tick(ASK_AGAIN_S))
    assert again.signing_key == asked.signing_key  # the same keys: the answer may have been lost
    old = device.me
    device.wall -= 10.0
    said = device.hear(wire.Certificate(certificate=device.authority.certify(again.csr)))
    assert device.me.serial != old.serial
    assert device.me.signing_key == asked.signing_key
    assert reports(said) == [(0, "working")]
    assert requests(device.tick(2 * ASK_AGAIN_S)) == []


def test_it_changes_its_keys_when_it_is_asked_to_and_only_once(device: Device) -> None:
    device.connect()
    order = wire.Control(number=2, action="work", replace=device.serial)
    (asked,) = requests(device.hear(order))
    device.hear(wire.Certificate(certificate=device.authority.certify(asked.csr)))
    assert requests(device.hear(order)) == []
    assert requests(device.tick(2 * ASK_AGAIN_S)) == []


@pytest.mark.parametrize("case", ["refused", "not asked for", "another CA", "another's"])
def test_an_answer_that_is_no_good_changes_nothing(device: Device, case: str) -> None:
    device.connect()
    old = device.me
    if case != "not asked for":
        (asked,) = requests(device.hear(wire.Control(number=2, action="work", replace=device.serial)))
    answers = {
        "refused": lambda: wire.Certificate(reason="no"),
        "not asked for": lambda: wire.Certificate(certificate=b"-----BEGIN"),
        "another CA": lambda: wire.Certificate(certificate=SmallAuthority().certify(asked.csr)),
        "another's": lambda: wire.Certificate(certificate=device.authority.certify(asked.csr, name="d2")),
    }
    device.hear(answers[case]())
    assert device.me is old
    assert Identity.load(old.folder).serial == old.serial


def test_a_wipe_removes_reports_and_then_removes_the_keys(device: Device) -> None:
    device.connect()
    said = device.hear(wire.Control(number=2, action="wipe"))
    assert Told("pause") in said
    assert device.clearing
    assert reports(device.tick()) == []  # not before everything is gone
    device.cleared = True
    said = device.tick()
    assert reports(said) == [(2, "wiped")]
    (report,) = [effect for effect in said if isinstance(effect, Publish)]
    assert device.tick() == []
    assert identity_folder.can_speak(device.me.folder)
    assert report.token is not None
    done = device.control.step(Acknowledged(report.token, 0.0, 1.0, 1), device.now)
    assert done == [Finished("wiped by its fleet")]
    assert list(device.me.folder.iterdir()) == []


def test_a_wipe_goes_on_after_a_restart_without_being_told_again(device: Device) -> None:
    device.connect()
    device.hear(wire.Control(number=2, action="wipe"))
    device.clearing = False
    device.control = device.started()
    assert Told("pause") in device.tick()
    assert device.clearing
    device.cleared = True
    assert [doing for _, doing in reports(device.connect())] == ["wiped"]
    assert device.hear(wire.Control(number=3, action="work")) == []  # too late


def test_a_wipe_does_not_wait_for_ever_for_a_gateway(device: Device) -> None:
    device.hear(wire.Control(number=2, action="wipe"))
    device.cleared = True
    assert device.tick() == []
    assert device.tick(WIPE_PATIENCE_S) == [Finished("wiped by its fleet")]
    assert list(device.me.folder.iterdir()) == []
