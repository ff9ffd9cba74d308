"""A release's whole way, by real processes: staged on the gateway, sealed and over TLS to the agent, installed, tried, and told back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet.authority import Authority
from cli.version import version
from edge_agent.update_files import Journal, read_journal
from export.models import digits_mlp
from tests.edge_agent.release_rig import Board, wheels_of
from tests.testbed.certified import CertifiedFleet
from tests.testbed.processes import task_text, until

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


def offer(fleet: CertifiedFleet, number: str, minutes: float) -> str:
    """`regrow fleet update` with small wheels of that version."""
    first, *_ = wheels_of(fleet.folder / f"wheels-{number}", number)
    return fleet.fleet("update", "--wheel", first, "--wheels", first.parent, "--percent", 100, "--minutes", minutes)


def test_a_release_comes_over_the_link_and_stays_if_the_device_trains_and_goes_if_not(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", "0.0.1")
    task = task_text("toy", stop="seconds = 600")
    with CertifiedFleet(tmp_path / "fleet", digits_mlp(seed=1), task, kind="mosquitto") as fleet:
        state = fleet.folder / "d1.state"
        paths = {"prefix": str(board.prefix), "spool": str(state / "spool"), "health": str(state / "health.json")}
        keys = [Authority(fleet.keys).signing_key.hex()]
        board.settings.write_text(json.dumps({"keys": keys, **paths, "restart": ["true"]}))

        def journal() -> Journal:
            return read_journal(board.prefix)

        def apply(number: int) -> None:
            """The path unit would see the bundle and start this; the agent starts anew where systemd would start it."""
            until(lambda: (state / "spool" / f"{number}.bundle").exists(), f"bundle {number}; {fleet.devices['d1'].text()[-2000:]}")
            updater = fleet.start(["update", "apply", "--settings", board.settings], "update.log")
            until(lambda: journal().number == number and journal().step in ("trial", ""), "the trial")
            fleet.devices["d1"].kill()
            fleet.member("d1", "--updates", board.settings)
            assert updater.ended(120) == 0, updater.text()

        fleet.serve()
        fleet.member("d1", "--updates", board.settings)
        until(lambda: fleet.of("d1").state == "active", "the device joins")
        assert "100 %: 1 of 1 devices: d1" in offer(fleet, version(), 2)
        apply(1)
        assert (journal().outcome, board.runs()) == ("healthy", version())
        until(lambda: "healthy" in fleet.fleet("update", "--status"), "the gateway hears of it")
        offer(fleet, "99.0", 0.01)  # the agent that is started stays the old one: this version never says a word
        apply(2)
        assert (journal().outcome, board.runs()) == ("rolled back", version())
        told = until(
            lambda: (said := fleet.fleet("update", "--status", "--json")) and "rolled back" in said and said, "the gateway hears of it"
        )
        assert "of version 99.0 did not connect to the broker" in told
        fleet.devices["d1"].stop()
