"""Models whose units the tests find and slice: branches, reshapes, and channels that are normalised together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.forward import read_forward
from export.models import digits_mlp, watch_cnn
from export.programs import layout_of
from export.units import find_units
from regrow.parameters import Layout
from regrow.units import Units
from tests.export.running import model_of

Weights = dict[str, NDArray[Any]]
node = helper.make_node


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(0, 0.4, shape).astype(np.float32)


def residual_cnn() -> onnx.ModelProto:
    """Two residual blocks, the second with a strided projection; the last layer not transposed."""
    weights = {
        "conv1.weight": random(6, 3, 3, 3),
        "conv1.bias": random(6),
        "conv2.weight": random(6, 6, 3, 3),
        "conv2.bias": random(6),
        "conv3.weight": random(5, 6, 3, 3),
        "conv3.bias": random(5),
        "skip.weight": random(5, 6, 1, 1),
        "fc.weight": random(5, 4),
        "fc.bias": random(4),
    }
    nodes = [
        node("Conv", ["x", "conv1.weight", "conv1.bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "conv2.weight", "conv2.bias"], ["c"], pads=[1, 1, 1, 1]),
        node("Add", ["c", "b"], ["d"]),
        node("Relu", ["d"], ["e"]),
        node("Conv", ["e", "conv3.weight", "conv3.bias"], ["f"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Conv", ["e", "skip.weight"], ["g"], strides=[2, 2]),
        node("Add", ["f", "g"], ["h"]),
        node("Relu", ["h"], ["i"]),
        node("GlobalAveragePool", ["i"], ["j"]),
        node("Flatten", ["j"], ["k"]),
        node("Gemm", ["k", "fc.weight", "fc.bias"], ["logits"]),
    ]
    return model_of(nodes, weights, [3, 6, 6], 4)


def reshaping_net() -> onnx.ModelProto:
    """Conv, pool, Reshape by a constant, MatMul and Add in several ranks."""
    weights: Weights = {
        "conv": random(4, 2, 3),
        "shift": random(4, 1),
        "shape": np.array([0, 12], np.int64),
        "each": random(12),
        "fc1": random(12, 6),
        "fc1.bias": random(1, 6),
        "fc2": random(6, 3),
        "fc2.bias": random(3),
    }
    nodes = [
        node("Conv", ["x", "conv"], ["a"], pads=[1, 1]),
        node("Add", ["shift", "a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[3], strides=[3]),
        node("Relu", ["c"], ["d"]),
        node("Reshape", ["d", "shape"], ["e"]),
        node("Add", ["e", "each"], ["f"]),
        node("Relu", ["f"], ["g"]),
        node("MatMul", ["g", "fc1"], ["h"]),
        node("Add", ["h", "fc1.bias"], ["i"]),
        node("Relu", ["i"], ["j"]),
        node("MatMul", ["j", "fc2"], ["k"]),
        node("Add", ["k", "fc2.bias"], ["logits"]),
    ]
    return model_of(nodes, weights, [2, 9], 3)


def normalised_cnn() -> onnx.ModelProto:
    """Every normalisation that keeps units apart: by channel, and by group as torch writes it, around a residual sum."""
    weights: Weights = {
        "conv1": random(12, 2, 3, 3),
        "gain": random(12),
        "shift": random(12),
        "conv2": random(12, 12, 3, 3),
        "instance.scale": random(12),
        "instance.bias": random(12),
        "conv3": random(8, 12, 1, 1),
        "grouped.scale": random(4),
        "grouped.bias": random(4),
        "fc": random(8, 3),
        "fc.bias": random(3),
    }
    constants = {
        "ones": np.ones(6, np.float32),
        "zeros": np.zeros(6, np.float32),
        "half": np.array(0.5, np.float32),
        "behind": np.array([1, 2]),
        "six": np.array([0, 6, -1]),
        "twelve": np.array([0, 12, 6, 6]),
        "four": np.array([0, 4, -1]),
        "eight": np.array([-1, 8, 3, 3]),
    }
    nodes = [
        *(node("Constant", [], [name], value=numpy_helper.from_array(array)) for name, array in constants.items()),
        node("Conv", ["x", "conv1"], ["a"], pads=[1, 1, 1, 1]),
        node("Reshape", ["a", "six"], ["a1"]),
        node("InstanceNormalization", ["a1", "ones", "zeros"], ["a2"]),
        node("Reshape", ["a2", "twelve"], ["a3"]),
        node("Unsqueeze", ["gain", "behind"], ["gain1"]),
        node("Mul", ["a3", "gain1"], ["a4"]),
        node("Unsqueeze", ["shift", "behind"], ["shift1"]),
        node("Add", ["a4", "shift1"], ["b"]),
        node("Sigmoid", ["b"], ["c"]),
        node("Conv", ["c", "conv2"], ["d"], pads=[1, 1, 1, 1]),
        node("InstanceNormalization", ["d", "instance.scale", "instance.bias"], ["e"]),
        node("Add", ["c", "e"], ["f"]),
        node("MaxPool", ["f"], ["g"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["g", "conv3"], ["h"]),
        node("Reshape", ["h", "four"], ["i"]),
        node("InstanceNormalization", ["i", "grouped.scale", "grouped.bias"], ["j"]),
        node("Reshape", ["j", "eight"], ["k"]),
        node("Mul", ["half", "k"], ["l"]),
        node("Relu", ["l"], ["l1"]),
        node("GlobalAveragePool", ["l1"], ["m"]),
        node("Flatten", ["m"], ["n"]),
        node("Gemm", ["n", "fc", "fc.bias"], ["logits"]),
    ]
    return model_of(nodes, weights, [2, 6, 6], 3)


def group_norm_cnn() -> onnx.ModelProto:
    """GroupNormalization as opset 21 has it, one weight per channel; onnx infers no shape for it, so the exporter's are there."""
    weights: Weights = {
        "conv": random(12, 2, 3),
        "scale": random(12),
        "bias": random(12),
        "fc": random(36, 3),
        "fc.bias": random(3),
    }
    nodes = [
        node("Conv", ["x", "conv"], ["a"]),
        node("GroupNormalization", ["a", "scale", "bias"], ["b"], num_groups=6),
        node("LeakyRelu", ["b"], ["c"]),
        node("AveragePool", ["c"], ["d"], kernel_shape=[2], strides=[2]),
        node("Flatten", ["d"], ["e"]),
        node("Gemm", ["e", "fc", "fc.bias"], ["logits"]),
    ]
    model = model_of(nodes, weights, [2, 8], 3, opset=21)
    model.graph.value_info.append(helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["batch", 12, 6]))
    return model


def batch_norm_net(input_shape: Sequence[int] = (2, 6, 6), classes: int = 3) -> onnx.ModelProto:
    """Batch normalisation of maps, twice on one residual stream, and of features."""
    channels, *sizes = input_shape
    spatial, pads = len(sizes), [1] * 2 * len(sizes)
    weights: Weights = {"conv1": random(8, channels, *[3] * spatial), "conv2": random(8, 8, *[3] * spatial), "conv2.bias": random(8)}
    weights |= {"fc1": random(8, 6), "fc2": random(6, classes), "fc2.bias": random(classes)}
    for name, count in (("norm1", 8), ("norm2", 8), ("norm3", 6)):
        statistics = {f"{name}.mean": random(count, 1)[:, 0], f"{name}.variance": 0.5 + random(count, 2)[:, 0] ** 2}
        weights |= {f"{name}.scale": random(count), f"{name}.bias": random(count, 3)[:, 0], **statistics}

    def normalised(name: str, source: str, result: str) -> onnx.NodeProto:
        parts = (f"{name}.{part}" for part in ("scale", "bias", "mean", "variance"))
        return node("BatchNormalization", [source, *parts], [result], name=name, epsilon=1e-3)

    nodes = [
        node("Conv", ["x", "conv1"], ["a"], pads=pads, strides=[2] * spatial),
        normalised("norm1", "a", "b"),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "conv2", "conv2.bias"], ["d"], pads=pads),
        normalised("norm2", "d", "e"),
        node("Add", ["c", "e"], ["f"]),
        node("Sigmoid", ["f"], ["g"]),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("Flatten", ["h"], ["i"]),
        node("MatMul", ["i", "fc1"], ["j"]),
        normalised("norm3", "j", "k"),
        node("LeakyRelu", ["k"], ["l"]),
        node("Gemm", ["l", "fc2", "fc2.bias"], ["logits"]),
    ]
    return model_of(nodes, weights, input_shape, classes)


def batch_norm_perceptron(features: int, classes: int) -> onnx.ModelProto:
    """A perceptron with batch normalisation, as first layer too."""
    weights: Weights = {"fc1": random(features, 24), "fc1.bias": random(24), "fc2": random(24, classes), "fc2.bias": random(classes)}
    for name, count in (("norm1", features), ("norm2", 24)):
        start = {"scale": 1.0, "bias": 0.0, "mean": 0.25, "variance": 0.5}
        weights |= {f"{name}.{part}": np.full(count, value, np.float32) for part, value in start.items()}
    nodes = [
        node("BatchNormalization", ["x", *(f"norm1.{part}" for part in start)], ["a"]),
        node("Gemm", ["a", "fc1", "fc1.bias"], ["b"]),
        node("BatchNormalization", ["b", *(f"norm2.{part}" for part in start)], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("Gemm", ["d", "fc2", "fc2.bias"], ["logits"]),
    ]
    return model_of(nodes, weights, [features], classes)


MODELS = {
    "watch": lambda: watch_cnn(0),
    "digits": lambda: digits_mlp(0),
    "residual": residual_cnn,
    "reshaping": reshaping_net,
    "normalised": normalised_cnn,
    "group norm": group_norm_cnn,
    "batch norm": batch_norm_net,
}
TRAINABLE = [name for name in MODELS if name != "group norm"]


@cache
def parts(name: str) -> tuple[onnx.ModelProto, Layout, Units]:
    model = MODELS[name]()
    return model, layout_of(read_forward(model)), find_units(model)
