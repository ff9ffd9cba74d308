"""Gradients of Conv and ConvTranspose over any number of spatial axes, without ConvGrad, which inference builds of onnxruntime lack.

Every gradient has several ways with the same result; which is taken follows from the shapes, by the bounds of export/ways.py. So has the
Conv itself, in training programs:
    conv        as it is: onnxruntime multiplies image by image.
    columns     one GEMM for the whole batch over the unfolded input (im2col): where a map is so small that packing takes longest.
Input gradient of a Conv:
    transpose   ConvTranspose, which is its definition.
    columns     one GEMM for the whole batch, then Col2Im: where a map is so small that a GEMM for each image has no work to share.
    turn        with groups and stride 1 a Conv with every kernel turned around, for which onnxruntime has the faster code.
Weight gradient:
    shift       one GEMM for each kernel position, over the padded maps laid end to end, so that a position is an offset. Copies least.
    unfold      one GEMM for the whole batch over the unfolded input (im2col): small maps, strides, few channels.
    multiply    depthwise on larger maps: the input at each kernel position times the gradient, summed.
    correlate   other groups: a Conv in which channels and batch change places. Takes the least memory.

A ConvTranspose is a Conv read backwards: its input gradient is that Conv, and its weight gradient the Conv's with the places of input
and output gradient exchanged.
"""

from __future__ import annotations

import math
from typing import Any

from export.gradients import Gradient, Product, Site
from export.windows import Window, window_of


def conv(site: Site) -> dict[int, Gradient]:
    """Y = W * X + b."""
    source, weight = site.node.input[:2]
    kernel = site.shape(weight)[2:]
    window = window_of(site, _options(site, kernel), kernel)
    gradients: dict[int, Gradient] = {}
    if window.group == 1 and math.prod(kernel) > 1 and math.prod(window.out_sizes) <= site.graph.ways.columns_positions:
        _forwards_by_columns(site, window)
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


def _forwards_by_columns(site: Site, window: Window) -> None:
    """Put the product in the place of the node. A weight gradient that unfolds finds the same columns there: onnxruntime keeps one."""
    graph, weight = site.graph, site.node.input[1]
    out_channels = site.shape(weight)[0]
    with graph.in_place_of(site.node):
        columns = _columns(site, window, site.node.input[0])
        rows = graph.emit("MatMul", graph.emit("Reshape", weight, graph.integers(out_channels, -1)), columns)
        if len(site.node.input) > 2 and site.node.input[2]:
            rows = graph.emit("Add", rows, graph.emit("Unsqueeze", site.node.input[2], graph.integers(1)))
        maps = graph.emit("Reshape", rows, graph.integers(out_channels, -1, *window.out_sizes))
        graph.emit("Transpose", maps, perm=[1, 0, *window.axes], output=site.node.output[0])


def _backwards(site: Site, window: Window) -> str:
    # Of 1 and 3 spatial axes onnxruntime's Col2Im is wrong with dilation (1.31); of 2 it is right.
    sound = len(window.kernel) == 2 or set(window.dilations) == {1}
    if window.group == 1 and sound and math.prod(window.out_sizes) <= site.graph.ways.columns_positions:
        return _backwards_by_columns(site, window)
    reach = [dilation * (kernel - 1) for kernel, dilation in zip(window.kernel, window.dilations, strict=True)]
    pads = [whole - begin for whole, (begin, _) in zip(reach, window.pads, strict=True)]
    pads += [whole - end for whole, (_, end) in zip(reach, window.pads, strict=True)]
    if window.group > 1 and set(window.strides) == {1} and min(pads) >= 0:
        return _backwards_by_turning(site, window, pads)
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


def _backwards_by_columns(site: Site, window: Window) -> str:
    graph, weight = site.graph, site.node.input[1]
    out_channels, channels, *kernel = site.shape(weight)
    height = channels * math.prod(kernel)
    weight = graph.emit("Reshape", weight, graph.integers(out_channels, height))
    columns = graph.emit("Gemm", weight, _rows(site, site.gradient, out_channels), transA=1)
    columns = graph.emit("Reshape", columns, graph.integers(height, -1, math.prod(window.out_sizes)))
    return graph.emit(
        "Col2Im",
        graph.emit("Transpose", columns, perm=[1, 0, 2]),
        graph.integers(*window.sizes),
        graph.integers(*kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=window.onnx_pads,
    )


def _rows(site: Site, maps: str, channels: int) -> str:
    """[batch, channels, ...] as the matrix [channels, batch * positions]."""
    graph = site.graph
    swapped = graph.emit("Transpose", maps, perm=[1, 0, *range(2, site.rank(site.node.input[1]))])
    return graph.emit("Reshape", swapped, graph.integers(channels, -1))


def _backwards_by_turning(site: Site, window: Window, pads: list[int]) -> str:
    graph, axes, kernel = site.graph, site.graph.integers(*window.axes), site.node.input[1]
    backwards, past_the_start = graph.integers(*[-1] * len(window.kernel)), graph.integers(*[-(2**31)] * len(window.kernel))
    out_channels, channels, *_ = site.shape(kernel)
    if (out_channels, channels) != (window.group, 1):
        each = out_channels // window.group
        kernel = graph.emit("Reshape", kernel, graph.integers(window.group, each, channels, *window.kernel))
        kernel = graph.emit("Transpose", kernel, perm=[0, 2, 1, *(axis + 1 for axis in window.axes)])
        kernel = graph.emit("Reshape", kernel, graph.integers(window.group * channels, each, *window.kernel))
    kernel = graph.emit("Slice", kernel, backwards, past_the_start, axes, backwards)
    return graph.emit("Conv", site.gradient, kernel, dilations=list(window.dilations), pads=pads, group=window.group)


def _weight_gradient(site: Site, window: Window, source: str, gradient: str) -> Gradient:
    """Of W in `out = W * source`, given the gradient of `out`."""
    out_channels, channels, *_ = site.shape(site.node.input[1])
    positions, ways = math.prod(window.out_sizes), site.graph.ways
    if window.group == 1:
        waste = math.prod(window.padded_sizes) / positions
        plain = set(window.strides) == {1} and math.prod(window.kernel) > 1
        if plain and channels >= ways.shift_channels and waste <= ways.shift_waste:
            return _by_shifting(site, window, source, gradient)
        if positions <= ways.unfold_positions or math.prod(window.kernel) == 1:
            return _by_unfolding(site, window, source, gradient)
    elif (out_channels, channels) == (window.group, 1) and positions >= ways.multiply_positions:
        return _by_multiplying(site, window, source, gradient)
    return _by_correlation(site, window, source, gradient)


def _by_shifting(site: Site, window: Window, source: str, gradient: str) -> str:
    """The gradient is padded at its end to the size of the padded input, so that both have the same distance between rows and maps."""
    graph, swap = site.graph, [1, 0, *window.axes]
    out_channels, channels, *kernel = site.shape(site.node.input[1])
    ends = [padded - out for padded, out in zip(window.padded_sizes, window.out_sizes, strict=True)]
    distances = [math.prod(window.padded_sizes[axis + 1 :]) for axis in range(len(kernel))]
    shifts = [sum(offset * distance for offset, distance in zip(offsets, distances, strict=True)) for offsets in window.offsets]
    last, along = shifts[-1], graph.integers(1)
    rows = graph.emit("Pad", graph.emit("Transpose", gradient, perm=swap), graph.integers(*[0] * (4 + len(kernel)), *ends))
    rows = graph.emit("Reshape", rows, graph.integers(out_channels, -1))
    rows = graph.emit("Slice", rows, graph.integers(0), graph.integers(-last), along)
    maps = graph.emit("Reshape", _padded(site, window, graph.emit("Transpose", source, perm=swap)), graph.integers(channels, -1))
    wide = channels > out_channels
    products = []
    for shift in shifts:
        moved = graph.emit("Slice", maps, graph.integers(shift), graph.integers(shift - last or 2**31), along)
        product = graph.emit("Gemm", moved, rows, transB=1) if wide else graph.emit("Gemm", rows, moved, transB=1)
        products.append(graph.emit("Unsqueeze", product, graph.integers(2)))
    joined = graph.emit("Concat", *products, axis=2)
    if wide:
        joined = graph.emit("Transpose", joined, perm=[1, 0, 2])
    return graph.emit("Reshape", joined, graph.integers(out_channels, channels, *kernel))


def _by_unfolding(site: Site, window: Window, source: str, gradient: str) -> Gradient:
    graph = site.graph
    out_channels, channels, *kernel = site.shape(site.node.input[1])
    height = channels * math.prod(kernel)
    columns = _columns(site, window, source)
    rows = _rows(site, gradient, out_channels)
    if out_channels > min(height, graph.ways.narrow):
        return Product(rows, columns, transpose_b=True, shape=(out_channels, channels, *kernel))
    turned = graph.emit("Reshape", graph.emit("Gemm", columns, rows, transB=1), graph.integers(channels, *kernel, out_channels))
    return graph.emit("Transpose", turned, perm=[1 + len(kernel), *range(1 + len(kernel))])


def _columns(site: Site, window: Window, source: str) -> str:
    """[channels * kernel positions, batch * positions]: what each number of a kernel meets."""
    graph, (_, channels, *kernel) = site.graph, site.shape(site.node.input[1])
    # Joined along the batch, the rows of [channels, kernel * batch, ...] are already in the weight's own order.
    met = _at_kernel_positions(site, window, graph.emit("Transpose", source, perm=[1, 0, *window.axes]))
    columns = graph.emit("Concat", *met, axis=1) if len(met) > 1 else met[0]
    return graph.emit("Reshape", columns, graph.integers(channels * math.prod(kernel), -1))


def _by_multiplying(site: Site, window: Window, source: str, gradient: str) -> str:
    graph, axes = site.graph, site.graph.integers(0, *window.axes)
    met = _at_kernel_positions(site, window, source)
    sums = [graph.emit("ReduceSum", graph.emit("Mul", part, gradient), axes, keepdims=1) for part in met]
    return graph.emit("Reshape", graph.emit("Concat", *sums, axis=2), graph.integers(*site.shape(site.node.input[1])))


def _padded(site: Site, window: Window, maps: str) -> str:
    return site.graph.emit("Pad", maps, site.graph.integers(*window.pad_amounts)) if any(window.onnx_pads) else maps


def _at_kernel_positions(site: Site, window: Window, maps: str) -> list[str]:
    """What each kernel position meets, in the kernel's order: the padded maps, cut to the output's size."""
    graph, maps = site.graph, _padded(site, window, maps)
    if math.prod(window.kernel) == 1 and set(window.strides) == {1}:
        return [maps]
    axes, steps = graph.integers(*window.axes), graph.integers(*window.strides)
    met = []
    for starts in window.offsets:
        ends = [start + (out - 1) * step + 1 for start, out, step in zip(starts, window.out_sizes, window.strides, strict=True)]
        met.append(graph.emit("Slice", maps, graph.integers(*starts), graph.integers(*ends), axes, steps))
    return met


def _by_correlation(site: Site, window: Window, source: str, gradient: str) -> str:
    graph = site.graph
    _, channels, *kernel = site.shape(site.node.input[1])
    swap = [1, 0, *window.axes]
    # [batch, group, channels, ...] -> [channels, group * batch, ...]: each group meets its own output channels.
    images = graph.emit("Reshape", source, graph.integers(-1, window.group, channels, *window.sizes))
    images = graph.emit("Transpose", images, perm=[2, 1, 0, *range(3, 3 + len(kernel))])
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
