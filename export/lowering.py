"""A model of any opset that we accept as one of opset 18, the version that programs say.

Most ops mean the same in all of them. Rewritten are those of which the form changed, and two that opset 18 lacks (Gelu) or that
onnxruntime has no kernel for (GroupNormalization), which become the ops that exporters write for older opsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET_VERSION = 18
"""Of every program."""

Nodes = list[onnx.NodeProto]


class _Rewriting:
    """The nodes that one node becomes; its last one takes the node's own output."""

    def __init__(self, node: onnx.NodeProto, opset: int) -> None:
        self.node, self.opset, self.nodes = node, opset, Nodes()
        self.attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}

    def emit(self, op: str, *inputs: str, last: bool = False, **attributes: Any) -> str:
        output = self.node.output[0] if last else f"{self.node.output[0]}:{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{self.node.name}:{output}", **attributes))
        return output

    def constant(self, value: Any, dtype: type[np.generic] = np.float32) -> str:
        return self.emit("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def renewed(self, inputs: Sequence[str], **attributes: Any) -> Nodes:
        """The constants so far, and the node itself with other inputs and attributes."""
        node = helper.make_node(self.node.op_type, list(inputs), list(self.node.output), name=self.node.name, **attributes)
        return [*self.nodes, node]


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the terms of opset 18; the model itself where it already is. Names of its values stay.

    Args:
        model: valid, of an opset that export.forward accepts. Not modified.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    rewritten = [_rewritten(node, opset) for node in model.graph.node]
    if opset == OPSET_VERSION and all(nodes is None for nodes in rewritten):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for node, nodes in zip(model.graph.node, rewritten, strict=True):
        copy.graph.node.extend([node] if nodes is None else nodes)
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OPSET_VERSION
    return copy


def _rewritten(node: onnx.NodeProto, opset: int) -> Nodes | None:
    rewrite = LOWERINGS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    return None if rewrite is None else rewrite(_Rewriting(node, opset))


def _gelu(new: _Rewriting) -> Nodes:
    """Y = X (1 + erf(X / sqrt(2))) / 2, in the order in which onnxruntime knows it; or the approximation by tanh."""
    source, one, half = new.node.input[0], new.constant(1), new.constant(0.5)
    if new.attributes.get("approximate", b"none") == b"tanh":
        factor = math.sqrt(2 / math.pi)
        square = new.emit("Mul", source, source)
        slope = new.emit("Add", new.emit("Mul", square, new.constant(factor * 0.044715)), new.constant(factor))
        curve = new.emit("Tanh", new.emit("Mul", source, slope))
    else:
        curve = new.emit("Erf", new.emit("Div", source, new.constant(math.sqrt(2))))
    new.emit("Mul", new.emit("Mul", source, new.emit("Add", curve, one)), half, last=True)
    return new.nodes


def _group_normalization(new: _Rewriting) -> Nodes:
    """Groups as the channels of an InstanceNormalization, then scale and bias of each channel, as opset 21 has it."""
    source, scale, bias = new.node.input
    groups = int(new.attributes["num_groups"])
    ones, zeros, column = new.constant([1.0] * groups), new.constant([0.0] * groups), new.constant([1], np.int64)
    grouped = new.emit("Reshape", source, new.constant([0, groups, -1], np.int64))
    normal = new.emit("InstanceNormalization", grouped, ones, zeros, epsilon=new.attributes.get("epsilon", 1e-5))
    batch, rest = new.constant([0], np.int64), new.constant([-1], np.int64)
    normal = new.emit("Reshape", normal, new.emit("Concat", batch, new.emit("Shape", scale), rest, axis=0))
    scaled = new.emit("Mul", normal, new.emit("Unsqueeze", scale, column))
    shifted = new.emit("Add", scaled, new.emit("Unsqueeze", bias, column))
    new.emit("Reshape", shifted, new.emit("Shape", source), last=True)
    return new.nodes


def _reduction(new: _Rewriting) -> Nodes | None:
    """Axes were an attribute before opset 18."""
    axes = new.attributes.pop("axes", None)
    if axes is None:
        return None
    return new.renewed([new.node.input[0], new.constant(axes, np.int64)], **new.attributes)


def _split(new: _Rewriting) -> Nodes | None:
    """Before opset 18 the number of equal parts was that of the outputs."""
    if new.opset >= OPSET_VERSION or len(new.node.input) > 1:
        return None
    return new.renewed(new.node.input, **new.attributes, num_outputs=len(new.node.output))


def _without(attribute: str, default: Callable[[Any], bool]) -> Callable[[_Rewriting], Nodes | None]:
    """An attribute that opset 18 lacks, left out where it says what opset 18 does."""

    def rewrite(new: _Rewriting) -> Nodes | None:
        if attribute not in new.attributes or not default(new.attributes[attribute]):
            return None
        del new.attributes[attribute]
        return new.renewed(new.node.input, **new.attributes)

    return rewrite


LOWERINGS: dict[str, Callable[[_Rewriting], Nodes | None]] = {
    "AveragePool": _without("dilations", lambda value: set(value) == {1}),
    "Cast": _without("saturate", lambda _: True),  # it matters for float8 only
    "Gelu": _gelu,
    "GroupNormalization": _group_normalization,
    "Split": _split,
    **{f"Reduce{of}": _reduction for of in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")},
}
"""By op; None where a node may stay as it is."""

REPLACED = frozenset({"Gelu", "GroupNormalization"})
"""Ops that no program holds, but that can be trained as what they become."""
