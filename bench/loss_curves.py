"""The loss of 500 steps on real data: ours beside five runs of torch, all in float32, each with its own weights and batches.

Inside the spread means: on a logarithmic scale, the running mean of our loss lies in the interval in which a sixth run of torch would be
with 95 % probability (normal distribution, variance unknown: mean +- t * s * sqrt(1 + 1/5), t = 2.776), at 95 % of the steps or more. The
share of the steps between the smallest and the largest of the five is given too; of a sixth run of torch itself that would be two thirds.
A seed may well be an odd one: our twin is torch with our weights and batches, and says whether the seed or onnxruntime is outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from parity import session_of

from export.from_torch import from_torch
from export.programs import build_programs
from export.zoo import IMAGE, PICTURE, WINDOW, ZOO, Variant
from regrow.task import Training
from testbed.datasets import Dataset, load

TORCH_SEEDS, OUR_SEED = (1, 2, 3, 4, 5), 6
SMOOTHED_STEPS = 25
T_95 = 2.776
"""0.975 quantile of Student's t with 4 degrees of freedom."""


SGD = Training(learning_rate=0.05)
ADAM = Training(learning_rate=0.001, optimizer="adam")


@dataclass(frozen=True)
class Setting:
    """What a model is trained on, and how; narrower than the real one where two cores would take hours."""

    data: str
    variant: Variant
    training: Training = SGD
    batch: int = 20


SETTINGS: dict[str, Setting] = {
    "leaf_cnn": Setting("fashion-mnist", Variant(1, IMAGE, 10)),
    "vgg11": Setting("fashion-mnist", Variant(0.25, PICTURE, 10), ADAM),
    "resnet18_bn": Setting("fashion-mnist", Variant(0.125, PICTURE, 10)),
    "resnet18_gn": Setting("fashion-mnist", Variant(0.125, PICTURE, 10)),
    "mobilenet_v2": Setting("fashion-mnist", Variant(0.25, PICTURE, 10), batch=8),
    "mobilenet_v3_small": Setting("fashion-mnist", Variant(0.5, PICTURE, 10), batch=8),
    "efficientnet_lite0": Setting("fashion-mnist", Variant(0.25, PICTURE, 10), batch=8),
    "ds_cnn": Setting("watch", Variant(1, (1, 100, 6), 7)),
    "watch_cnn": Setting("watch", Variant(1, WINDOW, 7)),
    "lstm": Setting("watch", Variant(1, WINDOW, 7), ADAM),
    "transformer": Setting("watch", Variant(0.5, WINDOW, 7), ADAM),
    "autoencoder": Setting(
        "fashion-mnist", Variant(1, IMAGE, 0), Training(learning_rate=0.001, optimizer="adam", loss="mse", target="input")
    ),
}


@dataclass(frozen=True)
class Curves:
    """Smoothed losses by step: ours and our twin's [steps], torch's [5, steps]; the first is the mean of the first SMOOTHED_STEPS steps."""

    ours: NDArray[np.float64]
    twin: NDArray[np.float64]
    torch: NDArray[np.float64]

    def interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where a sixth run of torch would be, step by step."""
        logs = np.log(self.torch)
        mean, reach = logs.mean(0), T_95 * logs.std(0, ddof=1) * np.sqrt(1 + 1 / len(logs))
        return np.exp(mean - reach), np.exp(mean + reach)

    def share_inside(self, losses: NDArray[np.float64]) -> float:
        low, high = self.interval()
        return float(np.mean((low <= losses) & (losses <= high)))

    def share_between(self) -> float:
        return float(np.mean((self.torch.min(0) <= self.ours) & (self.ours <= self.torch.max(0))))


def curves_of(name: str, steps: int) -> Curves:
    """Train one model seven times, torch on one thread."""
    setting = SETTINGS[name]
    data = load(setting.data).train
    torchs = [_smoothed(_torch_losses(name, setting, data, seed, steps)) for seed in TORCH_SEEDS]
    twin = _smoothed(_torch_losses(name, setting, data, OUR_SEED, steps))
    return Curves(_smoothed(_our_losses(name, setting, data, steps)), twin, np.stack(torchs))


def _smoothed(losses: list[float]) -> NDArray[np.float64]:
    return np.convolve(losses, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), "valid")


def _batches(setting: Setting, data: Dataset, seed: int, steps: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Drawn with replacement; pictures of 28x28 get a margin and three equal channels, windows one channel and time first."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(data.x), setting.batch)
        x = data.x[rows]
        if setting.variant.shape == PICTURE:
            x = np.repeat(np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=float(data.x.min())), 3, axis=1)
        elif setting.variant.shape == (1, 100, 6):
            x = np.ascontiguousarray(x.transpose(0, 2, 1)[:, np.newaxis])
        yield x, data.y[rows]


def _torch_losses(name: str, setting: Setting, data: Dataset, seed: int, steps: int) -> list[float]:
    module, training, losses = ZOO[name].module(setting.variant, seed).train(), setting.training, []
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(module.parameters(), lr=training.learning_rate)
    for x, y in _batches(setting, data, seed, steps):
        optimizer.zero_grad()
        inputs = torch.tensor(x)
        output = module(inputs)
        if training.loss == "mse":
            loss = torch.nn.functional.mse_loss(output, inputs)
        else:
            loss = torch.nn.functional.cross_entropy(output, torch.tensor(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _our_losses(name: str, setting: Setting, data: Dataset, steps: int) -> list[float]:
    """The train program, fed with what it gave; the optimizer's state begins at zero."""
    module = ZOO[name].module(setting.variant, OUR_SEED)
    model = from_torch(module, torch.zeros(1, *setting.variant.shape))
    session = session_of(build_programs(model, training=setting.training)["train"])
    weights = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    state = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs() if i.name.startswith("state:")}
    moving: dict[str, Any] = {**weights, **state}
    fixed = {"sample_weight": np.ones(setting.batch, np.float32), "learning_rate": np.array(setting.training.learning_rate, np.float32)}
    names, losses = ["loss", *(f"new:{name}" for name in moving)], []
    for x, y in _batches(setting, data, OUR_SEED, steps):
        feed = {"x": x} if setting.training.target == "input" else {"x": x, "y": y}
        loss, *new = session.run(names, {**feed, **fixed, **moving})
        moving = dict(zip(moving, map(np.asarray, new), strict=True))
        losses.append(float(loss))
    return losses
