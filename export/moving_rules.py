"""Gradients of ops that move numbers without changing them: reshaping, cutting, joining, looking up, repeating."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from onnx import TensorProto

from export.gradients import Gradient, Site, reduce_to

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


def concat(site: Site) -> Gradients:
    """Each input gets its part."""
    graph, axis = site.graph, site.attributes(axis=None)["axis"]
    sizes = [site.fixed_size(name, axis) for name in site.node.input]
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
        size = site.fixed_size(source, axis)
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
    given = site.integers(1)
    axes = [axis % rank for axis in site.integers(3, range(rank))]
    back = [0] * 2 * rank
    for place, axis in enumerate(axes):
        back[axis], back[axis + rank] = -given[place], -given[place + len(axes)]
    return {0: site.graph.emit("Pad", site.gradient, site.graph.integers(*back))}


def split(site: Site) -> Gradients:
    """The parts' gradients joined; a part that nothing uses has 0."""
    axis = site.attributes(axis=0, num_outputs=None)["axis"]
    if 0 not in site.wanted:
        return {}
    graph, parts = site.graph, zip(site.gradients, site.node.output, strict=True)
    zero = graph.real(0)
    whole = [gradient or graph.emit("Expand", zero, graph.emit("Shape", output)) for gradient, output in parts]
    return {0: graph.emit("Concat", *whole, axis=axis)}


def expand(site: Site) -> Gradients:
    """Summed over what was repeated."""
    site.attributes()
    if 0 not in site.wanted:
        return {}
    return {0: reduce_to(site, site.gradient, site.node.output[0], site.node.input[0])}


def gather(site: Site) -> Gradients:
    """What was looked up gets the sum of its gradients.

    A constant run of indices is a slice, and padding is its gradient. Otherwise ScatterND adds the rows up: measured for embeddings, it is
    1.5 to 10 times as fast in onnxruntime as ScatterElements or a GEMM with a one-hot matrix.
    """
    axis = site.attributes(axis=0)["axis"]
    if 0 not in site.wanted:
        return {}
    graph, (source, indices) = site.graph, site.node.input
    rank = site.rank(source)
    axis %= rank
    constant = graph.constants.get(indices)
    if constant is not None and constant.size and constant.ndim < 2:
        size = site.fixed_size(source, axis)
        places = [int(index) % size for index in constant.ravel()]
        if all(after - before == 1 for before, after in pairwise(places)):
            return {0: _padded_run(site, axis, range(places[0], places[-1] + 1), size)}
    return {0: _scattered(site, axis, rank)}


def _padded_run(site: Site, axis: int, run: range, size: int) -> str:
    graph, (source, indices) = site.graph, site.node.input
    gradient, rank = site.gradient, site.rank(source)
    if site.rank(indices) == 0:
        gradient = graph.emit("Unsqueeze", gradient, graph.integers(axis))
    ends = [0] * 2 * rank
    ends[axis], ends[axis + rank] = run.start, size - run.stop
    return graph.emit("Pad", gradient, graph.integers(*ends)) if any(ends) else gradient


def _scattered(site: Site, axis: int, rank: int) -> str:
    graph, (source, indices) = site.graph, site.node.input
    index_rank = site.rank(indices)
    # ScatterND adds up along the first axis, so the gathered axis goes there, and back.
    order = [axis, *(other for other in range(rank) if other != axis)]
    gradient_order = [*range(axis, axis + index_rank), *range(axis), *range(axis + index_rank, rank - 1 + index_rank)]
    gradient, shape = site.gradient, graph.emit("Shape", source)
    if axis:
        gradient = graph.emit("Transpose", gradient, perm=gradient_order)
        shape = graph.emit("Gather", shape, graph.integers(*order))
    zeros = graph.emit("Expand", graph.real(0), shape)
    # ScatterND takes int64 only; a cast that changes nothing costs nothing.
    places = graph.emit("Unsqueeze", graph.emit("Cast", indices, to=TensorProto.INT64), graph.integers(index_rank))
    added = graph.emit("ScatterND", zeros, places, gradient, reduction="add")
    return graph.emit("Transpose", added, perm=[int(place) for place in np.argsort(order)]) if axis else added


def _slices(site: Site) -> dict[int, slice]:
    """What is cut, by axis, in Python's terms; axes that keep everything are left out."""
    rank = site.rank(site.node.input[0])
    starts, ends = site.integers(1), site.integers(2)
    axes = [axis % rank for axis in site.integers(3, range(len(starts)))]
    steps = site.integers(4, [1] * len(starts))
    entries = zip(axes, starts, ends, steps, strict=True)
    return {axis: slice(start, end, step) for axis, start, end, step in entries if (start, step) != (0, 1) or end < END}
