"""Whole numbers and words in files of sysfs, read again and again at the cost of one system call."""

from __future__ import annotations

import os
import re
from pathlib import Path

from regrow.errors import LocalError

_NUMBER = re.compile(rb"[+-]?[0-9]{1,18}")
_MOST_BYTES = 64


class Number:
    """A whole number in a file that stays open.

    Args:
        path: of the file; it may appear, and vanish, later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read(self) -> int:
        """The number as it is now.

        Raises:
            LocalError: there is none: absent, not readable, empty, or something else.
        """
        try:
            if self._descriptor is None:  # not blocking: a FIFO in the place of a file must not hold the sampler
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            data = os.pread(self._descriptor, _MOST_BYTES, 0).strip()
        except OSError as error:
            self.close()  # a sensor that comes back is another file
            raise LocalError(f"{self.path}: {error.strerror or error}") from error
        if _NUMBER.fullmatch(data):
            return int(data)
        self.close()
        said = "is empty" if not data else f"says {data.decode('ascii', 'replace')[:20]!r}, no whole number"
        raise LocalError(f"{self.path} {said}")

    def close(self) -> None:
        """Let the file go; the next `read` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def word(path: Path) -> str:
    """The text of a small file without the space around it; "" where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, _MOST_BYTES).decode("ascii", "replace").strip(" \t\r\n\0")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
