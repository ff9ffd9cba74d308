"""What `regrow export` and `regrow model check` have found, as tables of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich import table
from rich.console import Console

from export.inference import Exported
from regrow.local_step import Step

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column heads and rows."""


def export_table(rows: Sequence[Exported], score: str) -> Table:
    """A row for each file; `score` is what their score is."""
    head = ("file", "density", "parameters", "not 0", "opset", "IR", "size", "packed", score, "drop", "latency")
    return head, [
        (
            row.file,
            f"{row.density:g}",
            str(row.parameters),
            str(row.nonzero),
            str(row.opset),
            str(row.ir_version),
            bytes_text(row.size_bytes),
            bytes_text(row.zlib_bytes),
            "" if row.score is None else f"{row.score:.4f}",
            "" if row.drop is None else f"{round(row.drop, 4) + 0.0:.4f}",
            "" if row.latency_ms is None else f"{row.latency_ms:.3f} ms",
        )
        for row in rows
    ]


def training_lines(report: dict[str, Any]) -> list[str]:
    """What is trained, and what a device holds beside the parameters, none of which travels."""
    training = report["training"]
    step = msgspec.convert({key: value for key, value in training.items() if key != "train_last"}, Step)
    lines = [f"trained with {step.optimizer}, loss {step.loss}{' of the input itself' if step.target == 'input' else ''}"]
    if training["train_last"] is not None:
        lines.append(f"train_last = {training['train_last']}: {report['constants']} numbers stay as they are, within the program")
    if report["state"]:
        lines.append(f"the optimizer remembers {report['state']} numbers during a round, on the device")
    if report["anchors"]:
        lines.append(f"FedProx keeps the {report['anchors']} parameters that the round began with")
    if report["statistics"]:
        lines.append(
            f"batch normalisation: {report['statistics']} running means and variances, which every device computes from its own data; "
            "training pads no short batch"
        )
    return lines


def check_tables(report: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, column heads, rows) of what a report of `model check` says of costs."""
    yield _steps(report)
    yield _levels(report["levels"])
    yield _updates(report["update_s"])


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; for a pipe with room for everything."""
    shown = table.Table(*head, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    (Console() if sys.stdout.isatty() else Console(width=160)).print(shown)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bytes_text(size: float) -> str:
    """For people: 812 B, 34.5 kB, 26.4 MB; powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def seconds_text(seconds: float) -> str:
    """Three digits: 4.21 ms, 0.35 s, 120 s, 26 min."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"


def _steps(report: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    threads = sorted({count for step in report["steps"] for count in step["seconds"]})
    head = (
        "program",
        "density",
        "batch",
        "memory at most",
        "float16 storage",
        *(f"step, {count} thread{'s' * (count > 1)}" for count in threads),
    )
    rows = []
    for step in report["steps"]:
        density = "below 1" if step["program"] == "train_masked" else f"{step['parameters'] / report['parameters']:.3g}"
        memory = "unknown" if step["memory_bytes"] is None else bytes_text(step["memory_bytes"])
        times = (seconds_text(step["seconds"][count]) if count in step["seconds"] else "" for count in threads)
        half = "-" if step["memory_float16_bytes"] is None else bytes_text(step["memory_float16_bytes"])
        rows.append((step["program"], density, str(step["batch"]), memory, half, *times))
    machine = f"on this machine ({report['machine']}, onnxruntime {report['onnxruntime']})"
    return f"A training step {machine}; memory is that of a whole job, estimated", head, rows


def _levels(levels: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    dtypes = list(levels[0]["update_bytes"])
    rows = [
        (
            f"{level['density']:g}",
            str(level["parameters"]),
            bytes_text(level["index_bytes"]),
            *(bytes_text(level["update_bytes"][dtype]) for dtype in dtypes),
        )
        for level in levels
    ]
    return "Bytes of one update, by what it travels as", ("density", "parameters", "index sets (down, once an epoch)", *dtypes), rows


def _updates(updates: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    links = list(updates[0]["seconds"])
    rows = [(f"{update['density']:g}", update["dtype"], *(seconds_text(update["seconds"][link]) for link in links)) for update in updates]
    return "Time of one update on an uplink", ("density", "as", *(_rate(float(link)) for link in links)), rows


def _rate(bps: float) -> str:
    return f"{bps / 1e6:g} Mbit/s" if bps >= 1e6 else f"{bps / 1e3:g} kbit/s"
