"""The score of a model's outputs in NumPy: the same numbers as an evaluation program gives, for models that come without one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.examples import check_labels, described, r_squared
from regrow.local_step import Step
from regrow.local_training import Score


def score_name(step: Step) -> str:
    """What a score's `accuracy` is with this loss, as the head of a column."""
    if step.classifies:
        return "accuracy"
    return "right signs" if step.counts_hits else "R^2"


def score_outputs(outputs: NDArray[np.float32], x: NDArray[Any], y: NDArray[Any], step: Step) -> Score:
    """Mean loss, without class weights and label smoothing, and how right the outputs are.

    Args:
        outputs: float32 [n, ...], n >= 1, finite; for cross_entropy [n, classes], before softmax.
        x: [n, ...], what they were computed from; the target of `target = "input"`.
        y: int64 [n] class numbers for cross_entropy, else float32 of the outputs' shape.
        step: of which loss, target and huber_delta count.

    Raises:
        LocalError: outputs and target do not fit together.
    """
    target = x if step.target == "input" else y
    if step.classifies:
        return _classes(outputs, target)
    if target.shape != outputs.shape or target.dtype != np.float32:
        raise LocalError(f"the model gives {described(outputs)}, which {step.loss} cannot compare with {described(target)}")
    wide, wanted = outputs.astype(np.float64), target.astype(np.float64)
    loss = float(_elementwise(wide, wanted, step).mean())
    if step.counts_hits:
        return Score(loss, float(np.mean((wide > 0) == (wanted > 0.5))), len(outputs))
    return Score(loss, r_squared(float(((wide - wanted) ** 2).sum()), target), len(outputs))


def _classes(scores: NDArray[np.float32], y: NDArray[Any]) -> Score:
    if scores.ndim != 2 or y.dtype.kind != "i" or y.shape != scores.shape[:1]:
        raise LocalError(f"the model gives {described(scores)}, the labels are {described(y)}: expected scores [n, classes] and int64 [n]")
    check_labels(y, scores.shape[1])
    wide = scores.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(wide, y[:, None], axis=1)[:, 0]
    loss = float(np.mean(np.log(np.exp(wide).sum(axis=1)) - chosen))
    return Score(loss, float(np.mean(scores.argmax(axis=1) == y)), len(y))


def _elementwise(outputs: NDArray[np.float64], target: NDArray[np.float64], step: Step) -> NDArray[np.float64]:
    if step.loss == "binary_cross_entropy":
        return np.logaddexp(0.0, outputs) - outputs * target
    error = target - outputs
    if step.loss == "mse":
        return error * error
    cut = np.clip(error, -step.huber_delta, step.huber_delta)
    return cut * (error - 0.5 * cut)
