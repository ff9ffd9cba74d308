"""A model's layers, counted from its output: which parameters stay as they are when only the last ones are trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx

from regrow.errors import LocalError

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN"})
"""Each with a weight of two or more axes is a layer; what other nodes hold (biases, normalisation) belongs to the layer before them."""


def frozen_parameters(
    nodes: Sequence[onnx.NodeProto], parameters: Mapping[str, Any], constants: Collection[str], train_last: int
) -> list[str]:
    """Names of the parameters that are in none of the last `train_last` layers, in the model's order.

    Layers count in the order of execution. A parameter of several layers belongs to the last of them; what comes before the first layer
    belongs to the first.

    Args:
        nodes: of the forward model, in execution order.
        parameters: name -> array.
        constants: names of what is neither a parameter nor computed.

    Raises:
        LocalError: the model has fewer layers.
    """
    sources = {name: {name} for name in parameters}  # value -> the parameters it consists of, as long as no data has come in
    layer_of: dict[str, int] = {}
    layers = 0
    for node in nodes:
        held = [name for name in node.input if name in sources]
        others = [name for name in node.input if name and name not in sources and name not in constants]
        if held and not others:  # a weight transposed or reshaped on its way to its layer
            sources |= dict.fromkeys(node.output, set[str]().union(*(sources[name] for name in held)))
            continue
        mine = set[str]().union(*(sources[name] for name in held))
        layers += node.op_type in LAYER_OPS and any(parameters[name].ndim > 1 for name in mine)
        layer_of |= dict.fromkeys(mine, max(layers, 1))
    if train_last > max(layers, 1):
        raise LocalError(f"train_last at $.training: {train_last}, but the model has {layers} layers; give at most that many")
    return [name for name in parameters if layer_of.get(name, 0) <= max(layers, 1) - train_last]
