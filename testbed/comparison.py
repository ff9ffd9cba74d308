"""What a comparison says in numbers, out of the runs' outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev

import msgspec

from regrow.intervals import half_interval
from testbed.outcome import Outcome, Point, seconds_of

Outcomes = Mapping[str, Sequence[Outcome]]
BASELINE = "fedasync"
TARGETS = 4
TARGET_STEP = 0.05


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """How one method gets to one target. A run that never does counts as such (`reached` of all seeds); medians are over all seeds, None
    where half of them never do. Bytes are up and down together; `compute_s` is what all devices have trained, None too where outcomes do
    not say. `speedup_over_fedasync` is None where either of the two never gets there or FedAsync was not run; where only FedAsync never
    does, `speedup_at_least` holds what its runs' ends allow to say."""

    reached: int
    seconds_to_target_median: float | None
    bytes_to_target_median: float | None
    compute_s_to_target_median: float | None = None
    speedup_over_fedasync: float | None
    speedup_at_least: float | None


class Row(Reached, frozen=True, kw_only=True):
    """One method over its seeds, all accuracies on test data but `worst_decile_mean`, which is on the devices' validation data.

    `difference` to the reference method: mean over the seeds that both have; intervals are half of a 95 % one (Student's t).
    `worst_class` has the least mean over seeds in `per_class_mean`; `worst_class_mean` is the mean over seeds of each run's worst.
    Updates per device are means over seeds of each run's least, median and most. `mean_density`, `minimum_coverage` and `mean_coverage` are
    over time, from when somebody had joined; coverage is the share of devices that train the least covered coordinate. One seed has no
    `final_std`."""

    final_mean: float
    final_std: float | None
    final_interval: float | None
    seeds: int
    worst_decile_mean: float
    worst_class_mean: float
    worst_class: int
    per_class_mean: list[float]
    aggregations_mean: float
    updates_mean: float
    updates_per_device_min: float
    updates_per_device_median: float
    updates_per_device_max: float
    rejected_mean: float
    mean_density: float
    minimum_coverage: float
    mean_coverage: float
    difference: float | None
    difference_interval: float | None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Means over seeds, point by point, and the range of the accuracy; bytes are up and down together."""

    seconds: list[float]
    megabytes: list[float]
    accuracy: list[float]
    lowest: list[float]
    highest: list[float]
    density: list[float]
    coverage: list[float]


def reach(points: Sequence[Point], target: float, what: Sequence[float]) -> float | None:
    """`what` at the first point of the curve with at least the target accuracy; None if there is none.

    Args:
        what: a number for each point.
    """
    return next((number for point, number in zip(points, what, strict=True) if point.accuracy >= target), None)


def seconds_to(run: Outcome, target: float) -> float | None:
    """Virtual seconds to the target accuracy."""
    return reach(run.points, target, seconds_of(run))


def rows_of(outcomes: Outcomes, target: float, reference: str) -> dict[str, Row]:
    """A row for each method, in the given order."""
    baseline = outcomes.get(baseline_of(outcomes) or "", [])
    return {
        method: _row(runs, reached_of(runs, baseline, target), [] if method == reference else _paired(runs, outcomes.get(reference, [])))
        for method, runs in outcomes.items()
    }


def _row(runs: Sequence[Outcome], reached: Reached, paired: Sequence[float]) -> Row:
    finals = [run.final_accuracy for run in runs]
    classes = [mean(accuracies) for accuracies in zip(*(run.per_class for run in runs), strict=True)]
    counts = [list(run.updates.values()) or [0] for run in runs]
    return Row(
        **msgspec.structs.asdict(reached),
        final_mean=mean(finals),
        final_std=stdev(finals) if len(finals) > 1 else None,
        final_interval=half_interval(finals),
        seeds=len(runs),
        worst_decile_mean=mean(run.worst_decile for run in runs),
        worst_class_mean=mean(min(run.per_class) for run in runs),
        worst_class=classes.index(min(classes)),
        per_class_mean=classes,
        aggregations_mean=mean(run.aggregations for run in runs),
        updates_mean=mean(sum(each) for each in counts),
        updates_per_device_min=mean(min(each) for each in counts),
        updates_per_device_median=mean(median(each) for each in counts),
        updates_per_device_max=mean(max(each) for each in counts),
        rejected_mean=mean(run.rejected for run in runs),
        mean_density=mean(mean(point.mean_density for point in peopled(run)) for run in runs),
        minimum_coverage=mean(min(point.coverage for point in peopled(run)) for run in runs),
        mean_coverage=mean(mean(point.coverage for point in peopled(run)) for run in runs),
        difference=mean(paired) if paired else None,
        difference_interval=half_interval(paired),
    )


def reached_of(runs: Sequence[Outcome], baseline: Sequence[Outcome], target: float) -> Reached:
    """How these runs get to the target, beside FedAsync's."""
    seconds = _median([seconds_to(run, target) for run in runs])
    base = _median([seconds_to(run, target) for run in baseline])
    # A run that never got there took longer than it lasted, so the median with its length in this place is a lower bound.
    at_least = median([seconds_to(run, target) or seconds_of(run)[-1] for run in baseline]) if baseline else None
    compute_s = None
    if all(map(_timed, runs)):
        compute_s = _median([reach(run.points, target, [_compute(point) for point in run.points]) for run in runs])
    return Reached(
        reached=sum(seconds_to(run, target) is not None for run in runs),
        seconds_to_target_median=seconds,
        bytes_to_target_median=_median([reach(run.points, target, [_bytes(point) for point in run.points]) for run in runs]),
        compute_s_to_target_median=compute_s,
        speedup_over_fedasync=base / seconds if base is not None and seconds else None,
        speedup_at_least=at_least / seconds if base is None and at_least is not None and seconds else None,
    )


def baseline_of(outcomes: Outcomes) -> str | None:
    """FedAsync's row: the one without settings of the grid, or else the first of them; None where FedAsync was not run."""
    if BASELINE in outcomes:
        return BASELINE
    return next((name for name in outcomes if name.startswith(f"{BASELINE}[")), None)


def default_target(outcomes: Outcomes) -> float:
    """95 % of the best method's mean final accuracy, in steps of one point."""
    return math.floor(95 * _best(outcomes)) / 100


def targets_of(outcomes: Outcomes, target: float) -> list[float]:
    """The last multiples of five points up to the best method's mean final accuracy, and the comparison's own target, ascending."""
    highest = math.floor(_best(outcomes) / TARGET_STEP + 1e-9)
    steps = {round(TARGET_STEP * step, 2) for step in range(max(highest - TARGETS + 1, 1), highest + 1)}
    return sorted(steps | {target})


def curve_of(runs: Sequence[Outcome]) -> Curve:
    """The mean curve; as long as the shortest of them."""
    columns = list(zip(*(run.points for run in runs), strict=False))
    return Curve(
        seconds=[mean(column) for column in zip(*(seconds_of(run) for run in runs), strict=False)],
        megabytes=[mean(map(_bytes, column)) / 1e6 for column in columns],
        accuracy=[mean(point.accuracy for point in column) for column in columns],
        lowest=[min(point.accuracy for point in column) for column in columns],
        highest=[max(point.accuracy for point in column) for column in columns],
        density=[mean(point.mean_density for point in column) for column in columns],
        coverage=[mean(point.coverage for point in column) for column in columns],
    )


def _best(outcomes: Outcomes) -> float:
    return max(mean(run.final_accuracy for run in runs) for runs in outcomes.values())


def peopled(run: Outcome) -> Sequence[Point]:
    """The points at which somebody had joined; all of them where nobody ever did."""
    return [point for point in run.points if point.mean_density > 0] or run.points


def _bytes(point: Point) -> float:
    return float(point.bytes_up + point.bytes_down)


def _compute(point: Point) -> float:
    return point.compute_s


def _timed(run: Outcome) -> bool:
    return run.points[-1].compute_s > 0.0


def _median(values: Sequence[float | None]) -> float | None:
    """The median with None as infinity; None where it would be infinite."""
    if not values:
        return None
    middle = median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None


def _paired(runs: Sequence[Outcome], others: Sequence[Outcome]) -> list[float]:
    by_seed = {other.spec.seed: other.final_accuracy for other in others}
    return [run.final_accuracy - by_seed[run.spec.seed] for run in runs if run.spec.seed in by_seed]
