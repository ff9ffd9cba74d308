"""What the tests of gradient rules draw, and the one network that they put an op into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import settings
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tests.export.running import Arrays, check_against_torch, model_of

CLASSES = 4
Values = dict[str, torch.Tensor]


def drawn(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def numbers(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """float32 multiples of 2**-12 in [-1, 1): ties and corners stay improbable, and float32 holds them and their sums exactly."""
    return np.asarray(rng.integers(-4096, 4096, shape) / 4096, np.float32)


def constant(name: str, value: Any, dtype: type[np.generic] = np.int64) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value, dtype)))


def network(nodes: Sequence[onnx.NodeProto], weights: Arrays, sizes: Sequence[int]) -> onnx.ModelProto:
    """x + p = "a", the nodes from "a" to "o", a linear head."""
    ends = [helper.make_node("Flatten", ["o"], ["flat"]), helper.make_node("MatMul", ["flat", "head"], ["logits"])]
    return model_of([helper.make_node("Add", ["x", "p"], ["a"]), *nodes, *ends], weights, sizes, CLASSES)


def check(
    nodes: Sequence[onnx.NodeProto],
    forward: Callable[[torch.Tensor, Values], torch.Tensor],
    x: NDArray[np.float32],
    weights: Arrays | None = None,
    *,
    p: NDArray[np.float32] | None = None,
) -> onnx.ModelProto:
    """Check the network around `nodes` against `forward`, which maps (a, parameters) to o; `p` shows the gradient of "a" by itself."""
    rng = np.random.default_rng(x.size)
    weights = {"p": numbers(rng, *x.shape[1:]) / np.float32(4) if p is None else p, **(weights or {})}

    def hidden(values: torch.Tensor, q: Values) -> torch.Tensor:
        return forward(values + q["p"], q).reshape(len(values), -1)

    features = hidden(torch.tensor(x), {name: torch.tensor(array) for name, array in weights.items()}).shape[1]
    # A small head: a loss near 0 would leave gradients that are nothing but rounding.
    weights["head"] = numbers(rng, features, CLASSES) / np.float32(8)
    # Class 0 never occurs and every feature speaks for it, so that the terms of a summed gradient mostly share their sign.
    weights["head"][:, 0] += np.float32(0.5)
    model = network(nodes, weights, x.shape[1:])
    check_against_torch(model, lambda values, q: hidden(values, q) @ q["head"], weights, x, rng.integers(1, CLASSES, len(x)))
    return model
