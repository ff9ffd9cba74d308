"""The scenarios of both brokers on a real mosquitto, and its throughput as a model store."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from regrow.machine import Received
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


def test_a_killed_broker_comes_back(rig: Rig) -> None:
    scenarios.a_killed_broker_comes_back(rig)
