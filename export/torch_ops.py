"""What each op of a forward graph is in torch: the one table to extend. Importing this module imports torch.

Every function takes the node's inputs and its attributes. Tensors of the model are torch's; shapes, axes and other whole numbers are
int64 NumPy arrays, so that nothing depends on a tensor's values and all of it can be mapped over clients (torch.func.vmap).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch.nn import functional

Inputs = Sequence[Any]
"""torch tensors, int64 NumPy arrays, and None for what is left out."""

Attributes = Mapping[str, Any]
Op = Callable[[Inputs, Attributes], Any]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONV_TRANSPOSE = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE_POOL = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


_KINDS = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


class UnsupportedError(Exception):
    """What a node asks for and this table does not have; export.torch_graph adds which node it is."""


def _conv(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x, weight, *bias = inputs
    kernel = tuple(weight.shape[2:])
    rank = len(kernel)
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    x, padding = _padded(x, _pads(attributes, x.shape[2:], kernel, strides, dilations), math.inf, 0.0)
    return _of_rank(_CONV, rank)(x, weight, bias[0] if bias else None, strides, padding, dilations, attributes.get("group", 1))


def _conv_transpose(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x, weight, *bias = inputs
    rank = weight.ndim - 2
    if attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER") or "output_shape" in attributes:
        raise UnsupportedError("padding by auto_pad or output_shape")
    ones, none = [1] * rank, [0] * rank
    strides, dilations, group = attributes.get("strides", ones), attributes.get("dilations", ones), attributes.get("group", 1)
    pads, extra = attributes.get("pads", none * 2), attributes.get("output_padding", none)
    # Padding that differs at the two ends is cut off behind: torch has one number per axis, and wants its extra positions there too.
    whole = _of_rank(_CONV_TRANSPOSE, rank)(x, weight, None, strides, 0, 0, group, dilations)
    for axis in range(rank):
        size = whole.shape[2 + axis] - pads[axis] - pads[axis + rank] + extra[axis]
        over = pads[axis] + size - whole.shape[2 + axis]
        whole = functional.pad(whole, [0, 0] * (rank - 1 - axis) + [-pads[axis], over])
    return whole if not bias else torch.add(whole, bias[0].reshape(-1, *ones))


def _max_pool(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    (x,) = inputs
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    x, padding = _padded(x, _pads(attributes, x.shape[2:], kernel, strides, dilations), min(kernel) // 2, -math.inf)
    return _of_rank(_MAX_POOL, rank)(x, kernel, strides, padding, dilations, bool(attributes.get("ceil_mode", 0)))


def _average_pool(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    (x,) = inputs
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides = attributes.get("strides", [1] * rank)
    if any(step != 1 for step in attributes.get("dilations", [])):
        raise UnsupportedError("dilations of an average")
    pads = _pads(attributes, x.shape[2:], kernel, strides, [1] * rank)
    pool, ceil, with_pad = _of_rank(_AVERAGE_POOL, rank), bool(attributes.get("ceil_mode", 0)), bool(attributes.get("count_include_pad", 0))
    if all(begin == end <= size // 2 for (begin, end), size in zip(pads, kernel, strict=True)):
        return pool(x, kernel, strides, [begin for begin, _ in pads], ceil, with_pad)
    if ceil:
        raise UnsupportedError("ceil_mode with padding that differs at the two ends")
    padded, _ = _padded(x, pads, 0, 0.0)
    means = pool(padded, kernel, strides)
    if with_pad:
        return means
    # Where padding is not to count, what was divided by the whole window is brought to its part inside the map.
    inside, _ = _padded(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device), pads, 0, 0.0)
    return means / pool(inside, kernel, strides)


def _of_rank(functions: Sequence[Callable[..., torch.Tensor]], rank: int) -> Callable[..., torch.Tensor]:
    if not 1 <= rank <= len(functions):
        raise UnsupportedError(f"{rank} spatial axes")
    return functions[rank - 1]


def _pads(
    attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(begin, end) of every spatial axis."""
    mode, rank = attributes.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        axes = zip(sizes, kernel, strides, dilations, strict=True)
        totals = [max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in axes]
        pads = [(total // 2, total - total // 2) for total in totals]
        return pads if mode == "SAME_UPPER" else [(end, begin) for begin, end in pads]
    given = attributes.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
    return list(zip(given[:rank], given[rank:], strict=True))


def _padded(x: torch.Tensor, pads: Sequence[tuple[int, int]], limit: float, value: float) -> tuple[torch.Tensor, list[int]]:
    """(input, padding that is left to the op): padding that the op cannot do itself is done before it."""
    if all(begin == end <= limit for begin, end in pads):
        return x, [begin for begin, _ in pads]
    flat = [number for pair in reversed(pads) for number in pair]
    return functional.pad(x, flat, value=value), [0] * len(pads)


def _gemm(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    a: torch.Tensor
    b: torch.Tensor
    a, b, *c = inputs
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    a, b = a.t() if attributes.get("transA", 0) else a, b.t() if attributes.get("transB", 0) else b
    product = a @ b if alpha == 1.0 else alpha * (a @ b)
    if not c or c[0] is None:
        return product
    return torch.add(product, c[0], alpha=beta)


def _instance_normalization(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x: torch.Tensor
    x, scale, bias = inputs
    axes = tuple(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    column = (-1, *[1] * len(axes))
    normal = (x - mean) / torch.sqrt(variance + attributes.get("epsilon", 1e-5))
    return torch.add(normal * scale.reshape(column), bias.reshape(column))


def _batch_normalization(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    """With the batch's own mean and variance where none are given; torch's own function refuses one number per channel."""
    x: torch.Tensor
    x, scale, bias, mean, variance = inputs
    column = (-1, *[1] * (x.ndim - 2))
    if mean is None:
        variance, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    inverse = torch.rsqrt(variance + attributes.get("epsilon", 1e-5))
    return torch.add((x - mean.reshape(column)) * (inverse * scale).reshape(column), bias.reshape(column))


def batch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each channel, axis 1; the variance is 0 where there is one number."""
    alone = x.numel() == x.shape[1]
    variance, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0 if alone else 1)
    return mean, variance


def _layer_normalization(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x, scale, *bias = inputs
    axes = tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normal: torch.Tensor = (x - mean) / torch.sqrt(variance + attributes.get("epsilon", 1e-5)) * scale
    return normal + bias[0] if bias and bias[0] is not None else normal


def _split(inputs: Inputs, attributes: Attributes) -> tuple[torch.Tensor, ...]:
    x: torch.Tensor = inputs[0]
    axis = attributes.get("axis", 0)
    count = attributes.get("num_outputs", 1)
    sizes = integers_of(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else -(-x.shape[axis] // count)
    return tuple(torch.functional.split(x, sizes, axis))


def _gather(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x: torch.Tensor
    x, indices = inputs
    axis = attributes.get("axis", 0) % x.ndim
    where = torch.as_tensor(indices, dtype=torch.int64, device=x.device)
    return x.movedim(axis, 0)[where].movedim(list(range(where.ndim)), list(range(axis, axis + where.ndim)))


def _expand(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    sizes = integers_of(inputs[1])
    rank = max(x.ndim, len(sizes))
    own, wanted = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(sizes)) + sizes
    return x.expand([mine if size == 1 else size for mine, size in zip(own, wanted, strict=True)])


def _cast(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    """Between floats nothing: whoever runs the graph chose the precision."""
    x: torch.Tensor = torch.as_tensor(inputs[0])
    kind = _KINDS.get(attributes["to"])
    if kind is None:
        raise UnsupportedError(f"type {attributes['to']}")
    return x if kind.is_floating_point and x.is_floating_point() else x.to(kind)


def _dropout(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    if len(inputs) > 2 and inputs[2] is not None and bool(inputs[2]):
        raise UnsupportedError("training_mode")
    return x


def constant_of_shape(inputs: Inputs, attributes: Attributes) -> Any:
    value = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    filled = np.full(integers_of(inputs[0]), value.item(), value.dtype)
    return torch.as_tensor(filled) if value.dtype.kind == "f" else filled


def _prelu(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x, slope = inputs
    return torch.where(x > 0, x, slope * x)


def _global_max_pool(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    return x.flatten(2).max(2).values.reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def _arg(find: Callable[..., torch.Tensor]) -> Op:
    def op(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
        if attributes.get("select_last_index", 0):
            raise UnsupportedError("select_last_index")
        return find(inputs[0], attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))

    return op


def _reshape(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x, shape = inputs
    sizes = integers_of(shape)
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    reshaped: torch.Tensor = x.reshape(sizes)
    return reshaped


def _flatten(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    (x,) = inputs
    axis = attributes.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    flat: torch.Tensor = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return flat


def _squeeze(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x = inputs[0]
    axes = _axes(inputs, 1, [axis for axis, size in enumerate(x.shape) if size == 1], x.ndim)
    squeezed: torch.Tensor = x.squeeze(tuple(axes))
    return squeezed


def _unsqueeze(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    axes = integers_of(inputs[1])
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    return x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))


def _reduced(reduce: Callable[..., torch.Tensor]) -> Op:
    def op(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
        x: torch.Tensor = inputs[0]
        if "axes" in attributes:
            raise UnsupportedError("its axes as an attribute, as before opset 18")
        axes = _axes(inputs, 1, [], x.ndim)
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return x
        return reduce(x, tuple(axes or range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))

    return op


def _slice(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    starts, ends = integers_of(inputs[1]), integers_of(inputs[2])
    axes = _axes(inputs, 3, list(range(len(starts))), x.ndim)
    steps = integers_of(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, where.start, len(where))
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64, device=x.device))
    return x


def _pad(inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    x: torch.Tensor = inputs[0]
    if attributes.get("mode", "constant") != "constant":
        raise UnsupportedError(f"mode {attributes['mode']!r}")
    given, axes = integers_of(inputs[1]), _axes(inputs, 3, list(range(x.ndim)), x.ndim)
    value = inputs[2] if len(inputs) > 2 and inputs[2] is not None else 0.0
    pairs = [(0, 0)] * x.ndim
    for place, axis in enumerate(axes):
        pairs[axis] = given[place], given[place + len(axes)]
    return functional.pad(x, [number for pair in reversed(pairs) for number in pair], value=float(value))


def _clip(inputs: Inputs, _: Attributes) -> torch.Tensor:
    x, low, high = [*inputs, None, None][:3]
    return x if low is None and high is None else torch.clamp(x, low, high)


def _power(inputs: Inputs, _: Attributes) -> torch.Tensor:
    base, exponent = inputs
    return torch.pow(base, torch.as_tensor(exponent, dtype=base.dtype, device=base.device))  # an exponent may be a whole number


def _shape(inputs: Inputs, attributes: Attributes) -> Any:
    return np.array(inputs[0].shape, np.int64)[attributes.get("start", 0) : attributes.get("end")]


def integers_of(value: Any) -> list[int]:
    if not isinstance(value, np.ndarray):
        raise UnsupportedError("a shape, axis or bound that is computed from the data")
    return [int(number) for number in value.reshape(-1)]


def _axes(inputs: Inputs, index: int, default: list[int], rank: int) -> list[int]:
    given = integers_of(inputs[index]) if len(inputs) > index and inputs[index] is not None else []
    return [axis % rank for axis in given] or default


OPS: dict[str, Op] = {
    "Abs": lambda i, _: torch.abs(i[0]),
    "Add": lambda i, _: i[0] + i[1],
    "And": lambda i, _: i[0] & i[1],
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Ceil": lambda i, _: torch.ceil(i[0]),
    "Celu": lambda i, a: functional.celu(i[0], a.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(list(i), a["axis"]),
    "ConstantOfShape": constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": lambda i, _: torch.cos(i[0]),
    "Div": lambda i, _: i[0] / i[1],
    "Dropout": _dropout,
    "Elu": lambda i, a: functional.elu(i[0], a.get("alpha", 1.0)),
    "Equal": lambda i, _: i[0] == i[1],
    "Erf": lambda i, _: torch.erf(i[0]),
    "Exp": lambda i, _: torch.exp(i[0]),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": lambda i, _: torch.floor(i[0]),
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, _: i[0].mean(tuple(range(2, i[0].ndim)), keepdim=True),
    "GlobalMaxPool": _global_max_pool,
    "Greater": lambda i, _: i[0] > i[1],
    "GreaterOrEqual": lambda i, _: i[0] >= i[1],
    "HardSigmoid": lambda i, a: functional.hardsigmoid((a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5) - 0.5) * 6.0),
    "HardSwish": lambda i, _: functional.hardswish(i[0]),
    "Identity": lambda i, _: i[0],
    "InstanceNormalization": _instance_normalization,
    "IsNaN": lambda i, _: torch.isnan(i[0]),
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": lambda i, a: functional.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Less": lambda i, _: i[0] < i[1],
    "LessOrEqual": lambda i, _: i[0] <= i[1],
    "Log": lambda i, _: torch.log(i[0]),
    "LogSoftmax": lambda i, a: torch.log_softmax(i[0], a.get("axis", -1)),
    "MatMul": lambda i, _: i[0] @ i[1],
    "Max": lambda i, _: functools.reduce(torch.maximum, i),
    "MaxPool": _max_pool,
    "Min": lambda i, _: functools.reduce(torch.minimum, i),
    "Mul": lambda i, _: i[0] * i[1],
    "Neg": lambda i, _: -i[0],
    "Not": lambda i, _: ~i[0],
    "Or": lambda i, _: i[0] | i[1],
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _power,
    "Reciprocal": lambda i, _: 1 / i[0],
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Relu": lambda i, _: torch.relu(i[0]),
    "Reshape": _reshape,
    "Round": lambda i, _: torch.round(i[0]),
    "Selu": lambda i, a: functional.elu(i[0], a.get("alpha", 1.67326319217681884765625)) * a.get("gamma", 1.05070102214813232421875),
    "Shape": _shape,
    "Sigmoid": lambda i, _: torch.sigmoid(i[0]),
    "Sign": lambda i, _: torch.sign(i[0]),
    "Sin": lambda i, _: torch.sin(i[0]),
    "Slice": _slice,
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Softplus": lambda i, _: functional.softplus(i[0]),
    "Split": _split,
    "Sqrt": lambda i, _: torch.sqrt(i[0]),
    "Squeeze": _squeeze,
    "Sub": lambda i, _: i[0] - i[1],
    "Sum": lambda i, _: functools.reduce(torch.add, i),
    "Tanh": lambda i, _: torch.tanh(i[0]),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": lambda i, _: torch.where(*(torch.as_tensor(value) for value in i)),
}
"""By ai.onnx name, opset 18, for nodes that work on the model's numbers."""

SEVERAL_OUTPUTS = frozenset({"Split"})
"""Ops of which the function gives every output, in a tuple; the others have one output, or only their first one here."""
