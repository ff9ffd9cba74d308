"""How much a model computes: the multiply-adds of its convolutions and dense layers, which is where a training step's time goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx

from export.forward import Forward, read_forward
from export.programs import layout_of
from export.slicing import sliced_model
from export.units import find_units
from regrow.unit_order import level_sizes, level_units
from regrow.units import kept_count

_WEIGHT_INPUT = 1  # of Conv, Gemm and MatMul alike


def multiply_adds(model: onnx.ModelProto) -> int:
    """Multiply-adds of one example's forward pass, in convolutions and matrix products with a parameter; all else counts nothing.

    Raises:
        LocalError: as read_forward.
    """
    forward = read_forward(model)
    return sum(_of_node(forward, node) for node in forward.nodes if node.op_type in ("Conv", "Gemm", "MatMul"))


def _of_node(forward: Forward, node: onnx.NodeProto) -> int:
    """A weight is used once at every position of the output: (height, width) of a convolution, none or more axes of a product."""
    weight = forward.parameters.get(node.input[_WEIGHT_INPUT])
    if weight is None:
        return 0
    shape = forward.shapes[node.output[0]]
    positions = shape[2:] if node.op_type == "Conv" else shape[1:-1]
    return weight.size * math.prod(size or 1 for size in positions)


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
