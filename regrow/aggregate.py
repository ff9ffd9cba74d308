"""Aggregation in position space: every update is a prefix, so between two update lengths the divisor is one number.

The vector is cut at the updates' lengths and walked in blocks that stay in the cache; per block every covering update
is one multiply-add. Up to eight terms are summed in float32, groups of eight in float64, so the error stays below
1e-6 of the mean magnitude for any number of clients. Updates that outlived a refresh carry explicit presence and take
a float64 path with a divisor per coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.order import Order

BLOCK = 96 * 1024  # floats; what fits the second-level cache beside one update's block
StalenessKind = Literal["constant", "polynomial", "hinge"]
FLOAT32_TERMS = 8  # 8 products and sums in float32 lose at most 6e-7


@dataclass(frozen=True, eq=False)
class Update:
    """A client's trained values on its sub-model.

    Args:
        values: float32 [length], positions [0, length) of the current order.
        presence: bool [length] where the sub-model is not the whole prefix (after a refresh); absent values are 0.

    Raises:
        LocalError: wrong dtypes or shapes, or a value where nothing is present.
    """

    values: NDArray[np.float32]
    presence: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.ndim != 1:
            raise LocalError(f"update: {self.values.dtype}{self.values.shape}, not a float32 vector")
        if self.presence is None:
            return
        if self.presence.dtype != np.bool_ or self.presence.shape != self.values.shape:
            raise LocalError(f"update: presence {self.presence.dtype}{self.presence.shape} beside {self.values.shape}")
        if ((self.values != 0.0) > self.presence).any():
            raise LocalError("update: a value where nothing is present")

    @property
    def length(self) -> int:
        return self.values.size


def staleness(kind: StalenessKind, a: float = 0.6, b: float = 4.0) -> Callable[[int], float]:
    """s(tau), how much an update counts whose base is tau aggregations old.

    constant 1; polynomial (tau + 1)^-a; hinge 1 up to tau = b, then 1 / (a (tau - b) + 1).

    Args:
        kind: which function.
        a: steepness, >= 0.
        b: aggregations that the hinge forgives, >= 0.

    Returns:
        tau (aggregations, >= 0) -> weight in (0, 1]; it raises LocalError for tau < 0.

    Raises:
        LocalError: unknown kind, or a parameter that is negative or not finite.

    Source: FedAsync (arXiv 1903.03934); a = 0.6 in FedGMR, hinge in PR-FL.
    """
    if kind not in ("constant", "polynomial", "hinge"):
        raise LocalError(f"staleness: unknown kind {kind!r}")
    if not (math.isfinite(a) and math.isfinite(b) and a >= 0.0 and b >= 0.0):
        raise LocalError(f"staleness: a = {a}, b = {b} must be finite and >= 0")

    def weight(tau: int) -> float:
        if tau < 0:
            raise LocalError(f"staleness: tau = {tau} lies in the future")
        if kind == "polynomial":
            return float((tau + 1.0) ** -a)
        if kind == "hinge" and tau > b:
            return 1.0 / (a * (tau - b) + 1.0)
        return 1.0

    return weight


def mask_fed_avg(
    previous: NDArray[np.float32],
    updates: Sequence[Update],
    weights: NDArray[np.float64],
    segments: Sequence[tuple[int, int]],
    eta_g: float = 1.0,
) -> NDArray[np.float32]:
    """Masked, staleness-weighted mean of the updates: MaskFedAvg over arrivals, BuffMaskFedAvg over the buffer.

    Coordinates that no update covers keep their previous value, so pruning can never zero the model.

    Args:
        previous: float32 [n], W_{k-1} in the current order. Not modified.
        updates: values float32 [length_i], length_i <= n.
        weights: float64 [m], beta_i = s(tau_i) * N_i; finite, > 0.
        segments: order.segments(), (start, stop) from 0 to n; inside one the divisor of whole prefixes is constant.
        eta_g: server step, W_k = (1 - eta_g) W_{k-1} + eta_g * mean; above 1 it goes beyond the mean (over-relaxation, ours).

    Returns:
        float32 [n], W_k, a fresh array; the same bits for the same inputs.

    Raises:
        LocalError: an update is longer than the order, a weight is not finite and positive, eta_g is not in (0, 2],
            or the segments do not reach from 0 to n.

    Source: FedGMR Algorithm 3, PR-FL step 5. Differs: the mask is explicit, a kept 0.0 counts.
    """
    check_inputs(previous, updates, weights)
    if not 0.0 < eta_g <= 2.0:
        raise LocalError(f"eta_g = {eta_g} is not in (0, 2]")
    ends = [0, *(stop for _, stop in segments)]
    if [start for start, _ in segments] != ends[:-1] or ends[-1] != previous.size:
        raise LocalError(f"aggregate: segments {tuple(segments)} do not tile 0 to {previous.size}")
    if not updates:
        return previous.copy()
    result = np.empty_like(previous)
    scratch = _Scratch()
    for start, stop, covering in blocks(ends, updates):
        block = result[start:stop]
        if not covering:
            block[:] = previous[start:stop]
            continue
        if any(updates[i].presence is not None for i in covering):
            _explicit_mean(block, previous, updates, weights, covering, start)
        else:
            beta = weights[covering]
            scratch.weighted_sum(block, [updates[i].values[start:stop] for i in covering], beta / beta.sum())
        if eta_g != 1.0:
            block -= previous[start:stop]  # written as a step, so that what nobody covers keeps its very bits
            block *= np.float32(eta_g)
            block += previous[start:stop]
    return result


def fed_avg(previous: NDArray[np.float32], updates: Sequence[Update], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Weighted mean of zero-filled sub-models: what is missing counts as 0.

    With full models this is FedAvg; with sub-models the ablation "FA", which collapses.

    Args:
        previous: float32 [n], returned as a copy when there is no update.
        updates: as for `mask_fed_avg`.
        weights: float64 [m], finite, > 0.

    Returns:
        float32 [n].

    Raises:
        LocalError: as for `mask_fed_avg`.

    Source: algorithms.md section 1; FedGMR's ablation.
    """
    check_inputs(previous, updates, weights)
    if not updates:
        return previous.copy()
    result = np.zeros_like(previous)
    scratch = _Scratch()
    shares = weights / weights.sum()
    for start, stop, covering in blocks((0, previous.size), updates):
        if covering:
            scratch.weighted_sum(result[start:stop], [updates[i].values[start:stop] for i in covering], shares[covering])
    return result


def reexpress(update: Update, old: Order, new: Order) -> Update:
    """The same update in the order of a later epoch, with explicit presence unless it is a whole prefix there too.

    Done once per buffered update at a refresh.

    Raises:
        LocalError: the orders differ in size, or the update is longer than they are.

    Source: architecture, idea 2.
    """
    if old.size != new.size or update.length > old.size:
        raise LocalError(f"re-express: an update of {update.length}, orders of {old.size} and {new.size}")
    coordinates, values = old.coordinates[: update.length], update.values
    if update.presence is not None:
        coordinates, values = coordinates[update.presence], values[update.presence]
    positions = new.position_of[coordinates]
    length = int(positions.max()) + 1 if positions.size else 0
    moved = np.zeros(length, np.float32)
    moved[positions] = values
    if positions.size == length:
        return Update(moved)
    presence = np.zeros(length, np.bool_)
    presence[positions] = True
    return Update(moved, presence)


class _Scratch:
    """The two blocks that every weighted sum reuses, so that the cache holds them."""

    def __init__(self) -> None:
        self.product = np.empty(BLOCK, np.float32)
        self.wide = np.empty(0, np.float64)

    def weighted_sum(self, out: NDArray[np.float32], terms: list[NDArray[np.float32]], coefficients: NDArray[np.float64]) -> None:
        """Writes sum coefficient_i * term_i into `out`, float32 [<= BLOCK]."""
        factors = coefficients.astype(np.float32)
        self._sum_of_few(out, terms[:FLOAT32_TERMS], factors[:FLOAT32_TERMS])
        if len(terms) <= FLOAT32_TERMS:
            return
        if self.wide.size == 0:
            self.wide = np.empty(BLOCK, np.float64)
        wide = self.wide[: out.size]
        wide[:] = out
        for first in range(FLOAT32_TERMS, len(terms), FLOAT32_TERMS):
            group = slice(first, first + FLOAT32_TERMS)
            self._sum_of_few(out, terms[group], factors[group])
            wide += out
        out[:] = wide

    def _sum_of_few(self, out: NDArray[np.float32], terms: list[NDArray[np.float32]], factors: NDArray[np.float32]) -> None:
        product = self.product[: out.size]
        np.multiply(terms[0], factors[0], out=out)
        for term, factor in zip(terms[1:], factors[1:], strict=True):
            np.multiply(term, factor, out=product)
            out += product


def _explicit_mean(
    block: NDArray[np.float32],
    previous: NDArray[np.float32],
    updates: Sequence[Update],
    weights: NDArray[np.float64],
    covering: list[int],
    start: int,
) -> None:
    """The masked mean with a divisor per coordinate, in float64, into `block`, which begins at `start`."""
    span = slice(start, start + block.size)
    numerator = np.zeros(block.size, np.float64)
    divisor = np.zeros(block.size, np.float64)
    for i in covering:
        numerator += np.multiply(updates[i].values[span], weights[i], dtype=np.float64)
        presence = updates[i].presence
        divisor += weights[i] if presence is None else weights[i] * presence[span]
    covered = divisor > 0.0
    if covered.all():
        block[:] = np.divide(numerator, divisor, out=numerator)
        return
    # Dense passes and a choice are many times faster than operations with `where`.
    mean = np.divide(numerator, np.where(covered, divisor, 1.0), out=numerator)
    block[:] = np.where(covered, mean, previous[span])


def blocks(ends: Sequence[int], updates: Sequence[Update]) -> Iterator[tuple[int, int, list[int]]]:
    """Blocks (start, stop, indices of the updates that reach over them), cut at the ends and the updates' lengths.

    An update that was re-expressed, or whose level has left the order, may stop inside a segment.
    """
    cuts = sorted({*ends, *(update.length for update in updates)})
    for low, high in pairwise(cuts):
        covering = [i for i, update in enumerate(updates) if update.length >= high]
        for start in range(low, high, BLOCK):
            yield start, min(start + BLOCK, high), covering


def check_inputs(previous: NDArray[Any], updates: Sequence[Update], weights: NDArray[Any]) -> None:
    if previous.dtype != np.float32 or previous.ndim != 1:
        raise LocalError(f"aggregate: previous is {previous.dtype}{previous.shape}, not a float32 vector")
    if weights.dtype != np.float64 or weights.shape != (len(updates),):
        raise LocalError(f"aggregate: weights are {weights.dtype}{weights.shape}, not float64({len(updates)},)")
    if not (np.isfinite(weights) & (weights > 0.0)).all():
        raise LocalError("aggregate: every weight must be finite and > 0")
    longest = max((update.length for update in updates), default=0)
    if longest > previous.size:
        raise LocalError(f"aggregate: an update of {longest} values for {previous.size} coordinates")
