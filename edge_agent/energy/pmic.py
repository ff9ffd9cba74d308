"""The power chip of a Raspberry Pi 5, asked through its firmware: the sum of volts times amps over all rails that tell both.

What hangs on the 5 V line itself is on none of these rails (USB, HATs), and neither is the chip's own loss: the sum is an estimate.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from edge_agent.energy.meter import Reading, Watts, look
from regrow.errors import LocalError
from regrow.observations import Certainty

_LINE = re.compile(r"\s*(\w+)_([AV])\s+(current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)(A|V)\s*")
_FEWEST_RAILS = 8  # a Pi 5 tells of twelve; fewer than this is a torn answer


class Pmic:
    """The rails of the board.

    Args:
        ask: the firmware's answer to a command.
        most_hz: how often that may be.
        close: called at the end.
    """

    name = "pi5 pmic"
    certainty: Certainty = "estimated"
    gap_s = 3.0

    def __init__(self, ask: Callable[[str], str], most_hz: float = 10.0, close: Callable[[], None] = lambda: None) -> None:
        self._ask, self.most_hz, self._close = ask, most_hz, close

    def read(self) -> Reading:
        return look(lambda: Watts(watts_of(self._ask("pmic_read_adc"))))

    def close(self) -> None:
        self._close()


def watts_of(text: str) -> float:
    """The sum over the rails of an answer to pmic_read_adc.

    Raises:
        LocalError: it is not one, or cut short.
    """
    amps: dict[str, float] = {}
    volts: dict[str, float] = {}
    for line in text.replace("\0", "").splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            if line.strip():
                raise LocalError(f"pmic_read_adc says {line.strip()[:40]!r}, no rail")
            continue
        (amps if found[2] == "A" else volts)[found[1]] = float(found[4])
    alone = sorted(amps.keys() - volts.keys())
    if alone or len(amps) < _FEWEST_RAILS:
        lack = f", no voltage of {', '.join(alone)[:60]}" if alone else ""
        raise LocalError(f"pmic_read_adc was cut short: {len(amps)} currents{lack}")
    negative = sorted(rail for rail in amps if amps[rail] < 0 or volts[rail] < 0)
    if negative:
        raise LocalError(f"pmic_read_adc: negative at {', '.join(negative)[:60]}")
    return sum(amps[rail] * volts[rail] for rail in amps)
