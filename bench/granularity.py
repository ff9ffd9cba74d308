"""Masks of single weights, or whole units: which trains further on the same bytes, and which on the same compute?

    python bench/granularity.py

FedGMR by pace, PR-FL and FIARSE with restoration, each with either granularity; reduced CNN on Fashion-MNIST, Dirichlet(0.3), float32 both
ways, ten devices, two seeds. First bound by the links (high heterogeneity, a step of 10 ms), then by compute: every link carries the whole
model in 5.2 s, and a training step takes from 1.5 s to 30 s. A step with masks costs what the full one does, of whole units what its share
of the multiply-adds is. Each method has the learning rate that bench/methods.py chose.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from machine import write_result
from msgspec.structs import replace
from studies import BASE, FLOAT32, FOLDER, RESULTS, command, outcomes_of, report, task_folder, tuned_rate, with_settings

from broker_server.runs import load_task
from testbed.comparison import default_target
from testbed.conditions import full_density_bps

METHODS = ("fedgmr-pace", "prfl", "fiarse+restore")
SECONDS = 1800.0
STEP_S = 1.5
SLOWDOWNS = (1.0, 2.0, 5.0, 10.0, 20.0)
KEYS = ("final_mean", "final_std", "reached", "seconds_to_target_median", "bytes_to_target_median", "compute_s_to_target_median")


def main() -> int:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    task = task_folder()
    full_bps = full_density_bps(4 * load_task(task).layout.size)
    base = with_settings(replace(BASE, seconds=SECONDS), {**FLOAT32, "training.local_steps": 5})
    scenarios = {
        "links": base,
        "compute": replace(base, links=f"{full_bps:g}", step_s=STEP_S, slowdown=SLOWDOWNS),
    }
    found: dict[str, Any] = {}
    for name, spec in scenarios.items():
        rows = {}
        for method in METHODS:
            tuned = with_settings(spec, {"training.learning_rate": tuned_rate(method)})
            rows[method] = replace(tuned, method=method)
            rows[f"{method}, units"] = replace(with_settings(tuned, {"method.granularity": "unit"}), method=method)
        out = FOLDER / f"granularity-{name}"
        outcomes = outcomes_of(task, rows, options.seeds, out)
        target = default_target(outcomes)
        methods = report(outcomes, target, METHODS[0], out)["methods"]
        found[name] = {"target_accuracy": target, "rows": {row: {key: methods[row][key] for key in KEYS} for row in rows}}
    write_result(RESULTS / "granularity.json", {"command": command(), "bound_by": found})
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
