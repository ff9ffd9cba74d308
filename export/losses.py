"""Losses and scores as graph nodes: what the training and the evaluation programs compute behind the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from export.emitter import Emitter
from export.forward import Forward
from regrow.errors import LocalError
from regrow.local_step import Step


def check_step(step: Step, forward: Forward) -> None:
    """Refuse a step that this model cannot take.

    Raises:
        LocalError: its output or input has another form than the loss needs, or there are more or fewer class weights than classes.
    """
    words = "[" + ", ".join("batch" if size is None else str(size) for size in forward.output_shape) + "]"
    if step.classifies and not forward.classes:
        raise LocalError(
            f"output {forward.logits.removeprefix('forward:')!r} has shape {words}; cross_entropy needs float32 logits [batch, classes]: "
            "export the model so, or choose another loss in [training]"
        )
    if step.class_weights and len(step.class_weights) != forward.classes:
        raise LocalError(f"class_weights at $.training: {len(step.class_weights)} weights for {forward.classes} classes; give one for each")
    if step.target == "input" and (forward.input_type != TensorProto.FLOAT or forward.output_shape != forward.input_shape):
        raise LocalError(f'target at $.training: "input" needs a float32 input and an output of its shape; the output is {words}')


def emit_loss(graph: Emitter, forward: Forward, step: Step, *, bare: bool) -> str:
    """Emit `loss`, the mean over the batch weighed by sample_weight, and return the name of a multiple of its gradient by the output.

    Backward is linear, so scaling this small tensor scales every gradient for free.

    Args:
        bare: the multiple is -learning_rate, so that every gradient is an update of SGD; otherwise it is 1.
    """
    excess, share = _TERMS[step.loss](graph, forward, step)
    return graph.emit("Mul", excess, graph.emit("Mul", share, "learning_rate") if bare else graph.emit("Neg", share))


def emit_score(graph: Emitter, forward: Forward, step: Step) -> str:
    """Emit `loss_sum` and what else a score needs: `correct`, right answers, or `squared_error`, summed over examples and outputs.

    The loss is without class weights and label smoothing.

    Returns:
        The name of that other output.
    """
    if step.classifies:
        scores = graph.emit("LogSoftmax", forward.logits, axis=1)
        picked = graph.emit("GatherElements", scores, graph.emit("Unsqueeze", "y", graph.integers(1)), axis=1)
        graph.emit("Neg", graph.emit("ReduceSum", picked, keepdims=0), output="loss_sum")
        return _hits(graph, graph.emit("ArgMax", forward.logits, axis=1, keepdims=0), "y")
    target = _target(step)
    per_output, _ = _ELEMENTWISE[step.loss](graph, forward.logits, target, step)
    summed = graph.emit("ReduceSum", per_output, keepdims=0)
    graph.emit("Mul", summed, graph.real(1 / _outputs(forward)), output="loss_sum")
    if step.counts_hits:
        half = graph.real(0.5)
        return _hits(graph, graph.emit("Greater", forward.logits, graph.real(0.0)), graph.emit("Greater", target, half))
    error = graph.emit("Sub", forward.logits, target)
    graph.emit("ReduceSum", graph.emit("Mul", error, error), keepdims=0, output="squared_error")
    return "squared_error"


def _hits(graph: Emitter, answers: str, truth: str) -> str:
    right = graph.emit("Cast", graph.emit("Equal", answers, truth), to=TensorProto.INT64)
    return graph.emit("ReduceSum", right, keepdims=0, output="correct")


def _cross_entropy(graph: Emitter, forward: Forward, step: Step) -> tuple[str, str]:
    """(minus the gradient by the logits of each example's loss, share of each example in the mean).

    With class weights an example counts with that of its class, and so does its part of the mean; smoothing spreads over all classes,
    each with its own weight, as torch.nn.CrossEntropyLoss does.
    """
    scores = graph.emit("LogSoftmax", forward.logits, axis=1)
    columns = graph.integers(1)
    spread = step.label_smoothing / forward.classes
    shares = [spread, 1 - step.label_smoothing + spread]
    target = graph.emit("OneHot", "y", graph.integers(forward.classes), graph.constant(shares, np.float32), axis=1)
    whole, weight = "", "sample_weight"
    if step.class_weights:
        weights = graph.constant(step.class_weights, np.float32)
        weight = graph.emit("Mul", weight, graph.emit("Gather", weights, "y"))
        target = graph.emit("Mul", target, weights)
        whole = graph.emit("ReduceSum", target, columns, keepdims=1)
    share = _share(graph, "sample_weight", weight, 2)
    surprise = graph.emit("Mul", graph.emit("Mul", scores, target), share)
    graph.emit("Neg", graph.emit("ReduceSum", surprise, keepdims=0), output="loss")
    likely = graph.emit("Exp", scores)
    return graph.emit("Sub", target, graph.emit("Mul", likely, whole) if whole else likely), share


def _mean_over_outputs(graph: Emitter, forward: Forward, step: Step) -> tuple[str, str]:
    """As _cross_entropy, for the losses that compare outputs one by one and take their mean."""
    per_output, excess = _ELEMENTWISE[step.loss](graph, forward.logits, _target(step), step)
    share = _share(graph, "sample_weight", "sample_weight", len(forward.output_shape))
    share = graph.emit("Mul", share, graph.real(1 / _outputs(forward)))
    graph.emit("ReduceSum", graph.emit("Mul", per_output, share), keepdims=0, output="loss")
    return excess, share


def _binary_cross_entropy(graph: Emitter, output: str, target: str, _: Step) -> tuple[str, str]:
    """(loss, minus its gradient) of each output: log(1 + e^o) - o y."""
    loss = graph.emit("Sub", graph.emit("Softplus", output), graph.emit("Mul", output, target))
    return loss, graph.emit("Sub", target, graph.emit("Sigmoid", output))


def _mse(graph: Emitter, output: str, target: str, _: Step) -> tuple[str, str]:
    """(loss, minus its gradient) of each output: (y - o)^2."""
    error = graph.emit("Sub", target, output)
    return graph.emit("Mul", error, error), graph.emit("Mul", error, graph.real(2.0))


def _huber(graph: Emitter, output: str, target: str, step: Step) -> tuple[str, str]:
    """(loss, minus its gradient) of each output: with e = y - o and c = e cut to +-delta, c (e - c / 2)."""
    error = graph.emit("Sub", target, output)
    cut = graph.emit("Clip", error, graph.real(-step.huber_delta), graph.real(step.huber_delta))
    return graph.emit("Mul", cut, graph.emit("Sub", error, graph.emit("Mul", cut, graph.real(0.5)))), cut


def _share(graph: Emitter, count: str, whole: str, rank: int) -> str:
    """count / sum(whole), both [batch], as [batch, 1, ...] of this rank."""
    share = graph.emit("Div", count, graph.emit("ReduceSum", whole, keepdims=1))
    return share if rank == 1 else graph.emit("Unsqueeze", share, graph.integers(*range(1, rank)))


def _target(step: Step) -> str:
    return "x" if step.target == "input" else "y"


def _outputs(forward: Forward) -> int:
    return math.prod(size or 1 for size in forward.output_shape[1:])


_TERMS: dict[str, Callable[[Emitter, Forward, Step], tuple[str, str]]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _mean_over_outputs,
    "mse": _mean_over_outputs,
    "huber": _mean_over_outputs,
}
_ELEMENTWISE: dict[str, Callable[[Emitter, str, str, Step], tuple[str, str]]] = {
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mse,
    "huber": _huber,
}
