"""`regrow model check`: whether a device can train a model, and what it costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console

from broker_server.runs import load_task, read_task, recover
from broker_server.store import Store
from cli.model_text import check_tables, show, training_lines
from cli.models import find_run, parse_densities, parse_numbers
from edge_agent.memory import spare_bytes
from export.check import held_by, layers_kept, levels_of, notes_of, operators, problems_of, step_costs, trainable_operators
from export.programs import initial_vector
from export.task import model_from, programs_of
from regrow.errors import LocalError, UsageError
from regrow.levels import densities_of, next_order, unit_densities_of
from regrow.local_step import step_of
from regrow.order import Order, importance
from regrow.parameters import Layout
from regrow.task import Method, Task, task_from_tables
from regrow.units import Units

STEP_OPTIONS = ("loss", "target", "optimizer", "proximal_mu", "clip_norm", "train_last")
"""Keys of [training] that are options too; the others come with --task."""


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is looked at: an ONNX model, and the task (or run) whose training, levels and granularity it is looked at with."""

    name: str
    model: Any
    task: Task
    run: Path | None = None


@dataclass(frozen=True, eq=False)
class _Setting:
    """What a model is looked at with: the weights and the order of its levels, and how the programs are cut."""

    task: Task
    flat_weights: NDArray[np.float32]
    order: Order
    layout: Layout
    programs: dict[str, bytes]


def model_check(options: argparse.Namespace) -> int:
    """Say whether a model can be trained, and at what cost; 0 if it can, 1 if not."""
    say = Console(stderr=True)
    batches = [int(value) for value in parse_numbers(options.batch, "--batch", 1, 100_000)]
    uplinks_bps = parse_numbers(options.uplink, "--uplink", 1.0, 1e12)
    if options.steps < 0:
        raise UsageError(f"--steps {options.steps}: how many steps to run, 0 for none")
    subject = _subject(options)
    model = subject.model
    report: dict[str, Any] = {"model": subject.name, "operators": operators(model), "ir_version": model.ir_version}
    report["opset"] = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    report["training"] = json.loads(msgspec.json.encode(step_of(subject.task.training)))
    report["training"]["train_last"] = subject.task.training.train_last
    found = problems_of(model, subject.task.training, units=subject.task.method.granularity == "unit")
    report["notes"] = [] if found else notes_of(model, subject.task.training.loss)
    report |= {"trainable": not found, "problems": [asdict(problem) for problem in found]}
    if not found:
        setting = _anew(subject) if subject.run is None else _of_run(subject, subject.run)
        report |= _about(setting)
        if options.picture is not None:
            from cli.model_picture import draw

            draw(report, densities_of(setting.task), options.picture)  # before the steps: a wrong name is told at once
        report["update_s"] = _update_s(report["levels"], uplinks_bps)
        report["steps"] = []
        costs = step_costs(setting.programs, setting.order, setting.flat_weights, batches, _threads(), options.steps, spare_bytes())
        for step in costs:
            say.print(f"measured {step.program}, batch {step.batch}", style="dim")
            report["steps"].append(asdict(step))
    _tell(options, report)
    return 0 if report["trainable"] else 1


def _about(setting: _Setting) -> dict[str, Any]:
    """What needs no running: parameters, levels, layers."""
    levels = levels_of(setting.order, setting.flat_weights, densities_of(setting.task))
    return {
        "parameters": setting.layout.size,
        "always_kept": int(setting.layout.always_kept_coordinates.size),
        **held_by(setting.programs),
        "granularity": setting.task.method.granularity,
        "machine": platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "levels": [asdict(level) for level in levels],
        "layers": _layers(setting),
    }


def _subject(options: argparse.Namespace) -> _Subject:
    """What the options name: a model with a training of its own, a task, or a run.

    Raises:
        LocalError: they do not go together, or what they name cannot be read.
    """
    asked = {key: value for key in STEP_OPTIONS if (value := getattr(options, key)) is not None}
    if options.run is None and options.task is None:
        if options.file is None:
            raise UsageError("say which model: FILE, or --task TASK, or --run RUN")
        densities = parse_densities(options.density) if options.density else list(Method().ladder)
        ladder = tuple(densities) if densities[-1] == 1.0 else (*densities, 1.0)
        tables = {"name": "check", "method": {"ladder": ladder, "granularity": options.granularity or "weight"}, "training": asked}
        return _Subject(options.file, model_from(options.file), task_from_tables(tables, "options"))
    if options.run is not None and options.task is not None:
        raise UsageError("--run has a task of its own: leave --task out")
    named = "--run" if options.run is not None else "--task"
    if options.density or options.granularity or asked:
        words = ["--" + key.replace("_", "-") for key in ("density", "granularity", *STEP_OPTIONS) if getattr(options, key) is not None]
        raise UsageError(f"{named} says densities, granularity and training itself: leave {', '.join(words)} out")
    run = None if options.run is None else find_run(options.run, options.runs)
    folder = options.task if run is None else run / "task"
    task = read_task(folder)
    name = options.file or str(folder / task.model)
    return _Subject(name, model_from(name), task, run)


def _anew(subject: _Subject) -> _Setting:
    """A model without a past: levels by |w| of the weights that it came with, as a run's first order is."""
    task = subject.task
    programs = programs_of(subject.model, unit_densities_of(task), task.training)
    layout = Layout.from_json(programs["layout"])
    units = Units.from_json(programs["units"], layout) if "units" in programs else None
    flat_weights = initial_vector(subject.model, task.training.train_last)
    order = next_order(task, layout, units, importance("w", flat_weights), flat_weights, 0)
    return _Setting(task, flat_weights, order, layout, programs)


def _of_run(subject: _Subject, run: Path) -> _Setting:
    """The levels as a run orders them now."""
    folder = load_task(run / "task")
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, folder)
    programs = programs_of(subject.model, unit_densities_of(folder.task), folder.task.training)
    if Layout.from_json(programs["layout"]) != folder.layout:
        raise LocalError(f"{subject.name} is not the model of {run}: that one is {folder.model_path}")
    return _Setting(folder.task, ledger.flat_weights, ledger.order, folder.layout, programs)


def _layers(setting: _Setting) -> list[dict[str, Any]]:
    kept = layers_kept(setting.layout, setting.order)
    return [
        {"name": t.name, "shape": list(t.shape), "parameters": t.size, "always_kept": t.always_kept, "kept": kept[t.name]}
        for t in setting.layout.tensors
    ]


def _update_s(levels: Sequence[dict[str, Any]], uplinks_bps: Sequence[float]) -> list[dict[str, Any]]:
    """Seconds of one update's payload on each link."""
    return [
        {"density": level["density"], "dtype": dtype, "bytes": size, "seconds": {f"{bps:.0f}": 8 * size / bps for bps in uplinks_bps}}
        for level in levels
        for dtype, size in level["update_bytes"].items()
    ]


def _tell(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(report, indent=1))
        return
    ops = ", ".join(f"{count} {op}" for op, count in report["operators"].items())
    print(f"{report['model']}: opset {report['opset']}, IR version {report['ir_version']}; {ops}")
    if not report["trainable"]:
        print(f"cannot be trained on a device, for {len(report['problems'])} reason(s):")
        print("\n".join(f"- {problem['message']}" for problem in report["problems"]))
        if any(problem["op"] for problem in report["problems"]):
            print(f"operators that have a gradient rule: {', '.join(trainable_operators())}")
        return
    print(f"can be trained on a device: {report['parameters']} parameters, {report['always_kept']} of them in every sub-model")
    print("\n".join([*training_lines(report), *(f"note: {note}" for note in report["notes"])]))
    for title, head, rows in check_tables(report):
        print(f"\n{title}")
        show(head, rows)
    for step in report["steps"]:
        if step["skipped"]:
            print(f"{step['program']} with batch {step['batch']} was not run: it {step['skipped']}")
    if options.picture is not None:
        print(f"\n{options.picture}: parameters of every layer, and how much of it each level keeps")


def _threads() -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [1, 2] if cores > 1 else [1]
