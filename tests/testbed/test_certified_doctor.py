"""`regrow doctor` in a fleet with identities: sealed questions, mutual TLS, and a device that was thrown out."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from broker_server.broker import Kind
from cli.main import main
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import Child, task_text, until, wide_mlp

pytest.importorskip("cryptography")
pytestmark = pytest.mark.timeout(240)
CERTIFICATES = ("tls.handshake", "tls.broker", "tls.own", "tls.authority")


def doctor(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, dict[str, str]]:
    capsys.readouterr()
    main(["doctor", "--json", *map(str, words)])
    return {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}


def states(found: dict[str, dict[str, str]], *names: str) -> list[str]:
    return [found[name]["state"] for name in names]


def test_a_certified_device_is_examined_on_the_embedded_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examined(tmp_path, "amqtt", capsys)


@pytest.mark.network
def test_a_certified_device_is_examined_on_mosquitto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examined(tmp_path, "mosquitto", capsys)


def examined(folder: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    with CertifiedFleet(folder / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind=kind) as fleet:
        fleet.serve()
        agent = fleet.member("d0")
        agent.said("accepted")
        found = doctor(capsys, "--device", "d0", "--runs", fleet.runs)
        assert states(found, *CERTIFICATES, "broker.rights", "clock.difference", "model.fit") == ["ok"] * 7, found
        assert states(doctor(capsys, "--runs", fleet.runs), "tls.authority", "tls.broker", "broker.answers") == ["ok"] * 3

        left_alone(fleet, agent, capsys)
        assert agent.stop() == 0
        device = ("--identity", fleet.folder / "d0.id", "--state", fleet.folder / "d0.state")
        found = doctor(capsys, *device)
        assert states(found, *CERTIFICATES, "broker.login", "broker.rights", "broker.gateway") == ["ok"] * 7, found

        with pytest.MonkeyPatch.context() as patch:
            clock = time.time
            patch.setattr(time, "time", lambda: clock() + 13 * 365 * 86400)
            found = doctor(capsys, *device)
        assert states(found, *CERTIFICATES, "broker.login", "broker.gateway", "clock.year") == [
            "ok",
            "warn",
            "warn",
            "ok",
            "ok",
            "ok",
            "warn",
        ], found
        assert "ahead of the fleet's time" in found["clock.year"]["said"]

        for name in ("device.key", "device.crt", "device.json", "signing.key"):
            damaged(fleet, name, capsys)
        nowhere = fleet.folder / "nowhere"
        assert main(["doctor", "--identity", str(nowhere)]) == 2
        assert not nowhere.exists()

        fleet.fleet("revoke", "d0")
        until(lambda: doctor(capsys, *device)["broker.login"]["state"] == "fail", "the revocation to be felt")
        login = doctor(capsys, *device)["broker.login"]
        assert login["said"] == "the gateway refuses this device's certificate: revoked, expired, or of another fleet"
        assert "regrow fleet show d0" in login["cure"]
        assert "regrow join d0.claim.json" in login["cure"]
        fleet.fleet("add", "d9", "--out", fleet.folder)
        for name, status, said in (
            ("d0", 1, "d0 is revoked"),
            ("d9", 1, "d9 has not joined yet"),
            ("nobody", 2, "no device 'nobody' here"),
        ):
            began_s = time.monotonic()
            assert main(["doctor", "--device", name, "--runs", str(fleet.runs)]) == status
            assert said in capsys.readouterr().err
            assert time.monotonic() - began_s < 5


def left_alone(fleet: CertifiedFleet, agent: Child, capsys: pytest.CaptureFixture[str]) -> None:
    """Its identity alone says that an agent runs; a second agent with it is told so."""
    found = doctor(capsys, "--identity", fleet.folder / "d0.id")
    assert states(found, "tls.identity", "broker.rights") == ["ok", "unknown"], found
    assert "running agent" in found["broker.rights"]["said"]
    assert "connection lost" not in agent.text()
    words = ["agent", "--identity", "d0.id", "--data", "d0.npz", "--state", "second.state"]
    second = fleet.start(words, "second.log")
    assert second.ended() == 1
    assert "another agent runs with the identity in d0.id: stop it" in second.text()


def damaged(fleet: CertifiedFleet, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that lost its end is one failure with its name and the cure, and all else is examined."""
    folder = fleet.folder / f"damaged-{name}"
    shutil.copytree(fleet.folder / "d0.id", folder)
    os.truncate(folder / name, 100)
    assert main(["doctor", "--json", "--identity", str(folder)]) == 1
    said = capsys.readouterr()
    found = {finding["check"]: finding for finding in json.loads(said.out)}
    assert found["tls.identity"]["state"] == "fail"
    assert str(folder / name) in found["tls.identity"]["said"], found["tls.identity"]
    assert "regrow fleet add" in found["tls.identity"]["cure"]
    assert states(found, "disk.write", "training.step", "broker.login") == ["ok", "ok", "unknown"], found
    assert name == "device.json" or states(found, "tls.handshake", "tls.broker", "tls.authority") == ["ok"] * 3, found
    assert "this check broke" not in said.out + said.err
