"""Intel's and AMD's own energy counters (RAPL): the processor package, so neither memory, disk, radio nor the power supply's loss."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.meter import Joules, Reading, look
from edge_agent.sysfs import Number, word
from regrow.errors import LocalError
from regrow.observations import Certainty

_ROOT_ONLY = "only root may read energy_uj: run as root, or let the agent's group read it with a udev rule"


class Rapl:
    """The sum of all processor packages.

    Their counters wrap at max_energy_range_uj, after minutes to hours; one wrap between two readings is taken out here.

    Raises:
        LocalError: there is no such counter.
    """

    certainty: Certainty = "estimated"
    gap_s = 5.0
    most_hz = 100.0

    def __init__(self, root: Path) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        # psys holds the packages, and core, uncore and dram are zones below one.
        self._zones = [zone for zone in zones if zone.name.count(":") == 1 and word(zone / "name").startswith("package")]
        if not self._zones:
            raise LocalError("no RAPL package in /sys/class/powercap")
        self.name = "rapl package" + (f" x{len(self._zones)}" if len(self._zones) > 1 else "")
        self._counters = [Number(zone / "energy_uj") for zone in self._zones]
        self._ranges = [Number(zone / "max_energy_range_uj") for zone in self._zones]
        self._last: list[int] | None = None
        self._total_uj = 0

    def read(self) -> Reading:
        return look(self._joules)

    def _joules(self) -> Joules:
        try:
            now = [counter.read() for counter in self._counters]
            if self._last is not None:
                self._total_uj += sum(map(self._grown, self._last, now, self._ranges))
        except LocalError as error:
            self._last = None  # it may have wrapped more than once meanwhile: begin anew
            if isinstance(error.__cause__, PermissionError):
                raise LocalError(f"{error}; {_ROOT_ONLY}") from error
            raise
        self._last = now
        return Joules(self._total_uj / 1e6)

    @staticmethod
    def _grown(before: int, now: int, most: Number) -> int:
        """Microjoules since the last reading."""
        if min(before, now) < 0:
            raise LocalError(f"{most.path.parent / 'energy_uj'} is negative")
        if now >= before:
            return now - before
        largest = most.read()
        if largest < before:
            raise LocalError(f"{most.path.parent / 'energy_uj'} fell from {before} to {now}, and its range is only {largest}")
        return largest - before + now

    def close(self) -> None:
        for number in (*self._counters, *self._ranges):
            number.close()
