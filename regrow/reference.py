"""The papers' pseudocode with dense masks in flat coordinates: slow, in float64, and the oracle of the fast path.

Nothing here knows of orders, prefixes or increments. Symbols are those of algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DenseUpdate:
    """m_i, bool [n]; w_i and W_{k_i}, float64 [n], looked at only where m_i is true; beta_i."""

    m: NDArray[np.bool_]
    w: Floats
    beta: float
    W_base: Floats | None = None


def buff_mask_fed_avg(W_previous: Floats, B: Sequence[DenseUpdate], eta_g: float = 1.0) -> Floats:
    """W_k by FedGMR, Algorithm 3, and PR-FL, step 5."""
    W_acc = np.zeros_like(W_previous)
    M_acc = np.zeros_like(W_previous)
    for i in B:
        W_acc += np.where(i.m, i.beta * i.w, 0.0)
        M_acc += np.where(i.m, i.beta, 0.0)
    W_k = W_previous.copy()
    for j in np.flatnonzero(M_acc > 0):
        W_k[j] = W_acc[j] / M_acc[j]
    if not B:
        return W_k
    # A coordinate that nobody covers has W_k = W_{k-1}, so mixing leaves it as it is.
    return (1.0 - eta_g) * W_previous + eta_g * W_k


def zero_filled_fed_avg(W_previous: Floats, B: Sequence[DenseUpdate]) -> Floats:
    """FedAvg that does not know of masks ("FA"): what a client lacks is averaged as 0."""
    if not B:
        return W_previous.copy()
    total = sum(i.beta for i in B)
    W_k = np.zeros_like(W_previous)
    for i in B:
        W_k += i.beta / total * np.where(i.m, i.w, 0.0)
    return W_k


def gradient_average(W_previous: Floats, B: Sequence[DenseUpdate]) -> Floats:
    """W + sum beta_i m_i (w_i - W_{k_i}) / sum beta_i ("GA")."""
    if not B:
        return W_previous.copy()
    total = sum(i.beta for i in B)
    W_k = W_previous.copy()
    for i in B:
        if i.W_base is None:
            raise LocalError("gradient averaging needs the model that the client started from")
        W_k += i.beta / total * np.where(i.m, i.w - i.W_base, 0.0)
    return W_k


def mask_of_density(importance: Floats, always_kept: NDArray[np.uint32], length: int) -> NDArray[np.bool_]:
    """m of the sub-model with `length` parameters: the always-kept ones, then by falling importance, lower index first."""
    m = np.zeros(importance.size, np.bool_)
    m[always_kept] = True
    ranked = sorted(np.flatnonzero(~m).tolist(), key=lambda j: (-importance[j], j))
    m[ranked[: length - always_kept.size]] = True
    return m
