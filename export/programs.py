"""A forward model becomes the four programs that devices run: layout, train, train_masked, evaluate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.emitter import Emitter
from export.forward import Forward, read_forward
from export.gradients import Product, differentiate, materialise
from export.rules import RULES
from regrow.errors import LocalError
from regrow.parameters import Layout, Tensor
from regrow.units import Units

BATCH = "batch"


def build_programs(model: onnx.ModelProto, units: Units | None = None) -> dict[str, bytes]:
    """The programs of one model, by name; with `units` only tensors that no unit is part of are always kept.

    All are plain ai.onnx graphs with a dynamic batch. `train` is one step of SGD on the sample-weighted mean cross-entropy;
    `train_masked` is the same with W' = W - learning_rate * mask * gradient for every prunable parameter.

        train          x, y, sample_weight, learning_rate, <parameter>... -> loss, new:<parameter>...
        train_masked   the same and mask:<parameter>... (float32, 0 or 1) for the prunable ones
        evaluate       x, y, <parameter>... -> loss_sum (float32), correct (int64)
        layout         JSON, regrow.parameters.Layout

    x is float32 [batch, ...], y int64 [batch] in [0, classes), sample_weight float32 [batch] with a positive sum,
    learning_rate float32 []. The number of classes is in the metadata of each graph, `regrow.classes`.

    Raises:
        LocalError: the model is not of the form that forward.read_forward describes, or some op cannot be trained.
    """
    forward = read_forward(model)
    layout = layout_of(forward, units)
    return {
        "layout": layout.to_json(),
        "train": _training_program(forward, layout, masked=False),
        "train_masked": _training_program(forward, layout, masked=True),
        "evaluate": _evaluation_program(forward),
    }


def layout_of(forward: Forward, units: Units | None = None) -> Layout:
    """Where each parameter lies in the flat vector; vectors and scalars (biases, norms) are always kept, unless units own them."""
    tensors = []
    for number, (name, array) in enumerate(forward.parameters.items()):
        leaves = units is not None and any(axis.group is not None for axis in units.axes[number])
        tensors.append(Tensor(name, array.shape, always_kept=array.ndim < 2 and not leaves))
    return Layout(tuple(tensors))


def initial_vector(model: onnx.ModelProto) -> NDArray[np.float32]:
    """float32 [n]: the weights that the model came with, flat.

    Raises:
        LocalError: as build_programs, or a weight is not finite.
    """
    forward = read_forward(model)
    for name, array in forward.parameters.items():
        if not np.isfinite(array).all():
            raise LocalError(f"parameter {name!r} of the model has values that are not finite; export it from a sound checkpoint")
    return layout_of(forward).flatten(forward.parameters)


def with_weights(model: onnx.ModelProto, vector: NDArray[np.float32]) -> onnx.ModelProto:
    """The forward model with the weights of `vector`, checked; everything else is as it was.

    Args:
        model: not modified.
        vector: float32 [n] in the layout of this model.

    Raises:
        LocalError: the vector does not fit the model.
    """
    values = layout_of(read_forward(model)).unflatten(vector)
    trained = onnx.ModelProto()
    trained.CopyFrom(model)
    for tensor in trained.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    onnx.checker.check_model(trained, full_check=True)
    return trained


def write_model(model: onnx.ModelProto, vector: NDArray[np.float32], path: Path) -> None:
    """Write what with_weights makes.

    Raises:
        LocalError: the vector does not fit the model.
    """
    onnx.save_model(with_weights(model, vector), path)


def _emitter(forward: Forward) -> Emitter:
    nodes = []
    for node in forward.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    return Emitter(nodes, dict(forward.constants), forward.shapes)


def _training_program(forward: Forward, layout: Layout, *, masked: bool) -> bytes:
    graph = _emitter(forward)
    seed = _loss_and_seed(graph, forward)
    updates = differentiate(graph, RULES, list(forward.parameters), forward.logits, seed)
    masks: list[onnx.ValueInfoProto] = []
    for tensor in layout.tensors:
        update, new = updates[tensor.name], f"new:{tensor.name}"
        if masked and not tensor.always_kept:
            mask = f"mask:{tensor.name}"
            masks.append(helper.make_tensor_value_info(mask, TensorProto.FLOAT, tensor.shape))
            update = graph.emit("Mul", materialise(graph, update), mask)
        if isinstance(update, Product):
            # onnxruntime may write the sum in place of its operand; an input of the program it leaves alone.
            materialise(graph, update, plus=tensor.name, output=new)
        else:
            graph.emit("Add", tensor.name, update, output=new)
    extra = [
        helper.make_tensor_value_info("sample_weight", TensorProto.FLOAT, [BATCH]),
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, []),
    ]
    outputs = [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])]
    outputs += [helper.make_tensor_value_info(f"new:{t.name}", TensorProto.FLOAT, t.shape) for t in layout.tensors]
    return graph.program(_data_inputs(forward) + extra + _parameter_inputs(forward) + masks, outputs, _metadata(forward))


def _loss_and_seed(graph: Emitter, forward: Forward) -> str:
    """Emit `loss`, the sample-weighted mean cross-entropy, and return the name of -learning_rate times its gradient by the logits.

    Backward is linear, so scaling this small tensor makes every gradient an update and saves one multiplication per parameter.
    """
    scores = graph.emit("LogSoftmax", forward.logits, axis=1)
    columns = graph.integers(1)
    target = graph.emit("OneHot", "y", graph.integers(forward.classes), graph.constant([0, 1], np.float32), axis=1)
    share = graph.emit("Div", "sample_weight", graph.emit("ReduceSum", "sample_weight", keepdims=1))
    share = graph.emit("Unsqueeze", share, columns)
    surprise = graph.emit("Mul", graph.emit("Mul", scores, target), share)
    graph.emit("Neg", graph.emit("ReduceSum", surprise, keepdims=0), output="loss")
    excess = graph.emit("Sub", target, graph.emit("Exp", scores))
    return graph.emit("Mul", excess, graph.emit("Mul", share, "learning_rate"))


def _evaluation_program(forward: Forward) -> bytes:
    graph = _emitter(forward)
    scores = graph.emit("LogSoftmax", forward.logits, axis=1)
    picked = graph.emit("GatherElements", scores, graph.emit("Unsqueeze", "y", graph.integers(1)), axis=1)
    graph.emit("Neg", graph.emit("ReduceSum", picked, keepdims=0), output="loss_sum")
    hits = graph.emit("Equal", graph.emit("ArgMax", forward.logits, axis=1, keepdims=0), "y")
    graph.emit("ReduceSum", graph.emit("Cast", hits, to=TensorProto.INT64), keepdims=0, output="correct")
    outputs = [
        helper.make_tensor_value_info("loss_sum", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("correct", TensorProto.INT64, []),
    ]
    return graph.program(_data_inputs(forward) + _parameter_inputs(forward), outputs, _metadata(forward))


def _data_inputs(forward: Forward) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, *forward.input_shape[1:]]),
        helper.make_tensor_value_info("y", TensorProto.INT64, [BATCH]),
    ]


def _parameter_inputs(forward: Forward) -> list[onnx.ValueInfoProto]:
    parameters = forward.parameters.items()
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in parameters]


def _metadata(forward: Forward) -> dict[str, str]:
    return {"regrow.classes": str(forward.classes)}
