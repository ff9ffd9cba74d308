"""Batch normalisation: running statistics for inference, those of the batch in training, and the gradient through them.

A forward graph normalises with running statistics (`stat:<statistic>`), which are neither trained nor aggregated. The training form
computes mean and variance of the batch (`batch:<statistic>`) before every BatchNormalization. The program `statistics` gives these figures
out, so that a device finds the running ones of any parameters by averaging over some of its batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.emitter import Emitter
from export.forward import Forward
from export.gradients import Gradient, Site, cannot_train
from regrow.errors import LocalError

_OP = "BatchNormalization"


def with_batch_statistics(forward: Forward) -> Forward:
    """The training form: every BatchNormalization uses mean and (biased) variance of its own input over the batch and the map.

    Raises:
        LocalError: a normalised value has no known rank.
    """
    nodes: list[onnx.NodeProto] = []
    constants = dict(forward.constants)
    for node in forward.program_nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == _OP:
            rank = len(forward.shapes.get(node.input[0], ()))
            if rank < 2:
                raise cannot_train(node, "normalises a value of unknown rank; run onnx.shape_inference and fix every axis but the batch")
            mean, variance = (f"batch:{name.removeprefix('stat:')}" for name in node.input[3:5])
            constants[f"batch:axes:{rank}"] = np.array([0, *range(2, rank)], np.int64)
            constants[f"batch:column:{rank}"] = np.array([*range(1, rank - 1)], np.int64)
            nodes += _statistics_of(node.input[0], rank, mean, variance)
            copy.input[3:5] = [mean, variance]
        nodes.append(copy)
    return replace(forward, program_nodes=tuple(nodes), constants=constants)


def _statistics_of(source: str, rank: int, mean: str, variance: str) -> list[onnx.NodeProto]:
    """Nodes that compute mean and variance, float32 [channels]; twice over the input, since E[x^2] - E[x]^2 loses its digits."""
    axes, column, centred = f"batch:axes:{rank}", f"{mean}:column", _centred(mean)
    return [
        helper.make_node("ReduceMean", [source, axes], [mean], keepdims=0),
        helper.make_node("Unsqueeze", [mean, f"batch:column:{rank}"], [column]),
        helper.make_node("Sub", [source, column], [centred]),
        helper.make_node("Mul", [centred, centred], [f"{mean}:squares"]),
        helper.make_node("ReduceMean", [f"{mean}:squares", axes], [variance], keepdims=0),
    ]


def _centred(mean: str) -> str:
    """The value that the training form gives to the input less its mean."""
    return f"{mean}:centred"


def batch_normalization(site: Site) -> dict[int, Gradient]:
    """Y = scale * (X - mean) / sqrt(variance + epsilon) + bias, with mean and variance of X itself, as with_batch_statistics has them.

    With c = X - mean, d the deviation and g the gradient of Y, that of X is scale / d * (g - mean(g) - c * mean(g * c) / d^2). It is the
    whole gradient, that through mean and variance included, so those two get none and are not differentiated further.

    Source: Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), section 3.
    """
    epsilon = site.attributes(epsilon=1e-5, momentum=0.9)["epsilon"]
    graph, (source, scale, _, mean, variance) = site.graph, site.node.input
    if not mean.startswith("batch:"):
        raise site.unsupported("statistics that are not those of the batch", "build programs with export.programs.build_programs")
    rank, channels = site.rank(source), site.shape(scale)[0]
    others = graph.integers(0, *range(2, rank))
    centred = _centred(mean)
    inverse = graph.emit("Reciprocal", graph.emit("Sqrt", graph.emit("Add", variance, graph.real(epsilon))))
    products = graph.emit("ReduceSum", graph.emit("Mul", site.gradient, centred), others, keepdims=0)
    slope = graph.emit("Mul", products, inverse)
    total = graph.emit("ReduceSum", site.gradient, others, keepdims=0)
    gradients: dict[int, Gradient] = {index: value for index, value in ((1, slope), (2, total)) if index in site.wanted}
    if 0 in site.wanted:
        gain = graph.emit("Mul", scale, inverse)
        share = graph.emit("Neg", graph.emit("Div", gain, count_of(graph, source, channels)))
        tilt = graph.emit("Mul", graph.emit("Mul", share, slope), inverse)
        level = graph.emit("Mul", share, total)
        # With mean 0 and variance 1 the op is tilt * c + level, in one pass over the map instead of two.
        zeros, ones = (graph.constant(np.full(channels, value), np.float32) for value in (0, 1))
        bent = graph.emit(_OP, centred, tilt, level, zeros, ones, epsilon=0.0)
        column = graph.emit("Unsqueeze", gain, graph.integers(*range(1, rank - 1)))
        gradients[0] = graph.emit("Add", graph.emit("Mul", site.gradient, column), bent)
    return gradients


def count_of(graph: Emitter, source: str, channels: int) -> str:
    """float32 []: numbers per channel."""
    size = graph.emit("Cast", graph.emit("Size", source), to=TensorProto.FLOAT)
    return graph.emit("Div", size, graph.real(channels))


def emit_statistics(graph: Emitter, forward: Forward) -> list[onnx.ValueInfoProto]:
    """Emit `stat:<statistic>` of every BatchNormalization, mean and unbiased variance, drop what they do not need, and say which they are.

    A channel with a single number has the variance 0.

    Args:
        graph: of the training form.
        forward: the training form.
    """
    for node in [node for node in graph.nodes if node.op_type == _OP]:
        mean, variance = node.input[3:5]
        graph.emit("Identity", mean, output=_running(mean))
        count = count_of(graph, node.input[0], forward.shapes[_running(mean)][0] or 0)
        others = graph.emit("Max", graph.emit("Sub", count, graph.real(1)), graph.real(1))
        graph.emit("Mul", variance, graph.emit("Div", count, others), output=_running(variance))
    needed = {f"stat:{name}" for name in forward.statistics}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    graph.nodes[:] = reversed(kept)
    return statistics_inputs(forward)


def _running(statistic: str) -> str:
    return f"stat:{statistic.removeprefix('batch:')}"


def statistics_inputs(forward: Forward) -> list[onnx.ValueInfoProto]:
    """`stat:<statistic>` as inputs or outputs of a program."""
    found = forward.statistics.items()
    return [helper.make_tensor_value_info(f"stat:{name}", TensorProto.FLOAT, array.shape) for name, array in found]


def checked_statistics(forward: Forward, statistics: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The statistics as they are, when they are some of the model's.

    Raises:
        LocalError: one is not the model's, or of another dtype or shape.
    """
    for name, array in statistics.items():
        own = forward.statistics.get(name)
        if own is None or array.dtype != np.float32 or array.shape != own.shape:
            wanted = "the model has no such statistic" if own is None else f"expected float32 {list(own.shape)}"
            raise LocalError(f"statistic {name!r}: {wanted}, got {array.dtype} {list(array.shape)}")
    return dict(statistics)
