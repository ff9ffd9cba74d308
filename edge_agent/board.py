"""What this device is: its board, its Python, its C library."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from regrow.release import Here

MODEL = Path("/proc/device-tree/model")  # of every board that boots by a device tree


def board_name(model: Path = MODEL) -> str:
    """ "raspberry-pi-5-model-b", "nvidia-jetson-orin-nano-developer-kit", or "generic" where the firmware names none."""
    try:
        text = model.read_bytes().rstrip(b"\0").decode("ascii", "replace")
    except OSError:
        return "generic"
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r" Rev .*", "", text).lower()).strip("-")
    return name[:60] or "generic"


def look_here(*, board: str = "", version: str = "", number: int = 0) -> Here:
    """This machine, as releases are chosen by it. board: "" for what the firmware says."""
    return Here(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        machine=platform.machine(),
        glibc=_glibc(),
        board=board or board_name(),
        version=version,
        number=number,
    )


def _glibc() -> tuple[int, int]:
    """(0, 0) where the C library is another, so that no manylinux wheel fits."""
    try:
        found = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        found = None
    return (int(found[1]), int(found[2])) if found else (0, 0)
