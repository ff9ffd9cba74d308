"""The fuel gauge of a battery: what flows out of it, while it does. At a charger the device's share cannot be told from the battery's."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.meter import Reading, Watts, look
from edge_agent.sysfs import Number, word
from regrow.errors import LocalError
from regrow.observations import Certainty


class Battery:
    """All batteries that feed this device.

    Raises:
        LocalError: there is none.
    """

    certainty: Certainty = "measured"
    gap_s = 60.0  # gauges renew their numbers every second to every half minute
    most_hz = 2.0

    def __init__(self, root: Path) -> None:
        supplies = sorted((root / "sys/class/power_supply").glob("*"))
        # A mouse's battery has the scope "Device".
        self._folders = [supply for supply in supplies if word(supply / "type") == "Battery" and word(supply / "scope") != "Device"]
        if not self._folders:
            raise LocalError("no battery in /sys/class/power_supply")
        self.name = f"battery {'+'.join(folder.name for folder in self._folders)}"[:64]
        names = ("power_now", "voltage_now", "current_now")
        self._numbers = [{name: Number(folder / name) for name in names} for folder in self._folders]

    def read(self) -> Reading:
        return look(lambda: Watts(sum(map(self._out_of, self._folders, self._numbers))))

    def _out_of(self, folder: Path, numbers: dict[str, Number]) -> float:
        """Watts out of one battery."""
        status = word(folder / "status")
        if status in ("Charging", "Full", "Not charging"):
            raise LocalError(f"{folder.name}: {status.lower()}, so what the device draws comes from the charger and cannot be told")
        if status != "Discharging":
            raise LocalError(f"{folder.name}: its status is {status[:20]!r}, so it may be charging")
        if (folder / "power_now").exists():
            return abs(numbers["power_now"].read()) / 1e6  # some drivers count outwards as negative
        return abs(numbers["voltage_now"].read() * numbers["current_now"].read()) / 1e12

    def close(self) -> None:
        for numbers in self._numbers:
            for number in numbers.values():
                number.close()
