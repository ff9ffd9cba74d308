"""The firmware of a Raspberry Pi, asked as `vcgencmd` does it, but without starting a program each time, which costs more than the answer.

Where its device cannot be opened and the tool may, the tool is asked.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from regrow.errors import LocalError

DEVICES = ("dev/vcio_gencmd", "dev/vcio")
_IOCTL_PROPERTY = 0xC000_0000 | struct.calcsize("P") << 16 | 100 << 8  # _IOWR(100, 0, char *)
_GENCMD, _TEXT_BYTES = 0x0003_0080, 4096
_ABSENT = "no Raspberry Pi firmware to ask: /dev/vcio is absent, or the agent's user is not in the group video"


class Firmware:
    """The firmware of this board.

    Attributes:
        most_hz: how often it may be asked for little.

    Raises:
        LocalError: there is none, or this user may not ask.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._descriptor: int | None = None
        self.most_hz = 10.0
        for device in DEVICES:
            with suppress(OSError):
                self._descriptor = os.open(root / device, os.O_RDONLY | os.O_CLOEXEC)
                return
        if root != Path("/") or not said_by("vcgencmd", "version"):
            raise LocalError(_ABSENT)
        self.most_hz = 1.0

    def ask(self, command: str) -> str:
        """Its answer to a command of vcgencmd.

        Raises:
            LocalError: it refuses.
        """
        if self._descriptor is not None:
            return gencmd(self._descriptor, command)
        said = said_by("vcgencmd", command)
        if not said:
            raise LocalError(f"vcgencmd {command} fails")
        return said

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def gencmd(descriptor: int, command: str, ioctl: Callable[[int, int, bytearray], object] = fcntl.ioctl) -> str:
    """What the firmware answers to a command, through the mailbox's property interface.

    Raises:
        LocalError: it refuses.
    """
    head = struct.pack("<6I", struct.calcsize("<7I") + _TEXT_BYTES, 0, _GENCMD, _TEXT_BYTES, 0, 0)
    buffer = bytearray(head + command.encode().ljust(_TEXT_BYTES, b"\0") + bytes(4))
    try:
        ioctl(descriptor, _IOCTL_PROPERTY, buffer)
    except OSError as error:
        raise LocalError(f"the firmware refuses {command}: {error.strerror or error}") from error
    failed = struct.unpack_from("<I", buffer, 20)[0]
    if failed:
        raise LocalError(f"the firmware refuses {command}: error {failed}")
    return bytes(buffer[24 : 24 + _TEXT_BYTES]).partition(b"\0")[0].decode("ascii", "replace")


def said_by(*command: str) -> str:
    """What a board's own tool prints; nothing where there is none, or it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=3.0, check=False, stdin=subprocess.DEVNULL)
        return done.stdout if done.returncode == 0 else ""
    return ""
