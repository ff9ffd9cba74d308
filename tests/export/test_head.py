"""The last layer of a model, for devices that train it for themselves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edge_agent.trainer import Trainer
from export.head import head_programs, open_head
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from regrow.task import Training

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
