"""What trains fastest on this board: the ways that a training program comes in, and how many threads, tried out beside real jobs.

After a job, while its update travels, the setting in use and one challenger train a few steps on the device's own batch, in turn, and what
comes out is discarded. Such a race is run when ten times its steps have been trained since the last, so that all of them together cost at
most a tenth of the training. One session is alive at a time: a device must hold no more than what its job takes.

A choice belongs to the digest of the programs, and is kept over restarts. Settings differ in speed, and in rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import onnxruntime as ort

from regrow import wire
from regrow.programs import variant, ways_of, without_variants

TIMED_STEPS = (2, 3, 2)
"""Of a race: the setting in use, the challenger, and the first again, so that a machine that grows busy meets both."""
RACE_STEPS = sum(TIMED_STEPS) + len(TIMED_STEPS)
"""With those that warm each up."""
SHARE = 0.1
"""Of the training, at most: what races cost."""
MOST_S = 20.0
"""After so long no further steps of a race begin, and the setting in use stays."""
GAIN = 0.97
"""The challenger must take less than this times as long."""
KEPT_SETS = 8


Race = Callable[["Setting"], Callable[[int], object]]
"""What runs so many steps in a setting: loads a session, which is let go with what it returns."""


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a set of programs is run. ways: program -> the other way that it is computed in; threads: for one operator."""

    threads: int
    ways: dict[str, str] = {}

    def programs(self, programs: Mapping[str, bytes]) -> dict[str, bytes]:
        """The programs as this setting runs them, without variants."""
        chosen = {name: programs[variant(name, way)] for name, way in self.ways.items()}
        return without_variants(programs) | chosen


class _Known(msgspec.Struct, forbid_unknown_fields=True):
    """Of one set of programs. tried: the challengers that have had their race."""

    setting: Setting
    tried: list[str] = []


_SAVED = msgspec.json.Decoder(dict[str, _Known])


@dataclass(frozen=True)
class Challenger:
    """A setting to try, and the name that it is remembered by."""

    name: str
    setting: Setting


class Tuning:
    """The settings of the programs that this device has met.

    Not thread-safe: the training thread owns it.

    Args:
        threads: the most, with which every set of programs begins.
        saved: what `to_bytes` gave in an earlier life; anything else is as good as nothing.
        clock: monotonic seconds.
    """

    def __init__(self, threads: int, saved: bytes | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._threads, self._clock = threads, clock
        self._credit = 0.0
        try:
            self._known = _SAVED.decode(saved or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._known = {}

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self._known)

    def digest(self, programs: Mapping[str, bytes]) -> str:
        """What a choice belongs to: the programs, the most threads, and the onnxruntime that runs them."""
        parts = [f"{name} {wire.digest(programs[name]).hex()}" for name in sorted(programs)]
        return wire.digest("\n".join([*parts, str(self._threads), ort.__version__]).encode()).hex()

    def setting(self, programs: Mapping[str, bytes]) -> Setting:
        """The best one known for these programs."""
        found = self._known.get(self.digest(programs), _Known(Setting(self._threads))).setting
        sound = 1 <= found.threads <= self._threads and all(way in ways_of(programs, name) for name, way in found.ways.items())
        return found if sound else Setting(self._threads)

    def trained(self, programs: Mapping[str, bytes], name: str, steps: int) -> Challenger | None:
        """Count steps of a program, `train` or the like; returns what should race against the setting in use now, if anything."""
        waiting = self._challengers(programs, name)
        if not waiting:
            return None
        self._credit = min(self._credit + SHARE * steps, RACE_STEPS)
        if self._credit < RACE_STEPS:
            return None
        self._credit = 0.0
        return waiting[0]

    def _challengers(self, programs: Mapping[str, bytes], name: str) -> list[Challenger]:
        """Each way of the program with all threads, then half as many threads, and half of those, in the best way."""
        known = self._known.get(self.digest(programs))
        now, tried = self.setting(programs), known.tried if known is not None else []
        ways = [Challenger(variant(name, way), Setting(self._threads, {**now.ways, name: way})) for way in ways_of(programs, name)]
        counts = [self._threads >> halvings for halvings in range(1, self._threads.bit_length())]
        fewer = [Challenger(f"{name} {count}", Setting(count, now.ways)) for count in counts]
        return [each for each in (*ways, *fewer) if each.name not in tried]

    def race(self, programs: Mapping[str, bytes], challenger: Challenger, race: Race) -> bool:
        """Let the two run, and remember the winner; returns whether it is the challenger. Errors of `race` are its own."""
        now = self.setting(programs)
        digest = self.digest(programs)
        known = self._known.pop(digest, _Known(now))
        self._known[digest] = _Known(now, [*known.tried, challenger.name])  # tried, even if it fails
        self._known = dict(list(self._known.items())[-KEPT_SETS:])
        times = self._times([now, challenger.setting, now], race)
        if times is None or not times[1] < GAIN * (times[0] + times[2]) / 2:
            return False
        self._known[digest] = _Known(challenger.setting, [*known.tried, challenger.name])
        return True

    def _times(self, settings: Sequence[Setting], race: Race) -> list[float] | None:
        """Seconds of a step in each, after one that does not count; None if they take too long."""
        began_s, times = self._clock(), []
        for setting, steps in zip(settings, TIMED_STEPS, strict=True):
            run = race(setting)
            run(1)
            start_s = self._clock()
            if start_s - began_s > MOST_S:
                return None
            run(steps)  # at once, as in a job: what a job does once must not count with every step
            times.append((self._clock() - start_s) / steps)
            del run  # its session goes before the next one comes
        return times
