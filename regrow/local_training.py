"""What local training takes and gives, whoever does it: plain onnxruntime on the device, torch where a user asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regrow.examples import Examples
from regrow.parameters import Layout

Batch = tuple[NDArray[Any], NDArray[Any]]
"""(x [b, ...] float32 or int64, y [b] int64 or [b, ...] float32); regrow.examples says what a program takes."""
Statistics = Mapping[str, NDArray[np.float32]]
"""Running means and variances of batch normalisations, by initializer; empty for a model without. They never leave the device."""

STATISTICS_BATCHES = 10
_STATISTICS_BATCH = 64


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

    def examples(self, *, masked: bool) -> Examples: ...

    def train(
        self, vector: NDArray[np.float32], kept: NDArray[np.bool_] | None, batches: Iterable[Batch], learning_rate: float
    ) -> TrainResult: ...

    def evaluate(self, vector: NDArray[np.float32], x: NDArray[Any], y: NDArray[Any], *, statistics: Statistics | None = None) -> Score: ...

    def statistics(self, vector: NDArray[np.float32], examples: Iterable[NDArray[Any]]) -> Statistics: ...


def statistics_from(model: Training, vector: NDArray[np.float32], x: NDArray[Any]) -> Statistics:
    """The statistics of these parameters on unlabelled examples: for held-out data, where nobody trains.

    Args:
        x: [m, ...] as the program takes it, m >= 1.
    """
    return model.statistics(vector, spread_batches(x))


def spread_batches(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """At most STATISTICS_BATCHES batches, each spread over the whole of x, which may be sorted by label."""
    count = min(STATISTICS_BATCHES, -(-len(x) // _STATISTICS_BATCH))
    for start in range(count):
        yield x[start::count][: 4 * _STATISTICS_BATCH]


def average_statistics(batches: Iterable[Statistics]) -> Statistics:
    """The plain mean over the statistics of at least one batch, as torch's BatchNorm has it with momentum=None."""
    totals: dict[str, NDArray[np.float64]] = {}
    count = 0
    for found in batches:
        totals = {name: totals.get(name, 0.0) + array.astype(np.float64) for name, array in found.items()}
        count += 1
    return {name: (total / count).astype(np.float32) for name, total in totals.items()}
