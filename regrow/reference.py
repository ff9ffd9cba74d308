"""The papers' pseudocode with dense masks in flat coordinates: slow, in float64, and the oracle of the fast path.

Nothing here knows of orders, prefixes or increments. Symbols are those of algorithms.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.parameters import Layout

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
        W_k += i.beta / total * np.where(i.m, i.w - _base(i), 0.0)
    return W_k


def fed_async(W_previous: Floats, B: Sequence[DenseUpdate]) -> Floats:
    """W <- (1 - alpha s(tau)) W + alpha s(tau) w_i, one arrival after the other; beta is alpha s(tau)."""
    W_k = W_previous.copy()
    for i in B:
        W_k = np.where(i.m, (1.0 - i.beta) * W_k + i.beta * i.w, W_k)
    return W_k


def fed_buff(W_previous: Floats, B: Sequence[DenseUpdate], eta_g: float) -> Floats:
    """W + eta_g / K * sum s(tau_i) m_i (w_i - W_{k_i}), K = |B|; beta is s(tau)."""
    W_k = W_previous.copy()
    for i in B:
        W_k += eta_g / len(B) * i.beta * np.where(i.m, i.w - _base(i), 0.0)
    return W_k


def async_fed_ed(W_previous: Floats, B: Sequence[DenseUpdate], eta_g: float) -> Floats:
    """W + eta_g / (1 + gamma_i) (w_i - W_{k_i}), gamma_i = |W - W_{k_i}| / |w_i - W_{k_i}|, one arrival after the other."""
    W_k = W_previous.copy()
    for i in B:
        change = np.where(i.m, i.w - _base(i), 0.0)
        if np.any(change):
            gamma = np.linalg.norm(np.where(i.m, W_k - _base(i), 0.0)) / np.linalg.norm(change)
            W_k += eta_g / (1.0 + gamma) * change
    return W_k


def _base(i: DenseUpdate) -> Floats:
    if i.W_base is None:
        raise LocalError("a method that averages changes needs the model that the client started from")
    return i.W_base


def next_model(aggregation: str, W_previous: Floats, B: Sequence[DenseUpdate], eta_g: float = 1.0, mixing: float = 1.0) -> Floats:
    """W_k by the named aggregation of a task; beta of B is s(tau), times N_i where examples weigh."""
    rules = {
        "mask": lambda: buff_mask_fed_avg(W_previous, B, eta_g),
        "recombine": lambda: buff_mask_fed_avg(W_previous, B, eta_g),
        "plain": lambda: zero_filled_fed_avg(W_previous, B),
        "gradient": lambda: gradient_average(W_previous, B),
        "mix": lambda: fed_async(W_previous, [replace(i, beta=mixing * i.beta) for i in B]),
        "delta": lambda: fed_buff(W_previous, B, eta_g),
        "adaptive": lambda: async_fed_ed(W_previous, B, eta_g),
    }
    return rules[aggregation]()


def recombine(w: Sequence[Floats], layout: Layout, chosen: Sequence[NDArray[np.intp]]) -> list[Floats]:
    """FedMR's models: number s has layer l of client chosen[l][s]. `w`: the clients' models; `chosen`: a permutation for each layer.

    The layers are the parts of tensor names before the last dot, in the order in which they first occur.
    """
    layers: list[str] = []
    layer_of_tensor = []
    for tensor in layout.tensors:
        layer = tensor.name[: tensor.name.rindex(".")] if "." in tensor.name else tensor.name
        if layer not in layers:
            layers.append(layer)
        layer_of_tensor.append(layers.index(layer))
    layer_of = np.repeat(layer_of_tensor, [tensor.size for tensor in layout.tensors])
    recombined = []
    for s in range(len(w)):
        W_s = np.zeros(layout.size)
        for layer_number in range(len(layers)):
            W_s = np.where(layer_of == layer_number, w[chosen[layer_number][s]], W_s)
        recombined.append(W_s)
    return recombined


def magnitude(W_previous: Floats, B: Sequence[DenseUpdate], *, with_bases: bool) -> Floats:
    """What rounding is relative to: max(|W_{k-1}|, sum beta m |w| / sum beta m), and |W_{k_i}| likewise where changes are averaged."""
    covered = sum((i.beta * i.m for i in B), np.zeros_like(W_previous))
    sizes = sum((i.beta * i.m * np.maximum(np.abs(i.w), np.abs(_base(i)) if with_bases else 0.0) for i in B), np.zeros_like(W_previous))
    return np.maximum(np.abs(W_previous), np.divide(sizes, covered, out=np.zeros_like(sizes), where=covered > 0))


def mask_of_density(importance: Floats, always_kept: NDArray[np.uint32], length: int) -> NDArray[np.bool_]:
    """m of the sub-model with `length` parameters: the always-kept ones, then by falling importance, lower index first."""
    m = np.zeros(importance.size, np.bool_)
    m[always_kept] = True
    ranked = sorted(np.flatnonzero(~m).tolist(), key=lambda j: (-importance[j], j))
    m[ranked[: length - always_kept.size]] = True
    return m


def score_levels(reports: Iterable[tuple[float, float, int]]) -> dict[float, float]:
    """The example-weighted mean score of each level.

    Args:
        reports: (density, score, examples) of every device's latest report; without examples it counts nothing.

    Returns:
        density -> score, ascending; levels without examples are absent.
    """
    sums: dict[float, tuple[float, int]] = {}
    for density, score, examples in reports:
        total, count = sums.get(density, (0.0, 0))
        sums[density] = (total + score * examples, count + examples)
    return {density: sums[density][0] / sums[density][1] for density in sorted(sums) if sums[density][1]}
