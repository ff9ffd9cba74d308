"""Gradients of Conv over any number of spatial axes, without ConvGrad, which inference builds of onnxruntime do not have.

Input gradient: ConvTranspose, which is its definition. At stride 1 that is a Conv with the kernel turned around and its channels
swapped, for which onnxruntime has the faster code.
Weight gradient, two ways with the same result:
    unfold      one GEMM for the whole batch over the unfolded input (im2col). Fastest on small maps, but holds one copy
                of the input per kernel position.
    correlate   a Conv in which channels and batch change places. No copies; onnxruntime multiplies channel by channel.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from export.gradients import Gradient, Product, Site

UNFOLD_POSITIONS = 256
"""Largest output map that is unfolded: 16 x 16, or 256 samples of a signal."""


@dataclass(frozen=True)
class Window:
    """A Conv's geometry, one entry per spatial axis; `pads` are (begin, end)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    group: int

    @property
    def onnx_pads(self) -> list[int]:
        return [begin for begin, _ in self.pads] + [end for _, end in self.pads]

    @property
    def axes(self) -> range:
        return range(2, 2 + len(self.kernel))


def conv(site: Site) -> dict[int, Gradient]:
    """Y = W * X + b."""
    window = _window(site)
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        gradients[0] = _input_gradient(site, window)
    if 1 in site.wanted:
        unfold = window.group == 1 and math.prod(window.out_sizes) <= UNFOLD_POSITIONS
        gradients[1] = _weight_by_unfolding(site, window) if unfold else _weight_by_correlation(site, window)
    if 2 in site.wanted:
        axes = site.graph.integers(0, *window.axes)
        gradients[2] = site.graph.emit("ReduceSum", site.gradient, axes, keepdims=0)
    return gradients


def _window(site: Site) -> Window:
    source, weight = site.node.input[:2]
    kernel = site.shape(weight)[2:]
    rank = len(kernel)
    options = site.attributes(
        auto_pad="NOTSET", dilations=[1] * rank, group=1, kernel_shape=list(kernel), pads=[0] * 2 * rank, strides=[1] * rank
    )
    sizes = site.shape(source, static_from=2)[2:]
    out_sizes = site.shape(site.node.output[0], static_from=2)[2:]
    strides, dilations = tuple(options["strides"]), tuple(options["dilations"])
    pads = tuple(zip(options["pads"][:rank], options["pads"][rank:], strict=True))
    if options["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
        reach = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out_sizes, strides, kernel, dilations, strict=True)]
        totals = [max(0, need - size) for need, size in zip(reach, sizes, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in totals)
        if options["auto_pad"] == "SAME_LOWER":
            pads = tuple((end, begin) for begin, end in pads)
    if any(pad < 0 for pair in pads for pad in pair):
        raise site.unsupported("negative padding", "slice the input instead")
    return Window(kernel, strides, dilations, pads, sizes, out_sizes, options["group"])


def _input_gradient(site: Site, window: Window) -> str:
    reach = [dilation * (kernel - 1) for kernel, dilation in zip(window.kernel, window.dilations, strict=True)]
    pads = [whole - begin for whole, (begin, _) in zip(reach, window.pads, strict=True)]
    pads += [whole - end for whole, (_, end) in zip(reach, window.pads, strict=True)]
    if window.group == 1 and set(window.strides) == {1} and min(pads) >= 0:
        return _input_by_convolution(site, window, pads)
    # What the forward Conv's stride left over at the end of an axis: ConvTranspose has to add it back.
    left_over = [
        size - ((out - 1) * stride + (kernel - 1) * dilation + 1 - sum(pads))
        for size, out, stride, kernel, dilation, pads in zip(
            window.sizes, window.out_sizes, window.strides, window.kernel, window.dilations, window.pads, strict=True
        )
    ]
    return site.graph.emit(
        "ConvTranspose",
        site.gradient,
        site.node.input[1],
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=window.onnx_pads,
        group=window.group,
        output_padding=left_over,
    )


def _input_by_convolution(site: Site, window: Window, pads: list[int]) -> str:
    graph, axes = site.graph, site.graph.integers(*window.axes)
    backwards, past_the_start = graph.integers(*[-1] * len(window.kernel)), graph.integers(*[-(2**31)] * len(window.kernel))
    kernel = graph.emit("Transpose", site.node.input[1], perm=[1, 0, *window.axes])
    kernel = graph.emit("Slice", kernel, backwards, past_the_start, axes, backwards)
    return graph.emit("Conv", site.gradient, kernel, dilations=list(window.dilations), pads=pads)


def _weight_by_unfolding(site: Site, window: Window) -> Product:
    graph = site.graph
    source, weight = site.node.input[:2]
    out_channels, channels, *kernel = site.shape(weight)
    swap = [1, 0, *window.axes]
    padded = graph.emit("Transpose", source, perm=swap)
    if any(window.onnx_pads):
        starts, ends = [0, 0, *window.onnx_pads[: len(kernel)]], [0, 0, *window.onnx_pads[len(kernel) :]]
        padded = graph.emit("Pad", padded, graph.integers(*starts, *ends))
    axes, steps = graph.integers(*window.axes), graph.integers(*window.strides)
    shifted = []
    for offsets in itertools.product(*(range(size) for size in kernel)):
        starts = [offset * dilation for offset, dilation in zip(offsets, window.dilations, strict=True)]
        ends = [s + (out - 1) * t + 1 for s, out, t in zip(starts, window.out_sizes, window.strides, strict=True)]
        shifted.append(graph.emit("Slice", padded, graph.integers(*starts), graph.integers(*ends), axes, steps))
    # Joined along the batch, the rows of [channels, kernel * batch, ...] are already in the weight's own order.
    columns = graph.emit("Concat", *shifted, axis=1)
    columns = graph.emit("Reshape", columns, graph.integers(channels * math.prod(kernel), -1))
    rows = graph.emit("Transpose", site.gradient, perm=swap)
    rows = graph.emit("Reshape", rows, graph.integers(out_channels, -1))
    return Product(rows, columns, transpose_b=True, shape=(out_channels, channels, *kernel))


def _weight_by_correlation(site: Site, window: Window) -> str:
    graph = site.graph
    source, weight = site.node.input[:2]
    _, channels, *kernel = site.shape(weight)
    swap = [1, 0, *window.axes]
    if window.group == 1:
        images = graph.emit("Transpose", source, perm=swap)
    else:
        # [batch, group, channels, ...] -> [channels, group * batch, ...]: each group meets its own output channels.
        spatial = range(3, 3 + len(kernel))
        images = graph.emit("Reshape", source, graph.integers(-1, window.group, channels, *window.sizes))
        images = graph.emit("Transpose", images, perm=[2, 1, 0, *spatial])
        # The batch may be of any size, so the joint axis is the one left open.
        images = graph.emit("Reshape", images, graph.integers(channels, -1, *window.sizes))
    correlated = graph.emit(
        "Conv",
        images,
        graph.emit("Transpose", site.gradient, perm=swap),
        strides=list(window.dilations),
        dilations=list(window.strides),
        pads=window.onnx_pads,
        group=window.group,
    )
    # A stride that left samples over makes the result longer than the kernel.
    begin, end = graph.integers(*[0] * len(kernel)), graph.integers(*kernel)
    cut = graph.emit("Slice", correlated, begin, end, graph.integers(*window.axes))
    return graph.emit("Transpose", cut, perm=swap)
