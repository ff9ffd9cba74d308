"""Gradients of Conv and ConvTranspose over any number of spatial axes, without ConvGrad, which inference builds of onnxruntime lack.

Input gradient of a Conv: ConvTranspose, which is its definition. At stride 1 that is a Conv with the kernel turned around and its
channels swapped, for which onnxruntime has the faster code.
Weight gradient, three ways with the same result:
    unfold      one GEMM for the whole batch over the unfolded input (im2col). Fastest on small maps, but holds one copy
                of the input per kernel position.
    shift       depthwise on larger maps: the input moved by each kernel position, times the gradient, summed.
    correlate   a Conv in which channels and batch change places. No copies; onnxruntime multiplies channel by channel.

A ConvTranspose is a Conv read backwards: its input gradient is that Conv, and its weight gradient the Conv's with the places of input
and output gradient exchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from export.gradients import Gradient, Product, Site
from export.windows import Window, window_of

UNFOLD_POSITIONS = 256
"""Largest output map that is unfolded: 16 x 16, or 256 samples of a signal."""

SHIFT_POSITIONS = 64
"""Smallest output map on which a depthwise weight gradient is summed position by position."""


def conv(site: Site) -> dict[int, Gradient]:
    """Y = W * X + b."""
    source, weight = site.node.input[:2]
    kernel = site.shape(weight)[2:]
    window = window_of(site, _options(site, kernel), kernel)
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        gradients[0] = _backwards(site, window)
    if 1 in site.wanted:
        gradients[1] = _weight_gradient(site, window, source, site.gradient)
    return gradients | _bias_gradient(site, window)


def conv_transpose(site: Site) -> dict[int, Gradient]:
    """X and Y of a Conv exchanged; W is [channels of X, channels of Y / group, ...]."""
    source, weight = site.node.input[:2]
    kernel = site.shape(weight)[2:]
    options = _options(site, kernel, output_padding=[0] * len(kernel), output_shape=None)
    if options["auto_pad"] in ("SAME_UPPER", "SAME_LOWER") or options["output_shape"] is not None:
        raise site.unsupported("its padding given by auto_pad or output_shape", "give it as numbers, in pads and output_padding")
    reading = window_of(site, options, kernel)
    window = Window(kernel, reading.strides, reading.dilations, reading.pads, reading.out_sizes, reading.sizes, reading.group)
    if any(extra >= stride for extra, stride in zip(options["output_padding"], window.strides, strict=True)):
        raise site.unsupported("output_padding as large as its stride", "pad the output instead")
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        geometry: dict[str, Any] = {"strides": window.strides, "dilations": window.dilations, "pads": window.onnx_pads}
        gradients[0] = site.graph.emit("Conv", site.gradient, weight, group=window.group, **geometry)
    if 1 in site.wanted:
        gradients[1] = _weight_gradient(site, window, site.gradient, source)
    return gradients | _bias_gradient(site, window)


def _options(site: Site, kernel: tuple[int, ...], **more: Any) -> dict[str, Any]:
    ones, none = [1] * len(kernel), [0] * 2 * len(kernel)
    return site.attributes(auto_pad="NOTSET", dilations=ones, group=1, kernel_shape=list(kernel), pads=none, strides=ones, **more)


def _bias_gradient(site: Site, window: Window) -> dict[int, Gradient]:
    if 2 not in site.wanted:
        return {}
    return {2: site.graph.emit("ReduceSum", site.gradient, site.graph.integers(0, *window.axes), keepdims=0)}


def _backwards(site: Site, window: Window) -> str:
    reach = [dilation * (kernel - 1) for kernel, dilation in zip(window.kernel, window.dilations, strict=True)]
    pads = [whole - begin for whole, (begin, _) in zip(reach, window.pads, strict=True)]
    pads += [whole - end for whole, (_, end) in zip(reach, window.pads, strict=True)]
    if set(window.strides) == {1} and min(pads) >= 0:
        return _backwards_by_convolution(site, window, pads)
    # What the forward Conv's stride left over at the end of an axis: ConvTranspose has to add it back.
    return site.graph.emit(
        "ConvTranspose",
        site.gradient,
        site.node.input[1],
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=window.onnx_pads,
        group=window.group,
        output_padding=window.left_over,
    )


def _backwards_by_convolution(site: Site, window: Window, pads: list[int]) -> str:
    graph, axes, kernel = site.graph, site.graph.integers(*window.axes), site.node.input[1]
    backwards, past_the_start = graph.integers(*[-1] * len(window.kernel)), graph.integers(*[-(2**31)] * len(window.kernel))
    out_channels, channels, *_ = site.shape(kernel)
    if window.group == 1:
        kernel = graph.emit("Transpose", kernel, perm=[1, 0, *window.axes])
    elif (out_channels, channels) != (window.group, 1):
        each = out_channels // window.group
        kernel = graph.emit("Reshape", kernel, graph.integers(window.group, each, channels, *window.kernel))
        kernel = graph.emit("Transpose", kernel, perm=[0, 2, 1, *(axis + 1 for axis in window.axes)])
        kernel = graph.emit("Reshape", kernel, graph.integers(window.group * channels, each, *window.kernel))
    kernel = graph.emit("Slice", kernel, backwards, past_the_start, axes, backwards)
    return graph.emit("Conv", site.gradient, kernel, dilations=list(window.dilations), pads=pads, group=window.group)


def _weight_gradient(site: Site, window: Window, source: str, gradient: str) -> Gradient:
    """Of W in `out = W * source`, given the gradient of `out`."""
    positions = math.prod(window.out_sizes)
    if window.group == 1 and positions <= UNFOLD_POSITIONS:
        return _by_unfolding(site, window, source, gradient)
    depthwise = site.shape(site.node.input[1])[:2] == (window.group, 1)
    if depthwise and positions >= SHIFT_POSITIONS:
        return _by_shifting(site, window, source, gradient)
    return _by_correlation(site, window, source, gradient)


def _shifted(site: Site, window: Window, source: str) -> Iterator[str]:
    """What each kernel position meets, in the kernel's order: the padded input, cut to the output's size."""
    graph, rank = site.graph, len(window.kernel)
    if any(window.onnx_pads):
        starts, ends = [0, 0, *window.onnx_pads[:rank]], [0, 0, *window.onnx_pads[rank:]]
        source = graph.emit("Pad", source, graph.integers(*starts, *ends))
    axes, steps = graph.integers(*window.axes), graph.integers(*window.strides)
    for offsets in itertools.product(*(range(size) for size in window.kernel)):
        starts = [offset * dilation for offset, dilation in zip(offsets, window.dilations, strict=True)]
        ends = [s + (out - 1) * t + 1 for s, out, t in zip(starts, window.out_sizes, window.strides, strict=True)]
        yield graph.emit("Slice", source, graph.integers(*starts), graph.integers(*ends), axes, steps)


def _by_unfolding(site: Site, window: Window, source: str, gradient: str) -> Product:
    graph = site.graph
    out_channels, channels, *kernel = site.shape(site.node.input[1])
    swap = [1, 0, *window.axes]
    # Joined along the batch, the rows of [channels, kernel * batch, ...] are already in the weight's own order.
    columns = graph.emit("Concat", *_shifted(site, window, graph.emit("Transpose", source, perm=swap)), axis=1)
    columns = graph.emit("Reshape", columns, graph.integers(channels * math.prod(kernel), -1))
    rows = graph.emit("Transpose", gradient, perm=swap)
    rows = graph.emit("Reshape", rows, graph.integers(out_channels, -1))
    return Product(rows, columns, transpose_b=True, shape=(out_channels, channels, *kernel))


def _by_shifting(site: Site, window: Window, source: str, gradient: str) -> str:
    graph, axes = site.graph, site.graph.integers(0, *window.axes)
    sums = [graph.emit("ReduceSum", graph.emit("Mul", part, gradient), axes, keepdims=1) for part in _shifted(site, window, source)]
    return graph.emit("Reshape", graph.emit("Concat", *sums, axis=2), graph.integers(*site.shape(site.node.input[1])))


def _by_correlation(site: Site, window: Window, source: str, gradient: str) -> str:
    graph = site.graph
    _, channels, *kernel = site.shape(site.node.input[1])
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
        graph.emit("Transpose", gradient, perm=swap),
        strides=list(window.dilations),
        dilations=list(window.strides),
        pads=window.onnx_pads,
        group=window.group,
    )
    # A stride that left samples over makes the result longer than the kernel.
    begin, end = graph.integers(*[0] * len(kernel)), graph.integers(*kernel)
    cut = graph.emit("Slice", correlated, begin, end, graph.integers(*window.axes))
    return graph.emit("Transpose", cut, perm=swap)
