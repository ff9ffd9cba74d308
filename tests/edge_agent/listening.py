"""An agent's senses with somebody who listens to every row."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.energy.account import Energy
from edge_agent.senses import Senses
from regrow.observations import Row


class Listening(Senses):
    """Senses that also tell a test of each row."""

    def __init__(self, heard: Callable[[Row], None], energy: Callable[[Callable[[Row], None]], Energy] | None = None) -> None:
        self._heard = heard
        super().__init__(energy=energy)

    def take(self, row: Row) -> None:
        self._heard(row)
        super().take(row)
