"""Sealed work over mutual TLS through kills, as real processes: nothing counts twice, nobody is locked out, and a promotion is heard."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from broker_server.broker import Kind
from broker_server.observations import open_observations
from edge_agent.model_folder import ModelFolder
from regrow.errors import LocalError
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import accepted, task_text, until, wide_mlp

pytest.importorskip("cryptography")
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("kind", ["amqtt", pytest.param("mosquitto", marks=pytest.mark.network)])
def test_a_sealed_fleet_goes_on_after_kills_and_takes_a_promotion(tmp_path: Path, kind: Kind) -> None:
    with CertifiedFleet(tmp_path / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind=kind) as fleet:
        serve = fleet.serve()
        agents = {name: fleet.member(name) for name in ("d0", "d1")}
        everybody_works(fleet)

        serve.kill()
        serve = fleet.serve()
        everybody_works(fleet)
        agents["d0"].kill()
        fleet.member("d0")
        everybody_works(fleet)
        until(lambda: observed(fleet) == {"d0", "d1"}, "observations of everybody, sealed like all else")
        assert serve.stop() == 0

        said = fleet.start(["promote", fleet.run, "--port", 0, "--host", "127.0.0.1", "--broker-kind", kind], "promote.log")
        assert said.ended(90) == 0, said.text()
        for name in agents:
            assert f"{name}: placed" in said.text()
            assert ModelFolder(fleet.folder / f"{name}.state", "digits").current() is not None
        for log in fleet.folder.glob("*.log"):
            assert "seal refused" not in log.read_text(), "honest devices and gateways refuse nothing of each other"
        fleet.check()


def everybody_works(fleet: CertifiedFleet) -> None:
    """New updates of both devices come to count."""
    before = {name: updates(fleet, name) for name in ("d0", "d1")}
    until(lambda: all(updates(fleet, name) >= before[name] + 2 for name in before), lambda: f"updates of everybody\n{fleet._tails()}", 90)


def updates(fleet: CertifiedFleet, name: str) -> int:
    return sum(device == name for device, _, _ in accepted(fleet.run)) if list(fleet.runs.glob("*/log.sqlite")) else 0


def observed(fleet: CertifiedFleet) -> set[str]:
    """Who has sent observations."""
    try:
        db = open_observations(fleet.runs / ".gateway")
    except LocalError:  # nobody yet
        return set()
    with closing(db):
        return {device for (device,) in db.execute("SELECT DISTINCT device FROM marks")}
