"""Gradients of the training programs against torch in float64, step by step from torch's own weights.

Trajectories say little: where one activation lies so close to 0 that float32 and float64 take it for different signs, ReLU has another
slope, and the gradients of two sound programs differ by a thousandth. So the decisions are compared too (signs at every ReLU, ranges at
every clipping, places in every max-pool): a batch on which one differs is counted, and drawn anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch.utils._python_dispatch import TorchDispatchMode

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
MOST_REDRAWN = 400

_THRESHOLDS = {"aten.relu.default": (0.0,), "aten.hardswish.default": (-3.0, 3.0), "aten.hardsigmoid.default": (-3.0, 3.0)}
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
        redrawn: batches that were drawn anew because float32 decided otherwise than float64.
        worst_undecided: largest error on those.
    """

    parameters: int
    steps: int
    worst: float
    where: str
    worst_of_torch: float
    worst_loss: float
    redrawn: int
    worst_undecided: float


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
    contest = _Contest(session_of(program), Decisions(program), teacher)
    draws = _draws(model, variant, batch, np.random.default_rng(seed))
    worst, where, of_torch, worst_loss, redrawn, undecided, step = 0.0, "", 0.0, 0.0, 0, 0.0, 0
    while step < steps:
        found = contest.step(*next(draws))
        if not found.agreed:
            redrawn, undecided = redrawn + 1, max(undecided, *found.errors.values())
            if redrawn > MOST_REDRAWN:
                raise RuntimeError(f"float32 and float64 agree on no batch in {MOST_REDRAWN}: take smaller batches")
            continue
        step += 1
        name = max(found.errors, key=lambda name: found.errors[name])
        if found.errors[name] > worst:
            worst, where = found.errors[name], name
        of_torch = max(of_torch, found.error_of_torch)
        worst_loss = max(worst_loss, found.loss_error)
        contest.learn()
    count = sum(parameter.numel() for parameter in teacher.parameters())
    return Comparison(count, steps, worst, where, of_torch, worst_loss, redrawn, undecided)


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
    agreed: bool


class _Contest:
    """The teacher, whose weights are float64 numbers that float32 can hold, and the program that is asked about each of them."""

    def __init__(self, session: ort.InferenceSession, decisions: Decisions, teacher: torch.nn.Module) -> None:
        self._session, self._decisions, self._teacher = session, decisions, teacher
        self._single = copy.deepcopy(teacher).float()

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64] | None) -> _Found:
        self._teacher.zero_grad()
        with Recorder() as recorder:
            output = self._teacher(torch.tensor(x, dtype=torch.float64))
            loss = _loss(output, x, y)
            loss.backward()
        weights = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in self._teacher.named_parameters()}
        feed = {"x": x, "sample_weight": np.ones(len(x), np.float32), "learning_rate": np.array(RATE, np.float32), **weights}
        feed |= {} if y is None else {"y": y}
        names = list(weights)
        ours, *new = self._session.run(["loss", *(f"new:{name}" for name in names)], feed)
        gradients = {name: (weights[name].astype(np.float64) - np.asarray(value)) / RATE for name, value in zip(names, new, strict=True)}
        of_torch = max(self._errors(self._single_gradients(x, y)).values())
        loss_error = abs(float(ours) - loss.item()) / abs(loss.item())
        return _Found(self._errors(gradients), of_torch, loss_error, self._decisions.agree(feed, recorder.seen))

    def _single_gradients(self, x: NDArray[np.float32], y: NDArray[np.int64] | None) -> dict[str, NDArray[np.float64]]:
        self._single.load_state_dict(self._teacher.state_dict())
        self._single.zero_grad()
        _loss(self._single(torch.tensor(x)), x, y).backward()
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


class Recorder(TorchDispatchMode):
    """What torch's deciding ops are called with, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name in (*_THRESHOLDS, "aten.hardtanh.default", "aten.max_pool2d_with_indices.default"):
            self.seen.append((name, tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)))
        return func(*args, **(kwargs or {}))


class Decisions:
    """The program with the inputs of its deciding ops as further outputs; it runs beside the program itself, which stays as it is."""

    def __init__(self, program: bytes) -> None:
        model = onnx.load_model_from_string(program)
        self._names = [
            node.input[0] for node in model.graph.node if node.op_type in _DECIDING_OPS and node.output[0].startswith("forward:")
        ]
        del model.graph.output[1:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in dict.fromkeys(self._names))
        self._session = session_of(model.SerializeToString())

    def agree(self, feed: Mapping[str, Any], seen: list[tuple[str, tuple[Any, ...]]]) -> bool:
        """Whether every decision of the program is torch's."""
        if len(seen) != len(self._names):
            raise RuntimeError(f"the program decides {len(self._names)} times, torch {len(seen)} times")
        if not seen:
            return True
        wanted = {item.name for item in self._session.get_inputs()}
        values = self._session.run(list(dict.fromkeys(self._names)), {name: value for name, value in feed.items() if name in wanted})
        by_name = dict(zip(dict.fromkeys(self._names), values, strict=True))
        return all(
            torch.equal(_decided(op, exact, *others), _decided(op, torch.tensor(by_name[name]).double().reshape(exact.shape), *others))
            for name, (op, (exact, *others)) in zip(self._names, seen, strict=True)
        )


def _decided(op: str, value: torch.Tensor, *others: Any) -> torch.Tensor:
    if op == "aten.max_pool2d_with_indices.default":
        indices: torch.Tensor = torch.ops.aten.max_pool2d_with_indices(value, *others)[1]
        return indices
    bounds = torch.tensor(_THRESHOLDS.get(op) or others[:2], dtype=value.dtype)
    return torch.bucketize(value, bounds)
