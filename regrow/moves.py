"""Aggregations that move the model by changes; `aggregate` makes it anew as a mean of models. Each change counts once, from its base on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regrow.aggregate import Update, blocks, check_inputs
from regrow.errors import LocalError


def gradient_average(
    previous: NDArray[np.float32],
    updates: Sequence[Update],
    bases: Sequence[NDArray[np.float32]],
    weights: NDArray[np.float64],
) -> NDArray[np.float32]:
    """The model moved by the weighted mean of the updates' changes; where a sub-model has nothing, it changes nothing.

    Args:
        previous: float32 [n], W_{k-1}. Not modified.
        updates: as for `mask_fed_avg`.
        bases: float32 [>= length_i], W_{k_i} of each update in the current order.
        weights: float64 [m], finite, > 0.

    Returns:
        float32 [n], W + sum beta_i m_i (w_i - W_{k_i}) / sum beta_i.

    Raises:
        LocalError: as for `mask_fed_avg`, or a base is missing or shorter than its update.

    Source: algorithms.md section 1, ablation "GA".
    """
    check_inputs(previous, updates, weights)
    _check_bases(updates, bases)
    result = previous.copy()
    shares = weights / weights.sum()
    for start, stop, covering in blocks((0, previous.size), updates):
        moved = np.zeros(stop - start, np.float64)
        for i in covering:
            change = np.subtract(updates[i].values[start:stop], bases[i][start:stop], dtype=np.float64)
            presence = updates[i].presence
            if presence is not None:
                change *= presence[start:stop]
            moved += shares[i] * change
        result[start:stop] += moved
    return result


def mix(previous: NDArray[np.float32], updates: Sequence[Update], alphas: NDArray[np.float64]) -> NDArray[np.float32]:
    """The model drawn towards each update in turn, as far as alpha_i says; where a sub-model has nothing, it stays.

    Args:
        previous: float32 [n], W_{k-1}. Not modified.
        updates: in the order of their arrival.
        alphas: float64 [m], alpha * s(tau_i), in (0, 1].

    Returns:
        float32 [n], after W <- (1 - alpha_i) W + alpha_i w_i for every i on its mask.

    Raises:
        LocalError: as for `mask_fed_avg`, or an alpha is above 1.

    Source: FedAsync (arXiv 1903.03934), Algorithm 1. Differs: masks, so that restoration works on top of it.
    """
    check_inputs(previous, updates, alphas)
    if (alphas > 1.0).any():
        raise LocalError(f"mix: alpha = {alphas.max()} is above 1")
    return _stepped(previous, updates, [previous] * len(updates), alphas, towards=True)


def add_deltas(
    previous: NDArray[np.float32], updates: Sequence[Update], bases: Sequence[NDArray[np.float32]], steps: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The model moved by every update's change, each times its own step.

    Args:
        previous: float32 [n], W_{k-1}. Not modified.
        updates: as for `mask_fed_avg`.
        bases: float32 [>= length_i], W_{k_i} of each update in the current order.
        steps: float64 [m], eta_g * s(tau_i) / K; finite, > 0.

    Returns:
        float32 [n], W + sum step_i m_i (w_i - W_{k_i}).

    Raises:
        LocalError: as for `gradient_average`.

    Source: FedBuff (arXiv 2106.06639), Algorithm 1: the divisor is K, not the sum of the weights.
    """
    check_inputs(previous, updates, steps)
    _check_bases(updates, bases)
    return _stepped(previous, updates, bases, steps, towards=False)


def adaptive_steps(
    previous: NDArray[np.float32], updates: Sequence[Update], bases: Sequence[NDArray[np.float32]], eta_g: float
) -> NDArray[np.float32]:
    """The model moved by each update's change in turn, less the further the model has moved since the update's base.

    step_i = eta_g / (1 + gamma_i), gamma_i = |W - W_{k_i}| / |w_i - W_{k_i}|, both over what the update covers.

    Args:
        previous: float32 [n], W_{k-1}. Not modified.
        updates: in the order of their arrival.
        bases: as for `add_deltas`.
        eta_g: the step of an update whose base is still the model.

    Returns:
        float32 [n].

    Raises:
        LocalError: as for `gradient_average`.

    Source: AsyncFedED (arXiv 2205.13797), with lambda = eta_g and epsilon = 1; its adaptive number of local steps is left out.
    """
    check_inputs(previous, updates, np.ones(len(updates)))
    _check_bases(updates, bases)
    result = previous
    for update, base in zip(updates, bases, strict=True):
        present = slice(None) if update.presence is None else update.presence
        start = base[: update.length][present].astype(np.float64)
        moved = float(np.linalg.norm(result[: update.length][present] - start))
        change = float(np.linalg.norm(update.values[present] - start))
        if change > 0.0:
            result = _stepped(result, [update], [base], np.array([eta_g / (1.0 + moved / change)]), towards=False)
    return result.copy() if result is previous else result


def _stepped(
    previous: NDArray[np.float32],
    updates: Sequence[Update],
    bases: Sequence[NDArray[np.float32]],
    steps: NDArray[np.float64],
    *,
    towards: bool,
) -> NDArray[np.float32]:
    """W + step_i m_i (w_i - base_i) for each update in turn; `towards`: the base is W as the updates before have left it."""
    result = previous.copy()
    for start, stop, covering in blocks((0, previous.size), updates):
        exact = result[start:stop].astype(np.float64)
        for i in covering:
            base = exact if towards else bases[i][start:stop]
            change = steps[i] * np.subtract(updates[i].values[start:stop], base, dtype=np.float64)
            presence = updates[i].presence
            exact += change if presence is None else change * presence[start:stop]
        result[start:stop] = exact
    return result


def _check_bases(updates: Sequence[Update], bases: Sequence[NDArray[np.float32]]) -> None:
    if len(bases) != len(updates) or any(base.size < update.length for base, update in zip(bases, updates, strict=True)):
        raise LocalError("aggregate: a base is missing or shorter than its update")
