"""What every measured figure depends on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, Python, NumPy, onnxruntime and the commit that was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() if answer.returncode == 0 else "unknown"
    except OSError:
        commit = "unknown"
    return {
        "cpu": names[0] if names else platform.processor() or "unknown",
        "cores": len(names) or None,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "onnxruntime": version("onnxruntime"),
        "commit": commit,
    }
