"""The table's part for ops that move numbers: reshaping, cutting, joining, looking up, repeating."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.export.drawing import Case, constant, numbers
from tests.export.gradient_cases import Draw, case, data, generator, signed

node = helper.make_node


@case
def transpose(draw: Draw) -> Case:
    x = data(draw)
    order = [0, *draw(st.permutations(range(1, x.ndim)))]
    return Case([node("Transpose", ["a"], ["o"], perm=order)], lambda a, _: a.permute(order), x)


@case
def transpose_without_a_permutation(draw: Draw) -> Case:
    nodes = [node("Transpose", ["w"], ["t"]), node("MatMul", ["a", "t"], ["o"])]
    return Case(nodes, lambda a, q: a @ q["w"].T, data(draw, [5]), {"w": numbers(generator(draw), 3, 5)})


@case
def unsqueeze_squeeze_and_a_shape_read_at_run_time(draw: Draw) -> Case:
    x = data(draw)
    axis = draw(st.integers(1, x.ndim))
    nodes = [
        constant("axes", [axis]),
        node("Unsqueeze", ["a", "axes"], ["wide"]),
        node("Tanh", ["wide"], ["t"]),
        node("Squeeze", ["t", "axes"], ["narrow"]),
        constant("rows", [0, -1]),
        node("Reshape", ["narrow", "rows"], ["f"]),
        node("Shape", ["a"], ["shape"]),
        node("Reshape", ["f", "shape"], ["o"]),
    ]
    return Case(nodes, lambda a, _: torch.tanh(a), x)


@case
def reshape_as_attention_does(draw: Draw) -> Case:
    """[batch, time, heads * width] by a shape of which the batch was read off the data."""
    nodes = [
        node("Shape", ["a"], ["shape"]),
        constant("first", 0),
        node("Gather", ["shape", "first"], ["batch"], axis=0),
        constant("front", [0]),
        node("Unsqueeze", ["batch", "front"], ["b"]),
        constant("rest", [3, 2, 4]),
        node("Concat", ["b", "rest"], ["sizes"], axis=0),
        node("Reshape", ["a", "sizes"], ["heads"]),
        node("Transpose", ["heads"], ["t"], perm=[0, 2, 1, 3]),
        node("Tanh", ["t"], ["o"]),
    ]
    return Case(nodes, lambda a, _: torch.tanh(a.reshape(len(a), 3, 2, 4).transpose(1, 2)), data(draw, [3, 8]))


@case
def concat(draw: Draw) -> Case:
    """The value, data that needs no gradient, and the value again under other functions."""
    x = data(draw)
    axis = signed(draw, draw(st.integers(1, x.ndim - 1)), x.ndim)
    parts = draw(st.lists(st.sampled_from("atex"), min_size=1, max_size=4).filter(lambda names: set(names) != {"x"}))
    nodes = [node("Tanh", ["a"], ["t"]), node("Exp", ["a"], ["e"]), node("Concat", parts, ["o"], axis=axis)]

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        values = {"a": a, "t": torch.tanh(a), "e": torch.exp(a), "x": (a - q["p"]).detach()}
        return torch.cat([values[part] for part in parts], axis)

    return Case(nodes, forward, x, smooth="x" not in parts)  # rounding would move x by differences of p


@case
def split(draw: Draw) -> Case:
    """By sizes or into equal parts, in the form of opset 13 and of 18; some parts are used, one twice."""
    sizes, equal = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)), draw(st.booleans())
    sizes = [sizes[0]] * len(sizes) if equal else sizes
    x, opset = data(draw, [sum(sizes), 2]), draw(st.sampled_from([13, 18, 21]))
    axis, names = signed(draw, 1, 3), [f"part{i}" for i in range(len(sizes))]
    attributes = {"num_outputs": len(sizes)} if equal and opset >= 18 else {}
    used = draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=3))
    nodes = [] if equal else [constant("sizes", sizes)]
    nodes.append(node("Split", ["a"] if equal else ["a", "sizes"], names, axis=axis, **attributes))
    nodes += [node("Tanh" if place else "Exp", [names[part]], [f"used{place}"]) for place, part in enumerate(used)]
    nodes.append(node("Concat", [f"used{place}" for place in range(len(used))], ["o"], axis=axis))

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        parts = a.split(sizes, 1)
        return torch.cat([torch.tanh(parts[part]) if place else torch.exp(parts[part]) for place, part in enumerate(used)], 1)

    return Case(nodes, forward, x, opset=opset)


@case
def cut(draw: Draw) -> Case:
    """Any start, end and step in NumPy's sense; the batch whole."""
    x = data(draw)
    axes = draw(st.lists(st.integers(1, x.ndim - 1), min_size=1, unique=True))
    far = st.sampled_from([-(2**31), 2**31 - 1, 2**63 - 1])
    bounds = []
    for size in (x.shape[axis] for axis in axes):
        start, end = draw(st.integers(-size - 1, size) | far), draw(st.integers(-size - 1, size) | far)
        step = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        is_empty = not range(*slice(start, end, step).indices(size))
        bounds.append((0, 2**63 - 1, 1) if is_empty else (start, end, step))
    starts, ends, steps = ([bound[i] for bound in bounds] for i in range(3))
    given = [signed(draw, axis, x.ndim) for axis in axes]
    values = {"starts": [*starts, 0], "ends": [*ends, 2**63 - 1], "axes": [*given, 0], "steps": [*steps, 1]}
    nodes = [*(constant(name, value) for name, value in values.items()), node("Slice", ["a", *values], ["o"])]

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        for axis, bound in zip(axes, bounds, strict=True):
            a = a.index_select(axis, torch.tensor(range(a.shape[axis])[slice(*bound)]))
        return a

    return Case(nodes, forward, x)


@case
def slice_without_axes_and_steps_cuts_the_first_axes(draw: Draw) -> Case:
    nodes = [constant("starts", [0, 1]), constant("ends", [2**63 - 1, 3]), node("Slice", ["a", "starts", "ends"], ["o"])]
    return Case(nodes, lambda a, _: a[:, 1:3], data(draw, [5, 2]))


@case
def pad(draw: Draw) -> Case:
    """Padding, cropping by negative padding, and, where they are named, only some of the axes."""
    x, named, value = data(draw), draw(st.booleans()), draw(st.sampled_from([None, 0.5]))
    axes = draw(st.lists(st.integers(1, x.ndim - 1), min_size=1, unique=True)) if named else list(range(x.ndim))
    pairs = {}
    for axis in axes:
        crop = 0 if x.shape[axis] < 2 else 1
        pairs[axis] = (draw(st.integers(-crop, 2)), 0) if draw(st.booleans()) else (0, draw(st.integers(0, 2)))
        pairs[axis] = (0, 0) if axis == 0 else pairs[axis]
    pads = [begin for begin, _ in pairs.values()] + [end for _, end in pairs.values()]
    nodes = [constant("pads", pads), constant("axes", axes), constant("value", value or 0, np.float32)]
    names = ["a", "pads", "value" if value else "", "axes" if named else ""]
    while not names[-1]:
        names.pop()
    nodes.append(node("Pad", names, ["o"]))
    turned = [part for axis in range(x.ndim - 1, 0, -1) for part in pairs.get(axis, (0, 0))]
    cropped = any(number < 0 for number in pads)  # onnx.reference does not crop
    return Case(nodes, lambda a, _: torch.nn.functional.pad(a, turned, value=value or 0.0), x, reference=not cropped)


@case
def expand(draw: Draw) -> Case:
    """A parameter to the batch's size, as torch does with a class token, and a value along fixed axes."""
    nodes = [
        node("Shape", ["a"], ["batch"], start=0, end=1),
        constant("rest", [1, 4]),
        node("Concat", ["batch", "rest"], ["sizes"], axis=0),
        node("Expand", ["token", "sizes"], ["tokens"]),
        node("Concat", ["tokens", "a"], ["joined"], axis=1),
        constant("wide", [1, 1, 4]),
        node("Expand", ["joined", "wide"], ["o"]),
    ]
    token = numbers(generator(draw), 1, 1, draw(st.sampled_from([1, 4])))
    x = data(draw, [3, draw(st.sampled_from([4]))])
    return Case(nodes, lambda a, q: torch.cat([q["token"].expand(len(a), 1, 4), a], 1), x, {"token": token})


@case
def gather_by_constants(draw: Draw) -> Case:
    """Numbers, runs, repetitions, negative indices, tables of indices; int32 and int64."""
    x = data(draw)
    axis = draw(st.integers(1, x.ndim - 1))
    size = x.shape[axis]
    index = st.integers(-size, size - 1)
    run = st.integers(0, size - 1).flatmap(lambda begin: st.integers(begin, size - 1).map(lambda end: list(range(begin, end + 1))))
    places = draw(index | run | st.lists(index, min_size=1, max_size=5) | st.lists(st.tuples(index, index), min_size=1, max_size=2))
    kind = draw(st.sampled_from([np.int64, np.int32]))
    nodes = [constant("i", places, kind), node("Gather", ["a", "i"], ["g"], axis=signed(draw, axis, x.ndim)), node("Tanh", ["g"], ["o"])]
    where = torch.tensor(np.asarray(places))

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.tanh(a.movedim(axis, 0)[where].movedim(list(range(where.ndim)), list(range(axis, axis + where.ndim))))

    return Case(nodes, forward, x)


@case
def embedding(draw: Draw) -> Case:
    """Rows of a table by tokens read from the data, many of them several times, some counted from the end."""
    rng, time = generator(draw), draw(st.integers(1, 6))
    tokens = rng.integers(-4, 4, (draw(st.integers(1, 5)), time)).astype(np.float32)
    nodes = [
        node("Cast", ["x"], ["tokens"], to=TensorProto.INT64),
        node("Gather", ["table", "tokens"], ["e"], axis=0),
        constant("axes", [2]),
        node("Unsqueeze", ["a", "axes"], ["wide"]),
        node("Mul", ["e", "wide"], ["o"]),
    ]
    table = numbers(rng, 4, *draw(st.sampled_from([(3,), (2,)])))

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        return q["table"][torch.tensor(tokens, dtype=torch.int64)] * a.unsqueeze(2)

    return Case(nodes, forward, tokens, {"table": table})
