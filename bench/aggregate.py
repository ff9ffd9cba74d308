"""How long does BuffMaskFedAvg take against copying the same values once, and against the papers' dense masks?

Ten clients at densities 1, 0.5, 0.2, 0.1 and six times 0.05 over 6.6 M parameters (LEAF CNN). The three are timed in
turn, so that a noisy neighbour hits all alike, and the medians are compared. Every one allocates its own result, as it
does in use; what is prepared beforehand (values, dense masks) is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result
from numpy.typing import NDArray

from regrow.aggregate import Update, mask_fed_avg

DENSITIES = (1.0, 0.5, 0.2, 0.1, *[0.05] * 6)
LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0)
Floats = NDArray[np.float32]


def dense_masks(previous: Floats, models: list[Floats], masks: list[Floats], weights: NDArray[np.float64]) -> Floats:
    """The papers' style: zero-filled float32 models and float32 masks, summed whole."""
    numerator = np.zeros_like(previous)
    divisor = np.zeros_like(previous)
    for model, mask, weight in zip(models, masks, weights.astype(np.float32), strict=True):
        numerator += weight * (model * mask)
        divisor += weight * mask
    covered = divisor > 0
    result = previous.copy()
    result[covered] = numerator[covered] / divisor[covered]
    return result


def timed_ms(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return (time.perf_counter() - start_s) * 1e3


def measure(parameters: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds of the three, interleaved."""
    rng = np.random.default_rng(0)
    lengths = [round(density * parameters) for density in LEVELS]
    segments = tuple(zip([0, *lengths[:-1]], lengths, strict=True))
    values = [rng.standard_normal(round(d * parameters), np.float32) for d in DENSITIES]
    updates = [Update(v) for v in values]
    weights = np.linspace(0.1, 1.0, len(values))
    previous = rng.standard_normal(parameters, np.float32)
    models = [np.concatenate([v, np.zeros(parameters - v.size, np.float32)]) for v in values]
    masks = [(np.arange(parameters) < v.size).astype(np.float32) for v in values]
    contenders: dict[str, Callable[[], Any]] = {
        "ours_ms": lambda: mask_fed_avg(previous, updates, weights, segments),
        "copy_ms": lambda: [v.copy() for v in values],
        "dense_ms": lambda: dense_masks(previous, models, masks, weights),
    }
    np.testing.assert_allclose(contenders["ours_ms"](), contenders["dense_ms"](), atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, work in contenders.items():
            times[name].append(timed_ms(work))
    return {name: round(statistics.median(samples), 3) for name, samples in times.items()}


def main() -> None:
    default = Path(__file__).resolve().parent / "results" / "aggregate.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=6_600_000, help="n (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=31, help="of each, interleaved (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=default, help="where the JSON goes (default: bench/results/aggregate.json)")
    args = parser.parse_args()
    figures = measure(args.parameters, args.repetitions)
    setting = {"parameters": args.parameters, "repetitions": args.repetitions, "densities": DENSITIES}
    write_result(args.out, {"setting": setting, **figures})
    print(f"ours / copy {figures['ours_ms'] / figures['copy_ms']:.2f}, dense / ours {figures['dense_ms'] / figures['ours_ms']:.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
