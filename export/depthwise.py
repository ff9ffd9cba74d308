"""Depthwise convolutions of small maps as matrix products, in training programs.

onnxruntime computes a depthwise convolution with a call for every map of every example, and on a small map the call is what costs. As a
matrix that takes the positions of a map to those of the output, most of it zeros, a channel's kernel serves the whole batch in one product;
gradients follow by the rules of MatMul. A larger map is cut into bands of rows, all of which one matrix serves: fewer of its numbers are
zeros, for the price of copies. Up to thirty times as fast on maps of 3x3 to 24x24 (x86-64, batch 20).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.forward import Forward, Shape
from export.windows import Window

LEAST_COLUMNS = 16
"""Of a product: what a GEMM kernel computes at once."""


def with_depthwise_products(forward: Forward, most_pairs: float) -> Forward:
    """The forward graph with every depthwise Conv of small maps as a product; values keep their names.

    Args:
        most_pairs: of an input and an output position in one product, which grows with them; onnxruntime's calls do not.
    """
    nodes: list[onnx.NodeProto] = []
    constants, shapes = dict(forward.constants), dict(forward.shapes)
    for node in forward.program_nodes:
        window = _window(forward, node)
        band = None if window is None else _band(window, most_pairs)
        if window is None or band is None:
            nodes.append(node)
            continue
        nodes += _Product(node, window, band, constants, shapes).nodes
    return replace(forward, program_nodes=tuple(nodes), constants=constants, shapes=shapes)


def _window(forward: Forward, node: onnx.NodeProto) -> Window | None:
    """Of a depthwise Conv; None for everything else."""
    options: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type != "Conv" or options.get("group", 1) == 1 or options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    source, weight, out = (forward.shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    known = [size for size in (*weight, *source[1:], *out[1:]) if size is not None]
    if len(known) != len(weight) + 2 * (len(weight) - 1) or weight[:2] != (options["group"], 1):
        return None
    sizes, out_sizes = (tuple(size or 0 for size in shape[2:]) for shape in (source, out))
    rank = len(sizes)
    ones = [1] * rank
    pads = options.get("pads", [0] * 2 * rank)
    return Window(
        kernel=tuple(size or 0 for size in weight[2:]),
        strides=tuple(options.get("strides", ones)),
        dilations=tuple(options.get("dilations", ones)),
        pads=tuple(zip(pads[:rank], pads[rank:], strict=True)),
        sizes=sizes,
        out_sizes=out_sizes,
        group=options["group"],
    )


def _band(whole: Window, most_pairs: float) -> Window | None:
    """What one product takes: the whole map, or a few of its rows with all that they meet; None where even that is too much."""
    if _pairs(whole) <= most_pairs:
        return whole
    rows, width = whole.out_sizes[0], math.prod(whole.out_sizes[1:])
    enough = max(2, -(-LEAST_COLUMNS // width))
    height = next((count for count in range(enough, 2 * enough + 1) if rows % count == 0), enough)
    step = height * whole.strides[0]
    reach = step - whole.strides[0] + (whole.kernel[0] - 1) * whole.dilations[0] + 1
    sizes, out_sizes = (max(step, reach), *whole.sizes[1:]), (height, *whole.out_sizes[1:])
    band = replace(whole, sizes=sizes, out_sizes=out_sizes, pads=((0, 0), *whole.pads[1:]))
    return band if height < rows and _pairs(band) <= most_pairs else None


def _pairs(window: Window) -> int:
    return math.prod(window.sizes) * math.prod(window.out_sizes)


class _Product:
    """The nodes of one convolution; writes their constants and shapes into the graph's."""

    def __init__(
        self, node: onnx.NodeProto, window: Window, band: Window, constants: dict[str, NDArray[Any]], shapes: dict[str, Shape]
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants, self._shapes, self._name = constants, shapes, f"product:{node.output[0]}"
        channels, rank = window.group, len(window.kernel)
        count = -(-window.out_sizes[0] // band.out_sizes[0])
        positions, out_positions, taps = (math.prod(sizes) for sizes in (band.sizes, band.out_sizes, window.kernel))
        swap = [1, 0, *range(2, 2 + rank)]
        maps = self._emit("Transpose", [node.input[0]], (channels, None, *window.sizes), perm=swap)
        maps = self._reshaped(maps if band is window else self._bands(maps, window, band, count), (channels, None, positions))
        kernels = self._reshaped(node.input[1], (channels, taps))
        matrices = self._emit("MatMul", [kernels, self._places(band)], (channels, positions * out_positions))
        matrices = self._reshaped(matrices, (channels, positions, out_positions))
        found = self._emit("MatMul", [maps, matrices], (channels, None, out_positions))
        if len(node.input) > 2 and node.input[2]:
            column = self._emit("Unsqueeze", [node.input[2], self._integers([1, 2])], (channels, 1, 1))
            found = self._emit("Add", [found, column], (channels, None, out_positions))
        found = self._reshaped(found, (channels, None, count * band.out_sizes[0], *window.out_sizes[1:]))
        if count * band.out_sizes[0] > window.out_sizes[0]:
            found = self._sliced(found, {2: (0, window.out_sizes[0])})
        self.nodes.append(helper.make_node("Transpose", [found], [node.output[0]], name=node.name, perm=swap))

    def _bands(self, maps: str, window: Window, band: Window, count: int) -> str:
        """[channels, batch, count, positions of a band]: bands follow each other, and each goes on into the next ones."""
        step, width, rank = band.out_sizes[0] * window.strides[0], math.prod(window.sizes[1:]), len(window.sizes)
        heights = [min(step, band.sizes[0] - start) for start in range(0, band.sizes[0], step)]
        steps = count + len(heights) - 1
        begin = window.pads[0][0]
        ends = [0, 0, begin, *[0] * (rank + 1), steps * step - begin - window.sizes[0], *[0] * (rank - 1)]
        maps = self._emit("Pad", [maps, self._integers(ends)], (window.group, None, steps * step, *window.sizes[1:]))
        maps = self._reshaped(maps, (window.group, None, steps, step * width))
        parts = [self._sliced(maps, {2: (place, place + count), 3: (0, rows * width)}) for place, rows in enumerate(heights)]
        return self._emit("Concat", parts, (window.group, None, count, band.sizes[0] * width), axis=3)

    def _sliced(self, value: str, bounds: dict[int, tuple[int, int]]) -> str:
        shape = tuple(bounds[axis][1] - bounds[axis][0] if axis in bounds else size for axis, size in enumerate(self._shapes[value]))
        begins, ends = zip(*bounds.values(), strict=True)
        return self._emit("Slice", [value, *(self._integers(each) for each in (begins, ends, list(bounds)))], shape)

    def _places(self, window: Window) -> str:
        """float32 [taps, positions * out_positions], 1 where a tap joins the two; in the program as small tables, one for each axis."""
        rank, beyond = len(window.kernel), math.prod(window.kernel)
        total = ""
        for axis in range(rank):
            tap = np.arange(window.sizes[axis])[:, None] + window.pads[axis][0]
            tap = tap - np.arange(window.out_sizes[axis]) * window.strides[axis]
            index, rest = np.divmod(tap, window.dilations[axis])
            misses = (rest != 0) | (index < 0) | (index >= window.kernel[axis])
            table = np.where(misses, beyond, index * math.prod(window.kernel[axis + 1 :]))  # OneHot takes what lies beyond as no tap
            shape = [1] * 2 * rank
            shape[axis], shape[axis + rank] = table.shape
            part = self._integers(table.reshape(shape))
            total = self._emit("Add", [total, part], ()) if total else part
        pairs = math.prod(window.sizes) * math.prod(window.out_sizes)
        flat = self._emit("Reshape", [total, self._integers([pairs])], (pairs,))
        values = self._constant(np.array([0, 1], np.float32))
        return self._emit("OneHot", [flat, self._integers([beyond]), values], (beyond, pairs), axis=0)

    def _reshaped(self, value: str, shape: Shape) -> str:
        return self._emit("Reshape", [value, self._integers([-1 if size is None else size for size in shape])], shape)

    def _emit(self, op: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        output = f"{self._name}:{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        self._shapes[output] = shape
        return output

    def _integers(self, values: Any) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: NDArray[Any]) -> str:
        name = f"{self._name}:constant:{len(self._constants)}"
        self._constants[name] = array
        self._shapes[name] = array.shape
        return name
