"""Gradients of pooling over any number of spatial axes."""

from __future__ import annotations

import math

from export.gradients import Gradient, Site


def max_pool(site: Site) -> dict[int, Gradient]:
    """The gradient goes to the winner of each window, whose flat index the forward node gives as its second output."""
    graph, node = site.graph, site.node
    rank = site.rank(node.input[0]) - 2
    options = site.attributes(
        kernel_shape=[], strides=[1] * rank, pads=[], auto_pad="NOTSET", ceil_mode=0, dilations=[1] * rank, storage_order=0
    )
    if options["storage_order"]:
        raise site.unsupported("storage_order 1", "use row-major order")
    if len(node.output) == 1:
        node.output.append(graph.fresh())
    elif not node.output[1]:
        node.output[1] = graph.fresh()
    per_example = math.prod(site.shape(node.input[0], static_from=1)[1:])
    count = graph.emit("Mul", graph.emit("Shape", node.input[0], start=0, end=1), graph.integers(per_example))
    zeros = graph.emit("ConstantOfShape", count)
    flat = graph.integers(-1)
    winners = graph.emit("Reshape", node.output[1], flat)
    gradient = graph.emit("Reshape", site.gradient, flat)
    # Windows that share a winner add up; where windows cannot overlap, plain assignment is faster.
    spans = [(size - 1) * step + 1 for size, step in zip(options["kernel_shape"], options["dilations"], strict=True)]
    overlapping = any(span > stride for span, stride in zip(spans, options["strides"], strict=True))
    reduction = {"reduction": "add"} if overlapping else {}
    scattered = graph.emit("ScatterElements", zeros, winners, gradient, axis=0, **reduction)
    return {0: graph.reshape_like(scattered, node.input[0])}


def global_average_pool(site: Site) -> dict[int, Gradient]:
    """Every position gets an equal share."""
    site.attributes()
    graph, source = site.graph, site.node.input[0]
    area = math.prod(site.shape(source, static_from=2)[2:])
    share = graph.emit("Mul", site.gradient, graph.real(1 / area))
    return {0: graph.emit("Expand", share, graph.emit("Shape", source))}
