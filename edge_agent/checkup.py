"""Answers the gateway when it asks what ails this device: a companion of the device's machine, on the agent's own link.

The checks run on threads of their own, beside training; the broker's rights are tried meanwhile on the link that is there. One question at
a time; one that comes again is answered with what was found.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from edge_agent.doctor.rights import Rights
from regrow import topics, wire
from regrow.errors import PeerError
from regrow.findings import Finding
from regrow.machine import Connected, Effect, Event, Publish, Received, Subscribe

log = logging.getLogger(__name__)


class Checkup:
    """One device's.

    Args:
        device: its name.
        examine: all other checks; is given the gateway's clock as a function, takes some seconds and raises nothing.
        offered_bytes: what it gives to training.
    """

    def __init__(
        self, device: str, examine: Callable[[Callable[[], float]], Sequence[Finding]], offered_bytes: Callable[[], int | None]
    ) -> None:
        self._device, self._examine, self._offered_bytes = device, examine, offered_bytes
        self._found: queue.SimpleQueue[Sequence[Finding]] = queue.SimpleQueue()
        self._number = 0
        self._rights: Rights | None = None
        self._answer: Publish | None = None

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """Take an event in, or None for the time alone."""
        if isinstance(event, Connected):
            return [Subscribe((topics.doctor_request(self._device),)), *(self._rights.begin(now) if self._rights else ())]
        if isinstance(event, Received) and event.topic == topics.doctor_request(self._device):
            return self._hear(event, now)
        if self._rights is None:
            return []
        effects = self._rights.step(event, now)
        if self._rights.over(now) and not self._found.empty():
            effects += self._tell(self._rights)
        return effects

    def _hear(self, event: Received, now: float) -> list[Effect]:
        try:
            request = wire.decode(event.payload, wire.DoctorRequest)[0]
        except PeerError as error:
            log.warning("%s", error)
            return []
        if request.number == self._number and self._answer is not None:
            return [self._answer]
        if request.number <= self._number or self._rights is not None:
            return []
        self._number, self._answer = request.number, None
        self._rights = Rights(self._device, secrets.token_bytes(16))
        came_s = time.monotonic()
        gateway = lambda: request.now_s + time.monotonic() - came_s  # noqa: E731
        threading.Thread(target=lambda: self._found.put(self._examine(gateway)), name="doctor", daemon=True).start()
        return self._rights.begin(now)

    def _tell(self, rights: Rights) -> list[Effect]:
        findings = [*self._found.get(), rights.finding()]
        report = wire.DoctorReport(number=self._number, findings=findings, memory_bytes=self._offered_bytes())
        self._answer = Publish(topics.doctor_report(self._device), wire.encode(report))
        self._rights = None
        return [*rights.end(), self._answer]
