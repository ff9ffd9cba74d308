"""A forward ONNX model as the differentiator reads it: checked, with one naming scheme, shapes known, weights apart from constants.

Names in every program that we build:
    x, y, sample_weight, learning_rate, loss, ...   the program's own inputs and outputs
    <parameter>, mask:<parameter>, new:<parameter>  a parameter keeps the name of its initializer
    state:<slot>:<parameter>, anchor:<parameter>    what the optimizer remembers of it, and its value as the round began
    stat:<statistic>, batch:<statistic>             a running mean or variance, and that of the batch at hand
    forward:<value>                                 what the forward model calls <value>
    step:<number>                                   everything that we add
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from export.control_flow import refuse_control_flow
from export.layers import frozen_parameters
from export.lowering import lowered
from export.shape_folding import folded
from regrow.errors import LocalError, shortened

Shape = tuple[int | None, ...]
"""One entry per axis; None where the size is only known at run time (the batch)."""

OPSETS = range(13, 22)
"""Incoming ai.onnx versions; programs say 18 (export.lowering)."""

RESERVED_NAMES = frozenset({"x", "y", "sample_weight", "learning_rate", "loss", "loss_sum", "correct", "squared_error"})
RESERVED_PREFIXES = ("new:", "mask:", "state:", "anchor:", "forward:", "step:", "stat:", "batch:")
_FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True)
class Forward:
    """A checked forward model under our names.

    Attributes:
        nodes: in execution order, `Constant` nodes taken out.
        program_nodes: the same in the terms of the opset that programs say (export.lowering).
        parameters: the float32 initializers that are trained, in the model's order.
        constants: tensors that are never trained (shapes, axes; initializers of layers that stay as they are, under their own names).
        shapes: of every value whose shape could be inferred.
        input_shape: of `x`; the first axis is None.
        input_type: of `x`, TensorProto.FLOAT or INT64.
        logits: name of the output.
        output_shape: of the output, float32; all axes but the first are known.
        statistics: running means and variances of batch normalisations, by initializer; in the nodes `stat:<initializer>`.
    """

    nodes: tuple[onnx.NodeProto, ...]
    program_nodes: tuple[onnx.NodeProto, ...]
    parameters: dict[str, NDArray[np.float32]]
    constants: dict[str, NDArray[Any]]
    shapes: dict[str, Shape]
    input_shape: Shape
    input_type: int
    logits: str
    output_shape: Shape
    statistics: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Scores of one example where the output is [batch, classes], otherwise 0."""
        return self.output_shape[1] or 0 if len(self.output_shape) == 2 else 0


def read_forward(model: onnx.ModelProto, train_last: int | None = None) -> Forward:
    """The checked forward model.

    Args:
        model: one float32 or int64 input [batch, ...] with a dynamic first axis and static others, one float32 output [batch, ...];
            float32 initializers are the parameters. Not modified.
        train_last: only the parameters of so many layers before the output are trained (export.layers); None: all.

    Raises:
        LocalError: the model is invalid, or not of this form; the message names the part and the cure.
    """
    inferred = _checked(model)
    graph = inferred.graph
    parameters, constants = _initializers(graph)
    statistics = _taken_statistics(graph, parameters)
    known = {*parameters, *constants, *statistics}
    inputs = [value for value in graph.input if value.name not in known]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise LocalError(
            f"the model has {len(inputs)} inputs and {len(graph.output)} outputs, but training needs exactly one of each; "
            "export the network alone, from features to logits, without its loss"
        )
    input_shape = _input_shape(inputs[0])
    names = {"": "", inputs[0].name: "x"} | {name: name for name in parameters} | {name: f"stat:{name}" for name in statistics}
    nodes, program_nodes = (
        tuple(_renamed(node, names) for node in each.node if node.op_type != "Constant") for each in (model.graph, graph)
    )
    values = [value for value in (*graph.value_info, *graph.output) if value.type.tensor_type.HasField("shape")]
    shapes = {_rename(value.name, names): _shape(value) for value in values}
    shapes |= {name: array.shape for name, array in parameters.items()} | {"x": input_shape}
    constants = {_rename(name, names): array for name, array in constants.items()}
    shapes |= {name: array.shape for name, array in constants.items()}
    shapes |= {f"stat:{name}": array.shape for name, array in statistics.items()}
    logits = _rename(graph.output[0].name, names)
    if train_last is not None:
        frozen = frozen_parameters(nodes, parameters, constants, train_last)
        constants |= {name: parameters.pop(name) for name in frozen}
        constants |= {f"stat:{name}": statistics.pop(name) for name in _frozen_statistics(nodes, frozen)}
    input_type = inputs[0].type.tensor_type.elem_type
    output_shape = _output_shape(shapes.get(logits), graph.output[0])
    return Forward(nodes, program_nodes, parameters, constants, shapes, input_shape, input_type, logits, output_shape, statistics)


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the terms of our opset, with inferred shapes, or LocalError."""
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise LocalError("the model keeps weights in another file; save it as one file: onnx.save(onnx.load(path), 'one.onnx')")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise LocalError(f"not a valid ONNX model: {error}") from error
    refuse_control_flow(model.graph)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 0))
    if version not in OPSETS:
        raise LocalError(f"the model uses opset {version}; export it with an opset from {OPSETS[0]} to {OPSETS[-1]}, best 18")
    if model.functions:
        raise LocalError(
            f"the model defines the function {shortened(model.functions[0].name)!r}; inline it (onnx.inliner.inline_local_functions)"
        )
    try:
        return _inferred(folded(_inferred(_as_inference(lowered(model)))))
    except onnx.shape_inference.InferenceError as error:
        raise LocalError(f"not a valid ONNX model: {error}") from error


def _as_inference(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its batch normalisations for inference: onnxruntime runs no others."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "BatchNormalization":
            as_inference(node)
    return copy


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def _initializers(graph: onnx.GraphProto) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[Any]]]:
    """(parameters, constants): float32 initializers are trained, integer ones and `Constant` nodes are not."""
    if graph.sparse_initializer:
        raise LocalError("the model has sparse initializers; store them dense, sub-models prune by themselves")
    parameters: dict[str, NDArray[np.float32]] = {}
    constants: dict[str, NDArray[Any]] = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            parameters[tensor.name] = numpy_helper.to_array(tensor)
        elif tensor.data_type in _FLOAT_TYPES:
            kind = TensorProto.DataType.Name(tensor.data_type).lower()
            raise LocalError(f"parameter {shortened(tensor.name)!r} is {kind}; training runs in float32: convert the model to float32")
        else:
            constants[tensor.name] = numpy_helper.to_array(tensor)
    if not parameters:
        raise LocalError("the model has no float32 initializer, so there is nothing to train; export it with its weights")
    for name in parameters:
        if name in RESERVED_NAMES or name.startswith(RESERVED_PREFIXES):
            raise LocalError(f"parameter {shortened(name)!r} has a name that training programs need; rename it in the model")
    return parameters, constants | dict(_constant_nodes(graph))


def _frozen_statistics(nodes: Sequence[onnx.NodeProto], frozen: Collection[str]) -> list[str]:
    """Running statistics of batch normalisations that stay as they are: what comes before does not change, so neither do they."""
    norms = [node for node in nodes if node.op_type == "BatchNormalization" and node.input[1] in frozen]
    return [name.removeprefix("stat:") for node in norms for name in node.input[3:5]]


def _taken_statistics(graph: onnx.GraphProto, parameters: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Move the running means and variances of batch normalisations out of the parameters: nobody trains them.

    Raises:
        LocalError: a statistic is no float32 initializer, or something else uses it too.
    """
    norms = [node for node in graph.node if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx")]
    statistics: dict[str, NDArray[np.float32]] = {}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in norms:
        for name in node.input[3:5]:
            where = f"BatchNormalization (node {shortened(node.name)!r}): its statistic {shortened(name)!r}"
            if uses[name] != 1:
                raise LocalError(f"{where} is used elsewhere too; exporters merge equal tensors: train the model a step, then export")
            if name not in parameters:
                raise LocalError(f"{where} is no float32 initializer; export the model with its weights")
            statistics[name] = parameters.pop(name)
    return statistics


def _constant_nodes(graph: onnx.GraphProto) -> Iterator[tuple[str, NDArray[Any]]]:
    for node in graph.node:
        if node.op_type != "Constant":
            continue
        attribute = node.attribute[0]
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            yield node.output[0], numpy_helper.to_array(value)
        elif attribute.name in ("value_int", "value_ints"):
            yield node.output[0], np.array(value, np.int64)
        elif attribute.name in ("value_float", "value_floats"):
            yield node.output[0], np.array(value, np.float32)
        else:
            raise LocalError(f"Constant node {shortened(node.name)!r} holds {attribute.name}; only dense numbers can be trained with")


def _input_shape(value: onnx.ValueInfoProto) -> Shape:
    shape = _shape(value)
    if value.type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.INT64):
        raise LocalError(f"input {shortened(value.name)!r} is neither float32 nor int64; cast outside the model")
    if len(shape) < 2 or shape[0] is not None or None in shape[1:]:
        raise LocalError(
            f"input {shortened(value.name)!r} has shape {_words(shape)}; training needs a dynamic first axis, the batch, and fixed others: "
            "export with dynamic_axes={input: {0: 'batch'}}, or with dynamo=True by dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    return shape


def _output_shape(shape: Shape | None, value: onnx.ValueInfoProto) -> Shape:
    if not shape or None in shape[1:] or value.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise LocalError(
            f"output {shortened(value.name)!r} has shape {_words(shape or ())}; training needs a float32 output [batch, ...], "
            "all axes but the batch fixed"
        )
    return shape


def _shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _words(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _rename(name: str, names: dict[str, str]) -> str:
    return names.get(name, f"forward:{name}")


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    renamed.input[:] = [_rename(name, names) for name in node.input]
    renamed.output[:] = [_rename(name, names) for name in node.output]
    if node.op_type == "BatchNormalization":
        as_inference(renamed)
    return renamed


def as_inference(node: onnx.NodeProto) -> None:
    """Make a BatchNormalization that was exported in training mode one for inference; it then gives out no new running statistics."""
    del node.output[1:]
    kept = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
    del node.attribute[:]
    node.attribute.extend(kept)


def known_tokens(graph: onnx.GraphProto, source: str, rows: Mapping[str, Sequence[int]]) -> int:
    """How many tokens the tables know that an input indexes, the rows of the smallest; 0 where it indexes none directly.

    Args:
        source: the name of the input.
        rows: of the graph's parameters, their shapes; its initializers are known.
    """
    tables = {**{tensor.name: tensor.dims for tensor in graph.initializer}, **rows}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[1] == source and node.input[0] in tables]
    return min((tables[node.input[0]][0] for node in lookups if not any(item.i for item in node.attribute)), default=0)
