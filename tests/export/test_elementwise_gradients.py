"""Gradient rules of elementwise ops against torch's float64 autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from export.programs import build_programs
from regrow.errors import LocalError
from tests.export.drawing import CLASSES, check, constant, drawn, network, numbers

functional = torch.nn.functional
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)

UNARY: dict[str, tuple[dict[str, Any], Any, float, float]] = {
    # op: attributes, what torch calls it, centre and spread of the input
    "Relu": ({}, torch.relu, 0, 2),
    "LeakyRelu": ({"alpha": 0.125}, lambda a: functional.leaky_relu(a, 0.125), 0, 2),
    "Sigmoid": ({}, torch.sigmoid, 0, 6),
    "HardSigmoid": ({"alpha": 1 / 6}, functional.hardsigmoid, 0, 6),
    "HardSwish": ({}, functional.hardswish, 0, 6),
    "Tanh": ({}, torch.tanh, 0, 3),
    "Exp": ({}, torch.exp, 0, 2),
    "Sqrt": ({}, torch.sqrt, 2, 1),
    "Erf": ({}, torch.erf, 0, 2),
}


@pytest.mark.parametrize("op", UNARY)
@drawn(8)
@given(shape=shapes, batch=st.integers(1, 4), seed=st.integers(0, 999))
def test_of_one_operand(op: str, shape: list[int], batch: int, seed: int) -> None:
    attributes, function, centre, spread = UNARY[op]
    x = numbers(np.random.default_rng(seed), batch, *shape) * np.float32(spread) + np.float32(centre)
    check([helper.make_node(op, ["a"], ["o"], **attributes)], lambda a, _: function(a), x)


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "HardSigmoid", "HardSwish", "Clip"])
def test_corners_go_as_in_torch(op: str) -> None:
    x = np.array([[-3, -0.0, 0, 3, 1, -1, 4, -4]], np.float32)
    names, nodes, function = ["a"], [], UNARY.get(op, ({}, lambda a: torch.clamp(a, -3, 3)))[1]
    if op == "Clip":
        names, nodes = ["a", "low", "high"], [constant("low", -3, np.float32), constant("high", 3, np.float32)]
    attributes = UNARY[op][0] if op in UNARY else {}
    check([*nodes, helper.make_node(op, names, ["o"], **attributes)], lambda a, _: function(a), x, p=np.full(8, -0.0, np.float32))


@drawn(12)
@given(
    shape=shapes,
    low=st.none() | st.sampled_from([-1.0, -0.5, 0.0]),
    high=st.none() | st.sampled_from([0.25, 1.0, 6.0]),
    seed=st.integers(0, 999),
)
def test_clip(shape: list[int], low: float | None, high: float | None, seed: int) -> None:
    nodes = [constant(name, bound, np.float32) for name, bound in (("low", low), ("high", high)) if bound is not None]
    nodes.append(helper.make_node("Clip", ["a", "low" if low is not None else "", "high" if high is not None else ""], ["o"]))
    x = numbers(np.random.default_rng(seed), 3, *shape) * np.float32(2)
    check(nodes, lambda a, _: a if low is None and high is None else torch.clamp(a, low, high), x)


@pytest.mark.parametrize(("exponent", "dtype"), [(2, np.int64), (2.0, np.float32), (0.5, np.float32), (-1.5, np.float32), (0, np.int64)])
@drawn(5)
@given(shape=shapes, batch=st.integers(1, 4), seed=st.integers(0, 999))
def test_power(exponent: float, dtype: type[np.generic], shape: list[int], batch: int, seed: int) -> None:
    x = numbers(np.random.default_rng(seed), batch, *shape) + np.float32(2)
    nodes = [constant("e", exponent, dtype), helper.make_node("Pow", ["a", "e"], ["o"])]
    check(nodes, lambda a, _: a**exponent, x)


@pytest.mark.parametrize("exponent", [2, 3])
def test_power_of_negative_numbers(exponent: int) -> None:
    x = np.array([[-1.5, -1, 0, 0.5]], np.float32)
    nodes = [constant("e", [exponent], np.float32), helper.make_node("Pow", ["a", "e"], ["o"])]
    check(nodes, lambda a, _: a**exponent, x, p=np.zeros(4, np.float32))


BINARY: dict[str, Any] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}


@pytest.mark.parametrize("op", BINARY)
@drawn(16)
@given(
    shape=shapes,
    kept=st.lists(st.booleans(), max_size=4),
    swapped=st.booleans(),
    batch=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_of_two_operands_with_broadcasting(op: str, shape: list[int], kept: list[bool], swapped: bool, batch: int, seed: int) -> None:
    """The second operand lacks leading axes or has size 1 in them, in any way; and it may come first."""
    rng = np.random.default_rng(seed)
    full = [1, *shape]
    small = [size if keep else 1 for keep, size in zip(kept, full[max(0, len(full) - len(kept)) :], strict=False)]
    b = np.asarray(numbers(rng, *small) + np.float32(2))
    x = numbers(rng, batch, *shape) + np.float32(2)
    names = ["b", "a"] if swapped else ["a", "b"]
    check(
        [helper.make_node(op, names, ["o"])],
        lambda a, q: BINARY[op](q["b"], a) if swapped else BINARY[op](a, q["b"]),
        x,
        {"b": b},
    )


@pytest.mark.parametrize("op", ["Sub", "Mul", "Div"])
def test_of_a_value_and_itself_or_a_stretched_value(op: str) -> None:
    """Both operands lead back to one value; the second time one of them is broadcast over the batch's other axes."""
    x = numbers(np.random.default_rng(4), 3, 2, 5) + np.float32(2)
    nodes = [
        helper.make_node(op, ["a", "a"], ["self"]),
        constant("axes", [2]),
        helper.make_node("ReduceMean", ["a", "axes"], ["mean"], keepdims=1),
        helper.make_node(op, ["mean", "a"], ["other"]),
        helper.make_node("Add", ["self", "other"], ["o"]),
    ]
    function = BINARY[op]
    check(nodes, lambda a, _: function(a, a) + function(a.mean(2, keepdim=True), a), x)


@pytest.mark.parametrize(
    ("op", "extra", "message"),
    [
        ("Pow", ["e"], r"Pow \(node 'odd'.*an exponent that is not one constant number.*Constant node"),
        ("Pow", ["many"], r"Pow \(node 'odd'.*an exponent that is not one constant number"),
        ("Clip", ["e"], r"Clip \(node 'odd'.*a bound that would be trained.*Constant node"),
    ],
)
def test_operands_that_no_rule_covers_are_named(op: str, extra: list[str], message: str) -> None:
    weights = {"p": np.ones(3, np.float32), "e": np.array(2, np.float32), "head": np.ones((3, CLASSES), np.float32)}
    nodes = [constant("many", [1, 2, 3], np.float32), helper.make_node(op, ["a", *extra], ["o"], name="odd")]
    with pytest.raises(LocalError, match=message):
        build_programs(network(nodes, weights, [3]))
