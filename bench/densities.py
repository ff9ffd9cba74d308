"""Which fixed density is the fastest, and until which accuracy? The feasibility study of PR-FL and FedGMR.

    python bench/densities.py

Ten equal devices train the same fixed part of the reduced CNN on Fashion-MNIST, Dirichlet(0.3), float32 both ways, three seeds, without
restoration; for every interval of accuracy the density that crosses it in the least time. Their links carry the whole model in 130 s, a
little less than those of the slowest class of the papers. While a part is all that anybody trains, that part is the model, and it is what
is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from statistics import median
from typing import Any

from machine import write_result
from msgspec.structs import replace
from studies import BASE, FLOAT32, FOLDER, RESULTS, command, outcomes_of, report, task_folder, tuned_rate, with_settings

from broker_server.runs import load_task
from testbed.comparison import seconds_to
from testbed.conditions import full_density_bps
from testbed.outcome import Outcome

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
EDGES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
LINK = 0.04  # of the link that carries the model in 5.2 s
SECONDS = 1800.0


def main() -> int:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    task, out = task_folder(), FOLDER / "densities"
    link_bps = LINK * full_density_bps(4 * load_task(task).layout.size)
    base = with_settings(BASE, {**FLOAT32, "training.local_steps": 5, "training.learning_rate": tuned_rate("fedgmr-pace")})
    base = replace(base, method="fedgmr-no-restore", links=f"{link_bps:g}", seconds=SECONDS)
    rows = {
        f"density {density:g}": with_settings(
            base,
            {"method.ladder": sorted({density, 1.0}), "method.full_density_bps": link_bps / density, "restoration.full_model_every": 0},
        )
        for density in DENSITIES
    }
    outcomes = outcomes_of(task, rows, options.seeds, out)
    report(outcomes, EDGES[-1], "density 1", out)
    finals = {row: median(run.final_accuracy for run in runs) for row, runs in outcomes.items()}
    result = {"command": command(), "link_bps": link_bps, "final_median": finals, "intervals": _intervals(outcomes)}
    write_result(RESULTS / "densities.json", result)
    print(json.dumps(result, indent=1))
    return 0


def _intervals(outcomes: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """For each interval of accuracy the median seconds that every density takes to cross it; None where most runs never do."""
    found = []
    for low, high in pairwise((0.0, *EDGES)):
        seconds = {row: median([_crossing_s(run, low, high) for run in runs]) for row, runs in outcomes.items()}
        known = {row: value for row, value in seconds.items() if value != float("inf")}
        found.append(
            {
                "from": low,
                "to": high,
                "seconds_median": {row: known.get(row) for row in seconds},
                "fastest": min(known, key=known.__getitem__) if known else None,
            }
        )
    return found


def _crossing_s(run: Outcome, low: float, high: float) -> float:
    """Seconds from the first point with one accuracy to the first with the other."""
    end = seconds_to(run, high)
    start = seconds_to(run, low) if low else 0.0
    return float("inf") if end is None or start is None else end - start


if __name__ == "__main__":
    sys.exit(main())
