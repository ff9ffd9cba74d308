"""Whether this machine can train at all: onnxruntime, the processor's abilities, one real step of a tiny model, and what fits.

`python -m edge_agent.doctor.training` makes the step and prints JSON: in a process of its own, because a wheel for another processor ends
the process instead of raising.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.doctor.checks import Check, Tell
from regrow.findings import Finding

PROGRAMS = Path(__file__).with_name("step")
FEATURES, CLASSES, BATCH, STEPS, RATE, TOLERANCE = 4, 3, 8, 5, 0.5, 1e-4
STEP_S = 15.0
_CPU = {"avx2", "avx512f", "avx512_vnni", "amx_tile", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"}
_NAMES = ("onnxruntime", "training.step")


def training_checks(root: Path = Path("/")) -> list[Check]:
    """The processor, onnxruntime and a step."""
    return [Check(("cpu",), lambda tell: tell(processor(root))), Check(_NAMES, in_another_process, STEP_S)]


def processor(root: Path) -> Finding:
    """What the processor has of what onnxruntime's kernels choose by."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return Finding("cpu", "unknown", "/proc/cpuinfo cannot be read", "the unit must not hide it: ProcSubset=all")
    words = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE))))
    cores = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    if not words:
        return Finding("cpu", "unknown", f"{cores} cores; /proc/cpuinfo names no abilities")
    found = sorted(words & _CPU)
    if found:
        return Finding("cpu", "ok", f"{cores} cores with {', '.join(found)}")
    return Finding("cpu", "warn", f"{cores} cores without vector units that onnxruntime uses", "training will be slow here")


def in_another_process(tell: Tell) -> None:
    """Make the step in a process of its own."""
    command = [sys.executable, "-m", "edge_agent.doctor.training"]
    rooms = str(Path(__file__).resolve().parents[2])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_S - 1, check=False, stdin=subprocess.DEVNULL, cwd=rooms)
    except (OSError, subprocess.SubprocessError) as error:
        tell(Finding(_NAMES[0], "unknown", f"it could not be tried: {error}"))
        tell(Finding(_NAMES[1], "unknown", "it could not be tried"))
        return
    try:
        for fields in json.loads(done.stdout):
            tell(Finding(*fields))
    except (ValueError, TypeError):
        dead = f"died of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"ended with {done.returncode}"
        cure = "install the wheels of this processor and Python: 64-bit, and onnxruntime of constraints.txt"
        tell(Finding(_NAMES[0], "fail", f"the process {dead}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}", cure))
        tell(Finding(_NAMES[1], "fail", "no step was made", cure))


def here(tell: Tell) -> None:
    """Make the step in this process, which has loaded onnxruntime already."""
    for finding in _step():
        tell(finding)


def _step() -> list[Finding]:
    name = _NAMES[1]
    try:
        import onnxruntime

        from edge_agent.trainer import Trainer
    except ImportError as error:
        cure = "pip install onnxruntime; there are wheels for 64-bit systems only"
        return [Finding(_NAMES[0], "fail", f"cannot be imported: {error}", cure), Finding(name, "fail", "no step can be made", cure)]
    found = Finding(_NAMES[0], "ok", f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")
    programs = {file.name.removesuffix(".onnx").removesuffix(".json"): file.read_bytes() for file in sorted(PROGRAMS.iterdir())}
    trainer = Trainer(programs)
    x, y = example()
    start = np.zeros(trainer.layout.size, np.float32)
    began_s = time.perf_counter()
    result = trainer.train(start, None, [(x, y)] * STEPS, RATE)
    took_s = (time.perf_counter() - began_s) / STEPS
    wrong = float(np.abs(result.vector - expected(x, y)).max())
    if not wrong <= TOLERANCE:
        cure = "onnxruntime computes wrongly on this processor: try its other versions"
        return [found, Finding(name, "fail", f"a gradient step is wrong by {wrong:.2g}", cure)]
    return [found, Finding(name, "ok", f"{STEPS} steps are right to {wrong:.1g}, {1000 * took_s:.2f} ms each")]


def example() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """x float32 [BATCH, FEATURES] and y int64 [BATCH] of the step."""
    x = np.sin(np.arange(BATCH * FEATURES, dtype=np.float32)).reshape(BATCH, FEATURES)
    return x, np.arange(BATCH, dtype=np.int64) % CLASSES


def expected(x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same steps of softmax regression from zero, in NumPy: weights [CLASSES, FEATURES], then biases, float32 [n]."""
    weights, biases = np.zeros((CLASSES, FEATURES)), np.zeros(CLASSES)
    for _ in range(STEPS):
        scores = np.exp(x @ weights.T + biases)
        slope = (scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[y]) / len(x)
        weights, biases = weights - RATE * slope.T @ x, biases - RATE * slope.sum(0)
    return np.concatenate([weights.ravel(), biases]).astype(np.float32)


def model_fit(needs: Mapping[str, tuple[Sequence[int], Sequence[float]]], offered_bytes: int | None) -> Finding:
    """The largest level of every task that fits a device.

    Args:
        needs: by task: bytes of every level, and its density, ascending.
        offered_bytes: that the device gives to training; None: unknown.
    """
    name = "model.fit"
    needs = {task: of for task, of in needs.items() if any(of[0])}  # the exporter may not know what a model takes
    if not needs:
        return Finding(name, "unknown", "no task to compare with, or none whose need is known", "name its folder: --task")
    if offered_bytes is None:
        return Finding(name, "unknown", "it is not known what the device offers")
    fits = {task: max((d for need, d in zip(*of, strict=True) if need <= offered_bytes), default=0.0) for task, of in needs.items()}
    said = ", ".join(_fit_in_words(task, fits[task], *of) for task, of in needs.items())
    said = f"{said}; {offered_bytes / 1e6:.0f} MB are offered"
    if not all(fits.values()):
        return Finding(name, "fail", said, "offer more memory (--memory-mb), a smaller batch, or levels of whole units (granularity)")
    return Finding(name, "ok", said)


def _fit_in_words(task: str, fits: float, needs: Sequence[int], densities: Sequence[float]) -> str:
    return f"{task}: density {fits:g} of {max(densities):g} (needs {min(needs) / 1e6:.0f} to {max(needs) / 1e6:.0f} MB)"


if __name__ == "__main__":
    print(json.dumps([[finding.check, finding.state, finding.said, finding.cure] for finding in _step()]))
