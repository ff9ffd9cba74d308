"""What the limits of a device's owner look at: its battery, its heat, and whether its network is paid by the byte."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.doctor.host import hottest
from edge_agent.firmware import said_by
from edge_agent.link_facts import Unknown, interface_to
from edge_agent.sysfs import word
from regrow.broker_url import parse_broker_url
from regrow.budget import Budget
from regrow.errors import LocalError

SENSORS_S = 5.0
METERED_S = 30.0  # NetworkManager is asked this often, and whenever the way to the broker is another
STALE_S = 60.0  # a sensor that has said nothing for so long is unknown
_MANAGER = "org.freedesktop.NetworkManager"
_METERED = {"1": True, "2": False, "3": True, "4": False}  # NMMetered: yes, no, and the same guessed


@dataclass(frozen=True, slots=True)
class Reading:
    """What the sensors said: percent, degrees Celsius, whether the network is metered. None is unknown."""

    battery: float | None = None
    temperature_c: float | None = None
    metered: bool | None = None


def battery_percent(root: Path = Path("/")) -> float | None:
    """Charge of the emptiest battery that feeds this machine, percent; None without one, or where none says it."""
    found = []
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        kind, scope, charge = (word(supply / name) for name in ("type", "scope", "capacity"))
        if kind == "Battery" and scope != "Device" and re.fullmatch(r"[0-9]{1,3}", charge, re.ASCII) and int(charge) <= 100:
            found.append(float(charge))
    return min(found, default=None)


def is_metered(interface: str, ask: Callable[..., str] = said_by) -> bool | None:
    """Whether NetworkManager takes this interface's network for one that is paid by the byte; None where it does not say so.

    Args:
        ask: runs a command and returns what it prints.
    """
    if interface == "lo":
        return False
    manager = "/" + _MANAGER.replace(".", "/")
    device = re.fullmatch(
        r'o "(/[A-Za-z0-9_/]+)"', ask("busctl", "call", _MANAGER, manager, _MANAGER, "GetDeviceByIpIface", "s", interface).strip()
    )
    if device is None:
        return None
    return _METERED.get(ask("busctl", "get-property", _MANAGER, device[1], f"{_MANAGER}.Device", "Metered").strip().removeprefix("u "))


@dataclass(slots=True)
class Sensors:
    """What the limits of this device need to know, and no more.

    Args:
        broker: its URL.
        metered: interfaces that the owner counts as metered; None: NetworkManager is asked.
        root: below which sys lies.
    """

    budget: Budget
    broker: str
    metered: frozenset[str] | None = None
    root: Path = Path("/")
    ask: Callable[..., str] = said_by
    _told: tuple[str | None, float, bool | None] | None = None

    def read(self) -> Reading:
        """What they say now; may take seconds."""
        hot = hottest(self.root) if self.budget.max_temperature_c is not None else None
        return Reading(
            battery_percent(self.root) if self.budget.battery_floor is not None else None,
            None if hot is None else hot[1],
            self._is_metered(time.monotonic()) if self.budget.unmetered_only else None,
        )

    def _is_metered(self, now: float) -> bool | None:
        interface = interface_to(parse_broker_url(self.broker, of_device=True).host)
        if isinstance(interface, Unknown):
            return None
        if self.metered is not None:
            return interface in self.metered
        if self._told is None or self._told[0] != interface or now - self._told[1] >= METERED_S:
            self._told = interface, now, is_metered(interface, self.ask)
        return self._told[2]

    def check(self) -> None:
        """See that every limit can be judged here.

        Raises:
            LocalError: one cannot.
        """
        budget = self.budget
        if budget.battery_floor is not None and battery_percent(self.root) is None:
            raise LocalError("--battery-floor: no battery can be read in /sys/class/power_supply; leave the option out here")
        if budget.max_temperature_c is not None and hottest(self.root) is None:
            raise LocalError("--max-temperature: no thermal zone can be read in /sys/class/thermal; leave the option out here")
        asked = ("busctl", "get-property", _MANAGER, "/" + _MANAGER.replace(".", "/"), _MANAGER, "Version")
        if budget.unmetered_only and self.metered is None and not self.ask(*asked).startswith("s "):
            raise LocalError(
                "--unmetered-only: NetworkManager does not answer here, so nobody says which network is metered; "
                "name the interfaces that are, --metered wwan0, or --metered none"
            )


class InBackground:
    """The latest reading of slow sensors, taken again and again by a thread that ends with the process.

    Args:
        read: takes one; the first is waited for.
    """

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._latest = (time.monotonic(), read())
        threading.Thread(target=self._go_on, name="sensors", daemon=True).start()

    def __call__(self) -> Reading:
        at_s, reading = self._latest
        return reading if time.monotonic() - at_s < STALE_S else Reading()

    def _go_on(self) -> None:
        while True:
            time.sleep(SENSORS_S)
            reading = self._read()
            self._latest = (time.monotonic(), reading)
