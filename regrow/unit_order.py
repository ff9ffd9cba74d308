"""Orders made of whole units: every level is a narrower model, and a coordinate enters with the last unit that it needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.order import MAX_LEVELS, Order
from regrow.parameters import Layout
from regrow.units import Kept, Units, unit_importance, width_for_density, width_sizes


def level_sizes(layout: Layout, units: Units, densities: Sequence[float]) -> list[tuple[int, ...]]:
    """How many units of each group every level keeps: one width for all groups, the one that comes nearest to the density."""
    return [width_sizes(units, width_for_density(layout, units, density)) for density in densities]


def level_units(sizes: Sequence[int]) -> Kept:
    """The first units of each group: what a program for these sizes is built with. Which units they are makes no difference to it."""
    return {group: np.arange(size, dtype=np.int64) for group, size in enumerate(sizes)}


def ranks_of(kind: str, layout: Layout, units: Units, importance: NDArray[np.float32], epoch: int) -> list[NDArray[np.float64]]:
    """How early each unit of each group comes: the largest first.

    Args:
        kind: `first`: by index (HeteroFL, FjORD); `rolling`: by index from the epoch's number on, wrapping around (FedRolex); anything
            else: by the importance of the parameters that a unit owns.
        importance: float32 [n] by flat coordinate; looked at for the latter only.

    Returns:
        float64 [size] per group.

    Raises:
        LocalError: the importance is not this layout's.

    Source: HeteroFL (arXiv 2010.01264), FedRolex (arXiv 2212.01548: the window moves by one each round); by importance: ours.
    """
    if kind in ("first", "rolling"):
        shift = epoch if kind == "rolling" else 0
        return [-((np.arange(group.size) - shift) % group.size).astype(np.float64) for group in units.groups]
    return [values.astype(np.float64) for values in unit_importance(layout, units, importance)]


def build_unit_order(layout: Layout, units: Units, ranks: Sequence[NDArray[np.float64]], densities: Sequence[float], epoch: int) -> Order:
    """The order of one epoch in which every level is a slice of whole units.

    Args:
        layout: its always-kept tensors must be those without a group (`export.programs.build_programs` with units).
        ranks: per group, the larger the earlier; equal ones by index.
        densities: of the levels, ascending, the last 1.0; the lengths are those of the nearest widths.

    Raises:
        LocalError: an argument does not fit.
    """
    if not 0 < len(densities) <= MAX_LEVELS or list(densities) != sorted(set(densities)) or densities[-1] != 1.0:
        raise LocalError(f"densities {tuple(densities)} do not rise to 1.0 in 1 to {MAX_LEVELS} distinct steps")
    units.check(layout)
    sizes = np.array(level_sizes(layout, units, densities))
    levels = []
    for group, rank in enumerate(ranks):
        place = np.empty(rank.size, np.int64)
        place[np.argsort(-rank, kind="stable")] = np.arange(rank.size)
        levels.append(np.searchsorted(sizes[:, group], place, side="right").astype(np.uint16))
    labels = np.empty(layout.size, np.uint16)
    for tensor, axes in zip(layout.tensors, units.axes, strict=True):
        entered = np.zeros(tensor.shape, np.uint16)
        for number, axis in enumerate(axes):
            if axis.group is not None:
                along = np.repeat(levels[axis.group], axis.block)
                entered = np.maximum(entered, along.reshape([-1 if other == number else 1 for other in range(len(axes))]))
        if tensor.always_kept and entered.any():
            raise LocalError(f"unit order: tensor {tensor.name} is always kept, but its units leave; rebuild with `regrow task build`")
        labels[layout.slices[tensor.name]] = 0 if tensor.always_kept else entered.reshape(-1) + 1
    lengths = np.cumsum(np.bincount(labels, minlength=len(densities) + 1))[1:]
    coordinates = np.argsort(labels, kind="stable").astype(np.uint32)
    return Order(epoch, coordinates, tuple(lengths.tolist()), layout.always_kept_coordinates.size)
