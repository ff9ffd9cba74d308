"""The coordinator changes its signing key under a fleet at work, as real processes; one device is off meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_server.broker import Kind
from broker_server.fleet.authority import Authority
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import accepted, task_text, until, wide_mlp

pytest.importorskip("cryptography")
pytestmark = pytest.mark.timeout(240)


def test_a_fleet_follows_its_coordinator_on_the_embedded_broker(tmp_path: Path) -> None:
    follows(tmp_path, "amqtt")


@pytest.mark.network
def test_a_fleet_follows_its_coordinator_on_mosquitto(tmp_path: Path) -> None:
    follows(tmp_path, "mosquitto")


def follows(folder: Path, kind: Kind) -> None:
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
        again.stop()
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
        serve.stop()
        fleet.check()


def updates(fleet: CertifiedFleet, name: str) -> int:
    return sum(device == name for device, _, _ in accepted(fleet.run))
