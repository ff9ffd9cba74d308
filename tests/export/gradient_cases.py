"""The table of ops that work number by number, along axes, or move numbers: what tests/export/test_gradients.py draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tests.export.drawing import Case, constant, numbers

functional = torch.nn.functional
node = helper.make_node
Draw = Callable[[Any], Any]
"""data.draw of Hypothesis."""

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)
CASES: dict[str, Callable[[Draw], Case]] = {}


def case(function: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
    CASES[function.__name__] = function
    return function


def generator(draw: Draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 999)))


def data(draw: Draw, shape: Sequence[int] | None = None, *, batch: int | None = None) -> NDArray[np.float32]:
    """[batch, ...], drawn."""
    shape = draw(SHAPES) if shape is None else shape
    return numbers(generator(draw), batch or draw(st.integers(1, 4)), *shape)


def signed(draw: Draw, axis: int, rank: int) -> int:
    return axis - rank if draw(st.booleans()) else axis


UNARY: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    # op: attributes, what torch calls it, centre and spread of the input
    "Abs": ({}, torch.abs, 0, 2),
    "Celu": ({"alpha": 0.5}, lambda a: functional.celu(a, 0.5), 0, 3),
    "Cos": ({}, torch.cos, 0, 3),
    "Dropout": ({}, lambda a: a, 0, 1),
    "Elu": ({"alpha": 0.5}, lambda a: functional.elu(a, 0.5), 0, 3),
    "Erf": ({}, torch.erf, 0, 2),
    "Exp": ({}, torch.exp, 0, 2),
    "HardSigmoid": ({"alpha": 1 / 6}, functional.hardsigmoid, 0, 6),
    "HardSwish": ({}, functional.hardswish, 0, 6),
    "Identity": ({}, lambda a: a, 0, 1),
    "LeakyRelu": ({"alpha": 0.125}, lambda a: functional.leaky_relu(a, 0.125), 0, 2),
    "Log": ({}, torch.log, 3, 1),
    "Neg": ({}, torch.neg, 0, 1),
    "Reciprocal": ({}, torch.reciprocal, 3, 1),
    "Relu": ({}, torch.relu, 0, 2),
    "Selu": ({}, functional.selu, 0, 3),
    "Sigmoid": ({}, torch.sigmoid, 0, 6),
    "Sin": ({}, torch.sin, 0, 3),
    "Softplus": ({}, functional.softplus, 0, 6),
    "Sqrt": ({}, torch.sqrt, 2, 1),
    "Tanh": ({}, torch.tanh, 0, 3),
}

CORNERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    op: UNARY[op][1] for op in ("Abs", "Celu", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Selu")
}


def _unary(op: str, draw: Draw) -> Case:
    attributes, function, centre, spread = UNARY[op]
    x = data(draw) * np.float32(spread) + np.float32(centre)
    # The erf of onnx.reference is that of float32.
    return Case([node(op, ["a"], ["o"], **attributes)], lambda a, _: function(a), x, reference=op != "Erf")


CASES |= {op: functools.partial(_unary, op) for op in UNARY}


@case
def clip(draw: Draw) -> Case:
    low, high = draw(st.sampled_from([None, -1.0, -0.5, 0.0])), draw(st.sampled_from([None, 0.25, 1.0, 6.0]))
    nodes = [constant(name, bound, np.float32) for name, bound in (("low", low), ("high", high)) if bound is not None]
    nodes.append(node("Clip", ["a", "low" if low is not None else "", "high" if high is not None else ""], ["o"]))
    return Case(nodes, lambda a, _: a if low is None and high is None else torch.clamp(a, low, high), data(draw) * np.float32(2))


@case
def power(draw: Draw) -> Case:
    exponent, kind = draw(st.sampled_from([(2, np.int64), (2.0, np.float32), (0.5, np.float32), (-1.5, np.float32), (0, np.int64)]))
    nodes = [constant("e", exponent, kind), node("Pow", ["a", "e"], ["o"])]
    return Case(nodes, lambda a, _: a**exponent, data(draw) + np.float32(2))


@case
def power_of_negative_numbers(draw: Draw) -> Case:
    exponent = draw(st.sampled_from([2, 3]))
    return Case([constant("e", [exponent], np.float32), node("Pow", ["a", "e"], ["o"])], lambda a, _: a**exponent, data(draw))


BINARY: dict[str, Any] = {"Add": torch.add, "Div": torch.div, "Max": torch.maximum, "Min": torch.minimum, "Mul": torch.mul}
BINARY |= {"Sub": torch.sub, "Sum": torch.add}


def _binary(op: str, draw: Draw) -> Case:
    """The second operand lacks leading axes or has size 1 in them, in any way; and it may come first."""
    x = data(draw) + np.float32(3)
    full = [1, *x.shape[1:]]
    kept = draw(st.lists(st.booleans(), max_size=len(full)))
    small = [size if keep else 1 for keep, size in zip(kept, full[len(full) - len(kept) :], strict=True)]
    b = np.asarray(numbers(generator(draw), *small) + np.float32(3))
    swapped = draw(st.booleans())
    names = ["b", "a"] if swapped else ["a", "b"]
    return Case(
        [node(op, names, ["o"])],
        lambda a, q: BINARY[op](q["b"], a) if swapped else BINARY[op](a, q["b"]),
        x,
        {"b": b},
        reference=op not in ("Max", "Min", "Sum"),  # onnx.reference does not broadcast these
    )


CASES |= {op: functools.partial(_binary, op) for op in BINARY}


@case
def operands_that_lead_back_to_one_value(draw: Draw) -> Case:
    function = BINARY[op := draw(st.sampled_from(["Sub", "Mul", "Div"]))]
    nodes = [
        node(op, ["a", "a"], ["self"]),
        constant("axes", [2]),
        node("ReduceMean", ["a", "axes"], ["mean"], keepdims=1),
        node(op, ["mean", "a"], ["other"]),
        node("Add", ["self", "other"], ["o"]),
    ]
    return Case(nodes, lambda a, _: function(a, a) + function(a.mean(2, keepdim=True), a), data(draw, [2, 5]) + np.float32(3))


@case
def prelu(draw: Draw) -> Case:
    x = data(draw)
    slope = numbers(generator(draw), *(size if draw(st.booleans()) else 1 for size in x.shape[1:]))
    return Case([node("PRelu", ["a", "slope"], ["o"])], lambda a, q: torch.where(a > 0, a, q["slope"] * a), x, {"slope": slope})


@case
def where(draw: Draw) -> Case:
    """By a constant, or by a comparison of values that depend on parameters; one branch may be a number."""
    x = data(draw)
    mask = np.random.default_rng(3).random(x.shape[1:]) < 0.5
    computed, number = draw(st.booleans()), draw(st.booleans())
    condition = node("Greater", ["a", "low"], ["c"]) if computed else constant("c", mask, np.bool_)
    nodes = [constant("low", 0.25, np.float32), node("Tanh", ["a"], ["t"]), condition]
    nodes.append(node("Where", ["c", "a" if draw(st.just(True)) else "", "low" if number else "t"], ["o"]))

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        chosen = a > 0.25 if computed else torch.tensor(mask)
        return torch.where(chosen, a, torch.tensor(0.25, dtype=a.dtype) if number else torch.tanh(a))

    return Case(nodes, forward, x)


@case
def gates_of_truth_values_and_whole_numbers(draw: Draw) -> Case:
    """What a value is compared for, rounded to or cast from passes no gradient; the value beside it does."""
    nodes = [
        constant("zero", 0, np.float32),
        node("GreaterOrEqual", ["a", "zero"], ["b"]),
        node("Not", ["b"], ["n"]),
        node("Cast", ["n"], ["gate"], to=TensorProto.FLOAT),
        node("Floor", ["a"], ["whole"]),
        node("Cast", ["whole"], ["i"], to=TensorProto.INT64),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Cast", ["a"], ["same"], to=TensorProto.FLOAT),
        node("Mul", ["same", "gate"], ["m"]),
        node("Mul", ["m", "f"], ["o"]),
    ]
    # onnx.reference would cast to float32.
    return Case(nodes, lambda a, _: a * (a < 0) * torch.floor(a).detach(), data(draw) * np.float32(3), reference=False)


@case
def silu(draw: Draw) -> Case:
    nodes = [node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["o"])]
    return Case(nodes, lambda a, _: functional.silu(a), data(draw) * np.float32(4))


@case
def gelu(draw: Draw) -> Case:
    approximate, opset = draw(st.sampled_from(["none", "tanh"])), draw(st.sampled_from([20, 21]))
    nodes, x = [node("Gelu", ["a"], ["o"], approximate=approximate)], data(draw) * np.float32(3)
    return Case(nodes, lambda a, _: functional.gelu(a, approximate=approximate), x, reference=False, opset=opset)


@case
def gelu_as_torch_writes_it_for_opset_18(draw: Draw) -> Case:
    names = {"root": math.sqrt(2), "one": 1, "half": 0.5}
    nodes = [constant(name, value, np.float32) for name, value in names.items()]
    nodes += [
        node("Div", ["a", "root"], ["d"]),
        node("Erf", ["d"], ["e"]),
        node("Add", ["e", "one"], ["s"]),
        node("Mul", ["a", "s"], ["m"]),
        node("Mul", ["m", "half"], ["o"]),
    ]
    return Case(nodes, lambda a, _: functional.gelu(a), data(draw) * np.float32(3), reference=False)


# Along axes


def _reduction(op: str, function: Any, draw: Draw) -> Case:
    """Axes as an input, or as an attribute before opset 18."""
    x = data(draw)
    axes = draw(st.lists(st.integers(1, x.ndim - 1), min_size=1, unique=True))
    given, keepdims = [signed(draw, axis, x.ndim) for axis in axes], draw(st.booleans())
    opset = draw(st.sampled_from([18, 21] if op == "ReduceSum" else [13, 17, 18, 20]))
    if opset < 18:
        nodes = [node(op, ["a"], ["o"], keepdims=int(keepdims), axes=given)]
    else:
        nodes = [constant("axes", given), node(op, ["a", "axes"], ["o"], keepdims=int(keepdims))]
    return Case(nodes, lambda a, _: function(a, axes, keepdim=keepdims), x, opset=opset)


REDUCTIONS: dict[str, Any] = {"ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin}
CASES |= {op: functools.partial(_reduction, op, function) for op, function in REDUCTIONS.items()}


@case
def sums_over_the_batch_over_all_and_over_nothing(draw: Draw) -> Case:
    axes, keepdims, noop = draw(st.sampled_from([([0], 1, 0), ([], 0, 0), (None, 1, 0), ([], 1, 1)]))
    nodes = [] if axes is None else [constant("axes", axes)]
    nodes.append(node("ReduceSum", ["a"] if axes is None else ["a", "axes"], ["total"], keepdims=keepdims, noop_with_empty_axes=noop))
    nodes += [node("Tanh", ["a"], ["t"]), node("Mul", ["t", "total"], ["o"])]

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.tanh(a) * (a if noop else a.sum(0, keepdim=True) if axes == [0] else a.sum())

    return Case(nodes, forward, data(draw, [2, 4], batch=3))


def _softmax(op: str, function: Any, draw: Draw) -> Case:
    x = data(draw) * np.float32(3)
    axis = signed(draw, draw(st.integers(1, x.ndim - 1)), x.ndim)
    return Case([node(op, ["a"], ["o"], axis=axis)], lambda a, _: function(a, axis), x)


CASES |= {"Softmax": functools.partial(_softmax, "Softmax", torch.softmax)}
CASES |= {"LogSoftmax": functools.partial(_softmax, "LogSoftmax", torch.log_softmax)}


# Matrix products


@case
def gemm(draw: Draw) -> Case:
    """One of two parameters, with every transposition, and one of data and parameter."""
    rng, (trans_a, trans_b) = generator(draw), draw(st.tuples(st.booleans(), st.booleans()))
    scales = draw(st.tuples(st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 0.25])))
    weights = {
        "left": numbers(rng, 5, 1) if trans_a else numbers(rng, 1, 5),
        "right": numbers(rng, 4, 5) if trans_b else numbers(rng, 5, 4),
        "b": numbers(rng, *draw(st.sampled_from([(), (1,), (4,), (1, 4)]))),
        "w": numbers(rng, 4, 6) if trans_b else numbers(rng, 6, 4),
    }
    attributes = {"alpha": scales[0], "beta": scales[1], "transB": int(trans_b)}
    nodes = [
        node("Gemm", ["left", "right", "b"], ["g"], transA=int(trans_a), **attributes),
        node("Gemm", ["a", "w", "g"], ["o"], **attributes),
    ]

    def forward(a: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        left = p["left"].T if trans_a else p["left"]
        right, w = (p["right"].T, p["w"].T) if trans_b else (p["right"], p["w"])
        return scales[0] * a @ w + scales[1] * (scales[0] * left @ right + scales[1] * p["b"])

    return Case(nodes, forward, data(draw, [6]), weights)


@case
def matmul(draw: Draw) -> Case:
    """Stacks on both sides, one, or none, that broadcast in any way; vectors; the parameter first or second."""
    rng, stack = generator(draw), draw(st.lists(st.integers(1, 3), max_size=2))
    first = draw(st.booleans())
    x = data(draw, [*stack, 3, 5])
    kept = draw(st.lists(st.booleans(), max_size=len(stack) + 1))
    full = [1, *stack]
    small = [size if keep else 1 for keep, size in zip(kept, full[len(full) - len(kept) :], strict=True)]
    matrix = ([2, 3] if first else [5, 2]) if kept or draw(st.booleans()) else ([3] if first else [5])
    nodes = [node("MatMul", ["w", "a"] if first else ["a", "w"], ["o"])]
    return Case(nodes, lambda a, q: q["w"] @ a if first else a @ q["w"], x, {"w": numbers(rng, *small, *matrix)})


@case
def matmul_of_a_vector_and_of_the_data_with_itself(draw: Draw) -> Case:
    """As attention has it: both operands with the batch, and vectors of parameters."""
    nodes = [
        constant("axis", [1]),
        node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["a", "t"], ["scores"]),
        node("MatMul", ["scores", "a"], ["mixed"]),
        node("MatMul", ["u", "v"], ["number"]),
        node("Mul", ["mixed", "number"], ["o"]),
    ]
    rng = generator(draw)
    weights = {"u": numbers(rng, 4) + np.float32(2), "v": numbers(rng, 4) + np.float32(2)}
    return Case(nodes, lambda a, q: a @ a.mT @ a * (q["u"] @ q["v"]), data(draw, [3, 2]) + np.float32(2), weights)
