"""The options that `regrow simulate` and `regrow compare` share, as a specification."""

from __future__ import annotations

import argparse
import math

from msgspec import UNSET

from regrow.errors import LocalError
from testbed.grid import parse_settings
from testbed.outcome import Spec


def spec_of(options: argparse.Namespace) -> Spec:
    """What the options describe, without a method.

    Raises:
        LocalError: one of them is malformed, with the cure.
    """
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
        step_s=options.step_s,
        slowdown=slowdowns[0] if len(slowdowns) == 1 else slowdowns,
        seconds=options.seconds,
        points=options.points,
        validation=UNSET if options.validation is None else options.validation,
        trainer=options.trainer,
        latency=UNSET if options.latency is None else _latency(options.latency),
        steps_trace=UNSET if options.steps_trace is None else str(options.steps_trace),
        step_sigma=UNSET if options.step_sigma is None else options.step_sigma,
        step_by_density=UNSET if options.step_by_density is None else _by_density(options.step_by_density),
        attend=UNSET if options.attend is None else options.attend,
        memory=UNSET if options.memory_mb is None else _memory(options.memory_mb),
    )


def _outages(text: str) -> tuple[float, float]:
    cure = "mean seconds up and down, both above 0, for example 300,20"
    numbers = _numbers("--outages", text, cure)
    if len(numbers) != 2:
        raise LocalError(f"--outages {text!r}: give {cure}")
    return numbers[0], numbers[1]


def _latency(text: str) -> tuple[float, float]:
    cure = "seconds one way and, if it varies, the mean of the extra, for example 0.05,0.02"
    numbers = _numbers("--latency", text, cure, zero=True)
    if len(numbers) > 2:
        raise LocalError(f"--latency {text!r}: give {cure}")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0.0


def _memory(text: str) -> tuple[int, ...]:
    return tuple(int(1e6 * number) for number in _numbers("--memory-mb", text, "megabytes, each above 0, for example 64,512"))


def _by_density(text: str) -> tuple[tuple[float, float], ...]:
    cure = "DENSITY=TIME pairs, densities ascending in 0..1 and times relative to density 1, for example 0.05=0.2,1=1"
    pairs = []
    for part in text.split(","):
        density, _, factor = part.partition("=")
        (left, right) = _numbers("--step-by-density", f"{density},{factor}", cure, zero=True)
        pairs.append((left, right))
    densities = [density for density, _ in pairs]
    if densities != sorted(set(densities)) or densities[-1] > 1.0 or not all(factor > 0.0 for _, factor in pairs):
        raise LocalError(f"--step-by-density {text!r}: give {cure}")
    return tuple(pairs)


def _numbers(option: str, text: str, cure: str, *, zero: bool = False) -> tuple[float, ...]:
    """Finite numbers with commas between, above 0 or (`zero`) from 0 on."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise LocalError(f"{option} {text!r}: give {cure}") from error
    if not all(math.isfinite(number) and (number > 0.0 or (zero and number == 0.0)) for number in numbers):
        raise LocalError(f"{option} {text!r}: give {cure}")
    return numbers
