"""Models that come with Regrow, built without torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET_VERSION = 18
IR_VERSION = 9

WATCH_CHANNELS, WATCH_SAMPLES, WATCH_CLASSES = 6, 100, 7


def watch_cnn(seed: int) -> onnx.ModelProto:
    """A CNN of 86 807 parameters for smartwatch windows: float32 [batch, 6, 100] -> logits [batch, 7].

    conv 9x32, max-pool 2, conv 5x48, max-pool 2, fc 64, fc 7. Convolutions keep the length (padding 4 and 2). ReLU comes after the
    pool: the two commute, and so it works on half the numbers, forward and backward.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "conv1.weight": _kaiming_uniform(rng, 32, WATCH_CHANNELS, 9),
        "conv1.bias": np.zeros(32, np.float32),
        "conv2.weight": _kaiming_uniform(rng, 48, 32, 5),
        "conv2.bias": np.zeros(48, np.float32),
        "fc1.weight": _kaiming_uniform(rng, 64, 48 * WATCH_SAMPLES // 4),
        "fc1.bias": np.zeros(64, np.float32),
        "fc2.weight": _kaiming_uniform(rng, WATCH_CLASSES, 64),
        "fc2.bias": np.zeros(WATCH_CLASSES, np.float32),
    }
    nodes = [
        _node("Conv", ["x", "conv1.weight", "conv1.bias"], "conv1", pads=[4, 4]),
        _node("MaxPool", ["conv1"], "pool1", kernel_shape=[2], strides=[2]),
        _node("Relu", ["pool1"], "relu1"),
        _node("Conv", ["relu1", "conv2.weight", "conv2.bias"], "conv2", pads=[2, 2]),
        _node("MaxPool", ["conv2"], "pool2", kernel_shape=[2], strides=[2]),
        _node("Relu", ["pool2"], "relu2"),
        _node("Flatten", ["relu2"], "features"),
        _node("Gemm", ["features", "fc1.weight", "fc1.bias"], "fc1", transB=1),
        _node("Relu", ["fc1"], "relu3"),
        _node("Gemm", ["relu3", "fc2.weight", "fc2.bias"], "logits", transB=1),
    ]
    return _model("watch_cnn", nodes, weights, [WATCH_CHANNELS, WATCH_SAMPLES], WATCH_CLASSES)


def digits_mlp(seed: int) -> onnx.ModelProto:
    """A perceptron for 8x8 digits, small enough for every test: float32 [batch, 64] -> 32 -> logits [batch, 10]."""
    rng = np.random.default_rng(seed)
    weights = {
        "fc1.weight": _kaiming_uniform(rng, 32, 64),
        "fc1.bias": np.zeros(32, np.float32),
        "fc2.weight": _kaiming_uniform(rng, 10, 32),
        "fc2.bias": np.zeros(10, np.float32),
    }
    nodes = [
        _node("Gemm", ["x", "fc1.weight", "fc1.bias"], "fc1", transB=1),
        _node("Relu", ["fc1"], "relu1"),
        _node("Gemm", ["relu1", "fc2.weight", "fc2.bias"], "logits", transB=1),
    ]
    return _model("digits_mlp", nodes, weights, [64], 10)


def _kaiming_uniform(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """float32, uniform in +-sqrt(6 / fan_in).

    Source: He et al., "Delving Deep into Rectifiers" (arXiv 1502.01852), section 2.2, as a uniform distribution of that variance.
    """
    bound = math.sqrt(6 / math.prod(shape[1:]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def _model(
    name: str, nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.float32]], input_shape: list[int], classes: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *input_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    opset = [helper.make_opsetid("", OPSET_VERSION)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="regrow")
    onnx.checker.check_model(model, full_check=True)
    return model
