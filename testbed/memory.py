"""Coordinator and devices over an in-memory link in virtual time: the same state machines, no broker, no socket, no clock.

Messages take the latency plus what the sender's uplink and the receiver's downlink make of their size; retained messages and exact or `+`
filters work as a broker's do. Everything happens in the order of (time, number of the event), so the same inputs give the same run.

The broker is simplified unless `store_and_forward` is asked for: it knows a message when its sending begins. So a downlink is taken in the
order in which sendings began (a slow sender holds up what others send to the same receiver), and a retained message can be read too early.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.errors import LocalError
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
from testbed.links import Constant, Latency, Link
from testbed.subscriptions import Subscriptions, matches, shape_of

COORDINATOR = "coordinator"
OVERHEAD_BYTES = 80
Evaluator = Callable[[Evaluate], Evaluated]


@dataclass(frozen=True, slots=True)
class Deferred:
    """A training result that is worked out when its time has come: `result()` is asked once; `drop()` says that nobody will ask.

    So jobs that are under way at the same time can be trained together, and those of devices that died need not be.
    """

    result: Callable[[], Trained | TrainingFailed]
    drop: Callable[[], object]


Trainer = Callable[[str, Train], tuple[float, Trained | TrainingFailed | Deferred]]


@dataclass(slots=True)
class Client:
    """One end of the link: a machine, its subscriptions and its links (None: no limit).

    `position` is its place in the order in which clients first came; `in_flight` holds what it is sending: (when the last byte has left,
    numbers of the events that follow); `timer` is the number of its timer (0: none), `alarm` that of the event planned for it, which may
    come before it; sent and received bytes are payload, over all its lives.
    """

    machine: Coordinator | Device
    up: Link | None = None
    down: Link | None = None
    latency: Latency | None = None
    position: int = 0
    connected: bool = False
    filters: set[str] = field(default_factory=set)
    up_free_s: float = 0.0
    down_free_s: float = 0.0
    relayed_s: float = 0.0
    acked_s: float = 0.0
    timer: int = 0
    timer_s: float = 0.0
    alarm: int = 0
    alarm_s: float = math.inf
    generation: int = 0
    connection: int = 0
    training: Deferred | None = None
    saved: dict[str, bytes] = field(default_factory=dict)
    in_flight: deque[tuple[float, list[int]]] = field(default_factory=deque)
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def up_bps(self) -> float | None:
        """The rate of a constant uplink, in bit/s."""
        return self.up.bps if isinstance(self.up, Constant) else None

    @property
    def down_bps(self) -> float | None:
        """The rate of a constant downlink, in bit/s."""
        return self.down.bps if isinstance(self.down, Constant) else None


@dataclass(frozen=True, slots=True)
class _Call:
    """An event of the world itself: not for a machine, and it happens whoever is connected."""

    run: Callable[[], object]


_LINK_EVENTS: frozenset[type] = frozenset((Received, Acknowledged, Connected))
_WOKEN = Woken()


class World:
    """A fleet in virtual time.

    Args:
        train: (device, Train) -> (seconds, result or Deferred); how devices train.
        latency_s: one way, of clients that name none.
        persist_s: how long a durable write takes.
        evaluate: scores on held-out data, for tasks whose coordinator asks for them.
        store_and_forward: as a real broker, a message is there one latency after its last byte has left, and only then retained and put on
            the receivers' downlinks (another latency); and a transfer that a cut breaks off gives no measurement.
        keep_log: keep what the coordinator persists in `log` (grows with the run).
        keep_published: keep (sender, topic, bytes) of every message in `published` (grows with the run).
    """

    def __init__(
        self,
        train: Trainer,
        *,
        latency_s: float = 0.01,
        persist_s: float = 0.001,
        evaluate: Evaluator | None = None,
        store_and_forward: bool = False,
        keep_log: bool = True,
        keep_published: bool = True,
    ) -> None:
        self.now = 0.0
        self.clients: dict[str, Client] = {}
        self.retained: dict[str, bytes] = {}
        self.log: list[Record] = []
        self.notes: list[tuple[float, str, Note]] = []
        self.published: list[tuple[str, str, int]] = []
        self.finished: dict[str, str] = {}
        self._train, self._latency_s, self._persist_s = train, latency_s, persist_s
        self._evaluate = evaluate
        self._store_and_forward, self._keep_log, self._keep_published = store_and_forward, keep_log, keep_published
        self._link_events = _LINK_EVENTS | {Measured} if store_and_forward else _LINK_EVENTS
        self._subscriptions = Subscriptions()
        self._events: list[tuple[float, int, str, int, int, Event | _Call | Deferred]] = []
        self._lost: set[int] = set()  # numbers of events that will not happen: their message was cut off while it was being sent
        self._count = 0

    # ---- who is there --------------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        machine: Coordinator | Device,
        *,
        up_bps: float | None = None,
        down_bps: float | None = None,
        up: Link | None = None,
        down: Link | None = None,
        latency: Latency | None = None,
    ) -> Client:
        """Put a machine on the link, or a fresh one in the place of a crashed one, and connect it.

        Raises:
            LocalError: a direction has both a link and a constant rate.
        """
        client = Client(machine, _link(name, up, up_bps), _link(name, down, down_bps), latency, len(self.clients))
        old = self.clients.get(name)
        if old is not None:
            self._forget_filters(name, old)
            _drop_training(old)
            client.generation, client.saved, client.position, client.in_flight = old.generation + 1, old.saved, old.position, old.in_flight
            client.sent_bytes, client.received_bytes = old.sent_bytes, old.received_bytes
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
        client = self.clients[name]
        client.generation += 1
        client.timer, client.alarm_s = 0, math.inf
        _drop_training(client)

    def _unplug(self, name: str) -> None:
        client = self.clients[name]
        client.connected = False
        client.connection += 1
        self._forget_filters(name, client)
        client.up_free_s = client.down_free_s = client.relayed_s = client.acked_s = self.now
        for left_s, numbers in client.in_flight:
            if left_s > self.now:
                self._lost.update(numbers)
        client.in_flight.clear()

    def _forget_filters(self, name: str, client: Client) -> None:
        for pattern in client.filters:
            self._subscriptions.remove(name, pattern)
        client.filters.clear()

    def restart_broker(self) -> None:
        """The broker forgets everything and everybody has to connect again."""
        self.retained.clear()
        for name, client in self.clients.items():
            if client.connected:
                self.cut(name)
                client.connected = True
                self._later(0.5, name, Connected())

    def measure(self, name: str, uplink_bps: float) -> None:
        """Let a device's meter say this now, in bit/s, whatever its link carries: for the replay of a recorded run."""
        self._later(0.0, name, Measured(uplink_bps))

    # ---- time ----------------------------------------------------------------------------------------------------------------------

    def run(self, until_s: float, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Let virtual time pass until `until_s`, or until `stop()`."""
        while not stop():
            if not self._events or self._events[0][0] > until_s:
                self.now = max(self.now, until_s)
                return
            at, number, name, generation, connection, event = heapq.heappop(self._events)
            if number in self._lost:
                self._lost.remove(number)
                continue
            self.now = max(self.now, at)
            if isinstance(event, _Call):
                event.run()
                continue
            client = self.clients[name]
            stale = generation != client.generation
            link = type(event) in self._link_events
            unreachable = link and (not client.connected or connection != client.connection)
            if not stale and not unreachable and not (event is _WOKEN and self._early(name, client, number)):
                if isinstance(event, Received):
                    client.received_bytes += len(event.payload)
                elif isinstance(event, Deferred):
                    event, client.training = event.result(), None
                self._perform(name, client.machine.step(event, self.now))

    def at(self, time_s: float, callback: Callable[[], object]) -> None:
        """Call back at this virtual time, in order with everything else; the callback may do whatever a caller of `run` may.

        Raises:
            LocalError: that time is past, or no time.
        """
        if not self.now <= time_s < math.inf:
            raise LocalError(f"world: nothing can be planned for {time_s} s, it is {self.now} s now")
        self._call(time_s, callback)

    def _call(self, time_s: float, callback: Callable[[], object]) -> int:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, "", 0, 0, _Call(callback)))
        return self._count

    def _later(self, delay_s: float, name: str, event: Event | Deferred) -> int:
        self._count += 1
        client = self.clients[name]
        heapq.heappush(self._events, (self.now + delay_s, self._count, name, client.generation, client.connection, event))
        return self._count

    def _perform(self, name: str, effects: Sequence[Effect]) -> None:  # noqa: C901 (one branch for each kind of effect)
        client = self.clients[name]
        for effect in effects:
            if isinstance(effect, SetTimer):  # the most frequent, with every step
                self._set_timer(name, client, effect.at_s)
            elif isinstance(effect, Publish):
                self._publish(name, client, effect)
            elif isinstance(effect, Subscribe):
                self._subscribe(name, client, effect)
            elif isinstance(effect, Unsubscribe):
                self._unsubscribe(name, client, effect)
            elif isinstance(effect, Persist):
                if self._keep_log:
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
                client.training = result if isinstance(result, Deferred) else None
                self._later(seconds, name, result)
            elif isinstance(effect, Evaluate) and self._evaluate is not None:
                self._later(0.0, name, self._evaluate(effect))
            elif isinstance(effect, Note):
                self.notes.append((self.now, name, effect))
            elif isinstance(effect, Finished):
                self.finished[name] = effect.reason

    def _set_timer(self, name: str, client: Client, at_s: float) -> None:
        if at_s == math.inf:
            client.timer = 0
            return
        self._count += 1
        client.timer, client.timer_s = self._count, self.now + max(at_s - self.now, 0.0)
        if client.timer_s < client.alarm_s:
            self._arm(name, client)

    def _arm(self, name: str, client: Client) -> None:
        """Plan the client's timer. Steps mostly put it off, and then the event that is planned already looks again when it comes."""
        client.alarm, client.alarm_s = client.timer, client.timer_s
        heapq.heappush(self._events, (client.timer_s, client.timer, name, client.generation, client.connection, _WOKEN))

    def _early(self, name: str, client: Client, number: int) -> bool:
        """Whether this event is not the client's timer any more; the timer is then planned, in its place among all events."""
        if number == client.alarm:
            client.alarm_s = math.inf
            if client.timer not in (0, number):
                self._arm(name, client)
        return number != client.timer

    # ---- messages ------------------------------------------------------------------------------------------------------------------

    def _publish(self, name: str, client: Client, effect: Publish) -> None:
        if not client.connected:
            return
        payload = bytes(effect.payload)
        client.sent_bytes += len(payload)
        if self._keep_published:
            self.published.append((name, effect.topic, len(payload)))
        started = max(self.now, client.up_free_s)
        left = client.up_free_s = _finish_s(client.up, started, len(payload))
        if left == math.inf:
            return
        latency_s = self._latency(client, left)
        if effect.token is not None:
            self._acknowledge(name, client, effect.token, started, left, latency_s, len(payload))
        if self._store_and_forward:
            client.relayed_s = max(client.relayed_s, left + latency_s)
            numbers = [self._call(client.relayed_s, partial(self._relay, effect.topic, payload, effect.retain, client.relayed_s))]
        else:
            numbers = self._relay(effect.topic, payload, effect.retain, left)
        while client.in_flight and client.in_flight[0][0] <= self.now:
            client.in_flight.popleft()
        if left > self.now:
            client.in_flight.append((left, numbers))

    def _acknowledge(
        self, name: str, client: Client, token: int, started: float, left: float, latency_s: float, payload_bytes: int
    ) -> None:
        acked = client.acked_s = max(left + 2 * latency_s, client.acked_s)
        if isinstance(client.machine, Device) and client.up is not None:
            sent_bits = 8 * (payload_bytes + OVERHEAD_BYTES)
            bps = client.up.bps if isinstance(client.up, Constant) else sent_bits / max(left - started, 1e-9)
            self._later(acked - self.now, name, Measured(bps))
        self._later(acked - self.now, name, Acknowledged(token, started, acked, payload_bytes))

    def _relay(self, topic: str, payload: bytes, retain: bool, sent_s: float) -> list[int]:
        """The broker has a message; returns the numbers of its deliveries, in the order in which the receivers first came."""
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        receivers = sorted(self._subscriptions.listeners(topic), key=lambda other: self.clients[other].position)
        message = Received(topic, payload)
        return [self._deliver(other, self.clients[other], message, sent_s) for other in receivers]

    def _subscribe(self, name: str, client: Client, effect: Subscribe) -> None:
        if not client.connected:
            return
        for pattern in effect.topics:
            client.filters.add(pattern)
            self._subscriptions.add(name, pattern)
        known = {pattern for pattern in effect.topics if pattern in self.retained}
        wild = [pattern for pattern in effect.topics if shape_of(pattern)[1]]
        if wild:  # only here all retained messages are looked at: the coordinator's filters, once for each connection
            known |= {topic for topic in self.retained if any(matches(pattern, topic) for pattern in wild)}
        for topic in sorted(known):
            self._deliver(name, client, Received(topic, self.retained[topic]), self.now)

    def _unsubscribe(self, name: str, client: Client, effect: Unsubscribe) -> None:
        for pattern in client.filters.intersection(effect.topics):
            client.filters.remove(pattern)
            self._subscriptions.remove(name, pattern)

    def _deliver(self, name: str, client: Client, message: Received, sent_s: float) -> int:
        arrives = _finish_s(client.down, max(sent_s + self._latency(client, sent_s), client.down_free_s), len(message.payload))
        client.down_free_s = arrives
        return self._later(arrives - self.now, name, message)

    def _latency(self, client: Client, time_s: float) -> float:
        return self._latency_s if client.latency is None else client.latency.at_s(time_s)


def _drop_training(client: Client) -> None:
    if client.training is not None:
        client.training.drop()
        client.training = None


def _link(name: str, link: Link | None, bps: float | None) -> Link | None:
    if link is not None and bps is not None:
        raise LocalError(f"{name}: a direction has either a link or a constant rate, not both ({link} and {bps} bit/s)")
    return link if bps is None else Constant(bps)


def _finish_s(link: Link | None, start_s: float, payload_bytes: int) -> float:
    return start_s if link is None else link.finish_s(start_s, payload_bytes + OVERHEAD_BYTES)


def saved_of(world: World, name: str) -> Mapping[str, bytes]:
    """What a device's disk holds, for its next life."""
    return dict(world.clients[name].saved)
