"""How close is the device's estimate of its uplink to the truth? On real links in network namespaces.

Needs root, and of Debian mosquitto, iproute2 and nftables.

    python bench/uplink.py --out bench/results/uplink.json        about 11 minutes

Steady rates from 250 kbit/s to 20 Mbit/s, without loss and with 2 % and 5 % of the packets dropped, changes of rate, and cuts of 10 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from machine import write_result

from testbed.uplink_trials import Step, Trial, run

RATES_BPS = (250e3, 1e6, 5e6, 20e6)
STEADY_S, CHANGE_S, CUT_S = 20.0, 16.0, 10.0
WITHIN_STEADY, WITHIN_10_S = 0.05, 0.20


def trials() -> list[Trial]:
    """Every trial, the short names first."""
    steady = [
        Trial(f"{rate / 1e3:.0f} kbit/s, loss {loss:.0%}, {congestion}", [Step(STEADY_S, rate)], loss, congestion)
        for congestion, losses in (("cubic", (0.0, 0.02, 0.05)), ("bbr", (0.05,)))
        for loss in losses
        for rate in RATES_BPS
    ]
    changes = [
        Trial("changes", [Step(CHANGE_S, rate) for rate in (20e6, 250e3, 5e6, 1e6, 2e6, 600e3, 20e6)]),
        Trial("changes, loss 2%", [Step(CHANGE_S, rate) for rate in (5e6, 500e3, 2e6)], 0.02),
        Trial("cuts", [Step(CHANGE_S, 2e6), Step(CUT_S, 0), Step(CHANGE_S, 2e6), Step(CUT_S, 0), Step(CHANGE_S, 2e6)]),
        Trial("cut and change", [Step(CHANGE_S, 5e6), Step(CUT_S, 0), Step(CHANGE_S, 500e3)]),
    ]
    return [*steady, *changes]


def main() -> int:
    """Run all, say each, and fail where a bound does not hold."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "uplink.json")
    options.add_argument("--only", default="", help="trials whose name contains this")
    chosen = options.parse_args()
    results = []
    worst = {"after_10_s": 0.0, "at_end": 0.0}
    for trial in trials():
        if chosen.only in trial.name:
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(trial, Path(folder)))
            for number, step in enumerate(results[-1]["steps"]):
                for when in worst:
                    # Ten seconds after a change; the first step of a trial is a start, not a change.
                    if when in step and (when == "at_end" or number):
                        worst[when] = max(worst[when], abs(step[when]["error"]))
                told = "; ".join(f"{when} {step[when]['error']:+.1%}" for when in worst if when in step) or "cut"
                print(f"{trial.name:36} {step['wire_bps'] / 1e3:8.0f} kbit/s  {told}", flush=True)
    print(f"largest error: {worst['at_end']:.1%} in steady state, {worst['after_10_s']:.1%} ten seconds after a change")
    write_result(chosen.out, {"largest_error": worst, "trials": results})
    return int(worst["at_end"] > WITHIN_STEADY or worst["after_10_s"] > WITHIN_10_S)


if __name__ == "__main__":
    sys.exit(main())
