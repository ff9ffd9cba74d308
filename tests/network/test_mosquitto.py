"""The scenarios of both brokers on a real mosquitto, and its throughput as a model store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker_server import broker as brokers
from regrow.machine import Connected, Disconnected, Publish, Received
from tests.broker_server import scenarios
from tests.broker_server.scenarios import Rig, connect_raw, in_every_scenario, rig_on

pytestmark = pytest.mark.network


rig = rig_on("mosquitto")


@in_every_scenario
def test_scenario(rig: Rig, scenario: Callable[[Rig], None]) -> None:
    scenario(rig)


def test_ten_devices_fetch_retained_chunks(rig: Rig) -> None:
    scenarios.ten_devices_fetch_retained_chunks(rig, chunks=40, chunk_bytes=256 * 1024)


def test_the_client_id_is_the_user_whatever_it_says(rig: Rig) -> None:
    sock, code = connect_raw(rig, "coordinator", "d4", rig.credentials.password("d4"))
    assert code == 0
    assert all(isinstance(event, Received) for event in rig.flush())  # the coordinator was not pushed out
    sock.close()


def test_a_full_broker_is_started_again_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "MEMORY_BYTES", 24 * 1024 * 1024)
    rig = Rig(tmp_path, "mosquitto")
    link, said = rig.link("d0"), list[str]()
    try:
        for number in range(40):
            link.perform(Publish(f"regrow/v1/t{number}/r/device/d0/probe", bytes(500_000), retain=True))
        until_s = time.monotonic() + 20
        while said[-1:] != ["mosquitto started again"] and time.monotonic() < until_s:
            link.poll(0.05)
            said += filter(None, (rig.broker.poll(),))
        assert "started again, empty" in said[0]
        assert said[-1] == "mosquitto started again"
        assert len(said) == 3
        rig.hear(Disconnected)
        rig.hear(Connected)
        rig.publish(Publish("regrow/v1/t/claim", b"live", retain=True))
    finally:
        link.close()
        rig.close()


def test_a_killed_broker_comes_back(rig: Rig) -> None:
    scenarios.a_killed_broker_comes_back(rig)
