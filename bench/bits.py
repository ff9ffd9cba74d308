"""Is the next byte of an update better spent on more coordinates or on more bits? Reduced CNN on Fashion-MNIST, three seeds, same links.

    python bench/bits.py

At equal bytes: a device has the same bytes for each of its updates, and they hold fewer values of more bits or more values of fewer bits.
Ample: what its class takes in float32 (rho = 0.05 to 1, high heterogeneity), so float32 trains rho, float16 2 rho, int8 4 rho and int4
7.5 rho, never more than the whole model. Scarce: what its class takes in int4, so int4 trains rho and float32 rho / 7.5. FedGMR without
restoration and with K = 1, so that nothing else differs; downloads are float16.

Then with restoration by pace: float32, int8, int4 and `auto`, which begins with int4 and takes int8 when a link has no more coordinates to
carry. The task is that of bench/methods.py (run it first), at the learning rate that it chose for fedgmr-pace.
"""

from __future__ import annotations

import argparse
import sys

from machine import write_result
from msgspec.structs import replace
from studies import BASE, FOLDER, RESULTS, command, outcomes_of, report, task_folder, tuned_rate, with_settings

from broker_server.runs import load_task
from testbed.conditions import DENSITIES, full_density_bps
from testbed.outcome import Spec

VALUES = {"float32": 1.0, "float16": 2.0, "int8": 4.0, "int4": 7.5}  # in the bytes of one float32 value
SECONDS = 1200.0
TARGET = 0.78  # that of bench/methods.py


def at_equal_bytes(base: Spec, full_bps: float, budget: float) -> dict[str, Spec]:
    """A row for each dtype: a link of class rho carries budget * rho of the model as float32."""
    rows = {}
    for dtype, times in VALUES.items():
        ladder = sorted({min(1.0, budget * times * rho) for rho in DENSITIES} | {1.0})
        settings = {"wire.up": dtype, "method.ladder": ladder, "method.full_density_bps": full_bps / (budget * times), "trigger.count": 1}
        rows[dtype] = replace(with_settings(base, settings), method="fedgmr-no-restore")
    return rows


def main() -> int:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    task, out = task_folder(), FOLDER / "bits"
    full_bps = full_density_bps(4 * load_task(task).layout.size)
    settings = {"training.local_steps": 5, "training.learning_rate": tuned_rate("fedgmr-pace"), "wire.down": "float16"}
    base = with_settings(replace(BASE, seconds=SECONDS), settings)
    rows = {f"ample: {name}": spec for name, spec in at_equal_bytes(base, full_bps, 1.0).items()}
    rows |= {f"scarce: {name}": spec for name, spec in at_equal_bytes(base, full_bps, 1.0 / VALUES["int4"]).items()}
    for dtype in ("float32", "int8", "int4", "auto"):
        rows[f"pace: {dtype}"] = replace(with_settings(base, {"wire.up": dtype}), method="fedgmr-pace")
    outcomes = outcomes_of(task, rows, options.seeds, out)
    summary = report(outcomes, TARGET, "pace: auto", out)
    write_result(RESULTS / "bits.json", {"command": command(), "target_accuracy": TARGET, "rows": summary["methods"]})
    print((out / "report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
