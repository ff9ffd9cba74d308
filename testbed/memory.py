"""Coordinator and devices over an in-memory link in virtual time: the same state machines, no broker, no socket, no clock.

Messages take `latency_s` plus their size over the sender's (up) and receiver's (down) rate; retained messages and exact or `+` filters work
as a broker's do. Everything happens in the order of (time, number of the event), so the same inputs give the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Drop,
    Effect,
    Evaluate,
    Evaluated,
    Event,
    Finished,
    Measured,
    Note,
    Persist,
    Persisted,
    Publish,
    Received,
    Record,
    Save,
    SetTimer,
    Subscribe,
    Train,
    Trained,
    TrainingFailed,
    Unsubscribe,
    Woken,
)

COORDINATOR = "coordinator"
OVERHEAD_BYTES = 80
Evaluator = Callable[[Evaluate], Evaluated]
Trainer = Callable[[str, Train], tuple[float, Trained | TrainingFailed]]


def matches(pattern: str, topic: str) -> bool:
    """Whether an MQTT filter of plain levels and `+` matches a topic."""
    wanted, levels = pattern.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(w in ("+", level) for w, level in zip(wanted, levels, strict=True))


@dataclass(slots=True)
class Client:
    """One end of the link: a machine, its subscriptions and its rates in bit/s (None: no limit)."""

    machine: Coordinator | Device
    up_bps: float | None = None
    down_bps: float | None = None
    connected: bool = False
    filters: set[str] = field(default_factory=set)
    up_free_s: float = 0.0
    down_free_s: float = 0.0
    timer: int = 0
    generation: int = 0
    connection: int = 0
    saved: dict[str, bytes] = field(default_factory=dict)


class World:
    """A fleet in virtual time.

    Args:
        train: (device, Train) -> (seconds, result); how devices train.
        latency_s: one way.
        persist_s: how long a durable write takes.
        evaluate: scores on held-out data, for tasks whose coordinator asks for them.
    """

    def __init__(self, train: Trainer, *, latency_s: float = 0.01, persist_s: float = 0.001, evaluate: Evaluator | None = None) -> None:
        self.now = 0.0
        self.clients: dict[str, Client] = {}
        self.retained: dict[str, bytes] = {}
        self.log: list[Record] = []
        self.notes: list[tuple[float, str, Note]] = []
        self.published: list[tuple[str, str, int]] = []
        self.finished: dict[str, str] = {}
        self._train, self._latency_s, self._persist_s = train, latency_s, persist_s
        self._evaluate = evaluate
        self._events: list[tuple[float, int, str, int, int, Event]] = []
        self._on_air: dict[int, tuple[str, float]] = {}  # number of a delivery -> its sender, when its last byte has left it
        self._count = 0

    # ---- who is there --------------------------------------------------------------------------------------------------------------

    def add(self, name: str, machine: Coordinator | Device, *, up_bps: float | None = None, down_bps: float | None = None) -> Client:
        """Put a machine on the link, or a fresh one in the place of a crashed one, and connect it."""
        old = self.clients.get(name)
        client = Client(machine, up_bps, down_bps)
        if old is not None:
            client.generation, client.saved = old.generation + 1, old.saved
        self.clients[name] = client
        self.connect(name)
        return client

    def connect(self, name: str) -> None:
        self.clients[name].connected = True
        self._later(0.0, name, Connected())

    def cut(self, name: str) -> None:
        """The link breaks: subscriptions go (clean session), what is under way is lost, both sides notice."""
        self._unplug(name)
        self._later(0.0, name, Disconnected("cut"))

    def kill(self, name: str) -> None:
        """The process dies at once: nothing that it has not saved survives."""
        self._unplug(name)
        self.clients[name].generation += 1

    def _unplug(self, name: str) -> None:
        client = self.clients[name]
        client.connected = False
        client.connection += 1
        client.filters.clear()
        client.up_free_s = client.down_free_s = self.now
        cut_off = {number for number, (sender, left_s) in self._on_air.items() if sender == name and left_s > self.now}
        self._events = [event for event in self._events if event[1] not in cut_off]
        heapq.heapify(self._events)
        self._on_air = {number: flight for number, flight in self._on_air.items() if flight[1] > self.now and number not in cut_off}

    def restart_broker(self) -> None:
        """The broker forgets everything and everybody has to connect again."""
        self.retained.clear()
        for name, client in self.clients.items():
            if client.connected:
                self.cut(name)
                client.connected = True
                self._later(0.5, name, Connected())

    # ---- time ----------------------------------------------------------------------------------------------------------------------

    def run(self, until_s: float, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Let virtual time pass until `until_s`, or until `stop()`."""
        while not stop():
            if not self._events or self._events[0][0] > until_s:
                self.now = max(self.now, until_s)
                return
            at, number, name, generation, connection, event = heapq.heappop(self._events)
            self._on_air.pop(number, None)
            self.now = max(self.now, at)
            client = self.clients[name]
            stale = generation != client.generation
            link = isinstance(event, (Received, Acknowledged, Connected))
            unreachable = link and (not client.connected or connection != client.connection)
            replaced = isinstance(event, Woken) and number != client.timer
            if not stale and not unreachable and not replaced:
                self._perform(name, client.machine.step(event, self.now))

    def _later(self, delay_s: float, name: str, event: Event) -> int:
        self._count += 1
        client = self.clients[name]
        heapq.heappush(self._events, (self.now + delay_s, self._count, name, client.generation, client.connection, event))
        return self._count

    def _perform(self, name: str, effects: Sequence[Effect]) -> None:  # noqa: C901 (one branch for each kind of effect)
        client = self.clients[name]
        for effect in effects:
            if isinstance(effect, Publish):
                self._publish(name, client, effect)
            elif isinstance(effect, Subscribe):
                self._subscribe(name, client, effect)
            elif isinstance(effect, Unsubscribe):
                client.filters -= set(effect.topics)
            elif isinstance(effect, Persist):
                self.log.extend(Record(record.kind, record.header, bytes(record.payload)) for record in effect.records)
                self._later(self._persist_s, name, Persisted(effect.id))
            elif isinstance(effect, Save):
                client.saved[effect.name] = bytes(effect.data)
                if effect.id is not None:
                    self._later(self._persist_s, name, Persisted(effect.id))
            elif isinstance(effect, Drop):
                client.saved.pop(effect.name, None)
            elif isinstance(effect, Train):
                seconds, result = self._train(name, effect)
                self._later(seconds, name, result)
            elif isinstance(effect, Evaluate) and self._evaluate is not None:
                self._later(0.0, name, self._evaluate(effect))
            elif isinstance(effect, SetTimer):
                self._set_timer(name, client, effect.at_s)
            elif isinstance(effect, Note):
                self.notes.append((self.now, name, effect))
            elif isinstance(effect, Finished):
                self.finished[name] = effect.reason

    def _set_timer(self, name: str, client: Client, at_s: float) -> None:
        client.timer = self._later(max(at_s - self.now, 0.0), name, Woken()) if at_s != float("inf") else 0

    # ---- messages ------------------------------------------------------------------------------------------------------------------

    def _publish(self, name: str, client: Client, effect: Publish) -> None:
        if not client.connected:
            return
        payload = bytes(effect.payload)
        self.published.append((name, effect.topic, len(payload)))
        if effect.retain:
            if payload:
                self.retained[effect.topic] = payload
            else:
                self.retained.pop(effect.topic, None)
        started = max(self.now, client.up_free_s)
        arrived = started + _seconds(len(payload), client.up_bps)
        client.up_free_s = arrived
        if effect.token is not None:
            acked = arrived + 2 * self._latency_s
            if isinstance(client.machine, Device) and client.up_bps is not None:
                self._later(acked - self.now, name, Measured(client.up_bps))
            self._later(acked - self.now, name, Acknowledged(effect.token, started, acked, len(payload)))
        for other, receiver in self.clients.items():
            if any(matches(pattern, effect.topic) for pattern in receiver.filters):
                self._on_air[self._deliver(other, receiver, effect.topic, payload, arrived)] = (name, arrived)

    def _subscribe(self, name: str, client: Client, effect: Subscribe) -> None:
        if not client.connected:
            return
        client.filters |= set(effect.topics)
        for topic in sorted(self.retained):
            if any(matches(pattern, topic) for pattern in effect.topics):
                self._deliver(name, client, topic, self.retained[topic], self.now)

    def _deliver(self, name: str, client: Client, topic: str, payload: bytes, sent_s: float) -> int:
        arrives = max(sent_s + self._latency_s, client.down_free_s) + _seconds(len(payload), client.down_bps)
        client.down_free_s = arrives
        return self._later(arrives - self.now, name, Received(topic, payload))


def _seconds(payload_bytes: int, bps: float | None) -> float:
    return 0.0 if bps is None else 8 * (payload_bytes + OVERHEAD_BYTES) / bps


def saved_of(world: World, name: str) -> Mapping[str, bytes]:
    """What a device's disk holds, for its next life."""
    return dict(world.clients[name].saved)
