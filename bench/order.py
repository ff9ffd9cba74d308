"""How small do index sets get, and how long do coding and decoding take, for 6.6 M coordinates in 5 and in 64 levels?

Sets are those of a random importance, which is the worst there is: nothing but the entropy n H(level sizes) / 8 can be
saved. `build_s` is making the order itself, with a per-layer floor. Medians of several runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from machine import write_result

from regrow.indexset import decode_prefix, encode_levels
from regrow.order import Order, build_order
from regrow.parameters import Layout, Tensor

LADDERS = {"5": (0.05, 0.1, 0.2, 0.5, 1.0), "64": tuple(step / 64 for step in range(1, 65))}


def entropy_bytes(order: Order) -> float:
    """n H(level sizes) / 8 over the coordinates that are not always kept."""
    sizes = [stop - start for start, stop in pairwise((order.always_kept, *order.lengths)) if stop > start]
    return sum(-size * math.log2(size / sum(sizes)) for size in sizes) / 8


def measure(parameters: int, densities: tuple[float, ...], repetitions: int) -> dict[str, float]:
    """Seconds for building, coding and decoding, and the size against the entropy."""
    layout = Layout((Tensor("weight", (parameters - 3000,)), Tensor("bias", (3000,), True)))
    importance = np.abs(np.random.default_rng(0).standard_normal(parameters, np.float32))
    times: dict[str, list[float]] = {"build_s": [], "encode_s": [], "decode_s": []}
    for _ in range(repetitions):
        marks = [time.perf_counter()]
        order = build_order(layout, importance, densities, epoch=0, floor=0.01, magnitude=importance)
        marks.append(time.perf_counter())
        payloads = encode_levels(order)
        marks.append(time.perf_counter())
        decoded = decode_prefix(parameters, layout.always_kept_coordinates, order.lengths, payloads)
        marks.append(time.perf_counter())
        np.testing.assert_array_equal(decoded, order.coordinates)
        for name, (start, stop) in zip(times, pairwise(marks), strict=True):
            times[name].append(stop - start)
    size = sum(map(len, payloads))
    figures: dict[str, float] = {name: round(statistics.median(samples), 4) for name, samples in times.items()}
    return {**figures, "bytes": size, "ratio_to_entropy": round(size / entropy_bytes(order), 4)}


def main() -> None:
    default = Path(__file__).resolve().parent / "results" / "order.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=6_600_000, help="n (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=default, help="where the JSON goes (default: bench/results/order.json)")
    args = parser.parse_args()
    levels = {name: measure(args.parameters, ladder, args.repetitions) for name, ladder in LADDERS.items()}
    setting = {"parameters": args.parameters, "repetitions": args.repetitions}
    write_result(args.out, {"setting": setting, "levels": levels})
    print(json.dumps(levels))


if __name__ == "__main__":
    main()
