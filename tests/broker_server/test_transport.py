"""The gateway's link, against a real amqtt child."""

from __future__ import annotations

import queue

import paho.mqtt.client as paho
import pytest

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, FROM_DEVICES
from broker_server.transport import MAX_QUEUED, MqttBus, check_broker
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe
from tests.broker_server.scenarios import DEADLINE_S, Rig, rig_on

rig = rig_on("amqtt")


def test_every_token_comes_back_once_with_its_times(rig: Rig) -> None:
    payload = memoryview(bytearray(64 * 1024))
    for token in range(200):
        rig.bus.perform(Publish(f"regrow/v1/t/r/chunk/1/{token % 8}", payload, token=token))
    events = [rig.hear(object) for _ in range(400)]
    acknowledged = [event for event in events if isinstance(event, Acknowledged)]
    assert sorted(event.token for event in acknowledged) == list(range(200))
    for event in acknowledged:
        assert event.sent_bytes == 64 * 1024
        assert event.started_s < event.acked_s
    received = [event for event in events if isinstance(event, Received)]
    assert [event.topic[-1] for event in received] == [str(token % 8) for token in range(200)]


def test_unsubscribed_topics_stay_away(rig: Rig) -> None:
    rig.bus.perform(Unsubscribe(("regrow/v1/#",)))
    rig.bus.perform(Publish("regrow/v1/t/r/manifest", b"x"))
    rig.bus.perform(Publish("regrow/v1/t/r/manifest", b"y", token=1))
    rig.hear(Acknowledged)
    rig.bus.perform(Subscribe(("regrow/v1/device/nobody/+",)))
    assert rig.flush() == []  # amqtt has passed everything on now
    rig.bus.perform(Unsubscribe(("regrow/v1/device/nobody/+",)))
    rig.bus.perform(Subscribe(("regrow/v1/#",)))
    assert rig.flush() == []


@pytest.mark.parametrize(
    "effect", [Publish("a/#", b""), Publish("", b""), Publish("a" * 70_000, b""), Subscribe(("a/#/b",)), Subscribe(("",))]
)
def test_what_mqtt_cannot_carry_is_our_fault(rig: Rig, effect: Publish | Subscribe) -> None:
    with pytest.raises(LocalError):
        rig.bus.perform(effect)
    assert rig.bus.connected


def test_a_wrong_password_says_what_to_check(rig: Rig) -> None:
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    bus = MqttBus(rig.broker.url, client_id=COORDINATOR, username=COORDINATOR, password="no", on_event=events.put)
    bus.start()
    event = events.get(timeout=DEADLINE_S)
    bus.close()
    assert isinstance(event, Disconnected)
    assert "refused" in event.reason
    assert "password" in event.reason


def test_a_broker_is_checked_by_asking_it(rig: Rig) -> None:
    check_broker(rig.broker.url, "d0", rig.credentials.password("d0"))
    with pytest.raises(LocalError, match=r"--broker: the broker refused the coordinator: .*; check its user name and password"):
        check_broker(rig.broker.url, "d0", "no")


def test_nothing_performed_before_connecting_is_sent_after(rig: Rig) -> None:
    other: queue.SimpleQueue[object] = queue.SimpleQueue()
    device = MqttBus(rig.broker.url, client_id="d0", username="d0", password=rig.credentials.password("d0"), on_event=other.put)
    device.perform(Publish("regrow/v1/device/d0/hello", b"stale", token=1))
    device.start()
    assert other.get(timeout=DEADLINE_S) == Connected()
    device.perform(Publish("regrow/v1/device/d0/hello", b"live", token=2))
    event = other.get(timeout=DEADLINE_S)
    assert isinstance(event, Acknowledged)
    assert event.token == 2
    heard = rig.hear_until("regrow/v1/device/d0/hello", b"live")
    assert [event.payload for event in heard] == [b"live"]
    device.close()


def test_unacknowledged_publishes_die_with_their_connection(rig: Rig) -> None:
    """The broker is stopped under a backlog; after the restart only what is performed then arrives."""
    for token in range(400):
        rig.bus.perform(Publish("regrow/v1/t/r/manifest", b"%d" % token + bytes(60_000), token=token))
    rig.broker.stop()
    rig.hear(Disconnected)
    restarted = Broker(rig.broker.log_path.parent, rig.credentials, kind="amqtt", port=rig.broker.port)
    restarted.start()
    rig.broker = restarted
    rig.hear(Connected)
    rig.bus.perform(Subscribe(("regrow/v1/#",)))
    assert rig.flush() == []
    rig.bus.perform(Publish("regrow/v1/t/r/manifest", b"live"))
    assert rig.flush() == [Received("regrow/v1/t/r/manifest", b"live")]


def test_a_queue_that_only_grows_is_an_error() -> None:
    bus = MqttBus("mqtt://127.0.0.1:1", client_id="c", username="c", password="p", on_event=lambda _: None)
    bus._connected = True  # as if the broker had stopped to acknowledge
    for _ in range(MAX_QUEUED):
        bus.perform(Publish("a", b""))
    with pytest.raises(LocalError, match="too slow"):
        bus.perform(Publish("a", b""))


def test_what_devices_have_had_retained_is_asked_for_sooner_while_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = 100.0, list[object]()
    bus = MqttBus("mqtt://127.0.0.1:1", client_id="c", username="c", password="p", on_event=done.append, clock=lambda: now)
    monkeypatch.setattr(bus, "perform", done.append)
    asked = [Subscribe(FROM_DEVICES), Unsubscribe(FROM_DEVICES)]
    for now, expected in ((100.0, asked), (104.9, asked), (105.0, 2 * asked)):  # noqa: B007 - the clock's
        bus.tend()
        assert done == expected
    left = paho.MQTTMessage(topic=b"regrow/v1/t/r/device/d/update/7/0")
    left.payload, left.retain = b"left", True
    bus._on_message(bus._client, None, left)
    now = 106.0
    bus.tend()
    assert done == 3 * asked  # and nobody heard of it
    probe = paho.MQTTMessage(topic=b"regrow/v1/measure/uplink/device/d/probe/1/3")
    probe.payload, probe.retain, cleared = b"chunk", True, list[Publish]()
    monkeypatch.setattr(bus, "_publish", cleared.append)
    for now in (*range(110, 700, 5), 2000, 2005):  # noqa: B007 - the clock's
        bus._on_message(bus._client, None, probe)
        assert not cleared, "it measures"
    for now in range(2010, 2601, 5):  # noqa: B007
        bus._on_message(bus._client, None, probe)
    assert cleared == [Publish("regrow/v1/measure/uplink/device/d/probe/1/3", b"", retain=True)], "it was killed"
    left.retain = False
    bus._on_message(bus._client, None, left)
    assert done[-1] == Received("regrow/v1/t/r/device/d/update/7/0", b"left")
