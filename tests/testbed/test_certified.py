"""The life of a fleet with identities, from the claim to the wipe, as real processes on the embedded broker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from broker_server.broker import Kind
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import accepted, task_text, until, wide_mlp

pytest.importorskip("cryptography")
pytestmark = pytest.mark.timeout(240)


def test_a_fleet_lives_on_the_embedded_broker(tmp_path: Path) -> None:
    lives(tmp_path, "amqtt")


def lives(folder: Path, kind: Kind) -> None:
    """Join (one device comes before the gateway, and is killed), train, rest, rotate, drain, revoke, wipe; others go on undisturbed."""
    with CertifiedFleet(folder / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind=kind) as fleet:
        early = fleet.member("d0")
        early.said("cannot join yet: .* cannot be reached")
        early.kill()  # its keys are made by now, and stay
        serve = fleet.serve()
        agents = {name: fleet.member(name) for name in ("d0", "d1", "d2")}
        for name, agent in agents.items():
            agent.said(rf"{name}: joining fleet lab")
        until(lambda: all(updates(fleet, name) >= 2 for name in agents), "updates of every device")
        until(lambda: all(fleet.of(name).claim is None for name in agents), "every claim used up")
        serve.said("nobody is left to join: enrolment is closed")

        fleet.fleet("pause", "d0")
        agents["d0"].said("the fleet tells this device to pause")
        until(lambda: fleet.doing("d0") == "paused", "d0 says that it is paused")
        paused, others = updates(fleet, "d0"), updates(fleet, "d1")
        until(lambda: updates(fleet, "d1") >= others + 3, "the others go on")
        assert updates(fleet, "d0") <= paused + 1  # one may have been on its way
        fleet.fleet("resume", "d0")
        until(lambda: updates(fleet, "d0") >= paused + 3, "d0 works again")

        old = fleet.of("d1").good[0].serial
        fleet.fleet("rotate", "d1")
        until(lambda: fleet.of("d1").good[0].serial != old and fleet.of("d1").good[0].used, "d1 uses its new certificate")
        assert [certified.serial for certified in fleet.of("d1").certificates if certified.revoked_s is not None] == [old]
        rotated = updates(fleet, "d1")
        until(lambda: updates(fleet, "d1") >= rotated + 2, "d1 goes on with its new keys")

        fleet.fleet("drain", "d0")
        until(lambda: fleet.doing("d0") == "drained", "d0 says that it is drained")
        fleet.fleet("resume", "d0")

        began = time.monotonic()
        fleet.fleet("revoke", "d0")
        agents["d0"].said("connection lost|cannot connect")
        assert time.monotonic() - began < 60
        agents["d0"].said("the gateway refuses this device's certificate: revoked, expired, or of another fleet; `regrow fleet show d0`")
        left, others = updates(fleet, "d0"), updates(fleet, "d2")
        until(lambda: updates(fleet, "d2") >= others + 3, "d2 goes on")
        assert updates(fleet, "d0") == left
        assert "connection lost" not in agents["d2"].text()

        fleet.fleet("wipe", "d1", "--yes")
        assert agents["d1"].ended() == 0
        assert [path.name for path in (fleet.folder / "d1.state").iterdir()] == ["lock"]
        assert list((fleet.folder / "d1.id").iterdir()) == []
        until(lambda: fleet.of("d1").state == "wiped", "the fleet knows that d1 is wiped")
        assert fleet.of("d1").good == []
        serve.stop()
        fleet.check()


def test_a_device_whose_card_is_an_old_copy_says_so_and_works_again(tmp_path: Path) -> None:
    with CertifiedFleet(tmp_path / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind="amqtt") as fleet:
        serve = fleet.serve()
        for _ in range(2):  # twice, so that the copy of before has a lower number of starts, however long it runs
            agent, before = fleet.member("d0"), updates(fleet, "d0")
            until(lambda before=before: updates(fleet, "d0") >= before + 2, "updates of the device")
            agent.stop()
        (fleet.folder / "d0.id" / "start").write_text("0\n")
        before = updates(fleet, "d0")
        again = fleet.member("d0")
        again.said("another copy of .* is in use, or this one was restored from an older copy")
        serve.said("seal refused peer=d0 kind=older")
        until(lambda: updates(fleet, "d0") >= before + 2, "it works again")
        assert int((fleet.folder / "d0.id" / "start").read_text()) == 3
        again.stop()
        serve.stop()
        fleet.check()


def updates(fleet: CertifiedFleet, name: str) -> int:
    return sum(device == name for device, _, _ in accepted(fleet.run))
