"""A comparison's tables, once for all that show them: the terminal, the page and the Markdown file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker_server.html_report import Table
from testbed.comparison import BASELINE, Outcomes, Reached, Row, baseline_of, reached_of
from testbed.grid import Choice, Settings, as_text


def overview(rows: Mapping[str, Row], target: float, reference: str, seeds: int = 0) -> Table:
    """One line a method, the best final accuracy first; where `seeds` says how many were wanted, rows of fewer are marked."""
    head = ["method", "final accuracy", f"s to {target:.0%}", f"MB to {target:.0%}", f"x {BASELINE}", "reached", "seeds"]
    head.append(f"against {reference}")
    ordered = sorted(rows, key=lambda method: -rows[method].final_mean)
    with_baseline = _has_baseline(rows)
    lines = [
        [
            method,
            f"{rows[method].final_mean:.4f} ± {_deviation(rows[method])}" + ("" if rows[method].aggregations_mean else ", untrained"),
            *_reached_cells(rows[method], with_baseline),
            f"{rows[method].reached}/{rows[method].seeds}",
            f"only {rows[method].seeds} of {seeds}" if rows[method].seeds < seeds else str(rows[method].seeds),
            _difference(rows[method]),
        ]
        for method in ordered
    ]
    caption = "Overview: mean ± standard deviation over seeds; medians over seeds; mean seed-paired difference ± half a 95 % interval"
    return Table(caption, head, lines)


def fairness(rows: Mapping[str, Row]) -> Table:
    """Worst device, worst class, every class."""
    classes = max(len(row.per_class_mean) for row in rows.values())
    head = ["method", "worst decile of devices", "worst class", *(f"class {label}" for label in range(classes))]
    lines = [
        [
            method,
            f"{row.worst_decile_mean:.3f}",
            f"class {row.worst_class}: {row.per_class_mean[row.worst_class]:.3f}",
            *(f"{accuracy:.3f}" for accuracy in row.per_class_mean),
        ]
        for method, row in rows.items()
    ]
    return Table("Who is served worst: accuracy by device and by class, means over seeds", head, lines)


def work(rows: Mapping[str, Row]) -> Table:
    """Updates, densities, coverage."""
    head = [
        "method",
        "aggregations",
        "updates",
        "per device: least",
        "median",
        "most",
        "rejected",
        "mean density",
        "mean coverage",
        "least coverage",
    ]
    lines = [
        [
            method,
            f"{row.aggregations_mean:.0f}",
            f"{row.updates_mean:.0f}",
            f"{row.updates_per_device_min:.0f}",
            f"{row.updates_per_device_median:.0f}",
            f"{row.updates_per_device_max:.0f}",
            f"{row.rejected_mean:.1f}",
            f"{row.mean_density:.2f}",
            f"{row.mean_coverage:.2f}",
            f"{row.minimum_coverage:.2f}",
        ]
        for method, row in rows.items()
    ]
    return Table("Work and coverage: means over seeds; density and coverage over time too, from when somebody had joined", head, lines)


def by_target(outcomes: Outcomes, targets: Sequence[float]) -> Table:
    """Seconds, megabytes and speed-up to several targets."""
    baseline = baseline_of(outcomes)
    head = ["method", *(f"{target:.0%}: {what}" for target in targets for what in ("s", "MB", f"x {BASELINE}"))]
    lines = []
    for method, runs in outcomes.items():
        found = [reached_of(runs, outcomes.get(baseline or "", []), target) for target in targets]
        lines.append([method, *(cell for each in found for cell in _reached_cells(each, baseline is not None))])
    return Table(f"Time and bytes to target accuracies, and the speed-up over {BASELINE}: medians over seeds", head, lines)


def tuning(choices: Mapping[str, Choice]) -> Table:
    """What was tried for each method and what was chosen."""
    lines = []
    for row, choice in choices.items():
        tried = "; ".join(f"{settings_text(cell)}: {'failed' if score is None else f'{score:.4f}'}" for cell, score in choice.tried)
        lines.append([row, settings_text(choice.chosen), tried, choice.tuned_as])
    first = next(iter(choices.values()))
    caption = (
        f"Tuning: every method had {len(first.tried)} runs of {first.seconds:g} virtual seconds with seed {first.seed}, which is none "
        "of the compared ones; the best accuracy on the devices' own validation data was taken for all seeds"
    )
    return Table(caption, ["method", "chosen", "tried: validation accuracy", "tuned as"], lines)


def settings_text(settings: Settings) -> str:
    """`key=value, ...` for people."""
    return ", ".join(f"{key}={as_text(value)}" for key, value in settings.items())


def _has_baseline(rows: Mapping[str, Row]) -> bool:
    return any(name == BASELINE or name.startswith(f"{BASELINE}[") for name in rows)


def _reached_cells(reached: Reached, with_baseline: bool) -> list[str]:
    if reached.seconds_to_target_median is None or reached.bytes_to_target_median is None:
        without = "no median" if reached.reached else "never"
        return [without, without, without if with_baseline else "not run"]
    megabytes = reached.bytes_to_target_median / 1e6
    return [f"{reached.seconds_to_target_median:.0f}", f"{megabytes:.1f}", _speedup(reached, with_baseline)]


def _speedup(reached: Reached, with_baseline: bool) -> str:
    if not with_baseline:
        return "not run"
    if reached.speedup_over_fedasync is not None:
        return f"{reached.speedup_over_fedasync:.2f}"
    return "-" if reached.speedup_at_least is None else f"> {reached.speedup_at_least:.2f}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    return f"{row.difference:+.4f}" + ("" if row.difference_interval is None else f" ± {row.difference_interval:.4f}")


def _deviation(row: Row) -> str:
    return "-" if row.final_std is None else f"{row.final_std:.4f}"


# ---- as text -----------------------------------------------------------------------------------------------------------------------


def as_markdown(table: Table) -> str:
    """A table for pasting, its caption above it."""
    lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.lines]
    return f"**{table.caption}**\n\n" + "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
