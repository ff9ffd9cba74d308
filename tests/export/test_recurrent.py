"""LSTM and GRU: gradients against torch's own layers in float64, what torch exports of them, and what is refused."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edge_agent.trainer import Trainer
from export.memory import step_memory
from export.programs import build_programs, initial_vector
from export.torch_graph import graph_of_program
from regrow.errors import LocalError
from tests.export.drawing import CLASSES, constant, drawn, network, numbers
from tests.export.running import Arrays, check_against_torch

GATES = {"LSTM": 4, "GRU": 3}
ORDER = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2]}
"""Where ONNX's gates come in torch's order: torch has i, f, g, o and r, z, n; ONNX i, o, f, g and z, r, n."""


def as_torch(kind: str, array: torch.Tensor) -> torch.Tensor:
    """A weight's or bias's gates in torch's order."""
    gates = array.chunk(GATES[kind])
    return torch.cat([gates[index] for index in ORDER[kind]])


def torch_recurrent(kind: str, x: torch.Tensor, q: dict[str, torch.Tensor], states: list[torch.Tensor], reverse: bool, two: bool) -> Any:
    """torch's own layer on [steps, batch, inputs]: (y [steps, batch, directions * hidden], the last states)."""
    layer = torch._VF.lstm if kind == "LSTM" else torch._VF.gru  # type: ignore[attr-defined]  # torch's functional form is private
    flat = []
    for place in range(1 + two):
        flat += [as_torch(kind, q["w"][place]), as_torch(kind, q["r"][place])]
        flat += [as_torch(kind, half) for half in q["b"][place].chunk(2)]
    first = states if kind == "LSTM" else states[0]
    data = x.flip(0) if reverse else x
    y, *last = layer(data, first, flat, True, 1, 0.0, False, two, False)
    return (y.flip(0) if reverse else y), last


@drawn(30)
@given(
    kind=st.sampled_from(["LSTM", "GRU"]),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    steps=st.integers(1, 5),
    batch=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    used=st.sets(st.integers(0, 2), min_size=1),
    with_bias=st.booleans(),
    with_states=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gradients(
    kind: str,
    direction: str,
    steps: int,
    batch: int,
    sizes: tuple[int, int],
    used: set[int],
    with_bias: bool,
    with_states: bool,
    seed: int,
) -> None:
    """By the data, every weight, bias and trained initial states, whichever outputs are in use."""
    rng = np.random.default_rng(seed)
    (inputs, hidden), count, gates = sizes, 1 + (direction == "bidirectional"), GATES[kind]
    count_states = 2 if kind == "LSTM" else 1
    used = {output for output in used if output <= count_states} or {0}
    weights: Arrays = {"w": numbers(rng, count, gates * hidden, inputs), "r": numbers(rng, count, gates * hidden, hidden)}
    if with_bias:
        weights["b"] = numbers(rng, count, 2 * gates * hidden)
    if with_states:  # made of the data, so that they have gradients: [batch, steps, inputs] -> [directions, batch, hidden]
        weights |= {f"s{index}": numbers(rng, steps * inputs, count * hidden) for index in range(count_states)}
    names = ["a_t", "w", "r", "b" if with_bias else "", "", *([f"state{index}" for index in range(count_states)] if with_states else [])]
    outputs = [f"y{index}" if index in used else "" for index in range(count_states + 1)]
    extra = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        constant("flat_state", [-1, count, hidden]),
        helper.make_node("Transpose", ["a"], ["a_t"], perm=[1, 0, 2]),
        helper.make_node("Flatten", ["a"], ["a_f"]),
    ]
    for index in range(count_states * with_states):
        nodes.append(helper.make_node("MatMul", ["a_f", f"s{index}"], [f"flat{index}"]))
        nodes.append(helper.make_node("Reshape", [f"flat{index}", "flat_state"], [f"apart{index}"]))
        nodes.append(helper.make_node("Transpose", [f"apart{index}"], [f"state{index}"], perm=[1, 0, 2]))
    nodes.append(helper.make_node(kind, names, outputs, hidden_size=hidden, direction=direction, **extra))
    pieces = []
    for index in sorted(used):
        perm = [2, 0, 1, 3] if index == 0 else [1, 0, 2]
        nodes.append(helper.make_node("Transpose", [f"y{index}"], [f"y{index}_t"], perm=perm))
        nodes.append(helper.make_node("Flatten", [f"y{index}_t"], [f"y{index}_f"]))
        pieces.append(f"y{index}_f")
    nodes.append(helper.make_node("Concat", pieces, ["o"], axis=1))

    def forward(x: torch.Tensor, q: dict[str, torch.Tensor]) -> torch.Tensor:
        full = q if with_bias else q | {"b": torch.zeros((count, 2 * gates * hidden), dtype=x.dtype)}
        a = x + q["p"]
        flat = a.flatten(1)
        states = [torch.zeros((count, len(x), hidden), dtype=x.dtype)] * count_states
        if with_states:
            states = [(flat @ q[f"s{index}"]).reshape(-1, count, hidden).transpose(0, 1) for index in range(count_states)]
        y, last = torch_recurrent(kind, a.transpose(0, 1), full, states, direction == "reverse", count == 2)
        found = [y.reshape(steps, len(x), count, hidden).permute(1, 0, 2, 3), *(state.transpose(0, 1) for state in last)]
        return torch.cat([found[index].flatten(1) for index in sorted(used)], 1) @ q["head"]

    features = sum(count * hidden * (steps if index == 0 else 1) for index in used)
    weights |= {"p": numbers(rng, steps, inputs) / np.float32(4), "head": numbers(rng, features, CLASSES)}
    x = numbers(rng, batch, steps, inputs)
    check_against_torch(network(nodes, weights, [steps, inputs]), forward, weights, x, rng.integers(0, CLASSES, batch))


class Recurrent(torch.nn.Module):
    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.body = getattr(torch.nn, kind)(5, 6, num_layers=2, batch_first=True, **settings)
        self.head = torch.nn.Linear(6 * (2 if settings.get("bidirectional") else 1), CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.body(x)
        return self.head(y[:, :7].mean(1))  # type: ignore[no-any-return]  # torch's modules give Any


def exported(net: torch.nn.Module) -> onnx.ModelProto:
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(2, 8, 5),), file, dynamo=False, opset_version=18, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_two_layers_that_torch_exports_learn_as_torch_does(kind: str, bidirectional: bool) -> None:
    """The loss over 20 steps of SGD, and the same model on the torch trainer's graph."""
    torch.manual_seed(0)
    net = Recurrent(kind, bidirectional=bidirectional)
    model = exported(net)
    assert kind in {node.op_type for node in model.graph.node}
    programs, vector = build_programs(model), initial_vector(model)
    trainer = Trainer(programs)
    biases = [tensor for tensor in trainer.layout.tensors if tensor.always_kept]
    assert sum(tensor.size for tensor in biases) == sum(p.numel() for p in net.parameters() if p.ndim == 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 8, 5)).astype(np.float32)
    y = (x[:, 3:, 0].sum(1) > 0).astype(np.int64)
    graph = graph_of_program(programs["evaluate"])
    named = {name: torch.tensor(array, dtype=torch.float64) for name, array in trainer.layout.unflatten(vector).items()}
    exact = net.double()(torch.tensor(x, dtype=torch.float64))
    torch.testing.assert_close(graph.forward(named, torch.tensor(x, dtype=torch.float64)), exact, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(torch.tensor(x, dtype=torch.float64)), torch.tensor(y))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        result = trainer.train(vector, None, [(x, y)], 0.5)
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        vector = result.vector
    assert step_memory(programs).levels, "the shape of every value follows from the batch"


def test_what_is_not_covered_is_named() -> None:
    def refused(kind: str = "LSTM", inputs: list[str] | None = None, **attributes: Any) -> str:
        gates = GATES[kind]
        weights = {"w": np.ones((1, gates * 2, 3), np.float32), "r": np.ones((1, gates * 2, 2), np.float32)}
        weights |= {"p": np.ones((4, 3), np.float32), "head": np.ones((8, CLASSES), np.float32), "peep": np.ones((1, 6), np.float32)}
        weights = {name: array for name, array in weights.items() if name != "peep" or "peep" in (inputs or [])}
        nodes = [
            constant("lengths", [4, 4], np.int32),
            helper.make_node("Transpose", ["a"], ["a_t"], perm=[1, 0, 2]),
            helper.make_node(kind, inputs or ["a_t", "w", "r"], ["y"], name="cell", hidden_size=2, **attributes),
            helper.make_node("Transpose", ["y"], ["o"], perm=[2, 0, 1, 3]),
        ]
        with pytest.raises(LocalError) as error:
            build_programs(network(nodes, weights, [4, 3]))
        return str(error.value)

    assert "LSTM (node 'cell'" in refused(clip=1.0)
    assert "'clip'" in refused(clip=1.0)
    assert "activations ['Sigmoid', 'Relu', 'Tanh']" in refused(activations=["Sigmoid", "Relu", "Tanh"])
    assert "input_forget" in refused(input_forget=1)
    assert "peepholes" in refused(inputs=["a_t", "w", "r", "", "", "", "", "peep"])
    assert "linear_before_reset = 0" in refused("GRU")
    assert "sequence_lens" in refused("GRU", ["a_t", "w", "r", "", "lengths"], linear_before_reset=1)
