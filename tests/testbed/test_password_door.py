"""The bench: devices with passwords, TLS by a fleet's certificate, on the embedded broker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from tests.testbed.certified import HOST, CertifiedFleet
from tests.testbed.processes import task_text, until, wide_mlp, write_digits


def test_a_device_with_a_password_trains_over_tls_and_believes_this_fleets_broker_only(tmp_path: Path) -> None:
    with CertifiedFleet(tmp_path / "f", wide_mlp(0, 32), task_text("digits", stop="seconds = 3000"), kind="amqtt") as fleet:
        serve = fleet.serve("--passwords")
        url = fleet.registry.fleet().broker
        added = fleet.start(["device", "add", "b0", "--broker", url, "--out", fleet.folder, "--runs", fleet.runs], "add.log")
        assert added.ended() == 0
        bundle = json.loads((fleet.folder / "b0.json").read_text())
        assert bundle["broker"].startswith(f"mqtts://{HOST}:")
        assert "BEGIN CERTIFICATE" in bundle["ca"]
        write_digits(fleet.folder / "b0.npz", seed=0)
        stranger = {name: value for name, value in bundle.items() if name != "ca"}
        (fleet.folder / "s0.json").write_text(json.dumps(stranger))
        doubtful = fleet.start(["--log", "agent", "--bundle", "s0.json", "--data", "b0.npz", "--state", "s0.state"], "s0.log")
        doubtful.said("CERTIFICATE_VERIFY_FAILED")
        doubtful.stop()
        agent = fleet.start(["--log", "agent", "--bundle", "b0.json", "--data", "b0.npz", "--state", "b0.state"], "b0.log")
        agent.said("accepted")
        until(lambda: fleet.version() >= 1, "an aggregation")
        agent.stop()
        serve.stop()
