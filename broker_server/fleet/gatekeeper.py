"""Keeps the gateway's doors as the registry says: who is in, who is out, whether enrolment is open, and certificates that run out.

`look` is called about twice a second, so that what `regrow fleet` changes takes effect within a second or so.
"""

from __future__ import annotations

from collections.abc import Mapping

from broker_server.broker import Broker
from broker_server.fleet import coordinator_key, enrolment, members
from broker_server.fleet.authority import Authority
from broker_server.fleet.registry import Device, Registry
from regrow.errors import LocalError

DATES_S = 60.0  # between looks at what runs out


class Gatekeeper:
    """Of one fleet, in the one process that holds its lock.

    Args:
        broker: the one that we run; None: somebody else's, which has its own ways to put a device out.
        enrolling: where devices join.
    """

    def __init__(self, registry: Registry, authority: Authority, broker: Broker | None, enrolling: enrolment.Enrolment) -> None:
        self._registry, self._authority, self._broker, self._enrolment = registry, authority, broker, enrolling
        self._stamp: tuple[int, ...] | None = None
        self._devices: Mapping[str, Device] = registry.devices()
        self._revoked = _revoked(self._devices)
        self._ending: set[str] = set()
        self._dates_s = self._open_s = self._complain_s = float("-inf")

    def look(self, now: float) -> str | None:
        """Do what has become due at monotonic time `now`; returns what happened, for the log, or None.

        Files that do not check out, or belong to somebody else, leave the doors as they are: a fleet at work does not end for them.
        """
        try:
            return self._look(now)
        except (LocalError, OSError) as error:
            if now < self._complain_s:
                return None
            self._complain_s = now + DATES_S
            return f"the fleet's doors stay as they are: {error}"

    def _look(self, now: float) -> str | None:
        said: list[str] = []
        stamp = self._registry.stamp()
        if now >= self._dates_s or stamp != self._stamp:
            said += coordinator_key.finish_if_due(self._registry)
        if now >= self._dates_s:
            self._dates_s = now + DATES_S
            said += self._renew()
        stamp = self._registry.stamp()
        if stamp != self._stamp:
            self._heed(self._registry.devices())
            self._stamp = stamp
        self._end_sessions()
        said += self._open_or_close(now)
        return "; ".join(said) or None

    def close(self) -> None:
        self._enrolment.close()

    def _heed(self, devices: Mapping[str, Device]) -> None:
        """Whoever lost a certificate, or every right, loses the connection too; one that is certified anew comes back by itself."""
        before, self._devices = self._devices, devices
        revoked, known = _revoked(devices), self._revoked
        out = {name for name, device in devices.items() if device.state in ("revoked", "wiped") and before.get(name) != device}
        self._revoked = revoked
        self._ending |= out | {name for name, serials in revoked.items() if serials - known.get(name, set())}
        if self._broker is not None:
            self._broker.reload()

    def _end_sessions(self) -> None:
        if self._broker is None:
            self._ending.clear()
        else:
            self._ending = {name for name in self._ending if not self._broker.end_session(name)}

    def _renew(self) -> list[str]:
        renewed = members.renew_own(self._registry, self._authority)
        if renewed:
            self._enrolment.renew_certificate()
            if self._broker is not None:
                self._broker.reload()
        return renewed

    def _open_or_close(self, now: float) -> list[str]:
        wanted = enrolment.wanted(self._devices)
        if wanted == self._enrolment.is_open or now < self._open_s:
            return []
        if not wanted:
            self._enrolment.close()
            return ["nobody is left to join: enrolment is closed"]
        try:
            self._enrolment.open()
        except LocalError as error:
            self._open_s = now + DATES_S
            return [f"{error}; tried again every {DATES_S:.0f} s"]
        return [f"enrolment is open on {self._enrolment.host}:{self._enrolment.port}"]


def _revoked(devices: Mapping[str, Device]) -> dict[str, set[str]]:
    return {name: {c.serial for c in device.certificates if c.revoked_s is not None} for name, device in devices.items()}
