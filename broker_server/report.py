"""What a run leaves for people: metrics as CSV and JSON, and a picture of accuracy and density over time."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from broker_server.run_record import Course
from broker_server.store import Store
from regrow.errors import UsageError


def write_metrics(store: Store, folder: Path) -> list[dict[str, Any]]:
    """Write metrics.csv and metrics.json, one row an event, oldest first; returns the rows. `time_s` counts from the first row."""
    store.append([])  # what still waits becomes visible
    rows: list[dict[str, Any]] = []
    first: float | None = None
    for metric in store.metrics():
        first = metric.wall_time if first is None else first
        rows.append({"time_s": round(metric.wall_time - first, 3), "kind": metric.kind, **metric.fields})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: json.dumps(v) if isinstance(v, dict) else v for name, v in row.items()} for row in rows)
    (folder / "metrics.json").write_text(json.dumps(rows, indent=0))
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path, *, title: str, score: str = "accuracy") -> None:
    """The score of every level and mean density over time, as a PNG. score: what it is called."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = [row for row in rows if row["kind"] == "aggregated"]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained")
    levels = sorted({float(level) for row in made for level in row["scores"]})
    colours = mpl.colormaps["viridis"]
    for number, level in enumerate(levels):
        points = [(row["elapsed_s"], score) for row in made for known, score in row["scores"].items() if float(known) == level]
        colour = colours(number / max(len(levels), 1))
        above.plot(*zip(*points, strict=True), color=colour, lw=1.3, label=f"level {level:g}")
    whole = [(row["elapsed_s"], row["global_score"]) for row in made if row["global_score"] is not None]
    if whole:
        above.plot(*zip(*whole, strict=True), color="black", lw=1.5, ls="--", label="global model")
    above.set_ylabel(f"{score} on the devices' validation data")
    above.set_ylim(None if score == "R^2" else 0, 1)
    above.grid(alpha=0.3)
    if levels or whole:
        above.legend(loc="lower right", fontsize=8)
    above.set_title(title)
    below.plot([row["elapsed_s"] for row in made], [row["mean_density"] for row in made], color="tab:green", lw=2)
    below.set_ylabel("mean density")
    below.set_ylim(0, 1.05)
    below.set_xlabel("seconds")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_runs(courses: Mapping[str, Course], path: Path, *, score: str) -> None:
    """The score of the global model and the mean density of several runs over time, as the picture that the file's name says.

    Raises:
        UsageError: it is none that can be drawn.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out {path}: name a .png, .pdf or .svg file")
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained")
    lines = ("-", "--", ":", "-.")
    for number, (name, course) in enumerate(courses.items()):
        style = {"label": name, "ls": lines[number % len(lines)], "color": f"C{number % 10}"}
        scored = [(point.elapsed_s, point.score) for point in course.points if point.score is not None]
        above.plot([at for at, _ in scored], [value for _, value in scored], **style)
        below.plot([point.elapsed_s for point in course.points], [point.mean_density for point in course.points], **style)
    above.set_ylabel(score)
    above.legend(loc="lower right", fontsize=8)
    below.set_ylabel("mean density")
    below.set_xlabel("seconds")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
