"""What a fleet lives through: who is there when, and the classes and links of the papers."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from regrow.errors import LocalError, UsageError
from testbed.links import LogNormal
from testbed.memory import World

DAY_S = 86_400.0
_HOURS = "write it as FROM-TO, such as 22-6, several with spaces between, such as 8-12 13.5-17"
NIGHTLY = "nightly:"  # how an --attend begins that is no file

# ---- who is there when ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attendance:
    """When a device has a link.

    Args:
        joins_s: not there before.
        leaves_s: gone for good from then on.
        windows_s: (from, to) within a period, ascending and apart; the last may reach into the next period (cross midnight). Empty: always.
        period_s: after which the windows come again.
    """

    joins_s: float = 0.0
    leaves_s: float = math.inf
    windows_s: tuple[tuple[float, float], ...] = ()
    period_s: float = DAY_S

    def __post_init__(self) -> None:
        if not 0.0 <= self.joins_s < self.leaves_s:
            raise UsageError(f"attendance: joins at {self.joins_s} s and leaves at {self.leaves_s} s; it must be 0 <= joins < leaves")
        if not (math.isfinite(self.period_s) and self.period_s > 0.0):
            raise UsageError(f"attendance: period of {self.period_s} s, it must be finite and > 0")
        edges = [edge for window in self.windows_s for edge in window]
        within = not edges or (0.0 <= edges[0] < self.period_s and edges[-1] < edges[0] + self.period_s)
        if not within or any(not later > earlier for earlier, later in pairwise(edges)):
            hours = " ".join(
                f"{start / 3600.0:g}-{end / 3600.0 if end <= DAY_S else end / 3600.0 - 24.0:g}" for start, end in self.windows_s
            )
            raise UsageError(f"attendance: the windows {hours} (hours of the day) must lie apart and leave a time between them")

    def available(self, time_s: float) -> bool:
        """Whether the device has a link at this virtual time; at the edge of a window what begins there holds."""
        if not self.joins_s <= time_s < self.leaves_s:
            return False
        if not self.windows_s:
            return True
        for start, end in self._open(time_s):
            if start > time_s:
                return False
            if time_s < end:
                return True
        return False

    def changes(self) -> Iterator[tuple[float, bool]]:
        """(time_s, whether it is there from then on), from its arrival to before it leaves for good; perhaps without end."""
        if not self.windows_s:
            yield self.joins_s, True
            return
        for start, end in self._open(self.joins_s):
            if end <= self.joins_s:
                continue
            if start >= self.leaves_s:
                return
            yield max(start, self.joins_s), True
            if end >= self.leaves_s:
                return
            yield end, False

    def _open(self, time_s: float) -> Iterator[tuple[float, float]]:
        """The windows in virtual time, from the period before `time_s` on (its last window may reach into this one)."""
        for cycle in count(int(time_s // self.period_s) - 1):
            for start, end in self.windows_s:
                yield start + cycle * self.period_s, end + cycle * self.period_s


def nightly(from_hour: float, to_hour: float, *, joins_s: float = 0.0, leaves_s: float = math.inf) -> Attendance:
    """There from one hour of the day to another, such as while charging; time 0 is midnight, to_hour <= from_hour is the next day's."""
    window = _window(from_hour, to_hour)
    return Attendance(joins_s, leaves_s, () if window == (0.0, DAY_S) else (window,))


def _window(from_hour: float, to_hour: float) -> tuple[float, float]:
    """(from, to) in seconds; all of the day is 0 to DAY_S."""
    if not (0.0 <= from_hour < 24.0 and 0.0 <= to_hour <= 24.0):
        raise UsageError(f"attendance: from {from_hour:g} h to {to_hour:g} h; hours of the day are 0..24")
    if from_hour == to_hour:
        raise UsageError(f"attendance: from {from_hour:g} h to {to_hour:g} h is no time or all day; write 0-24 for always")
    to_hour += 24.0 if to_hour < from_hour else 0.0
    return 3600.0 * from_hour, 3600.0 * to_hour


def attendances(text: str, names: Sequence[str]) -> dict[str, Attendance]:
    """Who is there when, of the devices that this names; the others always are.

    Args:
        text: `nightly:FROM-TO` for all, in hours of the day; or a file. TOML: a table for each device or pattern with any of joins_s,
            leaves_s (seconds) and hours ("22-6", several with spaces between). CSV: a header with `device` and any of these, a line each.
            A device is its name, its number from 0, or a pattern such as "device-00*"; what comes later in the file wins.
        names: of all devices, in their order.

    Raises:
        LocalError: with the place, for anything else.
    """
    if text.startswith(NIGHTLY):
        hours = text.removeprefix(NIGHTLY)
        if not hours.strip():
            raise UsageError(f"--attend {text}: it says no hours; {_HOURS}")
        for_all = _attendance(f"--attend {text}", {"hours": hours})
        return {} if for_all == Attendance() else dict.fromkeys(names, for_all)
    path = Path(text)
    found: dict[str, Attendance] = {}
    for place, who, values in _toml_rows(path) if path.suffix == ".toml" else _csv_rows(path):
        matching = [name for index, name in enumerate(names) if fnmatchcase(name, who) or who == str(index)]
        if not matching:
            raise UsageError(f"{place}: no device {who!r}; give 0 to {len(names) - 1}, a name such as {names[-1]} or a pattern with *")
        found |= dict.fromkeys(matching, _attendance(place, values))
    return found


def _attendance(place: str, values: Mapping[str, Any]) -> Attendance:
    unknown = sorted(set(values) - {"joins_s", "leaves_s", "hours"})
    if unknown:
        raise UsageError(f"{place}: {unknown[0]!r} is none of joins_s, leaves_s, hours")
    try:
        joins_s, leaves_s = float(values.get("joins_s", 0.0)), float(values.get("leaves_s", math.inf))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place}: joins_s and leaves_s are seconds, such as 600") from error
    try:
        windows = sorted(_window(*_hours(part)) for part in str(values.get("hours", "")).split())
        return Attendance(joins_s, leaves_s, () if windows == [(0.0, DAY_S)] else tuple(windows))
    except LocalError as error:
        raise UsageError(f"{place}: {error}") from error


def _hours(text: str) -> tuple[float, float]:
    start, _, end = text.partition("-")
    try:
        return float(start), float(end)
    except ValueError as error:
        raise UsageError(f"{text!r} is no window of hours; {_HOURS}") from error


def _toml_rows(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if sys.version_info < (3, 11):
        raise UsageError(f"{path}: reading TOML needs Python 3.11 or newer; a CSV file does not")
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not readable as TOML of attendances: {error}") from error
    for who, values in tables.items():
        if not isinstance(values, dict):
            raise UsageError(f'{path}: {who} is no table; write ["{who}"] and below it hours = "22-6"')
        yield f"{path}, [{who}]", who, values


def _csv_rows(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as a file of attendances: {error}; give a .toml or .csv, or nightly:22-6") from error
    rows = csv.reader(lines)
    header = [cell.strip() for cell in next(rows, [])]
    if "device" not in header:
        raise UsageError(f"{path}:1: expected a header such as device,joins_s,leaves_s,hours, got {','.join(header)!r}")
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise UsageError(f"{path}:{rows.line_num}: {len(row)} cells under {len(header)} columns")
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=True) if cell.strip()}
        yield f"{path}:{rows.line_num}", cells.pop("device", ""), cells


def attend(world: World, name: str, attendance: Attendance, join: Callable[[], object]) -> None:
    """Let one device come and go: `join` adds it to the world, later it loses its link and returns as it was, at the end it is killed.

    Each change schedules the next, so that an endless schedule costs one event at a time.
    """
    changes = attendance.changes()
    gone = joined = False

    def plan() -> None:
        following = next(changes, None)
        if following is not None:
            world.at(following[0], lambda: change(following[1]))

    def change(there: bool) -> None:
        nonlocal joined
        if gone:
            return
        if not there:
            world.cut(name)
        elif joined:
            world.connect(name)
        else:
            joined = True
            join()
        plan()

    def leave() -> None:
        nonlocal gone
        gone = True
        if joined:
            world.kill(name)

    plan()
    if attendance.leaves_s < math.inf:
        world.at(attendance.leaves_s, leave)


# ---- the papers ----------------------------------------------------------------------------------------------------------------------

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
PERCENT = {"high": (10, 10, 10, 10, 60), "medium": (10, 10, 20, 30, 30), "low": (20, 20, 20, 20, 20)}

MODEL_BYTES = 26_000_000  # the LEAF CNN that the papers' rates are stated for
UP_BYTES_PER_S, DOWN_BYTES_PER_S = 5e6, 20e6  # of a device at density 1
SERVER_UP_BYTES_PER_S, SERVER_DOWN_BYTES_PER_S = 10e6, 50e6
SIGMA, SERVER_SIGMA = 0.3, 0.1


def heterogeneity(kind: str, clients: int) -> list[float]:
    """The density class of each client, the largest first.

    Shares that are no whole numbers are rounded by largest remainder, equal ones in favour of the larger density.

    Raises:
        LocalError: another kind, or no client.

    Source: FedGMR's classes for 10 clients (algorithms.md section 4).
    """
    if kind not in PERCENT:
        raise UsageError(f"heterogeneity {kind!r}: choose one of {', '.join(PERCENT)}")
    if clients < 1:
        raise UsageError(f"heterogeneity: {clients} clients; at least 1 is needed")
    shares = [divmod(percent * clients, 100) for percent in PERCENT[kind]]
    lacking = clients - sum(whole for whole, _ in shares)
    rounded_up = sorted(range(len(shares)), key=lambda index: (-shares[index][1], index))[:lacking]
    return [DENSITIES[index] for index, (whole, _) in enumerate(shares) for _ in range(whole + (index in rounded_up))]


def paper_links(name: str, density: float, model_bytes: int, *, seed: int, period_s: float) -> tuple[LogNormal, LogNormal]:
    """(up, down) of a device of this density class, scaled to the model, so that every class sends its own sub-model in the same time.

    Args:
        model_bytes: of the full model; 26 MB gives the papers' own rates, any model takes 5.2 s up at density 1.
        period_s: how long a rate holds, about one round.

    Source: FedGMR: up 5 rho, down 20 rho model megabytes per second, sigma 0.3 (algorithms.md section 4).
    """
    if not 0.0 < density <= 1.0:
        raise UsageError(f"links of {name}: density {density} is not in (0, 1]")
    return _pair(name, density * UP_BYTES_PER_S, density * DOWN_BYTES_PER_S, SIGMA, model_bytes, seed, period_s)


def full_density_bps(model_bytes: int) -> float:
    """The uplink of a device of density 1 in bit/s, scaled to the model as `paper_links` scales it."""
    return 8.0 * UP_BYTES_PER_S * model_bytes / MODEL_BYTES


def paper_server_links(name: str, model_bytes: int, *, seed: int, period_s: float) -> tuple[LogNormal, LogNormal]:
    """(up, down) of the coordinator, shared by everything that it sends and hears; 10 and 50 model megabytes per second, sigma 0.1."""
    return _pair(name, SERVER_UP_BYTES_PER_S, SERVER_DOWN_BYTES_PER_S, SERVER_SIGMA, model_bytes, seed, period_s)


def _pair(name: str, up: float, down: float, sigma: float, model_bytes: int, seed: int, period_s: float) -> tuple[LogNormal, LogNormal]:
    scale = 8.0 * model_bytes / MODEL_BYTES
    return (
        LogNormal(scale * up, sigma, period_s, seed, f"{name}/up"),
        LogNormal(scale * down, sigma, period_s, seed, f"{name}/down"),
    )
