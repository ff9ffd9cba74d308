"""How much memory does training take on a device, and how far above it is what export/memory.py says?

    python bench/step_memory.py

For each model and level a process of its own: what its resident memory reaches while the agent's worker does three jobs (VmHWM), less what
it was before, with 400 validation examples and without any. The figures bind densities ([method] granularity = "unit") only from above.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import write_result

from edge_agent.data.source import DataSource
from edge_agent.worker import Worker
from export.memory import step_memory
from export.models import MODELS
from export.task import programs_of
from regrow.machine import Train, Trained, TrainingFailed
from regrow.parameters import Layout
from regrow.step_memory import SCORED_AT_ONCE

RESULT = Path(__file__).parent / "results" / "step-memory.json"
DENSITIES = (0.05, 0.2, 1.0)
SHAPES = {"reduced_cnn": (1, 28, 28), "leaf_cnn": (1, 28, 28), "vgg11": (3, 32, 32), "resnet18_gn": (3, 32, 32)}
EXAMPLES = 800
BATCH = 20


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(folder: Path, shape: tuple[int, ...], level: int, validation: float, masked: bool) -> None:
    """Print what three jobs take; run in a fresh process that never held the exporter's own memory of this model."""
    programs = {file.name: file.read_bytes() for file in folder.iterdir()}
    layout = Layout.from_json(programs.get(f"layout:{level}", programs["layout"]))
    rng = np.random.default_rng(1)
    source = DataSource(EXAMPLES, validation_fraction=validation)
    source.append(rng.standard_normal((EXAMPLES, *shape)).astype(np.float32), rng.integers(0, 5, EXAMPLES))
    coordinates = np.arange(layout.size, dtype=np.uint32)
    if masked:
        coordinates = np.union1d(coordinates[::5], layout.always_kept_coordinates)
    values, length = np.full(coordinates.size, 0.01, np.float32), coordinates.size
    evaluate = {level: length} if validation else {}
    job = Train(1, level, programs, values, coordinates, length, evaluate, 5, BATCH, 0.01, 1)
    results: queue.SimpleQueue[Trained | TrainingFailed] = queue.SimpleQueue()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    base = status_bytes("VmRSS")
    worker = Worker(source, results.put)
    for _ in range(3):
        worker.put(job)
        result = results.get()
        if isinstance(result, TrainingFailed):
            raise SystemExit(result.reason)
    print(status_bytes("VmHWM") - base)


def rows_of(name: str, scratch: Path) -> list[dict[str, Any]]:
    """One row for each level of whole units, and one for the full model with masks."""
    rows = []
    for masked, programs in ((False, programs_of(MODELS[name](1), DENSITIES)), (True, programs_of(MODELS[name](1)))):
        folder = scratch / f"{name}-{masked}"
        folder.mkdir(parents=True, exist_ok=True)
        for part, data in programs.items():
            (folder / part).write_bytes(data)
        for level, need in enumerate(step_memory(programs).levels):
            row: dict[str, Any] = {"model": name, "density": "masks" if masked else DENSITIES[level]}
            for what, validation in (("with_validation", 0.5), ("without", 0.0)):
                arguments = [sys.executable, __file__, "--measure", str(folder), name, str(level), str(validation), str(int(masked))]
                taken = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
                stated = need.fixed + BATCH * need.trained + (SCORED_AT_ONCE * need.scored if validation else 0)
                row |= {f"taken_mb_{what}": taken / 1e6, f"stated_mb_{what}": stated / 1e6, f"ratio_{what}": stated / taken}
            print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Measure all models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reduced_cnn", "leaf_cnn", "vgg11"], choices=sorted(SHAPES))
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, name, level, validation, masked = options.measure
        measure(Path(folder), SHAPES[name], int(level), float(validation), bool(int(masked)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for name in options.models for row in rows_of(name, Path(scratch))]
    worst = [min(row[f"ratio_{what}"] for row in rows) for what in ("with_validation", "without")]
    most = [max(row[f"ratio_{what}"] for row in rows) for what in ("with_validation", "without")]
    write_result(RESULT, {"command": "python bench/step_memory.py", "least_ratio": min(worst), "largest_ratio": max(most), "rows": rows})
    print(json.dumps({"least_ratio": min(worst), "largest_ratio": max(most)}))


if __name__ == "__main__":
    main()
