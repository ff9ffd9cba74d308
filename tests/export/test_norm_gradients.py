"""Gradient rules of InstanceNormalization and of group normalisation in the form that torch exports, against float64 autograd."""

from __future__ import annotations

import io
import math
import warnings
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
from tests.export.running import check_against_torch

functional = torch.nn.functional
maps = st.lists(st.integers(2, 4), min_size=1, max_size=2).filter(lambda sizes: math.prod(sizes) > 2)


@drawn(25)
@given(
    channels=st.integers(2, 4),
    sizes=maps,
    trained=st.booleans(),
    epsilon=st.sampled_from([1e-5, 0.125]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_instance_normalization(channels: int, sizes: list[int], trained: bool, epsilon: float, batch: int, seed: int) -> None:
    """Scale and bias as parameters, or as constants that are not 1 and 0."""
    rng = np.random.default_rng(seed)
    scale, bias = numbers(rng, channels) + np.float32(2), numbers(rng, channels)
    given = {"scale": scale, "bias": bias}
    nodes = [] if trained else [constant(name, array, np.float32) for name, array in given.items()]
    nodes.append(helper.make_node("InstanceNormalization", ["a", "scale", "bias"], ["o"], epsilon=epsilon))

    def forward(a: torch.Tensor, q: Any) -> torch.Tensor:
        s, b = (q.get(name, torch.tensor(array)).to(a.dtype) for name, array in given.items())
        return functional.instance_norm(a, weight=s, bias=b, eps=epsilon)

    check(nodes, forward, numbers(rng, batch, channels, *sizes) * np.float32(4), given if trained else None)


@drawn(25)
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    sizes=maps,
    batch=st.integers(1, 3),
    shift=st.sampled_from([0, 16]),
    seed=st.integers(0, 999),
)
def test_group_normalisation(groups: int, width: int, sizes: list[int], batch: int, shift: int, seed: int) -> None:
    """Also around a mean much larger than the deviation."""
    rng = np.random.default_rng(seed)
    channels = groups * width
    weights = {"w": numbers(rng, channels) + np.float32(2), "b": numbers(rng, channels)}
    nodes = [
        constant("groups", [0, groups, -1]),
        constant("ones", np.ones(groups), np.float32),
        constant("zeros", np.zeros(groups), np.float32),
        constant("axes", range(1, 1 + len(sizes))),
        helper.make_node("Reshape", ["a", "groups"], ["g"]),
        helper.make_node("InstanceNormalization", ["g", "ones", "zeros"], ["n"], epsilon=1e-5),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Reshape", ["n", "shape"], ["r"]),
        helper.make_node("Unsqueeze", ["w", "axes"], ["w1"]),
        helper.make_node("Unsqueeze", ["b", "axes"], ["b1"]),
        helper.make_node("Mul", ["r", "w1"], ["m"]),
        helper.make_node("Add", ["m", "b1"], ["o"]),
    ]
    x = numbers(rng, batch, channels, *sizes) * np.float32(4) + np.float32(shift)
    check(nodes, lambda a, q: functional.group_norm(a, groups, q["w"], q["b"], eps=1e-5), x, weights)


def test_group_normalisation_exported_by_torch() -> None:
    torch.manual_seed(0)
    conv, norm, head = torch.nn.Conv2d(2, 6, 3), torch.nn.GroupNorm(3, 6), torch.nn.Linear(6 * 4, CLASSES)
    with torch.no_grad():
        norm.weight.add_(0.5 * torch.randn(6))
        norm.bias.add_(0.5 * torch.randn(6))
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the new exporter needs a package more
        net = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.Flatten(), head)
        torch.onnx.export(
            net, (torch.randn(2, 2, 4, 4),), file, dynamo=False, opset_version=18, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
    model = onnx.load_from_string(file.getvalue())
    assert "InstanceNormalization" in {node.op_type for node in model.graph.node}
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    }
    # The exporter folds scale and shift to [6, 1, 1] and gives them names of its own, the scale first.
    scale, shift = (name for name, array in weights.items() if array.ndim == 3)

    def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        a = functional.conv2d(x, p["0.weight"], p["0.bias"])
        a = torch.relu(functional.group_norm(a, 3, p[scale].flatten(), p[shift].flatten()))
        return functional.linear(a.flatten(1), p["4.weight"], p["4.bias"])

    rng = np.random.default_rng(0)
    check_against_torch(model, forward, weights, numbers(rng, 5, 2, 4, 4), rng.integers(0, CLASSES, 5))


def test_a_norm_without_a_map_is_refused() -> None:
    weights = {
        "p": np.ones(3, np.float32),
        "s": np.ones(3, np.float32),
        "b": np.ones(3, np.float32),
        "head": np.ones((3, CLASSES), np.float32),
    }
    nodes = [helper.make_node("InstanceNormalization", ["a", "s", "b"], ["o"], name="odd")]
    with pytest.raises(LocalError, match=r"InstanceNormalization \(node 'odd'.*no spatial axis.*rank 3"):
        build_programs(network(nodes, weights, [3]))
