"""What do a device and the gateway cost: packages, disk, peak memory, disk writes?

Installs the package into fresh environments, bare and with the extra of a device with an identity, then runs the demo and samples every
process of it. Writes are what the kernel counts as sent to the disk (/proc/PID/io write_bytes); where it counts none (a RAM disk), the
agents' own count is given beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import psutil
from machine import write_result

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"pip", "setuptools", "regrow"}


def install(extra: str = "") -> dict[str, Any]:
    """Packages and megabytes of `pip install regrow` with an extra ("[fleet]") or none, without pip itself."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        command = ["-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", str(ROOT / "constraints.txt"), f"{ROOT}{extra}"]
        subprocess.run([python, *command], check=True)
        listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True)
        names = sorted({package["name"] for package in json.loads(listed.stdout)} - NOT_OURS)
        site = next((Path(folder) / "lib").glob("python*/site-packages"))
        ours = [entry for entry in site.iterdir() if not entry.name.startswith(("pip", "setuptools", "pkg_resources", "_distutils"))]
        size = sum(file.lstat().st_size for entry in ours for file in ([entry] if entry.is_file() else entry.rglob("*")) if file.is_file())
        return {"packages": names, "package_count": len(names), "megabytes": round(size / 1e6, 1)}


def run_demo(seconds: float, broker: str) -> dict[str, Any]:
    """Peak memory and writes of the processes of one demo run."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "cli.main", "demo", "--plain", "--seconds", str(seconds), "--broker", broker, "--runs", runs]
        demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        peaks: dict[str, dict[str, float]] = {}
        started = time.monotonic()
        while demo.poll() is None:
            if time.monotonic() - started < seconds + 20:
                sample(psutil.Process(demo.pid), peaks)
            time.sleep(0.25)
        run = next(path for path in Path(runs).iterdir() if (path / "summary.json").exists())
        summary = json.loads((run / "summary.json").read_text())
        rows = json.loads((run / "metrics.json").read_text())
    telemetry = {row["device"]: row for row in rows if row["kind"] == "telemetry"}
    updates = sum(device["updates"] for device in summary["devices"])
    agents = [peak for name, peak in peaks.items() if name.startswith("agent")]
    hours = summary["seconds"] / 3600
    return {
        "broker": summary["broker"],
        "updates": updates,
        "agent_peak_mb": round(max(peak["memory_mb"] for peak in agents), 1),
        "agent_disk_bytes_per_update": round(sum(row["disk_bytes"] for row in telemetry.values()) / updates),
        "gateway_peak_mb": round(peaks["gateway"]["memory_mb"], 1),
        "gateway_disk_mb_per_hour": round(peaks["gateway"]["written_mb"] / hours),
        "broker_peak_mb": round(peaks["broker"]["memory_mb"], 1),
    }


def sample(demo: psutil.Process, peaks: dict[str, dict[str, float]]) -> None:
    """Note the highest values so far; a process that has just ended is left as it was."""
    try:
        children = demo.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in (demo, *children):
        try:
            words = process.cmdline()
            name = "gateway" if process.pid == demo.pid else f"agent {process.pid}" if "agent" in words else "broker"
            known = peaks.setdefault(name, {"memory_mb": 0.0, "written_mb": 0.0})
            known["memory_mb"] = max(known["memory_mb"], process.memory_info().rss / 1e6)
            known["written_mb"] = max(known["written_mb"], process.io_counters().write_bytes / 1e6)
        except psutil.NoSuchProcess:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of the fleet, for each broker (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "footprint.json", help="where the JSON goes")
    parser.add_argument("--install-only", type=Path, metavar="OUT", help="leave the demo out, and write the JSON there")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"install": install(), "install_fleet": install("[fleet]")}
    if arguments.install_only is not None:
        write_result(arguments.install_only, {"command": f"python bench/footprint.py --install-only {arguments.install_only}", **result})
    else:
        result["demo"] = [run_demo(arguments.seconds, broker) for broker in ("amqtt", "mosquitto")]
        write_result(arguments.out, {"command": f"python bench/footprint.py --seconds {arguments.seconds:g}", **result})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
