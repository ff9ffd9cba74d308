"""The device's MQTT link: effects in, events out, one thread, one loop that the caller turns.

Strategy: paho speaks the protocol, but its sockets, its loop and its reconnecting are ours: every connection gets a
fresh client, so that nothing a dead connection left behind is ever sent again (the state machine re-sends what still
matters), and every byte goes through a `PacedSocket`. Dialling (name look-up, TCP, TLS) blocks, so a short-lived
thread of our own does it and leaves the socket in a queue. Nothing that comes from the network raises: it ends in `Disconnected`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.dial import CONNECT_TIMEOUT_S, Dial
from edge_agent.keepalive import KeepAlive
from edge_agent.link_facts import TcpFacts, Unknown, tcp_facts
from edge_agent.pacing import PacedSocket, RateLimiter
from edge_agent.retry import Retry, certificate_refused
from regrow.broker_url import parse_broker_url
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe

log = logging.getLogger(__name__)

Event = Connected | Disconnected | Received | Acknowledged
Effect = Publish | Subscribe | Unsubscribe

FILTERS_PER_SUBSCRIBE = 16
MAX_INFLIGHT = 1000  # the state machine bounds what it leaves unacknowledged; paho must not hold anything back
MAX_PACKET_BYTES = 4 * 1024 * 1024
CLOSE_TIMEOUT_S = 1.0
CLOSED = "connection lost"
_CERTIFICATE_ALERT = re.compile(r"_ALERT_(\w*CERTIFICATE|UNKNOWN_CA)")  # in the words of OpenSSL
_NOT_LET_IN = ("Not authorized", "Bad user name or password")
# What paho's decoders can raise on bytes that are not MQTT.
_MALFORMED = (ValueError, TypeError, IndexError, KeyError, struct.error, MQTTException)


@dataclass(slots=True)
class _Sending:
    """A publish whose acknowledgement somebody waits for."""

    token: int
    payload_bytes: int
    started_s: float | None = None


class _Client(paho.Client):
    """paho on a socket that is already connected; never reconnects by itself."""

    def __init__(self, client_id: str, sock: PacedSocket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True, reconnect_on_failure=False)
        self._given = sock

    def _create_socket(self) -> PacedSocket:
        return self._given

    def ping(self) -> None:
        self._send_pingreq()

    def incoming_bytes(self) -> int:
        """The size that the packet now coming in claims to have."""
        return int(self._in_packet["remaining_length"])


class MqttLink:
    """One device's connection to its broker, kept up by itself; `edge_agent.retry` says when it is tried again.

    Args:
        url: mqtt://host:port or mqtts://host:port.
        device_id: client id and user name.
        password: from the device's bundle; None: a certificate says who it is.
        will: topic and payload that the broker publishes (not retained) when the connection is lost; a hint only.
        max_uplink_bps, max_downlink_bps: wire bits per second; None = as fast as the link goes.
        keepalive_s: a peer that is silent for up to twice as long counts as dead.
        rng: draws the jitter of the waits.
        clock: monotonic seconds, the same as the state machine's `now`.
        tls: context for mqtts://; None = the system's certificates.

    Raises:
        LocalError: the url or a rate is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        device_id: str,
        password: str | None,
        rng: random.Random,
        will: tuple[str, bytes] | None = None,
        max_uplink_bps: float | None = None,
        max_downlink_bps: float | None = None,
        keepalive_s: int = 30,
        clock: Callable[[], float] = time.monotonic,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = parse_broker_url(url, of_device=True)
        self._device_id, self._password, self._will = device_id, password, will
        self._keepalive_s, self._clock, self._tls = keepalive_s, clock, tls
        self._certified = password is None and self.address.tls
        self._uplink = RateLimiter(max_uplink_bps, clock)
        self._downlink = RateLimiter(max_downlink_bps, clock)
        self._events: list[Event] = []
        self._client: _Client | None = None
        self._sock: PacedSocket | None = None
        self._raw: socket.socket | None = None
        self._sending: dict[int, _Sending] = {}
        self._starts: dict[int, float] = {}
        self._refusal: str | None = None
        self._connected_at_s: float | None = None
        self._dial: Dial | None = None
        self._deadline_s = 0.0
        self._retry_at_s = clock()
        self._alive = KeepAlive(keepalive_s)
        self._retry = Retry(rng, self._retry_at_s)
        self._closed_bytes_up = self._closed_bytes_down = 0
        self._woken = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    # ---- the caller's side ------------------------------------------------------------------------------------------

    @property
    def bytes_up(self) -> int:
        """Bytes handed to the wire since the start, all connections (under TLS: before encryption)."""
        return self._closed_bytes_up + (self._sock.bytes_up if self._sock is not None else 0)

    @property
    def bytes_down(self) -> int:
        return self._closed_bytes_down + (self._sock.bytes_down if self._sock is not None else 0)

    @property
    def connected(self) -> bool:
        return self._connected_at_s is not None

    @property
    def unacknowledged(self) -> bool:
        """Whether publishes with a token are on their way."""
        return bool(self._sending)

    @property
    def tcp(self) -> TcpFacts | Unknown:
        """TCP's view of the connection at hand."""
        return Unknown("not connected") if self._raw is None else tcp_facts(self._raw)

    @property
    def peer(self) -> str:
        """The broker's numeric address; "" without a connection."""
        try:
            return "" if self._raw is None else str(self._raw.getpeername()[0])
        except OSError:
            return ""

    @property
    def retry_at_s(self) -> float:
        """When the next attempt to connect is due, if there is no connection and none under way."""
        return self._retry_at_s

    def poll(self, timeout_s: float) -> list[Event]:
        """Turn the loop until something happened, `wake()` was called or the time is up; returns what happened."""
        until_s = self._clock() + timeout_s
        while True:
            self._step()
            left_s = until_s - self._clock()
            if self._events or self._woken or left_s <= 0:
                break
            self._wait(left_s)
        self._woken = False
        events, self._events = self._events, []
        return events

    def perform(self, effect: Effect) -> None:
        """Carry out an effect. Without a connection it is dropped: the state machine repeats it after `Connected`.

        Raises:
            LocalError: a topic, filter or payload that MQTT cannot carry.
        """
        client = self._client
        if client is None or not self.connected:
            return
        try:
            match effect:
                case Publish():
                    self._publish(client, effect)
                case Subscribe(topics):
                    for start in range(0, len(topics), FILTERS_PER_SUBSCRIBE):
                        client.subscribe([(topic, 1) for topic in topics[start : start + FILTERS_PER_SUBSCRIBE]])
                case Unsubscribe(topics):
                    for start in range(0, len(topics), FILTERS_PER_SUBSCRIBE):
                        client.unsubscribe(list(topics[start : start + FILTERS_PER_SUBSCRIBE]))
        except ValueError as err:
            raise LocalError(f"{type(effect).__name__}: {err}") from err

    def wake(self) -> None:
        """Make a `poll` that waits in another thread return."""
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody waits
            self._wake_write.send(b"!")

    def use(self, tls: ssl.SSLContext) -> None:
        """Show another certificate: the connection at hand ends, and the next attempt is made at once."""
        self._tls = tls
        self.reconnect("connecting anew with a new certificate")

    def reconnect(self, reason: str) -> None:
        """End the connection at hand and make the next attempt at once."""
        if self._client is not None or self._dial is not None:
            self._lost(reason)
            self._retry_at_s = self._clock()

    def close(self) -> None:
        """Say goodbye, so that the broker keeps the will to itself, and free the sockets; at most about a second."""
        if self._client is not None and self.connected:
            client = self._client
            client.disconnect()
            until_s = self._clock() + CLOSE_TIMEOUT_S
            while self._client is client and self._clock() < until_s:
                self._wait(until_s - self._clock())
                self._step()
        self._drop()
        self._retry_at_s = float("inf")
        self._wake_read.close()
        self._wake_write.close()

    # ---- connecting -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Everything that needs no waiting: dial, take over a dialled socket, write, keepalive."""
        now = self._clock()
        if self._client is not None:
            self._serve(self._client)
            if self._client is not None and not self.connected and now >= self._deadline_s:
                self._lost(f"{self.address.host} accepted the connection but sent no MQTT answer")
        elif self._dial is not None:
            result = self._dial.result()
            if isinstance(result, socket.socket):
                self._dial = None
                self._start(result)
            elif result is not None:
                self._lost(result)
            elif now >= self._deadline_s:
                self._lost(f"no answer from {self.address.host}:{self.address.port} in {CONNECT_TIMEOUT_S:g} s")
        elif now >= self._retry_at_s:
            self._deadline_s = now + CONNECT_TIMEOUT_S
            limited = self._uplink.bps is not None or self._downlink.bps is not None
            self._dial = Dial(self.address, self._tls, limited, self.wake)

    def _start(self, raw: socket.socket) -> None:
        self._raw = raw
        self._sock = PacedSocket(raw, uplink=self._uplink, downlink=self._downlink, clock=self._clock, on_packet=self._offered)
        client = self._client = _Client(self._device_id, self._sock)
        if self._password is not None:
            client.username_pw_set(self._device_id, self._password)
        client.max_inflight_messages_set(MAX_INFLIGHT)  # raises after connect
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=1)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        self._deadline_s = self._clock() + CONNECT_TIMEOUT_S
        client.connect(self.address.host, self.address.port, self._keepalive_s)

    def _lost(self, reason: str, *, closed_by_broker: bool = False) -> None:
        """Tear down, report, and wait."""
        now = self._clock()
        if self._connected_at_s is None:
            if self._certified and _CERTIFICATE_ALERT.search(reason):
                self._refusal = reason = certificate_refused(self._device_id)
            wait_s = self._retry.failed(now, turned_away=self._certified and closed_by_broker)
        else:
            wait_s = self._retry.lost(now, now - self._connected_at_s, closed_by_broker=closed_by_broker)
        self._drop()
        self._retry_at_s = now + wait_s
        if self._retry.taken_over:
            reason = self._retry.suspicion(self._device_id, wait_s, certified=self._certified)
        elif self._retry.turned_away:
            reason = certificate_refused(self._device_id)
        needs_help = self._retry.taken_over or self._retry.turned_away or self._refusal is not None
        self._events.append(Disconnected(reason, needs_help=needs_help))
        self._refusal = None

    def _drop(self) -> None:
        sock, self._client, self._sock, self._raw = self._sock, None, None, None
        self._connected_at_s = None
        self._sending.clear()
        self._starts.clear()
        if self._dial is not None:
            self._dial.abandon()
            self._dial = None
        self._uplink.idle()
        self._downlink.idle()
        if sock is not None:
            self._closed_bytes_up += sock.bytes_up
            self._closed_bytes_down += sock.bytes_down
            sock.close()

    # ---- a connection -----------------------------------------------------------------------------------------------

    def _serve(self, client: _Client) -> None:
        """Read and write what can be read and written now, and look at the keepalive."""
        sock = self._sock
        try:
            if sock is not None and self._readable(sock):
                client.loop_read()
                if self._client is client and client.incoming_bytes() > MAX_PACKET_BYTES:
                    self._lost(f"the broker announced a packet of {client.incoming_bytes()} bytes; not MQTT, or not ours")
            if self._client is client and client.want_write():
                client.loop_write()
            if self._client is client and sock is not None and self.connected:
                self._keep_alive(client, sock)
        except _MALFORMED as err:
            self._lost(f"the broker sent bytes that are not MQTT 3.1.1: {err!r}")
            return
        if self._client is client and client.socket() is None:  # paho closed it, with or without a callback
            self._lost(self._refusal or CLOSED, closed_by_broker=True)
        elif sock is not None and not client.want_write():
            sock.idle()

    def _keep_alive(self, client: _Client, sock: PacedSocket) -> None:
        """Ping when it is time, and give a dead connection up; paho's own check wants the answer to its ping in time."""
        now = self._clock()
        match self._alive.turn(sock.bytes_up, sock.bytes_down, now):
            case "dead":
                self._lost(f"connection lost: nothing from the broker for {self._alive.silent_s(now):.0f} s")
            case "ping":
                client.ping()

    def _readable(self, sock: PacedSocket) -> bool:
        if sock.pending():
            return not sock.down_waits
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN)
        return bool(poller.poll(0))

    def _wait(self, timeout_s: float) -> None:
        """Sleep until a socket, the wake pipe, a pacing slot or the next look at the keepalive."""
        now = self._clock()
        poller = select.poll()
        poller.register(self._wake_read.fileno(), select.POLLIN)
        wake_s = now + min(timeout_s, 1.0)  # the keepalive wants a look once a second
        if self._client is not None and self._sock is not None:
            mask = 0 if self._sock.down_waits else select.POLLIN
            if self._client.want_write() and not self._sock.up_waits:
                mask |= select.POLLOUT
            if mask:
                poller.register(self._sock.fileno(), mask)
            ready_s = self._sock.next_ready_s()
            if ready_s is not None and ready_s > now:
                wake_s = min(wake_s, ready_s)
            if self._sock.pending() and not self._sock.down_waits:
                wake_s = now
        elif self._dial is None:
            wake_s = min(wake_s, self._retry_at_s)
        for fd, _ in poller.poll(max(0.0, (wake_s - now) * 1000)):
            if fd == self._wake_read.fileno():
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
                self._woken = True

    def _publish(self, client: _Client, effect: Publish) -> None:
        payload = effect.payload if isinstance(effect.payload, bytes) else bytes(effect.payload)
        # paho may offer the first byte, and even see the connection die, inside publish(): the start is
        # noted by packet id.
        info = client.publish(effect.topic, payload, qos=1, retain=effect.retain)
        started_s = self._starts.pop(info.mid, None)
        if effect.token is not None and self._client is client:
            self._sending[info.mid] = _Sending(effect.token, len(payload), started_s)

    def _offered(self, packet: bytes | bytearray | memoryview, now: float) -> None:
        """The first byte of a packet reaches the link; of a PUBLISH, remember when."""
        if packet[0] & 0xF0 != 0x30:
            return
        topic_at = next(i for i in range(1, 5) if not packet[i] & 0x80) + 1
        (topic_bytes,) = struct.unpack_from("!H", packet, topic_at)
        (mid,) = struct.unpack_from("!H", packet, topic_at + 2 + topic_bytes)
        if mid in self._sending:
            self._sending[mid].started_s = now
        else:
            self._starts[mid] = now

    # ---- paho's callbacks -------------------------------------------------------------------------------------------

    def _on_connect(self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object) -> None:
        if client is not self._client:
            return
        if code.is_failure and self._certified and code.getName() in _NOT_LET_IN:
            self._refusal = certificate_refused(self._device_id)
            return
        if code.is_failure:
            self._refusal = (
                f"the broker refused {self._device_id!r}: {code}; check that the bundle's device name and password are "
                "those that `regrow` issued on the gateway, or issue a new bundle there"
            )
            return
        self._connected_at_s = self._clock()
        self._alive.begin(self._connected_at_s)
        self._events.append(Connected())

    def _on_disconnect(self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object) -> None:
        if client is self._client:
            self._lost(self._refusal or f"{CLOSED}: {code}", closed_by_broker=True)

    def _on_message(self, client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if client is not self._client:
            return
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("dropped a message whose topic is not UTF-8")
            return
        self._events.append(Received(topic, bytes(message.payload)))

    def _on_publish(self, client: paho.Client, _data: object, mid: int, _code: object, _props: object) -> None:
        self._starts.pop(mid, None)
        sending = self._sending.pop(mid, None)
        if client is self._client and sending is not None and sending.started_s is not None:
            acked_s = self._clock()
            self._events.append(Acknowledged(sending.token, sending.started_s, acked_s, sending.payload_bytes))

    def _on_subscribe(self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _props: object) -> None:
        if any(code.is_failure for code in codes):
            log.warning("the broker refused a subscription: its access list does not know this device's topics")
