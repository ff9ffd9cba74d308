"""What must outlive the gateway so that nothing old counts again: how far every device's stamps have come, and the fleet's time.

    FLEET/stamps/clock        the fleet's time, unix milliseconds: written about once a minute by every process that seals
    FLEET/stamps/ROLE.json    of one process: below which stamp each key is refused in its next life, and what it has heard

Each process writes its own file, and reads those of the others once: what another has heard is old for this one, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from broker_server.credentials import write_private
from regrow.errors import LocalError
from regrow.guards import RESERVE_MS
from regrow.topics import check_name

FOLDER = "stamps"
CLOCK = "clock"
CLOCK_MS = 60_000
LEAP_MS = 400 * 24 * 3600 * 1000


class _Stamps(msgspec.Struct, frozen=True):
    """By signing key, hexadecimal. clean: its process has ended and heard nothing since."""

    reserved: dict[str, int]
    heard: dict[str, int]
    clean: bool = False


class Stamps:
    """The stamps of devices, as one process of the gateway keeps them.

    Args:
        fleet: the fleet's folder.
        role: what the process does; no two at a time have the same.

    Attributes:
        floors: key -> below this everything is refused.
        quiet_s: how long devices may still be below their floors, because the last life had no end.

    Raises:
        LocalError: a file does not check out, or cannot be read.
    """

    def __init__(self, fleet: Path, role: str) -> None:
        folder = fleet / FOLDER
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / f"{check_name(role, 'role')}.json"
        self.floors: dict[str, int] = {}
        self.quiet_s = 0.0
        for path in folder.glob("*.json"):
            known = _read(path)
            own = path == self._path
            for key, stamp in (known.reserved if own else {name: last + 1 for name, last in known.heard.items()}).items():
                self.floors[key] = max(stamp, self.floors.get(key, 0))
            if own and not known.clean:
                age_s = time.time() - path.stat().st_mtime
                self.quiet_s = min(max(RESERVE_MS / 1000 - age_s, 0.0), RESERVE_MS / 1000)

    def save(self, reserved: Mapping[str, int], heard: Mapping[str, int], *, clean: bool = False) -> None:
        """Durable when it returns. Raises LocalError: it could not be written, so nothing that depends on it may count."""
        data = msgspec.json.encode(_Stamps(dict(reserved), {key: last for key, last in heard.items() if last >= 0}, clean))
        try:
            write_private(self._path, data)
        except OSError as error:
            raise LocalError(f"{self._path}: {error.strerror or error}; free space on the disk") from error


def _read(path: Path) -> _Stamps:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stamps)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise LocalError(
            f"{path} does not check out: {error}; restore it from a backup, or remove it: what devices said before can then be replayed"
        ) from error


def begin_clock(fleet: Path, wall_ms: int) -> tuple[int, str]:
    """(the fleet's time now, a warning or nothing).

    The gateway's clock is believed unless it is behind what was written, as on a board without a battery, or more than a year ahead.
    Then the time goes on from there, above everything that an earlier life can have sealed.

    Args:
        wall_ms: the gateway's clock, unix milliseconds.
    """
    saved_ms = read_clock(fleet)
    if saved_ms is None or 0 <= wall_ms - saved_ms <= LEAP_MS:
        return wall_ms, ""
    return saved_ms + 2 * CLOCK_MS, implausible(saved_ms, wall_ms, fleet)


def implausible(known_ms: int, wall_ms: int, fleet: Path) -> str:
    """What to tell of a clock that cannot be right."""
    known, wall = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(at_ms / 1000)) for at_ms in (known_ms, wall_ms))
    said = f"the gateway's clock says {wall}, but this fleet was there at {known} (UTC) and goes on from then: set the clock"
    return said if wall_ms < known_ms else f"{said}, or, if it is right, remove {fleet / FOLDER / CLOCK} and start again"


def read_clock(fleet: Path) -> int | None:
    """What was written last, unix milliseconds; None: nothing, or nothing that is a time."""
    with suppress(OSError, ValueError):
        return int((fleet / FOLDER / CLOCK).read_text())
    return None


def write_clock(fleet: Path, at_ms: int) -> int:
    """Write the fleet's time unless another process was ahead; returns the later of both."""
    latest_ms = max(at_ms, read_clock(fleet) or 0)
    try:
        write_private(fleet / FOLDER / CLOCK, f"{latest_ms}\n".encode())
    except OSError as error:
        raise LocalError(f"{fleet / FOLDER / CLOCK}: {error.strerror or error}; free space on the disk") from error
    return latest_ms
