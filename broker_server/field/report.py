"""The files of a field run's report: report.html, pictures as PNG and PDF, and every row as CSV and Parquet."""

from __future__ import annotations

import html
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from broker_server.field.frames import frames_of
from broker_server.field.plan import in_hours, total_s
from broker_server.field.plots import Picture, pictures_of
from broker_server.field.record import FieldRecord
from broker_server.field.summary import by_device, clocks, default_target, differences, gaps, marks, overview, repetitions
from broker_server.html_report import Table, as_html, page
from broker_server.tabular import frame, write_frames


def write_report(
    record: FieldRecord,
    out: Path,
    target: float | None,
    simulated: Table | None,
    why_not: str,
    command: str,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write the report into a folder; returns its files.

    Args:
        target: score whose time, bytes and joules are reported; None: 95 % of the best method's.
        simulated: simulation over measurement, where the runs were replayed; else `why_not` says how to.
        command: that makes this report.
        say: hears what is under way, for it may take minutes.
    """
    out.mkdir(parents=True, exist_ok=True)
    reached = default_target(record) if target is None else target
    say("drawing the pictures")
    pictures = pictures_of(record, reached)
    try:
        files = _write_pictures(pictures, out / "figures")
        text = page(f"field run {record.field.plan.name}", _body(record, reached, pictures, simulated, why_not, command))
    finally:
        _close(pictures)
    say("writing every row")
    frames = frames_of(record)
    if simulated is not None:
        frames.append(frame("simulated", (dict(zip(simulated.head, line, strict=True)) for line in simulated.lines)))
    files += write_frames(frames, out / "data", ["csv", "parquet"])
    (out / "report.html").write_text(text, encoding="utf-8")
    shutil.copy2(record.field.path / "plan.toml", out / "plan.toml")
    return [out / "report.html", out / "plan.toml", *files]


def _write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures:
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")  # as it lies now, in each of the formats: finding that out is half of the work
        for kind, more in (("png", {"dpi": 150, "metadata": {"Software": None}}), ("pdf", {"metadata": {"CreationDate": None}})):
            files.append(folder / f"{picture.name}.{kind}")
            picture.figure.savefig(files[-1], **more)
    return files


def _close(pictures: Sequence[Picture]) -> None:
    import matplotlib.pyplot as plt

    for picture in pictures:
        plt.close(picture.figure)


def _body(record: FieldRecord, target: float, pictures: Sequence[Picture], simulated: Table | None, why_not: str, command: str) -> str:
    tables: list[Table | None] = [overview(record, target), differences(record, target)]
    tables += [by_device(record, method) for method in record.methods]
    after = [repetitions(record), marks(record), clocks(record), gaps(record)]
    parts = [_intro(record, command), *(as_html(table) for table in tables if table is not None)]
    parts += [_figure(picture) for picture in pictures]
    if not any(picture.name == "accuracy-joules" for picture in pictures):
        parts.append(
            f"<p>{html.escape(record.score.capitalize())} over joules: unmeasured, in every run a device that trained knows none.</p>\n"
        )
    parts += ["<h2>Simulation against field</h2>\n", f"<p>{html.escape(why_not)}</p>\n" if simulated is None else as_html(simulated)]
    parts += ["<h2>What happened</h2>\n", *map(as_html, after)]
    parts += ["<h2>How to read this</h2>\n", *(f"<p>{html.escape(note)}</p>\n" for note in _notes(record)), _conditions(record)]
    return "".join(parts)


def _intro(record: FieldRecord, command: str) -> str:
    plan, lacking = record.field.plan, record.field.lacking()
    said = [
        f"{len(record.runs)} of {len(plan.methods) * plan.repetitions} runs of {plan.run_s:g} s, {len(plan.devices)} devices, "
        f"{len(plan.methods)} methods in {plan.repetitions} blocks, order drawn with seed {plan.seed}, "
        f"each after {plan.baseline_s:g} s in which the devices kept still; {in_hours(total_s(plan))} planned."
    ]
    if lacking:
        said.append(f"Not run yet: {', '.join(each.name for each in lacking)}.")
    if record.deleted:
        said.append(f"{', '.join(record.deleted)} was deleted, and is in nothing below.")
    if record.outsiders:
        said.append(f"Took part without being in the plan: {', '.join(record.outsiders)}.")
    if not record.observed:
        said.append("No device has sent observations, so bandwidth is what devices told of their uplinks, and energy is unmeasured.")
    return f"<p><code>{html.escape(command)}</code></p>\n" + "".join(f"<p>{html.escape(line)}</p>\n" for line in said)


def _figure(picture: Picture) -> str:
    text = io.StringIO()
    picture.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    label = html.escape(picture.caption, quote=True)
    svg = drawn[drawn.index("<svg") :].replace("<svg", f'<svg class="plot" role="img" aria-label="{label}"', 1)
    return f"<figure><figcaption>{html.escape(picture.caption)}</figcaption>{svg}</figure>\n"


def _notes(record: FieldRecord) -> list[str]:
    observed = all(run.has_transfers for run in record.runs)
    return [
        "Means are over repetitions; behind ± stands half of a 95 % interval by Student's t. One repetition has no interval.",
        "Differences are taken within a block, so that what drifts over hours hits both sides alike.",
        f"The {record.score} is that of the global model on "
        + ("the gateway's held-out data." if _held_out(record) else "the devices' own validation data, weighted by examples."),
        "Bytes are those of the MQTT packets of models, updates and probes, up and down, as devices observed their transfers. What "
        "telemetry and observations took stands apart, by device."
        if observed
        else "Bytes are MQTT payload, up and down, as devices meter it from their first word in the run on: not every device observed its "
        "transfers in every run.",
        "Joules are those of the devices' phases. `estimated`: the meter leaves parts of the board out; `modelled`: computed by a model "
        "that was fitted to other units, with its 95 % interval (intervals of sums are added up, as if all erred together); "
        "`unmeasured`: nobody knows, and no number stands for it. A sum over devices is given only where all of them know theirs.",
        "Times of devices are moved by their clocks' offsets, which are below with their errors.",
        "Intervals in which nothing is known of a device are missing in every sum, and hatched in the pictures.",
    ]


def _held_out(record: FieldRecord) -> bool:
    from broker_server.runs import read_task

    return read_task(record.runs[0].path / "task").evaluation.data is not None


def _conditions(record: FieldRecord) -> str:
    """Versions, meters and every configuration."""
    began = [step.facts for step in record.field.steps if step.kind == "began"]
    heard: dict[str, dict[str, Any]] = {}
    for step in record.field.steps:
        if step.kind == "heard":
            heard |= step.facts
    gateway = Table(
        "Gateway, each time the plan was taken up",
        ["what", "value"],
        [[key, str(value)] for facts in began for key, value in facts.items()],
    )
    devices = Table(
        "Devices, as they said", ["device", "software", "meter"],
        [[name, str(facts.get("software") or "-"), str(facts.get("meter") or "unmeasured")] for name, facts in sorted(heard.items())],
    )  # fmt: skip
    texts = [("plan.toml", record.field.path / "plan.toml")]
    texts += [(f"task.toml of {method}", record.of(method)[0].path / "task" / "task.toml") for method in record.methods]
    folded = "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(file.read_text())}</pre></details>\n" for name, file in texts
    )
    return f"<h2>Versions and configuration</h2>\n{as_html(gateway)}{as_html(devices)}{folded}"
