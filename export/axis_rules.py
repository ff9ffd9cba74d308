"""Gradients of ops that reduce along axes: sums, means, extremes and softmax."""

from __future__ import annotations

import math

from onnx import TensorProto

from export.gradients import Gradient, Site

Gradients = dict[int, Gradient]


def reduce_sum(site: Site) -> Gradients:
    """Every summand gets the gradient of its sum."""
    axes, spread = _reduced(site)
    return {0: _spread(site, site.gradient, axes, spread)}


def reduce_mean(site: Site) -> Gradients:
    """Every summand gets an equal share."""
    axes, spread = _reduced(site)
    shape = site.graph.static_shape(site.node.input[0]) or ()
    sizes = [shape[axis] for axis in axes]
    if None in sizes:
        raise site.unsupported("a mean over the batch", "leave the batch alone: the loss takes its mean")
    count = math.prod(size for size in sizes if size is not None)
    return {0: _spread(site, site.graph.emit("Mul", site.gradient, site.graph.real(1 / count)), axes, spread)}


def softmax(site: Site) -> Gradients:
    """Y (G - sum(G Y)) along the axis."""
    axis = site.attributes(axis=-1)["axis"]
    graph, y = site.graph, site.node.output[0]
    weighted = graph.emit("Mul", site.gradient, y)
    total = graph.emit("ReduceSum", weighted, graph.integers(axis), keepdims=1)
    return {0: graph.emit("Sub", weighted, graph.emit("Mul", y, total))}


def log_softmax(site: Site) -> Gradients:
    """G - exp(Y) sum(G) along the axis."""
    axis = site.attributes(axis=-1)["axis"]
    graph = site.graph
    total = graph.emit("ReduceSum", site.gradient, graph.integers(axis), keepdims=1)
    return {0: graph.emit("Sub", site.gradient, graph.emit("Mul", graph.emit("Exp", site.node.output[0]), total))}


def reduce_extreme(site: Site) -> Gradients:
    """ReduceMax, ReduceMin: equal parts for all that are the largest (smallest), as torch.amax has it."""
    axes, spread = _reduced(site)
    graph, source, extreme, gradient = site.graph, site.node.input[0], site.node.output[0], site.gradient
    if not axes:
        return {0: gradient}
    where = graph.integers(*axes)
    if spread:
        extreme, gradient = graph.emit("Unsqueeze", extreme, where), graph.emit("Unsqueeze", gradient, where)
    is_extreme = graph.emit("Cast", graph.emit("Equal", source, extreme), to=TensorProto.FLOAT)
    share = graph.emit("Div", gradient, graph.emit("ReduceSum", is_extreme, where, keepdims=1))
    return {0: graph.emit("Mul", is_extreme, share)}


def _reduced(site: Site) -> tuple[list[int], bool]:
    """(axes that are reduced, whether the output lacks them)."""
    options = site.attributes(keepdims=1, noop_with_empty_axes=0)
    rank = site.rank(site.node.input[0])
    axes = site.integers(1)
    if not axes and not options["noop_with_empty_axes"]:
        axes = list(range(rank))
    return [axis % rank for axis in axes], not options["keepdims"]


def _spread(site: Site, gradient: str, axes: list[int], spread: bool) -> str:
    graph = site.graph
    if not axes:
        return gradient
    if spread:
        gradient = graph.emit("Unsqueeze", gradient, graph.integers(*axes))
    return graph.emit("Expand", gradient, graph.emit("Shape", site.node.input[0]))
