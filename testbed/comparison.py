"""What a comparison says: tables and pictures out of the runs' outcomes."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import msgspec

from testbed.simulate import Outcome, Point

Outcomes = Mapping[str, Sequence[Outcome]]
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond these the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One method over its seeds. A run that never reaches the target counts as such (`reached` of `seeds`); medians are over all seeds,
    None where half of them never do. `difference` to the reference method: mean over seeds and half a 95 % interval (Student's t)."""

    final_mean: float
    final_std: float
    seeds: int
    reached: int
    seconds_to_target_median: float | None
    bytes_to_target_median: float | None
    speedup_over_fedasync: float | None
    worst_decile_mean: float
    worst_class_mean: float
    updates_mean: float
    mean_density: float
    minimum_coverage: float
    difference: float | None
    difference_interval: float | None


def reach(points: Sequence[Point], target: float, what: Callable[[Point], float]) -> float | None:
    """`what` at the first point of the curve with at least the target accuracy; None if there is none."""
    return next((what(point) for point in points if point.accuracy >= target), None)


def rows_of(outcomes: Outcomes, target: float, reference: str) -> dict[str, Row]:
    """A row for each method, in the given order."""
    base = _median([reach(run.points, target, _seconds) for run in outcomes.get("fedasync", [])])
    rows = {}
    for method, runs in outcomes.items():
        seconds = _median([reach(run.points, target, _seconds) for run in runs])
        finals = [run.final_accuracy for run in runs]
        paired = _paired(runs, outcomes.get(reference, []))
        rows[method] = Row(
            final_mean=mean(finals),
            final_std=stdev(finals) if len(finals) > 1 else 0.0,
            seeds=len(runs),
            reached=sum(reach(run.points, target, _seconds) is not None for run in runs),
            seconds_to_target_median=seconds,
            bytes_to_target_median=_median([reach(run.points, target, _bytes) for run in runs]),
            speedup_over_fedasync=base / seconds if base is not None and seconds else None,
            worst_decile_mean=mean(run.worst_decile for run in runs),
            worst_class_mean=mean(min(run.per_class) for run in runs),
            updates_mean=mean(sum(run.updates.values()) for run in runs),
            mean_density=mean(_mean_density(run) for run in runs),
            minimum_coverage=mean(min(point.coverage for point in run.points) for run in runs),
            difference=mean(paired) if paired and method != reference else None,
            difference_interval=_half_interval(paired) if method != reference else None,
        )
    return rows


def default_target(outcomes: Outcomes) -> float:
    """95 % of the best method's mean final accuracy, in steps of one point."""
    best = max(mean(run.final_accuracy for run in runs) for runs in outcomes.values())
    return math.floor(95 * best) / 100


def write_report(outcomes: Outcomes, out: Path, *, target: float, reference: str, command: str) -> dict[str, Any]:
    """Write report.html, curves.png and summary.json into `out`; returns the summary."""
    rows = rows_of(outcomes, target, reference)
    picture = draw(outcomes, target)
    (out / "curves.png").write_bytes(picture)
    (out / "report.html").write_text(_page(rows, picture, target, reference, command))
    summary = {"command": command, "target_accuracy": target, "reference": reference, "methods": msgspec.to_builtins(rows)}
    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
    return summary


def draw(outcomes: Outcomes, target: float) -> bytes:
    """Accuracy over virtual time and over bytes sent, mean density over time: a PNG, the mean over seeds and their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    colours = mpl.colormaps["tab20"]
    for number, (method, runs) in enumerate(outcomes.items()):
        colour = colours(number % 20)
        count = min(len(run.points) for run in runs)
        columns = [[run.points[i] for run in runs] for i in range(count)]
        seconds = [mean(map(_seconds, column)) for column in columns]
        megabytes = [mean(map(_bytes, column)) / 1e6 for column in columns]
        accuracy = [mean(point.accuracy for point in column) for column in columns]
        low = [min(point.accuracy for point in column) for column in columns]
        high = [max(point.accuracy for point in column) for column in columns]
        axes[0].plot(seconds, accuracy, color=colour, label=method)
        axes[0].fill_between(seconds, low, high, color=colour, alpha=0.15, lw=0)
        axes[1].plot(megabytes, accuracy, color=colour)
        axes[2].plot(seconds, [mean(point.mean_density for point in column) for column in columns], color=colour)
    for axis, label in zip(axes, ("seconds of virtual time", "MB sent, up and down", "seconds of virtual time"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on test data, mean and range over seeds")
    axes[2].set_ylabel("mean density")
    for axis in axes[:2]:
        axis.axhline(target, color="black", lw=0.8, ls=":")
    axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def table_lines(rows: Mapping[str, Row], target: float, reference: str) -> list[list[str]]:
    """The table for people, its head first."""
    head = [
        "method",
        "final accuracy",
        f"to {target:.0%}: s",
        "MB",
        "x FedAsync",
        "reached",
        "worst decile",
        "worst class",
        "updates",
        "density",
    ]
    lines = [[*head, f"against {reference}"]]
    for method, row in rows.items():
        megabytes = None if row.bytes_to_target_median is None else row.bytes_to_target_median / 1e6
        lines.append(
            [
                method,
                f"{row.final_mean:.4f} ± {row.final_std:.4f}",
                _number(row.seconds_to_target_median, "{:.0f}"),
                _number(megabytes, "{:.1f}"),
                _number(row.speedup_over_fedasync, "{:.2f}"),
                f"{row.reached}/{row.seeds}",
                f"{row.worst_decile_mean:.3f}",
                f"{row.worst_class_mean:.3f}",
                f"{row.updates_mean:.0f}",
                f"{row.mean_density:.2f}",
                _difference(row),
            ]
        )
    return lines


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    return f"{row.difference:+.4f}" + ("" if row.difference_interval is None else f" ± {row.difference_interval:.4f}")


def _number(value: float | None, form: str) -> str:
    return "never" if value is None else form.format(value)


def _page(rows: Mapping[str, Row], picture: bytes, target: float, reference: str, command: str) -> str:
    head, *lines = table_lines(rows, target, reference)
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    style = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}"
    style += "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right}"
    notes = (
        "Accuracies are on test data. Times are virtual. A run that never reaches the target counts as never; medians are over all seeds. "
        f"The last column is the mean difference in final accuracy to {reference} over the same seeds, with half a 95 % interval."
    )
    image = base64.b64encode(picture).decode()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Regrow: methods compared</title><style>{style}</style>'
        f"<h1>Methods compared</h1><p><code>{html.escape(command)}</code></p><table><tr>{cells}</tr>{body}</table>"
        f'<p>{html.escape(notes)}</p><img alt="accuracy over time and bytes, density over time" style="max-width:100%" '
        f'src="data:image/png;base64,{image}"></html>\n'
    )


def _mean_density(run: Outcome) -> float:
    """Over the points at which somebody had joined."""
    return mean([point.mean_density for point in run.points if point.mean_density > 0] or [0.0])


def _seconds(point: Point) -> float:
    return point.time_s


def _bytes(point: Point) -> float:
    return float(point.bytes_up + point.bytes_down)


def _median(values: Sequence[float | None]) -> float | None:
    """The median with None as infinity; None where it would be infinite."""
    if not values:
        return None
    middle = median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None


def _paired(runs: Sequence[Outcome], others: Sequence[Outcome]) -> list[float]:
    by_seed = {other.spec.seed: other.final_accuracy for other in others}
    return [run.final_accuracy - by_seed[run.spec.seed] for run in runs if run.spec.seed in by_seed]


def _half_interval(differences: Sequence[float]) -> float | None:
    count = len(differences)
    if count < 2:
        return None
    quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96
    return quantile * stdev(differences) / math.sqrt(count)
