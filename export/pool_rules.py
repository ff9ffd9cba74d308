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
    if len(node.output) == 1:
        node.output.append(graph.fresh())
    elif not node.output[1]:
        node.output[1] = graph.fresh()
    count = graph.emit("Mul", graph.emit("Shape", node.input[0], start=0, end=1), graph.integers(math.prod(shape[1:])))
    zeros = graph.emit("ConstantOfShape", count)
    flat = graph.integers(-1)
    winners = graph.emit("Reshape", node.output[1], flat)
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
    options = site.attributes(kernel_shape=[], strides=[1] * rank, pads=[0] * 2 * rank, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0)
    if options["auto_pad"] not in ("NOTSET", "VALID"):
        raise site.unsupported(f"auto_pad {options['auto_pad']}", "give the pads as numbers")
    kernel, strides, pads = options["kernel_shape"], options["strides"], options["pads"]
    channels, *sizes = site.shape(site.node.input[0], static_from=1)[1:]
    out_sizes = site.shape(site.node.output[0], static_from=2)[2:]
    # What the last stride left over at the end of an axis; negative where ceil_mode let the last window hang over.
    left_over = [
        size + pads[axis] + pads[axis + rank] - (out - 1) * stride - length
        for axis, (size, out, stride, length) in enumerate(zip(sizes, out_sizes, strides, kernel, strict=True))
    ]
    if min(left_over) < 0:
        raise site.unsupported("ceil_mode 1 with a window that hangs over the end", "use ceil_mode 0 or pad the input")
    graph = site.graph
    if options["count_include_pad"] or not any(pads):
        share = graph.emit("Mul", site.gradient, graph.real(1 / math.prod(kernel)))
    else:
        share = graph.emit("Mul", site.gradient, graph.constant(1 / _counts(sizes, out_sizes, kernel, strides, pads), np.float32))
    if strides == kernel and not any(pads):
        return {0: _repeated(graph, share, [channels, *out_sizes], kernel, left_over)}
    share = graph.emit("Reshape", share, graph.integers(-1, 1, *out_sizes))
    ones = graph.constant(np.ones((1, 1, *kernel)), np.float32)
    spread = graph.emit("ConvTranspose", share, ones, strides=strides, pads=pads, output_padding=left_over)
    return {0: graph.reshape_like(spread, site.node.input[0])}


def _counts(sizes: list[int], out_sizes: tuple[int, ...], kernel: list[int], strides: list[int], pads: list[int]) -> NDArray[np.float64]:
    """How many positions of each window lie on the map and not on its padding; shaped like the output map."""
    counts = np.ones(())
    for size, out, length, stride, begin in zip(sizes, out_sizes, kernel, strides, pads[: len(kernel)], strict=True):
        starts = np.arange(out) * stride - begin
        counts = np.multiply.outer(counts, np.minimum(starts + length, size) - np.maximum(starts, 0))
    return counts


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
