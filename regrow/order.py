"""One order of all coordinates per epoch, in which every sub-model is a prefix.

Position space is what the rest of the system works in: first the always-kept coordinates, then increment 1, 2, ...;
inside each of these segments positions follow the flat coordinate. So a mask is one integer, the prefix length, and
an increment is one contiguous slice.

How: only the membership of the increments matters, not the ranking inside them. So the values are sorted without
their indices, every coordinate is labelled by comparing it with the values at the boundaries, and one stable radix
sort of the small labels yields the order. Ties go to the lower flat coordinate, so equal inputs give equal orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.parameters import Layout

ImportanceKind = Literal["wg", "g", "w"]
MAX_LEVELS = 254  # with the always-kept segment and what is left, a label is one byte


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of the flat coordinates together with its levels.

    Args:
        epoch: which refresh this order belongs to, >= 0.
        coordinates: uint32 [n], position -> flat coordinate, ascending inside each segment. Frozen here.
        lengths: prefix length of each level, ascending, the last is n.
        always_kept: length of the first segment, part of every level.

    Raises:
        LocalError: these do not describe such an order.
    """

    epoch: int
    coordinates: NDArray[np.uint32]
    lengths: tuple[int, ...]
    always_kept: int

    def __post_init__(self) -> None:
        n = self.coordinates.size
        if self.coordinates.dtype != np.uint32 or self.coordinates.ndim != 1 or n == 0 or self.epoch < 0:
            raise LocalError("order: needs epoch >= 0 and a non-empty uint32 vector of coordinates")
        bounds = (0, self.always_kept, *self.lengths)
        if not 1 <= len(self.lengths) <= MAX_LEVELS or bounds[-1] != n or list(bounds) != sorted(bounds):
            raise LocalError(f"order: lengths {self.lengths} do not rise from {self.always_kept} to {n}")
        seen = np.zeros(n, np.bool_)
        if int(self.coordinates.max()) < n:
            seen[self.coordinates] = True
        if not seen.all():
            raise LocalError("order: the coordinates are not a permutation")
        falls = np.flatnonzero(self.coordinates[1:] < self.coordinates[:-1]) + 1
        if not set(falls.tolist()) <= set(bounds):
            raise LocalError("order: a segment is not sorted by flat coordinate")
        self.coordinates.setflags(write=False)

    @property
    def size(self) -> int:
        return self.coordinates.size

    def segments(self) -> tuple[tuple[int, int], ...]:
        """The non-empty segments as (start, stop) positions: the always-kept one, then each increment."""
        bounds = (0, self.always_kept, *self.lengths)
        return tuple((a, b) for a, b in pairwise(bounds) if a < b)

    @cached_property
    def position_of(self) -> NDArray[np.uint32]:
        """uint32 [n], flat coordinate -> position: the inverse permutation, made when first asked for."""
        inverse = np.empty_like(self.coordinates)
        inverse[self.coordinates] = np.arange(self.size, dtype=np.uint32)
        inverse.setflags(write=False)
        return inverse


def level_length(density: float, n: int, always_kept: int) -> int:
    """The prefix length of a density: round(density * n), but never less than what is always kept.

    Raises:
        LocalError: the density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise LocalError(f"density {density} is not in (0, 1]")
    return max(round(density * n), always_kept)


def importance(
    kind: ImportanceKind,
    weights: NDArray[np.float32],
    change: NDArray[np.float32] | None = None,
    accumulated_squares: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """How much each coordinate matters, from the model and how it moved.

    Args:
        kind: `wg` |w dw| (FedGMR), `g` accumulated dw^2 (PR-FL), `w` |w| (FIARSE, and the first order of all).
        weights: float32 [n], W in flat coordinates.
        change: float32 [n], dw, the change of W since the last refresh; for `wg`.
        accumulated_squares: float32 [n], the sum of dw^2 over the aggregations so far; for `g`.

    Returns:
        float32 [n], >= 0, larger is more important.

    Raises:
        LocalError: unknown kind, or what the kind needs was not given.

    Source: algorithms.md section 2; FedGMR FMP (ranking as (w dw)^2 does), PR-FL, FIARSE.
    """
    if kind == "w":
        return _magnitude(weights)
    if kind == "wg" and change is not None:
        return _magnitude(weights * change)
    if kind == "g" and accumulated_squares is not None:
        return _magnitude(accumulated_squares)
    raise LocalError(f"importance {kind!r}: unknown, or its input (change, accumulated_squares) is missing")


def _magnitude(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.absolute(vector, dtype=np.float32)


def check_floor(layout: Layout, densities: Sequence[float], floor: float) -> tuple[int, ...]:
    """How many coordinates of each prunable layer the floor keeps, in layout order; call it when reading a config.

    Raises:
        LocalError: the floor is not in [0, 1], or the layers' floors do not fit into the first level.
    """
    if not 0.0 <= floor <= 1.0:
        raise LocalError(f"floor {floor} is not in [0, 1]")
    prunable = [tensor for tensor in layout.tensors if not tensor.always_kept]
    counts = tuple(max(1, round(floor * tensor.size)) if floor > 0.0 else 0 for tensor in prunable)
    always_kept = layout.always_kept_coordinates.size
    room = level_length(densities[0], layout.size, always_kept) - always_kept
    if sum(counts) > room:
        raise LocalError(
            f"floor {floor} keeps {sum(counts)} coordinates, but the lowest density {densities[0]} has room for {room} "
            f"beside the {always_kept} always-kept ones: lower the floor or raise the density"
        )
    return counts


def build_order(
    layout: Layout,
    importance: NDArray[np.float32],
    densities: Sequence[float],
    epoch: int,
    floor: float = 0.0,
    magnitude: NDArray[np.float32] | None = None,
    costs: Mapping[str, float] | None = None,
) -> Order:
    """The order of one epoch: always-kept first, then by falling importance, cut at the densities.

    Args:
        layout: the model's tensors.
        importance: float32 [n], flat coordinates, larger comes first. Not modified.
        densities: the distinct densities in use, ascending, the last 1.0.
        epoch: number of this order.
        floor: fraction of every prunable layer, its largest `magnitude`, that is in the first level in any case.
        magnitude: float32 [n], |w| in flat coordinates; needed with a floor.
        costs: layer name -> coefficient > 0 that divides the layer's importance.

    Returns:
        The order, one level per density.

    Raises:
        LocalError: an argument is out of range, the importance has a NaN, or the floor exceeds the first level.

    Source: algorithms.md section 2 [G FMP, P].
    """
    n = layout.size
    always_kept = layout.always_kept_coordinates.size
    _check_densities(densities)
    _check_vector("importance", importance, n)
    lengths = tuple(level_length(density, n, always_kept) for density in densities)
    labels = np.full(n, np.uint16(2), np.uint16)  # 0 always kept, 1 first increment, 2 not yet known
    labels[layout.always_kept_coordinates] = 0
    floored = _mark_floor(labels, layout, check_floor(layout, densities, floor), magnitude)
    candidates = np.flatnonzero(labels == 2)
    key = -_divided_by_costs(layout, importance, costs)[candidates]
    boundaries = np.array([length - always_kept - floored for length in lengths[:-1]], np.int64)
    labels[candidates] = _increment_of(key, boundaries) + np.uint16(1)
    coordinates = np.argsort(labels, kind="stable").astype(np.uint32)
    return Order(epoch, coordinates, lengths, always_kept)


def _increment_of(key: NDArray[np.float32], boundaries: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Which increment each element falls into when the elements are ranked by key, then by index.

    Args:
        key: float32 [m], the smallest first.
        boundaries: int64, ascending ranks at which increment 1, 2, ... begin.
    """
    inner = boundaries[boundaries < key.size]
    if inner.size == 0:
        return np.zeros(key.size, np.uint16)
    thresholds = np.sort(key)[inner]
    increments = np.searchsorted(thresholds, key, side="right").astype(np.uint16)  # settled, except between equals
    for threshold in np.unique(thresholds):
        equals = np.flatnonzero(key == threshold)
        first_rank = int(np.count_nonzero(key < threshold))
        ranks = np.arange(first_rank, first_rank + equals.size)
        increments[equals] = np.searchsorted(inner, ranks, side="right")
    return increments


def _mark_floor(labels: NDArray[np.uint16], layout: Layout, counts: tuple[int, ...], magnitude: NDArray[np.float32] | None) -> int:
    """Labels the floor of every prunable layer 1 and says how many these are."""
    if sum(counts) == 0:
        return 0
    if magnitude is None:
        raise LocalError("order: a floor needs the magnitudes |w|")
    _check_vector("magnitude", magnitude, layout.size)
    prunable = [tensor for tensor in layout.tensors if not tensor.always_kept]
    for tensor, count in zip(prunable, counts, strict=True):
        span = layout.slices[tensor.name]
        outside = _increment_of(-magnitude[span], np.array([count], np.int64))
        labels[span][outside == 0] = 1
    return sum(counts)


def _divided_by_costs(layout: Layout, importance: NDArray[np.float32], costs: Mapping[str, float] | None) -> NDArray[np.float32]:
    if not costs:
        return importance
    divided = importance.copy()
    for name, cost in costs.items():
        if name not in layout.slices or not (math.isfinite(cost) and cost > 0.0):
            raise LocalError(f"cost of layer {name!r}: {cost} is not > 0, or no such layer exists")
        divided[layout.slices[name]] /= np.float32(cost)
    return divided


def _check_densities(densities: Sequence[float]) -> None:
    if not 0 < len(densities) <= MAX_LEVELS or list(densities) != sorted(set(densities)) or densities[-1] != 1.0:
        raise LocalError(f"densities {tuple(densities)} do not rise to 1.0 in 1 to {MAX_LEVELS} distinct steps")


def _check_vector(what: str, vector: NDArray[Any], n: int) -> None:
    if vector.dtype != np.float32 or vector.shape != (n,):
        raise LocalError(f"{what}: {vector.dtype}{vector.shape}, not float32({n},)")
    if np.isnan(vector).any():
        raise LocalError(f"{what}: coordinate {int(np.isnan(vector).argmax())} is NaN")
