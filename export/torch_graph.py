"""The forward part of a program, or a forward model, as a torch function. Importing this module imports torch.

The graph is interpreted node by node, so a task's programs are all that a trainer on torch needs: no model class, no code of the task's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from numpy.typing import NDArray
from onnx import numpy_helper

from export.forward import read_forward
from export.torch_ops import HOST_OPS, UnsupportedError, batch_statistics
from export.torch_ops import OPS as PLAIN_OPS
from export.torch_recurrent import RECURRENT_OPS
from regrow.errors import LocalError

OPS = {**PLAIN_OPS, **RECURRENT_OPS}
SEVERAL_OUTPUTS = frozenset(RECURRENT_OPS)
"""Ops of which the function gives every output, in a tuple; the others have one output, or only their first one here."""


@dataclass(frozen=True)
class _Step:
    """One node, read once; `name` is for messages."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class TorchGraph:
    """A forward graph, ready to run on torch.

    Attributes:
        parameters: name -> shape, in the graph's order.
        statistics: channels of each running mean and variance.
        input_shape: of one example.
        classes: of the logits.
    """

    parameters: Mapping[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    classes: int
    _steps: tuple[_Step, ...]
    _integers: Mapping[str, NDArray[np.int64]]
    _reals: Mapping[str, NDArray[Any]]
    _logits: str
    statistics: Mapping[str, int] = field(default_factory=dict)

    def forward(
        self,
        parameters: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        statistics: Mapping[str, torch.Tensor] | None = None,
        found: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The logits, [batch, classes].

        Without control flow on values and without writing in place, so torch.func.vmap and autograd go through it.

        Args:
            parameters: a tensor of `self.parameters` each, on one device and of one floating dtype with x.
            x: [batch, *input_shape].
            statistics: of `self.statistics`, for inference; None: batch normalisations use those of x, as in training.
            found: gets mean and unbiased variance of what each batch normalisation was given.

        Raises:
            LocalError: a node asks for something that torch_ops does not have; names op and node.
        """
        values: dict[str, Any] = {"": None, "x": x, **parameters, **self._integers}
        values |= {f"stat:{name}": None if statistics is None else statistics[name] for name in self.statistics}
        for name, array in self._reals.items():
            values[name] = torch.as_tensor(array, dtype=x.dtype, device=x.device)
        for step in self._steps:
            inputs = [values[name] for name in step.inputs]
            if step.op == "BatchNormalization" and found is not None:
                found |= zip((name.removeprefix("stat:") for name in step.inputs[3:5]), batch_statistics(inputs[0]), strict=True)
            on_host = all(isinstance(value, np.ndarray) for value in inputs) and bool(inputs)
            op = (HOST_OPS if on_host else OPS).get(step.op)
            if op is None:
                raise _unknown(step)
            try:
                result = op(inputs, step.attributes)
                result = np.asarray(result) if isinstance(result, np.generic) else result  # NumPy gives scalars for arrays without axes
            except UnsupportedError as error:
                raise LocalError(f"node {step.name!r}: torch runs {step.op}, but not with {error}; use the trainer onnxruntime") from error
            values.update(zip(step.outputs, result if step.op in SEVERAL_OUTPUTS else [result], strict=False))
            values[""] = None  # an output that the model leaves out has no name either
        logits: torch.Tensor = values[self._logits]
        return logits


def graph_of_program(program: bytes) -> TorchGraph:
    """The forward graph inside an `evaluate` program.

    Raises:
        LocalError: it is no such program, or has an op that torch_ops does not know; names op and node.
    """
    try:
        model = onnx.load_model_from_string(program)
    except DecodeError as error:
        raise LocalError(f"the evaluation program is not ONNX: {error}") from error
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    makers = {output: node for node in graph.node for output in node.output}
    # `correct` counts where the largest logit is the label's: behind that ArgMax lie the logits.
    found = [makers[name] for node in graph.node if node.op_type == "Equal" and "y" in node.input for name in node.input if name in makers]
    inputs = {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.input}
    classes = metadata.get("regrow.classes", "")
    if len(found) != 1 or found[0].op_type != "ArgMax" or not {"x", "y"} <= inputs.keys() or not classes.isdecimal():
        raise LocalError("this is not an evaluation program of regrow; build the task again with `regrow task build`")
    statistics = {name.removeprefix("stat:"): shape[0] for name, shape in inputs.items() if name.startswith("stat:")}
    parameters = {name: shape for name, shape in inputs.items() if name not in ("x", "y") and not name.startswith("stat:")}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return _graph(graph.node, found[0].input[0], parameters, constants, inputs["x"][1:], int(classes), statistics)


def graph_of_model(model: onnx.ModelProto) -> TorchGraph:
    """The graph of a forward model, its weights left out; parameters keep the names of their initializers.

    Raises:
        LocalError: as export.forward.read_forward, or an op is not known to torch_ops.
    """
    forward = read_forward(model)
    parameters = {name: array.shape for name, array in forward.parameters.items()}
    shape = tuple(size or 0 for size in forward.input_shape[1:])
    statistics = {name: len(array) for name, array in forward.statistics.items()}
    return _graph(forward.nodes, forward.logits, parameters, forward.constants, shape, forward.classes, statistics)


def _graph(
    nodes: Any,
    logits: str,
    parameters: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, NDArray[Any]],
    input_shape: tuple[int, ...],
    classes: int,
    statistics: Mapping[str, int],
) -> TorchGraph:
    """Only the nodes that the logits need."""
    needed, steps = {logits}, []
    for node in reversed(nodes):
        wanted = needed.intersection(node.output)
        if not wanted:
            continue
        step = _step(node)
        if step.op not in OPS and step.op not in HOST_OPS:
            raise _unknown(step)
        if step.op not in SEVERAL_OUTPUTS and wanted != {step.outputs[0]}:
            raise LocalError(f"node {step.name!r}: torch runs {step.op} for its first output only; use the trainer onnxruntime")
        needed.update(step.inputs)
        steps.append(step)
    constants = {name: array for name, array in constants.items() if name in needed}
    integers = {name: array.astype(np.int64) for name, array in constants.items() if array.dtype.kind in "iu"}
    # Copied: those that protobuf gives are read-only, which torch does not have.
    reals = {name: array.copy() for name, array in constants.items() if array.dtype.kind == "f"}
    return TorchGraph(parameters, input_shape, classes, tuple(reversed(steps)), integers, reals, logits, statistics)


def _step(node: onnx.NodeProto) -> _Step:
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    decoded = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    name = node.name or node.output[0].removeprefix("forward:")
    outputs = tuple(node.output) if node.op_type in SEVERAL_OUTPUTS else (node.output[0],)
    return _Step(node.op_type, name, tuple(node.input), outputs, decoded)


def _unknown(step: _Step) -> LocalError:
    return LocalError(
        f"node {step.name!r}: torch does not run {step.op} here; use the trainer onnxruntime, or add it to export/torch_ops.py"
    )
