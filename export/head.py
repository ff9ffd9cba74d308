"""The last layer of an inference model as something that a device may train for itself, and override when it runs the model."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.programs import build_programs, initial_vector
from export.task import read_model
from regrow.errors import LocalError


def last_layer(model: onnx.ModelProto) -> list[str]:
    """Names of the float32 initializers of the last layer: of its last matrix or kernel, and of all that comes after it in the graph.

    Raises:
        LocalError: there is no such initializer.
    """
    arrays = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    nodes = list(model.graph.node)
    weighted = [place for place, node in enumerate(nodes) if any(arrays.get(name, 0) >= 2 for name in node.input)]
    if not weighted:
        raise LocalError("the model has no float32 weight of two or more dimensions, so there is no last layer to train")
    used = {name for node in nodes[weighted[-1] :] for name in node.input}
    return [name for name in arrays if name in used]


def open_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model whose last layer's initializers are also inputs: onnxruntime then lets a feed override them.

    Raises:
        LocalError: as last_layer.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    there = {value.name for value in opened.graph.input}
    shapes = {tensor.name: list(tensor.dims) for tensor in opened.graph.initializer}
    opened.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in last_layer(model) if name not in there
    )
    onnx.checker.check_model(opened, full_check=True)
    return opened


def head_programs(model: onnx.ModelProto) -> dict[str, bytes]:
    """What trains the last layer alone: `layout` and `train` as build_programs makes them, and `initial`, its values as float32.

    All earlier parameters become constants, so they are neither in the layout nor differentiated.

    Raises:
        LocalError: the model cannot be trained.
    """
    kept = set(last_layer(model))
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    constants = [tensor for tensor in frozen.graph.initializer if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept]
    rest = [tensor for tensor in frozen.graph.initializer if tensor.data_type != TensorProto.FLOAT or tensor.name in kept]
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in constants]
    names = {tensor.name for tensor in constants}
    inputs = [value for value in frozen.graph.input if value.name not in names]
    for field, values in (("initializer", rest), ("node", [*nodes, *frozen.graph.node]), ("input", inputs)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        frozen.graph.ClearField(field)
        getattr(frozen.graph, field).extend(copies)
    programs = build_programs(frozen)
    return {name: programs[name] for name in ("layout", "train")} | {"initial": initial_vector(frozen).astype("<f4").tobytes()}


def with_head(file: Path) -> tuple[bytes, dict[str, bytes]]:
    """(the model of a file with its last layer open, its head_programs).

    Raises:
        LocalError: it cannot be read, or has no last layer that can be trained.
    """
    model = read_model(file)
    return open_head(model).SerializeToString(), head_programs(model)
