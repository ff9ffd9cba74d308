"""Gradients of ops that work along axes: sums and means, softmax, and everything that cuts, joins or moves tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from export.gradients import Gradient, Site

Gradients = dict[int, Gradient]
END = 2**31 - 1
"""Exporters end a slice that runs to the end of its axis at this or at 2**63 - 1."""


def same_numbers(site: Site) -> Gradients:
    """Flatten, Reshape, Squeeze, Unsqueeze, Identity: the output holds the input's numbers in their order."""
    site.attributes(axis=1, allowzero=0)
    if 0 not in site.wanted:
        # A shape that was read off a value which depends on parameters does not vary with them.
        return {}
    if site.node.op_type == "Identity":
        return {0: site.gradient}
    return {0: site.graph.reshape_like(site.gradient, site.node.input[0])}


def transpose(site: Site) -> Gradients:
    """The inverse permutation."""
    rank = site.rank(site.node.input[0])
    order = site.attributes(perm=list(reversed(range(rank))))["perm"]
    return {0: site.graph.emit("Transpose", site.gradient, perm=[int(axis) for axis in np.argsort(order)])}


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


def concat(site: Site) -> Gradients:
    """Each input gets its part."""
    graph, axis = site.graph, site.attributes(axis=None)["axis"]
    sizes = [_fixed_size(site, name, axis) for name in site.node.input]
    gradients: Gradients = {}
    for index in site.wanted:
        begin = sum(sizes[:index])
        bounds = graph.integers(begin), graph.integers(begin + sizes[index])
        gradients[index] = graph.emit("Slice", site.gradient, *bounds, graph.integers(axis))
    return gradients


def cut(site: Site) -> Gradients:
    """Slice: what was cut off gets 0."""
    site.attributes()
    if 0 not in site.wanted:
        return {}
    graph, source, rank = site.graph, site.node.input[0], site.rank(site.node.input[0])
    begins, ends, gathers = [0] * rank, [0] * rank, {}
    for axis, bounds in _slices(site).items():
        size = _fixed_size(site, source, axis)
        positions = range(*bounds.indices(size))
        if bounds.step == 1:
            begins[axis], ends[axis] = min(positions.start, size), size - max(positions.start, positions.stop)
            continue
        # Behind the gradient a 0 is added, which every position that was skipped takes.
        ends[axis] = 1
        origin = np.full(size, len(positions), np.int64)
        origin[list(positions)] = range(len(positions))
        gathers[axis] = graph.constant(origin, np.int64)
    gradient = graph.emit("Pad", site.gradient, graph.integers(*begins, *ends))
    for axis, name in gathers.items():
        gradient = graph.emit("Gather", gradient, name, axis=axis)
    return {0: gradient}


def pad(site: Site) -> Gradients:
    """Pad with a constant: padding taken back; what a negative padding cut off gets 0."""
    mode = site.attributes(mode="constant")["mode"]
    if mode != "constant":
        raise site.unsupported(f"mode {mode!r}", "pad with a constant")
    if 2 in site.wanted:
        raise site.unsupported(
            "a padding value that would be trained", "store it in a Constant node: every float32 initializer is a parameter"
        )
    if 0 not in site.wanted:
        return {}
    rank = site.rank(site.node.input[0])
    given = _integers(site, 1, [])
    axes = _axes(_integers(site, 3, range(rank)), rank)
    back = [0] * 2 * rank
    for place, axis in enumerate(axes):
        back[axis], back[axis + rank] = -given[place], -given[place + len(axes)]
    return {0: site.graph.emit("Pad", site.gradient, site.graph.integers(*back))}


def _reduced(site: Site) -> tuple[list[int], bool]:
    """(axes that are reduced, whether the output lacks them)."""
    options = site.attributes(keepdims=1, noop_with_empty_axes=0, axes=None)
    if options["axes"] is not None:
        raise site.unsupported("its axes as an attribute, as before opset 18", "export the model with opset 18")
    rank = site.rank(site.node.input[0])
    axes = _integers(site, 1, [])
    if not axes and not options["noop_with_empty_axes"]:
        axes = list(range(rank))
    return _axes(axes, rank), not options["keepdims"]


def _spread(site: Site, gradient: str, axes: list[int], spread: bool) -> str:
    graph = site.graph
    if not axes:
        return gradient
    if spread:
        gradient = graph.emit("Unsqueeze", gradient, graph.integers(*axes))
    return graph.emit("Expand", gradient, graph.emit("Shape", site.node.input[0]))


def _slices(site: Site) -> dict[int, slice]:
    """What is cut, by axis, in Python's terms; axes that keep everything are left out."""
    rank = site.rank(site.node.input[0])
    starts, ends = _integers(site, 1, []), _integers(site, 2, [])
    axes = _axes(_integers(site, 3, range(len(starts))), rank)
    steps = _integers(site, 4, [1] * len(starts))
    entries = zip(axes, starts, ends, steps, strict=True)
    return {axis: slice(start, end, step) for axis, start, end, step in entries if (start, step) != (0, 1) or end < END}


def _integers(site: Site, index: int, default: Any) -> list[int]:
    """The numbers of an optional input that must be constant."""
    names = site.node.input
    if index >= len(names) or not names[index]:
        return list(default)
    value = site.graph.constants.get(names[index])
    if value is None:
        raise site.unsupported(
            f"{names[index].removeprefix('forward:')!r}, which is computed,", "give it as a constant; fix every axis but the batch"
        )
    return [int(number) for number in value.ravel()]


def _axes(axes: list[int], rank: int) -> list[int]:
    return [axis % rank for axis in axes]


def _fixed_size(site: Site, name: str, axis: int) -> int:
    shape = site.graph.static_shape(name)
    size = None if shape is None else shape[axis]
    if size is None:
        raise site.unsupported(
            f"axis {axis} of {name.removeprefix('forward:')!r} with a size that is only known at run time", "use a fixed axis"
        )
    return size
