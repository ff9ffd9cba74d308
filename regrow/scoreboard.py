"""The devices' latest reports as columns, so that an evaluation costs nanoseconds and not microseconds per device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.ledger import Ledger
from regrow.levels import densities_of
from regrow.wire import Score

_BLOCK = 64


class Scoreboard:
    """Sums of reports per level.

    A device counts for the level that it trains, and for the full model where it was asked to fetch that. The sums are those of
    `reference.score_levels` to the bit: NumPy's accumulate adds one after the other, in the order in which devices joined.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._top = len(densities_of(ledger.task)) - 1
        self._places: dict[str, int] = {}
        self._levels = np.zeros(_BLOCK, np.int16)
        # Rows: what the trained level and what the full model brings; without a report both columns are 0, which changes no sum.
        self._totals = np.zeros((2, _BLOCK), np.float64)
        self._examples = np.zeros((2, _BLOCK), np.int64)

    def look(self, who: str) -> None:
        """Take one device's reports and density from the ledger."""
        device = self._ledger.devices[who]
        place = self._places.setdefault(who, len(self._places))
        if place == self._levels.size:
            self._levels, self._totals, self._examples = (_doubled(array) for array in (self._levels, self._totals, self._examples))
        level = self._ledger.level_of(device.density)
        own: Score | None = device.reports.get(level) if level != self._top else None  # the full model is counted once
        self._levels[place] = level
        for row, score in enumerate((own, device.reports.get(self._top))):
            self._totals[row, place] = score.accuracy * score.examples if score is not None else 0.0
            self._examples[row, place] = score.examples if score is not None else 0

    def means(self) -> dict[float, float]:
        """density -> example-weighted mean accuracy, ascending; levels without examples are absent."""
        found: dict[float, float] = {}
        trained = self._levels[: len(self._places)]
        for level in np.flatnonzero(np.bincount(trained)).tolist():
            if level != self._top:
                self._add(found, level, 0, np.flatnonzero(trained == level))
        self._add(found, self._top, 1, slice(0, len(self._places)))
        return found

    def _add(self, found: dict[float, float], level: int, row: int, places: NDArray[np.intp] | slice) -> None:
        examples = int(self._examples[row, places].sum())
        if examples:
            found[self._ledger.density_of(level)] = float(np.add.accumulate(self._totals[row, places])[-1]) / examples


def _doubled(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)], axis=-1)
