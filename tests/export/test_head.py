"""The last layer of a model, for devices that train it for themselves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from edge_agent.trainer import Trainer
from export.head import head_programs, open_head
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from regrow.errors import LocalError
from regrow.task import Training
from tests.export.running import model_of
from tests.export.unit_models import batch_norm_net

HEAD = {"fc2.weight", "fc2.bias"}


def run(model: onnx.ModelProto, feed: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    scores: NDArray[np.float32] = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)[0]
    return scores


def test_an_open_model_says_the_same_and_can_be_overridden() -> None:
    model = digits_mlp(1)
    x = np.random.default_rng(0).random((5, 64), np.float32)
    opened = open_head(model)
    np.testing.assert_array_equal(run(opened, {"x": x}), run(model, {"x": x}))
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    zeros = {name: np.zeros(shapes[name], np.float32) for name in HEAD}
    assert not run(opened, {"x": x, **zeros}).any()
    assert open_head(opened) == opened


def test_a_step_of_the_head_is_that_of_the_whole_model_in_the_last_layer_and_nowhere_else() -> None:
    model = digits_mlp(1)
    rng = np.random.default_rng(0)
    batch = (rng.random((20, 64), np.float32), rng.integers(0, 10, 20))
    programs = head_programs(model)
    head = Trainer(programs)
    first = np.frombuffer(programs["initial"], "<f4").copy()
    small = head.layout.unflatten(head.train(first, None, [batch], 0.5).vector)
    whole = Trainer(build_programs(model))
    large = whole.layout.unflatten(whole.train(initial_vector(model), None, [batch], 0.5).vector)
    assert small.keys() == HEAD
    for name, values in small.items():
        np.testing.assert_allclose(values, large[name], rtol=1e-6, atol=1e-7)
    trained = open_head(model)
    assert not np.allclose(run(trained, {"x": batch[0], **small}), run(trained, {"x": batch[0]}))


def test_the_head_takes_the_tasks_own_step() -> None:
    programs = head_programs(digits_mlp(1), Training(optimizer="adam", label_smoothing=0.1))
    assert b"adam" in programs["train"]


def test_the_head_of_a_model_with_batch_normalisation_is_trained_behind_what_stays_as_it_is() -> None:
    """Training improves the open model itself, whose layers before normalise with the running statistics that it came with."""
    model = batch_norm_net((2, 6, 6), 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 2, 6, 6), np.float32)
    other = {"fc2": 2 * rng.standard_normal((6, 3), np.float32), "fc2.bias": np.zeros(3, np.float32)}
    y = run(open_head(model), {"x": x, **other}).argmax(1)  # what another head says, so that there is something to learn
    for training in (Training(), Training(train_last=2, optimizer="adam")):
        programs = head_programs(model, training)
        assert sorted(programs) == ["initial", "layout", "train"]
        head = Trainer(programs)
        first = np.frombuffer(programs["initial"], "<f4").copy()
        batches = [(x[start : start + 20], y[start : start + 20]) for start in range(0, 120, 20)] * 20
        found = head.train(first, None, batches, 0.1)
        mine = head.layout.unflatten(found.vector)
        assert mine.keys() == {"fc2", "fc2.bias"}
        opened = open_head(model)
        scores = run(opened, {"x": x, **mine}).astype(np.float64)
        before = run(model, {"x": x})
        np.testing.assert_allclose(run(opened, {"x": x}), before, rtol=1e-6, atol=1e-6)
        assert np.mean(scores.argmax(1) == y) > np.mean(before.argmax(1) == y) + 0.1

        def loss(values: NDArray[np.float64]) -> float:
            return float(np.mean(np.log(np.exp(values).sum(1)) - values[np.arange(len(y)), y]))

        # What training says of its first batch is what inference gives there: the same means and variances.
        one = head.train(first, None, [(x, y)], 0.05)
        assert one.loss == pytest.approx(loss(before.astype(np.float64)), rel=1e-5)
        assert loss(scores) < 0.7 * one.loss


def test_batch_normalisation_behind_the_last_layer_has_no_head() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3)), "scale": np.ones(3), "bias": np.zeros(3), "mean": np.zeros(3), "variance": np.ones(3)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
        onnx.helper.make_node("BatchNormalization", ["a", "scale", "bias", "mean", "variance"], ["logits"]),
    ]
    with pytest.raises(LocalError, match="behind its last layer"):
        head_programs(model_of(nodes, {name: array.astype(np.float32) for name, array in weights.items()}, [4], 3))
