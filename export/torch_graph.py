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

from export.forward import known_tokens, read_forward
from export.programs import OUTPUT
from export.torch_host_ops import HOST_OPS
from export.torch_ops import OPS as PLAIN_OPS
from export.torch_ops import SEVERAL_OUTPUTS as PLAIN_SEVERAL
from export.torch_ops import UnsupportedError, batch_statistics
from export.torch_recurrent import RECURRENT_OPS
from regrow.errors import LocalError
from regrow.examples import Examples
from regrow.local_step import METADATA, Step

OPS = {**PLAIN_OPS, **RECURRENT_OPS}
SEVERAL_OUTPUTS = PLAIN_SEVERAL | RECURRENT_OPS.keys()
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
        examples: what it takes.
        step: what a training step does with its output.
        statistics: channels of each running mean and variance.
    """

    parameters: Mapping[str, tuple[int, ...]]
    examples: Examples
    step: Step
    _steps: tuple[_Step, ...]
    _integers: Mapping[str, NDArray[np.int64]]
    _tensors: Mapping[str, NDArray[Any]]
    _logits: str
    statistics: Mapping[str, int] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.examples.x_shape

    def forward(
        self,
        parameters: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        statistics: Mapping[str, torch.Tensor] | None = None,
        found: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The model's output, [batch, ...].

        Without control flow on values and without writing in place, so torch.func.vmap and autograd go through it.

        Args:
            parameters: a tensor of `self.parameters` each, on one device and of one floating dtype, that of x unless x is tokens.
            x: [batch, *examples.x_shape].
            statistics: of `self.statistics`, for inference; None: batch normalisations use those of x, as in training.
            found: gets mean and unbiased variance of what each batch normalisation was given.

        Raises:
            LocalError: a node asks for something that torch_ops does not have; names op and node.
        """
        values: dict[str, Any] = {"": None, "x": x, **parameters, **self._integers}
        values |= {f"stat:{name}": None if statistics is None else statistics[name] for name in self.statistics}
        dtype = next(iter(parameters.values())).dtype
        for name, array in self._tensors.items():
            values[name] = torch.as_tensor(array, dtype=dtype if array.dtype.kind == "f" else None, device=x.device)
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
            # Of an op with several outputs a model may leave some out, at the end or without a name.
            values.update(zip(step.outputs, result if step.op in SEVERAL_OUTPUTS else [result], strict=False))
            values[""] = None
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
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    step = Step.from_metadata(metadata.get(METADATA))
    output = metadata.get(OUTPUT) or _classified(graph)
    classes = metadata.get("regrow.classes", "0")
    if output not in makers or "x" not in inputs or not classes.isdecimal() or step.classifies != bool(int(classes)):
        raise LocalError("this is not an evaluation program of regrow; build the task again with `regrow task build`")
    statistics = {name.removeprefix("stat:"): _shape(tensor)[0] for name, tensor in inputs.items() if name.startswith("stat:")}
    parameters = {name: _shape(tensor) for name, tensor in inputs.items() if name not in ("x", "y") and not name.startswith("stat:")}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    x_dtype = "int64" if inputs["x"].elem_type == onnx.TensorProto.INT64 else "float32"
    y_dtype = None if "y" not in inputs else "int64" if step.classifies else "float32"
    y_shape = _shape(inputs["y"])[1:] if "y" in inputs else ()
    examples = Examples(
        x_dtype,
        _shape(inputs["x"])[1:],
        y_dtype,
        y_shape,
        int(classes),
        known_tokens(graph, "x", {name: shape[:1] for name, shape in parameters.items()}),
    )
    return _graph(graph.node, output, parameters, constants, examples, step, statistics)


def _classified(graph: onnx.GraphProto) -> str:
    """The logits, or "": `correct` counts where the largest logit is the label's, so they lie behind that ArgMax."""
    makers = {output: node for node in graph.node for output in node.output}
    found = [makers[name] for node in graph.node if node.op_type == "Equal" and "y" in node.input for name in node.input if name in makers]
    return found[0].input[0] if len(found) == 1 and found[0].op_type == "ArgMax" else ""


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def graph_of_model(model: onnx.ModelProto) -> TorchGraph:
    """The graph of a forward model, its weights left out; parameters keep the names of their initializers.

    Raises:
        LocalError: as export.forward.read_forward, or an op is not known to torch_ops.
    """
    forward = read_forward(model)
    parameters = {name: array.shape for name, array in forward.parameters.items()}
    shape = tuple(size or 0 for size in forward.input_shape[1:])
    statistics = {name: len(array) for name, array in forward.statistics.items()}
    examples = Examples("float32" if forward.input_type == onnx.TensorProto.FLOAT else "int64", shape, classes=forward.classes)
    return _graph(forward.program_nodes, forward.logits, parameters, forward.constants, examples, Step(), statistics)


def _graph(
    nodes: Any,
    logits: str,
    parameters: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, NDArray[Any]],
    examples: Examples,
    step: Step,
    statistics: Mapping[str, int],
) -> TorchGraph:
    """Only the nodes that the output needs."""
    needed, steps = {logits}, []
    for node in reversed(nodes):
        wanted = needed.intersection(node.output)
        if not wanted:
            continue
        made = _step(node)
        if made.op not in OPS and made.op not in HOST_OPS:
            raise _unknown(made)
        if made.op not in SEVERAL_OUTPUTS and wanted != {made.outputs[0]}:
            raise LocalError(f"node {made.name!r}: torch runs {made.op} for its first output only; use the trainer onnxruntime")
        needed.update(made.inputs)
        steps.append(made)
    constants = {name: array for name, array in constants.items() if name in needed}
    integers = {name: array.astype(np.int64) for name, array in constants.items() if array.dtype.kind in "iu"}
    # Copied: those that protobuf gives are read-only, which torch does not have.
    tensors = {name: array.copy() for name, array in constants.items() if array.dtype.kind in "fb"}
    return TorchGraph(parameters, examples, step, tuple(reversed(steps)), integers, tensors, logits, statistics)


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
