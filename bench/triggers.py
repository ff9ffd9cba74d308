"""Does restoration by pace beat the papers' patience rule in time to target? Three settings, three seeds each, same splits and link draws.

    python bench/triggers.py

The task is that of bench/methods.py (run it first: its folder is used), at the learning rate that it chose for FedGMR. The target of a
setting is `regrow compare`'s default, 95 % of the better one's final accuracy; a speed-up is the ratio of the median times to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import prod
from pathlib import Path

from machine import write_result

from cli.main import main as regrow

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "high, dirichlet 0.3": ("high", "dirichlet:0.3"),
    "medium, dirichlet 0.3": ("medium", "dirichlet:0.3"),
    "high, iid": ("high", "iid"),
}
METHODS = ("fedgmr", "fedgmr-pace")
OPTIONS = "--seeds 3 --seconds 3000 --points 100 --validation 0.05 --journal-gb 0"
FLOAT32 = ["--set", 'wire.up="float32"', "--set", 'wire.down="float32"', "--set", "training.local_steps=5"]


def main() -> int:
    """Compare in every setting and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="that of bench/methods.py (default: %(default)s)")
    folder = parser.parse_args().folder
    rate = json.loads((RESULTS / "methods-fashion.json").read_text())["methods"]["fedgmr"]["tuned"]["training.learning_rate"]
    rows = []
    for name, (links, split) in SETTINGS.items():
        out = folder / f"triggers-{links}-{split.replace(':', '')}"
        scenario = ["--links", links, "--split", split, *OPTIONS.split(), *FLOAT32, "--set", f"training.learning_rate={rate}"]
        status = regrow(["compare", str(folder / "fashion"), "--methods", ",".join(METHODS), *scenario, "--out", str(out)])
        if status:
            return status
        summary = json.loads((out / "summary.json").read_text())
        found = summary["methods"]
        plateau_s, pace_s = (found[method]["seconds_to_target_median"] for method in METHODS)
        rows.append(
            {
                "setting": name,
                "target_accuracy": summary["target_accuracy"],
                "seconds_to_target_median": {"plateau": plateau_s, "pace": pace_s},
                "final_mean": {"plateau": found["fedgmr"]["final_mean"], "pace": found["fedgmr-pace"]["final_mean"]},
                "speedup": plateau_s / pace_s if plateau_s and pace_s else None,
            }
        )
    ratios = [row["speedup"] for row in rows]
    mean = prod(ratios) ** (1 / len(ratios)) if all(ratios) else None
    write_result(RESULTS / "triggers.json", {"command": "python bench/triggers.py", "rows": rows, "geometric_mean_speedup": mean})
    print(json.dumps(rows, indent=1), mean)
    return 0


if __name__ == "__main__":
    sys.exit(main())
