"""The table's part for maps: convolutions, pooling, normalisation."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from onnx import helper

from tests.export.drawing import Case, Values, constant, numbers
from tests.export.gradient_cases import CASES, Draw, case, data, generator, signed

functional = torch.nn.functional
node = helper.make_node
Window = dict[str, Any]
MAPS = st.lists(st.integers(2, 4), min_size=1, max_size=2).filter(lambda sizes: math.prod(sizes) > 2)


def window(draw: Draw, *, dilated: bool = True) -> Window:
    """Geometry that convolution and pooling share."""
    rank = draw(st.sampled_from([1, 2]))
    axis = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = draw(axis), draw(axis), draw(axis) if dilated else [1] * rank
    pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilations, strict=True)]
    return {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "sizes": sizes}


def no_window_beyond(w: Window) -> None:
    """ceil_mode may lay a window where no number is: torch drops it, ONNX does not."""
    rank = len(w["kernel_shape"])
    for axis in range(rank):
        size, begin, end = w["sizes"][axis], w["pads"][axis], w["pads"][axis + rank]
        reach = (w["kernel_shape"][axis] - 1) * w["dilations"][axis] + 1
        last = -(-(size + begin + end - reach) // w["strides"][axis]) * w["strides"][axis]
        assume(last < size + begin)


def geometry(w: Window, *names: str) -> Window:
    return {name: w[name] for name in names}


def torch_pads(w: Window) -> list[int]:
    """functional.pad wants the last axis first."""
    rank = len(w["kernel_shape"])
    return [pad for i in reversed(range(rank)) for pad in (w["pads"][i], w["pads"][i + rank])]


def of_rank(w: Window, one: Any, two: Any) -> Any:
    return one if len(w["kernel_shape"]) == 1 else two


def convolution(draw: Draw, w: Window, group: int, channels: int, multiple: int = 2) -> Case:
    weights = {"w": numbers(generator(draw), group * multiple, channels, *w["kernel_shape"])}
    if draw(st.booleans()):
        weights["b"] = numbers(generator(draw), group * multiple)
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])) if set(w["dilations"]) == {1} else "NOTSET"
    attributes = geometry(w, "strides", "dilations", "pads") | {"group": group}
    if auto_pad != "NOTSET":
        attributes = geometry(w, "strides") | {"group": group, "auto_pad": auto_pad}
        w = w | {"pads": auto_pads(w, auto_pad)}

    def forward(a: torch.Tensor, q: Values) -> torch.Tensor:
        conv = of_rank(w, functional.conv1d, functional.conv2d)
        out: torch.Tensor = conv(
            functional.pad(a, torch_pads(w)), q["w"], q.get("b"), stride=w["strides"], dilation=w["dilations"], groups=group
        )
        return out

    nodes = [node("Conv", ["a", *weights], ["o"], **attributes)]
    # onnx.reference has other SAME pads, and no groups with two axes of different strides.
    return Case(nodes, forward, data(draw, [group * channels, *w["sizes"]]), weights, reference=auto_pad == "NOTSET")


def auto_pads(w: Window, auto_pad: str) -> list[int]:
    """As onnxruntime has them where no stride is larger than its window; it takes no others."""
    if auto_pad != "VALID":
        assume(all(stride <= length for stride, length in zip(w["strides"], w["kernel_shape"], strict=True)))
    totals = []
    for size, length, stride in zip(w["sizes"], w["kernel_shape"], w["strides"], strict=True):
        totals.append(0 if auto_pad == "VALID" else max((-(-size // stride) - 1) * stride + length - size, 0))
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return small + large if auto_pad == "SAME_UPPER" else large + small


@case
def conv(draw: Draw) -> Case:
    return convolution(draw, window(draw), draw(st.integers(1, 2)), draw(st.integers(1, 3)))


@case
def conv_of_stride_1(draw: Draw) -> Case:
    """Also with padding that no position of the kernel moves past."""
    w = window(draw)
    beyond = draw(st.integers(0, 1))
    w |= {"strides": [1] * len(w["kernel_shape"]), "pads": [pad + beyond for pad in w["pads"]]}
    return convolution(draw, w, draw(st.integers(1, 2)), draw(st.integers(1, 3)))


@case
def conv_depthwise(draw: Draw) -> Case:
    return convolution(draw, window(draw), draw(st.integers(2, 4)), 1, draw(st.sampled_from([1, 1, 2])))


@case
def conv_transpose(draw: Draw) -> Case:
    w = window(draw)
    group, channels, multiple = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    extra = [draw(st.integers(0, stride - 1)) for stride in w["strides"]]
    rank = len(extra)
    weights = {"w": numbers(generator(draw), group * channels, multiple, *w["kernel_shape"])}
    if draw(st.booleans()):
        weights["b"] = numbers(generator(draw), group * multiple)
    geometries = zip(w["sizes"], w["kernel_shape"], w["strides"], w["dilations"], w["pads"][:rank], w["pads"][rank:], extra, strict=True)
    assume(all((n - 1) * s + (k - 1) * d + 1 - begin - end + e > 0 for n, k, s, d, begin, end, e in geometries))

    def forward(a: torch.Tensor, q: Values) -> torch.Tensor:
        """Without padding, then cropped: torch pads both ends alike."""
        apply = of_rank(w, functional.conv_transpose1d, functional.conv_transpose2d)
        whole = apply(a, q["w"], q.get("b"), stride=w["strides"], dilation=w["dilations"], groups=group)
        bias = q["b"].reshape(-1, *[1] * rank) if "b" in q else torch.zeros((), dtype=a.dtype)
        # Positions that output_padding adds beyond the last window hold the bias alone.
        ends = [pad for axis in reversed(range(rank)) for pad in (-w["pads"][axis], extra[axis] - w["pads"][axis + rank])]
        cropped: torch.Tensor = functional.pad(whole - bias, ends) + bias
        return cropped

    attributes = geometry(w, "strides", "dilations", "pads") | {"group": group, "output_padding": extra}
    nodes = [node("ConvTranspose", ["a", *weights], ["o"], **attributes)]
    return Case(nodes, forward, data(draw, [group * channels, *w["sizes"]]), weights, reference=group == 1)


@case
def max_pool(draw: Draw) -> Case:
    w = window(draw)
    # A window that lies in the padding alone has no winner; torch does not allow such padding.
    rank = len(w["kernel_shape"])
    half = [min(pad, size // 2) for pad, size in zip(w["pads"], w["kernel_shape"] * 2, strict=True)]
    w["pads"] = half[:rank] * 2
    ceil_mode = draw(st.integers(0, 1))
    no_window_beyond(w)

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        pool = of_rank(w, functional.max_pool1d, functional.max_pool2d)
        out: torch.Tensor = pool(a, w["kernel_shape"], w["strides"], w["pads"][:rank], w["dilations"], bool(ceil_mode))
        return out

    nodes = [node("MaxPool", ["a"], ["o"], **geometry(w, "kernel_shape", "strides", "dilations", "pads"), ceil_mode=ceil_mode)]
    x = data(draw, [2, *w["sizes"]])
    assume(len(np.unique(x)) == x.size)
    return Case(nodes, forward, x, p=np.zeros(x.shape[1:], np.float32), reference=not ceil_mode)


@case
def max_pool_by_halves(draw: Draw) -> Case:
    """Even and odd sizes, some axes left alone, and nearly every window with equal largest values, 0.0 and -0.0 among them."""
    axes = draw(st.lists(st.tuples(st.sampled_from([1, 2, 2]), st.integers(2, 7)), min_size=1, max_size=2))
    kernel, sizes = [size for size, _ in axes], [size for _, size in axes]
    x = generator(draw).choice(np.array([-1, -0.0, 0.0, 1], np.float32), (draw(st.integers(1, 4)), 3, *sizes))
    pool = functional.max_pool1d if len(kernel) == 1 else functional.max_pool2d
    nodes = [node("MaxPool", ["a"], ["o"], kernel_shape=kernel, strides=kernel)]
    # Every p is -0.0 and so changes no bit of x.
    return Case(nodes, lambda a, _: pool(a, kernel), x, p=np.full(x.shape[1:], -0.0, np.float32), smooth=False)


def average(a: torch.Tensor, w: Window, include: int) -> torch.Tensor:
    """Sums over padded windows, divided by what a padded map of ones gives; torch itself knows only symmetric padding."""
    pool = of_rank(w, functional.avg_pool1d, functional.avg_pool2d)
    total: torch.Tensor = pool(functional.pad(a, torch_pads(w)), w["kernel_shape"], w["strides"])
    if include:
        return total
    ones = functional.pad(torch.ones_like(a), torch_pads(w))
    return torch.as_tensor(total / pool(ones, w["kernel_shape"], w["strides"]))


@case
def average_pool(draw: Draw) -> Case:
    w, include = window(draw, dilated=False), draw(st.integers(0, 1))
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER"]))
    attributes = geometry(w, "kernel_shape", "strides", "pads") | {"count_include_pad": include}
    if auto_pad != "NOTSET":
        del attributes["pads"]
        attributes["auto_pad"], w["pads"] = auto_pad, auto_pads(w, auto_pad)
    x = data(draw, [2, *w["sizes"]])
    return Case([node("AveragePool", ["a"], ["o"], **attributes)], lambda a, _: average(a, w, include), x, reference=auto_pad == "NOTSET")


@case
def average_pool_with_ceil_mode(draw: Draw) -> Case:
    """Windows that hang over the end, with symmetric padding, as torch has them; ones in the attribute that opset 19 added."""
    w, include = window(draw, dilated=False), draw(st.integers(0, 1))
    rank = len(w["kernel_shape"])
    w["pads"] = [min(pad, size // 2) for pad, size in zip(w["pads"], w["kernel_shape"], strict=False)] * 2
    no_window_beyond(w)
    opset = draw(st.sampled_from([18, 19, 21]))
    more = {"dilations": [1] * rank} if opset > 18 else {}
    attributes = geometry(w, "kernel_shape", "strides", "pads") | {"count_include_pad": include, "ceil_mode": 1, **more}
    pool = of_rank(w, functional.avg_pool1d, functional.avg_pool2d)

    def forward(a: torch.Tensor, _: Any) -> torch.Tensor:
        out: torch.Tensor = pool(a, w["kernel_shape"], w["strides"], w["pads"][:rank], True, bool(include))
        return out

    nodes = [node("AveragePool", ["a"], ["o"], **attributes)]
    return Case(nodes, forward, data(draw, [2, *w["sizes"]]), reference=False, opset=opset)


@case
def average_pool_that_tiles_the_map(draw: Draw) -> Case:
    """Positions that are left over at the end get 0."""
    axes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(3, 7)), min_size=1, max_size=2))
    kernel = [length for length, _ in axes]
    w = {"kernel_shape": kernel, "strides": kernel, "pads": [0] * 2 * len(kernel)}
    nodes = [node("AveragePool", ["a"], ["o"], kernel_shape=kernel, strides=kernel)]
    return Case(nodes, lambda a, _: average(a, w, 0), data(draw, [3, *(size for _, size in axes)]))


def _global(op: str, draw: Draw) -> Case:
    x = data(draw, [2, *draw(MAPS)])
    assume(len(np.unique(x)) == x.size)
    function = (lambda a: a.mean(2)) if op == "GlobalAveragePool" else (lambda a: a.max(2).values)
    p = np.zeros(x.shape[1:], np.float32)
    opset = draw(st.sampled_from([13, 18, 21]))
    reference = op == "GlobalAveragePool" or x.ndim == 4  # the GlobalMaxPool of onnx.reference is made for two spatial axes
    return Case([node(op, ["a"], ["o"])], lambda a, _: function(a.flatten(2)), x, p=p, opset=opset, reference=reference)


CASES |= {op: functools.partial(_global, op) for op in ("GlobalAveragePool", "GlobalMaxPool")}


@case
def global_max_pool_of_equal_values(draw: Draw) -> Case:
    x = generator(draw).choice(np.array([-1, 0, 1], np.float32), (2, 3, *draw(MAPS)))
    p = np.zeros(x.shape[1:], np.float32)
    return Case([node("GlobalMaxPool", ["a"], ["o"])], lambda a, _: a.flatten(2).max(2).values, x, p=p, smooth=False)


@case
def instance_normalization(draw: Draw) -> Case:
    """Scale and bias as parameters, or as constants that are not 1 and 0."""
    channels, epsilon, is_trained = draw(st.integers(2, 4)), draw(st.sampled_from([1e-5, 0.125])), draw(st.booleans())
    rng = generator(draw)
    given = {"scale": numbers(rng, channels) + np.float32(2), "bias": numbers(rng, channels)}
    nodes = [] if is_trained else [constant(name, array, np.float32) for name, array in given.items()]
    nodes.append(node("InstanceNormalization", ["a", "scale", "bias"], ["o"], epsilon=epsilon))

    def forward(a: torch.Tensor, q: Values) -> torch.Tensor:
        scale, bias = (q.get(name, torch.tensor(array)).to(a.dtype) for name, array in given.items())
        return functional.instance_norm(a, weight=scale, bias=bias, eps=epsilon)

    x = data(draw, [channels, *draw(MAPS)]) * np.float32(4)
    return Case(nodes, forward, x, given if is_trained else {})


@case
def group_normalization(draw: Draw) -> Case:
    """As torch exports it: InstanceNormalization between two Reshapes. Also around a mean much larger than the deviation."""
    groups, sizes = draw(st.integers(1, 3)), draw(MAPS)
    rng, channels = generator(draw), groups * draw(st.integers(1, 3))
    weights = {"w": numbers(rng, channels) + np.float32(2), "b": numbers(rng, channels)}
    nodes = [
        constant("groups", [0, groups, -1]),
        constant("ones", np.ones(groups), np.float32),
        constant("zeros", np.zeros(groups), np.float32),
        constant("axes", range(1, 1 + len(sizes))),
        node("Reshape", ["a", "groups"], ["g"]),
        node("InstanceNormalization", ["g", "ones", "zeros"], ["n"], epsilon=1e-5),
        node("Shape", ["a"], ["shape"]),
        node("Reshape", ["n", "shape"], ["r"]),
        node("Unsqueeze", ["w", "axes"], ["w1"]),
        node("Unsqueeze", ["b", "axes"], ["b1"]),
        node("Mul", ["r", "w1"], ["m"]),
        node("Add", ["m", "b1"], ["o"]),
    ]
    x = data(draw, [channels, *sizes]) * np.float32(4) + np.float32(draw(st.sampled_from([0, 16])))
    return Case(nodes, lambda a, q: functional.group_norm(a, groups, q["w"], q["b"], eps=1e-5), x, weights)


@case
def group_normalization_op(draw: Draw) -> Case:
    groups = draw(st.integers(1, 3))
    rng, channels = generator(draw), groups * draw(st.integers(1, 3))
    weights = {"w": numbers(rng, channels) + np.float32(2), "b": numbers(rng, channels)}
    nodes = [node("GroupNormalization", ["a", "w", "b"], ["o"], num_groups=groups, epsilon=0.01)]
    x = data(draw, [channels, *draw(MAPS)]) * np.float32(4)
    # onnx.reference computes it in float32.
    return Case(nodes, lambda a, q: functional.group_norm(a, groups, q["w"], q["b"], eps=0.01), x, weights, reference=False, opset=21)


@case
def layer_normalization(draw: Draw) -> Case:
    """Over the last axes; a scale of their shape or smaller; with and without a bias."""
    x = data(draw, [*draw(st.lists(st.integers(1, 3), max_size=2)), 4]) * np.float32(4)
    axis = draw(st.integers(1, x.ndim - 1))
    shape, rng = list(x.shape[axis:]), generator(draw)
    shape = shape[1:] if len(shape) > 1 and draw(st.booleans()) else shape
    weights = {"w": numbers(rng, *shape) + np.float32(2)} | ({"b": numbers(rng, *shape)} if draw(st.booleans()) else {})

    def forward(a: torch.Tensor, q: Values) -> torch.Tensor:
        return functional.layer_norm(a, a.shape[axis:], eps=0.01) * q["w"] + q.get("b", torch.zeros((), dtype=a.dtype))

    nodes = [node("LayerNormalization", ["a", *weights], ["o"], axis=signed(draw, axis, x.ndim), epsilon=0.01)]
    return Case(nodes, forward, x, weights)
