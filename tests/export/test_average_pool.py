"""The gradient rule of AveragePool against torch's float64 autograd."""

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
from tests.export.drawing import CLASSES, check, drawn, network, numbers
from tests.export.test_gradients import ops_of, torch_pads, windows

functional = torch.nn.functional


def pooled(a: torch.Tensor, w: dict[str, Any], include: int) -> torch.Tensor:
    """Sums over padded windows, divided by what a padded map of ones gives; torch itself knows only symmetric padding."""
    pool: Any = functional.avg_pool1d if len(w["kernel"]) == 1 else functional.avg_pool2d
    total: torch.Tensor = pool(functional.pad(a, torch_pads(w)), w["kernel"], stride=w["strides"])
    if include:
        return total
    return torch.as_tensor(total / pool(functional.pad(torch.ones_like(a), torch_pads(w)), w["kernel"], stride=w["strides"]))


def node_of(w: dict[str, Any], **attributes: Any) -> Any:
    geometry = {"kernel_shape": w["kernel"], "strides": w["strides"], "pads": w["pads"]}
    return helper.make_node("AveragePool", ["a"], ["o"], name="pool", **(geometry | attributes))


@drawn(40)
@given(w=windows(), include=st.integers(0, 1), batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_any_window(w: dict[str, Any], include: int, batch: int, seed: int) -> None:
    x = numbers(np.random.default_rng(seed), batch, 2, *w["sizes"])
    check([node_of(w, count_include_pad=include)], lambda a, _: pooled(a, w, include), x)


@drawn(12)
@given(axes=st.lists(st.tuples(st.integers(1, 3), st.integers(3, 7)), min_size=1, max_size=2), seed=st.integers(0, 999))
def test_windows_that_tile_the_map(axes: list[tuple[int, int]], seed: int) -> None:
    """Positions that are left over at the end get 0."""
    kernel = [length for length, _ in axes]
    w = {"kernel": kernel, "strides": kernel, "pads": [0] * 2 * len(kernel)}
    x = numbers(np.random.default_rng(seed), 2, 3, *(size for _, size in axes))
    model = check([node_of(w)], lambda a, _: pooled(a, w, 0), x)
    assert "ConvTranspose" not in ops_of(model)


def test_ceil_mode_that_changes_nothing_is_covered() -> None:
    w = {"kernel": [3], "strides": [2], "pads": [0, 0]}
    check([node_of(w, ceil_mode=1)], lambda a, _: pooled(a, w, 0), numbers(np.random.default_rng(0), 2, 3, 7))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"ceil_mode": 1}, "ceil_mode 1 with a window that hangs over"), ({"auto_pad": "SAME_UPPER"}, "auto_pad SAME_UPPER.*pads as numbers")],
)
def test_other_windows_are_refused(attributes: dict[str, Any], message: str) -> None:
    node = helper.make_node("AveragePool", ["a"], ["o"], name="pool", kernel_shape=[3], strides=[2], **attributes)
    weights = {"p": np.ones((2, 6), np.float32), "head": np.ones((6, CLASSES), np.float32)}
    with pytest.raises(LocalError, match=rf"AveragePool \(node 'pool'.*{message}"):
        build_programs(network([node], weights, [2, 6]))
