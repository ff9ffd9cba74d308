"""Every gradient rule against torch's float64 autograd and finite differences, over drawn shapes and attributes; and what is refused."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.lowering import REPLACED
from export.rules import RULES
from export.ways import NEVER, OTHERS, Ways
from regrow.errors import LocalError
from tests.export import moving_cases, window_cases
from tests.export.drawing import CLASSES, Case, Values, check_case, constant, drawn, gradient_program, network, numbers
from tests.export.gradient_cases import CASES, CORNERS
from tests.export.running import Arrays, assert_close, session_of, step

functional = torch.nn.functional
node = helper.make_node
COVERED = {moving_cases, window_cases}
"""Imported for the cases that they add to the table."""


@pytest.mark.parametrize("name", CASES)
@drawn(12)
@given(data=st.data())
def test_gradients(name: str, data: st.DataObject) -> None:
    check_case(CASES[name](data.draw))


WAYS = {
    "columns, shift": Ways(product_pairs=0, columns_positions=NEVER, shift_channels=1, shift_waste=NEVER, multiply_positions=1),
    "transpose, unfold": Ways(product_pairs=0, columns_positions=0, shift_channels=NEVER, multiply_positions=NEVER),
    "transpose, unfold as it is": Ways(product_pairs=0, columns_positions=0, shift_channels=NEVER, narrow=0),
    **OTHERS,
}


@pytest.mark.parametrize("way", WAYS)
@drawn(12)
@given(data=st.data())
def test_every_way_to_the_gradients_of_a_convolution(way: str, data: st.DataObject) -> None:
    check_case(CASES[data.draw(st.sampled_from(["conv", "conv_depthwise", "conv_transpose"]))](data.draw), WAYS[way])


@pytest.mark.parametrize("op", [*CORNERS, "Clip"])
def test_corners_go_as_in_torch(op: str) -> None:
    x = np.array([[-3, -0.0, 0, 3, 1, -1, 4, -4]], np.float32)
    names, nodes, function = ["a"], [], CORNERS.get(op, lambda a: torch.clamp(a, -3, 3))
    if op == "Clip":
        names, nodes = ["a", "low", "high"], [constant("low", -3, np.float32), constant("high", 3, np.float32)]
    attributes: dict[str, float] = {"HardSigmoid": {"alpha": 1 / 6}, "LeakyRelu": {"alpha": 0.125}}.get(op, {})
    attributes |= {"alpha": 0.5} if op in ("Celu", "Elu") else {}
    case = Case([*nodes, node(op, names, ["o"], **attributes)], lambda a, _: function(a), x, p=np.full(8, -0.0, np.float32), smooth=False)
    check_case(case)


@pytest.mark.parametrize("op", ["Max", "Min", "ReduceMax", "ReduceMin"])
def test_equal_values_share_the_gradient_as_in_torch(op: str) -> None:
    x = np.array([[1, 1, 0, -1], [2, 2, 2, 2]], np.float32)
    functions: dict[str, Any] = {"Max": torch.maximum, "Min": torch.minimum, "ReduceMax": torch.amax, "ReduceMin": torch.amin}
    other = np.array([1, 0, 0, -2], np.float32)
    is_binary = op in ("Max", "Min")
    nodes = [constant("axes", [1]), node(op, ["a", "b" if is_binary else "axes"], ["r"])]
    nodes.append(node("Mul", ["r", "b"], ["o"]))

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        return q["b"] * (functions[op](a, q["b"]) if is_binary else functions[op](a, 1, keepdim=True))

    check_case(Case(nodes, forward, x, {"b": other}, p=np.zeros(4, np.float32), smooth=False))


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_the_first_of_two_zeros_takes_the_gradient_whatever_their_signs(zeros: tuple[float, float]) -> None:
    check_case(pooled(np.array([[[*zeros, *zeros]]], np.float32), [2], [2]))
    check_case(pooled(np.array([[[[-1, zeros[0]], [zeros[1], -1]]]], np.float32), [2, 2], [2, 2]))


def pooled(x: np.ndarray[Any, Any], kernel: list[int], strides: list[int], ceil_mode: int = 0) -> Case:
    pool: Any = functional.max_pool1d if len(kernel) == 1 else functional.max_pool2d
    nodes = [node("MaxPool", ["a"], ["o"], kernel_shape=kernel, strides=strides, ceil_mode=ceil_mode)]
    p = np.full(x.shape[1:], -0.0, np.float32)
    return Case(nodes, lambda a, _: pool(a, kernel, stride=strides, ceil_mode=bool(ceil_mode)), x, p=p, smooth=False)


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
    assert ("ScatterElements" not in check_case(pooled(x, kernel, strides, ceil_mode))) == halved


@pytest.mark.parametrize(("sizes", "products"), [([100], True), ([300], True), ([24, 24], True), ([60, 60], False)])
def test_depthwise_convolutions_of_small_maps_and_bands_become_products(sizes: list[int], products: bool) -> None:
    w = numbers(np.random.default_rng(0), 4, 1, *[3] * len(sizes))
    model = network([node("Conv", ["a", "w"], ["o"], group=4)], {"p": np.zeros((4, *sizes), np.float32), "w": w}, [4, *sizes])
    assert ("Conv" not in {each.op_type for each in onnx.load_from_string(gradient_program(model)).graph.node}) == products


@pytest.mark.parametrize(
    ("sizes", "kernel", "strides", "dilations", "pads"),
    [
        ([11, 9], [3, 3], [1, 1], [1, 1], [1, 1, 1, 1]),  # 11 rows in bands of two: the last one is cut
        ([12, 10], [5, 3], [1, 1], [1, 1], [2, 1, 2, 1]),  # a band goes on into two others
        ([25, 5], [3, 3], [1, 1], [1, 1], [0, 1, 2, 1]),
        ([23, 12], [3, 3], [2, 2], [1, 1], [1, 1, 1, 1]),
        ([24, 8], [1, 3], [3, 1], [1, 1], [0, 1, 0, 1]),  # rows that no kernel meets
        ([14, 9], [3, 3], [1, 1], [3, 1], [3, 1, 3, 1]),
        ([130], [4], [1], [2], [3, 3]),
    ],
)
def test_bands_of_depthwise_convolutions(
    sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> None:
    rng, rank = np.random.default_rng(7), len(sizes)
    geometry = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    nodes = [node("Conv", ["a", "w", "b"], ["o"], group=2, **geometry)]
    weights = {"w": numbers(rng, 2, 1, *kernel), "b": numbers(rng, 2)}

    def forward(a: torch.Tensor, q: Values) -> torch.Tensor:
        a = functional.pad(a, [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])])
        apply: Any = [functional.conv1d, functional.conv2d][rank - 1]
        return apply(a, q["w"], q["b"], stride=strides, dilation=dilations, groups=2)

    ops = check_case(Case(nodes, forward, numbers(rng, 3, 2, *sizes), weights), Ways(product_pairs=2000))
    assert "Conv" not in ops
    assert "OneHot" in ops


@pytest.mark.parametrize(("outputs", "turned"), [(512, True), (128, False)])
def test_large_fully_connected_layers_leave_their_weights_unpacked(outputs: int, turned: bool) -> None:
    rng = np.random.default_rng(8)
    weights = {"w": numbers(rng, outputs, 600), "b": numbers(rng, outputs)}
    nodes = [node("Gemm", ["a", "w", "b"], ["o"], transB=1)]
    ops = check_case(Case(nodes, lambda a, q: a @ q["w"].T + q["b"], numbers(rng, 3, 600), weights))
    assert ("Transpose" in ops) == turned


@pytest.mark.parametrize(
    ("length", "attributes", "ways"),
    [
        (8, {}, {"Col2Im"}),
        (8, {"strides": [2]}, {"Col2Im"}),
        (8, {"dilations": [2]}, {"ConvTranspose"}),  # onnxruntime's Col2Im is wrong there
        (80, {}, {"ConvTranspose"}),
        (80, {"group": 2}, set()),  # a Conv with the kernel turned around
        (80, {"group": 2, "strides": [2]}, {"ConvTranspose"}),
        (80, {"group": 2, "pads": [3, 0]}, {"ConvTranspose"}),
    ],
)
def test_the_way_to_the_gradient_of_the_input_follows_from_the_shapes(length: int, attributes: dict[str, Any], ways: set[str]) -> None:
    w = numbers(np.random.default_rng(0), 4, 4 // attributes.get("group", 1), 3)
    model = network([node("Conv", ["a", "w"], ["o"], **attributes)], {"p": np.zeros((4, length), np.float32), "w": w}, [4, length])
    ops = {each.op_type for each in onnx.load_from_string(gradient_program(model)).graph.node}
    assert ops & {"Col2Im", "ConvTranspose"} == ways


@pytest.mark.parametrize("threads", [1, 2])
def test_an_embedding_sums_many_rows_exactly_on_any_number_of_threads(threads: int) -> None:
    """Few rows, often hit, of whole numbers: a lost or doubled addition would show."""
    rng = np.random.default_rng(0)
    nodes = [node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Gather", ["table", "i"], ["e"]), constant("axes", [2])]
    nodes += [node("Unsqueeze", ["a", "axes"], ["u"]), node("Mul", ["e", "u"], ["o"])]
    model = network(nodes, {"p": np.zeros(500, np.float32), "table": np.ones((3, 256), np.float32)}, [500])
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = ort.InferenceSession(gradient_program(model), options, providers=["CPUExecutionProvider"])
    x = rng.integers(0, 3, (8, 500)).astype(np.float32)
    feed = {"x": x, "seed": np.ones((8, 500 * 256), np.float32), "p": np.zeros(500, np.float32), "table": np.ones((3, 256), np.float32)}
    wanted = [x[x == row].sum() for row in range(3)]
    np.testing.assert_array_equal(step(session, feed)["gradient:table"], np.repeat(wanted, 256).reshape(3, 256))


def test_a_tied_weight_gets_the_sum() -> None:
    w = numbers(np.random.default_rng(0), 2, 2, 1, 1)
    nodes = [node("Conv", ["a", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Conv", ["r", "w"], ["o"])]

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        return functional.conv2d(torch.relu(functional.conv2d(a, q["w"])), q["w"])

    check_case(Case(nodes, forward, numbers(np.random.default_rng(1), 3, 2, 4, 3), {"w": w}))


class Encoder(torch.nn.Module):
    """Tokens, a class token, attention: shapes that the exporter computes in the graph, masks, and Gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, CLASSES)
        self.first = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.places = torch.nn.Parameter(torch.randn(1, 6, 8))
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(x.long())
        rows = torch.cat([self.first.expand(rows.shape[0], -1, -1), rows], 1) + self.places
        scores: torch.Tensor = self.head(self.layer(rows)[:, 0])
        return scores


class Gated(torch.nn.Module):
    """Normalised groups, a depthwise convolution, squeeze and excitation, chunks of channels, a ConvTranspose, two kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.begin = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.GroupNorm(3, 6), nn.PReLU(6))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Hardsigmoid())
        self.depthwise, self.up = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.begin(x)
        left, right = (a + self.depthwise(a) * self.gate(a)).chunk(2, 1)
        a = functional.avg_pool2d(functional.silu(self.up(torch.cat([left.clamp(-1, 1), functional.softplus(right)], 1))), 3, 2, 1)
        pools = [functional.adaptive_avg_pool2d(a, 1), functional.adaptive_max_pool2d(a, 1)]
        scores: torch.Tensor = self.head(torch.cat([pool.flatten(1) for pool in pools], 1))
        return scores


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(("module", "x"), [(Encoder, torch.arange(15).reshape(3, 5) % 9), (Gated, torch.randn(3, 2, 8, 8))])
def test_models_as_torch_exports_them(module: type[torch.nn.Module], x: torch.Tensor, opset: int) -> None:
    torch.manual_seed(0)
    net, file = module().eval(), io.BytesIO()
    for parameter in net.parameters():  # the exporter merges equal ones
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the new exporter needs a package more
        target: Any = file
        named = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(net, (x.float(),), target, dynamo=False, opset_version=opset, do_constant_folding=False, **named)
    model = onnx.load_from_string(file.getvalue())
    weights = {name: parameter.detach().numpy() for name, parameter in net.named_parameters()}
    net = net.double()
    seed = numbers(np.random.default_rng(0), 3, CLASSES)
    (net(x.double()) * torch.tensor(seed)).sum().backward()
    ours = step(session_of(gradient_program(model)), {"x": x.float().numpy(), "seed": seed, **weights})
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert_close(ours[f"gradient:{name}"], parameter.grad.numpy(), name)


def test_the_table_covers_every_rule() -> None:
    """Ops of every drawn case, against those that have a rule."""
    seen: set[str] = set()

    @drawn(1)
    @given(data=st.data())
    def look(data: st.DataObject) -> None:
        seen.update(each.op_type for make in CASES.values() for each in make(data.draw).nodes)

    look()
    # Of these only that they pass no gradient can be said, as the table does of Floor, Not and GreaterOrEqual.
    flat = {"And", "ArgMax", "ArgMin", "Ceil", "ConstantOfShape", "Equal", "Greater", "IsNaN", "Less", "LessOrEqual", "Or", "Round", "Sign"}
    elsewhere = {"BatchNormalization", "GRU", "LSTM"}  # test_batch_norm.py, test_recurrent.py
    assert RULES.keys() | REPLACED <= seen | flat | elsewhere | {"Flatten"}  # every network ends in Flatten


# What is refused


def ones(*names: str, **shapes: tuple[int, ...]) -> Arrays:
    return {name: np.ones(shapes.get(name, (3,)), np.float32) for name in ("p", *names)}


REFUSED: dict[str, tuple[list[onnx.NodeProto], Arrays, str]] = {
    "op with a cure": ([node("Tile", ["a", "times"], ["o"], name="odd")], ones(), "no gradient rule; use Expand and Reshape"),
    "op": ([node("Atan", ["a"], ["o"], name="odd")], ones(), "no gradient rule; replace it by supported ops.*Conv.*add a rule"),
    "domain": ([node("Relu", ["a"], ["o"], name="odd", domain="corner")], ones(), "of another domain than ai.onnx"),
    "batch mean": ([node("ReduceMean", ["a", "zero"], ["m"], name="odd"), node("Add", ["a", "m"], ["o"])], ones(), "a mean over the batch"),
    "pad mode": ([node("Pad", ["a", "pads"], ["o"], name="odd", mode="edge")], ones(), "mode 'edge'.*pad with a constant"),
    "trained padding": ([node("Pad", ["a", "pads", "w"], ["o"], name="odd")], ones("w", w=()), "value that would be trained"),
    "slice of the batch": (
        [node("Slice", ["a", "one", "two", "zero"], ["o"], name="odd")],
        ones(),
        "axis 0 of 'a' with a size that is only known at run time",
    ),
    "concat of batches": ([node("Concat", ["a", "a"], ["o"], name="odd", axis=0)], ones(), "axis 0 of 'a' with a size that is only known"),
    "computed bound": (
        [node("Shape", ["a"], ["size"], start=0, end=1), node("Slice", ["a", "zero", "size", "one"], ["o"], name="odd")],
        ones("head", head=(3, CLASSES)),
        "'size', which is computed",
    ),
    "trained exponent": ([node("Pow", ["a", "w"], ["o"], name="odd")], ones("w", w=()), "an exponent that is not one constant.*Constant"),
    "many exponents": ([node("Pow", ["a", "many"], ["o"], name="odd")], ones(), "an exponent that is not one constant number"),
    "trained bound": ([node("Clip", ["a", "w"], ["o"], name="odd")], ones("w", w=()), "a bound that would be trained.*Constant node"),
    "three to compare": ([node("Max", ["a", "a", "a"], ["o"], name="odd")], ones(), "3 operands.*two at a time"),
    "training dropout": (
        [constant("on", True, np.bool_), node("Dropout", ["a", "", "on"], ["o"], name="odd")],
        ones(),
        "training_mode.*export the model in evaluation mode",
    ),
    "half precision": (
        [node("Cast", ["a"], ["h"], name="odd", to=TensorProto.FLOAT16), node("Cast", ["h"], ["o"], to=TensorProto.FLOAT)],
        ones(),
        "keep the model in float32",
    ),
    "norm without a map": (
        [node("InstanceNormalization", ["a", "s", "b"], ["o"], name="odd")],
        ones("s", "b"),
        "no spatial axis.*rank 3",
    ),
    "second output": (
        [node("LayerNormalization", ["a", "s"], ["n", "m"], name="odd"), node("Add", ["n", "m"], ["o"])],
        ones("s"),
        "a second output in use.*first output only",
    ),
    "storage order": (
        [node("MaxPool", ["a"], ["o"], name="odd", kernel_shape=[1], storage_order=1)],
        ones(p=(2, 3)),
        "storage_order 1.*row-major",
    ),
    "window beyond the map": (
        [node("MaxPool", ["a"], ["o"], name="odd", kernel_shape=[1], strides=[2], ceil_mode=1)],
        ones(p=(2, 4)),
        "ceil_mode 1 with a window that lies beyond the map",
    ),
    "output_shape": (
        [node("ConvTranspose", ["a", "w"], ["o"], name="odd", output_shape=[4])],
        ones("w", p=(2, 3), w=(2, 1, 2)),
        "auto_pad or output_shape.*as numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_covers_is_named_with_its_node_and_the_cure(name: str) -> None:
    nodes, weights, message = REFUSED[name]
    rank = weights["p"].ndim + 1
    given = {"zero": [0], "one": [1], "two": [2], "times": [1, 1], "pads": [0, 1] * rank}
    constants = [constant(key, value) for key, value in given.items()] + [constant("many", [1, 2, 3], np.float32)]
    model = network([*constants, *nodes], weights, weights["p"].shape, features=3 if name == "domain" else None)
    odd = next(each for each in nodes if each.name == "odd")
    op = f"{odd.domain}.{odd.op_type}" if odd.domain else odd.op_type
    with pytest.raises(LocalError, match=rf"cannot train {op} \(node 'odd', output '{odd.output[0]}'\): it .*{message}"):
        gradient_program(model)


def test_a_model_that_was_exported_for_one_batch_size_is_refused() -> None:
    model = network(
        [constant("rows", [3, 4]), node("Reshape", ["a", "rows"], ["r"]), node("Shape", ["a"], ["s"]), node("Reshape", ["r", "s"], ["o"])],
        ones(p=(4,)),
        [4],
    )
    with pytest.raises(LocalError, match=r"does not run on a batch of 7.*x\.shape"):
        gradient_program(model)


def test_an_op_before_the_first_parameter_needs_no_rule() -> None:
    nodes = [node("Atan", ["x"], ["s"]), node("Mul", ["a", "s"], ["o"])]
    session = session_of(gradient_program(network(nodes, ones(), [3])))
    x = np.array([[1, 2, 3]], np.float32)
    got = step(session, {"x": x, "seed": np.ones((1, 3), np.float32), **ones()})
    np.testing.assert_allclose(got["gradient:p"], np.arctan(x[0]), rtol=1e-6)
