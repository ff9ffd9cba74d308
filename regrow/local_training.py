"""What local training takes and gives, whoever does it: plain onnxruntime on the device, torch where a user asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regrow.parameters import Layout

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class TrainResult:
    """What local training gave.

    Attributes:
        vector: float32 [n], the trained parameters; not finite where training diverged.
        loss: mean cross-entropy over all examples seen, each before its own step.
        examples: examples trained on, repeats counted.
        steps: SGD steps.
    """

    vector: NDArray[np.float32]
    loss: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and share of correct answers over `examples` examples."""

    loss: float
    accuracy: float
    examples: int


class Training(Protocol):
    """What trains one model; edge_agent.trainer.Trainer says what each means. testbed has one on torch beside it."""

    @property
    def layout(self) -> Layout: ...

    def train(
        self, vector: NDArray[np.float32], kept: NDArray[np.bool_] | None, batches: Iterable[Batch], learning_rate: float
    ) -> TrainResult: ...

    def evaluate(self, vector: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> Score: ...
