"""The pictures of a field run. Methods differ by colour, line and marker, so that none has to be told by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from broker_server.field.observed import added
from broker_server.field.record import FieldRecord, Reached, Recorded
from broker_server.field.summary import PHASES
from regrow.intervals import half_interval

# Okabe and Ito's colours, which differ for colour-blind readers too, without the yellow that white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)))
GRID_POINTS = 120
MOST_MARKS = 200  # lines of annotations on one axis
Axes = Any
Figure = Any


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure; name is its file's, caption what it shows."""

    name: str
    caption: str
    figure: Figure


def pictures_of(record: FieldRecord, target: float) -> list[Picture]:
    """Everything that the record has data for."""
    drawn = [
        _curves(record, target, "accuracy-time", "over time", "seconds since the start of the run", lambda point: point.elapsed_s),
        _curves(record, target, "accuracy-bytes", "over bytes", "MB of all devices, up and down", lambda point: point.bytes / 1e6),
        _curves(record, target, "accuracy-joules", "over joules", "J of all devices", lambda point: point.joules),
        _over_the_day(record, "bandwidth", "Bandwidth of each device over the field run", "kbit/s", _bandwidth),
        _over_the_day(record, "density", "Density of each device over the field run", "density", _densities),
        _over_the_day(record, "staleness", "Staleness of each device's updates", "versions", _staleness),
        _over_the_day(record, "power", "Watts of each device", "W", _watts),
        _energy(record),
    ]
    return [picture for picture in drawn if picture is not None]


def _new(rows: int = 1, columns: int = 1, **size: Any) -> tuple[Figure, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text: searchable, and in the reader's font
    mpl.rcParams["svg.hashsalt"] = "regrow"
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", squeeze=False, **size)


# ---- methods -------------------------------------------------------------------------------------------------------------------------


def _curves(
    record: FieldRecord, target: float, name: str, over: str, label: str, x_of: Callable[[Reached], float | None]
) -> Picture | None:
    """Thin: each repetition; thick: their mean as far as all go, with its 95 % interval."""
    lines = {method: [_pairs(run, x_of) for run in record.of(method)] for method in record.methods}
    if not any(any(each) for each in lines.values()):
        return None
    figure, ((axes,),) = _new(figsize=(8, 4.5))
    for number, (method, runs) in enumerate(lines.items()):
        colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        known = [pairs for pairs in runs if pairs]
        for pairs in known if len(known) > 1 else []:
            axes.plot(*zip(*pairs, strict=True), color=colour, lw=0.6, alpha=0.5)
        if not known:
            axes.plot([], [], color=colour, ls=line, label=f"{method}: unmeasured")
            continue
        xs, means, halves = _mean_curve(known)
        axes.plot(
            xs, means, color=colour, ls=line, lw=2, label=method if len(known) == len(runs) else f"{method} ({len(known)} of {len(runs)})"
        )
        if halves is not None:
            axes.fill_between(xs, [m - h for m, h in zip(means, halves, strict=True)], [m + h for m, h in zip(means, halves, strict=True)],
                              color=colour, alpha=0.15, lw=0)  # fmt: skip
    scores = [score for runs in lines.values() for pairs in runs for _, score in pairs]
    margin = 0.05 * max(max(scores) - min(scores), 0.02)
    axes.set_ylim(min(scores) - margin, max(scores) + margin)  # an interval of few repetitions may reach far beyond
    axes.axhline(target, color="0.4", lw=0.8, ls=(0, (1, 4)))
    axes.set_xlabel(label)
    axes.set_ylabel(record.score)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return Picture(
        name, f"{record.score.capitalize()} {over}: mean of the repetitions with 95 % intervals, thin lines are single ones", figure
    )


def _pairs(run: Recorded, x_of: Callable[[Reached], float | None]) -> list[tuple[float, float]]:
    return [(x, point.score) for point in run.curve if (x := x_of(point)) is not None]


def _mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float], list[float] | None]:
    """(x, mean, half intervals or None) from where all have begun to where the first ends; between its points a curve stands still."""
    first, last = max(pairs[0][0] for pairs in runs), min(pairs[-1][0] for pairs in runs)
    if len(runs) == 1 or last <= first:
        xs = [x for x, _ in runs[0]]
        return xs, [y for _, y in runs[0]], None
    xs = [first + (last - first) * step / (GRID_POINTS - 1) for step in range(GRID_POINTS)]
    columns = [[_value_at(pairs, x) for pairs in runs] for x in xs]
    return xs, [mean(column) for column in columns], [half_interval(column) or 0.0 for column in columns]


def _value_at(pairs: Sequence[tuple[float, float]], x: float) -> float:
    return next((y for at, y in reversed(pairs) if at <= x), pairs[0][1])


# ---- devices over the whole field run ------------------------------------------------------------------------------------------------


def _over_the_day(
    record: FieldRecord, name: str, caption: str, label: str, draw: Callable[[Axes, Recorded, str, float], bool]
) -> Picture | None:
    """A row a device on one axis of time; hatched: nothing is known; grey lines: annotations; above: which method runs."""
    start_s, end_s = record.span
    devices = record.devices
    figure, rows = _new(len(devices), figsize=(10, 1 + 1.3 * len(devices)), sharex=True)
    drawn, most_left_out = False, 0
    for (axes,), device in zip(rows, devices, strict=True):
        for run in record.runs:
            drawn |= draw(axes, run, device, start_s)
            _mark_unknown(axes, run, device, start_s)
            axes.axvspan((run.step.start_s - start_s) / 60, (run.step.end_s - start_s) / 60, color="0.5", alpha=0.06, lw=0)
        drawn_marks, left_out = _marks(record, device)
        axes.vlines([(at_s - start_s) / 60 for at_s in drawn_marks], 0, 1, transform=axes.get_xaxis_transform(), color="0.5", lw=0.6)
        most_left_out = max(most_left_out, left_out)
        axes.set_title(device, fontsize=8, loc="left", pad=2)
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for run in record.runs:
        middle = ((run.step.start_s + run.step.end_s) / 2 - start_s) / 60
        rows[0][0].annotate(run.repetition.method, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    rows[-1][0].set_xlim(0, max((end_s - start_s) / 60, 1e-3))
    rows[-1][0].set_xlabel("minutes since the field run began")
    if not drawn:
        import matplotlib.pyplot as plt

        plt.close(figure)
        return None
    said = f"{caption}; shaded: training runs, hatched: nothing is known, vertical lines: annotations"
    return Picture(name, said + (f" ({most_left_out} more of them are only in the table)" if most_left_out else ""), figure)


def _marks(record: FieldRecord, device: str) -> tuple[list[float], int]:
    """When lines are drawn, evenly taken from all that this device has, and how many are left out."""
    mine = [at_s for at_s, who, text in record.marks if who in ("", device) and not text.startswith("sync")]
    kept = mine[:: math.ceil(len(mine) / MOST_MARKS)] if mine else []
    return kept, len(mine) - len(kept)


def _mark_unknown(axes: Axes, run: Recorded, device: str, start_s: float) -> None:
    spans = run.observed[device].unknown() if device in run.observed else [(run.step.start_s, run.step.end_s)]
    for begin, end in spans:
        axes.axvspan((begin - start_s) / 60, (end - start_s) / 60, facecolor="none", edgecolor="0.7", hatch="////", lw=0)


def _bandwidth(axes: Axes, run: Recorded, device: str, start_s: float) -> bool:
    """Goodput of every transfer as a level over its time; what the device takes its uplink for as a line with its interval."""
    observed = run.observed.get(device)
    if observed is None:
        told = run.course.devices[device].uplinks if device in run.course.devices else []
        axes.plot([(at - start_s) / 60 for at, _ in told], [bps / 1000 for _, bps in told], color=COLOURS[0], lw=1)
        return bool(told)
    for up, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
        rows = [(begin, end, row) for begin, end, row in observed.spans("transfers") if bool(row["up"]) is up and row["seconds"] > 0]
        rates = [8 * row["payload_bytes"] / row["seconds"] / 1000 for _, _, row in rows]
        axes.hlines(rates, [(b - start_s) / 60 for b, _, _ in rows], [(e - start_s) / 60 for _, e, _ in rows], color=colour, lw=2)
    estimates = observed.rows["uplinks"]
    xs = [(row["at_s"] - start_s) / 60 for row in estimates]
    axes.plot(xs, [row["mean_bps"] / 1000 for row in estimates], color="black", lw=0.8)
    axes.fill_between(
        xs, [row["low_bps"] / 1000 for row in estimates], [row["high_bps"] / 1000 for row in estimates], color="0.5", alpha=0.3, lw=0
    )
    return bool(observed.rows["transfers"] or estimates)


def _densities(axes: Axes, run: Recorded, device: str, start_s: float) -> bool:
    course = run.course.devices.get(device)
    if course is None or not course.densities:
        return False
    steps = [*course.densities, (run.step.end_s, course.densities[-1][1])]
    axes.step([(at - start_s) / 60 for at, _ in steps], [value for _, value in steps], where="post", color=COLOURS[2])
    return True


def _staleness(axes: Axes, run: Recorded, device: str, start_s: float) -> bool:
    updates = run.course.devices[device].updates if device in run.course.devices else []
    axes.plot([(each.wall_s - start_s) / 60 for each in updates], [each.staleness for each in updates], ".", ms=3, color=COLOURS[3])
    return bool(updates)


def _watts(axes: Axes, run: Recorded, device: str, start_s: float) -> bool:
    known = False
    for observed in (run.baseline.get(device), run.observed.get(device)):
        rows = [] if observed is None else [row for row in observed.rows["power"] if row["watts"] is not None]
        known |= bool(rows)
        style = {"ls": "--" if rows and rows[0]["certainty"] == "modelled" else "-", "lw": 0.8, "color": COLOURS[4]}
        axes.plot([(row["at_s"] - row["seconds"] / 2 - start_s) / 60 for row in rows], [row["watts"] for row in rows], **style)
    return known


def _energy(record: FieldRecord) -> Picture | None:
    """Mean joules of each device by phase, stacked, a bar a method; without a bar: unmeasured."""
    bars = [(device, method) for device in record.devices for method in record.methods]
    totals = {key: {phase: _phase_joules(record.of(key[1]), key[0], phase) for phase in PHASES} for key in bars}
    if not any(value is not None for phases in totals.values() for value in phases.values()):
        return None
    figure, ((axes,),) = _new(figsize=(9, 1.5 + 0.28 * len(bars)))
    left = [0.0] * len(bars)
    hatches = ("", "////", "\\\\\\\\", "....")
    for number, phase in enumerate(PHASES):
        values = [totals[key][phase] or 0.0 for key in bars]
        axes.barh(range(len(bars)), values, left=left, color=COLOURS[number], hatch=hatches[number], edgecolor="white", label=phase)
        left = [before + value for before, value in zip(left, values, strict=True)]
    for row, key in enumerate(bars):
        if all(value is None for value in totals[key].values()):
            axes.text(0, row, " unmeasured", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{device}, {method}" for device, method in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"J a run{_certainties(record)}")
    axes.legend(fontsize=8)
    return Picture("energy", "Energy of each device by phase, mean of the repetitions", figure)


def _phase_joules(runs: Iterable[Recorded], device: str, phase: str) -> float | None:
    energies = [run.observed[device].energy().get(phase) for run in runs if device in run.observed]
    known = [energy.joules for energy in energies if energy is not None and energy.joules is not None]
    return mean(known) if known else None


def _certainties(record: FieldRecord) -> str:
    """What the joules are, where not all are measured."""
    total = added(energy for run in record.runs for each in run.observed.values() for energy in each.energy().values())
    return "" if total is None or total.certainty == "measured" else f" ({total.certainty})"
