"""FedMR: instead of their mean, devices train on models whose layers come from different devices, shuffled layer by layer.

Full models only: their order has one level, and inside its two segments positions follow the flat coordinate, so a tensor is one slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regrow.order import Order
from regrow.parameters import Layout


def layer_names(layout: Layout) -> list[str]:
    """The layer of every tensor: its name up to the last dot, so that a weight and its bias stay together; without one, all of it."""
    return [tensor.name.rpartition(".")[0] or tensor.name for tensor in layout.tensors]


def shuffles(layout: Layout, seed: int, version: int, models: int) -> dict[str, NDArray[np.intp]]:
    """For each layer, in the order of the layout, whose version of it each recombined model takes: intp [models], a permutation.

    Sorted raw bits and not Generator.permutation: NumPy promises the former to be the same in all its releases, and a replay needs that.
    """
    bits = np.random.PCG64((seed, version))
    return {name: np.argsort(bits.random_raw(models), kind="stable") for name in dict.fromkeys(layer_names(layout))}


def recombine(
    models: Sequence[NDArray[np.float32]], layout: Layout, order: Order, chosen: dict[str, NDArray[np.intp]]
) -> list[NDArray[np.float32]]:
    """As many models as there are clients, each layer of each from some client, and every client's layer used exactly once.

    Args:
        models: float32 [n] each, in position order. Not modified.
        layout: names and sizes of the tensors.
        order: of full models: one level.
        chosen: what `shuffles` returned for this many models.

    Returns:
        float32 [n] each, in position order.

    Source: FedMR, arXiv 2208.07677, model recombination.
    """
    recombined = [np.empty_like(model) for model in models]
    for tensor, name in zip(layout.tensors, layer_names(layout), strict=True):
        start = int(order.position_of[layout.slices[tensor.name].start])
        where = slice(start, start + tensor.size)
        for target, source in zip(recombined, chosen[name], strict=True):
            target[where] = models[source][where]
    return recombined
