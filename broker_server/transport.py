"""The gateway's MQTT link: the coordinator's effects in, its events out, on paho's own thread.

Strategy: what was not acknowledged when a connection died is forgotten, and what is performed without a connection is
dropped: after every `Connected` the coordinator subscribes and republishes all that is live, so that a stale message
from before can only do harm.

No device has anything retained but while it measures, and an access list cannot forbid it: what a device leaves so would stay in the
broker's memory until that is full, for names of tasks and numbers of updates never end. So whatever comes as retained where only devices
speak is cleared and not heard, and `sweep` asks the broker for it.
"""

from __future__ import annotations

import logging
import queue
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from broker_server.credentials import FROM_DEVICES, covers, may_retain
from regrow import topics
from regrow.broker_url import parse_broker_url
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe

log = logging.getLogger(__name__)

Event = Connected | Disconnected | Received | Acknowledged
Effect = Publish | Subscribe | Unsubscribe

MAX_INFLIGHT = 64
MAX_QUEUED = 50_000  # packet ids end at 65 535
ANSWER_S = 15.0
BACKOFF_MIN_S = 1
BACKOFF_MAX_S = 30
FLUSH_S = 5.0
FILTERS_PER_SUBSCRIBE = 16
SWEEP_S, SWEEP_AGAIN_S = 5.0, 1.0  # between looks for what devices had retained, and while there is some
BLAME_S = 60.0
MEASURE_S = 600.0  # then whoever measured is gone


@dataclass(frozen=True, slots=True)
class _Sending:
    token: int | None
    started_s: float
    payload_bytes: int


class MqttBus:
    """The coordinator's connection to the broker, kept up by itself.

    Args:
        url: mqtt://host:port or mqtts://host:port.
        client_id, username, password: who connects; our brokers want client id and user name to be the same.
        will: topic and payload published (not retained) when the connection is lost; None = none.
        on_event: called from paho's thread with every event; `queue.SimpleQueue().put` is what it is made for.
        clock: monotonic seconds.
        tls: context for mqtts://; None = the system's certificates.

    Raises:
        LocalError: the url is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        username: str,
        password: str,
        on_event: Callable[[Event], None],
        will: tuple[str, bytes] | None = None,
        keepalive_s: int = 30,
        clock: Callable[[], float] = time.monotonic,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        address = parse_broker_url(url)
        self._on_event, self._clock, self._client_id = on_event, clock, client_id
        self._connected = False
        self._refusal: str | None = None
        self._last: paho.MQTTMessageInfo | None = None
        self._lock = threading.Lock()  # guards the two tables below; never held while paho is called
        self._sending: dict[int, _Sending] = {}
        self._early: dict[int, float] = {}
        self._sweep_s = float("-inf")
        self._measured_s: dict[str, tuple[float, float]] = {}  # when such a chunk was found first, and last
        self._blamed_s: dict[str, float] = {}  # when it was last told whose leftovers were found
        client = self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True)
        client.username_pw_set(username, password)
        client.max_inflight_messages_set(MAX_INFLIGHT)
        client.max_queued_messages_set(MAX_QUEUED)
        client.reconnect_delay_set(BACKOFF_MIN_S, BACKOFF_MAX_S)
        if will is not None:
            client.will_set(will[0], will[1], qos=1)
        if address.tls:
            client.tls_set_context(tls if tls is not None else ssl.create_default_context())
        client.on_pre_connect = self._before_connect
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.connect_timeout = 10.0
        client.connect_async(address.host, address.port, keepalive_s)

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def alive(self) -> bool:
        """Whether the thread runs that keeps the connection up: an error that nobody foresaw ends it."""
        return any(thread.name == f"paho-mqtt-client-{self._client_id}" for thread in threading.enumerate())

    def start(self) -> None:
        """Connect, and go on connecting, in the background."""
        self._client.loop_start()

    def close(self) -> None:
        """Wait, for a few seconds at most, until the broker has what was performed; then say goodbye. Not from `on_event`."""
        if self._connected and self._last is not None:
            with suppress(ValueError, RuntimeError):  # never sent, or the connection ended meanwhile
                self._last.wait_for_publish(FLUSH_S)
        self._client.disconnect()
        self._client.loop_stop()

    def perform(self, effect: Effect) -> None:
        """Carry out an effect; without a connection it is dropped, see above.

        Raises:
            LocalError: a topic or payload that MQTT cannot carry, or more than MAX_QUEUED publishes unacknowledged.
        """
        if not self._connected:
            return
        try:
            match effect:
                case Publish():
                    self._publish(effect)
                case Subscribe(topics):
                    for start in range(0, len(topics), FILTERS_PER_SUBSCRIBE):
                        self._client.subscribe([(topic, 1) for topic in topics[start : start + FILTERS_PER_SUBSCRIBE]])
                case Unsubscribe(topics):
                    for start in range(0, len(topics), FILTERS_PER_SUBSCRIBE):
                        self._client.unsubscribe(list(topics[start : start + FILTERS_PER_SUBSCRIBE]))
        except ValueError as err:
            raise LocalError(f"{type(effect).__name__}: {err}") from err

    def tend(self) -> None:
        """Sweep when it is time; about twice a second."""
        if self._clock() >= self._sweep_s:
            self.sweep()

    def sweep(self) -> None:
        """Clear what devices have had retained: the broker tells of it whoever subscribes, and one that holds nothing says nothing."""
        self._sweep_s = self._clock() + SWEEP_S
        self.perform(Subscribe(FROM_DEVICES))
        self.perform(Unsubscribe(FROM_DEVICES))

    def _publish(self, effect: Publish) -> None:
        payload = effect.payload if isinstance(effect.payload, bytes) else bytes(effect.payload)
        started_s = self._clock()
        info = self._last = self._client.publish(effect.topic, payload, qos=1, retain=effect.retain)
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
            raise LocalError(f"{MAX_QUEUED} publishes wait for the broker: it is far too slow for this fleet")
        with self._lock:
            acked_s = self._early.pop(info.mid, None)
            if acked_s is None:
                self._sending[info.mid] = _Sending(effect.token, started_s, len(payload))
        if acked_s is not None and effect.token is not None:
            self._on_event(Acknowledged(effect.token, started_s, acked_s, len(payload)))

    # ---- on paho's thread -------------------------------------------------------------------------------------------

    def _before_connect(self, client: paho.Client, _data: object) -> None:
        client.drop_out_messages()
        with self._lock:
            self._sending.clear()
            self._early.clear()

    def _on_connect(self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object) -> None:
        if code.is_failure:
            self._refusal = f"the broker refused the coordinator: {code}; check its user name and password"
            return
        self._refusal = None
        self._connected = True
        self._on_event(Connected())

    def _on_connect_fail(self, client: paho.Client, _data: object) -> None:
        self._on_event(Disconnected(f"cannot connect to {client.host}:{client.port}"))

    def _on_disconnect(self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object) -> None:
        self._connected = False
        self._on_event(Disconnected(self._refusal or f"connection lost: {code}", needs_help=self._refusal is not None))

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("dropped a message whose topic is not UTF-8")
            return
        if not message.retain or not any(covers(rule, topic) for rule in FROM_DEVICES):
            self._on_event(Received(topic, bytes(message.payload)))
        elif not self._may_stay(topic):
            self._clear(topic, len(message.payload))

    def _may_stay(self, topic: str) -> bool:
        """Chunks by which a device measures its downlink, for as long as that may take."""
        if not may_retain(topics.device_of(topic) or "", topic):
            return False
        now = self._clock()
        first_s, last_s = self._measured_s.get(topic, (now, now))
        self._measured_s[topic] = (now if now > last_s + 2 * SWEEP_S else first_s), now
        return now < self._measured_s[topic][0] + MEASURE_S

    def _clear(self, topic: str, payload_bytes: int) -> None:
        device, now = topics.device_of(topic) or "?", self._clock()
        self._sweep_s = min(self._sweep_s, now + SWEEP_AGAIN_S)
        if now >= self._blamed_s.get(device, float("-inf")) + BLAME_S:
            self._blamed_s[device] = now
            log.warning(
                "%s has left retained messages at the broker, as no agent does (%s, %d bytes): all that is found is cleared. "
                "Does it go on, shut it out: `regrow fleet revoke %s`, or `regrow device remove %s`",
                *(device, topic, payload_bytes, device, device),
            )
        with suppress(LocalError):  # more than can wait to be sent: the next sweep finds it again
            self._publish(Publish(topic, b"", retain=True))

    def _on_publish(self, _client: paho.Client, _data: object, mid: int, _code: object, _props: object) -> None:
        acked_s = self._clock()
        with self._lock:
            sending = self._sending.pop(mid, None)
            if sending is None:  # faster than `_publish` could note it
                self._early[mid] = acked_s
        if sending is not None and sending.token is not None:
            self._on_event(Acknowledged(sending.token, sending.started_s, acked_s, sending.payload_bytes))

    def _on_subscribe(self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _props: object) -> None:
        if any(code.is_failure for code in codes):
            log.error("the broker refused one of the coordinator's subscriptions: check its access list")


def check_broker(url: str, username: str, password: str) -> None:
    """Return when the broker has let the coordinator in, once; so that nothing is begun with one that will not.

    Raises:
        LocalError: the url is wrong, nothing answers there, or it refuses.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    bus = MqttBus(url, client_id=username, username=username, password=password, on_event=events.put)
    bus.start()
    try:
        said = events.get(timeout=ANSWER_S)
    except queue.Empty:
        said = Disconnected(f"no answer within {ANSWER_S:g} s")
    finally:
        bus.close()
    if isinstance(said, Disconnected):
        raise LocalError(f"--broker: {said.reason}; see that the broker runs, or leave --broker out and one is started here")
