"""A forward model becomes the four programs that devices run: layout, train, train_masked, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.batch_norm import checked_statistics, emit_statistics, statistics_inputs, with_batch_statistics
from export.depthwise import with_depthwise_products
from export.emitter import Emitter
from export.forward import Forward, as_inference, read_forward
from export.gradients import differentiate
from export.losses import check_step, emit_loss, emit_score
from export.optimizers import Slots, emit_bare_sgd, emit_optimizer, slots_of
from export.recurrent_rules import recurrent_biases
from export.rules import CURES, RULES
from export.turned import with_turned_products
from export.ways import DEFAULT, Ways
from regrow.errors import LocalError
from regrow.local_step import Step, step_of
from regrow.parameters import Layout, Tensor
from regrow.programs import variant
from regrow.task import DEFAULT_TRAINING, Training
from regrow.units import Units

BATCH = "batch"


OUTPUT = "regrow.output"
"""The property of an evaluation program that names the model's output, where `correct` does not tell it."""


def build_programs(
    model: onnx.ModelProto,
    units: Units | None = None,
    training: Training = DEFAULT_TRAINING,
    others: Mapping[str, Ways] = MappingProxyType({}),
) -> dict[str, bytes]:
    """The programs of one model, by name; with `units` only tensors that no unit is part of are always kept.

    All are plain ai.onnx graphs with a dynamic batch. `train` is one step of `training`, by default SGD on the sample-weighted mean
    cross-entropy; in `train_masked` prunable parameters move where their mask is 1 only.

        train          x, y, sample_weight, learning_rate, <parameter>..., state:..., anchor:... -> loss, new:<parameter>..., new:state:...
        train_masked   the same and mask:<parameter>... (float32, 0 or 1) for the prunable ones
        evaluate       x, y, <parameter>..., stat:<statistic>... -> loss_sum (float32), and correct (int64) or squared_error (float32)
        statistics     x, <parameter>... -> stat:<statistic>... of this batch; only for models with BatchNormalization
        layout         JSON, regrow.parameters.Layout

    x is float32 or int64 [batch, ...]; y int64 [batch] in [0, classes) for cross_entropy, otherwise float32 of the output's shape, and
    not there where the target is the input; sample_weight float32 [batch] with a positive sum, learning_rate float32 []. The optimizer's
    state is in state:<slot>:<parameter> and state:step, zero in a round's first step; anchor:<parameter> is the parameter as the round
    began. Each graph's metadata has `regrow.classes` with cross_entropy, and the step where it is not the default (regrow.local_step).

    Args:
        training: of which the step and train_last say what is built.
        others: further ways, by name, to write the training programs in: `train~NAME` and `train_masked~NAME`, where they are other
            programs.

    Raises:
        LocalError: the model is not of the form that forward.read_forward describes, the step does not fit it, or some op cannot be
            trained.
    """
    step, forward = step_of(training), read_forward(model, training.train_last)
    check_step(step, forward)
    layout = layout_of(forward, units)
    statistical = with_batch_statistics(forward)
    masks = {"train": False, "train_masked": True}
    programs = {"layout": layout.to_json(), "evaluate": _evaluation_program(forward, step)}
    for way, ways in {"": DEFAULT, **others}.items():
        trained = with_turned_products(with_depthwise_products(statistical, ways.product_pairs))
        for name, masked in masks.items():
            program = _training_program(trained, layout, step, masked=masked, ways=ways)
            if not way or program not in programs.values():
                programs[variant(name, way) if way else name] = program
    return programs | ({"statistics": _statistics_program(statistical, step)} if forward.statistics else {})


def layout_of(forward: Forward, units: Units | None = None) -> Layout:
    """Where each parameter lies in the flat vector; vectors and scalars (biases, norms) are always kept, unless units own them."""
    tensors, biases = [], recurrent_biases(forward)
    for number, (name, array) in enumerate(forward.parameters.items()):
        leaves = units is not None and any(axis.group is not None for axis in units.axes[number])
        tensors.append(Tensor(name, array.shape, always_kept=(array.ndim < 2 or name in biases) and not leaves))
    return Layout(tuple(tensors))


def initial_vector(model: onnx.ModelProto, train_last: int | None = None) -> NDArray[np.float32]:
    """float32 [n]: the weights that the model came with, flat; of its last layers only, where only those are trained.

    Raises:
        LocalError: as build_programs, or a weight is not finite.
    """
    forward = read_forward(model, train_last)
    for name, array in forward.parameters.items():
        if not np.isfinite(array).all():
            raise LocalError(f"parameter {name!r} of the model has values that are not finite; export it from a sound checkpoint")
    return layout_of(forward).flatten(forward.parameters)


def with_weights(
    model: onnx.ModelProto,
    vector: NDArray[np.float32],
    train_last: int | None = None,
    *,
    statistics: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """The forward model for inference with the weights of `vector`, checked; everything else is as it was.

    Args:
        model: not modified.
        vector: float32 [n] in the layout of this model, trained with this train_last.
        statistics: running means and variances by initializer, as Trainer.statistics has them; None: those of the model stay.

    Raises:
        LocalError: the vector or the statistics do not fit the model.
    """
    forward = read_forward(model, train_last)
    values = layout_of(forward).unflatten(vector) | checked_statistics(forward, statistics or {})
    trained = onnx.ModelProto()
    trained.CopyFrom(model)
    for tensor in trained.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    for node in trained.graph.node:
        if node.op_type == "BatchNormalization":
            as_inference(node)
    onnx.checker.check_model(trained, full_check=True)
    return trained


def _emitter(forward: Forward, ways: Ways = DEFAULT) -> Emitter:
    nodes = []
    for node in forward.program_nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    return Emitter(nodes, dict(forward.constants), forward.shapes, ways)


def _training_program(forward: Forward, layout: Layout, step: Step, *, masked: bool, ways: Ways = DEFAULT) -> bytes:
    graph = _emitter(forward, ways)
    seed = emit_loss(graph, forward, step, bare=step.is_bare_sgd)
    gradients = differentiate(graph, RULES, list(forward.parameters), forward.logits, seed, CURES)
    prunable = [tensor for tensor in layout.tensors if masked and not tensor.always_kept]
    masks = {tensor.name: f"mask:{tensor.name}" for tensor in prunable}
    slots = Slots((), ())
    if step.is_bare_sgd:
        emit_bare_sgd(graph, gradients, masks)
    else:
        slots = slots_of(step, layout)
        emit_optimizer(graph, step, gradients, masks)
    extra = [
        helper.make_tensor_value_info("sample_weight", TensorProto.FLOAT, [BATCH]),
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, []),
    ]
    mask_inputs = [helper.make_tensor_value_info(masks[tensor.name], TensorProto.FLOAT, tensor.shape) for tensor in prunable]
    inputs = _data_inputs(forward, step) + extra + _parameter_inputs(forward) + list(slots.inputs) + mask_inputs
    outputs = [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])]
    outputs += [helper.make_tensor_value_info(f"new:{t.name}", TensorProto.FLOAT, t.shape) for t in layout.tensors]
    return graph.program(inputs, outputs + list(slots.outputs), _metadata(forward, step))


def _evaluation_program(forward: Forward, step: Step) -> bytes:
    graph = _emitter(forward)
    other = emit_score(graph, forward, step)
    outputs = [
        helper.make_tensor_value_info("loss_sum", TensorProto.FLOAT, []),
        helper.make_tensor_value_info(other, TensorProto.INT64 if step.counts_hits else TensorProto.FLOAT, []),
    ]
    named = {} if step.classifies else {OUTPUT: forward.logits}
    inputs = _data_inputs(forward, step) + _parameter_inputs(forward) + statistics_inputs(forward)
    return graph.program(inputs, outputs, _metadata(forward, step) | named)


def _statistics_program(forward: Forward, step: Step) -> bytes:
    graph = _emitter(forward)
    outputs = emit_statistics(graph, forward)
    return graph.program(_data_inputs(forward, step)[:1] + _parameter_inputs(forward), outputs, _metadata(forward, step))


def _data_inputs(forward: Forward, step: Step) -> list[onnx.ValueInfoProto]:
    inputs = [helper.make_tensor_value_info("x", forward.input_type, [BATCH, *forward.input_shape[1:]])]
    if step.classifies:
        inputs.append(helper.make_tensor_value_info("y", TensorProto.INT64, [BATCH]))
    elif step.target == "y":
        inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, *forward.output_shape[1:]]))
    return inputs


def _parameter_inputs(forward: Forward) -> list[onnx.ValueInfoProto]:
    parameters = forward.parameters.items()
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in parameters]


def _metadata(forward: Forward, step: Step) -> dict[str, str]:
    return ({"regrow.classes": str(forward.classes)} if step.classifies else {}) | step.metadata()
