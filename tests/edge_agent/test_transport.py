"""The device's link: against a real amqtt child, and against peers that misbehave."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.retry import FIRST_CEILING_S, REFUSALS, TAKEOVERS, WAIT_MAX_S, Retry
from edge_agent.transport import MqttLink
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Publish, Received, Subscribe, Unsubscribe
from tests.broker_server.scenarios import DEADLINE_S, Rig, received_until, rig_on, wait_for

CONNACK = b"\x20\x02\x00\x00"
# Made for this test: localhost, valid for a hundred years, worth nothing.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUMqkaOliwxZOcwoMA6xAdg+JOQk4wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA0MjE0OVoYDzIxMjYxMDI4
MDQyMTQ5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASySxPTub4+nodyaR8yVFR3gx5omA2iBRVDjc3UR8wOyo2VWeTGzmiX
i1uTrBakcAanAEmgcUZ0HGqD2hr3jx53o28wbTAdBgNVHQ4EFgQUCSYSheWWpQJk
ffsg3HqHvEdkIykwHwYDVR0jBBgwFoAUCSYSheWWpQJkffsg3HqHvEdkIykwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhALObf1imu1bd2TAwDdIdZBDmwUB411I4MXgrp8l0s5PuAiEA
m8jCf7uIN7RFBHwAd4XLMHnhTIXsRKEjysMLN2E8vDI=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRfTgHvGdeqBfC5YJ
zMVyD33cEKzCMMNkvz3Y+KJcoB+hRANCAASySxPTub4+nodyaR8yVFR3gx5omA2i
BRVDjc3UR8wOyo2VWeTGzmiXi1uTrBakcAanAEmgcUZ0HGqD2hr3jx53
-----END PRIVATE KEY-----
"""


rig = rig_on("amqtt")


class Peer:
    """Something that listens on a port and does what a test says with each connection."""

    def __init__(self, serve: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt{'s' if tls else ''}://127.0.0.1:{self.server.getsockname()[1]}"
        self.finished = threading.Event()

        def run() -> None:
            while not self.finished.is_set():
                with contextlib.suppress(OSError):
                    sock, _ = self.server.accept()
                    sock.settimeout(DEADLINE_S)
                    with tls.wrap_socket(sock, server_side=True) if tls else sock as wrapped:
                        serve(wrapped)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.finished.set()
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(DEADLINE_S)


def make_link(url: str, **options: object) -> MqttLink:
    given: dict[str, object] = {"device_id": "d0", "password": "p", "rng": random.Random(1), **options}
    return MqttLink(url, **given)  # type: ignore[arg-type]


def packet(sock: socket.socket) -> tuple[int, bytes]:
    """One MQTT packet: its first byte and its body."""
    stream = sock.makefile("rb", buffering=0)

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = stream.read(count - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    kind, length, shift = exactly(1)[0], 0, 0
    while True:
        (digit,) = exactly(1)
        length |= (digit & 127) << shift
        shift += 7
        if digit < 128:
            return kind, exactly(length)


def test_messages_and_acknowledgements_go_round(rig: Rig) -> None:
    link = rig.link("d0")
    assert link.connected
    link.perform(Subscribe(tuple(f"regrow/v1/t/r/chunk/1/{i}" for i in range(40))))  # more than one SUBSCRIBE holds
    payload = random.Random(1).randbytes(100_000)
    link.perform(Publish("regrow/v1/t/r/device/d0/update/1/0", memoryview(payload), token=7))
    event = wait_for(link, Acknowledged)
    assert isinstance(event, Acknowledged)
    assert (event.token, event.sent_bytes) == (7, 100_000)
    assert event.started_s < event.acked_s <= time.monotonic()
    assert rig.hear_until("regrow/v1/t/r/device/d0/update/1/0", payload)
    rig.publish(Publish("regrow/v1/t/r/chunk/1/39", payload))
    assert wait_for(link, Received) == Received("regrow/v1/t/r/chunk/1/39", payload)
    link.perform(Unsubscribe(tuple(f"regrow/v1/t/r/chunk/1/{i}" for i in range(40))))
    link.perform(Subscribe(("regrow/v1/device/d0/tasks",)))
    rig.publish(Publish("regrow/v1/t/r/chunk/1/39", b"x"), Publish("regrow/v1/device/d0/tasks", b"x", retain=True))
    assert received_until(link, "regrow/v1/device/d0/tasks")[-1] == "regrow/v1/device/d0/tasks"
    assert 200_000 > link.bytes_up > 100_000
    assert 200_000 > link.bytes_down > 100_000
    rig.publish(Publish("regrow/v1/device/d0/tasks", b"", retain=True))
    link.close()


def test_a_clean_close_keeps_the_will_unsaid(rig: Rig) -> None:
    rig.flush()
    link = rig.link("d1", will=("regrow/v1/device/d1/status", b"lost"))
    link.perform(Publish("regrow/v1/device/d1/hello", b"x"))
    link.close()
    assert [event.topic for event in rig.hear_until("regrow/v1/device/d1/hello", b"x")] == ["regrow/v1/device/d1/hello"]
    other = rig.link("d2", will=("regrow/v1/device/d2/status", b"lost"))
    other._drop()  # as a power cut does
    heard = rig.hear_until("regrow/v1/device/d2/status", b"lost")
    assert [event.topic for event in heard] == ["regrow/v1/device/d2/status"]
    other.close()


def test_a_wrong_password_says_what_to_do_and_backs_off(rig: Rig) -> None:
    link = make_link(rig.broker.url, password="wrong")
    event = wait_for(link, Disconnected)
    assert isinstance(event, Disconnected)
    assert "refused" in event.reason
    assert "bundle" in event.reason
    assert link.retry_at_s > time.monotonic()
    assert not link.connected
    link.close()


def test_what_mqtt_cannot_carry_is_our_fault(rig: Rig) -> None:
    link = rig.link("d0")
    for effect in (Publish("a/#", b""), Publish("", b""), Subscribe(("a/#/b",)), Subscribe(("",))):
        with pytest.raises(LocalError):
            link.perform(effect)
    assert link.connected
    link.close()


def test_a_paced_link_keeps_its_rate_and_its_pings(rig: Rig) -> None:
    """The keepalive's ping falls due in the middle of a chunk, waits for its end, and the connection lives on."""
    link = rig.link("d0", max_uplink_bps=200_000, max_downlink_bps=400_000, keepalive_s=2)
    link.perform(Subscribe(("regrow/v1/t/r/chunk/1/0",)))
    for token, size in enumerate((62_500, 12_500)):
        link.perform(Publish("regrow/v1/t/r/device/d0/update/1/0", bytes(size), token=token))
    events = []
    started_s = time.monotonic()
    while sum(isinstance(event, Acknowledged) for event in events) < 2:
        events += link.poll(1.0)
        assert time.monotonic() < started_s + DEADLINE_S
    first, second = (event for event in events if isinstance(event, Acknowledged))
    assert 2.49 <= first.acked_s - first.started_s <= 3.0
    assert 2.99 <= second.acked_s - first.started_s <= 3.6
    assert first.started_s + 2.45 <= second.started_s <= first.acked_s
    rig.publish(Publish("regrow/v1/t/r/chunk/1/0", bytes(20_000)))
    started_s = time.monotonic()
    wait_for(link, Received)
    assert 0.3 <= time.monotonic() - started_s <= 0.8
    assert not any(isinstance(event, Disconnected) for event in events)
    link.close()


def test_nothing_of_a_dead_connection_is_sent_on_the_next() -> None:
    seen: list[list[int]] = []

    def swallow(sock: socket.socket) -> None:
        kinds: list[int] = []
        seen.append(kinds)
        kinds.append(packet(sock)[0] >> 4)
        sock.sendall(CONNACK)
        kinds.append(packet(sock)[0] >> 4)  # the first publish, or what comes first on the second connection

    peer = Peer(swallow)
    link = make_link(peer.url)
    wait_for(link, Connected)
    for token in range(20):
        link.perform(Publish("a", bytes(1000), token=token))
    wait_for(link, Disconnected)
    link.perform(Publish("a", b"between", token=99))
    wait_for(link, Connected)
    link.perform(Subscribe(("b",)))
    wait_for(link, Disconnected)
    assert seen[:2] == [[1, 3], [1, 8]]
    link.close()
    peer.close()


def test_a_silent_peer_counts_as_dead() -> None:
    hang_up = threading.Event()

    def silent(sock: socket.socket) -> None:
        packet(sock)
        sock.sendall(CONNACK)
        hang_up.wait(DEADLINE_S)

    peer = Peer(silent)
    link = make_link(peer.url, keepalive_s=1)
    wait_for(link, Connected)
    connected_s = time.monotonic()
    event = wait_for(link, Disconnected)
    assert isinstance(event, Disconnected)
    assert "lost" in event.reason
    assert 1.9 <= time.monotonic() - connected_s <= 5.0
    hang_up.set()
    link.close()
    peer.close()


def test_a_slow_download_is_a_sign_of_life() -> None:
    """No ping is answered for three keepalives, for a chunk is in the way; a byte now and then comes."""
    hang_up = threading.Event()

    def trickle(sock: socket.socket) -> None:
        packet(sock)
        sock.sendall(CONNACK + b"\x30\x0c\x00\x01b")
        for _ in range(9):
            hang_up.wait(0.35)
            sock.sendall(b"x")
        assert packet(sock)[0] == 0xC0  # pings did come

    peer = Peer(trickle)
    link = make_link(peer.url, keepalive_s=1)
    wait_for(link, Connected)
    assert link.poll(DEADLINE_S) == [Received("b", b"x" * 9)]
    hang_up.set()
    link.close()
    peer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x20",
        b"\x20\x02\x00\x09",
        b"\x20\x00",
        b"\xff\xff\xff\xff\xff\xff",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        CONNACK + b"\x32\x00",
        CONNACK + b"\x32\x03\x00\xff\x00",
        CONNACK + b"\x32\x05\x00\x01\xff\x00\x01",
        CONNACK + b"\x30\xff\xff\xff\x7f" + bytes(1000),
        CONNACK + b"\x40\x00",
        CONNACK + b"\x40\x02\xff\xff",
        CONNACK + b"\x90\x01\x00",
        CONNACK + b"\x90\x03\x00\x01\x77",
        CONNACK + b"\xb0\x00",
        CONNACK + b"\xf0\x00",
        CONNACK + b"\x36\x05\x00\x01a\x00\x01",
        CONNACK + CONNACK,
    ],
)
def test_whatever_the_network_says_nothing_raises(answer: bytes) -> None:
    def say(sock: socket.socket) -> None:
        packet(sock)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass

    peer = Peer(say)
    link = make_link(peer.url)
    assert isinstance(wait_for(link, Disconnected), Disconnected)
    link.close()
    peer.close()


def test_random_bytes_never_raise() -> None:
    rng = random.Random(5)

    def say(sock: socket.socket) -> None:
        packet(sock)
        sock.sendall(CONNACK + rng.randbytes(200))

    peer = Peer(say)
    for seed in range(60):
        link = make_link(peer.url, rng=random.Random(seed))
        assert isinstance(wait_for(link, Disconnected), Disconnected)
        link.close()
    peer.close()


def test_waits_are_jittered_and_grow_with_the_outage() -> None:
    closed = socket.create_server(("127.0.0.1", 0))
    url = f"mqtt://127.0.0.1:{closed.getsockname()[1]}"
    closed.close()

    def delays(seed: int) -> list[float]:
        now = [0.0]
        link = make_link(url, rng=random.Random(seed), clock=lambda: now[0])
        found = []
        until_s = time.monotonic() + DEADLINE_S
        while len(found) < 25 and time.monotonic() < until_s:
            if any(isinstance(event, Disconnected) for event in link.poll(0)):
                found.append(link.retry_at_s - now[0])
                now[0] = link.retry_at_s
        link.close()
        return found

    first, second = delays(1), delays(2)
    assert len(first) == len(second) == 25
    assert max(first[:3] + second[:3]) <= FIRST_CEILING_S
    assert max(first) > 2 * FIRST_CEILING_S
    assert set(first).isdisjoint(second)


def test_two_agents_with_one_bundle_say_so_and_stop_fighting(rig: Rig) -> None:
    pair = (rig.link("d8"), rig.link("d8"))
    reasons: list[str] = []
    until_s = time.monotonic() + DEADLINE_S
    while not any("another agent" in reason for reason in reasons) and time.monotonic() < until_s:
        for link in pair:
            reasons += [event.reason for event in link.poll(0.02) if isinstance(event, Disconnected)]
    assert "another agent, or a meter, logs in with the bundle of 'd8': stop one of the two" in reasons[-1]
    assert "regrow device add NAME" in reasons[-1]
    assert "Or the gateway's broker is full" in reasons[-1]
    assert len(reasons) < 2 * TAKEOVERS
    assert max(link.retry_at_s for link in pair) - time.monotonic() > WAIT_MAX_S / 2 - 1
    for link in pair:
        link.close()


def test_two_agents_with_one_identity_hear_of_identities() -> None:
    said = Retry(random.Random(1), 0.0).suspicion("d8", 30.0, certified=True)
    assert "another agent runs with the identity of 'd8': stop one of the two" in said
    assert "Or the gateway's broker is full" in said
    assert ("regrow fleet add NAME" in said, "regrow fleet revoke d8" in said, "bundle" in said) == (True, True, False)


@pytest.mark.parametrize("asks_for_ours", [True, False], ids=["alert", "closes"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_certificate_that_the_broker_refuses_is_told_as_that(tmp_path: Path, asks_for_ours: bool, version: ssl.TLSVersion) -> None:
    tls = server_context(tmp_path)
    tls.maximum_version = version
    if asks_for_ours:
        tls.verify_mode = ssl.CERT_REQUIRED  # and it trusts nobody

    def hang_up(sock: socket.socket) -> None:
        packet(sock)

    peer, said = Peer(hang_up, tls=tls), {}
    for password in (None, "p"):
        trusting = ssl.create_default_context(cadata=CERTIFICATE)
        trusting.load_cert_chain(tmp_path / "both.pem")
        link = make_link(peer.url, tls=trusting, password=password)
        said[password] = [event for _ in range(REFUSALS) if isinstance(event := wait_for(link, Disconnected), Disconnected)]
        link.close()
    peer.close()
    assert said[None][-1].needs_help
    assert said[None][-1].reason.startswith("the gateway refuses this device's certificate: revoked, expired, or of another fleet; ")
    assert not any(event.needs_help for event in said["p"])


def server_context(folder: Path) -> ssl.SSLContext:
    (folder / "both.pem").write_text(KEY + CERTIFICATE)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "both.pem")
    return tls


def test_a_peer_that_never_answers_is_given_up() -> None:
    """Time is ours here: the ten seconds pass at once."""
    hang_up = threading.Event()
    peer = Peer(lambda _: hang_up.wait(DEADLINE_S) and None)
    offset = [0.0]
    link = make_link(peer.url, clock=lambda: time.monotonic() + offset[0])
    until_s = time.monotonic() + DEADLINE_S
    while link.bytes_up == 0 and time.monotonic() < until_s:
        assert link.poll(0.05) == []
    offset[0] = 10.5
    event = wait_for(link, Disconnected)
    assert isinstance(event, Disconnected)
    assert "no MQTT answer" in event.reason
    hang_up.set()
    link.close()
    peer.close()


def test_wake_ends_a_poll_from_another_thread(rig: Rig) -> None:
    link = rig.link("d0")
    thread = threading.Timer(0.05, link.wake)
    started_s = time.monotonic()
    thread.start()
    assert link.poll(30.0) == []
    assert time.monotonic() - started_s < 5.0
    thread.join()
    link.close()
    link.wake()  # after close: nobody listens, nothing breaks


@pytest.mark.parametrize("rate_bps", [None, 2_000_000.0])
def test_tls(tmp_path: Path, rate_bps: float | None) -> None:
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    message = struct.pack("!H", 1) + b"b" + bytes(40_000)

    def serve(sock: socket.socket) -> None:
        packet(sock)
        sock.sendall(CONNACK)
        kind, body = packet(sock)
        assert kind == 0x32
        sock.sendall(b"\x40\x02" + body[3:5])
        sock.sendall(b"\x30" + bytes((len(message) & 127 | 128, len(message) >> 7 & 127 | 128, len(message) >> 14)))
        sock.sendall(message)
        packet(sock)

    peer = Peer(serve, server)
    trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    link = make_link(peer.url, tls=trusting, max_uplink_bps=rate_bps, max_downlink_bps=rate_bps)
    wait_for(link, Connected)
    link.perform(Publish("a", bytes(30_000), token=1))
    seen: list[object] = []
    event = wait_for(link, Acknowledged, seen)
    assert isinstance(event, Acknowledged)
    received = next((event for event in seen if isinstance(event, Received)), None) or wait_for(link, Received)
    assert received == Received("b", bytes(40_000))
    if rate_bps is not None:
        assert event.acked_s - event.started_s >= 30_000 * 8 / rate_bps
    link.close()
    stranger = make_link(peer.url)  # does not trust the certificate
    event = wait_for(stranger, Disconnected)
    assert isinstance(event, Disconnected)
    assert "certificate" in event.reason.lower()
    stranger.close()
    peer.close()
