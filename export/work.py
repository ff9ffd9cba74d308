"""How much a model computes: the multiply-adds of its convolutions, products and recurrent layers, where a training step's time goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx

from export.forward import Forward, Shape, read_forward
from export.programs import layout_of
from export.slicing import sliced_model
from export.units import find_units
from regrow.errors import LocalError
from regrow.unit_order import level_sizes, level_units
from regrow.units import kept_count

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}) | _RECURRENT


def multiply_adds(model: onnx.ModelProto) -> int:
    """Multiply-adds of one example's forward pass, in convolutions, matrix products and recurrent layers; all else counts nothing.

    An axis that is only known at run time counts once, as the batch does.

    Raises:
        LocalError: as read_forward, or the shape of a counted op's value is not known.
    """
    forward = read_forward(model)
    return sum(_of_node(forward, node) for node in forward.nodes if node.op_type in _COUNTED)


def _of_node(forward: Forward, node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":  # a weight is used at every place of the output, of a transposed one at every place of the input
        return _size(forward, node, node.input[1]) * _count(_shape(forward, node, node.output[0])[2:])
    if node.op_type == "ConvTranspose":
        return _size(forward, node, node.input[1]) * _count(_shape(forward, node, node.input[0])[2:])
    if node.op_type in _RECURRENT:  # at every place of the sequence, whose axis is the first; with layout = 1 the batch is
        sequence = _shape(forward, node, node.input[0])[_attribute(node, "layout")]
        return (_size(forward, node, node.input[1]) + _size(forward, node, node.input[2])) * (sequence or 1)
    inner = _shape(forward, node, node.input[0])
    summed = inner[0 if node.op_type == "Gemm" and _attribute(node, "transA") else -1]
    return _size(forward, node, node.output[0]) * (summed or 1)


def _shape(forward: Forward, node: onnx.NodeProto, name: str) -> Shape:
    shape = forward.shapes.get(name)
    if not shape:
        raise LocalError(f"the multiply-adds of {node.op_type} {node.name!r} cannot be counted: the shape of {name!r} is not known")
    return shape


def _size(forward: Forward, node: onnx.NodeProto, name: str) -> int:
    return _count(_shape(forward, node, name))


def _count(shape: Shape) -> int:
    return math.prod(size or 1 for size in shape)


def _attribute(node: onnx.NodeProto, name: str) -> int:
    """An integer that is 0 unless the node says otherwise."""
    return next((int(item.i) for item in node.attribute if item.name == name), 0)


def relative_work(model: onnx.ModelProto, densities: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(share of the parameters, share of the multiply-adds) of every level of granularity "unit", ascending and ending at (1, 1).

    The backward pass costs about twice the forward pass at every width, so the share is that of a training step too.

    Raises:
        LocalError: the model has no units (find_units).
    """
    units = find_units(model)
    layout = layout_of(read_forward(model), units)
    whole = multiply_adds(model)
    shares = {1.0: 1.0}
    for sizes in level_sizes(layout, units, densities)[:-1]:
        small = multiply_adds(sliced_model(model, units, level_units(sizes)))
        shares[kept_count(layout, units, sizes) / layout.size] = max(small / whole, 1e-6)
    return tuple(sorted(shares.items()))
