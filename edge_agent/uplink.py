"""What the uplink really carries: goodput from acknowledged publishes, never from a socket's own counters.

Strategy: publishes that overlap in time are one transfer (chunks go out two deep); its rate is the bytes acknowledged
over the time from its first byte to its last acknowledgement. That time holds one acknowledgement latency, which is
known from the quickest tiny publish (a heartbeat) and taken off. Transfers are pooled, byte-weighted, until they hold
two seconds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from regrow.errors import LocalError

POOL_S = 2.0
TINY_BYTES = 1024
LONG_TRANSFER_S = 10.0  # lab.md: of a transfer this long the first second is dropped
START_UP_S = 1.0
KEPT_TRANSFERS = 64


def packet_bytes(topic: str, payload_bytes: int) -> int:
    """Bytes of an MQTT 3.1.1 QoS 1 PUBLISH as sent: fixed header, topic, packet id and payload."""
    remaining_bytes = 2 + len(topic.encode()) + 2 + payload_bytes
    length_bytes = 1 + (remaining_bytes > 127) + (remaining_bytes > 16_383) + (remaining_bytes > 2_097_151)
    return 1 + length_bytes + remaining_bytes


@dataclass(frozen=True, slots=True)
class Transfer:
    """Overlapping publishes seen as one: bytes, seconds from the first byte to the last acknowledgement.

    `latency_inside` says whether the seconds hold an acknowledgement latency: between two acknowledgements they do not.
    """

    sent_bytes: int
    busy_s: float
    latency_inside: bool = True


@dataclass(slots=True)
class _Open:
    """The transfer that may still grow."""

    started_s: float
    acked_s: float
    sent_bytes: int
    cut_s: float | None = None  # first acknowledgement after the start-up second
    after_cut_bytes: int = 0

    def grow(self, sent_bytes: int, acked_s: float) -> None:
        self.sent_bytes += sent_bytes
        self.acked_s = max(self.acked_s, acked_s)
        if self.cut_s is not None:
            self.after_cut_bytes += sent_bytes
        elif acked_s - self.started_s >= START_UP_S:
            self.cut_s = acked_s

    def transfer(self) -> Transfer:
        busy_s = self.acked_s - self.started_s
        if busy_s >= LONG_TRANSFER_S and self.cut_s is not None and self.after_cut_bytes and self.acked_s > self.cut_s:
            return Transfer(self.after_cut_bytes, self.acked_s - self.cut_s, latency_inside=False)
        return Transfer(self.sent_bytes, busy_s)


class UplinkMeter:
    """Goodput of the uplink in bit/s, from (bytes, first byte left, acknowledged) of publishes.

    Args:
        kept: raw samples kept for `samples` and the mean, the I of PR-FL's rule and the length of its queue.

    Raises:
        LocalError: kept is not positive.
    """

    def __init__(self, kept: int = 10) -> None:
        if kept < 1:
            raise LocalError(f"the meter must keep at least one sample, got {kept}")
        self.samples: deque[float] = deque(maxlen=kept)
        self._transfers: deque[Transfer] = deque(maxlen=KEPT_TRANSFERS)
        self._open: _Open | None = None
        self._tiny: Transfer | None = None
        self._sampled_s = 0.0

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
        if self._open is not None and started_s >= self._open.acked_s:
            self.finish()
        if self._open is None and sent_bytes <= TINY_BYTES:
            if self._tiny is None or acked_s - started_s < self._tiny.busy_s:
                self._tiny = Transfer(sent_bytes, acked_s - started_s)
            return
        if self._open is None:
            self._open = _Open(started_s, started_s, 0)
        self._open.grow(sent_bytes, acked_s)

    def finish(self) -> None:
        """The transfer is over: close it and take a raw sample when two seconds have gathered since the last one."""
        if self._open is None:
            return
        transfer = self._open.transfer()
        self._open = None
        self._transfers.append(transfer)
        self._sampled_s += transfer.busy_s
        estimate_bps = self.estimate_bps
        if estimate_bps is not None and (self._sampled_s >= POOL_S or not self.samples):
            self.samples.append(estimate_bps)
            self._sampled_s = 0.0

    @property
    def estimate_bps(self) -> float | None:
        """The newest transfers, pooled until they hold two seconds; None while nothing was ever measured.

        The latency l of the quickest tiny publish of b bytes holds those bytes' own b / rate, so the rate solves
        bytes = rate * (seconds - k * (l - b / rate)) for k latencies.
        """
        transfers = list(self._transfers)
        if self._open is not None:
            transfers.append(self._open.transfer())
        pooled_bytes, pooled_s, latencies = 0, 0.0, 0
        for transfer in reversed(transfers):
            pooled_bytes += transfer.sent_bytes
            pooled_s += transfer.busy_s
            latencies += transfer.latency_inside
            if pooled_s >= POOL_S:
                break
        if pooled_bytes == 0:
            return None
        if self._tiny is not None:
            less_bytes = pooled_bytes - latencies * self._tiny.sent_bytes
            less_s = pooled_s - latencies * self._tiny.busy_s
            # A latency that was most of the time says more about the link's mood than about its rate.
            if less_bytes > 0 and less_s > pooled_s / 2:
                return less_bytes * 8 / less_s
        return pooled_bytes * 8 / pooled_s

    @property
    def mean_bps(self) -> float | None:
        """Mean of the last raw samples, first in first out; None while nothing was ever measured."""
        return sum(self.samples) / len(self.samples) if self.samples else None

    def to_state(self) -> dict[str, Any]:
        """What survives a restart, as JSON can carry it; absolute times are of this boot and stay behind."""
        self.finish()
        tiny = self._tiny
        return {
            "kept": self.samples.maxlen,
            "samples_bps": list(self.samples),
            "transfers": [[t.sent_bytes, t.busy_s, t.latency_inside] for t in self._transfers],
            "tiny": None if tiny is None else [tiny.sent_bytes, tiny.busy_s],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> UplinkMeter:
        """The meter as it was saved.

        Raises:
            LocalError: the state does not check out; the caller sets it aside and starts unmeasured.
        """
        try:
            meter = cls(int(state["kept"]))
            meter.samples.extend(_positive(sample) for sample in state["samples_bps"])
            for sent_bytes, busy_s, latency_inside in state["transfers"]:
                meter._transfers.append(Transfer(int(_positive(sent_bytes)), _positive(busy_s), bool(latency_inside)))
            if state["tiny"] is not None:
                sent_bytes, busy_s = state["tiny"]
                meter._tiny = Transfer(int(_positive(sent_bytes)), _positive(busy_s))
        except (KeyError, TypeError, ValueError) as err:
            raise LocalError(f"saved uplink state does not check out: {err!r}") from err
        return meter


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected a positive number, got {value!r}")
    return float(value)
