"""What local training takes and gives, whoever does it: plain onnxruntime on the device, torch where a user asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regrow.parameters import Layout

Batch = tuple[NDArray[Any], NDArray[Any]]
"""(x [b, ...] float32 or int64, y [b] int64 or [b, ...] float32); regrow.examples says what a program takes."""


@dataclass(frozen=True)
class TrainResult:
    """What local training gave.

    Attributes:
        vector: float32 [n], the trained parameters; not finite where training diverged.
        loss: mean over all examples seen, each before its own step.
        examples: examples trained on, repeats counted.
        steps: of the optimizer.
    """

    vector: NDArray[np.float32]
    loss: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Score:
    """Mean loss over `examples` examples, and how right the answers are, 0 to 1.

    `accuracy` is the share of correct classes, with binary_cross_entropy of outputs on the right side of 0; with mse and huber it is R^2
    (regrow.examples.r_squared).
    """

    loss: float
    accuracy: float
    examples: int


class Training(Protocol):
    """What trains one model; edge_agent.trainer.Trainer says what each means. export.torch_trainer has one on torch."""

    @property
    def layout(self) -> Layout: ...

    def train(
        self, vector: NDArray[np.float32], kept: NDArray[np.bool_] | None, batches: Iterable[Batch], learning_rate: float
    ) -> TrainResult: ...

    def evaluate(self, vector: NDArray[np.float32], x: NDArray[Any], y: NDArray[Any]) -> Score: ...
