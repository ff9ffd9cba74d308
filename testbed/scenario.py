"""From a few words to every device's links, latency, speed and hours: what the options of `regrow simulate` mean.

Lists (constant rates, slowdowns) are spread over the devices: the first entry is that of the first devices, and so on, in equal parts.
Folders of recordings go round: device i takes file i modulo their number, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from regrow.errors import LocalError, UsageError
from testbed.compute import Compute, read_steps
from testbed.conditions import PERCENT, heterogeneity, paper_links
from testbed.links import Constant, Latency, Link, WithOutages, read_trace

RATE_PERIOD_S = 10.0
TRACES = "trace:"  # how --links begins that names a folder of recordings
Pair = tuple[Link, Link]
_Value = TypeVar("_Value")


def spread(values: Sequence[_Value], clients: int) -> list[_Value]:
    """One value for each client, in equal parts and in their order.

    Raises:
        LocalError: there are more values than clients, so that some would mean nothing.
    """
    if len(values) > clients:
        raise UsageError(
            f"{len(values)} values for {clients} clients ({values[0]}, ...): give at most one for each, or take more --clients"
        )
    return [values[index * len(values) // clients] for index in range(clients)]


def link_pairs(text: str, clients: int, model_bytes: int, seed: int, outages: tuple[float, float] | None) -> list[Pair]:
    """(up, down) of every device.

    Args:
        text: one of the papers' classes; `UP,UP,...` or `UP/DOWN,...` in bit/s, down four times up where it is not said; or `trace:FOLDER`.
        model_bytes: of the full model as float32; the papers' classes are scaled to it.
        outages: mean seconds with and without a link.

    Raises:
        LocalError: none of these, or a trace that cannot be read.
    """
    if text in PERCENT:
        classes = heterogeneity(text, clients)
        pairs: Iterable[Pair] = (
            paper_links(f"device-{index}", density, model_bytes, seed=seed, period_s=RATE_PERIOD_S) for index, density in enumerate(classes)
        )
    elif text.startswith(TRACES):
        pairs = _traces(text.removeprefix(TRACES), clients)
    else:
        pairs = spread([_constant(text, part) for part in text.split(",")], clients)
    if outages is None:
        return list(pairs)
    up_s, down_s = outages
    return [
        (WithOutages(up, up_s, down_s, seed, f"{i}/up"), WithOutages(down, up_s, down_s, seed, f"{i}/down"))
        for i, (up, down) in enumerate(pairs)
    ]


def _constant(text: str, part: str) -> Pair:
    up, slash, down = part.partition("/")
    try:
        return Constant(float(up)), Constant(float(down) if slash else 4 * float(up))
    except ValueError as error:
        known = "high, medium, low, trace:FOLDER, or rates in bit/s, UP or UP/DOWN, such as 4000000/16000000,800000,200000"
        raise UsageError(f"links {text!r}: {part!r} is no rate; give {known}") from error
    except LocalError as error:
        raise UsageError(f"links {text!r}: {error}") from error


def _traces(folder: str, clients: int) -> list[Pair]:
    """NAME.csv for both directions, or NAME.up.csv and NAME.down.csv."""
    recordings: dict[str, dict[str, Path]] = {}
    for file in _csv_files(folder, "--links trace:", "seconds,bits_per_second"):
        name, _, direction = file.stem.rpartition(".")
        whole = direction not in ("up", "down") or not name
        recordings.setdefault(file.stem if whole else name, {})["both" if whole else direction] = file
    pairs: list[Pair] = []
    for name, files in recordings.items():
        if set(files) not in ({"both"}, {"up", "down"}):
            found = ", ".join(sorted(file.name for file in files.values()))
            raise UsageError(
                f"--links {TRACES}{folder}: {found}: give {name}.csv for both directions, or {name}.up.csv and {name}.down.csv"
            )
        traces = {direction: read_trace(file) for direction, file in files.items()}
        pairs.append((traces["both"], traces["both"]) if "both" in traces else (traces["up"], traces["down"]))
    return [pairs[index % len(pairs)] for index in range(clients)]


def _csv_files(folder: str, option: str, lines: str) -> list[Path]:
    path, cure = Path(folder), f"give a folder of .csv files with lines `{lines}`"
    if not folder.strip() or not path.is_dir():
        what = "it names no folder" if not folder.strip() else "this is a file" if path.exists() else "there is no such folder"
        raise UsageError(f"{option}{folder}: {what}; {cure}")
    files = sorted(path.glob("*.csv"))
    if not files:
        raise UsageError(f"{option}{folder}: no .csv file there; {cure}")
    return files


def latencies(base_jitter_s: tuple[float, float] | None, clients: int, seed: int) -> list[Latency | None]:
    """One-way delay of every device; None: the world's own."""
    if base_jitter_s is None:
        return [None] * clients
    base_s, jitter_s = base_jitter_s
    return [Latency(base_s, jitter_s, seed=seed, stream=f"device-{index}/latency") for index in range(clients)]


def speeds(
    names: Sequence[str],
    seed: int,
    *,
    step_s: float,
    steps_trace: Path | None,
    slowdowns: Sequence[float],
    sigma: float,
    by_density: tuple[tuple[float, float], ...],
) -> dict[str, Compute]:
    """How long each device trains.

    Args:
        step_s: of one step at full density; not used where `steps_trace` has recorded ones.
        steps_trace: folder of CSV files with a line `seconds` for each step.
        slowdowns: spread over the devices.
        sigma: of the logarithm of a job's jitter.
        by_density: as in Compute.

    Raises:
        LocalError: a number or a file that does not fit.
    """
    recorded: list[tuple[float, ...]] = [(step_s,)]
    if steps_trace is not None:
        recorded = [read_steps(file) for file in _csv_files(str(steps_trace), "--steps-trace ", "seconds_per_step")]
    factors = spread(slowdowns, len(names))
    return {
        name: Compute(recorded[index % len(recorded)], factors[index], by_density, sigma, seed, name) for index, name in enumerate(names)
    }
