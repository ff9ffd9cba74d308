"""What a real board can do, as one JSON to send back: golden numbers, step time, memory, sensors, disk, and how it holds out when warm.

Strategy: a program that comes with the agent (the watch CNN of the demo, batch 20) is trained on inputs that every machine computes alike;
where it must end is written beside it, computed by torch on another machine (tests/golden/board.py). Nothing needs a network.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distributions
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.doctor.checks import run_checks
from edge_agent.doctor.host import host_checks, temperature, throttling
from edge_agent.trainer import Trainer
from regrow.errors import LocalError
from regrow.local_training import Batch

GOLDEN = Path(__file__).parent / "golden"
BATCH, STEPS, LEARNING_RATE = 20, 5, 0.05
SHAPE, CLASSES = (6, 100), 7
TOLERANCE = 1e-4  # of the largest change of a parameter: float32 in another order of summation
TIMED_STEPS = 30
DISK_BYTES, DISK_BLOCK = 64 << 20, 1 << 20
SYNCS = 30
SAMPLE_S = 5.0


def initial(size: int) -> NDArray[np.float32]:
    """float32 [size]: weights to begin with, from whole numbers alone, so that every machine has the same."""
    return ((np.arange(size, dtype=np.int64) * 7919 % 2003 - 1001) / 20_000).astype(np.float32)


def batches(steps: int) -> Iterator[Batch]:
    """(x float32 [20, 6, 100], y int64 [20]) of each step, the same on every machine."""
    count = BATCH * int(np.prod(SHAPE))
    for step in range(steps):
        whole = (np.arange(count, dtype=np.int64) + 31 * step) * 104_729 % 4001 - 2000
        y = (np.arange(BATCH, dtype=np.int64) * 3 + step) % CLASSES
        yield (whole / 1000).astype(np.float32).reshape(BATCH, *SHAPE), y


def golden_programs() -> dict[str, bytes]:
    """The layout and the training program that came with the agent."""
    return {"layout": (GOLDEN / "layout.json").read_bytes(), "train": (GOLDEN / "train.onnx").read_bytes()}


def expected_of(vector: NDArray[np.float32], loss: float) -> dict[str, Any]:
    """What is kept of a result: the loss, and every 400th parameter."""
    return {"loss": loss, "parameters": [float(value) for value in vector[::400]]}


def parity(trainer: Trainer) -> dict[str, Any]:
    """How far this machine's training is from the golden numbers, relative to what training changes."""
    expected: Mapping[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    start = initial(trainer.layout.size)
    result = trainer.train(start, None, batches(STEPS), LEARNING_RATE)
    wanted = np.array(expected["parameters"])
    change = float(np.abs(wanted - start[::400]).max())
    difference = float(np.abs(result.vector[::400] - wanted).max()) / change
    loss_difference = abs(result.loss - expected["loss"]) / expected["loss"]
    good = difference <= TOLERANCE and loss_difference <= TOLERANCE
    return {"parameters": difference, "loss": loss_difference, "tolerance": TOLERANCE, "ok": good}


def step_ms(trainer: Trainer, steps: int = TIMED_STEPS) -> float:
    """The median time of a step in milliseconds, the first one of a session left out."""
    vector, times = initial(trainer.layout.size), []
    for batch in batches(steps + 1):
        began_s = time.perf_counter()
        vector = trainer.train(vector, None, [batch], LEARNING_RATE).vector
        times.append(time.perf_counter() - began_s)
    return 1000 * statistics.median(times[1:])


def disk(folder: Path) -> dict[str, Any]:
    """What the disk of a folder takes: MB/s of one large file until it is safe, and milliseconds until 4 KiB are.

    Raises:
        LocalError: it cannot be written.
    """
    file = folder / f"regrow-board-check-{os.getpid()}.tmp"
    block = os.urandom(DISK_BLOCK)
    try:
        began_s = time.perf_counter()
        with file.open("wb") as stream:
            for _ in range(DISK_BYTES // DISK_BLOCK):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            took_s = time.perf_counter() - began_s
            syncs = []
            for _ in range(SYNCS):
                began_s = time.perf_counter()
                stream.write(block[:4096])
                stream.flush()
                os.fsync(stream.fileno())
                syncs.append(time.perf_counter() - began_s)
    except OSError as error:
        raise LocalError(f"{folder}: {error.strerror}; name a folder on the board's card with --folder, with 70 MB free") from error
    finally:
        file.unlink(missing_ok=True)
    rate = DISK_BYTES / 1e6 / took_s
    return {
        "write_mb_s": round(rate, 1),
        "sync_ms": round(1000 * statistics.median(syncs), 2),
        "worst_sync_ms": round(1000 * max(syncs), 2),
    }


def warm(trainer: Trainer, minutes: float, say: Callable[[str], None], root: Path = Path("/")) -> list[dict[str, Any]]:
    """Train without a pause; every few seconds the step's time beside temperature, throttling and frequency. Ctrl-C ends it early."""
    samples: list[dict[str, Any]] = []
    began_s = time.monotonic()
    steps = 20
    try:
        while (elapsed_s := time.monotonic() - began_s) < 60 * minutes:
            sample_s = time.monotonic()
            took_ms = step_ms(trainer, steps)
            heat, flags = temperature(root), throttling(root)
            sample = {"s": round(elapsed_s, 1), "step_ms": round(took_ms, 3), "temperature": heat.said, "throttling": flags.said}
            samples.append({**sample, "mhz": _mhz(root)})
            say(f"{elapsed_s / 60:4.1f} of {minutes:g} min: {took_ms:.2f} ms a step, {heat.said}; throttling: {flags.said}")
            steps = max(5, min(2000, int(steps * SAMPLE_S / max(time.monotonic() - sample_s, 1e-3))))
    except KeyboardInterrupt:
        say("ended early: what there is goes into the report")
    return samples


def check(folder: Path, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole report.

    Args:
        folder: on the disk that is to be measured.
        minutes: of the warm run; 0 leaves it out.
        say: takes a line of progress.

    Raises:
        LocalError: the disk cannot be written.
        PeerError: onnxruntime cannot run the program at all.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    report: dict[str, Any] = {"format": 1, "machine": _machine(cores)}
    one = Trainer(golden_programs())
    report["parity"] = parity(one)
    say(f"golden numbers: {'reached' if report['parity']['ok'] else 'MISSED'}, off by {report['parity']['parameters']:.1e}")
    report["step_ms"] = {"1": round(step_ms(one), 3)}
    if cores > 1:
        report["step_ms"][str(cores)] = round(step_ms(Trainer(golden_programs(), cores)), 3)
    said = "; ".join(f"{value:g} ms with {threads} threads" for threads, value in report["step_ms"].items())
    say(f"a step of the watch CNN, batch {BATCH}: {said.replace('1 threads', '1 thread')}")
    report["disk"] = {"device": _device_of(folder), **disk(folder)}
    say(f"disk: {report['disk']['write_mb_s']} MB/s, {report['disk']['sync_ms']} ms until 4 KiB are safe")
    found = run_checks(host_checks(folder))
    report["sensors"] = [{"check": finding.check, "state": finding.state, "said": finding.said} for finding in found]
    if minutes:
        report["warm"] = warm(one, minutes, say)
    report["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)
    return report


def _machine(cores: int) -> dict[str, Any]:
    model = _text(Path("/proc/device-tree/model")).strip("\0 \n")
    system = dict(line.split("=", 1) for line in _text(Path("/etc/os-release")).splitlines() if "=" in line)
    wanted = ("regrow", "numpy", "onnxruntime", "paho-mqtt", "msgspec", "psutil", "cryptography", "torch")
    packages = {}
    for found in distributions():
        try:
            packages[found.name.lower()] = found.version
        except (PackageNotFoundError, KeyError, AttributeError):  # a damaged installation
            continue
    return {
        "board": model or None,
        "system": system.get("PRETTY_NAME", "").strip('"') or None,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "cores": cores,
        "memory_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "jetpack": _text(Path("/etc/nv_tegra_release")).splitlines()[:1] or None,
        "packages": {name: packages[name] for name in wanted if name in packages},
    }


def _device_of(folder: Path) -> str | None:
    """The block device that a folder lies on, such as mmcblk0p2; None where the kernel does not say."""
    number = folder.stat().st_dev
    try:
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True).name
    except OSError:
        return None


def _mhz(root: Path) -> float | None:
    """The first core's frequency."""
    text = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").strip()
    return int(text) / 1000 if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
