"""The models that come with Regrow: their sizes, what is always kept, and their training step against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.forward import read_forward
from export.models import MODELS, leaf_cnn, reduced_cnn
from export.programs import initial_vector, layout_of
from tests.export.running import check_against_torch, session_of

functional = torch.nn.functional
Values = dict[str, torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]

SHAPES: dict[str, tuple[int, tuple[int, ...], int]] = {
    # parameters, input, classes
    "digits_mlp": (2_410, (64,), 10),
    "leaf_cnn": (6_603_710, (1, 28, 28), 62),
    "reduced_cnn": (52_266, (1, 28, 28), 10),
    "resnet18_gn": (11_173_962, (3, 32, 32), 10),
    "vgg11": (9_225_610, (3, 32, 32), 10),
    "watch_cnn": (86_807, (6, 100), 7),
}


def plain(x: torch.Tensor, p: Values, act: Activation, pooled: tuple[int, ...], stride: int = 1) -> torch.Tensor:
    """Convolutions, some of them pooled, activated *before* the pool as papers write it, then linear layers."""
    number = 1
    while f"conv{number}.weight" in p:
        weight = p[f"conv{number}.weight"]
        x = act(functional.conv2d(x, weight, p[f"conv{number}.bias"], stride=stride, padding=weight.shape[2] // 2))
        if number in pooled:
            x = functional.max_pool2d(x, 2)
        number += 1
    x, number = x.flatten(1), 1
    while f"fc{number + 1}.weight" in p:
        x = act(functional.linear(x, p[f"fc{number}.weight"], p[f"fc{number}.bias"]))
        number += 1
    return functional.linear(x, p[f"fc{number}.weight"], p[f"fc{number}.bias"])


def normalised(x: torch.Tensor, p: Values, name: str, stride: int = 1) -> torch.Tensor:
    weight = p[f"{name}.weight"]
    x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    return functional.group_norm(x, 32, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"])


def resnet(x: torch.Tensor, p: Values, act: Activation) -> torch.Tensor:
    x = act(normalised(x, p, "conv1"))
    for stage in range(1, 5):
        for block, stride in ((f"stage{stage}.block1", 1 if stage == 1 else 2), (f"stage{stage}.block2", 1)):
            branch = normalised(act(normalised(x, p, f"{block}.conv1", stride)), p, f"{block}.conv2")
            x = act(branch + (normalised(x, p, f"{block}.shortcut", stride) if f"{block}.shortcut.weight" in p else x))
    return functional.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])


TORCH: dict[str, Callable[[torch.Tensor, Values, Activation], torch.Tensor]] = {
    "leaf_cnn": lambda x, p, act: plain(x, p, act, (1, 2)),
    "reduced_cnn": lambda x, p, act: plain(x, p, act, (), stride=2),
    "vgg11": lambda x, p, act: plain(x, p, act, (1, 2, 4, 6, 8)),
    "resnet18_gn": resnet,
}


def weights_of(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_every_model_has_its_documented_size_and_keeps_its_vectors() -> None:
    assert MODELS.keys() == SHAPES.keys()
    for name, factory in MODELS.items():
        count, shape, classes = SHAPES[name]
        model = factory(0)
        forward = read_forward(model)
        assert (factory.__name__, model.graph.name) == (name, name)
        assert f"{count:,}".replace(",", " ") in (factory.__doc__ or "")
        assert (sum(array.size for array in forward.parameters.values()), forward.input_shape[1:], forward.classes) == (
            count,
            shape,
            classes,
        )
        kept = {tensor.name for tensor in layout_of(forward).tensors if tensor.always_kept}
        assert kept == {key for key in forward.parameters if key.endswith((".bias", ".norm.weight"))}


def test_the_number_of_classes_is_free() -> None:
    assert read_forward(leaf_cnn(0, classes=10)).classes == 10
    assert initial_vector(reduced_cnn(0, 62)).size == 52_266 + 52 * 65


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_one_model(name: str) -> None:
    assert MODELS[name](3).SerializeToString(deterministic=True) == MODELS[name](3).SerializeToString(deterministic=True)
    assert MODELS[name](3).SerializeToString(deterministic=True) != MODELS[name](4).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", ["leaf_cnn", "reduced_cnn"])
def test_one_step_matches_float64(name: str) -> None:
    check_step(name, MODELS[name](1), torch.relu, batch=3)


@pytest.mark.parametrize("name", ["vgg11", "resnet18_gn"])
def test_one_step_of_a_deep_model_matches_float64(name: str) -> None:
    """With tanh for ReLU. Among half a million ReLUs some input is so near 0 that float32 and float64 see different signs."""
    model = MODELS[name](1)
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Tanh"
    check_step(name, model, torch.tanh, batch=1)


def check_step(name: str, model: onnx.ModelProto, act: Activation, batch: int) -> None:
    _, shape, classes = SHAPES[name]
    rng = np.random.default_rng(5)
    x = rng.normal(size=(batch, *shape)).astype(np.float32)
    check_against_torch(model, lambda values, p: TORCH[name](values, p, act), weights_of(model), x, rng.integers(0, classes, batch))


@pytest.mark.parametrize("name", TORCH)
def test_the_logits_are_those_of_the_paper_s_network(name: str) -> None:
    """ReLU and all; and at the start they are of the size of 1, neither vanishing nor exploding."""
    model = MODELS[name](2)
    x = np.random.default_rng(6).normal(size=(2, *SHAPES[name][1])).astype(np.float32)
    (ours,) = session_of(model.SerializeToString()).run(["logits"], {"x": x})
    exact = {key: torch.tensor(array, dtype=torch.float64) for key, array in weights_of(model).items()}
    theirs = TORCH[name](torch.tensor(x, dtype=torch.float64), exact, torch.relu).numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert 0.1 < np.linalg.norm(theirs) / math.sqrt(theirs.size) < 10
