"""A pattern of load that a power trace shows clearly, and where it lies in one: so that an external meter's clock can be aligned.

The pattern is a Barker code, which looks like itself at no other offset: a device loads every core while a bit is 1 and rests while it
is 0.

Source: R. H. Barker, Group synchronizing of binary digital systems, 1953: the code of length 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError

BITS = (1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1)
BIT_S = 0.5
PULSE_S = BIT_S * len(BITS)
STEP_S = 0.02
LEAST_MATCH = 0.6
LEAST_LEAD = 1.15  # over the best match elsewhere
MOST_GAP_S = 0.35  # at 4 Hz, with samples that come a little late; at 3 Hz the offset may be wrong by a quarter of a second
MOST_SAMPLES = 5_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """A pulse in a trace.

    Args:
        began_s: by the trace's clock.
        match: correlation with the pattern, 1 at most.
        rise_w: how much more the device drew while a bit was 1.
    """

    began_s: float
    match: float
    rise_w: float

    def offset_s(self, pulse_s: float) -> float:
        """The trace's clock minus the device's; pulse_s: when the pulse began by the device's."""
        return self.began_s - pulse_s


def is_high(since_s: float) -> bool:
    """Whether cores are loaded this long after the pulse's beginning."""
    bit = int(since_s // BIT_S)
    return 0 <= bit < len(BITS) and BITS[bit] == 1


def find_pulse(at_s: Sequence[float] | NDArray[np.float64], watts: Sequence[float] | NDArray[np.float64]) -> Found:
    """Where the pattern begins in a power trace.

    Args:
        at_s: float64 [n], seconds of the trace's own clock, ascending.
        watts: float64 [n].

    Returns:
        The one place that matches.

    Raises:
        LocalError: the trace is none, too coarse or too short, or no place matches clearly better than all others.
    """
    times, power = _checked(at_s, watts)
    grid = np.arange(times[0], times[-1], STEP_S)
    if grid.size < round((PULSE_S + 2 * BIT_S) / STEP_S):
        raise LocalError(f"the trace lasts {times[-1] - times[0]:.1f} s: the pulse takes {PULSE_S:g} s, and a second around it is needed")
    match, rise = _matches(np.interp(grid, times, power))
    # An interpolated trace is not known where its meter was silent.
    best = int(np.argmax(match))
    began_s, ended_s = grid[best], grid[best] + PULSE_S
    inside = times[(times >= began_s - BIT_S) & (times <= ended_s + BIT_S)]
    if inside.size < 2 or np.diff(inside).max() > MOST_GAP_S:
        raise LocalError(f"the trace has values further apart than {MOST_GAP_S:g} s where it matches best: sample at 4 Hz or faster")
    near = round(BIT_S / STEP_S)
    elsewhere = np.concatenate([match[: max(best - near, 0)], match[best + near + 1 :]])
    second = float(elsewhere.max()) if elsewhere.size else 0.0
    if match[best] < LEAST_MATCH or match[best] < LEAST_LEAD * second:
        raise LocalError(
            f"no pulse found: the best match is {match[best]:.2f} (at least {LEAST_MATCH}), another place has {second:.2f}; "
            "cut the trace to a minute around the pulse, and keep the device idle meanwhile"
        )
    return Found(float(grid[best] + STEP_S * _between(match, best)), float(match[best]), float(rise[best]))


def _checked(at_s: Sequence[float] | NDArray[np.float64], watts: Sequence[float] | NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    times, power = np.asarray(at_s, np.float64), np.asarray(watts, np.float64)
    if times.ndim != 1 or times.shape != power.shape or times.size < 2:
        raise LocalError(f"a trace is as many times as watts, at least two, not {times.shape} and {power.shape}")
    if not (np.isfinite(times).all() and np.isfinite(power).all()):
        raise LocalError("the trace holds values that are no finite numbers")
    if (np.diff(times) <= 0).any():
        raise LocalError("the trace's times do not ascend")
    if (times[-1] - times[0]) / STEP_S > MOST_SAMPLES:
        raise LocalError(f"the trace lasts {(times[-1] - times[0]) / 3600:.0f} h: cut it to the minutes around the pulse")
    return times, power


def _matches(power: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(correlation with the pattern, rise in watts) at every place of the grid where all of the pattern fits."""
    count = round(BIT_S / STEP_S)
    pattern = np.repeat(np.asarray(BITS, np.float64), count)
    centred = pattern - pattern.mean()
    size = pattern.size
    power = power - power.mean()
    length = 1 << (power.size + size - 1).bit_length()
    both = np.fft.irfft(np.fft.rfft(power, length) * np.conj(np.fft.rfft(centred, length)), length)[: power.size - size + 1]
    sums = np.concatenate([[0.0], np.cumsum(power)])
    squares = np.concatenate([[0.0], np.cumsum(power * power)])
    total = sums[size:] - sums[:-size]
    spread = np.maximum(squares[size:] - squares[:-size] - total * total / size, 0.0)
    energy = float((centred * centred).sum())
    scale = np.sqrt(spread * energy)
    flat = scale <= 1e-9 * max(float(scale.max()), 1e-12)
    return np.where(flat, 0.0, both / np.where(flat, 1.0, scale)), both / energy


def _between(match: NDArray[np.float64], best: int) -> float:
    """The top of the parabola through the best place and its neighbours, in steps from it."""
    if not 0 < best < match.size - 1:
        return 0.0
    left, top, right = match[best - 1], match[best], match[best + 1]
    bend = left - 2 * top + right
    return 0.0 if bend >= 0 else float(np.clip((left - right) / (2 * bend), -0.5, 0.5))
