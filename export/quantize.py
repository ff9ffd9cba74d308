"""Smaller forms of a trained forward model, made by onnxruntime's own converters: int8, float16, and its file format .ort."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.registry import QDQRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.timing import ORT_ERRORS
from regrow.errors import LocalError

CALIBRATION_EXAMPLES = 512
CALIBRATED_AT_ONCE = 32
KEPT_FLOAT = ("InstanceNormalization", "LayerNormalization", "BatchNormalization")
"""Normalisations that no convolution has taken in: they divide by small numbers, which eight bits hold badly."""

_CONVERTER_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, LookupError, AttributeError, TypeError, AssertionError)
"""What the converters let out for a model that they do not know; they document none."""


class _Examples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Parts of the calibration data, as quantize_static asks for them."""

    def __init__(self, name: str, x: NDArray[Any]) -> None:
        self._parts = iter([{name: x[start : start + CALIBRATED_AT_ONCE]} for start in range(0, len(x), CALIBRATED_AT_ONCE)])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._parts, None)


def as_int8(model: onnx.ModelProto, x: NDArray[Any]) -> onnx.ModelProto:
    """Weights and activations int8: static, in QuantizeLinear and DequantizeLinear pairs; weights per channel, symmetric (0 stays 0).

    Args:
        model: float32. Not modified.
        x: [m, ...], the model's input, as it comes on a device; at most 512 of them, evenly spread, are looked at. The largest and
            smallest value of every activation become the ends of its range.

    Raises:
        LocalError: onnxruntime cannot quantize this model.
    """
    spread = x[np.linspace(0, len(x) - 1, min(len(x), CALIBRATION_EXAMPLES)).astype(np.int64)]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, fused, small = (str(Path(folder) / name) for name in ("plain.onnx", "fused.onnx", "small.onnx"))
        onnx.save_model(model, plain)
        try:
            quant_pre_process(plain, fused, skip_symbolic_shape=True)  # batch normalisations go into convolutions; shapes are static
            quantize_static(
                fused,
                small,
                _Examples(_input_name(model), spread),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=[op for op in QDQRegistry if op not in KEPT_FLOAT],
            )
        except _CONVERTER_ERRORS as error:
            raise LocalError(f"onnxruntime cannot quantize the model to int8: {error!r}; take --quantize fp16 or none") from error
        return _tidy(onnx.load(small))


def left_float32(model: onnx.ModelProto) -> dict[str, int]:
    """How many numbers of weights an int8 model still holds as float32, by the operator that takes them; vectors do not count."""
    real = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in real if sum(size > 1 for size in tensor.dims) > 1}
    found: Counter[str] = Counter()
    for node in model.graph.node:
        for name in node.input:
            found[node.op_type] += sizes.pop(name, 0)
    return {op: count for op, count in sorted(found.items()) if count}


def as_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and arithmetic float16; input and output stay float32. Half the size; a CPU without float16 arithmetic is not faster.

    Raises:
        LocalError: onnxruntime's converter cannot convert this model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # the converter changes what it is given
    with _quiet():
        try:
            converted = OnnxModel(convert_float_to_float16(copy, keep_io_types=True))
            converted.topological_sort()  # the converter appends the input's cast at the end
        except _CONVERTER_ERRORS as error:
            raise LocalError(f"onnxruntime cannot convert the model to float16: {error!r}; take --quantize int8 or none") from error
    return _tidy(converted.model)


def write_ort(model: onnx.ModelProto, path: Path) -> None:
    """Write the model in onnxruntime's own format, optimised without what depends on this CPU's instructions.

    Its small builds read nothing else. The format has versions of its own: older releases of onnxruntime refuse newer files, and now and
    then a release reads no older ones.

    Raises:
        LocalError: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except ORT_ERRORS as error:
        raise LocalError(f"onnxruntime {ort.__version__} cannot write the model as .ort: {error}; take --format onnx") from error


def _input_name(model: onnx.ModelProto) -> str:
    """Of the one input that is no initializer (read_forward has checked that it is one)."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return next(str(value.name) for value in model.graph.input if value.name not in weights)


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the operator sets that the optimiser lists and no node is of, which other runtimes refuse."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The converters warn on the root logger about what is as it should be (weights of one axis, clipped zeros)."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
