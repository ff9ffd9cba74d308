"""Every gradient rule against torch's float64 autograd, over drawn shapes and attributes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import export.convolution_rules
from export.programs import build_programs
from regrow.errors import LocalError
from tests.export.running import Arrays, check_against_torch, model_of

drawn = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CLASSES = 4
functional = torch.nn.functional


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 multiples of 2**-12: ties and ReLU's corner stay improbable, and float32 holds them exactly."""
    return np.asarray(rng.integers(-4096, 4096, shape) / 4096, np.float32)


def labels(rng: np.random.Generator, batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return rng.integers(0, CLASSES, batch)


def ops_of(model: onnx.ModelProto) -> set[str]:
    """Op types of the training program."""
    return {node.op_type for node in onnx.load_from_string(build_programs(model)["train"]).graph.node}


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Geometry that Conv and MaxPool share."""
    rank = draw(st.sampled_from([1, 2]))
    axis = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = draw(axis), draw(axis), draw(axis)
    pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilations, strict=True)]
    return {"kernel": kernel, "strides": strides, "dilations": dilations, "pads": pads, "sizes": sizes}


def out_sizes(w: dict[str, Any]) -> list[int]:
    rank = len(w["kernel"])
    totals = [size + w["pads"][i] + w["pads"][i + rank] for i, size in enumerate(w["sizes"])]
    return [(total - (k - 1) * d - 1) // s + 1 for total, k, d, s in zip(totals, w["kernel"], w["dilations"], w["strides"], strict=True)]


def torch_pads(w: dict[str, Any]) -> list[int]:
    """functional.pad wants the last axis first."""
    rank = len(w["kernel"])
    return [pad for i in reversed(range(rank)) for pad in (w["pads"][i], w["pads"][i + rank])]


WAYS = {
    "columns, shift": {"COLUMNS_POSITIONS": 10**9, "SHIFT_CHANNELS": 1, "SHIFT_WASTE": 10**9, "MULTIPLY_POSITIONS": 1},
    "transpose, unfold": {"COLUMNS_POSITIONS": 0, "SHIFT_CHANNELS": 10**9, "MULTIPLY_POSITIONS": 10**9},
    "transpose, unfold wide": {"COLUMNS_POSITIONS": 0, "SHIFT_CHANNELS": 10**9, "WIDE": 0},
}


@pytest.mark.parametrize("way", WAYS)
@drawn
@given(
    w=windows(),
    stride_1=st.booleans(),
    group=st.integers(1, 2),
    channels=st.integers(1, 3),
    batch=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_conv(
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    w: dict[str, Any],
    stride_1: bool,
    group: int,
    channels: int,
    batch: int,
    bias: bool,
    seed: int,
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(export.convolution_rules, name, value)
    if stride_1:
        w = w | {"strides": [1] * len(w["kernel"])}
    check_conv(w, group, channels, batch, bias, seed)


def check_conv(w: dict[str, Any], group: int, channels: int, batch: int, bias: bool, seed: int) -> set[str]:
    """Check a Conv behind another, which gives it an input that needs a gradient; returns the op types of the training program."""
    rng = np.random.default_rng(seed)
    rank, inner, outer = len(w["kernel"]), group * channels, group * 2
    ones = [1] * rank
    weights: Arrays = {"first": numbers(rng, inner, 2, *ones), "w": numbers(rng, outer, channels, *w["kernel"])}
    if bias:
        weights["b"] = numbers(rng, outer)
    features = outer * int(np.prod(out_sizes(w)))
    weights["head"] = numbers(rng, features, CLASSES) / np.float32(8)
    attributes = {"group": group, "pads": w["pads"], "strides": w["strides"], "dilations": w["dilations"]}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node("Conv", ["a", "w", "b"] if bias else ["a", "w"], ["c"], **attributes),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        conv: Any = functional.conv1d if rank == 1 else functional.conv2d
        padded = functional.pad(conv(x, p["first"]), torch_pads(w))
        c = conv(padded, p["w"], p.get("b"), stride=w["strides"], dilation=w["dilations"], groups=group)
        return c.flatten(1) @ p["head"]

    model = model_of(nodes, weights, [2, *w["sizes"]], CLASSES)
    check_against_torch(model, forward, weights, numbers(rng, batch, 2, *w["sizes"]), labels(rng, batch))
    return ops_of(model)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_conv_auto_pad(auto_pad: str) -> None:
    rng = np.random.default_rng(5)
    length, kernel, stride = 9, 4, 2
    total = 0 if auto_pad == "VALID" else 3  # ceil(9 / 2) = 5 outputs need (5 - 1) * 2 + 4 = 12 inputs
    begin = {"VALID": 0, "SAME_UPPER": 1, "SAME_LOWER": 2}[auto_pad]
    outputs = (length + total - kernel) // stride + 1
    weights: Arrays = {"w": numbers(rng, 3, 2, kernel), "head": numbers(rng, 3 * outputs, CLASSES)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], auto_pad=auto_pad, strides=[stride]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        padded = functional.pad(x, (begin, total - begin))
        return functional.conv1d(padded, p["w"], stride=stride).flatten(1) @ p["head"]

    model = model_of(nodes, weights, [2, length], CLASSES)
    check_against_torch(model, forward, weights, numbers(rng, 3, 2, length), labels(rng, 3))


@drawn
@given(w=windows(), batch=st.integers(1, 4), seed=st.integers(0, 999))
def test_max_pool(w: dict[str, Any], batch: int, seed: int) -> None:
    # A window that lies in the padding alone has no winner; torch does not allow such padding.
    rank = len(w["kernel"])
    pads = [pad // 2 for pad in w["pads"][:rank]] * 2
    w = w | {"pads": pads}
    rng = np.random.default_rng(seed)
    features = 3 * int(np.prod(out_sizes(w)))
    weights: Arrays = {"w": numbers(rng, 3, 2, *[1] * rank), "head": numbers(rng, features, CLASSES) / np.float32(8)}
    options = {"kernel_shape": w["kernel"], "strides": w["strides"], "pads": pads, "dilations": w["dilations"]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["m"], **options),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        conv, pool = (functional.conv1d, functional.max_pool1d) if rank == 1 else (functional.conv2d, functional.max_pool2d)
        m = pool(conv(x, p["w"]), w["kernel"], stride=w["strides"], padding=pads[:rank], dilation=w["dilations"])
        return m.flatten(1) @ p["head"]

    x = numbers(rng, batch, 2, *w["sizes"])
    assume(len(np.unique(x)) == x.size)
    check_against_torch(model_of(nodes, weights, [2, *w["sizes"]], CLASSES), forward, weights, x, labels(rng, batch))


def pooled(x: np.ndarray[Any, Any], kernel: list[int], strides: list[int], ceil_mode: int = 0) -> set[str]:
    """Check a MaxPool of x + p, where every p is -0.0 and so changes no bit of x; returns the op types of the training program."""
    rng = np.random.default_rng(x.size)
    rank = len(kernel)
    pool: Any = functional.max_pool1d if rank == 1 else functional.max_pool2d

    def max_pool(values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = pool(values, kernel, stride=strides, ceil_mode=bool(ceil_mode))
        return out.flatten(1)

    features = max_pool(torch.tensor(x)).shape[1]
    weights: Arrays = {"p": np.full(x.shape[1:], -0.0, np.float32), "head": numbers(rng, features, CLASSES)}
    nodes = [
        helper.make_node("Add", ["x", "p"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["m"], kernel_shape=kernel, strides=strides, ceil_mode=ceil_mode),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]
    model = model_of(nodes, weights, x.shape[1:], CLASSES)
    check_against_torch(model, lambda x, p: max_pool(x + p["p"]) @ p["head"], weights, x, labels(rng, len(x)))
    return ops_of(model)


@drawn
@given(
    axes=st.lists(st.tuples(st.sampled_from([1, 2, 2]), st.integers(2, 7)), min_size=1, max_size=2),
    batch=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_max_pool_by_halves_gives_ties_to_the_first(axes: list[tuple[int, int]], batch: int, seed: int) -> None:
    """Even and odd sizes, some axes left alone, and nearly every window with equal largest values, 0.0 and -0.0 among them."""
    kernel, sizes = [size for size, _ in axes], [size for _, size in axes]
    x = np.random.default_rng(seed).choice(np.array([-1, -0.0, 0.0, 1], np.float32), (batch, 3, *sizes))
    assert "ScatterElements" not in pooled(x, kernel, kernel)


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_the_first_of_two_zeros_takes_the_gradient_whatever_their_signs(zeros: tuple[float, float]) -> None:
    x = np.array([[[*zeros, *zeros]]], np.float32)
    pooled(x, [2], [2])
    pooled(np.array([[[[-1, zeros[0]], [zeros[1], -1]]]], np.float32), [2, 2], [2, 2])


@pytest.mark.parametrize(
    ("kernel", "strides", "ceil_mode", "halved"),
    [
        ([2, 2], [2, 2], 0, True),
        ([2, 1], [2, 1], 0, True),
        ([2, 2], [2, 2], 1, False),  # 7 columns: the last window holds one
        ([2, 1], [2, 1], 1, True),  # 6 rows: nothing left over
        ([2, 2], [2, 1], 0, False),
        ([2, 3], [2, 3], 0, False),
        ([1, 1], [2, 2], 0, False),
    ],
)
def test_only_windows_that_halve_are_compared(kernel: list[int], strides: list[int], ceil_mode: int, halved: bool) -> None:
    x = np.random.default_rng(3).permutation(2 * 3 * 6 * 7).reshape(2, 3, 6, 7).astype(np.float32) / 256
    assert ("ScatterElements" not in pooled(x, kernel, strides, ceil_mode)) == halved


@drawn
@given(
    flags=st.tuples(st.booleans(), st.booleans()),
    scales=st.tuples(st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 0.25])),
    bias=st.sampled_from([(), (1,), (CLASSES,), (1, CLASSES)]),
    batch=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_gemm(flags: tuple[bool, bool], scales: tuple[float, float], bias: tuple[int, ...], batch: int, seed: int) -> None:
    """One Gemm of two parameters, with every transposition, and one of data and parameter."""
    rng = np.random.default_rng(seed)
    trans_a, trans_b = flags
    weights: Arrays = {
        "left": numbers(rng, 5, 1) if trans_a else numbers(rng, 1, 5),
        "right": numbers(rng, CLASSES, 5) if trans_b else numbers(rng, 5, CLASSES),
        "b": numbers(rng, *bias),
        "first": numbers(rng, 3, 6),
        "w": numbers(rng, CLASSES, 6) if trans_b else numbers(rng, 6, CLASSES),
    }
    attributes = {"alpha": scales[0], "beta": scales[1], "transB": int(trans_b)}
    nodes = [
        helper.make_node("Gemm", ["left", "right", "b"], ["g"], transA=int(trans_a), **attributes),
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Gemm", ["a", "w", "g"], ["logits"], **attributes),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        left = p["left"].T if trans_a else p["left"]
        right, w = (p["right"].T, p["w"].T) if trans_b else (p["right"], p["w"])
        g = scales[0] * left @ right + scales[1] * p["b"]
        return scales[0] * (x @ p["first"]) @ w + scales[1] * g

    model = model_of(nodes, weights, [3], CLASSES)
    check_against_torch(model, forward, weights, numbers(rng, batch, 3), labels(rng, batch))


@drawn
@given(axes=st.lists(st.integers(1, 3), max_size=2), bias=st.integers(0, 4), batch=st.integers(1, 4), seed=st.integers(0, 999))
def test_matmul_add_relu_reshape(axes: list[int], bias: int, batch: int, seed: int) -> None:
    """MatMul over leading axes, a bias that broadcasts in any way, ReLU, Reshape and a value that is used twice."""
    rng = np.random.default_rng(seed)
    full = [1, *axes, 5]
    bias_shape = [size if rng.random() < 0.5 else 1 for size in full[max(0, len(full) - bias) :]]
    features = int(np.prod(full))
    weights: Arrays = {
        "first": numbers(rng, 3, 3),
        "w": numbers(rng, 3, 5),
        "b": numbers(rng, *bias_shape),
        "head": numbers(rng, features, CLASSES),
    }
    shape = np.array([-1, features], np.int64)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Add", ["a", "a"], ["twice"]),
        helper.make_node("MatMul", ["twice", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Identity", ["r"], ["i"]),
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(shape)),
        helper.make_node("Reshape", ["i", "shape"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(2 * (x @ p["first"]) @ p["w"] + p["b"]).reshape(-1, features) @ p["head"]

    x = numbers(rng, batch, *axes, 3)
    check_against_torch(model_of(nodes, weights, [*axes, 3], CLASSES), forward, weights, x, labels(rng, batch))


@pytest.mark.parametrize(("rank", "opset"), [*itertools.product([1, 2], [13, 18, 21])])
def test_global_average_pool_and_a_tied_weight(rank: int, opset: int) -> None:
    rng = np.random.default_rng(rank)
    sizes = [6, 5][:rank]
    weights: Arrays = {"w": numbers(rng, 2, 2, *[1] * rank), "head": numbers(rng, 2, CLASSES)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["c2"]),
        helper.make_node("GlobalAveragePool", ["c2"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        conv: Any = functional.conv1d if rank == 1 else functional.conv2d
        return conv(torch.relu(conv(x, p["w"])), p["w"]).flatten(2).mean(2) @ p["head"]

    x = numbers(rng, 3, 2, *sizes)
    check_against_torch(model_of(nodes, weights, [2, *sizes], CLASSES, opset), forward, weights, x, labels(rng, 3))


def test_an_op_without_a_rule_is_named_with_its_node() -> None:
    weights = {"w": np.ones((3, CLASSES), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mix"),
        helper.make_node("Softplus", ["m"], ["logits"], name="soft"),
    ]
    with pytest.raises(LocalError, match=r"cannot train Softplus \(node 'soft', output 'logits'\).*Conv.*add a rule"):
        build_programs(model_of(nodes, weights, [3], CLASSES))


def test_an_op_before_the_first_parameter_needs_no_rule() -> None:
    weights = {"w": np.ones((3, CLASSES), np.float32)}
    nodes = [helper.make_node("Softplus", ["x"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["logits"])]
    assert build_programs(model_of(nodes, weights, [3], CLASSES)).keys() == {"layout", "train", "train_masked", "evaluate"}


def test_an_attribute_without_a_rule_is_named() -> None:
    weights = {"w": np.ones((2, 1, 1), np.float32), "head": np.ones((6, CLASSES), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["m"], name="pool", kernel_shape=[1], storage_order=1),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["logits"]),
    ]
    with pytest.raises(LocalError, match=r"MaxPool \(node 'pool'.*storage_order 1.*row-major"):
        build_programs(model_of(nodes, weights, [1, 3], CLASSES))
