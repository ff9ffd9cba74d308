"""Which layers are the last ones, and that the others stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edge_agent.trainer import Trainer
from export.forward import read_forward
from export.layers import frozen_parameters
from export.programs import build_programs, initial_vector, with_weights
from regrow.errors import LocalError
from regrow.task import Training
from tests.export.running import model_of

SIZES = {"scale": (5,), "w1": (5, 6), "b1": (6,), "norm": (6,), "w2": (4, 6), "head": (4, 3), "b3": (3,)}
NODES = [
    helper.make_node("Mul", ["x", "scale"], ["scaled"]),
    helper.make_node("MatMul", ["scaled", "w1"], ["wide"]),
    helper.make_node("Add", ["wide", "b1"], ["shifted"]),
    helper.make_node("Mul", ["shifted", "norm"], ["normed"]),
    helper.make_node("Reshape", ["w2", "as_it_is"], ["w2_same"]),
    helper.make_node("Transpose", ["w2_same"], ["w2_turned"], perm=[1, 0]),
    helper.make_node("MatMul", ["normed", "w2_turned"], ["narrow"]),
    helper.make_node("Tanh", ["narrow"], ["bent"]),
    helper.make_node("MatMul", ["bent", "head"], ["almost"]),
    helper.make_node("Add", ["almost", "b3"], ["logits"]),
]


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in SIZES.items()}
    return model_of(NODES, weights | {"as_it_is": np.array([4, 6])}, [5], 3)


@pytest.mark.parametrize(
    ("train_last", "trained"),
    [(1, ["head", "b3"]), (2, ["w2", "head", "b3"]), (3, list(SIZES))],
)
def test_layers_are_counted_from_the_output_and_own_what_follows_them(train_last: int, trained: list[str]) -> None:
    forward = read_forward(model(), train_last)
    assert list(forward.parameters) == trained
    assert set(SIZES) - set(trained) <= forward.constants.keys()


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(LocalError, match=r"train_last .*: 4, but the model has 3 layers"):
        read_forward(model(), 4)


def test_a_shared_weight_belongs_to_its_last_layer() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    assert frozen_parameters(nodes, {"w": np.eye(2), "v": np.eye(2)}, (), 1) == ["v"]


def test_what_is_trained_moves_as_it_does_in_the_whole_model_and_the_rest_stays() -> None:
    whole, last = build_programs(model()), build_programs(model(), training=Training(train_last=2))
    rng = np.random.default_rng(1)
    batches = [(rng.normal(size=(8, 5)).astype(np.float32), rng.integers(0, 3, 8))]
    everything, vector = Trainer(whole), initial_vector(model(), 2)
    free = everything.layout.unflatten(everything.train(initial_vector(model()), None, batches, 0.1).vector)
    trainer = Trainer(last)
    kept = np.ones(vector.size, np.bool_)
    for mask in (None, kept):
        result = trainer.train(vector, mask, batches, 0.1)
        for name, value in trainer.layout.unflatten(result.vector).items():
            assert np.allclose(value, free[name], rtol=1e-6, atol=1e-7)
            assert not np.array_equal(value, trainer.layout.unflatten(vector)[name])
    assert trainer.evaluate(vector, *batches[0]).loss == pytest.approx(everything.evaluate(initial_vector(model()), *batches[0]).loss)
    trained = with_weights(model(), result.vector, 2)
    written = {tensor.name: numpy_helper.to_array(tensor) for tensor in trained.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model().graph.initializer}
    mine = trainer.layout.unflatten(result.vector)
    for name in SIZES:
        assert np.array_equal(written[name], mine.get(name, before[name]))
    with pytest.raises(LocalError, match="unflatten"):
        with_weights(model(), result.vector)
