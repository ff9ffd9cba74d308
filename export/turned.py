"""Fully connected layers with large weights computed transposed, in training programs.

onnxruntime's GEMM packs its second operand before it multiplies. For a batch of few examples and a weight larger than the caches that is
the weight, which is read once anyway: packing takes as long as all the rest. As the first operand it is left as it lies (LEAF CNN, batch
20, x86-64: 4.5 ms instead of 8.4).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from export.forward import Forward

LARGE = 2**18
"""Numbers in a weight that no cache of a core holds."""


def with_turned_products(forward: Forward) -> Forward:
    """The forward graph with every Gemm of rows and a large weight [outputs, inputs] as weight times columns; values keep their names."""
    nodes: list[onnx.NodeProto] = []
    constants, shapes = dict(forward.constants), dict(forward.shapes)
    constants |= {f"turned:axis:{axis}": np.array([axis], np.int64) for axis in (0, 2)}
    for node in forward.program_nodes:
        if not _is_large(forward, node):
            nodes.append(node)
            continue
        output, outputs = node.output[0], shapes[node.input[1]][0]
        product, front, back, rows = (f"turned:{output}:{number}" for number in range(4))
        bias = node.input[2] if len(node.input) > 2 else ""
        # With an axis around it: onnxruntime would take a plain Transpose back into the Gemm.
        nodes += [
            helper.make_node("Gemm", [node.input[1], node.input[0]], [product], name=node.name, transB=1),
            helper.make_node("Unsqueeze", [product, "turned:axis:0"], [front]),
            helper.make_node("Transpose", [front], [back], perm=[2, 1, 0]),
            helper.make_node("Squeeze", [back, "turned:axis:2"], [rows if bias else output]),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [rows, bias], [output]))
        batch = shapes[node.input[0]][0]
        shapes |= {product: (outputs, batch), front: (1, outputs, batch), back: (batch, outputs, 1), rows: (batch, outputs)}
    return replace(forward, program_nodes=tuple(nodes), constants=constants, shapes=shapes)


def _is_large(forward: Forward, node: onnx.NodeProto) -> bool:
    options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type != "Gemm" or not options.pop("transB", 0) or any(options.pop(name, 1) != 1 for name in ("alpha", "beta")):
        return False
    weight = forward.parameters.get(node.input[1])
    return not any(options.values()) and weight is not None and weight.size >= LARGE
