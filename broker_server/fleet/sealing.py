"""The gateway's side of sealed work: what leaves is sealed by the coordinator's key, what comes is opened, or not heard.

Retained messages can stay live for longer than their seals hold, so each is sealed and published again when half of that has passed, or
the coordinator has changed its key. The machines behind this know nothing of it: they hear and say the same as without keys.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from broker_server.fleet.registry import Device, Registry
from broker_server.fleet.stamps import CLOCK_MS, LEAP_MS, Stamps, begin_clock, implausible, write_clock
from regrow import seal, topics, wire
from regrow.fleet_time import FleetTime
from regrow.guards import FromCoordinator, FromDevices
from regrow.machine import Disconnected, Event, Note, Payload, Publish, Received

if TYPE_CHECKING:
    from broker_server.fleet.authority import Authority

log = logging.getLogger(__name__)
MOST_STAMP = 2**63  # that can be told of
SHORT_S = 600  # of what is said anew all the time, or waited for now: claims, receipts
LONG_S = 24 * 3600  # of what lies on the broker for whoever comes
RENEW_S = LONG_S / 2


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may speak in a fleet.

    Args:
        signer: gives the coordinator's public key of now, and what signs with it.
        of: device -> the public keys that it may sign with now.
        verify: as in regrow.seal.
    """

    signer: Callable[[], tuple[bytes, seal.Sign]]
    of: Callable[[str], Sequence[bytes]]
    verify: seal.Verify


class Sealing:
    """One process's, from its start to its end.

    Args:
        keys: of the fleet.
        folder: the fleet's.
        role: what this process does; no two at a time have the same.
        now: monotonic seconds, as in every other call.
        wall: the gateway's clock, unix seconds.

    Attributes:
        quiet_s: for so long what devices say may still be refused; `wait` lets it pass.
    """

    def __init__(self, keys: Keys, folder: Path, role: str, now: float, *, wall: Callable[[], float] = time.time) -> None:
        self._keys, self._folder, self._wall = keys, folder, wall
        self._stamps = Stamps(folder, role)
        self.quiet_s = self._stamps.quiet_s
        at_ms, warning = begin_clock(folder, int(1000 * wall()))
        self.time = FleetTime(at_ms, now)
        self._warned = bool(warning)
        if warning:
            log.warning("%s", warning)
        self._devices = FromDevices(keys.of, keys.verify, self._stamps.floors, self._stamps.save)
        self._coordinators = FromCoordinator(None, lambda: (keys.signer()[0],), keys.verify, self.time)
        self._stamp = 0
        self._live: OrderedDict[str, tuple[Payload, float, bytes]] = OrderedDict()  # what, when it was sealed, by which key
        self._save_s = now

    def wait(self) -> None:
        """To be called before listening, for what is refused may not be said again."""
        if self.quiet_s:
            log.warning("a process of this fleet was killed: listening in %.0f s, when devices are past what it heard", self.quiet_s)
            time.sleep(self.quiet_s)

    # ---- what leaves -------------------------------------------------------------------------------------------------------------

    def seal(self, effect: Publish, now: float) -> Publish:
        """The same, sealed where it must be."""
        topic = effect.topic
        if not topics.is_sealed(topic):
            return effect
        self._live.pop(topic, None)
        if not len(effect.payload):
            return effect
        lasts = effect.retain and not topics.is_claim(topic)
        key, sign = self._keys.signer()
        if lasts:
            self._live[topic] = (effect.payload, now, key)
        stamp = self._next_stamp(now)
        expires_s = stamp // 1000 + (LONG_S if lasts else SHORT_S)
        payload = seal.seal(topic, effect.payload, stamp=stamp, expires_s=expires_s, key=key, sign=sign)
        return replace(effect, payload=payload)

    def _next_stamp(self, now: float) -> int:
        wall_ms = int(1000 * self._wall())
        if wall_ms - self.time.at_ms(now) <= LEAP_MS:
            self.time.raise_to(wall_ms, now)
        elif not self._warned:
            self._warned = True
            log.warning("%s", implausible(self.time.at_ms(now), wall_ms, self._folder))
        if now >= self._save_s:  # before anything is sealed with it, the first time
            self._save_clock(now)
        self._stamp = max(self._stamp + 1, self.time.at_ms(now))
        return self._stamp

    def _save_clock(self, now: float) -> None:
        self._save_s = now + CLOCK_MS / 1000
        self.time.raise_to(write_clock(self._folder, self.time.at_ms(now)), now)

    # ---- what comes --------------------------------------------------------------------------------------------------------------

    def open(self, event: Event, now: float) -> Event | None:
        """The same event, its message bare; None: nobody must hear it."""
        if isinstance(event, Disconnected):
            self._live.clear()  # after a reconnect everything that is live is published anew
        if not isinstance(event, Received):
            return event
        return (self._coordinators if topics.device_of(event.topic) is None else self._devices).open(event, now)

    # ---- now and then ------------------------------------------------------------------------------------------------------------

    def tend(self, now: float) -> list[Publish | Note]:
        """To be called every second or so: what must be published, still bare, and what to tell of refusals."""
        due: list[Publish | Note] = []
        key, _ = self._keys.signer()
        for topic, (payload, sealed_s, by) in self._live.items():  # the oldest first
            if by == key and now - sealed_s < RENEW_S:
                break
            due.append(Publish(topic, payload, retain=True))
        for device, stamp in self._devices.behind(now):
            if stamp < MOST_STAMP:
                due.append(Publish(topics.older(device), wire.encode(wire.Older(stamp=stamp))))
        return [*due, *self._devices.refusals.notes(now), *self._coordinators.refusals.notes(now)]

    def close(self, now: float) -> None:
        """Save how far everybody is."""
        self._stamps.save(*self._devices.ended(), clean=True)
        self._save_clock(now)
        self.abandon()

    def abandon(self) -> None:
        """End without that, after an error: the last reservation holds."""
        self._stamps.close()


def sealing_of(registry: Registry, authority: Authority, role: str) -> Sealing:
    """What seals and opens for one process of this fleet.

    Args:
        authority: signs for the coordinator.
        role: as in Sealing.

    Raises:
        LocalError: what earlier lives have saved does not check out.
    """
    from broker_server.fleet.authority import verify

    known: tuple[tuple[int, ...], Mapping[str, Device]] = ((), {})

    def keys_of(device: str) -> tuple[bytes, ...]:
        """As the registry says at this moment: who was put out is not heard any more."""
        nonlocal known
        stamp = registry.stamp()
        if stamp != known[0]:
            known = (stamp, registry.devices())
        return known[1][device].signing_keys if device in known[1] else ()

    return Sealing(Keys(authority.signer, keys_of, verify), registry.folder, role, time.monotonic())
