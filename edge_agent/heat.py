"""How hot the board is, and what slows it down at this moment: heat, or want of volts or amps."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edge_agent.firmware import Firmware
from edge_agent.sysfs import Number, word
from regrow.errors import LocalError

PI_FLAGS = ((0, "under-voltage"), (1, "frequency capped"), (2, "throttled"), (3, "at the soft temperature limit"))
_COLD_C, _HOT_C = -40.0, 150.0  # outside it is no temperature of a board that runs
_SLOWING = ("cpufreq", "devfreq", "thermal-cpufreq", "thermal-devfreq", "Processor")  # cooling by running slower; fans are another kind
_MOST_FILES = 64


@dataclass(frozen=True, slots=True)
class Condition:
    """The hottest zone, None where none can be read; why what is timed now is not the board's pace, nothing where it is."""

    temperature_c: float | None
    marks: tuple[str, ...]


class Zones:
    """The thermal zones of the board."""

    def __init__(self, root: Path) -> None:
        self._files = {}
        for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
            self._files[word(zone / "type") or zone.name] = Number(zone / "temp")

    def celsius(self) -> dict[str, float]:
        """Degrees of each zone that tells; one that sleeps, or says 0, does not."""
        found = {}
        for name, file in self._files.items():
            with suppress(LocalError):
                value = file.read() / 1000
                if _COLD_C < value < _HOT_C and value != 0:
                    found[name] = value
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class Heat:
    """The condition of one board, looked at again and again.

    What slows it: the Raspberry Pi firmware's flags; cooling devices that lower frequencies; counters of over-current (Jetson) and of
    thermal throttling (Intel) that have grown since the last look. A power mode that a person chose is no such thing.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root, self._zones = root, Zones(root)
        self._firmware: Firmware | None = None
        self._flags = pi_flags_file(root)
        if self._flags is None:
            with suppress(LocalError):
                self._firmware = Firmware(root)
        cooling = sorted((root / "sys/class/thermal").glob("cooling_device*"))
        self._slowing = [Number(device / "cur_state") for device in cooling if word(device / "type").startswith(_SLOWING)]
        over = sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
        throttled = islice(sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")), _MOST_FILES)
        self._counters = [(Number(file), "over-current") for file in over] + [(Number(file), "throttled") for file in throttled]
        self._counted: dict[Path, int] = {}

    def look(self) -> Condition:
        """The condition now."""
        flags = self._pi_flags()
        marks = [mark for bit, mark in PI_FLAGS if flags >> bit & 1]
        for file in self._slowing:
            with suppress(LocalError):
                marks += ["throttled"] if file.read() > 0 else []
        for file, mark in self._counters:
            with suppress(LocalError):
                now = file.read()
                marks += [mark] if now > self._counted.get(file.path, now) else []
                self._counted[file.path] = now
        celsius = self._zones.celsius()
        return Condition(max(celsius.values(), default=None), tuple(dict.fromkeys(marks)))

    def _pi_flags(self) -> int:
        """0 on other boards."""
        if self._flags is None and self._firmware is None:
            return 0
        try:
            return flags_of(word(self._flags) if self._flags is not None else _asked(self._firmware))
        except (LocalError, ValueError):
            return 0

    def close(self) -> None:
        self._zones.close()
        for file in (*self._slowing, *(file for file, _ in self._counters)):
            file.close()
        if self._firmware is not None:
            self._firmware.close()


def pi_flags(root: Path) -> int | None:
    """The Raspberry Pi firmware's flags; None on other boards."""
    file = pi_flags_file(root)
    try:
        if file is not None:
            return flags_of(word(file))
        firmware = Firmware(root)
        try:
            return flags_of(_asked(firmware))
        finally:
            firmware.close()
    except (LocalError, ValueError):
        return None


def pi_flags_file(root: Path) -> Path | None:
    """Where the kernel shows the flags."""
    return next(iter(sorted((root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"))), None)


def flags_of(text: str) -> int:
    """ "50005", or "throttled=0x50005" as vcgencmd says it. Raises ValueError for anything else."""
    return int(text.rpartition("=")[2].strip(), 16)


def _asked(firmware: Firmware | None) -> str:
    return "" if firmware is None else firmware.ask("get_throttled")
