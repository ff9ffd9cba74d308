"""The options of `regrow measure power`, `baseline`, `pulse`, `align` and `fit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command, positive, rate_hz, runs_option


def declare(kinds: Commands) -> None:
    """Add them to the commands of `regrow measure`."""
    power = add_command(
        kinds,
        "power",
        "cli.measure_power:power",
        "show what this device draws now",
        "Watts, joules since the start, temperature, what slows the board, and what sampling costs; Ctrl-C ends it.",
    )
    meter_options(power)
    power.add_argument("--seconds", type=positive, metavar="N", help="end after so long (default: at Ctrl-C)")
    power.add_argument("--hz", type=rate_hz, default=10.0, metavar="N", help="samples a second, at most what the meter has")
    power.add_argument("--json", action="store_true", help="an object a second, each on its line")
    baseline = add_command(
        kinds,
        "baseline",
        "cli.measure_power:baseline",
        "measure what this board draws when it does nothing, and keep it",
        "Stop the agent and other programs first. The result goes into the board's file, where the agent finds it.",
    )
    meter_options(baseline, written=True)
    baseline.add_argument("--seconds", type=positive, default=60.0, metavar="N", help="how long, 60 at least")
    _declare_pulse(kinds)
    _declare_fit(kinds)


def _declare_pulse(kinds: Commands) -> None:
    pulse = add_command(
        kinds,
        "pulse",
        "cli.measure_power:pulse",
        "load every core in a pattern that an external meter's trace shows",
        "Takes 6.5 s, on a device that does nothing else, and prints when it began, for `regrow measure align`.",
    )
    pulse.add_argument("--json", action="store_true", help="one object: began_s, in unix seconds")
    align = add_command(
        kinds,
        "align",
        "cli.measure_power:align",
        "find the sync pulse in an external meter's trace",
        "Prints the offset of the meter's clock: subtract it from the trace's times to get the device's.",
    )
    align.add_argument("trace", type=Path, metavar="TRACE.csv", help="lines `seconds,watts` of the meter's clock; a head line is skipped")
    align.add_argument("--pulse-s", type=positive, required=True, metavar="S", help="when the pulse began by the device's clock")
    align.add_argument("--json", action="store_true", help="one object: offset_s, began_s, match, rise_w")


def _declare_fit(kinds: Commands) -> None:
    fit = add_command(
        kinds,
        "fit",
        "cli.measure_power:fit",
        "make a power model of a board type from its measured devices",
        "Reads the phases that the gateway has observed of at least three devices with meters; `regrow agent --power-model` uses the "
        "result on devices of that board that have none.",
    )
    fit.add_argument("--board", required=True, metavar="NAME", help="the board type, as `regrow measure power --json` says it on one")
    fit.add_argument("--device", action="append", metavar="NAME", help="a measured device of this board; again for each (default: all)")
    fit.add_argument("--kind", metavar="METER", help="only rows of this kind of meter, ina219 for example, where there are several")
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model, JSON")
    runs_option(fit)


def meter_options(command: argparse.ArgumentParser, *, written: bool = False) -> None:
    """Add --meter and --calibration."""
    forms = "auto, none, ina3221, hwmon[:NAME], i2c:BUS:ADDRESS:CHIP[:OHM], pmic, battery, rapl, serial:DEVICE[:BAUD]"
    more = "" if written else " or mqtt:TOPIC (agent only)"
    command.add_argument("--meter", default="auto", metavar="KIND", help=f"what measures power: {forms}{more}")
    file = "the board's file: calibration of its meters, and idle baselines"
    default = Path("energy.json") if written else None
    command.add_argument("--calibration", type=Path, default=default, metavar="FILE", help=f"{file}; made if need be" if written else file)
