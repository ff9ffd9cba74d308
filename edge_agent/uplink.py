"""What the uplink really carries: goodput from acknowledged publishes, never from a socket's own counters.

Strategy: publishes that overlap in time are one transfer (chunks go out two deep). Inside it every acknowledgement ends a
piece: its bytes, and the seconds since the acknowledgement before, or since the first byte of the transfer. Only that first
piece holds an acknowledgement latency, which is known from the quickest of the last tiny publishes (heartbeats), or from
TCP, and taken off. Pieces are pooled until they hold a second; that is a sample. The estimate is the mean of the last I
samples, bytes over seconds, without outliers: an outage among them changes nothing, while common noise, slow seconds as well
as quick ones, stays in. It comes with its 95 % interval.

Drift: when the newest three samples lie on the same side of all that came before them, further than a fifth and than three
robust deviations, the link has changed and the older samples are forgotten.

A link that became much slower acknowledges its next chunk only after a long time. Until then the bytes that TCP has seen
acknowledged, by the second, stand in for it, and only where they tell of a slower link: a proxy in between takes bytes
quicker than the link behind it carries them, never slower.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from regrow.errors import LocalError
from regrow.intervals import half_interval

SAMPLE_S = 1.0
TINY_BYTES = 1024
KEPT_TINY = 20
DRIFT = 0.2
DRIFT_SAMPLES = 3
DRIFT_DEVIATIONS = 3.0
WINDOW_S = 1.0
WINDOW_BYTES = 8 * 1024  # fewer segments than six say little
OUTLIER = 0.5
OUTLIER_DEVIATIONS = 4.0
_DEVIATION_OF_MAD = 1.4826


def packet_bytes(topic: str, payload_bytes: int) -> int:
    """Bytes of an MQTT 3.1.1 QoS 1 PUBLISH as sent: fixed header, topic, packet id and payload."""
    remaining_bytes = 2 + len(topic.encode()) + 2 + payload_bytes
    length_bytes = 1 + (remaining_bytes > 127) + (remaining_bytes > 16_383) + (remaining_bytes > 2_097_151)
    return 1 + length_bytes + remaining_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes, the seconds that the link took for them, and how many acknowledgement latencies these hold."""

    sent_bytes: int = 0
    seconds: float = 0.0
    latencies: int = 0

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.sent_bytes + other.sent_bytes, self.seconds + other.seconds, self.latencies + other.latencies)

    @property
    def bps(self) -> float:
        return self.sent_bytes * 8 / self.seconds


def without_outliers(samples: Sequence[Piece]) -> list[Piece]:
    """The samples without those that an outage or a burst spoiled: further from the median than half of it and four robust deviations."""
    middle = median(sample.bps for sample in samples)
    deviation = _DEVIATION_OF_MAD * median(abs(sample.bps - middle) for sample in samples)
    gap = max(OUTLIER * middle, OUTLIER_DEVIATIONS * deviation)
    return [sample for sample in samples if abs(sample.bps - middle) <= gap]


def robust_mean(samples: Sequence[Piece]) -> float:
    """Bytes over seconds of the samples without outliers, in bit/s; at least one sample."""
    return sum(without_outliers(samples), Piece()).bps


def interval_95(samples: Sequence[Piece]) -> tuple[float, float] | None:
    """95 % interval of the robust mean of independent samples, in bit/s (Student's t); None for fewer than two, which tell no spread."""
    half = half_interval([sample.bps for sample in without_outliers(samples)] if samples else [])
    if half is None:
        return None
    mean = robust_mean(samples)
    return max(mean - half, 0.0), mean + half


class UplinkMeter:
    """Goodput of the uplink in bit/s, from (bytes, first byte left, acknowledged) of publishes.

    Args:
        kept: samples that the estimate is made of, the I of PR-FL's rule.

    Attributes:
        samples: each over a second or more, oldest first.
        taken: how many samples there were ever; drifts: how often the link has changed. For whoever wants to tell of news.

    Raises:
        LocalError: kept is not positive.
    """

    def __init__(self, kept: int = 10) -> None:
        if kept < 1:
            raise LocalError(f"the meter must keep at least one sample, got {kept}")
        self.samples: deque[Piece] = deque(maxlen=kept)
        self.taken = self.drifts = 0
        self._pool = Piece()
        self._tiny: deque[Piece] = deque(maxlen=KEPT_TINY)
        self._acked_s = float("-inf")  # the last acknowledgement of more than a tiny publish
        self._window: tuple[float, int] | None = None
        self._settled = self._stood_in = False
        self._least_rtt_s: float | None = None

    def add(self, sent_bytes: int, started_s: float, acked_s: float) -> None:
        """Count one acknowledged publish; in the order of the acknowledgements.

        Args:
            sent_bytes: of the whole packet (see `packet_bytes`), > 0.
            started_s: the first byte was handed to the link, monotonic.
            acked_s: its acknowledgement came, monotonic, > started_s.

        Raises:
            LocalError: times or bytes that cannot be.
        """
        if sent_bytes <= 0 or not (math.isfinite(started_s) and math.isfinite(acked_s) and acked_s > started_s):
            raise LocalError(f"impossible uplink sample: {sent_bytes} B from {started_s} to {acked_s} s")
        if started_s < self._acked_s:
            piece = Piece(sent_bytes, max(acked_s - self._acked_s, 0.0))
        elif sent_bytes <= TINY_BYTES:
            self._tiny.append(Piece(sent_bytes, acked_s - started_s))
            return
        else:
            piece = Piece(sent_bytes, acked_s - started_s, 1)
        self._acked_s = max(acked_s, self._acked_s)
        self._window = None
        if self._stood_in:
            self._pool, self._stood_in = Piece(), False
            return
        self._pool += piece
        if self._pool.seconds >= SAMPLE_S:
            self._take(self._less_latency(self._pool))
            self._pool = Piece()

    def broken(self) -> None:
        """The connection has ended: no sample may be made of bytes from before it and after it."""
        self._pool, self._window, self._settled, self._stood_in = Piece(), None, False, False
        self._acked_s = float("-inf")

    def progress(self, delivered_bytes: int | None, now: float, least_rtt_s: float | None = None) -> None:
        """What TCP knows between two acknowledgements of ours; to be called about once a second.

        Args:
            delivered_bytes: acknowledged by the other end's TCP since the connection began; None: not known, or nothing is under way.
            now: monotonic seconds.
            least_rtt_s: the shortest round trip of the connection's packets, where it is known.
        """
        self._least_rtt_s = least_rtt_s
        if delivered_bytes is None or self._window is None or delivered_bytes < self._window[1]:
            self._window, self._settled = None if delivered_bytes is None else (now, delivered_bytes), False
            return
        seconds, gone_bytes = now - self._window[0], delivered_bytes - self._window[1]
        if seconds < WINDOW_S or gone_bytes < WINDOW_BYTES:
            return
        self._window = (now, delivered_bytes)
        sample, estimate_bps = Piece(gone_bytes, seconds), self.estimate_bps
        if self._settled and estimate_bps is not None and sample.bps < (1 - DRIFT) * estimate_bps:
            self._stood_in = True
            self._take(sample)
        self._settled = True  # the first window may hold bytes from before the change

    @property
    def estimate_bps(self) -> float | None:
        """The robust mean of the samples, or of less than a second where there is no more; None while nothing was ever measured."""
        if self.samples:
            return robust_mean(self.samples)
        return self._less_latency(self._pool).bps if self._pool.sent_bytes and self._pool.seconds else None

    @property
    def covers_s(self) -> float:
        """How many seconds of sending the estimate is made of."""
        return math.fsum(sample.seconds for sample in self.samples)

    @property
    def interval_bps(self) -> tuple[float, float] | None:
        """The 95 % interval of the estimate; None while two samples are not there."""
        return interval_95(self.samples)

    def _less_latency(self, pool: Piece) -> Piece:
        """The bytes and seconds of a pool without its latencies.

        A publish of b bytes that was acknowledged after s seconds came with a latency of l = s - b / rate. So with k such latencies
        the rate solves bytes = rate * (seconds - k * (s - b / rate)). TCP's shortest round trip is a latency without bytes.
        """
        quickest = min((*self._tiny, *([Piece(0, self._least_rtt_s)] if self._least_rtt_s else [])), key=lambda p: p.seconds, default=None)
        if quickest is not None:
            less_bytes = pool.sent_bytes - pool.latencies * quickest.sent_bytes
            less_s = pool.seconds - pool.latencies * quickest.seconds
            # A latency that was most of the time says more about the link's mood than about its rate.
            if less_bytes > 0 and less_s > pool.seconds / 2:
                return Piece(less_bytes, less_s)
        return Piece(pool.sent_bytes, pool.seconds)

    def _take(self, sample: Piece) -> None:
        self.samples.append(sample)
        self.taken += 1
        before, newest = list(self.samples)[:-DRIFT_SAMPLES], list(self.samples)[-DRIFT_SAMPLES:]
        if not before:
            return
        middle = median(older.bps for older in before)
        deviation = _DEVIATION_OF_MAD * median(abs(older.bps - middle) for older in before)
        gap = max(DRIFT * middle, DRIFT_DEVIATIONS * deviation)
        rates = [newer.bps for newer in newest]
        if min(rates) - middle > gap or middle - max(rates) > gap:
            self.samples.clear()
            self.samples.extend(newest[1:])  # the first one may hold some of the time before the change
            self.drifts += 1

    def to_state(self) -> dict[str, Any]:
        """What survives a restart, as JSON can carry it; absolute times are of this boot and stay behind."""
        pool = self._pool
        return {
            "kept": self.samples.maxlen,
            "samples": [[sample.sent_bytes, sample.seconds] for sample in self.samples],
            "pool": [pool.sent_bytes, pool.seconds, pool.latencies],
            "tiny": [[piece.sent_bytes, piece.seconds] for piece in self._tiny],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> UplinkMeter:
        """The meter as it was saved.

        Raises:
            LocalError: the state does not check out; the caller sets it aside and starts unmeasured.
        """
        try:
            meter = cls(int(state["kept"]))
            meter.samples.extend(_piece(sample) for sample in state["samples"])
            sent_bytes, seconds, latencies = state["pool"]
            if sent_bytes:
                meter._pool = Piece(int(_positive(sent_bytes)), _positive(seconds), int(latencies and _positive(latencies)))
            meter._tiny.extend(_piece(tiny) for tiny in state["tiny"])
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise LocalError(f"saved uplink state does not check out: {err!r}") from err
        return meter


def _piece(saved: Any) -> Piece:
    sent_bytes, seconds = saved
    return Piece(int(_positive(sent_bytes)), _positive(seconds))


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected a positive number, got {value!r}")
    return float(value)
