"""The latest update of a device, and where its arrays lie: in memory, or wherever a runtime puts them, since the core opens no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regrow import aggregate
from regrow.aggregate import Update
from regrow.order import Order


class Shelf(Protocol):
    """Puts arrays away. What comes back is never written to again, and its place is free once nobody holds it."""

    def __call__(self, array: NDArray[Any], /) -> NDArray[Any]:
        """The same values at their place.

        Raises:
            LocalError: there is no room for it.
        """


def in_memory(array: NDArray[Any], /) -> NDArray[Any]:
    """The shelf of simulations and audits: the array itself."""
    return array


@dataclass(frozen=True, slots=True)
class Buffered:
    """The latest update of a device; `version` as in records.Accepted; `base` only where gradient averaging needs it."""

    update: Update
    version: int
    examples: int
    base: NDArray[np.float32] | None = None


def shelved(held: Buffered, shelf: Shelf) -> Buffered:
    """The same update with its arrays on the shelf."""
    presence, base = held.update.presence, held.base
    update = Update(shelf(held.update.values), None if presence is None else shelf(presence))
    return Buffered(update, held.version, held.examples, None if base is None else shelf(base))


def reexpressed(held: Buffered, old: Order, new: Order) -> Buffered:
    """The same update in the order of a later epoch."""
    update = aggregate.reexpress(held.update, old, new)
    if held.base is None:
        return Buffered(update, held.version, held.examples)
    base = aggregate.reexpress(Update(held.base, held.update.presence), old, new)
    return Buffered(update, held.version, held.examples, base.values)
