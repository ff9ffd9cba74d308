"""Orders of whole units: nested slices whose coordinates are exactly those of the units kept."""

from __future__ import annotations

import numpy as np
import pytest

from regrow.errors import LocalError
from regrow.order import Order
from regrow.unit_order import build_unit_order, level_sizes, level_units, ranks_of
from regrow.units import kept_count, unit_coordinates
from tests.regrow.fleet import LAYOUT, UNIT_LAYOUT, UNITS

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)
NO_IMPORTANCE = np.zeros(UNIT_LAYOUT.size, np.float32)


def order_by(kind: str, importance: np.ndarray = NO_IMPORTANCE, epoch: int = 0) -> Order:
    return build_unit_order(UNIT_LAYOUT, UNITS, ranks_of(kind, UNIT_LAYOUT, UNITS, importance, epoch), LADDER, epoch)


def level(order: Order, number: int) -> np.ndarray:
    return np.sort(order.coordinates[: order.lengths[number]])


def test_every_level_is_the_slice_of_its_first_units() -> None:
    order, sizes = order_by("first"), level_sizes(UNIT_LAYOUT, UNITS, LADDER)
    assert sizes[-1] == (40,)
    assert order.always_kept == 0
    for number, size in enumerate(sizes):
        assert order.lengths[number] == kept_count(UNIT_LAYOUT, UNITS, size)
        np.testing.assert_array_equal(level(order, number), unit_coordinates(UNIT_LAYOUT, UNITS, level_units(size)))


def test_rolling_moves_the_window_by_one_and_wraps() -> None:
    sizes = level_sizes(UNIT_LAYOUT, UNITS, LADDER)
    for epoch in (0, 1, 39, 40):
        order = order_by("rolling", epoch=epoch)
        window = np.sort((np.arange(sizes[1][0]) + epoch) % 40).astype(np.int64)
        np.testing.assert_array_equal(level(order, 1), unit_coordinates(UNIT_LAYOUT, UNITS, {0: window}))


def test_important_units_come_first_and_equal_ones_by_index() -> None:
    importance = np.zeros(UNIT_LAYOUT.size, np.float32)
    for unit in (7, 30):
        importance[unit * 30] = 1.0  # one weight of the unit's row
    order, (_, _, some, *_) = order_by("wg", importance), level_sizes(UNIT_LAYOUT, UNITS, LADDER)
    kept = np.sort(np.array([7, 30, *range(40)][: some[0]], np.int64))
    assert len(kept) > 2
    np.testing.assert_array_equal(level(order, 2), unit_coordinates(UNIT_LAYOUT, UNITS, {0: kept}))


def test_what_does_not_fit_is_refused() -> None:
    ranks = ranks_of("first", UNIT_LAYOUT, UNITS, NO_IMPORTANCE, 0)
    with pytest.raises(LocalError, match=r"rise to 1\.0"):
        build_unit_order(UNIT_LAYOUT, UNITS, ranks, (0.5,), 0)
    with pytest.raises(LocalError, match="always kept"):
        build_unit_order(LAYOUT, UNITS, ranks, LADDER, 0)
