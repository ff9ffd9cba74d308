"""Gradients of pooling over any number of spatial axes.

MaxPool, two ways with the same result:
    halve     where windows of 2 tile an axis: the winner shows in the comparison of neighbours, axis by axis. The forward
              MaxPool then need not give indices, which costs onnxruntime several times the pooling itself.
    scatter   everything else: the forward MaxPool gives the flat index of each winner, and the gradient is scattered there.

AveragePool, two ways with the same result:
    repeat    where windows tile the map: each share is repeated over its window.
    transpose everything else: a ConvTranspose with a kernel of ones, the channels taken as a part of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.emitter import Emitter
from export.gradients import Gradient, Site
from export.windows import Window, window_of


@dataclass(frozen=True)
class Halving:
    """One axis on which pairs of neighbours met.

    Attributes:
        size: of the axis before.
        pair: names of the values that met, the earlier ones and the later ones; each with an axis of size 1 behind `axis`.
        first: name of a float32 tensor like them, 1 where the earlier one won, else 0.
        shape: of the values that met, without an odd last position; the batch is -1.
    """

    axis: int
    size: int
    pair: tuple[str, str]
    first: str
    shape: tuple[int, ...]


def max_pool(site: Site) -> dict[int, Gradient]:
    """The gradient goes to the winner of each window; of equal values the first in row-major order wins, as in torch."""
    rank = site.rank(site.node.input[0]) - 2
    options = site.attributes(
        kernel_shape=[], strides=[1] * rank, pads=[0] * 2 * rank, auto_pad="NOTSET", ceil_mode=0, dilations=[1] * rank, storage_order=0
    )
    if options["storage_order"]:
        raise site.unsupported("storage_order 1", "use row-major order")
    shape = site.shape(site.node.input[0], static_from=1)
    window_of(site, options, options["kernel_shape"])  # for what it refuses
    return {0: _by_halving(site, options, shape) if _is_tiled(options, shape[2:]) else _by_scattering(site, options, shape)}


def _is_tiled(options: dict[str, Any], sizes: tuple[int, ...]) -> bool:
    """Whether windows of 2 halve every axis that is pooled at all, without padding; an odd last position may fall off."""
    if any(options["pads"]) or options["auto_pad"] not in ("NOTSET", "VALID"):
        return False
    axes = zip(options["kernel_shape"], options["strides"], options["dilations"], sizes, strict=True)
    return all(
        (kernel, stride) == (1, 1) or ((kernel, stride, dilation) == (2, 2, 1) and not (options["ceil_mode"] and size % 2))
        for kernel, stride, dilation, size in axes
    )


def _by_halving(site: Site, options: dict[str, Any], shape: tuple[int, ...]) -> str:
    graph, values, gradient = site.graph, site.node.input[0], site.gradient
    axes = [axis for axis, kernel in enumerate(options["kernel_shape"], 2) if kernel == 2]
    halvings: list[Halving] = []
    # The last axis first: of equal values in two rows the earlier row wins, whatever the columns.
    for axis in reversed(axes):
        if halvings:
            values = graph.emit("Reshape", graph.emit("Max", *halvings[-1].pair), graph.integers(-1, *shape[1:]))
        halvings.append(_met(graph, values, shape, axis))
        shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
    for halving in reversed(halvings):
        gradient = _dealt(graph, gradient, halving)
    return gradient


def _met(graph: Emitter, values: str, shape: tuple[int, ...], axis: int) -> Halving:
    """Neighbours along `axis` compared."""
    pairs, behind = shape[axis] // 2, shape[axis + 1 :]
    if shape[axis] % 2:
        values = graph.emit("Slice", values, graph.integers(0), graph.integers(2 * pairs), graph.integers(axis))
    values = graph.emit("Reshape", values, graph.integers(-1, *shape[1:axis], pairs, 2, *behind))
    left, right = graph.emit_all("Split", values, outputs=2, axis=axis + 1, num_outputs=2)
    first = graph.emit("Cast", graph.emit("GreaterOrEqual", left, right), to=TensorProto.FLOAT)
    return Halving(axis, shape[axis], (left, right), first, (-1, *shape[1:axis], 2 * pairs, *behind))


def _dealt(graph: Emitter, gradient: str, halving: Halving) -> str:
    """The gradient of the larger of each pair, dealt to the two that met; 0 for an odd last position."""
    gradient = graph.emit("Unsqueeze", gradient, graph.integers(halving.axis + 1))
    left = graph.emit("Mul", gradient, halving.first)
    both = graph.emit("Concat", left, graph.emit("Sub", gradient, left), axis=halving.axis + 1)
    dealt = graph.emit("Reshape", both, graph.integers(*halving.shape))
    if halving.size % 2:
        ends = [int(axis == halving.axis) for axis in range(len(halving.shape))]
        dealt = graph.emit("Pad", dealt, graph.integers(*[0] * len(ends), *ends))
    return dealt


def _by_scattering(site: Site, options: dict[str, Any], shape: tuple[int, ...]) -> str:
    graph, node = site.graph, site.node
    count = graph.emit("Mul", graph.emit("Shape", node.input[0], start=0, end=1), graph.integers(math.prod(shape[1:])))
    zeros = graph.emit("ConstantOfShape", count)
    flat = graph.integers(-1)
    winners = graph.emit("Reshape", site.output(1), flat)
    gradient = graph.emit("Reshape", site.gradient, flat)
    # Windows that share a winner add up; where windows cannot overlap, plain assignment is faster.
    spans = [(size - 1) * step + 1 for size, step in zip(options["kernel_shape"], options["dilations"], strict=True)]
    overlapping = any(span > stride for span, stride in zip(spans, options["strides"], strict=True))
    reduction = {"reduction": "add"} if overlapping else {}
    scattered = graph.emit("ScatterElements", zeros, winners, gradient, axis=0, **reduction)
    return graph.reshape_like(scattered, node.input[0])


def average_pool(site: Site) -> dict[int, Gradient]:
    """Every position of a window gets an equal share of the window's gradient."""
    rank = site.rank(site.node.input[0]) - 2
    ones = [1] * rank
    options = site.attributes(
        kernel_shape=[], strides=ones, dilations=ones, pads=[0] * 2 * rank, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0
    )
    window = window_of(site, options, options["kernel_shape"])
    if set(window.dilations) != {1}:
        raise site.unsupported("dilations", "leave them at 1")
    graph, kernel = site.graph, window.kernel
    counts = _counts(window, include_pad=bool(options["count_include_pad"]))
    share = graph.emit("Mul", site.gradient, graph.constant(1 / counts, np.float32))
    channels = site.shape(site.node.input[0], static_from=1)[1]
    if window.strides == kernel and not any(window.onnx_pads) and min(window.left_over) >= 0:
        return {0: _repeated(graph, share, [channels, *window.out_sizes], list(kernel), window.left_over)}
    share = graph.emit("Reshape", share, graph.integers(-1, 1, *window.out_sizes))
    # Where ceil_mode lets the last window hang over, what it gives beyond the end is cut off like padding.
    pads = [*window.onnx_pads[:rank], *(end - min(0, over) for (_, end), over in zip(window.pads, window.left_over, strict=True))]
    spread = graph.emit(
        "ConvTranspose",
        share,
        graph.constant(np.ones((1, 1, *kernel)), np.float32),
        strides=list(window.strides),
        pads=pads,
        output_padding=[max(0, over) for over in window.left_over],
    )
    return {0: graph.reshape_like(spread, site.node.input[0])}


def _counts(window: Window, *, include_pad: bool) -> NDArray[np.float64]:
    """By how many positions the sum of each window is divided: a scalar, or shaped like the output map.

    Padding counts with `include_pad`, but never what a window covers beyond it.
    """
    counts = np.ones(())
    axes = zip(window.sizes, window.pads, window.out_sizes, window.kernel, window.strides, strict=True)
    for size, (begin, end), out, length, stride in axes:
        starts = np.arange(out) * stride - begin
        low, high = (-begin, size + end) if include_pad else (0, size)
        counts = np.multiply.outer(counts, np.minimum(starts + length, high) - np.maximum(starts, low))
    return counts.ravel()[:1].reshape(()) if np.all(counts == counts.flat[0]) else counts


def _repeated(graph: Emitter, share: str, shape: list[int], kernel: list[int], left_over: list[int]) -> str:
    """Each number of [batch, *shape] over a window of its own; 0 on the positions left over."""
    channels, *sizes = shape
    rank = len(kernel)
    pairs = [(size, length) for size, length in zip(sizes, kernel, strict=True)]
    split = graph.emit("Reshape", share, graph.integers(-1, channels, *(part for size, _ in pairs for part in (size, 1))))
    split = graph.emit("Expand", split, graph.integers(1, 1, *(part for _, length in pairs for part in (1, length))))
    whole = graph.emit("Reshape", split, graph.integers(-1, channels, *(size * length for size, length in pairs)))
    if not any(left_over):
        return whole
    return graph.emit("Pad", whole, graph.integers(*[0] * (4 + rank), *left_over))


def global_average_pool(site: Site) -> dict[int, Gradient]:
    """Every position gets an equal share."""
    site.attributes()
    graph, source = site.graph, site.node.input[0]
    area = math.prod(site.shape(source, static_from=2)[2:])
    share = graph.emit("Mul", site.gradient, graph.real(1 / area))
    return {0: graph.emit("Expand", share, graph.emit("Shape", source))}


def global_max_pool(site: Site) -> dict[int, Gradient]:
    """The gradient goes to the first position that holds the maximum, as in torch."""
    site.attributes()
    graph, source = site.graph, site.node.input[0]
    flat = graph.emit("Reshape", source, graph.integers(0, 0, -1))
    winner = graph.emit("ArgMax", flat, axis=2)
    gradient = graph.emit("Reshape", site.gradient, graph.integers(0, 0, 1))
    zeros = graph.emit("Expand", graph.real(0), graph.emit("Shape", flat))
    return {0: graph.reshape_like(graph.emit("ScatterElements", zeros, winner, gradient, axis=2), source)}
