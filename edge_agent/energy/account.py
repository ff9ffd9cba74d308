"""The device's energy: one thread samples the meter, and rows come out: power over time, and the joules of every phase.

The thread's own processor time is counted (`overhead`). What is said of phases by other threads waits in a queue until the samples around
that moment are there, so a phase begins and ends where it did and not at a sample.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.energy.board_file import BoardFile
from edge_agent.energy.external import MqttMeter
from edge_agent.energy.integral import Gap, Integral, Piece
from edge_agent.energy.meter import Meter
from edge_agent.energy.phases import MARK_MOST, Doing, Guess, PhaseSplit, doing_of
from edge_agent.energy.pulse import make_pulse
from edge_agent.heat import Condition, Heat
from regrow.device import Device
from regrow.errors import RegrowError
from regrow.machine import Connected, Effect, Event, Received, Subscribe, Train
from regrow.observations import Certainty, Mark, Phase, PowerSeen, Row
from regrow.parameters import Layout
from regrow.wire import PowerState

log = logging.getLogger(__name__)
SAMPLE_HZ = 10.0
ROW_S, RECORDED_ROW_S, EMPTY_ROW_S = 60.0, 1.0, 10.0
TELL_S = 5.0  # what telemetry says is a mean over this long
CONDITION_S = 1.0
SILENT_S = 60.0  # after so long without a mean, telemetry has none
LATE_S = 5.0
IDLE: frozenset[Phase] = frozenset({"idle"})
UNMEASURED: Certainty = "unmeasured"
MODELLED: Certainty = "modelled"
_MISSED = 3  # samples that may be missing in a row, at low rates


class Energy:
    """One device's, from `start` to `close`.

    Attributes:
        why: in full, why power was not known when it last was not; a row of power has room for its beginning only.

    Args:
        meter: closed here.
        tell: takes rows, from the sampling thread.
        known: of this board's meters: calibration and idle baseline.
        guess: joules where the meter tells none.
        heat: what slows the board; read once a second.
        unix_s: the clock that rows go by.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        meter: Meter,
        tell: Callable[[Row], None],
        *,
        known: BoardFile | None = None,
        guess: Guess | None = None,
        heat: Heat | None = None,
        unix_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter, self._tell, self._guess = meter, tell, guess
        self._heat = heat or Heat(Path("/"))
        self._unix_s, self._clock = unix_s, clock
        calibration = None if known is None else known.calibrations.get(meter.name)
        baseline = None if known is None else known.baselines.get(meter.name)
        self._integral = Integral(meter.gap_s, *(() if calibration is None else (calibration.watts,)))
        idle_w = None if baseline is None else baseline.watts
        self._split = PhaseSplit(meter.name, meter.certainty, self._unix_of, idle_w=idle_w, guess=guess)
        self._rows, self._recent = _Window(ROW_S), _Window(TELL_S)
        self._hz = 0.0
        self._condition, self._looked_s = Condition(None, ()), -math.inf
        self._doing, self._still, self._density = Doing(), False, 0.0
        self._last: PowerSeen | None = None
        self.why = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._busy_s, self._began_s = 0.0, clock()
        self.record(None)

    # ---- what others say ---------------------------------------------------------------------------------------------------------------

    def record(self, sample_hz: float | None, row_s: float | None = None) -> None:
        """A field run asks for this rate; None: it is over.

        Args:
            row_s: seconds of a row of power; by default 1 s, 10 s where there is no power to tell, and a minute outside of field runs.
        """
        self._hz = min(sample_hz or SAMPLE_HZ, self.meter.most_hz)
        self._integral.gap_s = max(self.meter.gap_s, _MISSED / self._hz)
        recorded_s = EMPTY_ROW_S if self.meter.certainty == UNMEASURED and self._guess is None else RECORDED_ROW_S
        self._rows.length_s = row_s or (ROW_S if sample_hz is None else recorded_s)

    def keep_still(self, still: bool) -> None:
        """The device does nothing on purpose: what it draws while nothing goes on is its baseline."""
        self._still = still
        self._say(self._doing, self._clock())

    def trains(self, job: Train) -> None:
        """A job begins: its density."""
        try:
            self._density = job.length / Layout.from_json(job.programs["layout"]).size
        except (RegrowError, KeyError):  # the worker finds out, and says so
            self._density = 0.0

    def follow(self, device: Device, *, training: bool) -> None:
        """What the device does now; as often as it may have changed. training: its training thread is at work."""
        doing = doing_of(device, training=training, density=self._density if 0 < self._density <= 1 else None)
        if doing != self._doing:
            self._say(doing, self._clock())

    def _say(self, doing: Doing, now: float) -> None:
        self._doing = doing
        self._split.change(Doing(frozenset({"baseline"})) if self._still and not doing.phases else doing, now)

    def step(self, event: Event | None, now: float) -> Sequence[Effect]:
        """An event of the device's link (edge_agent.agent.Companion): a meter on a topic is heard here."""
        if isinstance(self.meter, MqttMeter):
            if isinstance(event, Connected):
                return [Subscribe((self.meter.topic,))]
            if isinstance(event, Received) and event.topic == self.meter.topic:
                self.meter.hear(event.payload, now)
        return []

    def pulse(self, at_s: float) -> None:
        """Make a sync pulse at this unix time, in a thread of its own, and tell when it really began; none when the time is past."""
        if at_s < self._unix_s() - LATE_S:
            return

        def make() -> None:
            if not self._stop.wait(max(at_s - self._unix_s(), 0.0)):
                began_s = make_pulse(self._stop, clock=self._clock)
                self._tell(Mark(self._unix_of(began_s), "sync pulse"))

        threading.Thread(target=make, name="sync pulse", daemon=True).start()

    # ---- what others ask ---------------------------------------------------------------------------------------------------------------

    @property
    def marked(self) -> str:
        """What slows the board at this moment; nothing where it runs at its own pace."""
        return ", ".join(self._condition.marks)

    @property
    def overhead(self) -> float:
        """The sampling thread's processor time as a share of one core, since it began."""
        elapsed_s = self._clock() - self._began_s
        return self._busy_s / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def tells_joules(self) -> bool:
        """Whether a meter or a model does."""
        return self.meter.certainty != UNMEASURED or self._guess is not None

    def state(self) -> PowerState:
        """For telemetry."""
        seen = self._last
        if seen is None or self._unix_s() - seen.at_s > SILENT_S:
            return PowerState(None, f"{self.meter.name}: no value", self._condition.temperature_c, bool(self._condition.marks))
        meter = self.why if seen.certainty == UNMEASURED else seen.meter
        return PowerState(seen.watts, meter, seen.temperature_c, bool(seen.marked))

    # ---- the thread --------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to sample."""
        self._began_s = self._clock()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sample no more; tell of what has gathered."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        rows: list[Row] = [*self._split.finish(), *self._rows.finish(self, self._clock())]
        for row in rows:
            self._tell(row)
        self.meter.close()
        self._heat.close()

    def _run(self) -> None:
        next_s = self._clock()
        began_busy_s = time.thread_time()
        while not self._stop.is_set():
            self.sample(self._clock())
            self._busy_s = time.thread_time() - began_busy_s
            # Samples that came too late are left out, not made up for.
            next_s = max(next_s + 1 / self._hz, self._clock())
            self._stop.wait(next_s - self._clock())

    def sample(self, now: float) -> None:
        """Read everything once and tell of what has become complete."""
        if now - self._looked_s >= CONDITION_S:
            self._condition, self._looked_s = self._heat.look(), now
        piece = self._integral.add(self.meter.read(), now)
        if piece is None:
            return
        if isinstance(piece, Gap):
            self.why = piece.reason
        condition = self._condition
        for row in self._split.take(piece, condition.marks, condition.temperature_c):
            self._tell(row)
        self._recent.take(piece, condition)
        self._rows.take(piece, condition)
        if self._recent.full:
            self._last = self._recent.finish(self, now)[0]
        if self._rows.full:
            for power in self._rows.finish(self, now):
                self._tell(power)

    def _unix_of(self, at_s: float) -> float:
        return max(self._unix_s() - (self._clock() - at_s), 0.0)

    def power(
        self, ended_s: float, seconds: float, joules: float | None, why: str, condition: Condition, marks: Sequence[str]
    ) -> PowerSeen:
        """The row of an interval. joules: None where they are not known, for `why`."""
        watts: float | None = None
        meter, certainty = why, UNMEASURED
        if joules is not None:
            watts, meter, certainty = joules / seconds, self.meter.name, self.meter.certainty
        elif self._guess is not None:
            watts = self._guess.watts(self._doing.phases or IDLE, condition.temperature_c)
            meter, certainty = (why, UNMEASURED) if watts is None else (self._guess.name, MODELLED)
        marked = ", ".join(marks)[:MARK_MOST]
        at_s = self._unix_of(ended_s)
        return PowerSeen(at_s, seconds, watts, meter[:MARK_MOST], certainty, condition.temperature_c, marked)


@dataclass(slots=True)
class _Window:
    """What gathers for one row of power."""

    length_s: float
    joules: float = 0.0
    known_s: float = 0.0
    unknown_s: float = 0.0
    ended_s: float = 0.0
    why: str = ""
    condition: Condition = field(default_factory=lambda: Condition(None, ()))
    marks: dict[str, None] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return self.known_s + self.unknown_s >= self.length_s - 1e-6

    def take(self, piece: Piece, condition: Condition) -> None:
        self.ended_s, self.condition = piece.ended_s, condition
        self.marks.update(dict.fromkeys(condition.marks))
        if isinstance(piece, Gap):
            self.unknown_s += piece.seconds
            self.why = piece.reason
        else:
            self.known_s += piece.seconds
            self.joules += piece.joules

    def finish(self, energy: Energy, now: float) -> list[PowerSeen]:
        """The rows of what has gathered, the known part first; and begin anew."""
        rows = []
        ended_s = self.ended_s or now
        if self.known_s > 0:
            rows.append(energy.power(ended_s, self.known_s, self.joules, "", self.condition, list(self.marks)))
        if self.unknown_s > 0:
            rows.append(energy.power(ended_s, self.unknown_s, None, self.why, self.condition, list(self.marks)))
        self.joules = self.known_s = self.unknown_s = 0.0
        self.why = ""
        self.marks.clear()
        return rows
