"""What a simulated link carries: bit rates that change over virtual time, and when the last byte of a transmission has left.

A link is a value that says its rate piece by piece (`pieces`); `finish_s` integrates it. Randomness is counter-based: every draw is a
function of (seed, stream, number of the interval), so the order in which a simulation asks does not matter and two methods can meet the
same links. What a link remembers of its own draws is a memo, no state.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regrow.errors import UsageError

BLOCK = 64  # intervals drawn at once: a generator costs more than its numbers
MEMO_BLOCKS = 4
HEADER = ("seconds", "bits_per_second")


def generator(seed: int, stream: str, block: int) -> np.random.Generator:
    """Independent random numbers for one block of one stream, whatever was drawn before.

    Args:
        seed: of the whole simulation.
        stream: who draws and what for, e.g. "d3/up".
        block: >= 0; blocks are 2**64 counter steps apart, so they never overlap.
    """
    key = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"), counter=block << 64))


def _positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            raise UsageError(f"{what}: {name} is {value}, it must be finite and > 0")


def _not_negative(what: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise UsageError(f"{what}: {name} is {value}, it must be finite and >= 0")


class Link(ABC):
    """One direction of a link.

    Laws: `finish_s` never decreases in either argument, and sending a + b bytes ends when b bytes do that start when a bytes have ended
    (up to rounding).
    """

    @abstractmethod
    def pieces(self, start_s: float) -> Iterator[tuple[float, float]]:
        """(until_s, bit/s) from `start_s` on, in order; until_s of the last one is infinite, if there is a last one."""

    def finish_s(self, start_s: float, payload_bytes: int) -> float:
        """When the last byte has left, of `payload_bytes` that begin at `start_s` >= 0; infinite if that never comes."""
        at, left_bits = start_s, 8.0 * payload_bytes
        if left_bits <= 0.0:
            return start_s
        for until_s, bps in self.pieces(start_s):
            if until_s <= at:
                continue
            if bps > 0.0:
                end_s = at + left_bits / bps
                if end_s <= until_s:
                    return end_s
                left_bits -= bps * (until_s - at)
                if left_bits <= 0.0:  # the rounding of the last piece
                    return until_s
            at = until_s
        return math.inf


@dataclass(frozen=True)
class Constant(Link):
    """The same rate for ever, in bit/s."""

    bps: float

    def __post_init__(self) -> None:
        _positive("constant link", bps=self.bps)

    def pieces(self, start_s: float) -> Iterator[tuple[float, float]]:  # noqa: ARG002 (the same at any time)
        yield math.inf, self.bps

    def finish_s(self, start_s: float, payload_bytes: int) -> float:
        return start_s + 8 * payload_bytes / self.bps


@dataclass(frozen=True)
class LogNormal(Link):
    """A rate drawn anew every interval: the mean of `draws` log-normal numbers.

    Args:
        mean_bps: bit/s; the expectation with `preserve_mean`, else the median of a single draw, whose mean is exp(sigma**2 / 2) larger.
        sigma: of the rate's natural logarithm.
        period_s: length of an interval; the papers draw once a round, so about one round.
        seed, stream: what the draws are a function of, with the interval's number.
        draws: how many are averaged; more of them make a steadier link.

    Source: FedGMR's links, sigma 0.3 (server 0.1), mean of 20 draws a round (algorithms.md section 4). Differs: drawn per interval of time,
    because asynchronous devices have no common rounds.
    """

    mean_bps: float
    sigma: float = 0.3
    period_s: float = 10.0
    seed: int = 0
    stream: str = ""
    draws: int = 20
    preserve_mean: bool = True
    _memo: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _positive("log-normal link", mean_bps=self.mean_bps, period_s=self.period_s, draws=self.draws)
        _not_negative("log-normal link", sigma=self.sigma)

    def rate_bps(self, interval: int) -> float:
        """The rate of interval `interval` >= 0, in bit/s."""
        block, index = divmod(interval, BLOCK)
        rates = self._memo.get(block)
        if rates is None:
            shift = -0.5 * self.sigma**2 if self.preserve_mean else 0.0
            normal = generator(self.seed, self.stream, block).standard_normal((BLOCK, self.draws))
            rates = (self.mean_bps * np.exp(self.sigma * normal + shift).mean(axis=1)).tolist()
            if len(self._memo) >= MEMO_BLOCKS:
                self._memo.clear()
            self._memo[block] = rates
        return rates[index]

    def pieces(self, start_s: float) -> Iterator[tuple[float, float]]:
        for interval in count(int(start_s // self.period_s)):
            yield (interval + 1) * self.period_s, self.rate_bps(interval)


@dataclass(frozen=True)
class Trace(Link):
    """A recorded rate: bps[i] from times_s[i] until times_s[i + 1].

    Virtual time 0 is the first row. The last row lasts as long as the one before it, then the trace begins again; without `repeat` its rate
    stays. A rate of 0 is an outage.

    Raises:
        LocalError: no row, rows of unequal number, times that do not increase, a rate < 0 or none > 0.
    """

    times_s: tuple[float, ...]
    bps: tuple[float, ...]
    repeat: bool = True

    def __post_init__(self) -> None:
        if not self.times_s or len(self.times_s) != len(self.bps):
            raise UsageError(f"trace: {len(self.times_s)} times for {len(self.bps)} rates")
        if not all(math.isfinite(number) for number in (*self.times_s, *self.bps)) or min(self.bps) < 0.0:
            raise UsageError("trace: times and rates must be finite, rates >= 0")
        if any(later <= earlier for earlier, later in pairwise(self.times_s)):
            raise UsageError("trace: times must increase")
        if max(self.bps) == 0.0:
            raise UsageError("trace: every rate is 0, nothing could ever be sent")

    def pieces(self, start_s: float) -> Iterator[tuple[float, float]]:
        first_s, rows = self.times_s[0], len(self.times_s)
        if rows == 1:
            yield math.inf, self.bps[0]
            return
        cycle_s = (self.times_s[-1] - first_s) + (self.times_s[-1] - self.times_s[-2])
        cycle = int(start_s // cycle_s) if self.repeat else 0
        row = max(bisect_right(self.times_s, start_s - cycle * cycle_s + first_s) - 1, 0)
        while True:
            for index in range(row, rows - 1):
                yield cycle * cycle_s + (self.times_s[index + 1] - first_s), self.bps[index]
            if not self.repeat:
                yield math.inf, self.bps[-1]
                return
            cycle, row = cycle + 1, 0
            yield cycle * cycle_s, self.bps[-1]


def read_trace(path: Path, *, repeat: bool = True) -> Trace:
    """The link that was recorded in a CSV of `seconds,bits_per_second`; `#` lines are comments, the header is optional.

    Raises:
        LocalError: names the file and the line that does not fit.
    """
    times: list[float] = []
    rates: list[float] = []
    number = 0
    for number, cells in read_rows(path, HEADER):
        seconds, bps = cells
        if times and seconds <= times[-1]:
            raise UsageError(f"{path}:{number}: {seconds} s does not come after {times[-1]} s; sort the rows and drop repeated ones")
        if bps < 0.0:
            raise UsageError(f"{path}:{number}: a rate of {bps} bit/s; it must be >= 0")
        times.append(seconds)
        rates.append(bps)
    if max(rates) == 0.0:
        raise UsageError(f"{path}:{number}: every rate up to here is 0, nothing could ever be sent; record a longer trace")
    return Trace(tuple(times), tuple(rates), repeat)


def read_rows(path: Path, header: Sequence[str]) -> list[tuple[int, tuple[float, ...]]]:
    """(line number, finite numbers) of every row of a CSV file with these columns; at least one row.

    Raises:
        LocalError: names the file and the line.
    """
    rows: list[tuple[int, tuple[float, ...]]] = []
    wanted = ",".join(header)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, line in enumerate(lines, 1):
                text = line.partition("#")[0].strip()
                if not text:
                    continue
                cells = [cell.strip() for cell in text.split(",")]
                if not rows and [cell.lower() for cell in cells] == list(header):
                    continue
                rows.append((number, _numbers(cells, len(header), f"{path}:{number}: expected {wanted}, got {text!r}")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as a CSV of {wanted}: {error}") from error
    if not rows:
        raise UsageError(f"{path}:1: no rows; expected {wanted}")
    return rows


def _numbers(cells: Sequence[str], columns: int, complaint: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(cell) for cell in cells)
    except ValueError:
        raise UsageError(complaint) from None
    if len(numbers) != columns or not all(math.isfinite(number) for number in numbers):
        raise UsageError(complaint)
    return numbers


@dataclass(frozen=True)
class WithOutages(Link):
    """A link that falls silent now and then: it works for an exponential time, then nothing moves for one.

    Time goes on for the link below meanwhile; what was being sent goes on where it was. The connection itself stays. It works at time 0.
    """

    link: Link
    mean_up_s: float
    mean_down_s: float
    seed: int = 0
    stream: str = ""
    _edges_s: list[float] = field(default_factory=lambda: [0.0], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _positive("outages", mean_up_s=self.mean_up_s, mean_down_s=self.mean_down_s)

    def _draw_until(self, time_s: float) -> None:
        """Even edges begin a working time, odd ones an outage; blocks follow one another, whoever asks."""
        while self._edges_s[-1] <= time_s:
            block = (len(self._edges_s) - 1) // (2 * BLOCK)
            lengths_s = generator(self.seed, self.stream, block).exponential((self.mean_up_s, self.mean_down_s), (BLOCK, 2))
            self._edges_s.extend((self._edges_s[-1] + np.cumsum(lengths_s.ravel())).tolist())

    def pieces(self, start_s: float) -> Iterator[tuple[float, float]]:
        self._draw_until(start_s)
        edge = bisect_right(self._edges_s, start_s)  # the next one
        below = self.link.pieces(start_s)
        below_until_s, bps = next(below)
        while below_until_s < math.inf or bps > 0.0:
            if edge == len(self._edges_s):
                self._draw_until(self._edges_s[-1])
            edge_s = self._edges_s[edge]
            if edge % 2 == 0:  # an outage: over it at once, for it may last longer than anybody could count pieces of the link below
                yield edge_s, 0.0
                edge += 1
                below = self.link.pieces(edge_s)
                below_until_s, bps = next(below)
                continue
            until_s = min(edge_s, below_until_s)
            yield until_s, bps
            edge += edge_s == until_s
            if below_until_s == until_s:
                below_until_s, bps = next(below)
        yield math.inf, 0.0


@dataclass(frozen=True)
class Latency:
    """One-way delay between an end and the broker: `base_s` and, drawn every `period_s`, an exponential extra of mean `jitter_s`."""

    base_s: float
    jitter_s: float = 0.0
    period_s: float = 1.0
    seed: int = 0
    stream: str = ""
    _memo: dict[int, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _not_negative("latency", base_s=self.base_s, jitter_s=self.jitter_s)
        _positive("latency", period_s=self.period_s)

    def at_s(self, time_s: float) -> float:
        """The delay of a message that starts at `time_s` >= 0, in seconds."""
        if self.jitter_s == 0.0:
            return self.base_s
        block, index = divmod(int(time_s // self.period_s), BLOCK)
        extra = self._memo.get(block)
        if extra is None:
            if len(self._memo) >= MEMO_BLOCKS:
                self._memo.clear()
            extra = self._memo[block] = generator(self.seed, self.stream, block).standard_exponential(BLOCK)
        return self.base_s + self.jitter_s * float(extra[index])
