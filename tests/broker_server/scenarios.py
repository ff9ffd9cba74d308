"""What either broker must do, told once: `test_broker.py` runs it on amqtt, `tests/network` on mosquitto."""

from __future__ import annotations

import os
import queue
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker_server.broker import Broker, Kind
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.transport import MqttBus
from edge_agent.transport import MqttLink
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe

DEADLINE_S = 10.0
DEVICES = tuple(f"d{i}" for i in range(10))


class Rig:
    """A running broker with ten devices' credentials and one coordinator that hears everything."""

    def __init__(self, home: Path, kind: Kind) -> None:
        self.credentials = Credentials(home / "secrets")
        for device in DEVICES:
            self.credentials.add_device(device)
        self.broker = Broker(home / "broker", self.credentials, kind=kind, rng=random.Random(1))
        self.broker.start()
        self.listen()

    def listen(self) -> None:
        """Let the coordinator hear everything."""
        self.heard: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.bus = self.coordinator(self.heard.put)
        self.hear(Connected)
        self.bus.perform(Subscribe(("regrow/v1/#",)))
        self.flush()

    def coordinator(self, on_event: Callable[[object], None]) -> MqttBus:
        bus = MqttBus(
            self.broker.url,
            client_id=COORDINATOR,
            username=COORDINATOR,
            password=self.credentials.coordinator_password,
            on_event=on_event,
        )
        bus.start()
        return bus

    def hear(self, kind: type) -> object:
        """The coordinator's next event of a kind; drops the others."""
        until_s = time.monotonic() + DEADLINE_S
        while True:
            event = self.heard.get(timeout=max(0.01, until_s - time.monotonic()))
            if isinstance(event, kind):
                return event

    def flush(self) -> list[Received]:
        """Everything the coordinator was sent up to now: it sends itself a last word."""
        word = f"regrow/v1/device/nobody/{time.monotonic_ns()}"
        self.bus.perform(Publish(word, b"."))
        found: list[Received] = []
        while True:
            event = self.hear(Received)
            assert isinstance(event, Received)
            if event.topic == word:
                return [event for event in found if not event.topic.startswith("regrow/v1/device/nobody")]
            found.append(event)

    def hear_until(self, topic: str, payload: bytes) -> list[Received]:
        """What the coordinator receives up to and with this message (a PUBACK of amqtt says only that it is queued)."""
        found: list[Received] = []
        while not found or (found[-1].topic, found[-1].payload) != (topic, payload):
            event = self.hear(Received)
            assert isinstance(event, Received)
            found.append(event)
        return found

    def publish(self, *effects: Publish) -> None:
        """Publish as the coordinator and wait until the broker has all of it."""
        for token, effect in enumerate(effects):
            self.bus.perform(Publish(effect.topic, effect.payload, effect.retain, token))
        for _ in effects:
            self.hear(Acknowledged)

    def link(self, device: str, **options: object) -> MqttLink:
        link = MqttLink(
            self.broker.url,
            device_id=device,
            password=self.credentials.password(device),
            rng=random.Random(device),
            **options,  # type: ignore[arg-type]
        )
        wait_for(link, Connected)
        return link

    def close(self) -> None:
        self.bus.close()
        self.broker.stop()


def rig_on(kind: Kind) -> Callable[..., Iterator[Rig]]:
    """The fixture `rig` of a test module, on one kind of broker."""

    @pytest.fixture(scope="module", name="rig")
    def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        rig = Rig(tmp_path_factory.mktemp(kind), kind)
        yield rig
        rig.close()

    return rig


def wait_for(link: MqttLink, kind: type, seen: list[object] | None = None) -> object:
    """The link's next event of a kind; what came before it goes into `seen`."""
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s:
        events = link.poll(0.5)
        for at, event in enumerate(events):
            if isinstance(event, kind):
                if seen is not None:
                    seen.extend(events[at + 1 :])
                return event
            if seen is not None:
                seen.append(event)
    raise AssertionError(f"no {kind.__name__} in {DEADLINE_S} s")


def received_until(link: MqttLink, topic: str) -> list[str]:
    """Topics received up to and with this one."""
    found: list[str] = []
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s:
        found += [event.topic for event in link.poll(0.5) if isinstance(event, Received)]
        if topic in found:
            return found
    raise AssertionError(f"{topic} never came, but {found}")


def connect_raw(
    rig: Rig, client_id: str, username: str, password: str, keepalive_s: int = 30, will: tuple[str, bytes] | None = None
) -> tuple[socket.socket, int]:
    """A bare MQTT connection and the broker's return code; -1 when it just closed."""

    def text(data: bytes) -> bytes:
        return struct.pack("!H", len(data)) + data

    flags = 0b1100_0010 | (0b0000_1100 if will else 0)
    body = text(b"MQTT") + bytes((4, flags)) + struct.pack("!H", keepalive_s) + text(client_id.encode())
    if will is not None:
        body += text(will[0].encode()) + text(will[1])
    body += text(username.encode()) + text(password.encode())
    sock = socket.create_connection((rig.broker.host, rig.broker.port), timeout=DEADLINE_S)
    sock.sendall(b"\x10" + bytes((len(body) & 127 | 128, len(body) >> 7)) + body)
    answer = sock.recv(4)
    return sock, answer[3] if len(answer) == 4 else -1


def a_device_writes_only_its_own(rig: Rig) -> None:
    allowed = [
        "regrow/v1/device/d0/hello",
        "regrow/v1/device/d0/status",
        "regrow/v1/t/r/device/d0/update/7/3",
        "regrow/v1/t/r/device/d0/telemetry",
        "regrow/v1/t/r/device/d0/probe",
    ]
    forbidden = [
        "regrow/v1/device/d1/hello",
        "regrow/v1/t/claim",
        "regrow/v1/t/r/manifest",
        "regrow/v1/t/r/chunk/1/0",
        "regrow/v1/t/r/device/d0/assignment",
        "regrow/v1/t/r/device/d0/receipt",
        "regrow/v1/t/r/device/d1/update/7/3",
        "other/topic",
    ]
    link = rig.link("d0")
    rig.flush()
    topics = [topic for pair in zip(forbidden, [*allowed, *allowed[:3]], strict=True) for topic in pair]
    for topic in topics:
        link.perform(Publish(topic, b"x", retain=topic in forbidden))
    link.perform(Publish("regrow/v1/device/d0/hello", b"last", token=1))
    wait_for(link, Acknowledged)
    heard = rig.hear_until("regrow/v1/device/d0/hello", b"last")
    assert [event.topic for event in heard[:-1]] == [topic for topic in topics if topic in allowed]
    link.perform(Subscribe(("regrow/v1/t/claim", "regrow/v1/t/r/manifest", "regrow/v1/device/d0/tasks")))
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"x"))
    assert received_until(link, "regrow/v1/device/d0/tasks") == ["regrow/v1/device/d0/tasks"]  # nothing was retained
    link.close()


def a_meter_has_a_login_of_its_own(rig: Rig) -> None:
    """As docs/energy.md says: it publishes on its own topic, to which the agent listens, and throws nobody out."""
    topic = "regrow/v1/device/d1/meter"
    meter, agent, other = rig.link("d1"), rig.link("d0"), rig.link("d2")
    agent.perform(Subscribe((topic,)))
    agent.perform(Subscribe(("regrow/v1/device/d0/tasks",)))
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"the subscription stands", retain=True))
    assert received_until(agent, "regrow/v1/device/d0/tasks")
    rig.flush()
    other.perform(Publish(topic, b"not its own"))
    other.perform(Publish("regrow/v1/device/d2/hello", b"last"))
    assert [event.topic for event in rig.hear_until("regrow/v1/device/d2/hello", b"last")] == ["regrow/v1/device/d2/hello"]
    meter.perform(Publish(topic, b"4.52 W"))
    assert received_until(agent, topic) == [topic]
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"", retain=True))
    for link in (meter, agent, other):
        link.close()


def a_device_reads_only_what_it_may(rig: Rig) -> None:
    retained = [
        Publish("regrow/v1/device/d1/tasks", b"1", retain=True),
        Publish("regrow/v1/t/r/device/d1/assignment", b"2", retain=True),
        Publish("regrow/v1/t/r/device/d0/assignment", b"3", retain=True),
        Publish("regrow/v1/t/r/manifest", b"4", retain=True),
    ]
    rig.publish(*retained)
    link = rig.link("d0")  # connecting alone brings nothing, though the coordinator's filter matches all of it
    link.perform(Subscribe(("#",)))
    link.perform(Subscribe(("regrow/v1/#",)))
    link.perform(Subscribe(("regrow/v1/+/+/device/+/assignment",)))
    link.perform(Subscribe(("regrow/v1/device/d1/tasks", "regrow/v1/t/r/device/d1/assignment")))
    link.perform(Subscribe(("regrow/v1/device/d0/#",)))
    rig.publish(Publish("regrow/v1/device/d1/tasks", b"5"), Publish("regrow/v1/t/r/device/d1/receipt", b"6"))
    found = []
    until_s = time.monotonic() + DEADLINE_S
    while "regrow/v1/device/d0/tasks" not in found and time.monotonic() < until_s:
        rig.publish(Publish("regrow/v1/device/d0/tasks", b"7"))  # again: the subscription may be younger than the first
        found += [event.topic for event in link.poll(0.1) if isinstance(event, Received)]
    # mosquitto takes a wide filter and delivers the part that is allowed, amqtt refuses the filter
    assert {topic for topic in found if "d1" in topic} == set()
    assert "regrow/v1/device/d0/tasks" in found
    rig.publish(*(Publish(effect.topic, b"", retain=True) for effect in retained))
    link.close()


def ten_devices_fetch_retained_chunks(rig: Rig, chunks: int, chunk_bytes: int) -> None:
    payload = random.Random(3).randbytes(chunk_bytes)
    topics = [f"regrow/v1/t/r/chunk/1/{i}" for i in range(chunks)]
    rig.publish(*(Publish(topic, payload, retain=True) for topic in topics))
    rig.flush()
    links = {device: rig.link(device) for device in DEVICES}
    lacking = {device: set(topics) for device in DEVICES}
    asked: dict[str, set[str]] = {device: set() for device in DEVICES}
    until_s = time.monotonic() + 3 * DEADLINE_S
    while any(lacking.values()) and time.monotonic() < until_s:
        for device, link in links.items():
            for event in link.poll(0.001):
                assert isinstance(event, Received), event
                assert event.payload == payload
                lacking[device].remove(event.topic)  # exactly once
            if not asked[device] & lacking[device] and lacking[device]:
                link.perform(Unsubscribe(tuple(asked[device]))) if asked[device] else None
                asked[device] = set(sorted(lacking[device])[:16])
                link.perform(Subscribe(tuple(asked[device])))
    assert not any(lacking.values())
    rig.publish(*(Publish(topic, b"", retain=True) for topic in topics))  # an empty payload clears
    rig.flush()
    for link in links.values():
        link.close()
    late = rig.link("d0")
    late.perform(Subscribe((*topics[:15], "regrow/v1/device/d0/tasks")))
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"x", retain=True))
    assert set(received_until(late, "regrow/v1/device/d0/tasks")) == {"regrow/v1/device/d0/tasks"}
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"", retain=True))
    late.close()


def a_wrong_password_disturbs_nobody(rig: Rig) -> None:
    link = rig.link("d0")
    link.perform(Subscribe(("regrow/v1/device/d0/tasks",)))
    sock, code = connect_raw(rig, "d0", "d0", "not the password")
    sock.close()
    assert code in (4, 5)
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"x", retain=True))
    assert received_until(link, "regrow/v1/device/d0/tasks")
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"", retain=True))
    link.close()


def the_newer_connection_wins(rig: Rig) -> None:
    old, new = rig.link("d0"), rig.link("d0")
    assert isinstance(wait_for(old, Disconnected), Disconnected)
    new.perform(Subscribe(("regrow/v1/device/d0/tasks",)))
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"x", retain=True))
    assert received_until(new, "regrow/v1/device/d0/tasks")
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"", retain=True))
    old.close()
    new.close()


def a_lost_connection_sends_the_will(rig: Rig) -> None:
    will = ("regrow/v1/device/d3/status", b"lost")
    sock, code = connect_raw(rig, "d3", "d3", rig.credentials.password("d3"), will=will)
    assert code == 0
    sock.close()
    event = rig.hear(Received)
    while isinstance(event, Received) and event.topic != will[0]:
        event = rig.hear(Received)
    assert event == Received(*will)


def a_foreign_will_stays_unsaid(rig: Rig) -> None:
    """amqtt refuses the connection, mosquitto the message."""
    rig.flush()
    foreign, own = ("regrow/v1/t/claim", b"mine"), ("regrow/v1/device/d4/status", b"lost")
    for device, will in (("d3", foreign), ("d4", own)):
        sock, _ = connect_raw(rig, device, device, rig.credentials.password(device), will=will)
        sock.close()
    heard = []
    while own[0] not in heard:
        event = rig.hear(Received)
        assert isinstance(event, Received)
        heard.append(event.topic)
    heard += [event.topic for event in rig.flush()]
    assert foreign[0] not in heard


def changed_credentials_take_effect(rig: Rig) -> None:
    rig.credentials.add_device("guest")
    rig.broker.reload()
    link = rig.link("guest")
    password = rig.credentials.password("guest")
    rig.credentials.remove_device("guest")
    rig.broker.reload()
    assert isinstance(wait_for(link, Disconnected), Disconnected)
    sock, code = connect_raw(rig, "guest", "guest", password)
    sock.close()
    link.close()
    assert code in (4, 5)


def no_message_is_lost_while_others_come_and_go(rig: Rig) -> None:
    sender, restless = rig.link("d1"), rig.link("d2")
    rig.flush()
    for i in range(300):
        sender.perform(Publish("regrow/v1/t/r/device/d1/telemetry", b"%d" % i, token=i))
        filters = tuple(f"regrow/v1/t/r/chunk/{i}/{k}" for k in range(4))
        restless.perform(Subscribe(filters))
        restless.perform(Unsubscribe(filters))
        restless.poll(0)
    acknowledged = 0
    until_s = time.monotonic() + DEADLINE_S
    while acknowledged < 300 and time.monotonic() < until_s:
        acknowledged += sum(isinstance(event, Acknowledged) for event in sender.poll(0.1))
    heard = rig.hear_until("regrow/v1/t/r/device/d1/telemetry", b"299")
    assert [int(event.payload) for event in heard] == list(range(300))
    sender.close()
    restless.close()


def a_killed_broker_comes_back(rig: Rig) -> None:
    """And the coordinator with it: subscribed again by its own effect, nothing stale sent."""
    link = rig.link("d0")
    pid, before = rig.broker.pid, rig.broker.restarts
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    rig.hear(Disconnected)
    rig.bus.perform(Publish("regrow/v1/t/r/manifest", b"stale", retain=True))
    until_s = time.monotonic() + 2 * DEADLINE_S
    messages = []
    while rig.broker.restarts == before and time.monotonic() < until_s:
        messages.append(rig.broker.poll())
        link.poll(0.02)
    assert rig.broker.restarts == before + 1
    assert any(message and "ended with code -9" in message for message in messages)
    rig.hear(Connected)
    rig.bus.perform(Subscribe(("regrow/v1/#",)))
    wait_for(link, Connected)
    assert rig.flush() == []
    link.close()


ALL = (
    a_device_writes_only_its_own,
    a_meter_has_a_login_of_its_own,
    a_device_reads_only_what_it_may,
    a_wrong_password_disturbs_nobody,
    the_newer_connection_wins,
    a_lost_connection_sends_the_will,
    a_foreign_will_stays_unsaid,
    changed_credentials_take_effect,
    no_message_is_lost_while_others_come_and_go,
)

in_every_scenario = pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
