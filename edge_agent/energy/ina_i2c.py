"""An INA219, INA226 or INA260 on an I2C bus that no kernel driver has: its registers, read through /dev/i2c-N.

Nothing is written to the chip but the number of the register to read: after power-on it converts continuously, in its widest range, and
watts are bus voltage times current, so no calibration register is needed.

Source: Texas Instruments' data sheets SBOS448 (INA219), SBOS547 (INA226), SBOS656 (INA260).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.energy.meter import Reading, Watts, look
from regrow.errors import LocalError
from regrow.observations import Certainty

_I2C_SLAVE = 0x0703  # linux/i2c-dev.h; refused with EBUSY where a driver has the address
_CURRENT_OR_SHUNT, _BUS = 1, 2
Transfer = Callable[[int], bytes]
"""Register -> its two bytes, the higher first."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Volts of one count of the bus register and of the shunt register; amps_a_count instead where the shunt is inside."""

    bus_shift: int
    bus_v: float
    shunt_v: float = 0.0
    amps: float = 0.0
    overflow: int = 0  # bit of the bus register that says that the current could not be computed


CHIPS = {
    "ina219": Chip(bus_shift=3, bus_v=4e-3, shunt_v=10e-6, overflow=1),
    "ina226": Chip(bus_shift=0, bus_v=1.25e-3, shunt_v=2.5e-6),
    "ina260": Chip(bus_shift=0, bus_v=1.25e-3, amps=1.25e-3),
}


class InaI2c:
    """One chip.

    Args:
        chip: "ina219", "ina226" or "ina260".
        transfer: how its registers are read.
        where: for its name: "1:0x40".
        shunt_ohm: of the resistor beside an INA219 or INA226; an INA260 has its own.
        close: called at the end.
    """

    certainty: Certainty = "measured"
    gap_s = 1.0
    most_hz = 100.0

    def __init__(self, chip: str, transfer: Transfer, where: str, shunt_ohm: float = 0.1, close: Callable[[], None] = lambda: None) -> None:
        self.name = f"{chip} i2c {where}"
        self._chip, self._transfer, self._shunt_ohm, self._close = CHIPS[chip], transfer, shunt_ohm, close

    def read(self) -> Reading:
        return look(self._watts)

    def _watts(self) -> Watts:
        bus = self._register(_BUS)
        if bus & self._chip.overflow:
            raise LocalError(f"{self.name}: overflow, more current than the shunt resistor is made for")
        signed = self._register(_CURRENT_OR_SHUNT)
        signed -= 0x10000 if signed & 0x8000 else 0
        if abs(signed) >= 0x7FFF:
            raise LocalError(f"{self.name}: the current is at the end of its range; use a smaller shunt resistor")
        amps = signed * self._chip.amps if self._chip.amps else signed * self._chip.shunt_v / self._shunt_ohm
        return Watts((bus >> self._chip.bus_shift) * self._chip.bus_v * amps)

    def _register(self, number: int) -> int:
        data = self._transfer(number)
        if len(data) != 2:
            raise LocalError(f"{self.name}: {len(data)} bytes of register {number}, 2 are there")
        return int(struct.unpack(">H", data)[0])

    def close(self) -> None:
        self._close()


def open_chip(root: Path, bus: int, address: int, chip: str, shunt_ohm: float) -> InaI2c:
    """The chip at this address.

    Raises:
        LocalError: the bus is absent, not ours to read, or a kernel driver has the chip.
    """
    device = root / f"dev/i2c-{bus}"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        cure = "enable I2C (raspi-config, or dtparam=i2c_arm=on) and let the agent's user into the group i2c"
        raise LocalError(f"{device}: {error.strerror}; {cure}") from error
    try:
        fcntl.ioctl(descriptor, _I2C_SLAVE, address)
    except OSError as error:
        os.close(descriptor)
        raise LocalError(f"{device}, address {address:#x}: {error.strerror}; if a kernel driver has it, --meter hwmon reads it") from error

    def transfer(register: int) -> bytes:
        os.write(descriptor, bytes([register]))
        return os.read(descriptor, 2)

    return InaI2c(chip, transfer, f"{bus}:{address:#x}", shunt_ohm, lambda: os.close(descriptor))
