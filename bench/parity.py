"""Gradients of the training programs against torch in float64, step by step from torch's own weights.

Trajectories say little: where one activation lies so close to 0 that float32 and float64 take it for different signs, ReLU has another
slope, and the gradients of two sound programs differ by a thousandth. So torch follows the program's decisions (signs at every ReLU, ranges
at every clipping, places in every max-pool): where one differs, torch goes on with the program's number, and by how much that moved it is
reported. It is a rounding error, or the program is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch.overrides import TorchFunctionMode

from export.from_torch import from_torch
from export.programs import build_programs
from export.zoo import Model, Variant
from regrow.task import Training

RATE = 2.0**30
"""A step so large that the update is nearly all of the new value, which then shows the gradient without cancellation."""
TEACHER_RATE = 0.05
NOISE = 0.2
NOTHING = 1e-12
"""A gradient below this part of the whole one is zero but for rounding: a bias before batch normalisation."""

_THRESHOLDS = {"relu": (0.0,), "hardtanh": (), "hardswish": (-3.0, 3.0), "hardsigmoid": (-3.0, 3.0), "max_pool1d": (), "max_pool2d": ()}
"""By torch function, where its slope changes; hardtanh says it itself, a pool compares its inputs."""
_DECIDING_OPS = ("Relu", "Clip", "HardSwish", "HardSigmoid", "MaxPool")


@dataclass(frozen=True)
class Comparison:
    """What came out over all steps.

    Attributes:
        worst: largest error of one parameter's gradient in one step, by norm and relative to the gradient's; for a gradient that is zero,
            relative to that of all parameters.
        where: that parameter.
        worst_of_torch: the same for torch in float32, which tells how much of it is float32's and not ours.
        worst_loss: largest relative error of the loss.
        otherwise: decisions on which float32 and float64 differed, over all steps.
        moved: by how much torch was moved for the sake of one, at most, relative to the root mean square of the layer's numbers.
    """

    parameters: int
    steps: int
    worst: float
    where: str
    worst_of_torch: float
    worst_loss: float
    otherwise: int
    moved: float


def training_of(model: Model) -> Training:
    """The step that a model of the zoo is trained with."""
    return Training(loss="mse", target="input") if model.loss == "mse" else Training()


def compare(model: Model, variant: Variant, *, batch: int, steps: int, seed: int = 0) -> Comparison:
    """Train the module in float64 with plain SGD, and hold the program's gradients at each of its weights against its own.

    Args:
        batch: examples of one step; standard normal numbers with random labels.
    """
    module = _stirred(model.module(variant, seed), seed)
    program = build_programs(from_torch(module, torch.zeros(1, *variant.shape)), training=training_of(model))["train"]
    teacher = copy.deepcopy(module).double().train()
    contest = _Contest(Watched(program), teacher)
    draws = _draws(model, variant, batch, np.random.default_rng(seed))
    found = []
    for _ in range(steps):
        found.append(contest.step(*next(draws)))
        contest.learn()
    worst, where = max((error, name) for step in found for name, error in step.errors.items())
    return Comparison(
        parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        steps=steps,
        worst=worst,
        where=where,
        worst_of_torch=max(step.error_of_torch for step in found),
        worst_loss=max(step.loss_error for step in found),
        otherwise=sum(step.otherwise for step in found),
        moved=max(step.moved for step in found),
    )


def _stirred(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module with noise on its vectors: scales of 1 and shifts of 0 would hide errors, and make some gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    return module


@dataclass(frozen=True)
class _Found:
    errors: dict[str, float]
    error_of_torch: float
    loss_error: float
    otherwise: int
    moved: float


class _Contest:
    """The teacher, whose weights are float64 numbers that float32 can hold, and the program that is asked about each of them."""

    def __init__(self, program: Watched, teacher: torch.nn.Module) -> None:
        self._program, self._teacher = program, teacher
        self._single = copy.deepcopy(teacher).float()

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64] | None) -> _Found:
        weights = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in self._teacher.named_parameters()}
        feed = {"x": x, "sample_weight": np.ones(len(x), np.float32), "learning_rate": np.array(RATE, np.float32), **weights}
        feed |= {} if y is None else {"y": y}
        outputs, followed = self._program.run(feed)
        self._teacher.zero_grad()
        with Follower(followed) as follower:
            loss = _loss(self._teacher(torch.tensor(x, dtype=torch.float64)), x, y)
        loss.backward()
        gradients = {name: (array.astype(np.float64) - outputs[f"new:{name}"]) / RATE for name, array in weights.items()}
        of_torch = max(self._errors(self._single_gradients(x, y, followed)).values())
        loss_error = abs(float(outputs["loss"]) - loss.item()) / abs(loss.item())
        return _Found(self._errors(gradients), of_torch, loss_error, follower.otherwise, follower.moved)

    def _single_gradients(
        self, x: NDArray[np.float32], y: NDArray[np.int64] | None, followed: list[NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float64]]:
        """Torch's in float32, with the program's decisions too."""
        self._single.load_state_dict(self._teacher.state_dict())
        self._single.zero_grad()
        with Follower(followed):
            loss = _loss(self._single(torch.tensor(x)), x, y)
        loss.backward()
        return {name: _gradient(parameter).double().numpy() for name, parameter in self._single.named_parameters()}

    def learn(self) -> None:
        """One step of SGD with the gradients of the latest batch, rounded to what float32 can hold."""
        with torch.no_grad():
            for parameter in self._teacher.parameters():
                parameter.copy_((parameter - TEACHER_RATE * _gradient(parameter)).float().double())

    def _errors(self, gradients: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        exact = {name: _gradient(parameter).numpy() for name, parameter in self._teacher.named_parameters()}
        whole = float(np.sqrt(sum(float(np.sum(array**2)) for array in exact.values())))
        errors = {}
        for name, array in exact.items():
            size = float(np.linalg.norm(array))
            errors[name] = float(np.linalg.norm(gradients[name] - array)) / (size if size > NOTHING * whole else whole)
        return errors


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter has no gradient")
    return parameter.grad


def _loss(output: torch.Tensor, x: NDArray[np.float32], y: NDArray[np.int64] | None) -> torch.Tensor:
    if y is None:
        return torch.nn.functional.mse_loss(output, torch.tensor(x, dtype=output.dtype))
    return torch.nn.functional.cross_entropy(output, torch.tensor(y))


def _draws(
    model: Model, variant: Variant, batch: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64] | None]]:
    while True:
        x = rng.standard_normal((batch, *variant.shape), np.float32)
        yield x, None if model.loss == "mse" else rng.integers(0, variant.classes, batch)


def session_of(program: bytes) -> ort.InferenceSession:
    """A session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])


class Watched:
    """A program with the inputs of its deciding ops as further outputs: what it decides and its gradients are of one run."""

    def __init__(self, program: bytes) -> None:
        model = onnx.load_model_from_string(program)
        self._names = [
            node.input[0] for node in model.graph.node if node.op_type in _DECIDING_OPS and node.output[0].startswith("forward:")
        ]
        inputs = dict.fromkeys(self._names)
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs)
        self._session = session_of(model.SerializeToString())

    def run(self, feed: Mapping[str, Any]) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
        """(outputs by name, what the program decided on in the order of the model)."""
        names = [item.name for item in self._session.get_outputs()]
        values = dict(zip(names, self._session.run(names, dict(feed)), strict=True))
        return values, [values[name] for name in self._names]


class Follower(TorchFunctionMode):
    """Torch decides as the program did.

    Attributes:
        otherwise: how many decisions it would have taken otherwise.
        moved: as Comparison.
    """

    def __init__(self, followed: Sequence[NDArray[np.float32]]) -> None:
        super().__init__()
        self._followed = list(followed)
        self.otherwise, self.moved = 0, 0.0

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self._followed:
            raise RuntimeError(f"the program decides {len(self._followed)} times more than torch")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in _THRESHOLDS:
            return func(*args, **kwargs)
        x, *others = args
        theirs = torch.tensor(self._followed.pop(0)).to(x.dtype).reshape(x.shape)
        if func.__name__ == "hardtanh":
            # The rule of Clip lets gradients pass at the very bounds, as torch.clamp and not as torch's relu6.
            low, high = (torch.tensor(float(kwargs[key]), dtype=x.dtype) for key in ("min_val", "max_val"))
            theirs = torch.where(theirs == low, torch.nextafter(low, high), theirs)
            theirs = torch.where(theirs == high, torch.nextafter(high, low), theirs)
        decided, wanted = (_decided(func, value, others, kwargs) for value in (x.detach(), theirs))
        differs = decided != wanted
        if bool(differs.any()):
            self.otherwise += int(differs.sum())
            if "pool" in func.__name__:
                differs = torch.ones_like(x, dtype=torch.bool)
            move = torch.where(differs, theirs - x.detach(), 0)
            self.moved = max(self.moved, float(move.abs().max() / x.detach().square().mean().sqrt()))
            # Their very number, with the gradient of ours: a sum with the move would round the smallest away.
            x = torch.where(differs, theirs + (x - x.detach()), x)
        return func(x, *others, **kwargs)


def _decided(func: Any, value: torch.Tensor, others: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    if "pool" in func.__name__:
        indices: torch.Tensor = func(value, *others, **{**kwargs, "return_indices": True})[1]
        return indices
    bounds = _THRESHOLDS[func.__name__] or (kwargs["min_val"], kwargs["max_val"])
    return torch.bucketize(value, torch.tensor(bounds, dtype=value.dtype))
