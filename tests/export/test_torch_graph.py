"""Forward graphs on torch: what running.check_against_torch leaves open, which checks every op. Clients at once, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from export.models import MODELS
from export.programs import build_programs
from export.rules import RULES
from export.torch_graph import OPS, TorchGraph, graph_of_model, graph_of_program
from regrow.errors import LocalError
from tests.export import unit_models
from tests.export.drawing import CLASSES, constant, network, numbers
from tests.export.running import model_of


def test_whatever_can_be_trained_on_devices_can_be_trained_on_torch() -> None:
    assert RULES.keys() <= OPS.keys()


def parameters_of(graph: TorchGraph, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(rng.normal(0, 0.3, shape), dtype=dtype) for name, shape in graph.parameters.items()}


SMALL: dict[str, Any] = {name: make for name, make in unit_models.MODELS.items() if name != "group norm"}


@pytest.mark.parametrize("name", SMALL)
def test_clients_at_once_are_the_clients_one_by_one(name: str) -> None:
    """Logits and gradients, in float64, with other weights and other data for every client."""
    graph = graph_of_model(SMALL[name]())
    each = [parameters_of(graph, seed) for seed in range(3)]
    x = torch.tensor(np.random.default_rng(5).normal(size=(3, 4, *graph.input_shape)))
    stacked = {key: torch.stack([mine[key] for mine in each]).requires_grad_() for key in graph.parameters}
    together = torch.func.vmap(graph.forward)(stacked, x)
    gradients = torch.autograd.grad(together.square().sum(), list(stacked.values()))
    for client, mine in enumerate(each):
        leaves = {key: tensor.requires_grad_() for key, tensor in mine.items()}
        alone = graph.forward(leaves, x[client])
        torch.testing.assert_close(together[client], alone, rtol=1e-9, atol=1e-10)
        for found, wanted in zip(gradients, torch.autograd.grad(alone.square().sum(), list(leaves.values())), strict=True):
            torch.testing.assert_close(found[client], wanted, rtol=1e-8, atol=1e-9)


def test_a_shape_that_is_computed_from_other_shapes() -> None:
    """As torch exports a view: the batch read off the data, joined with a number."""
    nodes = [
        helper.make_node("Shape", ["a"], ["shape"]),
        constant("zero", [0]),
        constant("rest", [-1]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], axis=0),
        helper.make_node("Concat", ["batch", "rest"], ["rows"], axis=0),
        helper.make_node("Reshape", ["a", "rows"], ["o"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"p": numbers(rng, 2, 3), "head": numbers(rng, 6, CLASSES)}
    graph = graph_of_model(network(nodes, weights, [2, 3]))
    x = torch.tensor(numbers(rng, 5, 2, 3))
    parameters = {name: torch.tensor(array) for name, array in weights.items()}
    torch.testing.assert_close(graph.forward(parameters, x), (x + parameters["p"]).reshape(5, 6) @ parameters["head"])


def test_what_torch_does_not_run_here_is_named_with_its_node() -> None:
    def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
        return network(nodes, {"p": np.ones((2, 6), np.float32), "head": np.ones((12, CLASSES), np.float32)}, [2, 6])

    with pytest.raises(LocalError, match=r"'curve'.*Atan.*onnxruntime"):
        graph_of_model(model(helper.make_node("Atan", ["a"], ["o"], name="curve")))
    node = helper.make_node("Pad", ["a", "ends"], ["o"], name="mirror", mode="reflect")
    graph = graph_of_model(model(constant("ends", [0, 0, 0, 0, 0, 0]), node))
    with pytest.raises(LocalError, match=r"'mirror'.*Pad.*reflect"):
        graph.forward(parameters_of(graph, 0), torch.zeros((1, 2, 6), dtype=torch.float64))


def test_only_evaluation_programs_are_read() -> None:
    programs = build_programs(MODELS["digits_mlp"](0))
    with pytest.raises(LocalError, match="not an evaluation program"):
        graph_of_program(programs["train"])
    with pytest.raises(LocalError, match="not ONNX"):
        graph_of_program(b"\xff\xff\xff")
    plain = model_of([helper.make_node("MatMul", ["x", "w"], ["logits"])], {"w": np.ones((3, 2), np.float32)}, [3], 2)
    with pytest.raises(LocalError, match="not an evaluation program"):
        graph_of_program(plain.SerializeToString())
