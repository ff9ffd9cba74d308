"""Torch modules of the models that people put on devices: what the training programs are compared with. Importing this imports torch.

Each is written from its paper, with a factor for the width and the shape of one input, so that the same code gives the real model and one
that a test can afford. All start from torch's own initial weights. No dropout: the comparison needs the same function twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Shape = tuple[int, ...]
Activation = Callable[[], nn.Module]
Norm = Literal["batch", "group"]


@dataclass(frozen=True)
class Variant:
    """How large.

    Attributes:
        width: factor of every number of channels.
        shape: of one input.
        classes: of an autoencoder, unused.
        blocks: how many of the real model's repeated blocks are there, the first ones; None means all.
    """

    width: float
    shape: Shape
    classes: int
    blocks: int | None = None


@dataclass(frozen=True)
class Model:
    """One model of the zoo.

    Attributes:
        build: the module of a variant, float32.
        real, small: the model as it is used, and one for tests.
        loss: as in `[training]` of task.toml; "mse" means that the target is the input.
    """

    build: Callable[[Variant], nn.Module]
    real: Variant
    small: Variant
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"

    def module(self, variant: Variant, seed: int) -> nn.Module:
        """The module with the weights of a seed; torch's own random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(variant)


# ---- plain convolutions ----------------------------------------------------------------------------------------------


def leaf_cnn(variant: Variant) -> nn.Module:
    """Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (arXiv 1812.01097), its FEMNIST model."""
    channels, rows, columns = variant.shape
    first, second, hidden = (_scaled(count, variant) for count in (32, 64, 2048))
    return nn.Sequential(
        *(nn.Conv2d(channels, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(second * (rows // 4) * (columns // 4), hidden), nn.ReLU()),
        nn.Linear(hidden, variant.classes),
    )


def watch_cnn(variant: Variant) -> nn.Module:
    """export.models.watch_cnn: two 1-D convolutions over the windows of a smartwatch."""
    channels, samples = variant.shape
    first, second, hidden = (_scaled(count, variant) for count in (32, 48, 64))
    return nn.Sequential(
        *(nn.Conv1d(channels, first, 9, padding=4), nn.MaxPool1d(2), nn.ReLU()),
        *(nn.Conv1d(first, second, 5, padding=2), nn.MaxPool1d(2), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(second * (samples // 4), hidden), nn.ReLU()),
        nn.Linear(hidden, variant.classes),
    )


def vgg11(variant: Variant) -> nn.Module:
    """Source: Simonyan and Zisserman (arXiv 1409.1556), configuration A. Differs: one fully connected layer, for images of 32x32."""
    layers: list[nn.Module] = []
    before = variant.shape[0]
    for count, pooled in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        channels = _scaled(count, variant)
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, variant.classes))


def ds_cnn(variant: Variant) -> nn.Module:
    """A keyword spotter over [1, frames, coefficients]: a convolution, then four pairs of depthwise and pointwise ones.

    Source: Zhang et al., "Hello Edge" (arXiv 1711.07128), DS-CNN small; as there, the convolutions keep their biases before the norm.
    """
    channels = _scaled(64, variant)

    def normed(before: int, kernel: Shape, **options: int | Shape) -> list[nn.Module]:
        return [nn.Conv2d(before, channels, kernel, **options), nn.BatchNorm2d(channels), nn.ReLU()]  # type: ignore[arg-type]  # ints

    layers = normed(1, (10, 4), stride=(2, 2), padding=(5, 1))
    for _ in range(4)[: variant.blocks]:
        layers += normed(channels, (3, 3), padding=1, groups=channels) + normed(channels, (1, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, variant.classes))


def autoencoder(variant: Variant) -> nn.Module:
    """Two strided convolutions down, a code of 32 numbers, two transposed convolutions up to the input's shape."""
    channels, rows, columns = variant.shape
    first, second, code = (_scaled(count, variant) for count in (16, 32, 32))
    inner = (second, rows // 4, columns // 4)
    features = second * (rows // 4) * (columns // 4)
    down = [nn.Conv2d(channels, first, 3, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 3, 2, 1), nn.ReLU()]
    middle = [nn.Flatten(), nn.Linear(features, code), nn.Linear(code, features), nn.ReLU(), nn.Unflatten(1, inner)]
    up = [nn.ConvTranspose2d(second, first, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(first, channels, 4, 2, 1)]
    return nn.Sequential(*down, *middle, *up)


# ---- residual networks -----------------------------------------------------------------------------------------------


def resnet18(norm: Norm) -> Callable[[Variant], nn.Module]:
    """Source: He et al. (arXiv 1512.03385), in the form for small images: a 3x3 convolution and no pooling first.

    With group normalisation as in Wu and He (arXiv 1803.08494).
    """

    def build(variant: Variant) -> nn.Module:
        before = _scaled(64, variant)
        layers: list[nn.Module] = [_normed(variant.shape[0], before, 3, norm=norm)]
        blocks = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
        for count, stride in blocks[: variant.blocks]:
            channels = _scaled(count, variant)
            layers.append(_BasicBlock(before, channels, stride, norm))
            before = channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, variant.classes))

    return build


class _BasicBlock(nn.Module):
    def __init__(self, before: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _normed(before, channels, 3, stride=stride, norm=norm), _normed(channels, channels, 3, norm=norm, act=nn.Identity)
        )
        same = before == channels and stride == 1
        self.shortcut = nn.Identity() if same else _normed(before, channels, 1, stride=stride, norm=norm, act=nn.Identity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


# ---- inverted residuals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """One inverted residual: kernel, expanded channels, output channels, stride, squeeze-and-excite, activation."""

    kernel: int
    expanded: int
    channels: int
    stride: int
    excite: bool = False
    act: Activation = nn.ReLU6


def mobilenet_v2(variant: Variant) -> nn.Module:
    """Source: Sandler et al., "MobileNetV2" (arXiv 1801.04381), table 2."""
    table = ((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (3, 6, 32, 3, 2), (3, 6, 64, 4, 2), (3, 6, 96, 3, 1), (3, 6, 160, 3, 2), (3, 6, 320, 1, 1))
    return _inverted(variant, 32, nn.ReLU6, _stages(table, 32, variant), [1280], nn.ReLU6)


def efficientnet_lite0(variant: Variant) -> nn.Module:
    """Source: Tan and Le, "EfficientNet" (arXiv 1905.11946), table 1, with what its lite form leaves out: excitation and swish."""
    table = (
        *((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2)),
        *((5, 6, 112, 3, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1)),
    )
    return _inverted(variant, 32, nn.ReLU6, _stages(table, 32, variant), [1280], nn.ReLU6)


def mobilenet_v3_small(variant: Variant) -> nn.Module:
    """Source: Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244), table 2; the last wide layer is fully connected."""
    relu, swish = nn.ReLU, nn.Hardswish
    table = (
        *((3, 16, 16, 2, True, relu), (3, 72, 24, 2, False, relu), (3, 88, 24, 1, False, relu)),
        *((5, 96, 40, 2, True, swish), (5, 240, 40, 1, True, swish), (5, 240, 40, 1, True, swish)),
        *((5, 120, 48, 1, True, swish), (5, 144, 48, 1, True, swish)),
        *((5, 288, 96, 2, True, swish), (5, 576, 96, 1, True, swish), (5, 576, 96, 1, True, swish)),
    )
    stages = [_Stage(k, _scaled(e, variant), _scaled(c, variant), s, x, a) for k, e, c, s, x, a in table]
    return _inverted(variant, 16, swish, stages, [576, 1024], swish)


def _stages(table: Sequence[tuple[int, int, int, int, int]], before: int, variant: Variant) -> list[_Stage]:
    """Of rows (kernel, expansion, channels, repetitions, stride of the first)."""
    stages, wide = [], _scaled(before, variant)
    for kernel, expansion, count, repetitions, stride in table:
        channels = _scaled(count, variant)
        for number in range(repetitions):
            stages.append(_Stage(kernel, wide * expansion, channels, 1 if number else stride))
            wide = channels
    return stages


def _inverted(variant: Variant, stem: int, act: Activation, stages: Sequence[_Stage], head: Sequence[int], last: Activation) -> nn.Module:
    """A strided convolution, the stages, a 1x1 convolution and a mean, fully connected layers."""
    before = _scaled(stem, variant)
    layers: list[nn.Module] = [_normed(variant.shape[0], before, 3, stride=2, act=act)]
    for stage in stages[: variant.blocks]:
        layers.append(_InvertedResidual(before, stage))
        before = stage.channels
    wide, *hidden = (_scaled(count, variant) for count in head)
    layers += [_normed(before, wide, 1, act=last), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for count in hidden:
        layers += [nn.Linear(wide, count), last()]
        wide = count
    return nn.Sequential(*layers, nn.Linear(wide, variant.classes))


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, stage: _Stage) -> None:
        super().__init__()
        wide, act = stage.expanded, stage.act
        self.adds = stage.stride == 1 and before == stage.channels
        self.layers = nn.Sequential(
            nn.Identity() if wide == before else _normed(before, wide, 1, act=act),
            _normed(wide, wide, stage.kernel, stride=stage.stride, groups=wide, act=act),
            _Excite(wide) if stage.excite else nn.Identity(),
            _normed(wide, stage.channels, 1, act=nn.Identity),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.adds else y


class _Excite(nn.Module):
    """Each channel times a factor that all channels' means decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(4, channels // 4)
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.ReLU()),
            *(nn.Conv2d(squeezed, channels, 1), nn.Hardsigmoid()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x * self.gate(x)
        return y


# ---- sequences -------------------------------------------------------------------------------------------------------


class _Lstm(nn.Module):
    """Two layers over [channels, samples]; the last output is classified."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        hidden = _scaled(64, variant)
        self.lstm = nn.LSTM(variant.shape[0], hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, variant.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(x.transpose(1, 2))
        y: torch.Tensor = self.head(outputs[:, -1])
        return y


class _Transformer(nn.Module):
    """Four encoder layers over [channels, samples] with learned positions; the mean is classified.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), the encoder, with GELU.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        channels, samples = variant.shape
        wide = _scaled(64, variant)
        self.embed = nn.Linear(channels, wide)
        self.position = nn.Parameter(0.02 * torch.randn(samples, wide))
        layer = nn.TransformerEncoderLayer(wide, 4, 4 * wide, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, variant.blocks or 4, enable_nested_tensor=False)
        self.head = nn.Linear(wide, variant.classes)
        for parameter in self.encoder.parameters():  # torch copies one layer four times
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.encoder(self.embed(x.transpose(1, 2)) + self.position)
        scores: torch.Tensor = self.head(y.mean(1))
        return scores


# ---- parts -----------------------------------------------------------------------------------------------------------


def _scaled(count: int, variant: Variant) -> int:
    """A width, at least 4 and a multiple of 4."""
    return max(4, round(count * variant.width / 4) * 4)


def _normed(
    before: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, norm: Norm = "batch", act: Activation = nn.ReLU
) -> nn.Module:
    """A convolution that keeps the size at stride 1, its normalisation and activation."""
    convolution = nn.Conv2d(before, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    normal = nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(min(32, channels // 2), channels)
    return nn.Sequential(convolution, normal, act())


IMAGE, PICTURE, WINDOW = (1, 28, 28), (3, 32, 32), (6, 100)
MOBILE = (3, 96, 96)
"""The smallest resolution that MobileNets are published for."""

ZOO: dict[str, Model] = {
    "leaf_cnn": Model(leaf_cnn, Variant(1, IMAGE, 62), Variant(0.125, (1, 12, 12), 10)),
    "vgg11": Model(vgg11, Variant(1, PICTURE, 10), Variant(0.0625, PICTURE, 10)),
    "resnet18_bn": Model(resnet18("batch"), Variant(1, PICTURE, 10), Variant(0.125, (3, 12, 12), 10, blocks=3)),
    "resnet18_gn": Model(resnet18("group"), Variant(1, PICTURE, 10), Variant(0.125, (3, 12, 12), 10, blocks=3)),
    "mobilenet_v2": Model(mobilenet_v2, Variant(1, MOBILE, 1000), Variant(0.25, (3, 24, 24), 10, blocks=3)),
    "mobilenet_v3_small": Model(mobilenet_v3_small, Variant(1, MOBILE, 1000), Variant(0.25, (3, 32, 32), 10, blocks=4)),
    "efficientnet_lite0": Model(efficientnet_lite0, Variant(1, MOBILE, 1000), Variant(0.25, (3, 24, 24), 10, blocks=4)),
    "ds_cnn": Model(ds_cnn, Variant(1, (1, 49, 10), 12), Variant(0.125, (1, 25, 10), 12, blocks=1)),
    "watch_cnn": Model(watch_cnn, Variant(1, WINDOW, 7), Variant(0.25, (6, 24), 7)),
    "lstm": Model(_Lstm, Variant(1, WINDOW, 7), Variant(0.125, (6, 8), 7)),
    "transformer": Model(_Transformer, Variant(1, WINDOW, 7), Variant(0.125, (6, 8), 7, blocks=1)),
    "autoencoder": Model(autoencoder, Variant(1, IMAGE, 0), Variant(0.25, (1, 12, 12), 0), "mse"),
}
