"""A broker in place of mosquitto needs a URL and credentials only: a whole run on RabbitMQ's MQTT plugin and on NATS."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_server.credentials import COORDINATOR
from export.models import digits_mlp
from tests.network.other_brokers import BROKERS
from tests.testbed.processes import Fleet, count, task_text

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]


@pytest.mark.parametrize("kind", BROKERS)
def test_a_run_on_another_broker(kind: str, tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", digits_mlp(0), task_text("digits", stop="aggregations = 20")) as fleet:
        fleet.add({"d1": 8000, "d2": 8000})
        home = tmp_path / kind
        home.mkdir()
        with BROKERS[kind](home, fleet.credentials) as port:
            fleet.reach(port)
            gateway = fleet.serve("--broker", f"mqtt://{COORDINATOR}:{fleet.credentials.coordinator_password}@127.0.0.1:{port}")
            for name in ("d1", "d2"):
                fleet.device(name)
            assert gateway.ended(120) == 0, gateway.text()[-2000:]
            assert count(fleet.run, "aggregated") == 20
            fleet.check()
            assert "refused" not in gateway.text()
