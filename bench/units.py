"""What does a smaller model save on the device? Time and memory of an SGD step by density: whole units against masks of single weights.

    python bench/units.py
    python bench/units.py --models resnet18_gn --rounds 8     # only these; what is known of the others stays

Levels take turns, step by step, so that a busy machine slows all of them alike; the figures are medians of CPU time on one thread,
relative to the full model's step without masks. Units (heterofl, fjord, fedrolex, and `granularity = "unit"`): the level's own smaller
program. Weights: the full program with masks. Values are those of the model's initial weights, batches are random numbers. Memory: what a
process that has the program and the weights takes more (VmHWM) for five steps, one process for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import write_result
from numpy.typing import NDArray

from edge_agent.trainer import Trainer
from export.models import MODELS
from export.programs import initial_vector
from export.task import programs_of
from export.work import relative_work
from regrow.parameters import Layout

RESULT = Path(__file__).parent / "results" / "units.json"
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
SHAPES = {"watch_cnn": (6, 100), "reduced_cnn": (1, 28, 28), "leaf_cnn": (1, 28, 28), "resnet18_gn": (3, 32, 32)}
MEASURED_STEPS = 5


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(folder: Path, name: str, batch: int) -> None:
    """Print what training takes, in a fresh process. folder: `layout`, a training program, and `kept.npy` where it has masks."""
    trainer = Trainer({part: (folder / part).read_bytes() for part in ("layout", "train", "train_masked") if (folder / part).exists()})
    kept = np.load(folder / "kept.npy") if (folder / "kept.npy").exists() else None
    vector = np.full(trainer.layout.size, 0.01, np.float32)
    x, y = np.ones((batch, *SHAPES[name]), np.float32), np.zeros(batch, np.int64)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    base = status_bytes("VmRSS")
    trainer.train(vector, kept, [(x, y)] * MEASURED_STEPS, 0.01)
    print(status_bytes("VmHWM") - base)


def taken_mb(programs: Mapping[str, bytes], kept: NDArray[np.bool_] | None, name: str, batch: int) -> float:
    """What `measure` finds, in 10^6 bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        for part, data in programs.items():
            (Path(scratch) / part).write_bytes(data)
        if kept is not None:
            np.save(Path(scratch) / "kept.npy", kept)
        arguments = [sys.executable, __file__, "--batch", str(batch), "--measure", scratch, name]
        return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout) / 1e6


def rows_of(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each density of one model."""
    model = MODELS[name](1)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((batch, *SHAPES[name])).astype(np.float32), rng.integers(0, 7, batch)
    programs = programs_of(model, DENSITIES)
    weights = programs_of(model)
    trainers: dict[tuple[str, float], tuple[Trainer, Any, Any]] = {}
    memory: dict[tuple[str, float], float] = {}
    for level, density in enumerate(DENSITIES[:-1]):
        sliced = {part: programs[f"{part}:{level}"] for part in ("layout", "train")}
        own = Trainer(sliced)
        trainers["units", density] = own, np.full(own.layout.size, 0.01, np.float32), None
        masked, layout = Trainer(weights), Layout.from_json(weights["layout"])
        kept = np.zeros(layout.size, np.bool_)
        kept[rng.permutation(layout.size)[: int(density * layout.size)]] = True
        kept[layout.always_kept_coordinates] = True
        trainers["weights", density] = masked, initial_vector(model), kept
        memory["units", density] = taken_mb(sliced, None, name, batch)
        memory["weights", density] = taken_mb({part: weights[part] for part in ("layout", "train_masked")}, kept, name, batch)
    trainers["units", 1.0] = trainers["weights", 1.0] = Trainer(weights), initial_vector(model), None
    whole = taken_mb({part: weights[part] for part in ("layout", "train")}, None, name, batch)
    memory["units", 1.0] = memory["weights", 1.0] = whole
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in trainers}
    for _ in range(rounds):
        for key, (trainer, vector, kept) in trainers.items():
            started = time.process_time()
            trainer.train(vector, kept, [(x, y)], 0.01)
            seconds[key].append(time.process_time() - started)
    full_s = median(seconds["units", 1.0])
    work = dict(zip(DENSITIES, (share for _, share in relative_work(model, DENSITIES)), strict=True))
    return [
        {
            "model": name,
            "density": density,
            "parameters_units": trainers["units", density][0].layout.size,
            "units": median(seconds["units", density]) / full_s,
            "units_multiply_adds": work[density],
            "weights": median(seconds["weights", density]) / full_s,
            "units_mb": memory["units", density],
            "weights_mb": memory["weights", density],
        }
        for density in DENSITIES
    ]


def main() -> None:
    """Measure all models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=20, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="default: all")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1], options.batch)
        return
    rows = [row for name in options.models for row in rows_of(name, options.batch, options.rounds)]
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    rows = [*(row for row in known if row["model"] not in options.models), *rows]
    write_result(RESULT, {"command": "python bench/units.py", "rows": rows})


if __name__ == "__main__":
    main()
