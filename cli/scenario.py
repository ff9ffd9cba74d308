"""The options that `regrow simulate` and `regrow compare` share, as a specification."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import tomllib
from msgspec import UNSET

from broker_server.runs import TaskFolder
from regrow.errors import UsageError
from testbed.grid import parse_settings
from testbed.outcome import Spec

STEP_S = 0.01  # where neither --step-s nor --steps-trace says anything


def say_replaced(folder: TaskFolder) -> None:
    """What a method by name takes the place of, where the task has keys of its own there."""
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    keys = [f"[{section}] {key}" for section in ("method", "trigger", "restoration") for key in tables.get(section, {}) if key != "name"]
    if keys:
        words = (
            f"a method by name replaces {', '.join(keys)} of task.toml; say it with --set, or leave --method out to run the task as it is"
        )
        print(f"regrow: {words}", file=sys.stderr)


def check_out(out: Path) -> None:
    """Refuse a file where --out should be a folder.

    Raises:
        LocalError: it is one, or lies below one.
    """
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"--out {out}: {place} is a file; name a folder")


def spec_of(options: argparse.Namespace) -> Spec:
    """What the options describe, without a method.

    Raises:
        LocalError: one of them is malformed, with the cure.
    """
    if options.step_s is not None and options.steps_trace is not None:
        raise UsageError("--step-s and --steps-trace both say how long a step takes; give one of them (--slowdown scales either)")
    slowdowns = _numbers("--slowdown", options.slowdown, "how many times slower devices are, each above 0, for example 1,1,4")
    return Spec(
        settings=parse_settings(options.set),
        seed=options.seed,
        data=options.data,
        data_folder=None if options.data_folder is None else str(options.data_folder),
        split=options.split,
        clients=options.clients,
        links=options.links,
        outages=None if options.outages is None else _outages(options.outages),
        step_s=STEP_S if options.step_s is None else options.step_s,
        slowdown=slowdowns[0] if len(slowdowns) == 1 else slowdowns,
        seconds=options.seconds,
        points=options.points,
        validation=UNSET if options.validation is None else options.validation,
        trainer=options.trainer,
        latency=UNSET if options.latency is None else _latency(options.latency),
        steps_trace=UNSET if options.steps_trace is None else str(options.steps_trace),
        step_sigma=options.step_sigma or UNSET,
        step_by_density=UNSET if options.step_by_density is None else _by_density(options.step_by_density),
        attend=UNSET if options.attend is None else options.attend,
        memory=UNSET if options.memory_mb is None else _memory(options.memory_mb),
    )


def _outages(text: str) -> tuple[float, float]:
    cure = "mean seconds with and without a link, each from 0.01 to 1e9, for example 300,20"
    numbers = _numbers("--outages", text, cure)
    if len(numbers) != 2 or not all(0.01 <= number <= 1e9 for number in numbers):  # shorter ones would be too many to count
        raise UsageError(f"--outages {text!r}: give {cure}")
    return numbers[0], numbers[1]


def _latency(text: str) -> tuple[float, float]:
    cure = "seconds one way and, if it varies, the mean of the extra, for example 0.05,0.02"
    numbers = _numbers("--latency", text, cure, zero=True)
    if len(numbers) > 2:
        raise UsageError(f"--latency {text!r}: give {cure}")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0.0


def _memory(text: str) -> tuple[int, ...]:
    cure = "megabytes, each above 0 and up to 9e9, for example 64,512"
    numbers = _numbers("--memory-mb", text, cure)
    if max(numbers) > 9e9:  # a hello says at most 2^53 bytes
        raise UsageError(f"--memory-mb {text!r}: give {cure}")
    return tuple(int(1e6 * number) for number in numbers)


def _by_density(text: str) -> tuple[tuple[float, float], ...]:
    cure = "DENSITY=TIME pairs, densities ascending, above 0 and up to 1, and times relative to density 1, for example 0.05=0.2,1=1"
    wrong = UsageError(f"--step-by-density {text!r}: give {cure}")
    halves = [part.split("=") for part in text.split(",")]
    if any(len(half) != 2 for half in halves):
        raise wrong
    try:
        pairs = tuple((float(density), float(factor)) for density, factor in halves)
    except ValueError as error:
        raise wrong from error
    densities = [density for density, _ in pairs]
    if densities != sorted(set(densities)) or not all(0.0 < density <= 1.0 and 0.0 < factor < math.inf for density, factor in pairs):
        raise wrong
    return pairs


def _numbers(option: str, text: str, cure: str, *, zero: bool = False) -> tuple[float, ...]:
    """Finite numbers with commas between, above 0 or (`zero`) from 0 on."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: give {cure}") from error
    if not all(math.isfinite(number) and (number > 0.0 or (zero and number == 0.0)) for number in numbers):
        raise UsageError(f"{option} {text!r}: give {cure}")
    return numbers
