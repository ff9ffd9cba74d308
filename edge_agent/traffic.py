"""What one agent's link carried, by kind, and what it is good for: the meter is fed here, and rows are made of what is seen.

A row tells of one publish or part larger than a kibibyte: from its first byte, or the end of the one before it that was still under
way, to its acknowledgement or arrival. So the seconds of rows never overlap, and their bytes over their seconds are the goodput.
Smaller messages (heartbeats above all) are summed up by kind, a row a minute.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from edge_agent.link_facts import Counters, RadioFacts, RadioWatch, TcpFacts, Unknown, counted_since, counters_of, interface_to
from edge_agent.state import StateFolder
from edge_agent.uplink import TINY_BYTES, UplinkMeter, packet_bytes
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Publish, Received
from regrow.observations import LinkSeen, Row, TransferSeen, UplinkSeen, What
from regrow.wire import LinkState

log = logging.getLogger(__name__)
UPLINK = "uplink"
SAVE_DRIFT = 0.2
BUSY_LINK_S = 10.0  # between two looks at the link while it is needed
IDLE_LINK_S = 300.0
SMALL_S = 60.0
ESTIMATE_S = 10.0
_OF_DEVICE: dict[str, What] = {
    "hello": "telemetry",
    "status": "telemetry",
    "telemetry": "telemetry",
    "update": "update",
    "probe": "probe",
    "observations": "observations",
    "observations-receipt": "observations",
}
_MODEL = ("manifest", "program", "order", "chunk")


class Link(Protocol):
    """What this needs of edge_agent.transport.MqttLink."""

    @property
    def connected(self) -> bool: ...
    @property
    def unacknowledged(self) -> bool: ...
    @property
    def tcp(self) -> TcpFacts | Unknown: ...
    @property
    def peer(self) -> str: ...


def what_of(topic: str) -> What:
    """The kind of message that travels on a topic of the protocol."""
    parts = topic.split("/")
    if parts[:4] == ["regrow", "v1", "measure", "uplink"]:
        return "measurement"
    if parts[2:3] == ["device"]:
        return _OF_DEVICE.get(parts[4], "other") if len(parts) > 4 else "other"
    if parts[4:5] == ["device"]:
        return _OF_DEVICE.get(parts[6], "other") if len(parts) > 6 else "other"
    return "model" if parts[4:5] and parts[4] in _MODEL else "other"


class Traffic:
    """One agent's.

    Args:
        folder: where the meter's state is kept.
        link: whose traffic it is.
        observe: takes the rows.
        wall_s: unix seconds now, for the rows.

    Attributes:
        payload_bytes: (up, kind) -> bytes acknowledged or arrived since the start.
        run, number: what the device works on, for the rows; the caller keeps them up to date.
    """

    def __init__(
        self, folder: StateFolder, link: Link, *, observe: Callable[[Row], None] = lambda _: None, wall_s: Callable[[], float] = time.time
    ) -> None:
        self.payload_bytes: dict[tuple[bool, What], int] = {}
        self.run, self.number = "", 0
        self._folder, self._link, self._observe, self._wall_s = folder, link, observe, wall_s
        self.meter = self._load()
        self._told_bps = self._saved_bps = self.meter.estimate_bps
        self._taken, self._drifts, self._estimate_s = self.meter.taken, self.meter.drifts, float("-inf")
        self._own = 0
        self._sent: dict[int, str] = {}
        self._until_s = {True: 0.0, False: 0.0}  # how far the rows of either direction have come, monotonic
        self._retransmitted = 0
        self._small: dict[tuple[bool, What], list[float]] = {}
        self._small_s: float | None = None  # since when small ones are summed up
        self._link_s = float("-inf")
        self._counters: Counters | Unknown = Unknown("first look")
        self._link_retransmitted = 0
        self._radio = RadioWatch()

    def _load(self) -> UplinkMeter:
        saved = self._folder.get(UPLINK)
        try:
            return UplinkMeter.from_state(json.loads(saved)) if saved is not None else UplinkMeter()
        except (LocalError, ValueError, TypeError) as error:
            log.warning("set aside the saved uplink measurements: %s", error)
            return UplinkMeter()

    def save(self) -> None:
        """Keep the meter for the next start."""
        self._saved_bps = self.meter.estimate_bps
        self._folder.put(UPLINK, json.dumps(self.meter.to_state()).encode(), durable=False)

    # ---- up ------------------------------------------------------------------------------------------------------------------------

    def leaves(self, effect: Publish) -> Publish:
        """The same with a token: acknowledgements of small messages tell the link's latency, which the meter needs beside its rate."""
        if effect.token is None:
            self._own -= 1
            effect = replace(effect, token=self._own)
        if self._link.connected and effect.token is not None:
            self._sent[effect.token] = effect.topic
        return effect

    def lost(self) -> None:
        """The connection is gone, and with it whatever was to be acknowledged or counted on it."""
        self._sent.clear()
        self.meter.progress(None, 0.0)
        self._retransmitted = self._link_retransmitted = 0

    def acknowledged(self, ack: Acknowledged, now: float) -> bool:
        """Count it; returns whether somebody else than the link waits for it."""
        topic = self._sent.pop(ack.token, None)
        if topic is not None and ack.acked_s > ack.started_s:
            self.meter.add(packet_bytes(topic, ack.sent_bytes), ack.started_s, ack.acked_s)
            self._count(True, topic, ack.sent_bytes, ack.started_s, ack.acked_s, now)
            self._tell_of_estimate(now)
        return ack.token >= 0

    def news_bps(self) -> float | None:
        """The estimate when it has changed since the last call; saved when that was much."""
        estimate_bps = self.meter.estimate_bps
        if estimate_bps is None or estimate_bps == self._told_bps:
            return None
        self._told_bps = estimate_bps
        if self._saved_bps is None or abs(estimate_bps - self._saved_bps) > SAVE_DRIFT * self._saved_bps:
            self.save()
        return estimate_bps

    def link_state(self) -> LinkState | None:
        """What telemetry says of the link; None while its spread is not known."""
        interval, tcp = self.meter.interval_bps, self._link.tcp
        return None if interval is None else LinkState(*interval, None if isinstance(tcp, Unknown) else tcp.rtt_s)

    def _tell_of_estimate(self, now: float) -> None:
        """A row when there is another sample, at most every ten seconds but for drifts."""
        meter = self.meter
        drifted = meter.drifts > self._drifts
        mean_bps, interval = meter.estimate_bps, meter.interval_bps
        if meter.taken == self._taken or mean_bps is None or interval is None or (now < self._estimate_s + ESTIMATE_S and not drifted):
            return
        self._taken, self._drifts, self._estimate_s = meter.taken, meter.drifts, now
        self._observe(UplinkSeen(self._wall_s(), mean_bps, *interval, drifted))

    # ---- down ----------------------------------------------------------------------------------------------------------------------

    def asked(self, filters: Sequence[str], now: float) -> None:
        """Parts were asked for: what comes first has been on its way since."""
        if any(what_of(topic) == "model" for topic in filters):
            self._until_s[False] = now

    def arrived(self, event: Received, now: float) -> None:
        """Count a message that came."""
        self._count(False, event.topic, len(event.payload), self._until_s[False], now, now)

    # ---- rows ----------------------------------------------------------------------------------------------------------------------

    def _count(self, up: bool, topic: str, payload_bytes: int, started_s: float, ended_s: float, now: float) -> None:
        what = what_of(topic)
        self.payload_bytes[up, what] = self.payload_bytes.get((up, what), 0) + payload_bytes
        packet = packet_bytes(topic, payload_bytes)
        if payload_bytes <= TINY_BYTES or (not up and what != "model"):  # of others nobody knows when they began
            seconds = max(ended_s - started_s, 0.0) if up else 0.0
            small = self._small.setdefault((up, what), [0.0, 0.0, 0.0])
            self._small[up, what] = [small[0] + seconds, small[1] + payload_bytes, small[2] + packet]
            return
        started_s = max(started_s, self._until_s[up])
        self._until_s[up] = ended_s
        tcp = self._link.tcp
        retransmitted = rtt_s = None
        if not isinstance(tcp, Unknown):
            rtt_s = tcp.rtt_s
            retransmitted, self._retransmitted = max(tcp.retransmitted - self._retransmitted, 0), tcp.retransmitted
        at_s, seconds = self._at(started_s, now), max(ended_s - started_s, 0.0)
        self._observe(
            TransferSeen(at_s, seconds, up, what, payload_bytes, packet, self.run, self.number, retransmitted if up else None, rtt_s)
        )

    def _at(self, monotonic_s: float, now: float) -> float:
        return max(self._wall_s() - (now - monotonic_s), 0.0)

    def turn(self, now: float, *, busy: bool) -> None:
        """To be called about once a second. busy: the device needs its link."""
        tcp = self._link.tcp
        if not isinstance(tcp, Unknown):
            self.meter.progress(tcp.delivered_bytes if self._link.unacknowledged else None, now, tcp.least_rtt_s)
        if self._small_s is None:
            self._small_s = now
        elif now >= self._small_s + SMALL_S:
            self._tell_of_small(self._small_s, now)
        if self._link.connected and now >= self._link_s + (BUSY_LINK_S if busy else IDLE_LINK_S):
            self._tell_of_link(tcp, now)

    def _tell_of_small(self, since_s: float, now: float) -> None:
        small, self._small = self._small, {}
        for (up, what), (seconds, payload_bytes, packet) in small.items():
            at_s = self._at(since_s, now)
            self._observe(TransferSeen(at_s, seconds, up, what, int(payload_bytes), int(packet), self.run, self.number))
        self._small_s = now

    def _tell_of_link(self, tcp: TcpFacts | Unknown, now: float) -> None:
        seconds, self._link_s = now - self._link_s, now
        interface = interface_to(self._link.peer)
        if isinstance(interface, Unknown):
            return
        counters = counters_of(interface)
        gone = counted_since(self._counters, counters)
        self._counters = counters
        radio = self._radio.facts(interface, now)
        retransmitted = None
        if isinstance(tcp, TcpFacts):
            retransmitted = max(tcp.retransmitted - self._link_retransmitted, 0)
            self._link_retransmitted = tcp.retransmitted
        if seconds == float("inf"):  # the first look begins the first interval
            return
        self._observe(
            LinkSeen(
                at_s=self._wall_s(),
                seconds=seconds,
                interface=interface,
                sent_bytes=gone.sent_bytes if isinstance(gone, Counters) else None,
                received_bytes=gone.received_bytes if isinstance(gone, Counters) else None,
                rtt_s=tcp.rtt_s if isinstance(tcp, TcpFacts) else None,
                retransmitted=retransmitted,
                congestion=tcp.congestion if isinstance(tcp, TcpFacts) else "",
                signal_dbm=_known(radio, "signal_dbm"),
                radio_bps=_known(radio, "radio_bps"),
                radio_hz=_known(radio, "radio_hz"),
                technology=radio.technology if isinstance(radio, RadioFacts) else "",
            )
        )


def _known(radio: RadioFacts | Unknown, name: str) -> float | None:
    value = getattr(radio, name, None)
    return value if isinstance(value, float) else None
