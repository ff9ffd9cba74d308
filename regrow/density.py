"""How large a part of the model a device starts with, or deserves: from its measured link, or from its round times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from regrow.errors import LocalError

SLACK = 0.9  # a rung is given when the link carries 0.9 of what it needs, up to the next rung (ours)
Bound = Literal["link", "compute", "memory"]
FASTEST_OVER_MEDIAN = 10.0  # what devices say of their speed is believed up to here (ours)
GRID = 64  # PR-FL's densities are rounded to 1/64, which bounds the chunks of a large fleet (ours)


def full_density_goodput_bps(ascending_bps: Sequence[float]) -> float:
    """The link that deserves the whole model, bit/s: the 90th percentile (nearest rank) of the live ones, which ascend; at least one."""
    return ascending_bps[math.ceil(0.9 * len(ascending_bps)) - 1]


def full_density_speed(ascending_per_s: Sequence[float]) -> float:
    """The speed that deserves the whole model, steps per second: the 90th percentile (nearest rank), as far as it can be believed.

    A speed is what a device says of itself, and a high one makes everybody else's model smaller. So it is never that of the single fastest
    of several devices, which the percentile is below ten of them, and at most 10 times the median (of an even number the lower one).

    Args:
        ascending_per_s: full-model steps per second of the live devices, ascending; at least one.

    Source: ours.
    """
    count = len(ascending_per_s)
    rank = min(math.ceil(0.9 * count), max(count - 1, 1))
    return min(ascending_per_s[rank - 1], FASTEST_OVER_MEDIAN * ascending_per_s[(count - 1) // 2])


def initial_density(uplink_bps: float, ladder: Sequence[float], full_density_bps: float) -> float:
    """FedGMR's class of a device: the lowest rung >= 0.9 x its link relative to the full-density link.

    Args:
        uplink_bps: the device's measured goodput, > 0.
        ladder: densities, ascending, the last 1.0.
        full_density_bps: the link that carries the whole model: what the task names, or `full_density_goodput_bps` of the live devices.

    Returns:
        A rung of the ladder.

    Raises:
        LocalError: a link is not finite and > 0, or the ladder does not end at 1.0.

    Source: FedGMR, classes by bandwidth; the percentile and the slack are ours (algorithms.md section 4).
    """
    if not (math.isfinite(uplink_bps) and uplink_bps > 0.0 and math.isfinite(full_density_bps) and full_density_bps > 0.0):
        raise LocalError(f"density: link of {uplink_bps} bit/s against {full_density_bps} bit/s")
    if not ladder or list(ladder) != sorted(ladder) or ladder[-1] != 1.0:
        raise LocalError(f"density: ladder {tuple(ladder)} does not ascend to 1.0")
    wanted = SLACK * uplink_bps / full_density_bps
    return next((rung for rung in ladder if rung >= wanted - 1e-9), 1.0)


def tightest(by_link: float, by_compute: float, by_memory: float) -> tuple[float, Bound]:
    """The smallest of what a device's link, its computing and its memory allow, and which it is; of equal ones the first."""
    bounds: tuple[tuple[float, Bound], ...] = ((by_link, "link"), (by_compute, "compute"), (by_memory, "memory"))
    return min(bounds, key=lambda bound: bound[0])


def full_density_round_s(compute_s: float, density: float, full_model_bytes: int, goodput_bps: float) -> float:
    """What a round would take this device at density 1: its compute scaled up, plus the whole model over its link.

    PR-FL's rule chases its own tail on raw times, because a smaller model makes a faster round; hence this.

    Args:
        compute_s: measured training time of a round, seconds.
        density: (0, 1], what that round trained.
        full_model_bytes: bytes of an upload at density 1.
        goodput_bps: measured uplink, bit/s.

    Raises:
        LocalError: a value is out of range.
    """
    if not (math.isfinite(compute_s) and compute_s >= 0.0 and 0.0 < density <= 1.0):
        raise LocalError(f"density: {compute_s} s of compute at density {density}")
    if full_model_bytes <= 0 or not (math.isfinite(goodput_bps) and goodput_bps > 0.0):
        raise LocalError(f"density: {full_model_bytes} bytes over {goodput_bps} bit/s")
    return compute_s / density + 8.0 * full_model_bytes / goodput_bps


def remember_round(window: Sequence[float], round_s: float, size: int) -> tuple[float, ...]:
    """The FIFO of a device's last `size` normalised round times with one more, oldest first, seconds."""
    if size < 1 or not (math.isfinite(round_s) and round_s > 0.0):
        raise LocalError(f"density: a round of {round_s} s in a window of {size}")
    return (*window, round_s)[-size:]


def mean_round_s(window: Sequence[float]) -> float | None:
    """tbar of a device's last normalised round times, seconds, or None without any."""
    return math.fsum(window) / len(window) if window else None


def relative_density(fastest_s: float, mean_s: float, minimum: float = 0.0) -> float:
    """PR-FL's rule: rho_i = max(min_j tbar_j / tbar_i, rho_min_i), to the nearest 1/64 and at least 1/64.

    Args:
        fastest_s: min_j tbar_j, the fastest device's mean round time normalised to full density, seconds, > 0.
        mean_s: tbar_i, this device's.
        minimum: rho_min_i, as restoration raised it; applied before rounding, and never rounded below.

    Returns:
        Its density in (0, 1].

    Source: PR-FL; the normalisation and the rounding are ours (algorithms.md sections 2 and 4).
    """
    steps = max(1, round(fastest_s / mean_s * GRID), math.ceil(minimum * GRID - 1e-9))
    return min(steps / GRID, 1.0)
