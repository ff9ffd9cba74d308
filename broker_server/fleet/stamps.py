"""What must outlive the gateway so that nothing old counts again: how far every device's stamps have come, and the fleet's time.

    FLEET/stamps/clock        the fleet's time, unix milliseconds: written about once a minute by every process that seals
    FLEET/stamps/ROLE.json    of one process: below which stamp each key is refused in its next life, and what it has heard
    FLEET/stamps/ROLE.lock    held while that process lives

Each process writes its own file. It begins with what the others have heard, which is old for this one, too, and takes over the files of
those that have ended.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from broker_server.durable import write_private
from regrow.errors import LocalError
from regrow.guards import RESERVE_MS

FOLDER = "stamps"
CLOCK = "clock"
CLOCK_MS = 60_000
LEAP_MS = 100 * 24 * 3600 * 1000  # less than a third of a certificate's life: one wrong clock makes none of them look expired
_ROLE = re.compile(r"[a-z0-9-]{1,100}")


class _Stamps(msgspec.Struct, frozen=True):
    """By signing key, hexadecimal. clean: its process has ended and heard nothing since."""

    reserved: dict[str, int]
    heard: dict[str, int]
    clean: bool = False


class Stamps:
    """The stamps of devices, as one process of the gateway keeps them until it ends.

    Args:
        fleet: the fleet's folder.
        role: what the process does; no two at a time have the same.

    Attributes:
        floors: key -> below this everything is refused.
        quiet_s: how long devices may still be below their floors, because an earlier life had no end.

    Raises:
        LocalError: another process has this role, or a file does not check out or cannot be read or written.
    """

    def __init__(self, fleet: Path, role: str) -> None:
        if not _ROLE.fullmatch(role):
            raise LocalError(f"role {role!r}: 1 to 100 of a-z, 0-9 and '-'")
        folder = fleet / FOLDER
        self._path = folder / f"{role}.json"
        self.floors: dict[str, int] = {}
        self.quiet_s = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (folder / "lock").open("ab") as alone:
                fcntl.flock(alone, fcntl.LOCK_EX)
                self._take_over(folder, role)
        except OSError as error:
            raise LocalError(f"{error.filename or folder}: {error.strerror or error}; check its owner and the disk") from error

    def _take_over(self, folder: Path, role: str) -> None:
        own = _locked(folder / f"{role}.lock")
        if own is None:
            raise LocalError(f"another process of this fleet does the same as this one ({role}): stop it first")
        self._lock = own
        ended = []
        for path in folder.glob("*.json"):
            lock = own if path == self._path else _locked(path.with_suffix(".lock"))
            self._heed(path, lives=lock is None)
            if lock is not None and lock is not own:
                lock.close()
                ended.append(path)
        self.save(self.floors, {key: floor - 1 for key, floor in self.floors.items()}, clean=not self.quiet_s)
        for path in ended:
            path.unlink()
            path.with_suffix(".lock").unlink(missing_ok=True)

    def _heed(self, path: Path, *, lives: bool) -> None:
        """What a process that lives has heard is old; one that has ended may have heard all that it had reserved."""
        known = _read(path)
        for key, floor in ((key, last + 1) for key, last in known.heard.items()) if lives else known.reserved.items():
            self.floors[key] = max(floor, self.floors.get(key, 0))
        if not lives and not known.clean:
            age_s = time.time() - path.stat().st_mtime
            self.quiet_s = max(self.quiet_s, min(max(RESERVE_MS / 1000 - age_s, 0.0), RESERVE_MS / 1000))

    def save(self, reserved: Mapping[str, int], heard: Mapping[str, int], *, clean: bool = False) -> None:
        """Durable when it returns. Raises LocalError: it could not be written, so nothing that depends on it may count."""
        data = msgspec.json.encode(_Stamps(dict(reserved), {key: last for key, last in heard.items() if last >= 0}, clean))
        try:
            write_private(self._path, data)
        except OSError as error:
            raise LocalError(f"{self._path}: {error.strerror or error}; free space on the disk") from error

    def close(self) -> None:
        """Let another process take this role."""
        self._lock.close()


def _locked(path: Path) -> IO[bytes] | None:
    """The lock of a role, or None while its process lives."""
    lock = path.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _read(path: Path) -> _Stamps:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stamps)
    except (msgspec.DecodeError, ValueError) as error:
        cure = "restore it from a backup, or remove it: what devices said before can then be replayed"
        raise LocalError(f"{path} does not check out: {error}; {cure}") from error


# ---- the fleet's time --------------------------------------------------------------------------------------------------------------


def begin_clock(fleet: Path, wall_ms: int) -> tuple[int, str]:
    """(the fleet's time now, a warning or nothing).

    The gateway's clock is believed unless it is behind what was written, as on a board without a battery, or months ahead.
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
