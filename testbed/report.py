"""A comparison's files: report.html, report.md, curves.png and summary.json. The page holds all of itself and needs no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from broker_server.html_report import Table, as_html, page
from testbed import pictures
from testbed.compare import Failure
from testbed.comparison import BASELINE, Curve, Outcomes, Row, baseline_of, curve_of, reached_of, rows_of, targets_of
from testbed.grid import Choice
from testbed.machine import machine
from testbed.outcome import remarks
from testbed.tables import as_markdown, by_target, fairness, overview, tuning, work


@dataclass(frozen=True)
class Comparison:
    """What a report is made of; `choices` by row, where there was tuning; `reference` is a row's name; `seeds`: how many
    each row should have, 0 where nobody said."""

    outcomes: Outcomes
    target: float
    reference: str
    command: str
    choices: Mapping[str, Choice] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    seeds: int = 0


def write_report(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Write the four files into `out`; returns the summary."""
    outcomes, target = comparison.outcomes, comparison.target
    rows = rows_of(outcomes, target, comparison.reference)
    curves = {method: curve_of(runs) for method, runs in outcomes.items()}
    chosen = pictures.highlighted(rows, comparison.reference, outcomes)
    summary = _summary(comparison, rows)
    (out / "curves.png").write_bytes(pictures.png(curves, chosen, target))
    (out / "report.html").write_text(_page(comparison, rows, curves, chosen, summary["machine"]))
    (out / "report.md").write_text(_markdown(comparison, rows))
    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
    return summary


def _summary(comparison: Comparison, rows: Mapping[str, Row]) -> dict[str, Any]:
    outcomes = comparison.outcomes
    baseline = outcomes.get(baseline_of(outcomes) or "", [])
    methods = {}
    for method, row in rows.items():
        choice = comparison.choices.get(method)
        methods[method] = msgspec.to_builtins(row) | ({"tuned": dict(choice.chosen)} if choice else {})
    summary = {
        "command": comparison.command,
        "target_accuracy": comparison.target,
        "reference": comparison.reference,
        "baseline": baseline_of(outcomes),
        "methods": methods,
        "targets": {
            f"{target:.2f}": {method: msgspec.to_builtins(reached_of(runs, baseline, target)) for method, runs in outcomes.items()}
            for target in targets_of(outcomes, comparison.target)
        },
        "failed": [str(failure) for failure in comparison.failures],
        "remarks": _remarks(comparison),
        "machine": machine(),
    }
    if comparison.seeds:
        summary["seeds"] = comparison.seeds
    if comparison.choices:
        summary["tuning"] = {row: _tuned(choice) for row, choice in comparison.choices.items()}
    return summary


def _remarks(comparison: Comparison) -> list[str]:
    """A line for each run in which nothing was aggregated, or some devices took no part."""
    return [f"{row} seed {run.spec.seed}: {why}" for row, runs in comparison.outcomes.items() for run in runs for why in remarks(run)]


def _tuned(choice: Choice) -> dict[str, Any]:
    return {
        "chosen": dict(choice.chosen),
        "tried": [{"settings": dict(cell), "validation_accuracy": score} for cell, score in choice.tried],
        "tuned_as": choice.tuned_as,
        "seed": choice.seed,
        "seconds": choice.seconds,
    }


def _tables(comparison: Comparison, rows: Mapping[str, Row]) -> list[Table]:
    targets = targets_of(comparison.outcomes, comparison.target)
    tables = [
        overview(rows, comparison.target, comparison.reference, comparison.seeds),
        by_target(comparison.outcomes, targets),
        work(rows),
        fairness(rows),
    ]
    return [*tables, tuning(comparison.choices)] if comparison.choices else tables


def _notes(comparison: Comparison) -> list[str]:
    baseline = baseline_of(comparison.outcomes)
    notes = [
        "Accuracies are on test data, but for the worst decile of devices and the choice in tuning, which are on the devices' own "
        "validation data. Times are virtual; bytes are MQTT payload, up and down.",
        "Medians are over all seeds, with a run that does not reach the target as the slowest: `never` means that none did, `no median` "
        "that some did, but half of them or more did not. One seed has no deviation.",
        f"`x {BASELINE}`: the median time of {baseline or BASELINE} by that of the method; `> x` where {BASELINE} itself never got there "
        "and its runs' length gives a bound (1.00 for a method that got there only at the end); `not run` without it.",
        f"`against {comparison.reference}`: mean difference in final accuracy over the same seeds with half a 95 % interval (Student's t).",
        "Least coverage: the share of devices that train the least covered coordinate.",
    ]
    if not comparison.choices:
        notes.append("No method was tuned (--tune): all ran with the settings of the task and the command.")
    return notes


def _markdown(comparison: Comparison, rows: Mapping[str, Row]) -> str:
    parts = ["# Methods compared", f"```sh\n{comparison.command}\n```"]
    parts += [f"- failed: {failure}" for failure in comparison.failures]
    parts += [f"- {line}" for line in _remarks(comparison)]
    parts += [as_markdown(table) for table in _tables(comparison, rows)]
    return "\n\n".join([*parts, *_notes(comparison)]) + "\n"


def _page(
    comparison: Comparison, rows: Mapping[str, Row], curves: Mapping[str, Curve], chosen: Sequence[str], where: Mapping[str, Any]
) -> str:
    first, *others = _tables(comparison, rows)
    time, megabytes = "seconds of virtual time", "MB sent, up and down"
    accuracy = {method: (curve.seconds, curve.accuracy) for method, curve in curves.items()}
    by_bytes = {method: (curve.megabytes, curve.accuracy) for method, curve in curves.items()}
    density = {method: (curve.seconds, curve.density) for method, curve in curves.items()}
    coverage = {method: (curve.seconds, curve.coverage) for method, curve in curves.items()}
    shown = [
        ("Final accuracy, with 95 % intervals over seeds", pictures.final_bars(rows)),
        ("Accuracy over virtual time", pictures.line_chart(accuracy, chosen, time, "accuracy", comparison.target)),
        ("Accuracy over bytes", pictures.line_chart(by_bytes, chosen, megabytes, "accuracy", comparison.target)),
        ("Every method's accuracy over time, before all others", pictures.small_multiples(accuracy, time, "accuracy", "over-time")),
        ("Every method's accuracy over bytes, before all others", pictures.small_multiples(by_bytes, megabytes, "accuracy", "over-bytes")),
        ("Mean density over time", pictures.line_chart(density, chosen, time, "mean density")),
        ("Least coverage over time", pictures.line_chart(coverage, chosen, time, "least coverage")),
        ("Updates of each device, a dot a device", pictures.update_strips(comparison.outcomes)),
    ]
    failed = "".join(f"<li>{html.escape(str(failure))}</li>" for failure in comparison.failures)
    remarked = "".join(f"<li>{html.escape(line)}</li>" for line in _remarks(comparison))
    body = "".join(f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}</figure>\n" for title, picture in shown)
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in _notes(comparison))
    machine_line = ", ".join(f"{key} {value}" for key, value in where.items())
    return page(
        "Methods compared",
        f"<p><code>{html.escape(comparison.command)}</code></p>\n"
        + (f"<p>Runs that failed, and are in no figure below:</p><ul>{failed}</ul>\n" if failed else "")
        + (f"<p>To know beside the numbers:</p><ul>{remarked}</ul>\n" if remarked else "")
        + as_html(first)
        + body
        + "".join(map(as_html, others))
        + f"{notes}<p>{html.escape(machine_line)}</p>",
    )
