"""Tells devices what a field run wants of them: a folder of announcements, and a machine beside the coordinator's that publishes them.

    field/DEVICE.json      a `Field` as JSON, written by `announce`; published retained as long as it lies there
    field/DEVICE.report    what the device answered last, and its clock against ours
    field/lock             held by the process that speaks

While a field run goes on, an announcement is said again now and then with a higher number, because every answer measures the device's
clock. Who keeps still gets no work, so nobody waits for it. Nothing here is durable: devices answer again, and clocks are kept with the
observations.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from broker_server.durable import write_private
from broker_server.observations import ClockSeen
from regrow import topics, wire
from regrow.errors import LocalError, PeerError, UsageError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Standing, Subscribe
from regrow.observations import Field, FieldReport, keeps_still, phase_at

log = logging.getLogger(__name__)
FOLDER = "field"
LOOK_S = 0.5
SETTLED_S = 2.0  # for so long a folder may change again in the same tick of its clock
REFRESH_S = 30.0
POOR_CLOCK_S, AGAIN_S, TRIES = 0.5, 3.0, 3  # an answer to what lay on the broker tells little of a clock: ask again soon
GRACE_S = 30.0  # so long a device that has not said that it works again gets no work
KEPT_CLOCKS = 8
KEPT_S = 86_400.0  # after its end
_SUFFIX, _REPORT = ".json", ".report"


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What a device said last. announced: the number of the announcement that it answers, as `announce` gave it.

    offset_s: its clock minus ours; error_s: at most so wrong; None: not known yet.
    """

    report: FieldReport
    announced: int
    received_s: float
    offset_s: float | None = None
    error_s: float | None = None


@dataclass(slots=True)
class _Told:
    """One device: what its file says, and what was said of it.

    number: the newest; first: the first with this content; phase: what the device said last; rested_s: when it kept still last.
    """

    stamp: tuple[int, int] = (0, 0)
    said: Field | None = None
    number: int = 0
    first: int = 0
    due_s: float = float("-inf")
    tries: int = 0
    phase: str = ""
    rested_s: float = float("-inf")
    sent_s: dict[int, float] = field(default_factory=dict)
    clocks: deque[ClockSeen] = field(default_factory=lambda: deque(maxlen=KEPT_CLOCKS))
    heard: Heard | None = None


class FieldHerald:
    """One gateway's. `step` takes every event of the link; whoever owns the link carries the effects out.

    Args:
        home: of the gateway.
        on_clock: takes what is learnt of a device's clock.
        speaks: this process is the one that speaks to devices; another one only tells its own coordinator who keeps still.
        clock: unix seconds.
    """

    def __init__(
        self, home: Path, on_clock: Callable[[ClockSeen], None], *, speaks: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._on_clock, self._speaks, self._clock = home / FOLDER, on_clock, speaks, clock
        self._connected = False
        self._look_s = float("-inf")
        self._devices: dict[str, _Told] = {}
        self._written_ns, self._changed_s = -1, float("-inf")
        self._still: frozenset[str] = frozenset()

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002 - it is about no task
        """Take an event in, or None for the time alone. leads: of no concern here."""
        effects: list[Effect] = []
        if isinstance(event, Connected):
            self._connected, self._look_s = True, now
            for told in self._devices.values():
                told.due_s, told.tries = now, 0
            if self._speaks:
                effects.append(Subscribe((topics.field_report("+"),)))
        elif isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Received) and self._speaks and (found := topics.parse_of_device(event.topic, ("field-report",))):
            self._hear(found[0], event, now)
        if now >= self._look_s:
            self._look_s = now + LOOK_S
            effects += self._look(now)
        return effects

    # ---- saying --------------------------------------------------------------------------------------------------------------------

    def _look(self, now: float) -> list[Effect]:
        for device, told in self._devices.items():
            if told.heard is not None:
                _write(self._folder / f"{device}{_REPORT}", msgspec.json.encode(told.heard))
                told.heard = None
        effects = self._read(now)
        for device, told in self._devices.items():
            if self._connected and self._speaks and now >= told.due_s and told.said is not None:
                effects.append(self._say(device, told, told.said, now))
        now_s = self._clock()
        still = frozenset(device for device, told in self._devices.items() if told.said and self._rests(told, told.said, now_s))
        if still != self._still:
            self._still = still
            effects.append(Standing(paused=still))
        return effects

    def _rests(self, told: _Told, said: Field, now_s: float) -> bool:
        """Until the device says that it works again: what it is given before it does not take."""
        if keeps_still(said, now_s):
            told.rested_s = now_s
            return True
        waits = told.phase == "baseline" or (phase_at(said, now_s) == "run" != told.phase)
        return self._speaks and waits and now_s < told.rested_s + GRACE_S

    def _read(self, now: float) -> list[Effect]:
        """See what the files say now, where the folder has changed."""
        try:
            written_ns = self._folder.stat().st_mtime_ns
        except OSError:
            return []
        if written_ns != self._written_ns:
            self._written_ns, self._changed_s = written_ns, now
        elif now > self._changed_s + SETTLED_S:
            return []
        effects: list[Effect] = []
        there = set()
        for file in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                state = file.stat()
                stamp = (state.st_mtime_ns, state.st_ino)
                if not topics.NAME.match(file.stem):
                    continue
                there.add(file.stem)
                told = self._devices.setdefault(file.stem, _Told())
                if stamp != told.stamp:
                    told.stamp = stamp
                    self._take(file, told, now)
        for device in self._devices.keys() - there:
            del self._devices[device]
            if self._connected and self._speaks:
                effects.append(Publish(topics.field_run(device), b"", retain=True))
        return effects

    def _take(self, file: Path, told: _Told, now: float) -> None:
        try:
            told.said = msgspec.json.decode(file.read_bytes(), type=Field)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s is no announcement: %s", file, error)
            return
        told.due_s, told.tries, told.first = now, 0, 0
        if told.said.end_s and self._clock() > told.said.end_s + KEPT_S and self._speaks:
            file.unlink(missing_ok=True)

    def _say(self, device: str, told: _Told, said: Field, now: float) -> Publish:
        """Publish with a number above all before; a field run that goes on is said again."""
        sent_s = self._clock()
        told.number = max(told.number + 1, said.number, int(1000 * sent_s))
        told.first = told.first or told.number
        told.sent_s[told.number] = sent_s
        while len(told.sent_s) > KEPT_CLOCKS:
            del told.sent_s[next(iter(told.sent_s))]
        over = not said.name or 0 < said.end_s <= sent_s
        told.due_s = float("inf") if over else now + REFRESH_S
        message = msgspec.structs.replace(said, number=told.number, sent_s=max(sent_s, 0.0))
        return Publish(topics.field_run(device), wire.encode(message), retain=True)

    # ---- hearing -------------------------------------------------------------------------------------------------------------------

    def _hear(self, device: str, event: Received, now: float) -> None:
        told = self._devices.get(device)
        if told is None or told.said is None or not event.payload:
            return
        try:
            report = wire.decode(event.payload, FieldReport)[0]
        except PeerError as error:
            log.warning("%s: %s", device, error)
            return
        if report.number > told.number:  # our clock, or what we remember, is older than what it has heard
            told.number, told.due_s = report.number, now
            return
        told.phase = report.phase
        received_s = self._clock()
        if (sent_s := told.sent_s.pop(report.number, None)) is not None:
            self._weigh_clock(device, told, report, (sent_s, received_s), now)
        if not told.first or report.number < told.first:
            return
        best = min(told.clocks, key=lambda seen: seen.error_s or 0.0, default=None)
        known = (None, None) if best is None else (best.offset_s, best.error_s)
        told.heard = Heard(report=report, announced=told.said.number, received_s=received_s, offset_s=known[0], error_s=known[1])
        if not told.said.name:
            with suppress(OSError):
                (self._folder / f"{device}{_SUFFIX}").unlink()

    def _weigh_clock(self, device: str, told: _Told, report: FieldReport, ours: tuple[float, float], now: float) -> None:
        """From our two times and its two, as NTP does."""
        sent_s, received_s = ours
        offset_s = ((report.heard_s - sent_s) + (report.said_s - received_s)) / 2
        error_s = max(((received_s - sent_s) - (report.said_s - report.heard_s)) / 2, 0.0)
        seen = ClockSeen(device, report.said_s, offset_s, error_s)
        told.clocks.append(seen)
        self._on_clock(seen)
        if error_s > POOR_CLOCK_S and told.tries < TRIES:
            told.tries, told.due_s = told.tries + 1, min(told.due_s, now + AGAIN_S)


# ---- for `regrow field run` ------------------------------------------------------------------------------------------------------------


def announce(home: Path, devices: Iterable[str], said: Field) -> int:
    """Have the gateway tell devices this from now on, until they are told something else. Its number and sent_s are set here.

    Returns:
        the announcement's number, which `Heard.announced` names once the device has answered it.

    Raises:
        LocalError: a name or time cannot be, or the folder cannot be written.
    """
    if said.phase == "baseline" and not said.end_s:
        raise UsageError("a baseline needs an end: devices would keep still for ever if nobody came to end it")
    if 0 < said.end_s <= said.start_s:
        raise UsageError(f"the phase would end at {said.end_s:g}, before it begins at {said.start_s:g}")
    number = time.time_ns() // 1_000_000
    data = msgspec.json.encode(msgspec.structs.replace(said, number=number, sent_s=0.0))
    folder = home / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for device in devices:
            write_private(folder / f"{topics.check_name(device, 'device')}{_SUFFIX}", data)
    except OSError as error:
        raise LocalError(f"cannot write {folder}: {error}; check its owner and the disk") from error
    return number


def reports(home: Path) -> dict[str, Heard]:
    """What each device answered last."""
    found = {}
    for file in sorted((home / FOLDER).glob(f"*{_REPORT}")):
        with suppress(OSError, msgspec.DecodeError):
            found[file.stem] = msgspec.json.decode(file.read_bytes(), type=Heard)
    return found


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all for who reads it; not durable."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with suppress(OSError):
        aside.write_bytes(data)
        aside.replace(file)
