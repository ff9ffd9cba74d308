"""A bench's result with what it depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from testbed.machine import machine


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its machine, for bench/results/."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")
