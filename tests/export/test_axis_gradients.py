"""Gradient rules of ops that work along axes, against torch's float64 autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from export.programs import build_programs
from regrow.errors import LocalError
from tests.export.drawing import CLASSES, check, constant, drawn, network, numbers

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
seeds = st.integers(0, 999)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@drawn(15)
@given(shape=shapes, data=st.data(), keepdims=st.booleans(), batch=st.integers(1, 4), seed=seeds)
def test_reductions(op: str, shape: list[int], data: st.DataObject, keepdims: bool, batch: int, seed: int) -> None:
    rank = len(shape) + 1
    axes = data.draw(st.lists(st.integers(1, rank - 1), min_size=1, unique=True))
    signed = [axis - rank if data.draw(st.booleans()) else axis for axis in axes]
    function: Any = torch.sum if op == "ReduceSum" else torch.mean
    nodes = [constant("axes", signed), helper.make_node(op, ["a", "axes"], ["o"], keepdims=int(keepdims))]
    check(nodes, lambda a, _: function(a, axes, keepdim=keepdims), numbers(np.random.default_rng(seed), batch, *shape))


@pytest.mark.parametrize(("axes", "keepdims", "noop"), [([0], 1, 0), ([], 0, 0), (None, 1, 0), ([], 1, 1)])
def test_sums_over_the_batch_over_all_and_over_nothing(axes: list[int] | None, keepdims: int, noop: int) -> None:
    inputs = ["a"] if axes is None else ["a", "axes"]
    nodes = [] if axes is None else [constant("axes", axes)]
    nodes.append(helper.make_node("ReduceSum", inputs, ["total"], keepdims=keepdims, noop_with_empty_axes=noop))
    nodes += [helper.make_node("Tanh", ["a"], ["t"]), helper.make_node("Mul", ["t", "total"], ["o"])]

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.tanh(a) * (a if noop else a.sum(0, keepdim=True) if axes == [0] else a.sum())

    check(nodes, forward, numbers(np.random.default_rng(2), 3, 2, 4))


@drawn(15)
@given(shape=shapes, data=st.data(), batch=st.integers(1, 4), seed=seeds)
def test_softmax(shape: list[int], data: st.DataObject, batch: int, seed: int) -> None:
    axis = data.draw(st.integers(1, len(shape)) | st.integers(-len(shape), -1))
    x = numbers(np.random.default_rng(seed), batch, *shape) * np.float32(3)
    check([helper.make_node("Softmax", ["a"], ["o"], axis=axis)], lambda a, _: torch.softmax(a, axis), x)


@drawn(12)
@given(shape=shapes, data=st.data(), seed=seeds)
def test_transpose(shape: list[int], data: st.DataObject, seed: int) -> None:
    order = [0, *data.draw(st.permutations(range(1, len(shape) + 1)))]
    check(
        [helper.make_node("Transpose", ["a"], ["o"], perm=order)],
        lambda a, _: a.permute(order),
        numbers(np.random.default_rng(seed), 3, *shape),
    )


def test_transpose_without_a_permutation_turns_the_axes_around() -> None:
    weights = {"w": numbers(np.random.default_rng(0), 3, 5)}
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["a", "t"], ["o"])]
    check(nodes, lambda a, q: a @ q["w"].T, numbers(np.random.default_rng(1), 2, 5), weights)


@drawn(12)
@given(shape=shapes, data=st.data(), seed=seeds)
def test_unsqueeze_squeeze_and_a_shape_read_at_run_time(shape: list[int], data: st.DataObject, seed: int) -> None:
    axis = data.draw(st.integers(1, len(shape) + 1))
    nodes = [
        constant("axes", [axis]),
        helper.make_node("Unsqueeze", ["a", "axes"], ["wide"]),
        helper.make_node("Tanh", ["wide"], ["t"]),
        helper.make_node("Squeeze", ["t", "axes"], ["narrow"]),
        constant("rows", [0, -1]),
        helper.make_node("Reshape", ["narrow", "rows"], ["f"]),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Reshape", ["f", "shape"], ["o"]),
    ]
    check(nodes, lambda a, _: torch.tanh(a), numbers(np.random.default_rng(seed), 3, *shape))


@drawn(15)
@given(shape=shapes, data=st.data(), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=seeds)
def test_concat(shape: list[int], data: st.DataObject, sizes: list[int], seed: int) -> None:
    """The value, data that needs no gradient, and the value again under other functions."""
    axis = data.draw(st.integers(1, len(shape)) | st.integers(-len(shape), -1))
    nodes = [helper.make_node("Tanh", ["a"], ["t"]), helper.make_node("Exp", ["a"], ["e"])]
    parts = data.draw(st.lists(st.sampled_from(["a", "t", "e", "x"]), min_size=len(sizes), max_size=4).filter(lambda p: set(p) != {"x"}))
    nodes.append(helper.make_node("Concat", parts, ["o"], axis=axis))
    x = numbers(np.random.default_rng(seed), 2, *shape)

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        values = {"a": a, "t": torch.tanh(a), "e": torch.exp(a), "x": a - q["p"]}
        values["x"] = values["x"].detach()
        return torch.cat([values[part] for part in parts], axis)

    check(nodes, forward, x)


@drawn(30)
@given(shape=shapes, data=st.data(), seed=seeds)
def test_slice(shape: list[int], data: st.DataObject, seed: int) -> None:
    """Any start, end and step in NumPy's sense; the batch whole."""
    axes = data.draw(st.lists(st.integers(1, len(shape)), min_size=1, unique=True))
    far = st.sampled_from([-(2**31), 2**31 - 1, 2**63 - 1])
    bounds = []
    for axis in axes:
        size = shape[axis - 1]
        start, end = data.draw(st.integers(-size - 1, size) | far), data.draw(st.integers(-size - 1, size) | far)
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        if not range(*slice(start, end, step).indices(size)):
            start, end, step = 0, 2**63 - 1, 1
        bounds.append((start, end, step))
    starts, ends, steps = ([bound[i] for bound in bounds] for i in range(3))
    signed = [axis - len(shape) - 1 if data.draw(st.booleans()) else axis for axis in axes]
    values = {"starts": [*starts, 0], "ends": [*ends, 2**63 - 1], "axes": [*signed, 0], "steps": [*steps, 1]}
    nodes = [*(constant(name, value) for name, value in values.items()), helper.make_node("Slice", ["a", *values], ["o"])]

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        for axis, bound in zip(axes, bounds, strict=True):
            a = a.index_select(axis, torch.tensor(range(a.shape[axis])[slice(*bound)]))
        return a

    check(nodes, forward, numbers(np.random.default_rng(seed), 2, *shape))


def test_slice_without_axes_and_steps_cuts_the_first_axes() -> None:
    nodes = [constant("starts", [0, 1]), constant("ends", [2**63 - 1, 3]), helper.make_node("Slice", ["a", "starts", "ends"], ["o"])]
    check(nodes, lambda a, _: a[:, 1:3], numbers(np.random.default_rng(1), 2, 5, 2))


@drawn(20)
@given(shape=shapes, data=st.data(), named=st.booleans(), value=st.none() | st.just(0.5), seed=seeds)
def test_pad(shape: list[int], data: st.DataObject, named: bool, value: float | None, seed: int) -> None:
    """Padding, cropping by negative padding, and, where they are named, only some of the axes."""
    axes = data.draw(st.lists(st.integers(1, len(shape)), min_size=1, unique=True)) if named else range(len(shape) + 1)
    pairs = {}
    for axis in axes:
        crop = 0 if axis == 0 or shape[axis - 1] < 2 else 1
        pairs[axis] = (data.draw(st.integers(-crop, 2)), 0) if data.draw(st.booleans()) else (0, data.draw(st.integers(0, 2)))
        pairs[axis] = (0, 0) if axis == 0 else pairs[axis]
    pads = [begin for begin, _ in pairs.values()] + [end for _, end in pairs.values()]
    nodes = [constant("pads", pads), constant("axes", list(axes)), constant("value", value or 0, np.float32)]
    names = ["a", "pads", "value" if value else "", "axes" if named else ""]
    while not names[-1]:
        names.pop()
    nodes.append(helper.make_node("Pad", names, ["o"]))
    reversed_pads = [part for axis in range(len(shape), 0, -1) for part in pairs.get(axis, (0, 0))]
    x = numbers(np.random.default_rng(seed), 2, *shape)
    check(nodes, lambda a, _: torch.nn.functional.pad(a, reversed_pads, value=value or 0.0), x)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([constant("n", [0]), helper.make_node("ReduceMean", ["a", "n"], ["m"], name="odd")], "a mean over the batch"),
        (
            [constant("m", [0, 1, 0, 1]), helper.make_node("Pad", ["a", "m"], ["o"], name="odd", mode="edge")],
            "mode 'edge'.*pad with a constant",
        ),
        ([constant("n", [0, 1, 0, 1]), helper.make_node("Pad", ["a", "n", "w"], ["o"], name="odd")], "value that would be trained"),
        (
            [
                constant("s", [1]),
                constant("e", [2]),
                constant("n", [0]),
                helper.make_node("Slice", ["a", "s", "e", "n"], ["o"], name="odd"),
            ],
            "axis 0 of 'a' with a size that is only known at run time",
        ),
        ([helper.make_node("Concat", ["a", "a"], ["o"], name="odd", axis=0)], "axis 0 of 'a' with a size that is only known at run time"),
        (
            [
                helper.make_node("Shape", ["a"], ["size"], start=1, end=2),
                constant("s", [0]),
                constant("n", [1]),
                helper.make_node("Slice", ["a", "s", "size", "n"], ["o"], name="odd"),
            ],
            "'size', which is computed",
        ),
    ],
)
def test_what_no_rule_covers_is_named(nodes: list[onnx.NodeProto], message: str) -> None:
    if not any("o" in node.output for node in nodes):
        nodes = [*nodes, helper.make_node("Add", ["a", "m"], ["o"])]
    weights = {
        "p": np.ones(3, np.float32),
        "w": np.array(2, np.float32),
        "head": np.ones((5 if nodes[-1].op_type == "Pad" else 3, CLASSES), np.float32),
    }
    with pytest.raises(
        LocalError, match=rf"cannot train {nodes[-1].op_type if nodes[-1].op_type != 'Add' else 'ReduceMean'} \(node 'odd'.*{message}"
    ):
        build_programs(network(nodes, weights, [3]))


def test_axes_as_an_attribute_are_refused_with_the_cure() -> None:
    weights = {"p": np.ones((3, 2), np.float32), "head": np.ones((3, CLASSES), np.float32)}
    model = network([helper.make_node("ReduceMean", ["a"], ["o"], axes=[2], name="odd")], weights, [3, 2])
    model.opset_import[0].version = 17
    with pytest.raises(LocalError, match=r"ReduceMean \(node 'odd'.*as an attribute.*export the model with opset 18"):
        build_programs(model)
