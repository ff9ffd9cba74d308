"""An INA219, INA226 or INA260 in the supply, as the kernel's ina2xx driver shows it: microwatts, or mV and mA."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.meter import Reading, Watts, look
from edge_agent.sysfs import Number, word
from regrow.errors import LocalError
from regrow.observations import Certainty

CHIPS = ("ina219", "ina220", "ina226", "ina230", "ina231", "ina238", "ina260", "ina2xx")


class Hwmon:
    """One chip.

    Args:
        which: its folder, "hwmon3"; "" where there is one only.

    Raises:
        LocalError: there is no such chip, or several and none is named.
    """

    certainty: Certainty = "measured"
    gap_s = 1.0
    most_hz = 100.0

    def __init__(self, root: Path, which: str = "") -> None:
        found = {folder.name: folder for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")) if word(folder / "name") in CHIPS}
        if which and which not in found:
            raise LocalError(f"{which} is no INA2xx; there {'are ' + ', '.join(found) if found else 'is none'}")
        if not found:
            raise LocalError("no INA219, INA226 or INA260 in /sys/class/hwmon")
        if len(found) > 1 and not which:
            raise LocalError(f"several power chips ({', '.join(found)}): name the one in the supply, --meter hwmon:{next(iter(found))}")
        folder = found[which or next(iter(found))]
        self.name = f"{word(folder / 'name')} {folder.name}"
        self._microwatts = Number(folder / "power1_input")
        self._millivolts, self._milliamps = Number(folder / "in1_input"), Number(folder / "curr1_input")
        self._has_power = (folder / "power1_input").exists()

    def read(self) -> Reading:
        return look(self._watts)

    def _watts(self) -> Watts:
        if self._has_power:
            return Watts(self._microwatts.read() / 1e6)
        return Watts(self._millivolts.read() * self._milliamps.read() / 1e6)

    def close(self) -> None:
        for number in (self._microwatts, self._millivolts, self._milliamps):
            number.close()
