"""Reshape targets that models compute out of shapes."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from export.forward import read_forward
from tests.export.drawing import CLASSES, constant, drawn, network, numbers
from tests.export.running import check_against_torch

node = helper.make_node


def merged_axes() -> list[onnx.NodeProto]:
    """[batch, steps, directions, hidden] to [batch, steps, directions * hidden], as torch writes it between the layers of an LSTM."""
    return [
        constant("one", [1]),
        constant("two", [2]),
        constant("three", [3]),
        constant("four", [4]),
        constant("rest_of_it", [-1]),
        node("Shape", ["q"], ["s"], start=0),
        node("Slice", ["s", "two", "three"], ["directions"]),
        node("Slice", ["s", "three", "four"], ["hidden"]),
        node("Mul", ["directions", "hidden"], ["both"]),
        node("Reshape", ["both", "rest_of_it"], ["both1"]),
        node("Shape", ["q"], ["head_of_shape"], end=2),
        node("Concat", ["head_of_shape", "both1"], ["target"], axis=0),
        node("Reshape", ["q", "target"], ["r"]),
    ]


@drawn(8)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 3), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_target_becomes_a_constant_and_the_model_trains(sizes: tuple[int, int, int], batch: int, seed: int) -> None:
    """Twice, the second one behind what the first one made known."""
    rng = np.random.default_rng(seed)
    steps, directions, hidden = sizes
    width = directions * hidden
    again = [
        constant("behind", [-1]),
        node("Shape", ["r"], ["s2"]),
        node("Slice", ["s2", "one", "three"], ["rest"]),
        node("ReduceProd", ["rest"], ["product"], keepdims=1),
        node("Reshape", ["product", "behind"], ["product1"]),
        node("Slice", ["s2", "zero", "one"], ["examples"]),
        node("Concat", ["examples", "product1"], ["target2"], axis=0),
        node("MatMul", ["r", "w"], ["t"]),
        node("Reshape", ["t", "target2"], ["o"]),
    ]
    nodes = [constant("zero", [0]), node("Identity", ["a"], ["q"]), *merged_axes(), *again]
    weights = {"p": numbers(rng, *sizes), "w": numbers(rng, width, width), "head": numbers(rng, steps * width, CLASSES)}
    model = network(nodes, weights, sizes)
    forward = read_forward(model)
    assert forward.shapes["forward:r"] == (None, steps, width)
    assert forward.shapes["forward:o"] == (None, steps * width)
    x = numbers(rng, batch, *sizes)
    check_against_torch(
        model,
        lambda values, q: ((values + q["p"]).reshape(len(values), steps, width) @ q["w"]).reshape(len(values), -1) @ q["head"],
        weights,
        x,
        rng.integers(0, CLASSES, batch),
    )


def test_a_target_that_depends_on_the_data_stays() -> None:
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=1),
        constant("rest_of_it", [-1]),
        node("Cast", ["sum"], ["whole"], to=onnx.TensorProto.INT64),
        node("Reshape", ["whole", "rest_of_it"], ["target"]),
        node("Reshape", ["a", "target"], ["o1"]),
        constant("rows", [-1, 3]),
        node("Reshape", ["o1", "rows"], ["o"]),
    ]
    model = network(nodes, {"p": np.ones(3, np.float32), "head": np.ones((3, CLASSES), np.float32)}, [3])
    forward = read_forward(model)
    assert [each.op_type for each in forward.nodes] == [each.op_type for each in model.graph.node if each.op_type != "Constant"]
    assert next(each for each in forward.nodes if each.output[0] == "forward:o1").input[1] == "forward:target"
