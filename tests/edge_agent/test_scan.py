"""What is read of a model before onnxruntime sees it: here, how many tokens it knows. What is refused: tests/attacks."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edge_agent.inference import Inference  # noqa: E402
from edge_agent.scan import vocabulary  # noqa: E402
from edge_agent.trainer import Trainer  # noqa: E402
from export.programs import build_programs, initial_vector  # noqa: E402
from regrow.errors import LocalError, PeerError  # noqa: E402

TOKENS = 30


def words_model(table_dtype: type = np.float32) -> onnx.ModelProto:
    """int64 [batch, 4] -> scores of 3 classes."""
    rng = np.random.default_rng(0)
    weights = {"table": rng.random((TOKENS, 5)), "w": rng.random((20, 3))}
    tensors = [
        numpy_helper.from_array(weights["table"].astype(table_dtype), "table"),
        numpy_helper.from_array(weights["w"].astype("f4"), "w"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["words"]),
        helper.make_node("Flatten", ["words"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["scores"]),
    ]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
    ]
    graph = helper.make_graph(nodes, "words", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_every_program_of_a_task_knows_its_vocabulary() -> None:
    model = words_model()
    trainer = Trainer(build_programs(model))
    for masked in (False, True):
        assert trainer.examples(masked=masked).tokens == TOKENS
    x, y = np.zeros((2, 4), np.int64), np.zeros(2, np.int64)
    x[1, 2] = TOKENS
    for run in (
        lambda: trainer.train(initial_vector(model), None, [(x, y)], 0.1),
        lambda: trainer.evaluate(initial_vector(model), x, y),
    ):
        with pytest.raises(LocalError, match=r"row 1 \(the first is 0\): token 30, but the model's tokens are 0 to 29"):
            run()


def test_the_trainer_on_torch_knows_it_too() -> None:
    torch_graph = pytest.importorskip("export.torch_graph", reason="needs torch", exc_type=ImportError)
    assert torch_graph.graph_of_program(build_programs(words_model())["evaluate"]).examples.tokens == TOKENS


def test_an_inference_model_refuses_tokens_that_it_does_not_know() -> None:
    model = Inference(words_model().SerializeToString())
    x = np.full((600, 4), TOKENS - 1)
    assert model.run(x).shape == (600, 3)
    x[431, 3] = TOKENS
    with pytest.raises(LocalError, match=r"row 431 .*token 30, but the model's tokens are 0 to 29"):
        model.run(x)


def test_tables_are_found_behind_casts_and_reshapes_and_nothing_is_guessed() -> None:
    def found(nodes: list[onnx.NodeProto], tables: dict[str, int], rows: dict[str, int] | None = None) -> int:
        tensors = [numpy_helper.from_array(np.zeros((size, 2), np.float32), name) for name, size in tables.items()]
        graph = helper.make_graph(nodes, "g", [], [], tensors)
        return vocabulary("g", helper.make_model(graph).SerializeToString(), "x", rows or {})

    gather, node = helper.make_node("Gather", ["t", "x"], ["o"]), helper.make_node
    assert found([gather], {"t": 7}) == 7
    assert found([gather], {}, {"t": 9}) == 9, "a parameter that is an input"
    assert found([node("Cast", ["x"], ["i"], to=7), node("Gather", ["t", "i"], ["o"])], {"t": 7}) == 7
    assert found([node("DequantizeLinear", ["t", "s"], ["f"]), node("Gather", ["f", "x"], ["o"])], {"t": 7}) == 7
    assert found([gather, node("Gather", ["u", "x"], ["p"])], {"t": 7, "u": 3}) == 3, "the smallest bounds"
    assert found([node("Gather", ["t", "x"], ["o"], axis=1)], {"t": 7}) == 0
    assert found([node("Gather", ["t", "other"], ["o"])], {"t": 7}) == 0
    assert found([node("Add", ["x", "one"], ["i"]), node("Gather", ["t", "i"], ["o"])], {"t": 7}) == 0
    with pytest.raises(PeerError, match="malformed"):
        vocabulary("g", b"\x3a\x05\x0a\x7f", "x", {})
