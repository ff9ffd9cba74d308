"""The device's end of `Field`: it keeps still in a baseline and until a run begins, and answers at once, from which its clock is known.

The message is retained and says what holds, in the coordinator's clock. How late that is follows from the messages themselves: each says
when it was sent, so the coordinator's clock is at least that, and the latest such word, carried on by the monotonic clock, is at most one
way of the link behind. The number heard last is remembered, so that what an old broker still holds is not taken for news.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

from edge_agent.state import StateFolder
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe, Told
from regrow.observations import Field, FieldReport, Mark, keeps_still, phase_at

log = logging.getLogger(__name__)
HEARD = "field"
LATE_S = 5.0  # a pulse that is missed by more is not made up for
WORDS = 20  # of the coordinator's clock that count


class FieldOrders:
    """One device's.

    Args:
        device: its name.
        folder: keeps the number heard last.
        clock: the device's, unix seconds.
        observe: takes a mark for each sync pulse.

    Attributes:
        on_rate: called with the samples a second that the meters shall take.
        on_pulse: called when a sync pulse is due; must return at once.
        meter, software: what reports say.
        still: the device trains nothing now.
    """

    def __init__(self, device: str, folder: StateFolder, clock: Callable[[], float], observe: Callable[[Mark], None]) -> None:
        self._device, self._folder, self._clock, self._observe = device, folder, clock, observe
        self.on_rate: Callable[[float], None] = lambda _: None
        self.on_pulse: Callable[[], None] = lambda: None
        self.meter: Callable[[], str] = lambda: "unmeasured: this agent has no meter"
        self.software = ""
        self.still = False
        self._field: Field | None = None
        self._heard_s = self._pulsed_s = 0.0
        self._heard = self._load()
        self._ahead: deque[float] = deque(maxlen=WORDS)
        self._connected = False
        self._said: str | None = None

    def _load(self) -> int:
        saved = self._folder.get(HEARD) or b""
        return int(saved) if saved.isdigit() and len(saved) < 20 else 0

    def coordinator_s(self, now: float) -> float:
        """The coordinator's clock, unix seconds, at monotonic `now`; the device's where it was never heard."""
        return now + max(self._ahead) if self._ahead else self._clock()

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """Take an event in, or None for the time alone."""
        effects: list[Effect] = []
        if isinstance(event, Connected):
            self._connected, self._said = True, None
            effects.append(Subscribe((topics.field_run(self._device),)))
        elif isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Received) and event.payload and event.topic == topics.field_run(self._device):
            try:
                effects += self._hear(wire.decode(event.payload, wire.Field)[0], now)
            except PeerError as error:
                log.warning("refused: %s", error)
        return [*effects, *self._go_on(now)]

    def _hear(self, field: Field, now: float) -> list[Effect]:
        if field.number < self._heard:  # the past, or a gateway that has lost count: it is told from where to go on
            return [self._report(self._heard, "")]
        if field.sent_s:
            self._ahead.append(field.sent_s - now)
        before, self._field = self._field, field
        self._heard, self._heard_s, self._said = field.number, self._clock(), None
        if before is not None and _content(before) == _content(field):
            return []
        log.info("field run %s", f"{field.name}: {field.phase or 'waits'}" if field.name else "over")
        self.on_rate(field.sample_hz)
        try:
            self._folder.put(HEARD, str(field.number).encode())
        except LocalError as error:  # it would only be heard once more
            log.warning("%s", error)
        return []

    def _go_on(self, now: float) -> list[Effect]:
        """Do what is due, and say so."""
        field = self._field
        if field is None:
            return []
        effects: list[Effect] = []
        now_s = self.coordinator_s(now)
        still, phase = keeps_still(field, now_s), phase_at(field, now_s)
        if still != self.still:
            self.still = still
            effects.append(Told("pause" if still else "work"))
        if self._pulsed_s < field.pulse_s <= now_s:
            self._pulsed_s = field.pulse_s
            if now_s - field.pulse_s <= LATE_S:
                self._observe(Mark(self._clock(), "sync pulse"))
                self.on_pulse()
        if self._connected and phase != self._said:
            self._said = phase
            effects.append(self._report(field.number, phase))
        return effects

    def _report(self, number: int, phase: Literal["", "baseline", "run"]) -> Publish:
        said_s = max(self._clock(), 0.0)
        heard_s = self._heard_s or said_s
        meter, software = self.meter()[:1000], self.software[:1000]
        report = FieldReport(number=number, phase=phase, heard_s=heard_s, said_s=said_s, meter=meter, software=software)
        return Publish(topics.field_report(self._device), wire.encode(report))


def _content(field: Field) -> tuple[object, ...]:
    return field.name, field.phase, field.start_s, field.end_s, field.sample_hz, field.pulse_s
