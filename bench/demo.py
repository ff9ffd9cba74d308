"""How good is the demo, over brokers and seeds? Every run counts, none is left out.

    python bench/demo.py

A seed and broker whose run lies in the folder already is not run again. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import tomllib
from machine import write_result

RESULT = Path(__file__).parent / "results" / "demo.json"
COPIED = ("accuracy", "accuracy_central", "seconds", "aggregations", "fleet_examples", "bytes_up", "bytes_down", "bytes_if_full_models")


def finished(runs: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(broker, seed) -> summary of every finished demo below `runs`."""
    found = {}
    for path in sorted(runs.glob("demo-*/summary.json")):
        summary = json.loads(path.read_text())
        seed = tomllib.loads((path.parent / "task" / "task.toml").read_text())["seed"]
        found[summary["broker"], seed] = summary
    return found


def line(seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What is committed of one run."""
    errors = [abs(device["measured_uplink_bps"] / device["link_bps"] - 1) for device in summary["devices"]]
    slowest = min(device["link_bps"] for device in summary["devices"])
    regrown = [(d["density_first"], d["density_last"]) for d in summary["devices"] if d["link_bps"] == slowest]
    return {
        "broker": summary["broker"],
        "seed": seed,
        **{key: summary[key] for key in COPIED},
        "worst_uplink_error": max(errors),
        "slowest_class_densities": regrown,
    }


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--brokers", nargs="+", default=["mosquitto", "amqtt"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs-demo"))
    options = parser.parse_args()
    for broker in options.brokers:
        for seed in options.seeds:
            if (broker, seed) not in finished(options.runs):
                arguments = ["demo", "--plain", "--broker", broker, "--seed", str(seed), "--runs", str(options.runs)]
                subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=True)
    lines = [line(seed, summary) for (_, seed), summary in finished(options.runs).items()]
    lines.sort(key=lambda entry: (entry["broker"], entry["seed"]))
    accuracies = [entry["accuracy"] for entry in lines]
    result = {
        "command": f"python bench/demo.py --brokers {' '.join(options.brokers)} --seeds {' '.join(map(str, options.seeds))}",
        "accuracy_mean": mean(accuracies),
        "accuracy_min": min(accuracies),
        "gap_to_central_mean": mean(entry["accuracy_central"] - entry["accuracy"] for entry in lines),
        "runs": lines,
    }
    write_result(RESULT, result)
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}))


if __name__ == "__main__":
    main()
