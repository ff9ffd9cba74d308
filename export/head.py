"""The last layer of an inference model as something that a device may train for itself, and override when it runs the model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
from onnx import TensorProto, helper

from export.forward import read_forward
from export.programs import build_programs, initial_vector
from export.task import read_model
from regrow.errors import LocalError
from regrow.task import DEFAULT_TRAINING, Training


def open_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model whose last layer's initializers are also inputs: onnxruntime then lets a feed override them.

    Raises:
        LocalError: the model cannot be trained.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    there = {value.name for value in opened.graph.input}
    opened.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in read_forward(model, 1).parameters.items()
        if name not in there
    )
    onnx.checker.check_model(opened, full_check=True)
    return opened


def head_programs(model: onnx.ModelProto, training: Training = DEFAULT_TRAINING) -> dict[str, bytes]:
    """What trains the last layer alone, by this step: `layout` and `train` as build_programs makes them, and `initial`, float32 values.

    What is before that layer, running means and variances included, is as it is in the model.

    Raises:
        LocalError: the model cannot be trained, or has batch normalisation behind its last layer.
    """
    programs = build_programs(model, training=msgspec.structs.replace(training, train_last=1))
    if "statistics" in programs:
        raise LocalError(
            "the model has batch normalisation behind its last layer: its running means and variances would no longer be those of a layer "
            "that a device trains for itself; promote it without --local-head"
        )
    return {name: programs[name] for name in ("layout", "train")} | {"initial": initial_vector(model, 1).astype("<f4").tobytes()}


def with_head(file: Path, training: Training) -> tuple[bytes, dict[str, bytes]]:
    """(the model of a file with its last layer open, its head_programs).

    Raises:
        LocalError: it cannot be read, or has no last layer that can be trained.
    """
    model = read_model(file)
    return open_head(model).SerializeToString(), head_programs(model, training)
