"""A broker in place of mosquitto needs a URL and credentials only: whole runs on RabbitMQ and NATS, and what those cannot."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from broker_server.credentials import COORDINATOR, Credentials
from broker_server.promotions import Promotions
from broker_server.transport import MqttBus
from export.models import digits_mlp
from regrow import topics
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe
from tests.network.other_brokers import BROKERS, PAYLOAD_BYTES
from tests.testbed.processes import Fleet, count, task_text, until

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]
CHUNK, TASKS = "regrow/v1/t/r/chunk/1/0", "regrow/v1/device/d1/tasks"
MARK = "regrow/v1/device/d1/mark"
DEADLINE_S = 20.0


class Client(NamedTuple):
    bus: MqttBus
    events: queue.SimpleQueue[object]

    def until(self, wanted: Callable[[object], bool]) -> list[object]:
        """Its events up to and with the wanted one."""
        found: list[object] = []
        deadline_s = time.monotonic() + DEADLINE_S
        while not found or not wanted(found[-1]):
            found.append(self.events.get(timeout=max(0.01, deadline_s - time.monotonic())))
        return found

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> bool:
        """Whether the broker has acknowledged it, and not closed the connection over it."""
        self.bus.perform(Publish(topic, payload, retain, 1))
        return isinstance(self.until(lambda event: isinstance(event, (Acknowledged, Disconnected)))[-1], Acknowledged)


def connected(port: int, credentials: Credentials, user: str) -> Client:
    password = credentials.coordinator_password if user == COORDINATOR else credentials.password(user)
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    bus = MqttBus(f"mqtt://127.0.0.1:{port}", client_id=user, username=user, password=password, on_event=events.put)
    bus.start()
    client = Client(bus, events)
    client.until(lambda event: isinstance(event, Connected))
    return client


class Rig:
    def __init__(self, port: int, credentials: Credentials) -> None:
        self.port, self.credentials = port, credentials
        self.coordinator = self.client(COORDINATOR)

    def client(self, user: str) -> Client:
        return connected(self.port, self.credentials, user)

    def told(self, *filters: str) -> tuple[list[str], bool]:
        """What device d1 hears of retained messages by these filters, and whether the broker lets it stay."""
        device = self.client("d1")
        device.bus.perform(Subscribe(filters))
        device.bus.perform(Subscribe((MARK,)))
        self.coordinator.publish(MARK, b"", retain=True)
        self.coordinator.publish(MARK, b"now", retain=True)
        events = device.until(lambda event: isinstance(event, Disconnected) or (isinstance(event, Received) and event.payload == b"now"))
        device.bus.close()
        return [event.topic for event in events if isinstance(event, Received) and event.topic != MARK], isinstance(events[-1], Received)


@pytest.fixture(scope="module", params=BROKERS)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Rig]]:
    home = tmp_path_factory.mktemp(request.param)
    credentials = Credentials(home / "credentials")
    for device in ("d1", "d2"):
        credentials.add_device(device)
    with BROKERS[request.param](home, credentials) as port:
        rig = Rig(port, credentials)
        rig.coordinator.publish(TASKS, b"tasks", retain=True)
        rig.coordinator.publish(CHUNK, bytes(PAYLOAD_BYTES), retain=True)
        yield request.param, rig
        rig.coordinator.bus.close()


def test_what_is_retained_comes_by_its_exact_topic(rig: tuple[str, Rig]) -> None:
    _, it = rig
    assert sorted(it.told(CHUNK, TASKS)[0]) == [TASKS, CHUNK]


def test_who_delivers_what_is_retained_to_wildcards(rig: tuple[str, Rig]) -> None:
    kind, it = rig
    assert it.told("regrow/v1/t/r/chunk/+/0") == ([CHUNK] if kind == "nats" else [], True)


@pytest.mark.parametrize("filters", [("regrow/v1/device/d2/#",), ("#",), ("regrow/v1/t/r/device/d2/receipt",)])
def test_a_device_hears_nothing_of_others(rig: tuple[str, Rig], filters: Sequence[str]) -> None:
    kind, it = rig
    it.coordinator.publish("regrow/v1/device/d2/tasks", b"theirs", retain=True)
    assert it.told(*filters) == ([], kind == "nats")  # RabbitMQ closes the connection


def test_a_device_writes_nothing_of_others(rig: tuple[str, Rig]) -> None:
    kind, it = rig
    it.coordinator.bus.perform(Subscribe(("regrow/v1/device/+/hello", "regrow/v1/t/r/chunk/+/0")))
    for topic in ("regrow/v1/device/d2/hello", "regrow/v1/t/r/chunk/9/0"):
        device = it.client("d1")
        assert device.publish(topic, b"evil") == (kind == "nats")  # acknowledged, and dropped
        device.bus.close()
    device = it.client("d1")
    assert device.publish("regrow/v1/device/d1/hello", b"good")
    heard = it.coordinator.until(lambda event: isinstance(event, Received) and event.payload == b"good")
    assert [event for event in heard if isinstance(event, Received) and event.payload == b"evil"] == []
    device.bus.close()


@pytest.mark.parametrize("kind", BROKERS)
def test_a_run_on_another_broker(kind: str, tmp_path: Path) -> None:
    """To its end, with a model that is promoted before the devices first connect."""
    with Fleet(tmp_path / "fleet", digits_mlp(0), task_text("digits", stop="aggregations = 20")) as fleet:
        fleet.add({"d1": 8000, "d2": 8000})
        home = tmp_path / kind
        home.mkdir()
        promotions = Promotions(fleet.runs, "digits")
        promotions.sign_off((fleet.task / "model.onnx").read_bytes(), run="early", version=1, who="w", file="model.onnx")
        with BROKERS[kind](home, fleet.credentials) as port:
            fleet.reach(port)
            gateway = fleet.serve("--broker", f"mqtt://{COORDINATOR}:{fleet.credentials.coordinator_password}@127.0.0.1:{port}")
            early = connected(port, fleet.credentials, "d2")
            early.bus.perform(Subscribe((topics.promotion("digits"),)))
            early.until(lambda event: isinstance(event, Received) and len(event.payload) > 0)  # now it is retained
            early.bus.close()
            for name in ("d1", "d2"):
                fleet.device(name)
            until(lambda: {*promotions.reports()} == {"d1", "d2"}, lambda: f"both devices on the promoted model: {gateway.text()[-900:]}")
            assert gateway.ended(120) == 0, gateway.text()[-2000:]
            assert count(fleet.run, "aggregated") == 20
            fleet.check()
