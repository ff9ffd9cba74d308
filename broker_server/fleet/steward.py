"""Speaks to the devices for the fleet: what each shall do, and the certificates that it asks for. A machine beside the coordinator's.

What a device shall do stands in the registry, and the retained message says nothing else, so it is published anew after every reconnect
and whenever the registry changes, and nothing is lost by being said twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from broker_server.durable import write_private
from broker_server.fleet import coordinator_key, members
from broker_server.fleet.authority import Authority, check_request
from broker_server.fleet.registry import MEMBERS, Device, Registry, now_s, read_seen
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Disconnected, Effect, Event, Note, Publish, Received, Standing, Subscribe

log = logging.getLogger(__name__)
LOOK_S = 1.0
SEEN_S = 30.0  # between two writings of who was heard of, unless one does something else now
_HEARD = ("control-report", "certificate-request")
_ACTIONS = {"active": "work", "paused": "pause", "draining": "drain", "wiping": "wipe"}


class Steward:
    """One fleet's. `step` takes every event of the link; whoever owns the link carries the effects out.

    Args:
        speaks: this process is the one that speaks for the fleet; another one only tells its own coordinator who rests.
        clock: unix seconds.
    """

    def __init__(self, registry: Registry, authority: Authority, *, speaks: bool = True, clock: Callable[[], int] = now_s) -> None:
        self._registry, self._authority, self._speaks, self._clock = registry, authority, speaks, clock
        self._connected = False
        self._look_s = self._seen_due_s = float("-inf")
        self._stamp: tuple[int, ...] | None = None
        self._standing: Standing | None = None
        self._said: dict[str, wire.Message] = {}  # by topic
        self._seen = read_seen(registry.folder)
        self._seen_changed = self._seen_later = False

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002 - a fleet is not a task's
        """Take an event in, or None for the time alone."""
        effects: list[Effect] = []
        if isinstance(event, Connected):
            self._connected, self._stamp, self._look_s = True, None, now
            self._said.clear()
            if self._speaks:
                effects.append(Subscribe((topics.control_report("+"), topics.certificate_request("+"))))
        elif isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Received) and self._speaks:
            self._notice(event.topic)
            effects += self._hear(event)
        if now >= self._look_s:
            self._look_s = now + LOOK_S
            effects += self._look(now)
        return effects

    # ---- saying ---------------------------------------------------------------------------------------------------------------------

    def _look(self, now: float) -> list[Effect]:
        if self._seen_changed or (self._seen_later and now >= self._seen_due_s):
            self._seen_due_s, self._seen_changed, self._seen_later = now + SEEN_S, False, False
            write_private(self._registry.folder / "seen.json", json.dumps(self._seen, indent=1).encode())
        stamp = self._registry.stamp()
        if stamp == self._stamp:
            return []
        try:
            devices = self._registry.devices()
            said = self._say(devices) if self._connected and self._speaks else []
        except LocalError as error:
            log.error("%s", error)
            return []
        if self._connected:
            self._stamp = stamp
        standing = standing_of(devices)
        if standing == self._standing:
            return said
        self._standing = standing
        return [standing, *said]

    def _say(self, devices: dict[str, Device]) -> list[Effect]:
        in_fleet = {name: device for name, device in devices.items() if device.state in MEMBERS}
        wanted: dict[str, wire.Message] = {topics.control(name): control_of(device) for name, device in in_fleet.items()}
        keys = coordinator_key.announced(self._registry, self._authority)
        if keys is not None:
            wanted |= {topics.coordinator_keys(name): keys for name in in_fleet}
        effects: list[Effect] = []
        for topic, message in wanted.items():
            if self._said.get(topic) != message:
                effects.append(Publish(topic, wire.encode(message), retain=True))
        effects += [Publish(topic, b"", retain=True) for topic in self._said if topic not in wanted]
        self._said = wanted
        return effects

    def _notice(self, topic: str) -> None:
        """Whatever a device says, it is there."""
        known = self._seen.get(topics.device_of(topic) or "")
        if known is not None:
            known["seen_s"], self._seen_later = self._clock(), True

    # ---- hearing --------------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Received) -> list[Effect]:
        found = topics.parse_of_device(event.topic, _HEARD)
        if found is None or not event.payload:
            return []
        device, kind = found
        try:
            if kind == "control-report":
                return self._take_report(device, wire.decode(event.payload, wire.ControlReport)[0])
            return self._certify(device, wire.decode(event.payload, wire.CertificateRequest)[0])
        except (LocalError, PeerError) as error:
            log.warning("%s: %s", device, error)
            return []

    def _take_report(self, device: str, report: wire.ControlReport) -> list[Effect]:
        known = self._registry.devices().get(device)
        if known is None:
            return []
        said = {"doing": report.doing, "serial": report.serial.hex().lstrip("0")}
        news = {name: self._seen.get(device, {}).get(name) for name in said} != said
        self._seen_changed, self._seen_later = self._seen_changed or news, True
        self._seen[device] = {"seen_s": self._clock(), **said}
        if report.doing == "wiped":
            members.wiped(self._registry, self._authority, device)
        else:
            members.in_use(self._registry, self._authority, device, report.serial.hex().lstrip("0"))
            coordinator_key.heard(self._registry, device, report.keys)
        return [Note("device", {"device": device, "doing": report.doing})]

    def _certify(self, device: str, asked: wire.CertificateRequest) -> list[Effect]:
        try:
            request = check_request(asked.csr, asked.signing_key, asked.proof, device)
            pem = members.renew(self._registry, self._authority, request)
        except PeerError as error:
            log.warning("%s gets no certificate: %s", device, error)
            return [Publish(topics.certificate(device), wire.encode(wire.Certificate(reason=str(error)[:900])))]
        log.warning("%s has been certified anew", device)
        return [Publish(topics.certificate(device), wire.encode(wire.Certificate(certificate=pem.encode())))]


def control_of(device: Device) -> wire.Control:
    """What the registry says that a device of the fleet shall do."""
    serial = b"" if device.replace is None else serial_bytes(device.replace)
    return wire.Control(number=device.number, action=_ACTIONS[device.state], replace=serial)


def standing_of(devices: dict[str, Device]) -> Standing:
    """Who of the fleet gets no new work: those told so, and those that are out of it."""
    draining = frozenset(name for name, device in devices.items() if device.state == "draining")
    paused = frozenset(name for name, device in devices.items() if device.state not in ("active", "draining"))
    return Standing(paused, draining)


def serial_bytes(serial: str) -> bytes:
    """A serial as it travels."""
    return bytes.fromhex(serial.zfill(len(serial) + len(serial) % 2))


@contextmanager
def speaking_for(registry: Registry) -> Iterator[bool]:
    """Whether this process is the one that speaks for the fleet, for as long as the block takes."""
    with (registry.folder / "speaker.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
