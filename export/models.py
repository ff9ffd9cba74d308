"""Models that come with Regrow, built without torch: one factory per model, all of them in MODELS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET_VERSION = 18
IR_VERSION = 9

WATCH_CHANNELS, WATCH_SAMPLES, WATCH_CLASSES = 6, 100, 7
NORM_GROUPS = 32
RESNET_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""(channels, stride of the first convolution) of the stages of resnet18_gn; two blocks each."""


def watch_cnn(seed: int) -> onnx.ModelProto:
    """A CNN of 86 807 parameters for smartwatch windows: float32 [batch, 6, 100] -> logits [batch, 7].

    conv 9x32, max-pool 2, conv 5x48, max-pool 2, fc 64, fc 7. Convolutions keep the length (padding 4 and 2).
    """
    layers = [Layer(32, 9, pooled=True), Layer(48, 5, pooled=True)]
    return _feed_forward("watch_cnn", seed, (WATCH_CHANNELS, WATCH_SAMPLES), layers, [64], WATCH_CLASSES)


def digits_mlp(seed: int) -> onnx.ModelProto:
    """A perceptron for 8x8 digits, small enough for every test: float32 [batch, 64] -> 32 -> logits [batch, 10]; 2 410 parameters."""
    return _feed_forward("digits_mlp", seed, (64,), [], [32], 10)


def leaf_cnn(seed: int, classes: int = 62) -> onnx.ModelProto:
    """The CNN of LEAF for 28x28 images, 6 603 710 parameters with 62 classes: float32 [batch, 1, 28, 28] -> logits [batch, classes].

    conv 5x5x32, max-pool 2, conv 5x5x64, max-pool 2, fc 2048, fc classes. Convolutions keep the size (padding 2).

    Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (arXiv 1812.01097), its FEMNIST model.
    """
    layers = [Layer(32, 5, pooled=True), Layer(64, 5, pooled=True)]
    return _feed_forward("leaf_cnn", seed, (1, 28, 28), layers, [2048], classes)


def reduced_cnn(seed: int, classes: int = 10) -> onnx.ModelProto:
    """leaf_cnn made small for two cores, 52 266 parameters with 10 classes: float32 [batch, 1, 28, 28] -> logits [batch, classes].

    conv 5x5x8 and conv 3x3x16, both of stride 2, fc 64, fc classes. Strides instead of pools make a training step 2.4 times faster.
    """
    layers = [Layer(8, 5, stride=2), Layer(16, 3, stride=2)]
    return _feed_forward("reduced_cnn", seed, (1, 28, 28), layers, [64], classes)


def vgg11(seed: int, classes: int = 10) -> onnx.ModelProto:
    """A VGG-11 for small images, 9 225 610 parameters with 10 classes: float32 [batch, 3, 32, 32] -> logits [batch, classes].

    Eight 3x3 convolutions of 64, 128, 256, 256, 512, 512, 512, 512 channels and five max-pools, down to one position.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks" (arXiv 1409.1556), configuration A. Differs: images of 32x32, and
    without the two hidden fully connected layers.
    """
    channels = (64, 128, 256, 256, 512, 512, 512, 512)
    layers = [Layer(count, 3, pooled=number in (0, 1, 3, 5, 7)) for number, count in enumerate(channels)]
    return _feed_forward("vgg11", seed, (3, 32, 32), layers, [], classes)


def resnet18_gn(seed: int, classes: int = 10) -> onnx.ModelProto:
    """ResNet-18 with group normalisation, 11 173 962 parameters with 10 classes: float32 [batch, 3, 32, 32] -> logits [batch, classes].

    The form for small images: conv 3x3x64 and no pooling first. Every convolution is followed by a normalisation in 32 groups.

    Source: He et al., "Deep Residual Learning" (arXiv 1512.03385); Wu and He, "Group Normalization" (arXiv 1803.08494).
    """
    net = _Net(seed, (3, 32, 32))
    net.constant("norm.ones", np.ones(NORM_GROUPS, np.float32))
    net.constant("norm.zeros", np.zeros(NORM_GROUPS, np.float32))
    net.constant("norm.axes", np.array([1, 2], np.int64))
    _normalised_convolution(net, "conv1", RESNET_STAGES[0][0], 3, 1)
    net.relu()
    for stage, (channels, stride) in enumerate(RESNET_STAGES, 1):
        _residual_block(net, f"stage{stage}.block1", channels, stride)
        _residual_block(net, f"stage{stage}.block2", channels, 1)
    net.add("GlobalAveragePool", [net.value], "average", shape=(net.shape[0], 1, 1))
    net.flatten()
    net.dense("fc", classes, output="logits")
    return net.model("resnet18_gn")


MODELS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "digits_mlp": digits_mlp,
    "leaf_cnn": leaf_cnn,
    "reduced_cnn": reduced_cnn,
    "resnet18_gn": resnet18_gn,
    "vgg11": vgg11,
    "watch_cnn": watch_cnn,
}
"""Factory by name; each takes the seed of the weights. The same seed gives the same model, bit for bit."""


@dataclass(frozen=True)
class Layer:
    """A convolution that, at stride 1, keeps the size of the map, and whether a max-pool of 2 follows."""

    channels: int
    kernel: int
    stride: int = 1
    pooled: bool = False


def _feed_forward(
    name: str, seed: int, input_shape: tuple[int, ...], layers: Sequence[Layer], hidden: Sequence[int], classes: int
) -> onnx.ModelProto:
    """Convolutions, then fully connected layers.

    ReLU comes after the pool: the two commute, and so it works on a part of the numbers, forward and backward.
    """
    net = _Net(seed, input_shape)
    for number, layer in enumerate(layers, 1):
        net.convolution(f"conv{number}", layer.channels, layer.kernel, stride=layer.stride)
        if layer.pooled:
            net.max_pool()
        net.relu()
    if len(net.shape) > 1:
        net.flatten()
    for number, units in enumerate(hidden, 1):
        net.dense(f"fc{number}", units)
        net.relu()
    net.dense(f"fc{len(hidden) + 1}", classes, output="logits")
    return net.model(name)


def _residual_block(net: _Net, name: str, channels: int, stride: int) -> None:
    """Two normalised convolutions around which the input passes; where the shape changes, through a 1x1 convolution."""
    source, source_shape = net.value, net.shape
    _normalised_convolution(net, f"{name}.conv1", channels, 3, stride)
    net.relu()
    _normalised_convolution(net, f"{name}.conv2", channels, 3, 1)
    branch, shape = net.value, net.shape
    net.value, net.shape = source, source_shape
    if shape != source_shape:
        _normalised_convolution(net, f"{name}.shortcut", channels, 1, stride)
    net.add("Add", [branch, net.value], f"{name}.sum", shape=shape)
    net.relu()


def _normalised_convolution(net: _Net, name: str, channels: int, kernel: int, stride: int) -> None:
    """A convolution without bias and a group normalisation, written as torch exports it for opset 18.

    The scale and shift are vectors, and so always kept; they become [channels, 1, 1] in the graph.
    """
    net.convolution(name, channels, kernel, stride=stride, bias=False)
    shape, norm = net.shape, f"{name}.norm"
    net.constant(f"{norm}.groups", np.array([0, NORM_GROUPS, -1], np.int64))
    net.constant(f"{norm}.whole", np.array([0, *shape], np.int64))
    net.weights[f"{norm}.weight"] = np.ones(channels, np.float32)
    net.weights[f"{norm}.bias"] = np.zeros(channels, np.float32)
    net.add("Reshape", [net.value, f"{norm}.groups"], f"{norm}.in_groups", shape=shape)
    net.add("InstanceNormalization", [net.value, "norm.ones", "norm.zeros"], f"{norm}.normal", shape=shape, epsilon=1e-5)
    net.add("Reshape", [net.value, f"{norm}.whole"], f"{norm}.normalised", shape=shape)
    normalised = net.value
    net.add("Unsqueeze", [f"{norm}.weight", "norm.axes"], f"{norm}.scale", shape=shape)
    net.add("Mul", [normalised, net.value], f"{norm}.scaled", shape=shape)
    scaled = net.value
    net.add("Unsqueeze", [f"{norm}.bias", "norm.axes"], f"{norm}.shift", shape=shape)
    net.add("Add", [scaled, net.value], norm, shape=shape)


@dataclass
class _Net:
    """A model under construction, layer after layer.

    Attributes:
        shape: of the latest value, without the batch.
        value: name of the latest value, which the next layer takes.
    """

    seed: int
    input_shape: tuple[int, ...]
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = self.input_shape
        self._rng = np.random.default_rng(self.seed)
        self._counts = {"pool": 0, "relu": 0}

    def add(self, op: str, inputs: Sequence[str], output: str, *, shape: tuple[int, ...], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        self.value, self.shape = output, shape

    def constant(self, name: str, array: NDArray[Any]) -> None:
        """A tensor that is never trained; as an initializer, a float32 one would be."""
        self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array)))

    def convolution(self, name: str, channels: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        rank = len(self.shape) - 1
        parameters = self._parameters(name, (channels, self.shape[0], *[kernel] * rank), bias=bias)
        sizes = [(size - 1) // stride + 1 for size in self.shape[1:]]
        strides = {"strides": [stride] * rank} if stride > 1 else {}
        self.add("Conv", [self.value, *parameters], name, shape=(channels, *sizes), pads=[kernel // 2] * 2 * rank, **strides)

    def max_pool(self) -> None:
        rank = len(self.shape) - 1
        shape = (self.shape[0], *(size // 2 for size in self.shape[1:]))
        self.add("MaxPool", [self.value], self._numbered("pool"), shape=shape, kernel_shape=[2] * rank, strides=[2] * rank)

    def relu(self) -> None:
        self.add("Relu", [self.value], self._numbered("relu"), shape=self.shape)

    def flatten(self) -> None:
        self.add("Flatten", [self.value], "features", shape=(math.prod(self.shape),))

    def dense(self, name: str, units: int, *, output: str | None = None) -> None:
        parameters = self._parameters(name, (units, self.shape[0]), bias=True)
        self.add("Gemm", [self.value, *parameters], output or name, shape=(units,), transB=1)

    def model(self, name: str) -> onnx.ModelProto:
        """The checked model from `x` to the latest value."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.input_shape])],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, ["batch", *self.shape])],
            [numpy_helper.from_array(array, key) for key, array in self.weights.items()],
        )
        opset = [helper.make_opsetid("", OPSET_VERSION)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="regrow")
        onnx.checker.check_model(model, full_check=True)
        return model

    def _parameters(self, name: str, shape: tuple[int, ...], *, bias: bool) -> list[str]:
        """Names of a new weight and its bias: uniform in +-sqrt(6 / fan_in), and zero.

        Source: He et al., "Delving Deep into Rectifiers" (arXiv 1502.01852), section 2.2, as a uniform distribution of that variance.
        """
        bound = math.sqrt(6 / math.prod(shape[1:]))
        self.weights[f"{name}.weight"] = self._rng.uniform(-bound, bound, shape).astype(np.float32)
        if not bias:
            return [f"{name}.weight"]
        self.weights[f"{name}.bias"] = np.zeros(shape[0], np.float32)
        return [f"{name}.weight", f"{name}.bias"]

    def _numbered(self, kind: str) -> str:
        self._counts[kind] += 1
        return f"{kind}{self._counts[kind]}"
