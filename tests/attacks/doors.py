"""What somebody at a fleet's door may try, told once: on a real mosquitto in test_tls.py, on the embedded broker in test_tls_embedded.py.

An attack counts as stopped when nothing of it is heard by anybody, whatever the broker answers (mosquitto acknowledges a publish that it
forbids). Every attack has its control beside it: the same client, with what it lacks, gets through.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker_server.broker import Broker, Door, Kind
from broker_server.credentials import Credentials
from broker_server.fleet import authority as certificates
from broker_server.fleet import members
from broker_server.fleet.authority import Authority, check_request
from broker_server.fleet.enrolment import Enrolment
from broker_server.fleet.gatekeeper import Gatekeeper
from broker_server.fleet.registry import Registry
from broker_server.transport import MqttBus
from edge_agent import identity
from edge_agent.identity import Identity
from edge_agent.identity_folder import adopt
from edge_agent.transport import MqttLink
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe
from tests.broker_server.scenarios import DEADLINE_S, Rig, received_until, wait_for

HOST = "127.0.0.1"
CLOSED = -1


class DoorRig(Rig):
    """A broker with a fleet's door, two devices in the fleet, and a coordinator that hears everything."""

    def __init__(self, home: Path, kind: Kind) -> None:
        self.home, self.kind = home, kind
        members.init(home / "fleet", "farm", [HOST, "localhost"])
        self.registry, self.authority = Registry(home / "fleet"), Authority(home / "fleet")
        self.credentials = Credentials(home / "secrets")
        self.credentials.add_device("bench")
        self.broker = Broker(home / "broker", self.credentials, kind=kind, door=Door(self.registry, HOST, 0), rng=random.Random(1))
        self.broker.start()
        self.keeper = Gatekeeper(self.registry, self.authority, self.broker, Enrolment(self.registry, self.authority, HOST, 0))
        self.listen()

    @property
    def port(self) -> int:
        assert self.broker.door is not None
        return self.broker.door.port

    def member(self, name: str) -> Identity:
        """A device of the fleet with its identity, as `regrow fleet add --offline` makes it."""
        return join(self.registry, self.authority, name, self.home / f"{name}-{time.monotonic_ns()}")

    def look(self) -> None:
        """What the gateway does twice a second."""
        self.keeper.look(time.monotonic())

    def member_link(self, member: Identity) -> MqttLink:
        url, rng = f"mqtts://{HOST}:{self.port}", random.Random(1)
        link = MqttLink(url, device_id=member.device, password=None, rng=rng, tls=member.tls_context())
        wait_for(link, Connected)
        return link

    def close(self) -> None:
        self.keeper.close()
        super().close()


def door_rig(kind: Kind) -> Callable[..., Iterator[DoorRig]]:
    """The fixture `rig` of a test module, on one kind of broker."""

    @pytest.fixture(scope="module", name="rig")
    def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorRig]:
        rig = DoorRig(tmp_path_factory.mktemp(kind), kind)
        yield rig
        rig.close()

    return rig


def join(registry: Registry, authority: Authority, name: str, folder: Path) -> Identity:
    claim = members.write_claim(registry, name, folder.parent)
    about = adopt(folder, claim)
    asked = identity.request(folder)
    request = check_request(asked.csr, asked.signing_key, asked.proof, name)
    assert about.claim is not None
    return identity.accept(folder, members.enrol(registry, authority, name, about.claim.token, request).encode())


class Raw:
    """MQTT by hand over TLS: says whatever it is told to, and sees what comes back."""

    def __init__(self, rig: DoorRig, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> None:
        raw = socket.create_connection((HOST, rig.port), timeout=DEADLINE_S)
        try:
            self.sock = context.wrap_socket(raw, server_hostname=HOST, session=session)
        except OSError:
            raw.close()
            raise

    def connect(self, client_id: str) -> int:
        """CONNECT without user and password; the broker's code, CLOSED when it just closed."""
        body = b"\x00\x04MQTT\x04\x02\x00\x3c" + _text(client_id)
        return self._ask(b"\x10" + bytes([len(body)]) + body, 4, 3)

    def publish(self, topic: str, payload: bytes) -> bool:
        """At QoS 1; whether it was acknowledged."""
        body = _text(topic) + b"\x00\x07" + payload
        return self._ask(b"\x32" + bytes([len(body)]) + body, 4, 0) == 0x40

    def subscribe(self, topic: str) -> int:
        """The broker's code, 0x80 for a refusal."""
        body = b"\x00\x08" + _text(topic) + b"\x01"
        return self._ask(b"\x82" + bytes([len(body)]) + body, 5, 4)

    def ended(self) -> bool:
        """Whether the broker ends the connection, within the patience of a test."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.sock.recv(4096):
                pass
        return True

    def close(self) -> None:
        self.sock.close()

    def _ask(self, packet: bytes, answer_bytes: int, code_at: int) -> int:
        answer = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.sock.sendall(packet)
            while len(answer) < answer_bytes and (part := self.sock.recv(answer_bytes - len(answer))):
                answer += part
        return answer[code_at] if len(answer) == answer_bytes else CLOSED


def _text(text: str) -> bytes:
    return struct.pack("!H", len(text)) + text.encode()


def get_through(rig: DoorRig, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None = None) -> bool:
    """Try to say something as the device; whether the coordinator hears it."""
    rig.flush()
    topic, word = f"regrow/v1/device/{name}/hello", b"%d" % time.monotonic_ns()
    try:
        raw = Raw(rig, context, session)
    except (ssl.SSLError, ConnectionError):
        return False
    if raw.connect(name) == 0 and raw.publish(topic, word):
        found = [event.payload for event in rig.hear_until(topic, word)] if _delivered(rig, word) else []
        raw.close()
        return word in found
    raw.close()
    return word in [event.payload for event in rig.flush()]


def _delivered(rig: DoorRig, word: bytes) -> bool:
    """Whether a word that was acknowledged arrives, put back for `hear_until` if it does."""
    heard = rig.flush()
    for event in heard:
        rig.heard.put(event)
    return word in [event.payload for event in heard]


# ---- whose certificate is no good ---------------------------------------------------------------------------------------------------


def no_certificate(rig: DoorRig) -> None:
    member = rig.member("none")
    assert not get_through(rig, identity.fleet_context(rig.authority.certificate_pem), "none")
    assert get_through(rig, member.tls_context(), "none")


def an_expired_certificate(rig: DoorRig) -> None:
    assert not get_through(rig, made_context(rig, rig.authority, "old", days=-1), "old")
    assert get_through(rig, rig.member("old").tls_context(), "old")


def a_certificate_of_a_foreign_fleet_with_the_same_name(rig: DoorRig) -> None:
    """Its CA has the same subject to the letter; only the key differs. And the other way round: a device does not believe its broker."""
    mine = rig.registry.fleet()
    foreign = rig.home / f"foreign-{time.monotonic_ns()}"
    members.init(foreign, mine.name, mine.hosts)
    (foreign / "ca.key").unlink()
    certificates.make(foreign, mine.name, mine.id)
    authority = Authority(foreign)
    authority.certify_broker(mine.hosts)
    stranger = join(Registry(foreign), authority, "twin", rig.home / "twin-foreign")
    trusting = identity.fleet_context(rig.authority.certificate_pem)
    trusting.load_cert_chain(stranger.folder / "device.crt", stranger.folder / "device.key")
    assert not get_through(rig, trusting, "twin")
    member = rig.member("twin")
    assert get_through(rig, member.tls_context(), "twin")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_context(foreign), member.tls_context())
    shake_hands(server_context(rig.registry.folder), member.tls_context())


def the_brokers_own_certificate(rig: DoorRig) -> None:
    """A certificate for servers opens no door to clients, and that of a client is no server's."""
    context = identity.fleet_context(rig.authority.certificate_pem)
    context.load_cert_chain(rig.registry.folder / "broker.crt", rig.registry.folder / "broker.key")
    assert not get_through(rig, context, HOST)
    member = rig.member("server")
    posing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    posing.load_cert_chain(member.folder / "device.crt", member.folder / "device.key")
    careless = member.tls_context()
    careless.check_hostname = False
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(posing, careless)
    assert get_through(rig, member.tls_context(), "server")


def a_revoked_certificate(rig: DoorRig) -> None:
    """Two, revoked within the same moment; a new claim lets the device in again."""
    first, second = rig.member("gone"), rig.member("gone2")
    assert get_through(rig, first.tls_context(), "gone")
    assert get_through(rig, second.tls_context(), "gone2")
    for name in ("gone", "gone2"):
        members.revoke(rig.registry, name)
        rig.look()
    assert not get_through(rig, first.tls_context(), "gone")
    assert not get_through(rig, second.tls_context(), "gone2")
    assert get_through(rig, rig.member("other").tls_context(), "other")
    again = rig.member("gone")
    rig.look()
    assert get_through(rig, again.tls_context(), "gone")


def a_replaced_certificate(rig: DoorRig) -> None:
    """The old certificate of a device that has changed its keys, shown anew, or not shown because a TLS session of it is resumed."""
    old = rig.member("rotated")
    context = old.tls_context()
    before = Raw(rig, context)
    assert before.connect("rotated") == 0
    assert before.publish("regrow/v1/device/rotated/hello", b"x")
    session = before.sock.session
    before.close()
    asked = identity.request(old.folder)
    request = check_request(asked.csr, asked.signing_key, asked.proof, "rotated")
    new = identity.accept(old.folder, members.renew(rig.registry, rig.authority, request).encode())
    assert get_through(rig, context, "rotated")  # both hold until the new one is in use
    assert members.in_use(rig.registry, rig.authority, "rotated", new.serial)
    rig.look()
    assert get_through(rig, new.tls_context(), "rotated")
    assert not get_through(rig, context, "rotated", session)
    assert not get_through(rig, context, "rotated")


def revoked_in_mid_session(rig: DoorRig) -> None:
    """The live session hears nothing more, says nothing more and ends; that of another device does not even notice."""
    links = {name: rig.member_link(rig.member(name)) for name in ("bad", "good")}
    for name, link in links.items():
        link.perform(Subscribe((f"regrow/v1/device/{name}/tasks",)))
        rig.publish(Publish(f"regrow/v1/device/{name}/tasks", b"before", retain=True))
        assert received_until(link, f"regrow/v1/device/{name}/tasks")
    members.revoke(rig.registry, "bad")
    began = time.monotonic()
    rig.look()
    rig.publish(Publish("regrow/v1/device/bad/tasks", b"secret"))
    links["bad"].perform(Publish("regrow/v1/device/bad/hello", b"still here"))
    seen: list[object] = []
    wait_for(links["bad"], Disconnected, seen)
    assert time.monotonic() - began < 60
    assert not [event for event in seen if isinstance(event, Received) and event.payload == b"secret"]
    assert b"still here" not in [event.payload for event in rig.flush()]
    links["good"].perform(Publish("regrow/v1/device/good/hello", b"me too", token=5))
    wait_for(links["good"], Acknowledged, seen)
    assert b"me too" in [event.payload for event in rig.flush()]
    assert not [event for event in seen[-3:] if isinstance(event, Disconnected) and links["good"].connected is False]
    rig.publish(*(Publish(f"regrow/v1/device/{name}/tasks", b"", retain=True) for name in links))
    for link in links.values():
        link.close()


def old_protocols(rig: DoorRig) -> None:
    """TLS 1.1, by a client that can speak it: to a server that lets it, it does."""
    member = rig.member("aged")

    def aged(context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        return context

    assert shake_hands(aged(server_context(rig.registry.folder)), aged(member.tls_context())) == "TLSv1.1"
    assert not get_through(rig, aged(member.tls_context()), "aged")
    newer = member.tls_context()
    newer.maximum_version = ssl.TLSVersion.TLSv1_2
    assert get_through(rig, newer, "aged")


# ---- whose certificate is good, and who wants more ----------------------------------------------------------------------------------


def another_devices_topics(rig: DoorRig) -> None:
    """A says something as B and listens to what B is told: nobody hears it, and A hears nothing."""
    a, b = rig.member("a"), rig.member("b")
    raw = Raw(rig, a.tls_context())
    assert raw.connect("a") == 0
    rig.flush()
    for topic in ("regrow/v1/device/b/hello", "regrow/v1/device/b/control", "regrow/v1/t/r/device/b/update/1/0", "regrow/v1/t/claim"):
        raw.publish(topic, b"as b")
    assert raw.publish("regrow/v1/device/a/hello", b"as a")
    heard = [(event.topic, event.payload) for event in rig.flush()]
    assert heard == [("regrow/v1/device/a/hello", b"as a")]
    raw.close()

    listener, owner = rig.member_link(a), rig.member_link(b)
    for topic in ("regrow/v1/device/b/#", "regrow/v1/device/+/tasks", "regrow/v1/t/r/device/b/assignment", "regrow/v1/device/a/tasks"):
        listener.perform(Subscribe((topic,)))
    owner.perform(Subscribe(("regrow/v1/device/b/tasks",)))
    told = ("regrow/v1/device/b/tasks", "regrow/v1/t/r/device/b/assignment")
    rig.publish(*(Publish(topic, b"for b", retain=True) for topic in told))
    assert received_until(owner, "regrow/v1/device/b/tasks")
    rig.publish(Publish("regrow/v1/device/a/tasks", b"for a", retain=True))
    assert set(received_until(listener, "regrow/v1/device/a/tasks")) == {"regrow/v1/device/a/tasks"}
    clear(rig, *told, "regrow/v1/device/a/tasks")
    listener.close()
    owner.close()


def leftovers_that_fill_the_broker(rig: DoorRig) -> None:
    """A device has messages retained without end: on topics that do not exist, and on numbered ones, which the gateway clears."""
    numbered = (
        "regrow/v1/x1/y1/device/hoarder/update/7/0",
        "regrow/v1/x2/y2/device/hoarder/probe",
        "regrow/v1/device/hoarder/promotion/x3",
    )
    unknown = ("regrow/v1/device/hoarder/junk/1", "regrow/v1/device/hoarder/hello/1", "regrow/v1/x/y/device/hoarder/telemetry/1")
    own = Publish("regrow/v1/device/hoarder/control", b"the gateway's own", retain=True)
    link = rig.member_link(rig.member("hoarder"))
    rig.flush()
    for topic in (*unknown, *numbered):
        link.perform(Publish(topic, b"left", retain=True))
    link.perform(Publish("regrow/v1/device/hoarder/hello", b"live"))
    heard = [event.topic for event in rig.hear_until("regrow/v1/device/hoarder/hello", b"live")]
    assert heard == [*numbered, "regrow/v1/device/hoarder/hello"]
    rig.publish(own)
    rig.bus.sweep()
    rig.flush()  # what was retained has come and was answered
    rig.flush()
    link.perform(Subscribe(("regrow/v1/+/+/device/hoarder/#",)))
    link.perform(Subscribe(("regrow/v1/device/hoarder/#",)))
    assert received_until(link, own.topic) == [own.topic]
    link.close()
    clear(rig, own.topic)


def everything(rig: DoorRig) -> None:
    """A subscribes to `#` and hears its own only."""
    link = rig.member_link(rig.member("all"))
    for topic in ("#", "regrow/#", "+/+/+/+/+", "$SYS/#", "regrow/v1/device/all/tasks"):
        link.perform(Subscribe((topic,)))
    rig.publish(
        Publish("regrow/v1/device/b/tasks", b"x", retain=True),
        Publish("regrow/v1/t/r/device/b/receipt", b"x"),
        Publish("regrow/v1/device/all/tasks", b"mine", retain=True),
    )
    assert set(received_until(link, "regrow/v1/device/all/tasks")) == {"regrow/v1/device/all/tasks"}
    clear(rig, "regrow/v1/device/b/tasks", "regrow/v1/device/all/tasks")
    link.close()


def another_devices_client_id(rig: DoorRig) -> None:
    """A calls itself B, or the coordinator: it is A all the same, and neither B nor the coordinator is pushed out."""
    victim = rig.member_link(rig.member("victim"))
    thief = rig.member("thief")
    for name in ("victim", "coordinator"):
        raw = Raw(rig, thief.tls_context())
        assert raw.connect(name) == 0
        rig.flush()
        raw.publish("regrow/v1/device/victim/hello", b"as victim")
        assert raw.publish("regrow/v1/device/thief/hello", b"as thief")
        assert [event.payload for event in rig.flush()] == [b"as thief"]
        raw.close()
    victim.perform(Publish("regrow/v1/device/victim/hello", b"still here", token=9))
    seen: list[object] = []
    wait_for(victim, Acknowledged, seen)
    assert not [event for event in seen if isinstance(event, Disconnected)]
    assert b"still here" in [event.payload for event in rig.flush()]
    victim.close()


def an_oversized_packet(rig: DoorRig) -> None:
    """256 MiB announced: the connection ends before the broker takes it in; one of the size that chunks have gets through."""
    member = rig.member("big")
    raw = Raw(rig, member.tls_context())
    assert raw.connect("big") == 0
    rig.flush()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        raw.sock.sendall(b"\x30\xff\xff\xff\x7f" + _text("regrow/v1/device/big/hello"))
        raw.sock.sendall(bytes(4 * 1024 * 1024))
    assert raw.ended()
    raw.close()
    assert rig.flush() == []
    link = rig.member_link(member)
    link.perform(Publish("regrow/v1/device/big/hello", bytes(256 * 1024), token=3))
    wait_for(link, Acknowledged)
    assert [len(event.payload) for event in rig.flush()] == [256 * 1024]
    link.close()


def a_password_at_the_door(rig: DoorRig) -> None:
    """The coordinator's password, stolen, is of no use without a certificate (mosquitto: the handshake already fails)."""
    context = identity.fleet_context(rig.authority.certificate_pem)
    heard: list[object] = []
    bus = MqttBus(
        f"mqtts://{HOST}:{rig.port}",
        client_id="coordinator",
        username="coordinator",
        password=rig.credentials.coordinator_password,
        on_event=heard.append,
        tls=context,
    )
    bus.start()
    until_s = time.monotonic() + DEADLINE_S
    while not heard and time.monotonic() < until_s:
        time.sleep(0.01)
    bus.close()
    assert heard
    assert not [event for event in heard if isinstance(event, Connected)]
    rig.publish(Publish("regrow/v1/device/x/tasks", b"y"))  # from loopback it is


def a_renewed_certificate_is_shown(rig: DoorRig) -> None:
    """No attack: the broker's new certificate, to new connections, while those that are there go on."""
    member = rig.member("steady")
    link, context = rig.member_link(member), member.tls_context()
    issued = rig.authority.certify_broker(rig.registry.fleet().hosts)
    rig.broker.reload()
    raw, until_s = Raw(rig, context), time.monotonic() + DEADLINE_S
    while serial_shown(raw) != issued.serial and time.monotonic() < until_s:  # a signal takes its time
        raw.close()
        raw = Raw(rig, context)
    assert serial_shown(raw) == issued.serial
    raw.close()
    link.perform(Publish("regrow/v1/device/steady/hello", b"x", token=4))
    seen: list[object] = []
    wait_for(link, Acknowledged, seen)
    assert not [event for event in seen if isinstance(event, Disconnected)]
    link.close()


def serial_shown(raw: Raw) -> str:
    return str((raw.sock.getpeercert() or {}).get("serialNumber", "")).lower().lstrip("0")


# ---- making things ------------------------------------------------------------------------------------------------------------------


def made_context(rig: DoorRig, authority: Authority, name: str, days: int) -> ssl.SSLContext:
    """A client with a certificate of this authority that holds for so many days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority._issue(name, key.public_key(), days, ExtendedKeyUsageOID.CLIENT_AUTH)
    folder = rig.home / f"made-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "crt").write_text(issued.pem)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key").write_bytes(key.private_bytes(*form))
    context = identity.fleet_context(rig.authority.certificate_pem)
    context.load_cert_chain(folder / "crt", folder / "key")
    return context


def server_context(folder: Path) -> ssl.SSLContext:
    """A server with a fleet's broker's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker.crt", folder / "broker.key")
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """A handshake between the two, in memory; returns the protocol. Raises ssl.SSLError, the client's."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=HOST)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        for side in (one, other):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return str(one.version())


def clear(rig: DoorRig, *topics: str) -> None:
    rig.publish(*(Publish(topic, b"", retain=True) for topic in topics))
    rig.flush()


BOTH = [
    an_expired_certificate,
    a_certificate_of_a_foreign_fleet_with_the_same_name,
    the_brokers_own_certificate,
    a_revoked_certificate,
    a_replaced_certificate,
    revoked_in_mid_session,
    old_protocols,
    another_devices_topics,
    leftovers_that_fill_the_broker,
    everything,
    another_devices_client_id,
    an_oversized_packet,
    no_certificate,
]
