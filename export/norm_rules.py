"""Gradients of normalisations.

Group normalisation is covered too: torch exports it as InstanceNormalization between two Reshapes, and export.lowering turns the op
into that.
"""

from __future__ import annotations

import numpy as np

from export.gradients import Gradient, Site, reduce_to


def instance_normalization(site: Site) -> dict[int, Gradient]:
    """Y = scale * (X - mean) / sqrt(variance + epsilon) + bias, per sample and channel, over the spatial axes.

    With n = (X - mean) / deviation and h the gradient of n, that of X is (h - mean(h) - n * mean(h * n)) / deviation.

    Source: Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), section 3, with the means over the positions of one map.
    """
    epsilon = site.attributes(epsilon=1e-5)["epsilon"]
    graph, (source, scale, _) = site.graph, site.node.input
    rank = site.rank(source)
    if rank < 3:
        raise site.unsupported("no spatial axis", "give it an input of rank 3 or more")
    spatial, others = graph.integers(*range(2, rank)), graph.integers(0, *range(2, rank))
    centred = graph.emit("Sub", source, graph.emit("ReduceMean", source, spatial))
    variance = graph.emit("ReduceMean", graph.emit("Mul", centred, centred), spatial)
    deviation = graph.emit("Sqrt", graph.emit("Add", variance, graph.real(epsilon)))
    normal = site.node.output[0] if _is_plain(site) else graph.emit("Div", centred, deviation)
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        inner = site.gradient
        if not _is_plain(site):
            column = graph.emit("Unsqueeze", scale, graph.integers(*range(1, rank - 1)))
            inner = graph.emit("Mul", inner, column)
        slope = graph.emit("ReduceMean", graph.emit("Mul", inner, normal), spatial)
        level = graph.emit("Sub", inner, graph.emit("ReduceMean", inner, spatial))
        gradients[0] = graph.emit("Div", graph.emit("Sub", level, graph.emit("Mul", normal, slope)), deviation)
    if 1 in site.wanted:
        gradients[1] = graph.emit("ReduceSum", graph.emit("Mul", site.gradient, normal), others, keepdims=0)
    if 2 in site.wanted:
        gradients[2] = graph.emit("ReduceSum", site.gradient, others, keepdims=0)
    return gradients


def layer_normalization(site: Site) -> dict[int, Gradient]:
    """As instance_normalization, over the last axes; the forward node gives mean and 1 / deviation itself."""
    options = site.attributes(axis=-1, epsilon=1e-5, stash_type=1)
    graph, (source, scale) = site.graph, site.node.input[:2]
    rank, gradient = site.rank(source), site.gradient
    axis = options["axis"] % rank
    normal = graph.emit("Mul", graph.emit("Sub", source, site.output(1)), site.output(2))
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        axes = graph.integers(*range(axis, rank))
        inner = graph.emit("Mul", gradient, scale)
        slope = graph.emit("ReduceMean", graph.emit("Mul", inner, normal), axes)
        level = graph.emit("Sub", inner, graph.emit("ReduceMean", inner, axes))
        gradients[0] = graph.emit("Mul", graph.emit("Sub", level, graph.emit("Mul", normal, slope)), site.output(2))
    if 1 in site.wanted:
        gradients[1] = reduce_to(site, graph.emit("Mul", gradient, normal), site.node.output[0], scale)
    if 2 in site.wanted:
        gradients[2] = reduce_to(site, gradient, site.node.output[0], site.node.input[2])
    return gradients


def _is_plain(site: Site) -> bool:
    """Whether the output is the normalised input itself: scale 1 and bias 0, both constant."""
    scale, bias = (site.graph.constants.get(name) for name in site.node.input[1:])
    return scale is not None and bias is not None and bool(np.all(scale == 1) and np.all(bias == 0))
