"""What a link to a gateway carries, measured with the kit's own chunks over MQTT: up by publishing, down by fetching retained ones.

Up: chunks of about a second of the link, two unacknowledged at most, as an update travels. They go to the device's probe topic of a
task that there is none of, so nobody hears them, and nothing is retained. Down: eight chunks are left on the broker on topics of this
device, fetched in two groups by turns so that the link never waits, and cleared at the end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_agent.link_facts import Counters, TcpFacts, Unknown, counted_since, counters_of, interface_to
from edge_agent.transport import Event, MqttLink
from edge_agent.uplink import Piece, UplinkMeter, interval_95, packet_bytes, robust_mean
from regrow import wire
from regrow.broadcast import chunk_bytes
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe
from regrow.sending import UNACKNOWLEDGED
from regrow.topics import Run

TOPICS = Run("measure", "uplink")
CONNECT_S = 45.0
LAST_ACKNOWLEDGEMENTS_S = 30.0
MOST_BREAKS = 1  # two clients of one name push each other out over and over
GROUP = 4
_NOISE = hashlib.shake_128(b"regrow measure").digest(wire.MAX_CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of the measurement; times are seconds since its first byte.

    payload_bytes: of the chunks that were acknowledged or came whole in it. goodput_bps: of the bytes that came through, chunks or parts
    of chunks, as TCP knows them; of whole chunks where it tells nothing. estimate_bps: what an agent would take the link for, by
    what was acknowledged from estimate_from_s to estimate_until_s; None for these until one sample is whole.
    """

    start_s: float
    end_s: float
    payload_bytes: int
    goodput_bps: float
    rtt_s: float | None
    retransmitted: int | None
    estimate_bps: float | None
    estimate_from_s: float | None
    estimate_until_s: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it.

    mean_bps, low_bps, high_bps: mean without outliers of samples of a second or more since the link last changed, and its 95 % interval;
    overall_bps: all bytes over all time.
    """

    direction: str
    seconds: float
    payload_bytes: int
    overall_bps: float | None
    mean_bps: float | None
    low_bps: float | None
    high_bps: float | None
    samples: int
    estimate_bps: float | None
    drifts: int
    disconnects: int
    rtt_s: float | None
    retransmitted: int | None
    congestion: str
    interface: str
    interface_sent_bytes: int | None
    interface_received_bytes: int | None


def connect(link: MqttLink) -> None:
    """Wait for the link.

    Raises:
        LocalError: the broker cannot be reached or does not let us in; says why.
    """
    until_s, reason = time.monotonic() + CONNECT_S, "no answer"
    while time.monotonic() < until_s:
        for event in link.poll(0.5):
            if isinstance(event, Connected):
                return
            if isinstance(event, Disconnected):
                reason = event.reason
                if event.needs_help or "refused" in reason:
                    raise LocalError(reason)
    raise LocalError(f"no connection in {CONNECT_S:.0f} s: {reason}")


class Measurement:
    """One direction of one link; `run` yields intervals, `summary` tells of all that was measured, whenever it is asked.

    Args:
        link: connected.
        device: whose topics are used.
        now: monotonic seconds, the link's clock.
    """

    direction = ""

    def __init__(self, link: MqttLink, device: str, now: Callable[[], float] = time.monotonic) -> None:
        self._link, self._now = link, now
        self.meter = UplinkMeter()
        self._device, self._topic = device, TOPICS.probe(device)
        self._samples: list[Piece] = []
        self._bytes = self._told_bytes = self._disconnects = 0
        self._begin_s = self._end_s = self._told_s = self._sampled_s = now()
        self._retransmitted = self._told_retransmitted = 0
        self._passed_bytes: int | None = None
        self._first = self._tcp()
        interface = interface_to(link.peer)
        self._interface = "" if isinstance(interface, Unknown) else interface
        self._counters = counters_of(self._interface)

    def run(self, seconds: float, every_s: float) -> Iterator[Interval]:
        """Measure for so long; an interval comes out every `every_s` seconds.

        Raises:
            LocalError: the connection broke more than once.
        """
        self._begin_s = self._end_s = self._told_s = self._sampled_s = self._now()
        until_s = self._begin_s + seconds
        self._first, self._counters = self._tcp(), counters_of(self._interface)
        self._passed_bytes = self._through(self._tcp())
        self._begin()
        while (now := self._now()) < until_s:
            next_s = min(until_s, self._told_s + every_s)
            for event in self._link.poll(min(max(next_s - now, 0.0), 0.5)):
                self._hear(event)
            self._turn(self._now())
            if self._now() >= next_s:
                yield self._interval(self._now())
        self._finish()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Disconnected):
            self._disconnects += 1
            self.meter.broken()
            if self._disconnects > MOST_BREAKS:
                raise LocalError(
                    f"the connection broke {self._disconnects} times ({event.reason}): another agent uses the name {self._device}, or the "
                    "link does not hold; nothing was measured. Stop that agent, and measure again"
                )
            self._retransmitted, self._told_retransmitted = 0, 0
            self._first = None
        elif isinstance(event, Connected):
            self._first = self._tcp()
        self._take(event)

    def _begin(self) -> None: ...
    def _take(self, event: Event) -> None: ...
    def _finish(self) -> None: ...

    def _turn(self, now: float) -> None:
        tcp = self._tcp()
        if tcp is not None:
            before = 0 if self._first is None else self._first.retransmitted
            self._retransmitted = tcp.retransmitted - before
        self._look(tcp, now)

    def _look(self, tcp: TcpFacts | None, now: float) -> None: ...

    def _tcp(self) -> TcpFacts | None:
        facts = self._link.tcp
        return facts if isinstance(facts, TcpFacts) else None

    def _sampled(self, add: Callable[[], None]) -> None:
        """Feed the meter, and keep the sample when there is one."""
        taken, drifts = self.meter.taken, self.meter.drifts
        add()
        if self.meter.taken > taken:
            self._sampled_s = self._now()
        if self.meter.taken > taken and self.meter.drifts > drifts:
            self._samples = list(self.meter.samples)
        elif self.meter.taken > taken:
            self._samples.append(self.meter.samples[-1])

    def _interval(self, now: float) -> Interval:
        tcp, seconds = self._tcp(), now - self._told_s
        sampled, sampled_s = bool(self.meter.samples), self._sampled_s - self._begin_s
        gone, retransmitted = self._bytes - self._told_bytes, self._retransmitted - self._told_retransmitted
        told = Interval(
            self._told_s - self._begin_s,
            now - self._begin_s,
            gone,
            self._passed(tcp, gone) * 8 / seconds,
            None if tcp is None else tcp.rtt_s,
            None if tcp is None else max(retransmitted, 0),
            self.meter.estimate_bps,
            max(sampled_s - self.meter.covers_s, 0.0) if sampled else None,
            sampled_s if sampled else None,
        )
        self._told_s, self._told_bytes, self._told_retransmitted = now, self._bytes, self._retransmitted
        return told

    def _passed(self, tcp: TcpFacts | None, gone_bytes: int) -> int:
        """Bytes that came through since the interval before; gone_bytes: those of whole chunks."""
        before, self._passed_bytes = self._passed_bytes, self._through(tcp)
        if before is None or self._passed_bytes is None or self._passed_bytes < before:
            return gone_bytes
        return self._passed_bytes - before

    def _through(self, tcp: TcpFacts | None) -> int | None:
        return None if tcp is None else tcp.delivered_bytes

    def summary(self) -> Summary:
        """What was measured so far."""
        tcp, seconds = self._tcp(), self._end_s - self._begin_s
        low, high = interval_95(self._samples) or (None, None)
        wire_bytes = counted_since(self._counters, counters_of(self._interface))
        known = wire_bytes if isinstance(wire_bytes, Counters) else None
        return Summary(
            direction=self.direction,
            seconds=seconds,
            payload_bytes=self._bytes,
            overall_bps=self._bytes * 8 / seconds if seconds > 0 else None,
            mean_bps=robust_mean(self._samples) if self._samples else self.meter.estimate_bps,
            low_bps=low,
            high_bps=high,
            samples=len(self._samples),
            estimate_bps=self.meter.estimate_bps,
            drifts=self.meter.drifts,
            disconnects=self._disconnects,
            rtt_s=None if tcp is None else tcp.rtt_s,
            retransmitted=None if tcp is None or self._disconnects else self._retransmitted,
            congestion="" if tcp is None else tcp.congestion,
            interface=self._interface,
            interface_sent_bytes=None if known is None else known.sent_bytes,
            interface_received_bytes=None if known is None else known.received_bytes,
        )


class Up(Measurement):
    """Publishes chunks."""

    direction = "up"

    def _begin(self) -> None:
        self._token = 0
        self._under_way: dict[int, int] = {}
        self._send_on()

    def _send_on(self) -> None:
        size = chunk_bytes(self.meter.estimate_bps or 0.0)
        while self._link.connected and len(self._under_way) < UNACKNOWLEDGED:
            self._token += 1
            chunk = wire.encode(wire.UpdateChunk(install=bytes(wire.DIGEST_BYTES), count=1, chunk_bytes=size), _NOISE[:size])
            self._under_way[self._token] = len(chunk)
            self._link.perform(Publish(self._topic, chunk, token=self._token))

    def _take(self, event: Event) -> None:
        self._count(event)
        if isinstance(event, (Acknowledged, Connected)):
            self._send_on()

    def _count(self, event: Event) -> None:
        if isinstance(event, Disconnected):
            self._under_way.clear()
        elif isinstance(event, Acknowledged) and self._under_way.pop(event.token, None) is not None and event.acked_s > event.started_s:
            self._bytes += event.sent_bytes
            self._end_s = event.acked_s
            self._sampled(lambda: self.meter.add(packet_bytes(self._topic, event.sent_bytes), event.started_s, event.acked_s))

    def _look(self, tcp: TcpFacts | None, now: float) -> None:
        if tcp is not None:
            delivered = tcp.delivered_bytes if self._link.unacknowledged else None
            self._sampled(lambda: self.meter.progress(delivered, now, tcp.least_rtt_s))

    def _finish(self) -> None:
        """What is under way still counts, with its time."""
        until_s = self._now() + LAST_ACKNOWLEDGEMENTS_S
        while self._under_way and self._link.connected and self._now() < until_s:
            for event in self._link.poll(0.5):
                self._count(event)


class Down(Measurement):
    """Fetches retained chunks; `clear` takes them away."""

    direction = "down"

    def __init__(self, link: MqttLink, device: str, uplink_bps: float, now: Callable[[], float] = time.monotonic) -> None:
        self._size = chunk_bytes(uplink_bps / 2)  # they are uploaded first, and two must come for a rate
        super().__init__(link, device, now)
        self._groups = [tuple(f"{self._topic}/{group}/{index}" for index in range(GROUP)) for group in range(2)]
        self._lacking: list[set[str]] = [set(), set()]
        self._last_s: float | None = None

    def leave(self) -> None:
        """Put the chunks on the broker.

        Raises:
            LocalError: the connection broke meanwhile.
        """
        self._publish(_NOISE[: self._size])

    def clear(self) -> None:
        """Take them away again."""
        if self._link.connected:
            self._publish(b"")

    def _publish(self, payload: bytes) -> None:
        waiting = dict(enumerate((topic for group in self._groups for topic in group), 1))
        for token, topic in waiting.items():
            self._link.perform(Publish(topic, payload, retain=True, token=token))
        while waiting:
            for event in self._link.poll(1.0):
                if isinstance(event, Disconnected):
                    raise LocalError(f"{event.reason}; measure again")
                if isinstance(event, Acknowledged):
                    waiting.pop(event.token, None)

    def _through(self, tcp: TcpFacts | None) -> int | None:  # noqa: ARG002 (what came is known without it)
        return self._link.bytes_down

    def _begin(self) -> None:
        for group in range(2):
            self._fetch(group)

    def _fetch(self, group: int) -> None:
        self._lacking[group] = set(self._groups[group])
        self._link.perform(Unsubscribe(self._groups[group]))
        self._link.perform(Subscribe(self._groups[group]))

    def _take(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._begin()
        elif isinstance(event, Disconnected):
            self._last_s = None
        elif isinstance(event, Received):
            self._arrived(event)

    def _arrived(self, event: Received) -> None:
        now, before_s = self._now(), self._last_s
        self._bytes += len(event.payload)
        self._end_s = self._last_s = now
        if before_s is not None and now > before_s:  # the meter takes any direction: begun when the one before had come
            size, began_s = packet_bytes(event.topic, len(event.payload)), before_s - 1e-6
            self._sampled(lambda: self.meter.add(size, began_s, now))
        for group, lacking in enumerate(self._lacking):
            lacking.discard(event.topic)
            if event.topic in self._groups[group] and not lacking:
                self._fetch(group)
