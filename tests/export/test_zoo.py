"""The zoo's small variants: 20 steps, teacher-forced, every gradient against torch in float64. bench/zoo.py does it for the real ones."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bench import parity
from export.check import problems_of
from export.from_torch import from_torch
from export.programs import build_programs
from export.rules import RULES
from export.work import multiply_adds
from export.zoo import ZOO

torch.set_num_threads(1)
STEPS = 20


def tolerance(name: str) -> float:
    module = ZOO[name].module(ZOO[name].small, 0)
    return 1e-4 if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()) else 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_every_gradient_is_torchs_and_model_check_says_that_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[onnx.ModelProto] = []

    def exported(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
        made.append(from_torch(module, example))
        return made[0]

    monkeypatch.setattr(parity, "from_torch", exported)
    found = parity.compare(ZOO[name], ZOO[name].small, batch=4, steps=STEPS)
    assert found.steps == STEPS
    assert found.worst <= tolerance(name), found
    assert found.worst_loss <= 1e-5, found
    assert found.moved <= 1e-5, found
    assert problems_of(made[0], parity.training_of(ZOO[name])) == []
    assert multiply_adds(made[0]) > 0


def test_a_gradient_that_is_a_little_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the windows' CNN gets a gradient that is too large by 2e-5 of itself."""
    right = RULES["Gemm"]

    def wrong(site):  # type: ignore[no-untyped-def]  # as right
        gradients = right(site)
        if site.node.input[1] == "9.weight":
            gradients[2] = site.graph.emit("Mul", gradients[2], site.graph.real(1.00002))
        return gradients

    monkeypatch.setitem(RULES, "Gemm", wrong)
    found = parity.compare(ZOO["watch_cnn"], ZOO["watch_cnn"].small, batch=4, steps=1)
    assert found.where == "9.bias"
    assert found.worst == pytest.approx(2e-5, rel=0.1)


def test_torch_follows_decisions_and_says_how_far_it_was_moved() -> None:
    """The same batch decides the same; with one number of it changed, units have other signs, and following them moves torch visibly."""
    model = ZOO["watch_cnn"]
    module = model.module(model.small, 0)
    program = parity.Watched(build_programs(from_torch(module, torch.zeros(1, *model.small.shape)))["train"])
    x = np.random.default_rng(0).standard_normal((4, *model.small.shape)).astype(np.float32)
    feed = {name: parameter.detach().numpy().astype(np.float32) for name, parameter in module.named_parameters()}
    feed |= {"y": np.zeros(4, np.int64), "sample_weight": np.ones(4, np.float32), "learning_rate": np.array(1, np.float32)}
    exact = torch.tensor(x, dtype=torch.float64)
    with parity.Follower(program.run({**feed, "x": x})[1]) as same:
        output = module.double()(exact)
    assert same.moved <= 1e-5
    torch.testing.assert_close(output, module(exact), rtol=1e-5, atol=1e-5)
    x[0, 0, 0] += 1
    with parity.Follower(program.run({**feed, "x": x})[1]) as other:
        module(exact)
    assert other.otherwise >= 1
    assert other.moved > 1e-3
