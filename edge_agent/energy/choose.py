"""Which meter measures this device: the one that is named, or the best that is there.

auto                          the first of ina3221, hwmon, pmic, rapl and battery that is there and tells something
none                          nothing is measured
ina3221                       a Jetson's own rails
hwmon, hwmon:hwmon3           an INA219, INA226 or INA260 that a kernel driver has
i2c:BUS:ADDRESS:CHIP[:OHM]    one that no driver has: i2c:1:0x40:ina219:0.1
pmic                          a Raspberry Pi 5's own
battery                       its fuel gauge, while it is no charger's
rapl                          the processor package of a PC
serial:DEVICE[:BAUD]          lines with watts: serial:/dev/ttyUSB0:115200
mqtt:TOPIC                    messages with watts on the broker that the agent uses
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_agent.energy.battery import Battery
from edge_agent.energy.external import MqttMeter, SerialMeter
from edge_agent.energy.hwmon import Hwmon
from edge_agent.energy.ina3221 import Ina3221
from edge_agent.energy.ina_i2c import CHIPS, open_chip
from edge_agent.energy.meter import Meter, NoMeter, Unmeasured
from edge_agent.energy.pmic import Pmic
from edge_agent.energy.rapl import Rapl
from edge_agent.firmware import Firmware
from regrow.errors import LocalError, UsageError

ROOT = Path("/")
_SHUNT_OHM = 0.1  # of nearly every INA219 board
_PLAIN: dict[str, Callable[[Path], Meter]] = {
    "ina3221": Ina3221,
    "hwmon": Hwmon,
    "pmic": lambda root: _pmic(root),
    "rapl": Rapl,
    "battery": Battery,
}
_FORMS = "auto, none, ina3221, hwmon[:NAME], i2c:BUS:ADDRESS:CHIP[:OHM], pmic, battery, rapl, serial:DEVICE[:BAUD] or mqtt:TOPIC"


def open_meter(said: str, root: Path = ROOT) -> Meter:
    """The meter of this name.

    Args:
        said: as in the list above.
        root: below which sys and dev lie.

    Raises:
        UsageError: it names no kind of meter, or not in its form.
        LocalError: there is none of this kind here.
    """
    kind, _, rest = said.partition(":")
    if kind == "auto" and not rest:
        return _best(root)
    if kind == "none" and not rest:
        return NoMeter("switched off: --meter none")
    if kind == "hwmon" and rest:
        return Hwmon(root, rest)
    if kind in _PLAIN and not rest:
        return _PLAIN[kind](root)
    if kind == "i2c":
        return _i2c(root, said, rest)
    if kind == "serial" and rest:
        device, _, baud = rest.partition(":")
        return SerialMeter(root / device.lstrip("/"), int(baud)) if baud.isdecimal() else SerialMeter(root / device.lstrip("/"))
    if kind == "mqtt" and rest and not set(rest) & set("+#\0"):
        return MqttMeter(rest)
    raise UsageError(f"--meter {said}: expected {_FORMS}")


def meter_or_why(said: str, root: Path = ROOT) -> Meter:
    """The meter of this name, or one that says why there is none: a device trains without a meter too.

    Raises:
        UsageError: as `open_meter`.
    """
    try:
        return open_meter(said, root)
    except UsageError:
        raise
    except LocalError as error:
        return NoMeter(str(error))


def _best(root: Path) -> Meter:
    """The first that tells something now; else the first that is there, for it may tell something later."""
    silent: Meter | None = None
    reasons = []
    for kind, make in _PLAIN.items():
        try:
            meter = make(root)
        except LocalError as error:
            reasons += [] if str(error).startswith("no ") else [f"{kind}: {error}"]
            continue
        reading = meter.read()
        if not isinstance(reading, Unmeasured):
            if silent is not None:
                silent.close()
            return meter
        reasons.append(f"{kind}: {reading.reason}")
        if silent is None:
            silent = meter
        else:
            meter.close()
    if silent is not None:
        return silent
    return NoMeter("; ".join(reasons) or "no meter here; an INA219 in the supply, or an external meter, measures it")


def _pmic(root: Path) -> Pmic:
    firmware = Firmware(root)
    meter = Pmic(firmware.ask, firmware.most_hz, firmware.close)
    reading = meter.read()
    if isinstance(reading, Unmeasured):  # a Pi without that chip has the same firmware device
        meter.close()
        raise LocalError(f"no Pi 5 power chip: {reading.reason}")
    return meter


def _i2c(root: Path, said: str, rest: str) -> Meter:
    parts = rest.split(":")
    try:
        bus, address, chip = int(parts[0]), int(parts[1], 0), parts[2]
        shunt_ohm = float(parts[3]) if len(parts) == 4 else _SHUNT_OHM
    except (IndexError, ValueError) as error:
        raise UsageError(f"--meter {said}: expected i2c:BUS:ADDRESS:CHIP[:OHM], i2c:1:0x40:ina219:0.1 for example") from error
    if len(parts) > 4 or chip not in CHIPS or not (0 <= bus < 100 and 0x03 <= address <= 0x77 and 1e-5 <= shunt_ohm <= 100):
        raise UsageError(f"--meter {said}: BUS from 0, ADDRESS 0x03 to 0x77, CHIP one of {', '.join(CHIPS)}, OHM of the shunt resistor")
    return open_chip(root, bus, address, chip, shunt_ohm)
