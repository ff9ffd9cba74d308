"""Whose joules they are: energy split into train, transmit, receive and idle by what the agent says that it does.

The rule. Nothing is subtracted: a stretch of one phase has all that the device drew meanwhile, its idle power too, so that the joules of a
device's rows add up to what it drew. In a stretch where several phases go on at once, each has a row with all of its seconds, and the
joules are shared among them in proportion to what each draws above idle when it is alone on this device; equally until that is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edge_agent.energy.integral import Gap, Piece, Segment
from regrow.device import Device
from regrow.device import Phase as DevicePhase
from regrow.observations import Certainty, Phase, PhaseSeen

LONGEST_S = 300.0  # a stretch that lasts is told of in parts
_LEAST_EXCESS_W = 1e-3
MOST_CHANGES = 10_000
_KNOWN_AFTER_S = 5.0
_ORDER: tuple[Phase, ...] = ("train", "transmit", "receive", "baseline")
MARK_MOST = 64


@dataclass(frozen=True, slots=True)
class Doing:
    """What goes on at once (none: idle), and what for."""

    phases: frozenset[Phase] = frozenset()
    run: str = ""
    number: int = 0
    steps: int = 0
    density: float | None = None


def doing_of(device: Device, *, training: bool, density: float | None = None) -> Doing:
    """What a device does by its machine.

    Args:
        training: its training thread is at work, be it on a job, on a race between settings, or judging a model.
        density: of the assignment at hand.
    """
    phases: set[Phase] = set()
    if training or device.phase in (DevicePhase.TRAINING, DevicePhase.SAVING):
        phases.add("train")
    if device.needs_link and device.connected:
        phases.add("receive" if device.phase is DevicePhase.FETCHING else "transmit")
    assignment = device.assignment
    if assignment is None:
        return Doing(frozenset(phases))
    run = "" if device.names is None else device.names.run
    return Doing(frozenset(phases), run, assignment.number, assignment.steps, density)


class Guess(Protocol):
    """What stands in where nothing is measured: regrow.power_model.PowerModel. The joules are a mean, and the ends of its interval."""

    @property
    def name(self) -> str: ...

    def joules(self, phase: Phase, seconds: float, temperature_c: float | None) -> tuple[float, float, float] | None: ...

    def watts(self, phases: Collection[Phase], temperature_c: float | None) -> float | None: ...


@dataclass(slots=True)
class _Stretch:
    """What has gathered of the stretch at hand."""

    doing: Doing
    began_s: float
    ended_s: float
    joules: float = 0.0
    known_s: float = 0.0
    unknown_s: float = 0.0
    why: str = ""
    marks: dict[str, None] = field(default_factory=dict)


class PhaseSplit:
    """One device's. Changes and pieces both come in the order of time; a change may come long before the piece that holds it.

    Args:
        meter: its name; certainty: of what it measures.
        unix_s: unix seconds of monotonic ones.
        idle_w: what the board draws when it does nothing, where that was measured.
        guess: joules where none are measured.
    """

    def __init__(
        self,
        meter: str,
        certainty: Certainty,
        unix_s: Callable[[float], float],
        *,
        idle_w: float | None = None,
        guess: Guess | None = None,
    ) -> None:
        self._meter, self._certainty, self._unix_s, self._guess = meter, certainty, unix_s, guess
        self._idle_w = idle_w
        self._changes: deque[tuple[float, Doing]] = deque(maxlen=MOST_CHANGES)
        self._stretch: _Stretch | None = None
        self._doing = Doing()
        self._alone: dict[Phase, tuple[float, float]] = {}  # (joules, seconds) of each phase alone
        self._temperature_c: float | None = None

    def change(self, doing: Doing, now: float) -> None:
        """From now on it does this. From any thread."""
        self._changes.append((now, doing))

    def take(self, piece: Piece, marks: tuple[str, ...] = (), temperature_c: float | None = None) -> list[PhaseSeen]:
        """Add a piece; returns the rows of stretches that have ended."""
        rows: list[PhaseSeen] = []
        self._temperature_c = temperature_c
        while self._changes and self._changes[0][0] <= piece.ended_s:
            at_s, doing = self._changes.popleft()
            if at_s > piece.began_s:
                first, piece = piece.split(at_s)
                rows += self._add(first, marks)
            if doing != self._doing:
                rows += self.finish()
                self._doing = doing
        return rows + (self._add(piece, marks) if piece.seconds > 0 else [])

    def finish(self) -> list[PhaseSeen]:
        """End the stretch at hand; its rows."""
        stretch, self._stretch = self._stretch, None
        return [] if stretch is None else self._rows(stretch)

    def _add(self, piece: Piece, marks: tuple[str, ...]) -> list[PhaseSeen]:
        rows = []
        if self._stretch is not None and piece.began_s - self._stretch.began_s >= LONGEST_S:
            rows = self.finish()
        if self._stretch is None:
            self._stretch = _Stretch(self._doing, piece.began_s, piece.began_s)
        stretch = self._stretch
        stretch.ended_s = piece.ended_s
        stretch.marks.update(dict.fromkeys(marks))
        if isinstance(piece, Gap):
            stretch.unknown_s += piece.seconds
            stretch.why = piece.reason
        else:
            stretch.known_s += piece.seconds
            stretch.joules += piece.joules
            self._learn(piece)
        return rows

    def _learn(self, segment: Segment) -> None:
        """What a phase draws alone, over its last minutes."""
        if len(self._doing.phases) < 2:
            phase: Phase = next(iter(self._doing.phases - {"baseline"}), "idle")
            joules, seconds = self._alone.get(phase, (0.0, 0.0))
            kept = min(1.0, LONGEST_S / (seconds + segment.seconds))
            self._alone[phase] = (kept * (joules + segment.joules), kept * (seconds + segment.seconds))

    # ---- rows ----------------------------------------------------------------------------------------------------------------------

    def _rows(self, stretch: _Stretch) -> list[PhaseSeen]:
        doing = stretch.doing
        phases = [phase for phase in _ORDER if phase in doing.phases] or ["idle"]
        shares = self.shares(phases) if len(phases) > 1 else {phases[0]: 1.0}
        rows = []
        for phase in phases:
            others = [f"overlaps {other}" for other in phases if other != phase]
            said = ", ".join([*others, *stretch.marks])[:MARK_MOST]
            if stretch.known_s > 0:
                rows.append(self._row(stretch, phase, stretch.known_s, said, shares[phase] * stretch.joules))
            if stretch.unknown_s > 0:
                rows.append(self._guessed(stretch, phase, said, shares[phase]))
        return rows

    def _row(self, stretch: _Stretch, phase: Phase, seconds: float, marked: str, joules: float | None) -> PhaseSeen:
        doing = stretch.doing
        return PhaseSeen(
            at_s=self._unix_s(stretch.began_s),
            seconds=seconds,
            phase=phase,
            joules=joules,
            meter=self._meter if joules is not None else stretch.why,
            certainty=self._certainty if joules is not None else "unmeasured",
            run=doing.run,
            number=doing.number,
            density=doing.density,
            steps=doing.steps if phase == "train" else 0,
            marked=marked,
        )

    def _guessed(self, stretch: _Stretch, phase: Phase, marked: str, share: float) -> PhaseSeen:
        row = self._row(stretch, phase, stretch.unknown_s, marked, None)
        guess = None if self._guess is None else self._guess.joules(phase, stretch.unknown_s, self._temperature_c)
        if guess is None or self._guess is None:
            return row
        joules, low, high = (share * value for value in guess)
        fields = {name: getattr(row, name) for name in row.__struct_fields__}
        fields |= {"joules": joules, "low_j": low, "high_j": high, "meter": self._guess.name, "certainty": "modelled"}
        return PhaseSeen(**fields)

    def shares(self, phases: list[Phase]) -> Mapping[Phase, float]:
        """Each phase's part of what is drawn while all of them go on."""
        known = {phase: joules / seconds for phase, (joules, seconds) in self._alone.items() if seconds >= _KNOWN_AFTER_S}
        idle_w = self._idle_w if self._idle_w is not None else known.get("idle")
        if idle_w is None or not all(phase in known for phase in phases):
            return {phase: 1 / len(phases) for phase in phases}
        above = {phase: max(known[phase] - idle_w, _LEAST_EXCESS_W) for phase in phases}
        return {phase: above[phase] / sum(above.values()) for phase in phases}
