"""Depthwise convolutions of small maps as matrix products, in training programs.

onnxruntime computes a depthwise convolution with a call for every map of every example, and on a small map the call is what costs. As a
matrix that takes the positions of a map to those of the output, most of it zeros, a channel's kernel serves the whole batch in one product;
gradients follow by the rules of MatMul. A larger map is cut into bands of rows, all of which one matrix serves: fewer of its numbers are
zeros, for the price of copies. Up to thirty times as fast on maps of 3x3 to 24x24 (x86-64, batch 20).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.forward import Forward, Shape

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
        geometry = _geometry(forward, node)
        band = None if geometry is None else _band(geometry, most_pairs)
        if geometry is None or band is None:
            nodes.append(node)
            continue
        nodes += _Product(node, geometry, band, constants, shapes).nodes
    return replace(forward, program_nodes=tuple(nodes), constants=constants, shapes=shapes)


@dataclass(frozen=True)
class _Geometry:
    """One entry per spatial axis."""

    channels: int
    kernel: tuple[int, ...]
    sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]


def _geometry(forward: Forward, node: onnx.NodeProto) -> _Geometry | None:
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
    return _Geometry(
        weight[0] or 0,
        tuple(size or 0 for size in weight[2:]),
        sizes,
        out_sizes,
        tuple(options.get("strides", ones)),
        tuple(options.get("dilations", ones)),
        tuple(options.get("pads", [0] * 2 * rank)[:rank]),
    )


def _band(whole: _Geometry, most_pairs: float) -> _Geometry | None:
    """What one product takes: the whole map, or a few of its rows with all that they meet; None where even that is too much."""
    if _pairs(whole) <= most_pairs:
        return whole
    rows, width = whole.out_sizes[0], math.prod(whole.out_sizes[1:])
    enough = max(2, -(-LEAST_COLUMNS // width))
    height = next((count for count in range(enough, 2 * enough + 1) if rows % count == 0), enough)
    step = height * whole.strides[0]
    reach = step - whole.strides[0] + (whole.kernel[0] - 1) * whole.dilations[0] + 1
    sizes, out_sizes = (max(step, reach), *whole.sizes[1:]), (height, *whole.out_sizes[1:])
    band = replace(whole, sizes=sizes, out_sizes=out_sizes, begins=(0, *whole.begins[1:]))
    return band if height < rows and _pairs(band) <= most_pairs else None


def _pairs(geometry: _Geometry) -> int:
    return math.prod(geometry.sizes) * math.prod(geometry.out_sizes)


class _Product:
    """The nodes of one convolution; writes their constants and shapes into the graph's."""

    def __init__(
        self, node: onnx.NodeProto, geometry: _Geometry, band: _Geometry, constants: dict[str, NDArray[Any]], shapes: dict[str, Shape]
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants, self._shapes, self._name = constants, shapes, f"product:{node.output[0]}"
        channels, rank = geometry.channels, len(geometry.kernel)
        count = -(-geometry.out_sizes[0] // band.out_sizes[0])
        positions, out_positions, taps = (math.prod(sizes) for sizes in (band.sizes, band.out_sizes, geometry.kernel))
        swap = [1, 0, *range(2, 2 + rank)]
        maps = self._emit("Transpose", [node.input[0]], (channels, None, *geometry.sizes), perm=swap)
        maps = self._reshaped(maps if band is geometry else self._bands(maps, geometry, band, count), (channels, None, positions))
        kernels = self._reshaped(node.input[1], (channels, taps))
        matrices = self._emit("MatMul", [kernels, self._places(band)], (channels, positions * out_positions))
        matrices = self._reshaped(matrices, (channels, positions, out_positions))
        found = self._emit("MatMul", [maps, matrices], (channels, None, out_positions))
        if len(node.input) > 2 and node.input[2]:
            column = self._emit("Unsqueeze", [node.input[2], self._integers([1, 2])], (channels, 1, 1))
            found = self._emit("Add", [found, column], (channels, None, out_positions))
        found = self._reshaped(found, (channels, None, count * band.out_sizes[0], *geometry.out_sizes[1:]))
        if count * band.out_sizes[0] > geometry.out_sizes[0]:
            found = self._sliced(found, {2: (0, geometry.out_sizes[0])})
        self.nodes.append(helper.make_node("Transpose", [found], [node.output[0]], name=node.name, perm=swap))

    def _bands(self, maps: str, geometry: _Geometry, band: _Geometry, count: int) -> str:
        """[channels, batch, count, positions of a band]: bands follow each other, and each goes on into the next ones."""
        step, width, rank = band.out_sizes[0] * geometry.strides[0], math.prod(geometry.sizes[1:]), len(geometry.sizes)
        heights = [min(step, band.sizes[0] - start) for start in range(0, band.sizes[0], step)]
        steps = count + len(heights) - 1
        begin = geometry.begins[0]
        ends = [0, 0, begin, *[0] * (rank + 1), steps * step - begin - geometry.sizes[0], *[0] * (rank - 1)]
        maps = self._emit("Pad", [maps, self._integers(ends)], (geometry.channels, None, steps * step, *geometry.sizes[1:]))
        maps = self._reshaped(maps, (geometry.channels, None, steps, step * width))
        parts = [self._sliced(maps, {2: (place, place + count), 3: (0, rows * width)}) for place, rows in enumerate(heights)]
        return self._emit("Concat", parts, (geometry.channels, None, count, band.sizes[0] * width), axis=3)

    def _sliced(self, value: str, bounds: dict[int, tuple[int, int]]) -> str:
        shape = tuple(bounds[axis][1] - bounds[axis][0] if axis in bounds else size for axis, size in enumerate(self._shapes[value]))
        begins, ends = zip(*bounds.values(), strict=True)
        return self._emit("Slice", [value, *(self._integers(each) for each in (begins, ends, list(bounds)))], shape)

    def _places(self, geometry: _Geometry) -> str:
        """float32 [taps, positions * out_positions], 1 where a tap joins the two; in the program as small tables, one for each axis."""
        rank, beyond = len(geometry.kernel), math.prod(geometry.kernel)
        total = ""
        for axis in range(rank):
            tap = np.arange(geometry.sizes[axis])[:, None] + geometry.begins[axis]
            tap = tap - np.arange(geometry.out_sizes[axis]) * geometry.strides[axis]
            index, rest = np.divmod(tap, geometry.dilations[axis])
            misses = (rest != 0) | (index < 0) | (index >= geometry.kernel[axis])
            table = np.where(misses, beyond, index * math.prod(geometry.kernel[axis + 1 :]))  # OneHot takes what lies beyond as no tap
            shape = [1] * 2 * rank
            shape[axis], shape[axis + rank] = table.shape
            part = self._integers(table.reshape(shape))
            total = self._emit("Add", [total, part], ()) if total else part
        pairs = math.prod(geometry.sizes) * math.prod(geometry.out_sizes)
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
