"""How much memory a training job may take on this device, measured once, when the agent starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

SHARE = 0.9
"""Of what is left. The rest is for what an agent holds beside a job: downloads, its update. It need not cover errors in what a job is
said to take, which was at least 1.1 times what the job took wherever it was measured (bench/step_memory.py)."""

V1_NO_LIMIT_BYTES = 1 << 60
V2_LIMITS = ("memory.max", "memory.high")  # above the second a process is not killed, but slowed down until it is below again


def spare_bytes(available_bytes: int | None = None, root: Path = Path("/")) -> int:
    """Nine tenths of what is available to this process, in the machine and in every control group that it is in.

    Args:
        available_bytes: of the machine; by default what the system says now, without swap.
        root: below which proc and sys lie.
    """
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    return int(SHARE * max(min([available, *_left_in_groups(root)]), 0))


def _left_in_groups(root: Path) -> list[int]:
    """What the limits of the process's control groups leave, for each group that has one: version 2 or, where that is mounted, 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        limits, used = (("memory.limit_in_bytes",), "memory.usage_in_bytes") if controllers else (V2_LIMITS, "memory.current")
        group = mount / path.lstrip("/")
        # In a container the path may be that outside of it; its own limit then lies at the mount.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            found = _left(folder, limits, used)
            left += [] if found is None else [found]
    return left


def _left(group: Path, limits: Sequence[str], used: str) -> int | None:
    """Limit less use of one group; files in the page cache that nobody works with are not use. None without a limit."""
    try:
        texts = [(group / limit).read_text().strip() for limit in limits if (group / limit).exists()]
        limit_bytes = min(int(text) for text in texts if text != "max")
        used_bytes = int((group / used).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        idle_bytes = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
    return limit_bytes - used_bytes + idle_bytes if limit_bytes < V1_NO_LIMIT_BYTES else None
