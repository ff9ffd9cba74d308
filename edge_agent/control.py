"""What the fleet tells a device beside its tasks: to rest, to change its keys, to remove everything. A machine on the device's link.

The message is retained and says what holds now, so hearing it twice changes nothing, and what was missed is heard with the next
connection. A wipe is the one thing that is remembered here: once heard it goes on through power cuts and without the gateway, in this
order: what the device has learnt and fetched, the report, the keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edge_agent import identity as identities
from edge_agent import identity_folder
from edge_agent.identity import Identity
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Acknowledged, Connected, Disconnected, Effect, Event, Finished, Publish, Received, Subscribe, Told

log = logging.getLogger(__name__)
RENEW_S = 365 * 86400 / 3  # of a certificate's year left, and it is replaced
ASK_AGAIN_S = 60.0
WIPE_PATIENCE_S = 600.0  # so long a device that was told to wipe tries to report before the keys go
_WIPED_TOKEN = 1 << 41
_DOING = {"work": "working", "pause": "paused"}


class Body(Protocol):
    """What this needs of the agent."""

    @property
    def busy(self) -> bool:
        """There is a job or an update on its way."""

    @property
    def cleared(self) -> bool:
        """`clear` has removed everything."""

    def clear(self) -> None:
        """Begin to remove what the device has learnt and fetched; nothing is trained, fetched or saved any more."""

    def change(self, identity: Identity) -> None:
        """Speak as this identity from now on."""


class Control:
    """One agent's.

    Args:
        identity: who the device is.
        body: the agent.
        wall: the fleet's time, unix seconds.
    """

    def __init__(self, identity: Identity, body: Body, wall: Callable[[], float]) -> None:
        self._identity, self._body, self._wall = identity, body, wall
        self._connected = False
        self._control = wire.Control(number=1, action="work")
        self._heard = 0
        self._reported: wire.ControlReport | None = None
        self._ask_s = float("-inf")
        self._wiping = identity_folder.is_wiping(identity.folder)
        self._wipe_until_s: float | None = None
        self._told = self._over = False

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """Take an event in, or None for the time alone."""
        effects: list[Effect] = []
        device = self._identity.device
        if isinstance(event, Connected):
            self._connected, self._reported, self._ask_s = True, None, now
            effects.append(
                Subscribe((topics.control(device), topics.certificate(device), topics.coordinator_keys(device), topics.older(device)))
            )
        elif isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Acknowledged) and event.token == _WIPED_TOKEN:
            self._told = True
        elif isinstance(event, Received) and event.payload:
            try:
                effects += self._hear(event)
            except PeerError as error:
                log.warning("refused: %s", error)
        return [*effects, *(self._wipe(now) if self._wiping else self._go_on(now))]

    def _hear(self, event: Received) -> list[Effect]:
        device = self._identity.device
        if event.topic == topics.control(device):
            return self._take(wire.decode(event.payload, wire.Control)[0])
        if event.topic == topics.coordinator_keys(device) and not self._wiping:
            self._believe(wire.decode(event.payload, wire.CoordinatorKeys)[0])
        if event.topic == topics.certificate(device) and not self._wiping:
            self._change(wire.decode(event.payload, wire.Certificate)[0])
        return []

    def _take(self, control: wire.Control) -> list[Effect]:
        if control.number < self._heard or self._wiping:
            return []
        before, self._control, self._heard = self._control, control, control.number
        if control.action == "wipe":
            log.warning("the fleet has this device wiped")
            identity_folder.begin_wipe(self._identity.folder)
            self._wiping = True
            return []
        if control.action == before.action:
            return []
        log.warning("the fleet tells this device to %s", control.action)
        return [Told(control.action)]

    def _go_on(self, now: float) -> list[Effect]:
        """Report what is new, and see to the certificate."""
        if not self._connected:
            return []
        effects: list[Effect] = []
        report = wire.ControlReport(number=self._heard, doing=self._doing(), serial=_serial(self._identity), keys=self._keys)
        if report != self._reported:
            self._reported = report
            effects.append(Publish(topics.control_report(self._identity.device), wire.encode(report)))
        if now >= self._ask_s and self._is_due():
            self._ask_s = now + ASK_AGAIN_S
            asked = identities.request(self._identity.folder)
            message = wire.CertificateRequest(csr=asked.csr, signing_key=asked.signing_key, proof=asked.proof)
            effects.append(Publish(topics.certificate_request(self._identity.device), wire.encode(message)))
        return effects

    @property
    def _keys(self) -> int:
        return self._identity.about.keys_number

    def _doing(self) -> str:
        return _DOING.get(self._control.action) or ("finishing" if self._body.busy else "drained")

    # ---- keys -----------------------------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        asked = self._control.replace.hex().lstrip("0")
        return asked == self._identity.serial or self._wall() > self._identity.not_after_s - RENEW_S

    def _believe(self, said: wire.CoordinatorKeys) -> None:
        """Whoever may speak now says who may from now on; the seal was looked at where it came in (edge_agent.sealing)."""
        if self._identity.believe(said.keys, said.number):
            log.warning("the coordinator's keys are now %s", ", ".join(key.hex()[:16] for key in said.keys))

    def _change(self, answer: wire.Certificate) -> None:
        if not answer.certificate:
            log.warning("no new certificate: %s", answer.reason)
        elif identities.is_pending(self._identity.folder):
            self._identity = identities.accept(self._identity.folder, answer.certificate)
            log.warning("changed to new keys, certificate %s", self._identity.serial)
            self._body.change(self._identity)

    # ---- the end --------------------------------------------------------------------------------------------------------------------

    def _wipe(self, now: float) -> list[Effect]:
        if self._wipe_until_s is None:
            self._wipe_until_s = now + WIPE_PATIENCE_S
            self._body.clear()
            return [Told("pause")]
        if not self._body.cleared or self._over:
            return []
        if self._told or now >= self._wipe_until_s:
            try:
                identity_folder.wipe(self._identity.folder)
            except LocalError as error:
                log.error("%s", error)
            self._over = True
            return [Finished("wiped by its fleet")]
        report = wire.ControlReport(number=max(self._heard, 1), doing="wiped", serial=_serial(self._identity), keys=self._keys)
        if not self._connected or report == self._reported:
            return []
        self._reported = report
        return [Publish(topics.control_report(self._identity.device), wire.encode(report), token=_WIPED_TOKEN)]


def _serial(identity: Identity) -> bytes:
    return bytes.fromhex(identity.serial.zfill(len(identity.serial) + len(identity.serial) % 2))
