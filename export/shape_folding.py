"""Exporters compute shapes in the graph, where onnx.shape_inference loses track. Running the model at two batch sizes shows them.

What is the same at both does not depend on the batch: axes get their size, and numbers that were computed from shapes alone become
constants, which gradient rules can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from regrow.errors import LocalError

_RUN_ERRORS = (ort_state.Fail, ort_state.InvalidArgument, ort_state.InvalidGraph, ort_state.NotImplemented, ort_state.RuntimeException)

BATCHES = (3, 7)
"""Small, and without a common divisor, for shapes such as [batch * heads, ...]."""


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with measured shapes and folded shape arithmetic; the model itself where it computes with no shapes.

    Args:
        model: valid, one input [batch, ...] with fixed other axes. Not modified.

    Raises:
        LocalError: the model does not run.
    """
    graph = model.graph
    sources = _sources(graph)
    computes = any(node.op_type in ("Shape", "Size") for node in graph.node)
    if not computes or len(sources) != 1 or not _has_free_batch(sources[0]):
        return model
    small, large = (_values(model, sources[0], batch) for batch in BATCHES)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.value_info:
        if value.name in small and value.type.HasField("tensor_type"):
            _say(value, small[value.name].shape, large[value.name].shape)
    del copy.graph.node[:]
    from_shapes = set(_from_shapes(graph))
    for node in graph.node:
        name = node.output[0]
        if name in from_shapes and len(node.output) == 1 and np.array_equal(small[name], large[name]):
            node = helper.make_node("Constant", [], [name], name=node.name, value=numpy_helper.from_array(small[name]))
        copy.graph.node.append(node)
    return copy


def _sources(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _has_free_batch(source: onnx.ValueInfoProto) -> bool:
    """Whether the input is of the form that training needs; export.forward says what is wrong with another."""
    fixed = [dim.HasField("dim_value") for dim in source.type.tensor_type.shape.dim]
    return len(fixed) > 1 and not fixed[0] and all(fixed[1:])


def _values(model: onnx.ModelProto, source: onnx.ValueInfoProto, batch: int) -> dict[str, NDArray[Any]]:
    """Every value of the graph, for an input of zeros."""
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    graph = open_model.graph
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for node in graph.node for name in node.output if name)
    sizes = [dim.dim_value for dim in source.type.tensor_type.shape.dim]
    zeros = np.zeros([batch, *sizes[1:]], helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    names = [value.name for value in graph.output]
    try:
        session = ort.InferenceSession(open_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, {source.name: zeros}), strict=True))
    except _RUN_ERRORS as error:
        cure = "export it with a dynamic batch (in torch, read sizes with x.shape, not len(x))"
        raise LocalError(f"the model does not run on a batch of {batch}; {cure}: {error}") from error


def _from_shapes(graph: onnx.GraphProto) -> Iterator[str]:
    """Values that are computed from shapes and constants alone."""
    known = {tensor.name for tensor in graph.initializer if tensor.data_type != TensorProto.FLOAT} | {""}
    for node in graph.node:
        if node.op_type == "Constant":
            known.update(node.output)
        elif node.op_type in ("Shape", "Size") or (node.input and known.issuperset(node.input)):
            known.update(node.output)
            yield from node.output


def _say(value: onnx.ValueInfoProto, small: tuple[int, ...], large: tuple[int, ...]) -> None:
    shape = value.type.tensor_type.shape
    shape.Clear()
    shape.SetInParent()  # that of a scalar is empty, and has to be there
    for one, other in zip(small, large, strict=True):
        dim = shape.dim.add()
        if one == other:
            dim.dim_value = one
