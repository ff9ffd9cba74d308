"""Which levels a task has, and the order that cuts the model into them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.order import Order, build_order
from regrow.parameters import Layout
from regrow.task import Task
from regrow.unit_order import build_unit_order, ranks_of
from regrow.units import Units

SIXTY_FOURTHS = tuple(step / 64 for step in range(1, 65))


def densities_of(task: Task) -> tuple[float, ...]:
    """One density per level: FedGMR's ladder, 64ths for PR-FL's continuous rule, or the full model alone."""
    rules = {"class": task.method.ladder, "relative": SIXTY_FOURTHS, "full": (1.0,)}
    return rules[task.method.density]


def unit_densities_of(task: Task) -> tuple[float, ...] | None:
    """What the programs of a task are built for: densities of sub-models of whole units, or None for single weights."""
    return densities_of(task) if task.method.granularity == "unit" else None


def only_prefix(order: Order, flat_weights: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """float32 [n] by flat coordinate: the first `length` positions, and 0 elsewhere."""
    part = flat_weights.copy()
    part[order.coordinates[length:]] = 0.0
    return part


def next_order(
    task: Task, layout: Layout, units: Units | None, ranked: NDArray[np.float32], flat_weights: NDArray[np.float32], epoch: int
) -> Order:
    """The order of an epoch by the task's rules; `ranked`: float32 [n], the importance by flat coordinate.

    Raises:
        LocalError: the task wants units, and its model was not built with any.
    """
    method = task.method
    if method.granularity == "unit":
        if units is None:
            raise LocalError('granularity = "unit": the task was not built for it; run `regrow task build`')
        return build_unit_order(layout, units, ranks_of(method.importance, layout, units, ranked, epoch), densities_of(task), epoch)
    return build_order(
        layout,
        ranked,
        densities_of(task),
        epoch=epoch,
        floor=method.layer_floor,
        magnitude=np.abs(flat_weights),
        costs=method.layer_costs or None,
    )
