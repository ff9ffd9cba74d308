"""Ops on whole numbers, for nodes that compute a shape out of another one. Importing this module imports torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from export.torch_ops import Attributes, Inputs, Op, UnsupportedError, constant_of_shape, integers_of


def _cast(inputs: Inputs, attributes: Attributes) -> Any:
    if attributes["to"] not in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL):
        raise UnsupportedError("a shape as real numbers")
    return inputs[0].astype(bool) if attributes["to"] == TensorProto.BOOL else inputs[0].astype(np.int64)


HOST_OPS: dict[str, Op] = {
    "Add": lambda i, _: i[0] + i[1],
    "Cast": _cast,
    "Concat": lambda i, a: np.concatenate(list(i), a["axis"]),
    "ConstantOfShape": constant_of_shape,
    "Div": lambda i, _: i[0] // i[1],
    "Equal": lambda i, _: i[0] == i[1],
    "Expand": lambda i, _: i[0] * np.ones(integers_of(i[1]), i[0].dtype),
    "Gather": lambda i, a: np.asarray(np.take(i[0], i[1], axis=a.get("axis", 0))),
    "Identity": lambda i, _: i[0],
    "Mul": lambda i, _: i[0] * i[1],
    "Reshape": lambda i, _: i[0].reshape(integers_of(i[1])),
    "Slice": lambda i, _: i[0][slice(integers_of(i[1])[0], integers_of(i[2])[0], integers_of(i[4])[0] if len(i) > 4 else 1)],
    "Squeeze": lambda i, _: np.squeeze(i[0]),
    "Sub": lambda i, _: i[0] - i[1],
    "Unsqueeze": lambda i, _: np.expand_dims(i[0], tuple(integers_of(i[1]))),
    "Where": lambda i, _: np.where(*i),
}
"""For nodes that compute a shape out of another one; its sizes are positive."""
