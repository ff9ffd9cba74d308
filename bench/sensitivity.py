"""Which settings of FedGMR matter? One at a time away from the defaults, on two data sets.

    python bench/sensitivity.py

Patience p, ladder step, rho_min (the ladder's first rung), refresh interval k_rest, K and tau_max; FedGMR with the papers' patience rule,
ten clients, high heterogeneity, float32 both ways, two seeds: reduced CNN on Fashion-MNIST, Dirichlet(0.3), as bench/methods.py, and the
watch CNN on the smartwatch data by natural user.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from machine import write_result
from msgspec.structs import replace
from studies import BASE, FLOAT32, FOLDER, RESULTS, command, outcomes_of, report, task_folder, tuned_rate, with_settings

from testbed.comparison import default_target
from testbed.outcome import Spec

SECONDS = 1200.0
WITHOUT = (0.05, 0.1, 0.2, 0.5, 1.0)
SWEEP: dict[str, dict[str, dict[str, Any]]] = {
    "patience": {str(value): {"restoration.patience": value} for value in (2, 10, 20)},
    "ladder step": {
        **{f"+{value:g}": {"restoration.step": "fixed", "restoration.delta_density": value} for value in (0.1, 0.4)},
        "straight to 1": {"restoration.step": "fixed", "restoration.delta_density": 1.0},
    },
    "rho_min": {str(WITHOUT[start]): {"method.ladder": list(WITHOUT[start:])} for start in (1, 2)},
    "refresh interval": {str(value): {"method.refresh_every": value} for value in (5, 100)},
    "K": {str(value): {"trigger.count": value} for value in (3, 6)},
    "tau_max": {str(value): {"method.max_staleness": value} for value in (5, 20)},
}
DEFAULTS = {"patience": "5", "ladder step": "next rung", "rho_min": "0.05", "refresh interval": "25", "K": "1", "tau_max": "off"}


def main() -> int:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    fashion = with_settings(BASE, {**FLOAT32, "training.local_steps": 5, "training.learning_rate": tuned_rate("fedgmr")})
    watch = with_settings(replace(BASE, data="watch", split="user"), FLOAT32)
    studies = (("fashion", "reduced_cnn", fashion), ("watch", "watch_cnn", watch))
    found = {data: _study(data, model, replace(base, seconds=SECONDS, method="fedgmr"), options.seeds) for data, model, base in studies}
    write_result(RESULTS / "sensitivity.json", {"command": command(), "defaults": DEFAULTS, "data": found})
    print(json.dumps(found, indent=1))
    return 0


def _study(data: str, model: str, base: Spec, seeds: int) -> dict[str, Any]:
    """Every value of every setting beside the defaults, by final accuracy and by time to a target."""
    rows = {"default": base}
    for setting, values in SWEEP.items():
        rows |= {f"{setting} {value}": with_settings(base, settings) for value, settings in values.items()}
    out = FOLDER / f"sensitivity-{data}"
    outcomes = outcomes_of(task_folder(data, model), rows, seeds, out)
    target = default_target(outcomes)
    keys = ("final_mean", "final_std", "seconds_to_target_median", "bytes_to_target_median", "reached", "difference", "difference_interval")
    methods = report(outcomes, target, "default", out)["methods"]
    return {"target_accuracy": target, "rows": {row: {key: methods[row][key] for key in keys} for row in rows}}


if __name__ == "__main__":
    sys.exit(main())
