"""The rules of local training that devices know; the manifest names the one of its task.

    plain             plain SGD on the sub-model of the assignment's level, in every step
    ordered_dropout   in every step one of the levels up to the assignment's, drawn uniformly (FjORD)
    personal_masks    the device's own mask of single weights, pruned round by round to the assignment's density (Sub-FedAvg)

The masks of the last one are in regrow.personal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

LocalRule = Literal["plain", "ordered_dropout", "personal_masks"]


def drawn_levels(levels: Sequence[int], steps: int, seed: int) -> list[int]:
    """The level that each local step trains under ordered dropout, uniform over `levels`; the same for the same job.

    Args:
        levels: the device's own level and all below it.
        steps: of the round.
        seed: of the job. The draw has a stream of its own beside that of the batches, so that these stay what they are without it.

    Source: FjORD (arXiv 2102.13451), Algorithm 1: p is drawn anew in every local iteration. Differs: no self-distillation; the widths are
    the levels of the task's ladder.
    """
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    return [levels[index] for index in generator.integers(len(levels), size=steps)]
