"""Multiply-adds by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from export.models import digits_mlp, reduced_cnn
from export.work import multiply_adds, relative_work
from tests.export.running import model_of

node = helper.make_node


def test_multiply_adds_by_hand() -> None:
    assert multiply_adds(digits_mlp(1)) == 64 * 32 + 32 * 10
    convolutions = 5 * 5 * 1 * 8 * 14 * 14 + 3 * 3 * 8 * 16 * 7 * 7
    assert multiply_adds(reduced_cnn(1)) == convolutions + 16 * 7 * 7 * 64 + 64 * 10


def test_half_the_hidden_units_are_half_the_work() -> None:
    (density, work), whole = relative_work(digits_mlp(1), (0.5, 1.0))
    units = round(density * 2410 - 10) / (64 + 1 + 10)  # of 32: each has 64 weights, a bias and 10 weights that read it
    assert units == pytest.approx(round(units))
    assert work == pytest.approx(units / 32)
    assert whole == (1.0, 1.0)


def test_work_falls_with_density() -> None:
    shares = relative_work(reduced_cnn(1), (0.05, 0.2, 1.0))
    assert [work for _, work in shares] == sorted(work for _, work in shares)
    assert shares[0][1] < 0.2


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def transposed() -> onnx.ModelProto:
    """[3, 5, 5] -> [4, 10, 10], each number of the input in 4 x 2 x 2 products."""
    nodes = [node("ConvTranspose", ["x", "w"], ["a"], strides=[2, 2]), node("Flatten", ["a"], ["logits"])]
    return model_of(nodes, zeros(w=(3, 4, 2, 2)), [3, 5, 5], 400)


def stacked() -> onnx.ModelProto:
    """A matrix for each of 3 heads, then attention-like products of what was computed."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),  # [b, 3, 5, 6] @ [3, 6, 7]
        node("Transpose", ["a"], ["t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["a", "t"], ["s"]),  # [b, 3, 5, 7] @ [b, 3, 7, 5]
        node("Flatten", ["s"], ["logits"]),
    ]
    return model_of(nodes, zeros(w=(3, 6, 7)), [3, 5, 6], 75)


def recurrent(op: str, gates: int) -> onnx.ModelProto:
    """Nine steps of 4 numbers, hidden 5, in both directions."""
    nodes = [
        node("Transpose", ["x"], ["sequence"], perm=[1, 0, 2]),
        node(op, ["sequence", "w", "r"], ["all", "last"], hidden_size=5, direction="bidirectional"),
        node("Transpose", ["last"], ["turned"], perm=[1, 0, 2]),
        node("Flatten", ["turned"], ["logits"]),
    ]
    return model_of(nodes, zeros(w=(2, gates * 5, 4), r=(2, gates * 5, 5)), [9, 4], 10)


def test_transposed_stacked_and_recurrent_layers_by_hand() -> None:
    assert multiply_adds(transposed()) == 3 * 5 * 5 * 4 * 2 * 2
    assert multiply_adds(stacked()) == 3 * 5 * 6 * 7 + 3 * 5 * 7 * 5
    assert multiply_adds(recurrent("LSTM", 4)) == 9 * 2 * 4 * 5 * (4 + 5)
    assert multiply_adds(recurrent("GRU", 3)) == 9 * 2 * 3 * 5 * (4 + 5)
