"""The coordinator changes its signing key under a fleet at work, as real processes; one device is off meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_server.broker import Kind
from broker_server.fleet.authority import Authority
from cli.main import main
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import accepted, task_text, until, wide_mlp

pytest.importorskip("cryptography")
pytestmark = pytest.mark.timeout(240)


def test_a_fleet_follows_its_coordinator_on_the_embedded_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follows(tmp_path, "amqtt", capsys)


@pytest.mark.network
def test_a_fleet_follows_its_coordinator_on_mosquitto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follows(tmp_path, "mosquitto", capsys)


def follows(folder: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    with CertifiedFleet(folder / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind=kind) as fleet:
        serve = fleet.serve()
        here, away = fleet.member("d0"), fleet.member("d1")
        until(lambda: min(updates(fleet, "d0"), updates(fleet, "d1")) >= 1, "updates of both")
        until(lambda: all(fleet.of(name).claim is None for name in ("d0", "d1")), "every claim used up")
        away.stop()
        old = Authority(fleet.keys).signing_key
        assert "another key" in fleet.fleet("rotate", "--coordinator")
        here.said("the coordinator's keys are now ")
        until(lambda: fleet.of("d0").keys == 1, "d0 says that it knows")
        assert "1 of 2 devices know the new key; not yet: d1" in fleet.fleet("rotate", "--coordinator")
        assert Authority(fleet.keys).signing_key == old
        said = fleet.fleet("rotate", "--coordinator", "--finish")
        assert "d1 missed the change of the coordinator's key" in said
        assert Authority(fleet.keys).signing_key != old
        until(lambda: fleet.of("d0").keys == 2, "d0 follows")
        before = updates(fleet, "d0")
        until(lambda: updates(fleet, "d0") >= before + 3, "d0 goes on")
        assert "connection lost" not in here.text()

        again = fleet.member("d1")
        again.said(r"unknown key.*cure.*regrow fleet revoke d1` and `regrow fleet add d1`.*regrow join d1\.claim\.json --identity d1\.id")
        assert "d1 missed the change of the coordinator's key" in fleet.fleet("list")
        until(lambda: gateway_of(fleet, "d1", capsys)[0] == "fail", "the running agent to say that it hears nothing")
        again.stop()
        state, said, cure = gateway_of(fleet, "d1", capsys)
        assert (state, "does not know the key" in said, "regrow join d1.claim.json" in cure) == ("fail", True, True)
        fleet.fleet("revoke", "d1")
        fleet.fleet("add", "d1", "--out", fleet.folder)
        joining = fleet.start(["join", "d1.claim.json", "--identity", "d1.id"], "join.log")
        assert joining.ended() == 0, joining.text()
        fleet.member("d1")
        before = updates(fleet, "d1")
        until(lambda: updates(fleet, "d1") >= before + 2, "d1 works again")
        assert "missed" not in fleet.fleet("list")
        for name in ("d0", "d1"):
            fleet.devices[name].stop()
            assert gateway_of(fleet, name, capsys)[0] == "ok"
        serve.stop()
        fleet.check()


def gateway_of(fleet: CertifiedFleet, name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """What `regrow doctor` on the device finds of its gateway: state, words and cure."""
    capsys.readouterr()
    main(["doctor", "--json", "--identity", str(fleet.folder / f"{name}.id"), "--state", str(fleet.folder / f"{name}.state")])
    (found,) = [finding for finding in json.loads(capsys.readouterr().out) if finding["check"] == "broker.gateway"]
    return found["state"], found["said"], found["cure"]


def updates(fleet: CertifiedFleet, name: str) -> int:
    return sum(device == name for device, _, _ in accepted(fleet.run))
