"""Trained models for use: the global model and the sub-model of a level as ONNX files, checked, run, measured.

A level of single weights is the whole graph with zeros where the level has nothing: as large as the full model, but it packs well. A level
of whole units is a really smaller graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from export.forward import known_tokens, read_forward
from export.programs import with_weights
from export.quantize import as_float16, as_int8, left_float32, write_ort
from export.slicing import sliced_model
from export.timing import ORT_ERRORS, medians_s, session_of
from regrow.errors import LocalError
from regrow.examples import check_tokens
from regrow.levels import only_prefix
from regrow.local_step import Step
from regrow.order import Order
from regrow.parameters import Layout
from regrow.scoring import score_outputs
from regrow.task import DEFAULT_TRAINING
from regrow.unit_order import level_sizes, level_units
from regrow.units import Units

Quantization = Literal["none", "int8", "fp16"]
Format = Literal["onnx", "ort"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
SCORED_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Examples:
    """Data: x [m, ...] as the model takes it, y as the loss takes it or None; `name` is the file, for errors."""

    name: str
    x: NDArray[Any]
    y: NDArray[Any] | None


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for: the forms, the format of their files, data to score them with and (for int8) to calibrate with, and the step
    whose loss and target say what a score is."""

    forms: Sequence[Quantization] = ("none",)
    file_format: Format = "onnx"
    held_out: Examples | None = None
    calibration: Examples | None = None
    step: Step = DEFAULT_TRAINING


@dataclass(frozen=True)
class Exported:
    """One written file and what it does. `score` (regrow.scoring) and `drop` (that of float32 less this one's) are None without data.

    `nonzero` are parameters of the float32 model that are not 0; `zlib_bytes` is the file packed by zlib's default; `left_float32` of an
    int8 file are weights that onnxruntime has not quantized, by operator.
    """

    file: str
    density: float
    quantize: Quantization
    parameters: int
    nonzero: int
    opset: int
    ir_version: int
    size_bytes: int
    zlib_bytes: int
    score: float | None
    drop: float | None
    left_float32: Mapping[str, int]
    latency_ms: float | None = None


Slicing = tuple[Layout, Units, Sequence[float]]
"""Layout and units of a model, and the densities of all levels."""


def level_model(
    model: onnx.ModelProto,
    flat_weights: NDArray[np.float32],
    order: Order,
    level: int,
    slicing: Slicing | None,
    *,
    train_last: int | None = None,
    statistics: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """The sub-model of a level.

    Args:
        model: the forward model that the run trains. Not modified.
        flat_weights: float32 [n] by flat coordinate.
        level: of the order.
        slicing: where levels are whole units; None for zeros in the full graph.
        train_last: as the run trains.
        statistics: running means and variances of this level, by initializer; None: those of the model stay.

    Raises:
        LocalError: these do not fit together.
    """
    length = order.lengths[level]
    if slicing is None or length == order.size:
        return with_weights(model, only_prefix(order, flat_weights, length), train_last, statistics=statistics)
    layout, units, densities = slicing
    small = sliced_model(model, units, level_units(level_sizes(layout, units, densities)[level]))
    return with_weights(small, flat_weights[np.sort(order.coordinates[:length])], statistics=statistics)


def write_forms(
    model: onnx.ModelProto, stem: Path, density: float, request: Request, properties: Mapping[str, str] | None = None
) -> list[Exported]:
    """Write one model in every asked form, STEM.onnx or STEM.int8.ort; each file is loaded and run before it counts.

    Args:
        model: float32, of level_model.
        density: that the model is of, for the result.
        properties: more metadata for the files, such as which run they come from.

    Raises:
        LocalError: int8 without calibration data; data that do not fit the model or the loss; a model that cannot be converted, or
            gives numbers that are not finite.
    """
    stated = onnx.ModelProto()
    stated.CopyFrom(model)
    onnx.helper.set_model_props(stated, {entry.key: entry.value for entry in model.metadata_props} | dict(properties or {}))
    plain = _Runnable(stated.SerializeToString(), "the float32 model", known_tokens(stated.graph, stated.graph.input[0].name, {}))
    if request.calibration is not None:
        plain.check_x(request.calibration)
    if request.held_out is not None:
        plain.check_x(request.held_out)
    weights = list(read_forward(stated).parameters.values())
    counts = sum(array.size for array in weights), sum(int(np.count_nonzero(array)) for array in weights)
    whole = None if request.held_out is None else plain.score(request.held_out, request.step)
    written = []
    for form in request.forms:
        made = _converted(stated, form, request.calibration)
        path = stem.with_name(f"{stem.name}{'' if form == 'none' else f'.{form}'}.{request.file_format}")
        score = _write(made, path, request)
        drop = None if whole is None or score is None else whole - score
        opset = next(entry.version for entry in made.opset_import if entry.domain in ("", "ai.onnx"))
        content = path.read_bytes()
        left = left_float32(made) if form == "int8" else {}
        sizes = len(content), len(zlib.compress(content))
        written.append(Exported(path.name, density, form, *counts, opset, made.ir_version, *sizes, score, drop, left))
    return written


def _write(model: onnx.ModelProto, path: Path, request: Request) -> float | None:
    """Write a file, try it out, and return its score; None without held-out data."""
    if request.file_format == "ort":
        write_ort(model, path)
    else:
        onnx.save_model(model, path)
    runnable = _Runnable(path, path.name)
    runnable.try_out()
    return None if request.held_out is None else runnable.score(request.held_out, request.step)


def latencies_ms(files: Sequence[Path], rounds: int) -> list[float]:
    """Median milliseconds of one example on one thread, for each file; the files take turns."""
    runnables = [_Runnable(file, file.name) for file in files]
    calls = [partial(each.run, each.random(1)) for each in runnables]
    return [1000.0 * seconds for seconds in medians_s(calls, rounds)]


def _converted(model: onnx.ModelProto, form: Quantization, calibration: Examples | None) -> onnx.ModelProto:
    if form == "none":
        return model
    if form == "fp16":
        return as_float16(model)
    if calibration is None:
        raise LocalError("int8 needs data to find the range of every activation: give --calibrate FILE.npz, data from a device")
    return as_int8(model, calibration.x)


class _Runnable:
    """A model in onnxruntime with one input and one output."""

    def __init__(self, model: bytes | Path, name: str, tokens: int = 0) -> None:
        self._name, self._tokens = name, tokens
        try:
            self._session = session_of(model)
        except ORT_ERRORS as error:
            raise LocalError(f"{name}: onnxruntime {ort.__version__} cannot load it: {error}") from error
        self._input = self._session.get_inputs()[0]

    def run(self, x: NDArray[Any]) -> NDArray[np.float32]:
        try:
            output: NDArray[np.float32] = self._session.run(None, {self._input.name: x})[0]
        except ORT_ERRORS as error:
            raise LocalError(f"{self._name}: onnxruntime {ort.__version__} cannot run it: {error}") from error
        return output

    def random(self, batch: int) -> NDArray[Any]:
        shape = (batch, *self._input.shape[1:])
        if self._input.type == "tensor(int64)":
            return np.zeros(shape, np.int64)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def try_out(self) -> None:
        """Raises LocalError unless it runs on two examples, and gives finite numbers for them."""
        output = self.run(self.random(2))
        if len(output) != 2 or not np.isfinite(output).all():
            raise LocalError(f"{self._name}: its output for two examples has shape {list(output.shape)} or is not finite; keep it float32")

    def check_x(self, examples: Examples) -> None:
        """Raises LocalError unless the model takes such examples."""
        wanted = {"tensor(float)": "float32", "tensor(int64)": "int64"}.get(self._input.type, self._input.type)
        shape = list(self._input.shape[1:])
        if list(examples.x.shape[1:]) != shape or examples.x.dtype.name != wanted:
            has = f"{examples.x.dtype} {list(examples.x.shape[1:])}"
            raise LocalError(f"{examples.name}: an example is {has}, the model takes {wanted} {shape}: give data of this task")
        if wanted == "int64":
            self._check_tokens(examples)

    def _check_tokens(self, examples: Examples) -> None:
        """By the size of its table; where that is not to be seen, only running the model shows which tokens it knows."""
        try:
            check_tokens(examples.x, self._tokens)
        except LocalError as error:
            raise LocalError(f"{examples.name}: {error}") from error
        for start in range(0, len(examples.x), SCORED_AT_ONCE):
            try:
                self._session.run(None, {self._input.name: examples.x[start : start + SCORED_AT_ONCE]})
            except ORT_ERRORS as error:
                raise LocalError(f"{examples.name}: the model does not know all of these tokens, up to {examples.x.max()}") from error

    def score(self, examples: Examples, step: Step) -> float:
        """How right the model is on the examples, as regrow.scoring has it.

        Raises:
            LocalError: the examples do not fit the loss, or an output is not finite.
        """
        if examples.y is None and step.target == "y":
            raise LocalError(f"{examples.name}: it has no targets to score with: give x and y")
        parts = [self.run(examples.x[start : start + SCORED_AT_ONCE]) for start in range(0, len(examples.x), SCORED_AT_ONCE)]
        outputs = np.concatenate(parts)
        if not np.isfinite(outputs).all():
            raise LocalError(f"{self._name}: its output for {examples.name} is not finite; keep it float32")
        try:
            return score_outputs(outputs, examples.x, examples.x if examples.y is None else examples.y, step).accuracy
        except LocalError as error:
            raise LocalError(f"{examples.name}: {error}; give data of this task") from error
