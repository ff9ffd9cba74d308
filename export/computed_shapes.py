"""Reshape targets that a model computes out of shapes become constants, so that every shape but the batch is known before anything runs.

onnx's own inference follows most of the arithmetic that exporters write, but stops at some of it: torch's stacked LSTM, for one, reshapes
its result to sizes that it reads off the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

_BATCHES = (7, 11)
"""What differs between these two is the batch's doing."""


@dataclass(frozen=True)
class _Known:
    """What inference says of a model: dims of values, which node makes a value, integer constants; and the batch's name."""

    dims: Mapping[str, onnx.TensorShapeProto]
    makers: Mapping[str, onnx.NodeProto]
    constants: Mapping[str, NDArray[Any]]
    batch: str


def with_constant_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with such targets as constants, -1 for the batch; itself where there are none.

    Args:
        model: after onnx's shape inference, with one dynamic axis that has a name, the batch. Not modified.

    Returns:
        A model after shape inference.
    """
    known = _known(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] in known.constants or _is_known(known, node.output[0]):
            continue
        target = _target(known, model, node.input[1])
        if target is not None:
            return with_constant_shapes(_with_target(model, node, target))
    return model


def _known(model: onnx.ModelProto) -> _Known:
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    dims = {value.name: value.type.tensor_type.shape for value in values if value.type.tensor_type.HasField("shape")}
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.INT64}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_int", "value_ints"):
            value = helper.get_attribute_value(node.attribute[0])
            constants[node.output[0]] = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.array(value, np.int64)
    data = [value for value in graph.input if value.name not in {tensor.name for tensor in graph.initializer}]
    batch = data[0].type.tensor_type.shape.dim[0].dim_param if len(data) == 1 and data[0].type.tensor_type.shape.dim else ""
    return _Known(dims, makers, constants, batch)


def _is_known(known: _Known, name: str) -> bool:
    """Whether every axis of a value is fixed or the batch."""
    shape = known.dims.get(name)
    return shape is not None and all(dim.HasField("dim_value") or (dim.dim_param and dim.dim_param == known.batch) for dim in shape.dim)


def _target(known: _Known, model: onnx.ModelProto, name: str) -> list[int | str] | None:
    """What a value is, the batch's name where it is the batch and -1 where it depends on the batch.

    None if it depends on more than known shapes, or on the batch twice.
    """
    ancestors, pending = set[str](), [name]
    while pending:
        value = pending.pop()
        if not value or value in known.constants or value in ancestors:
            continue
        node = known.makers.get(value)
        if node is None or (node.op_type == "Shape" and not _is_known(known, node.input[0])):
            return None
        ancestors.update(node.output)
        pending += [] if node.op_type == "Shape" else node.input
    nodes = [node for node in model.graph.node if node.output[0] in ancestors and node.op_type != "Constant"]
    first, second = (_evaluated(known, nodes, name, model, batch) for batch in _BATCHES)
    if first.shape != second.shape:
        return None
    target: list[int | str] = [int(a) if a == b else -1 for a, b in zip(first, second, strict=True)]
    if target.count(-1) > 1:
        return None
    return [known.batch if (a, b) == _BATCHES else size for a, b, size in zip(first, second, target, strict=True)]


def _evaluated(known: _Known, nodes: list[onnx.NodeProto], name: str, model: onnx.ModelProto, batch: int) -> NDArray[np.int64]:
    shapes: dict[str, NDArray[np.int64]] = {}
    for node in nodes:
        if node.op_type == "Shape":
            ends = {item.name: item.i for item in node.attribute}
            sizes = [dim.dim_value if dim.HasField("dim_value") else batch for dim in known.dims[node.input[0]].dim]
            shapes[node.output[0]] = np.array(sizes[ends.get("start", 0) : ends.get("end")], np.int64)
    inputs = [helper.make_tensor_value_info(value, TensorProto.INT64, array.shape) for value, array in shapes.items()]
    used = {value for node in nodes for value in node.input}
    constants = [numpy_helper.from_array(array, key) for key, array in known.constants.items() if key in used]
    rest = [node for node in nodes if node.op_type != "Shape"]
    graph = helper.make_graph(rest, "shape", inputs, [helper.make_tensor_value_info(name, TensorProto.INT64, None)], constants)
    (value,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import)).run(None, shapes)
    return np.asarray(value, np.int64)


def _with_target(model: onnx.ModelProto, node: onnx.NodeProto, target: list[int | str]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    name = f"{node.output[0]}:shape"
    for index, each in enumerate(changed.graph.node):
        if each.output[0] == node.output[0]:
            each.input[1] = name
            sizes = np.array([-1 if isinstance(size, str) else size for size in target], np.int64)
            changed.graph.node.insert(index, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(sizes)))
            break
    known = _known(model)
    certain = [value for value in changed.graph.value_info if _is_known(known, value.name)]
    del changed.graph.value_info[:]  # what is not known is inferred again
    changed.graph.value_info.extend(certain)
    kind = next((value.type.tensor_type.elem_type for value in model.graph.value_info if value.name == node.output[0]), 0)
    if kind and -1 not in target and 0 not in target:  # inference does not say that -1 is the batch
        changed.graph.value_info.append(helper.make_tensor_value_info(node.output[0], kind, target))
    return onnx.shape_inference.infer_shapes(changed, check_type=True, strict_mode=True, data_prop=True)
