"""What does a smaller model save on the device? Time of one SGD step by density: whole units against masks of single weights.

    python bench/units.py

Levels take turns, step by step, so that a busy machine slows all of them alike; the figures are medians relative to the full model's step
without masks. Units (heterofl, fjord, fedrolex, and `granularity = "unit"`): the level's own smaller program. Weights: the full program
with masks. Values are those of the model's initial weights, batches are random numbers.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import write_result

from edge_agent.trainer import Trainer
from export.models import MODELS
from export.programs import initial_vector
from export.task import programs_of
from export.work import relative_work
from regrow.parameters import Layout

RESULT = Path(__file__).parent / "results" / "units.json"
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
SHAPES = {"watch_cnn": (6, 100), "reduced_cnn": (1, 28, 28), "leaf_cnn": (1, 28, 28)}


def rows_of(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each density of one model."""
    model = MODELS[name](1)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((batch, *SHAPES[name])).astype(np.float32), rng.integers(0, 7, batch)
    programs = programs_of(model, DENSITIES)
    weights = programs_of(model)
    trainers: dict[tuple[str, float], tuple[Trainer, Any, Any]] = {}
    for level, density in enumerate(DENSITIES[:-1]):
        own = Trainer({part: programs[f"{part}:{level}"] for part in ("layout", "train")})
        trainers["units", density] = own, np.full(own.layout.size, 0.01, np.float32), None
        masked, layout = Trainer(weights), Layout.from_json(weights["layout"])
        kept = np.zeros(layout.size, np.bool_)
        kept[rng.permutation(layout.size)[: int(density * layout.size)]] = True
        kept[layout.always_kept_coordinates] = True
        trainers["weights", density] = masked, initial_vector(model), kept
    trainers["units", 1.0] = trainers["weights", 1.0] = Trainer(weights), initial_vector(model), None
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in trainers}
    for _ in range(rounds):
        for key, (trainer, vector, kept) in trainers.items():
            started = time.perf_counter()
            trainer.train(vector, kept, [(x, y)], 0.01)
            seconds[key].append(time.perf_counter() - started)
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
        }
        for density in DENSITIES
    ]


def main() -> None:
    """Measure all models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=20, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each (default: %(default)s)")
    options = parser.parse_args()
    rows = [row for name in SHAPES for row in rows_of(name, options.batch, options.rounds)]
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    write_result(RESULT, {"command": "python bench/units.py", "rows": rows})


if __name__ == "__main__":
    main()
