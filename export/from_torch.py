"""A torch module as the forward model that training programs are made from. torch and onnxscript are imported when it is called.

What torch.onnx.export and the optimizer behind it do for inference would spoil a model for training: they fold BatchNormalization into
the convolution before it, compute constants out of weights, and store equal weights once. So the weights are made inputs of the graph
while it is tidied, where nothing of that can happen to them, and initializers again afterwards.
"""

from __future__ import annotations

import copy
import io
import logging
import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from export.emitter import IR_VERSION
from export.lowering import OPSET_VERSION
from regrow.errors import LocalError, UsageError

if TYPE_CHECKING:
    import torch

REALS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def from_torch(module: torch.nn.Module, example_input: torch.Tensor) -> onnx.ModelProto:
    """The forward model of a module, in the form that export.forward reads, with a dynamic batch.

    Parameters have torch's names and order; a tensor that two modules share has the first of its names. What does not require a gradient
    becomes a constant and is not trained, buffers too, but for the running statistics of BatchNormalization. Dropout is left out.

    Args:
        module: float32; one tensor in, one out. Not modified.
        example_input: [batch, ...], float32 or int64, batch >= 1; only its dtype and the shape of one example matter.

    Raises:
        LocalError: torch cannot export the module, or not with a dynamic batch (the message is torch's); torch or onnxscript is missing.
    """
    torch = _torch()
    # Sizes 0 and 1 would be taken for fixed.
    example = torch.cat([example_input[:1]] * 2)
    model = _exported(copy.deepcopy(module).eval(), example)
    weights = _take_reals(model)
    model.graph.input.extend(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in weights.items())
    _tidy(model)
    constants = _take_reals(model)
    _put_back(model, weights, constants, dict(module.named_parameters(remove_duplicate=False)))
    for name, tensor in constants.items():
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], name=name, value=tensor))
    onnx.checker.check_model(model, full_check=True)
    return model


def from_torch_file(source: str) -> onnx.ModelProto:
    """The forward model of "FILE.py:FUNCTION": the function takes nothing and returns (module, example input). Runs the file.

    Raises:
        LocalError: no such file or function, it returns something else, or as from_torch.
    """
    file, _, function = source.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"no file {file!r}: say FILE.py:FUNCTION, where the function returns (module, example input)")
    torch = _torch()
    try:
        factory = runpy.run_path(file).get(function)
        made = factory() if callable(factory) else None
    except Exception as error:  # the user's own code may raise anything
        raise LocalError(f"{source} raised {type(error).__name__}: {error}; it must take nothing and return (module, example)") from error
    if not callable(factory):
        raise UsageError(f"{file} defines no function {function!r} that returns (module, example input)")
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module) and isinstance(made[1], torch.Tensor)):
        kinds = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise LocalError(f"{source} returned ({kinds}); return a torch.nn.Module and one tensor [batch, ...], as a pair")
    try:
        return from_torch(*made)
    except LocalError as error:
        raise LocalError(f"{source}: {error}") from error


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it
        import torch
    except ModuleNotFoundError as error:
        raise LocalError(f"a torch module needs {error.name} to be read: pip install 'regrow[torch]'") from error
    return torch


def _exported(module: torch.nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    torch = _torch()
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=OPSET_VERSION,
                input_names=["x"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        _run_once(module, example)
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise LocalError(f"torch cannot export {type(module).__name__} with a dynamic batch: {cause}") from error
    if program is None:
        raise LocalError(f"torch exported nothing of {type(module).__name__}")
    model: onnx.ModelProto = program.model_proto
    return model


def _run_once(module: torch.nn.Module, example: torch.Tensor) -> None:
    """Return if the module runs on the example at all: then the exporter's own words say what is wrong.

    Raises:
        LocalError: it does not; torch says best why.
    """
    try:
        with _torch().no_grad():
            module(example)
    except Exception as error:  # the user's own code may raise anything
        shape = ", ".join(["batch", *map(str, example.shape[1:])])
        said = str(error).strip().rpartition("\n")[2]
        cure = "return an example input of the shape and dtype that the module takes"
        raise LocalError(
            f"{type(module).__name__} does not run on its example [{shape}] of {str(example.dtype).removeprefix('torch.')}: {said}; {cure}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own working, unless somebody wants logs; what fails is raised, and stays."""
    if logging.getLogger().isEnabledFor(logging.INFO):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs the tracebacks of what it then raises
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _take_reals(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Take the real initializers out of the model."""
    reals = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in REALS}
    others = [tensor for tensor in model.graph.initializer if tensor.name not in reals]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
    return reals


def _put_back(
    model: onnx.ModelProto, weights: dict[str, TensorProto], constants: dict[str, TensorProto], parameters: dict[str, torch.nn.Parameter]
) -> None:
    """Make what is trained, and running statistics, initializers under torch's names; what else is used joins the constants."""
    first = {id(tensor): name for name, tensor in reversed(parameters.items())}
    names = {name: first[id(parameters[name])] for name in weights if name in parameters}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    used = {name for node in model.graph.node for name in node.input}
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    named = {names.get(name, name): tensor for name, tensor in weights.items()}
    order = [name for name in parameters if name in named] + [name for name in named if name not in parameters]
    for name in order:
        tensor = named[name]
        tensor.name = name
        if name in statistics or (name in parameters and parameters[name].requires_grad and name in used):
            model.graph.initializer.append(tensor)
        elif name in used:
            constants[name] = tensor


def _tidy(model: onnx.ModelProto) -> None:
    """Inline functions, compute what is constant, drop what is unused, and leave one input; all in place."""
    from onnxscript import optimizer

    with _quiet():
        model.CopyFrom(optimizer.optimize(model))
    del model.graph.input[1:]
    model.ir_version = IR_VERSION
    # Stack traces with the paths of the machine that exported it.
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
