"""The power monitors of NVIDIA Jetsons: INA3221 chips with three labelled rails each, in mV and mA.

Which rails make the total depends on the board, and labels say which board it is:
    Orin Nano, Orin NX, Xavier NX, TX2   VDD_IN is the input of the module; the other rails are behind it
    Nano, TX1                            POM_5V_IN, likewise
    AGX Orin, AGX Xavier, Thor           no such rail: the top rails side by side are the module's power
A sub-rail is never added to what feeds it. The carrier board (USB, display, fan) is not seen on any of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent.energy.meter import Reading, Watts, look
from edge_agent.sysfs import Number, word
from regrow.errors import LocalError
from regrow.observations import Certainty

CHIPS = "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"
INPUTS = ("VDD_IN", "POM_5V_IN")
TOPS = (
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),  # AGX Orin; VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),  # AGX Xavier
    frozenset({"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}),  # Thor
)


class Rail:
    """One channel of a chip: its voltage and its current."""

    def __init__(self, chip: Path, channel: int) -> None:
        self._millivolts = Number(chip / f"in{channel}_input")
        self._milliamps = Number(chip / f"curr{channel}_input")

    def watts(self) -> float:
        """Raises LocalError where one of the two is not known."""
        return self._millivolts.read() * self._milliamps.read() / 1e6

    def close(self) -> None:
        self._millivolts.close()
        self._milliamps.close()


class Ina3221:
    """The sum of the rails that make a Jetson's total.

    Raises:
        LocalError: there is no such chip, or no rail or set of rails that is known to be the total.
    """

    certainty: Certainty = "measured"
    gap_s = 1.0
    most_hz = 100.0

    def __init__(self, root: Path) -> None:
        rails = _labelled(root)
        if not rails:
            raise LocalError("no INA3221 with labelled rails")
        chosen = _total_of(frozenset(rails))
        if not chosen:
            raise LocalError(f"INA3221 rails {', '.join(sorted(rails))}: none is known to be the board's total")
        self.name = f"ina3221 {'+'.join(chosen)}"[:64]
        self._rails = [Rail(*rails[label]) for label in chosen]

    def read(self) -> Reading:
        return look(lambda: Watts(sum(rail.watts() for rail in self._rails)))

    def close(self) -> None:
        for rail in self._rails:
            rail.close()


def _labelled(root: Path) -> dict[str, tuple[Path, int]]:
    """Label -> (folder, channel). One chip may be reached by two drivers' links: it counts once."""
    found: dict[str, tuple[Path, int]] = {}
    for chip in sorted({Path(os.path.realpath(path)) for path in root.glob(CHIPS)}):
        for channel in (1, 2, 3):
            label = word(chip / f"in{channel}_label")
            if label and label != "NC":
                found.setdefault(label, (chip, channel))
    return found


def _total_of(labels: frozenset[str]) -> list[str]:
    for label in INPUTS:
        if label in labels:
            return [label]
    return next((sorted(tops) for tops in TOPS if tops <= labels), [])
