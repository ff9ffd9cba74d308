"""The last layer of a model, for devices that train it for themselves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_agent.trainer import Trainer
from export.head import head_programs, last_layer, open_head
from export.models import MODELS, digits_mlp
from export.programs import build_programs, initial_vector
from regrow.errors import LocalError
from regrow.parameters import Layout


@pytest.mark.parametrize("name", ["leaf_cnn", "watch_cnn"])
def test_the_last_layer_of_models_of_ours(name: str) -> None:
    if name not in MODELS:
        pytest.skip("not there")
    assert last_layer(MODELS[name](1)) == ["fc2.weight", "fc2.bias"]


def test_a_bias_that_is_added_behind_the_matrix_belongs_to_it() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["s"]),
        helper.make_node("Add", ["s", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("a", (4, 4)), ("w", (4, 4)), ("b", (4,)))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert last_layer(model) == ["w", "b"]
    assert Layout.from_json(head_programs(model)["layout"]).size == 20


def test_a_model_without_weights_has_none() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    with pytest.raises(LocalError, match="no last layer"):
        last_layer(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


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
    zeros = {name: np.zeros(shapes[name], np.float32) for name in last_layer(model)}
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
    assert small.keys() == set(last_layer(model))
    for name, values in small.items():
        np.testing.assert_allclose(values, large[name], rtol=1e-6, atol=1e-7)
    trained = open_head(model)
    assert not np.allclose(run(trained, {"x": batch[0], **small}), run(trained, {"x": batch[0]}))
