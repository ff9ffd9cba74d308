"""The page over the whole of it: a real gateway, mosquitto, and a swarm of real device machines, as the bench and the pictures have it."""

from __future__ import annotations

import json
import urllib.request

import pytest

from bench.page import listening, scene
from tests.testbed.processes import until


@pytest.mark.network
@pytest.mark.timeout(180)
def test_a_swarm_is_a_fleet_to_the_page() -> None:
    with scene(8, (0.2, 0.6)) as found:
        found.version(3, 60.0)

        def look() -> dict[str, dict[str, object]] | None:
            with urllib.request.urlopen(f"{found.url}/api/state", timeout=20) as answer:
                devices: dict[str, dict[str, object]] = json.load(answer)["devices"]
            heard = len(devices) == 8 and all(row.get("meter") for row in devices.values())
            return devices if heard else None

        devices = until(look, "what eight devices measure")
        assert all(row["online"] for row in devices.values())
        assert devices["pi-0000"]["watts"] > 1
        assert devices["pi-0003"]["watts"] is None
        assert devices["pi-0003"]["meter"].startswith("unmeasured")
        assert devices["pi-0006"]["throttled"] is True
        assert devices["pi-0004"]["rtt_s"] == 0.03
        before = found.cpu_s()
        with listening(found.url, 2):
            assert found.cpu_s() >= before > 0
    assert not found.serve.running
