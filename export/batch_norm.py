"""Batch normalisation: running statistics for inference, those of the batch in training, and the gradient through them.

A forward graph normalises with running statistics (`stat:<statistic>`), which are neither trained nor aggregated. In the training form
every BatchNormalization computes mean and variance of the batch (`batch:<statistic>`) itself. The program `statistics` gives these figures
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

    Of the running figures nothing stays with momentum 0, so the op gives out those of the batch. But onnxruntime writes them over the
    running ones, even if those are constants or two ops share them. So each gets a tensor of its own, of any numbers that no optimizer
    takes for those of another.

    Raises:
        LocalError: a normalised value has no known rank.
    """
    nodes: list[onnx.NodeProto] = []
    constants = dict(forward.constants)
    for node in forward.program_nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == _OP and node.input[3] not in constants:  # with constant ones it stays as it is (train_last)
            if len(forward.shapes.get(node.input[0], ())) < 2:
                raise cannot_train(node, "normalises a value of unknown rank; run onnx.shape_inference and fix every axis but the batch")
            copy.output.extend(f"batch:{name.removeprefix('stat:')}" for name in node.input[3:5])
            copy.input[3:5] = [f"{name}:before" for name in copy.output[1:]]
            for name in copy.input[3:5]:
                constants[f"{name}:factor"] = np.array(len(nodes) + 2, np.float32)
                nodes.append(helper.make_node("Mul", [node.input[1], f"{name}:factor"], [name]))
            kept = [attribute for attribute in node.attribute if attribute.name != "momentum"]
            del copy.attribute[:]
            copy.attribute.extend([*kept, helper.make_attribute("training_mode", 1), helper.make_attribute("momentum", 0.0)])
        nodes.append(copy)
    return replace(forward, program_nodes=tuple(nodes), constants=constants)


def batch_normalization(site: Site) -> dict[int, Gradient]:
    """Y = scale * (X - mean) / sqrt(variance + epsilon) + bias, with mean and variance of X itself, as with_batch_statistics has them.

    With c = X - mean, d the deviation and g the gradient of Y, that of X is scale / d * (g - mean(g) - c * mean(g * c) / d^2). It is the
    whole gradient, that through mean and variance included, so those two get none and are not differentiated further.

    Source: Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), section 3.
    """
    options = site.attributes(epsilon=1e-5, momentum=0.9, training_mode=0)
    if not options["training_mode"]:
        raise site.unsupported("statistics that are not those of the batch", "build programs with export.programs.build_programs")
    graph, (source, scale), (_, mean, variance) = site.graph, site.node.input[:2], site.node.output
    rank, channels = site.rank(source), site.shape(scale)[0]
    others = graph.integers(0, *range(2, rank))
    inverse = graph.emit("Reciprocal", graph.emit("Sqrt", graph.emit("Add", variance, graph.real(options["epsilon"]))))
    total = graph.emit("ReduceSum", site.gradient, others, keepdims=0)
    products = graph.emit("ReduceSum", graph.emit("Mul", site.gradient, source), others, keepdims=0)
    # The mean is taken off sums, not off the map: another pass over it would gain no digit that X still has.
    slope = graph.emit("Mul", graph.emit("Sub", products, graph.emit("Mul", mean, total)), inverse)
    gradients: dict[int, Gradient] = {index: value for index, value in ((1, slope), (2, total)) if index in site.wanted}
    if 0 in site.wanted:
        gain = graph.emit("Mul", scale, inverse)
        share = graph.emit("Neg", graph.emit("Div", gain, count_of(graph, source, channels)))
        tilt = graph.emit("Mul", graph.emit("Mul", share, slope), inverse)
        level = graph.emit("Sub", graph.emit("Mul", share, total), graph.emit("Mul", tilt, mean))
        # With mean 0 and variance 1 the op is tilt * X + level, in one pass over the map instead of two.
        zeros, ones = (graph.constant(np.full(channels, value), np.float32) for value in (0, 1))
        bent = graph.emit(_OP, source, tilt, level, zeros, ones, epsilon=0.0)
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
    for node in [node for node in graph.nodes if node.op_type == _OP and len(node.output) > 1]:
        _, mean, variance = node.output
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
