"""The pip-only broker: amqtt 0.12 in a process of its own, with its sharp edges taken off.

`python -m broker_server.embedded_broker CONFIG` where CONFIG is JSON: host, port, users (path), log (path),
message_limit_bytes, max_connections; and for a fleet, door: {host, port, fleet (its folder)}.
This is the broker of the bench: it has one thread, and nobody but us has looked for holes in it. mosquitto is the one for real use.

What is overridden in amqtt 0.12.1, and why (each was seen in its source; the tests hold the behaviour):
- topic rules and passwords are looked up directly: its plugin calls yield to the loop in the middle of walking the
table of
  subscriptions, and a subscriber that comes or goes then makes it lose the message for everybody;
- on every connect it sends what is retained under *everybody's* filters to the newcomer: only the session's own now;
- it takes a session over, and puts the newcomer into its tables, *before* it looks at the password: now after;
- a second connection with the same client id left the first one open: it is closed now, and its will stays unsaid;
- a will is held against the topic rules, like any other publish;
- it kept what anybody had retained: that is the coordinator's alone, for what devices leave would fill the memory;
- retained messages waited for the client's acknowledgement before anything else of that client was looked at, which on
a slow
  link is a long time: they are sent in the background now;
- nothing bounded a packet, a silent client or a client that does not read: all three end the connection now.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import logging.handlers
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter, WriterAdapter
from amqtt.broker import Broker as AmqttBroker
from amqtt.broker import Server
from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import AMQTTError, MQTTError
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from broker_server.credentials import check_password, may_read, may_retain, may_write
from broker_server.fleet.registry import MEMBERS, Registry
from regrow.errors import LocalError

log = logging.getLogger("regrow.embedded_broker")

CONNECT_TIMEOUT_S = 10.0
LONGEST_KEEPALIVE_S = 300
UNREAD_LIMIT_BYTES = 128 * 1024 * 1024  # waiting for one client that does not read
UNHEARD_LIMIT = 64  # messages of one client that wait for the broker; then the client waits
LOG_BYTES = 1_000_000


class _Quiet(dict[str, Any]):
    """amqtt formats its whole table of subscriptions into a debug line on every SUBSCRIBE, logged or not."""

    def __repr__(self) -> str:
        return f"<{len(self)} filters>"


class _Reader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt is untyped
    """Bytes from one client: bounded in length, in silence, and by how far the broker has fallen behind."""

    def __init__(self, reader: asyncio.StreamReader, limit_bytes: int) -> None:
        super().__init__(reader)
        self._limit_bytes = limit_bytes
        self.silence_s: float | None = None
        self.session: Session | None = None

    async def read(self, n: int = -1) -> bytes:
        if n > self._limit_bytes:
            raise OSError(f"a packet of {n} bytes; the limit is {self._limit_bytes}")
        while self.session is not None and self.session.delivered_message_queue.qsize() > UNHEARD_LIMIT:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(self.silence_s):
                return bytes(await super().read(n))
        except TimeoutError as err:
            raise OSError("silent for longer than its keepalive") from err


class _Writer(StreamWriterAdapter):  # type: ignore[misc]  # amqtt is untyped
    """Bytes to one client; closing never waits for a client that does not read."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__(writer)
        self.is_closed = False
        self.unread_bytes = 0

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._writer.close()

    def abort(self) -> None:
        self.is_closed = True
        self._writer.transport.abort()


class Broker(AmqttBroker):  # type: ignore[misc]  # amqtt is untyped
    """amqtt with the gateway's users, topic rules and bounds.

    Args:
        users: JSON {user: hash of the password}.
        door: (host, port, registry) of a fleet: TLS, where a device shows a certificate or says its password.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        users: Path,
        limit_bytes: int,
        max_connections: int,
        door: tuple[str, int, Registry] | None = None,
    ) -> None:
        listeners = {"default": ListenerConfig(bind=f"{host}:{port}", max_connections=max_connections)}
        if door is not None:
            folder = door[2].folder
            listeners["door"] = ListenerConfig(
                bind=f"{door[0]}:{door[1]}",
                max_connections=max_connections,
                ssl=True,
                cafile=folder / "ca.crt",
                certfile=folder / "broker.crt",
                keyfile=folder / "broker.key",
            )
        super().__init__(BrokerConfig(listeners=listeners, plugins={}))
        self._registry = None if door is None else door[2]
        self._door_context: ssl.SSLContext | None = None
        self._registry_stamp: tuple[int, ...] | None = None
        self._serials: dict[str, set[str]] = {}
        self._subscriptions = _Quiet()
        self._users = users
        self._users_stamp: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}
        self._limit_bytes = limit_bytes
        self._background: set[asyncio.Task[Any]] = set()

    # ---- who --------------------------------------------------------------------------------------------------------

    def _known(self, session: Session) -> bool:
        """Whether name, password and client id belong together, and the will is one that this user may publish."""
        try:
            stat = self._users.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp != self._users_stamp:
                self._hashes = dict(json.loads(self._users.read_bytes()))
                self._users_stamp = stamp
        except (OSError, ValueError) as err:
            log.error("cannot read %s, keeping the users known so far: %s", self._users, err)
        if session.will_flag and not may_write(session.username or "", session.will_topic or ""):
            return False
        if _certificate_of(session)[0]:
            return self._certified(session)
        user, password = session.username, session.password
        if not user or password is None or session.client_id != user or user not in self._hashes:
            return False
        return check_password(password, self._hashes[user])

    def _certified(self, session: Session) -> bool:
        """Whether the certificate that the fleet's CA has signed is still a good one of a device that is in the fleet."""
        registry = self._registry
        if registry is None:
            return False
        try:
            stamp = registry.stamp()
            if stamp != self._registry_stamp:
                devices = registry.devices().items()
                self._serials = {name: {c.serial for c in device.good} for name, device in devices if device.state in MEMBERS}
                self._registry_stamp = stamp
        except (OSError, LocalError) as err:
            log.error("cannot read the fleet, keeping the devices known so far: %s", err)
        name, serial = _certificate_of(session)
        return session.client_id == session.username == name and serial in self._serials.get(name, ())

    def renew_certificate(self) -> None:
        """Show the broker's certificate as it is on the disk now to whoever connects from now on."""
        if self._registry is not None and self._door_context is not None:
            folder = self._registry.folder
            self._door_context.load_cert_chain(folder / "broker.crt", folder / "broker.key")

    async def _create_server_instance(
        self, listener_name: str, listener_type: ListenerType, address: str | None, port: int, ssl_context: ssl.SSLContext | None
    ) -> Any:
        if ssl_context is not None:
            ssl_context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._door_context = ssl_context
        return await super()._create_server_instance(listener_name, listener_type, address, port, ssl_context)

    async def drop_unknown(self) -> None:
        """Close the connections of users who were removed or given another password."""
        for session, handler in list(self._sessions.values()):
            if session.transitions.state == "connected" and not self._known(session):
                log.warning("closing %s: no longer a user", session.client_id)
                await self._close(session, handler)

    async def _authenticate(self, session: Session, _: ListenerConfig) -> bool:  # noqa: ARG002 - amqtt's signature
        return True  # `_handle_client_session` has asked already, before anything was touched

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        user = session.username or ""
        return may_write(user, topic) if action == Action.PUBLISH else may_read(user, topic)

    # ---- connections ------------------------------------------------------------------------------------------------

    async def stream_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        adapter = _Writer(writer)
        try:
            await self._client_connected(listener_name, _Reader(reader, self._limit_bytes), adapter)
        except OSError as err:
            log.warning("connection ended: %s", err)
        finally:
            await adapter.close()
            # What was still to be said (a refusal) gets a moment; a peer that does not read keeps nothing open.
            asyncio.get_running_loop().call_later(CONNECT_TIMEOUT_S, adapter.abort)

    async def _initialize_client_session(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[BrokerProtocolHandler, Session]:
        bounded = _ours(reader)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                handler, session = await super()._initialize_client_session(reader, writer, remote_address, remote_port)
        except (TimeoutError, OSError, ValueError, IndexError) as err:
            raise AMQTTError(f"no CONNECT from {remote_address}: {err}") from err
        seconds = min(session.keep_alive or LONGEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S)
        session.keep_alive = 0  # amqtt only writes a debug line about it; the reader ends the connection
        bounded.silence_s = 1.5 * seconds
        bounded.session = session
        name, _ = _certificate_of(session)
        if name:
            session.username = session.client_id = name  # as mosquitto does: what else it says of itself does not count
        return handler, session

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        if not self._known(client_session):
            log.warning("refused %r at %s", client_session.client_id, client_session.remote_address)
            await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
            await writer.close()
            return
        client_session.clean_session = True  # no session outlives its connection: nothing relies on one, and memory is finite
        old_session, old_handler = self._sessions.get(client_session.client_id or "", (None, None))
        if old_session is not None and old_handler is not None:
            await self._close(old_session, old_handler)
            await super()._delete_session(client_session.client_id or "")
        await super()._handle_client_session(reader, writer, client_session, handler, server, listener_name)

    async def _delete_session(self, client_id: str) -> None:
        """Called before the password was looked at; `_handle_client_session` does it after."""

    async def _close(self, session: Session, handler: BrokerProtocolHandler) -> None:
        session.will_flag = False  # the device is alive, on its newer connection
        if isinstance(handler.writer, _Writer):
            handler.writer.abort()
        await handler.handle_connection_closed()

    # ---- messages ---------------------------------------------------------------------------------------------------

    async def retain_message(
        self, source_session: Session | None, topic_name: str, data: bytes | bytearray, qos: int | None = None
    ) -> None:
        """Keep what the coordinator has retained, and of anybody else hardly anything."""
        if source_session is not None and may_retain(source_session.username or "", topic_name):
            await super().retain_message(source_session, topic_name, data, qos)

    async def _run_broadcast(self, running_tasks: Any) -> None:  # noqa: ARG002 - amqtt's signature
        """Hand one message to everybody who subscribed; nothing in here waits, so nobody is lost on the way."""
        message = await self._broadcast_queue.get()
        topic, data = message["topic"], message["data"]
        served: set[int] = set()  # once each, however many of its filters match, as mosquitto does
        for topic_filter in list(self._subscriptions):
            if self._matches(topic, topic_filter):
                for session, qos in list(self._subscriptions.get(topic_filter, ())):
                    known = session.transitions.state == "connected" and may_read(session.username or "", topic)
                    if known and id(session) not in served:
                        served.add(id(session))
                        self._send(session, topic, data, message.get("qos", qos), retain=False)
        if self._broadcast_queue.qsize() % 32 == 0:
            await asyncio.sleep(0)

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Session) -> None:
        topic_filter, qos = subscription
        if all(session is not subscriber for subscriber, _ in self._subscriptions.get(topic_filter, ())):
            return
        if "+" not in topic_filter and "#" not in topic_filter:
            topics = [topic_filter] if topic_filter in self._retained_messages else []
        else:
            topics = [topic for topic in self._retained_messages if self._matches(topic, topic_filter)]
        for topic in topics:
            retained = self._retained_messages[topic]
            if may_read(session.username or "", topic):
                self._send(session, topic, retained.data, min(qos, retained.qos or 0), retain=True)

    def _send(self, session: Session, topic: str, data: bytes, qos: int, *, retain: bool) -> None:
        """Send in the background; a client that lets too much pile up is cut off."""
        handler = self._get_handler(session)
        writer = handler.writer if handler is not None else None
        if handler is None or not isinstance(writer, _Writer) or writer.is_closed:
            return
        if writer.unread_bytes > UNREAD_LIMIT_BYTES:
            log.warning("closing %s: %d bytes wait for it", session.client_id, writer.unread_bytes)
            writer.abort()
            return
        writer.unread_bytes += len(data)
        task = asyncio.ensure_future(handler.mqtt_publish(topic, data, qos, retain=retain))
        self._background.add(task)

        def done(finished: asyncio.Task[Any]) -> None:
            writer.unread_bytes -= len(data)
            self._background.discard(finished)
            if not finished.cancelled():
                finished.exception()  # a late PUBACK or a client that left: the next connection fetches again

        task.add_done_callback(done)


def _ours(reader: ReaderAdapter) -> _Reader:
    if not isinstance(reader, _Reader):
        raise MQTTError("only TCP listeners are served")
    return reader


def _certificate_of(session: Session) -> tuple[str, str]:
    """(common name, serial) of the certificate that the peer has shown; ("", "") without one."""
    shown = session.ssl_object.getpeercert() if session.ssl_object is not None else None
    if not shown:
        return "", ""
    names = [value for part in shown.get("subject", ()) for field, value in part if field == "commonName"]
    return (names[0] if len(names) == 1 else "?"), str(shown.get("serialNumber", "")).lower().lstrip("0")


def _log_to(path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Says a line per late PUBACK and per client that leaves while something is sent to it.
    logging.getLogger("amqtt.mqtt.protocol.handler").setLevel(logging.ERROR)


async def serve(config: dict[str, Any]) -> None:
    """Run the broker until SIGTERM or SIGINT; SIGHUP looks at the users again and drops those who are none any more."""
    door = config.get("door")
    broker = Broker(
        door=None if door is None else (door["host"], door["port"], Registry(Path(door["fleet"]))),
        host=config["host"],
        port=config["port"],
        users=Path(config["users"]),
        limit_bytes=config["message_limit_bytes"],
        max_connections=config["max_connections"],
    )
    await broker.start()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        broker.renew_certificate()
        task = loop.create_task(broker.drop_unknown())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
    # In memory, no persistence, no durable sessions: there is nothing to flush, and a client that hangs must not
    # delay the end.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            await broker.shutdown()


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_bytes())
    _log_to(Path(config["log"]))
    asyncio.run(serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
