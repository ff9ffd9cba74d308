"""`regrow simulate` and `regrow compare`: choose a method on this machine before driving to the field."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import msgspec
import tomllib
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cli.gateway import built
from regrow.errors import LocalError
from testbed.compare import parse_settings, read_outcome, result_path, run_all, specs_of
from testbed.comparison import default_target, rows_of, table_lines, write_report
from testbed.simulate import Outcome, Point, Simulation, Spec, task_of


def simulate(options: argparse.Namespace) -> int:
    """One run per method, in this process; the curve so far stays after Ctrl-C."""
    console = Console()
    folder = built(options.task)
    base = _spec(options)
    options.out.mkdir(parents=True, exist_ok=True)
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    for method in options.method or [None]:
        spec = msgspec.structs.replace(base, method=method)
        path = result_path(options.out, folder.path, spec)
        outcome = read_outcome(path) if options.resume else None
        if outcome is None:
            simulation = Simulation(folder, task_of(folder, tables, spec), spec)
            outcome = _watched(console, simulation, path)
        if outcome is None:
            return 130
        _tell(console, outcome, path)
    return 0


def _watched(console: Console, simulation: Simulation, path: Path) -> Outcome | None:
    """Run with a bar; None after Ctrl-C, which leaves the curve so far beside the place of the outcome."""
    points: list[Point] = []
    spec = simulation.spec
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(spec.method or simulation.task.method.name, total=spec.seconds, state="")

        def on_point(point: Point) -> None:
            points.append(point)
            state = f"accuracy {point.accuracy:.3f}  version {point.version}  density {point.mean_density:.2f}"
            progress.update(bar, completed=point.time_s, state=state)

        try:
            outcome = simulation.run(on_point)
        except KeyboardInterrupt:
            part = path.with_suffix(".part.json")
            part.write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1))
            console.print(f"stopped after {simulation.world.now:.0f} of {spec.seconds:.0f} virtual seconds; the curve so far is in {part}")
            return None
    path.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=1))
    return outcome


def _tell(console: Console, outcome: Outcome, path: Path) -> None:
    last = outcome.points[-1]
    console.print(
        f"{outcome.spec.method or 'task'}: accuracy {outcome.final_accuracy:.4f} after {last.time_s:.0f} virtual seconds, "
        f"{last.version} aggregations of {last.updates} updates, {(last.bytes_up + last.bytes_down) / 1e6:.1f} MB; {path}"
    )


def compare(options: argparse.Namespace) -> int:
    """All methods and seeds, then the report; after Ctrl-C the same command goes on with what is missing."""
    console = Console()
    folder = built(options.task)
    methods = list(dict.fromkeys(method for text in options.methods for method in text.split(",") if method))
    if not methods:
        raise LocalError("--methods names none; give some, for example --methods fedgmr,fedasync")
    if options.reference not in (*methods, "fedgmr"):
        raise LocalError(f"--reference {options.reference}: it is not among --methods {','.join(methods)}")
    if options.target is not None and options.target > 1:
        raise LocalError(f"--target {options.target:g}: an accuracy is at most 1")
    specs = specs_of(_spec(options), methods, options.seeds)
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    for spec in specs:
        task_of(folder, tables, spec)  # every method's name and setting is checked before the first run
    outcomes: dict[str, list[Outcome]] = {method: [] for method in methods}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("runs", total=len(specs))
            for spec, outcome in run_all(folder.path, specs, options.out, options.processes or _cores()):
                outcomes[spec.method or ""].append(outcome)
                progress.advance(bar)
                if not console.is_terminal:
                    console.print(f"{spec.method} seed {spec.seed}: accuracy {outcome.final_accuracy:.4f}")
    except KeyboardInterrupt:
        console.print("stopped; what is finished stays, and the same command goes on with the rest")
        return 130
    for runs in outcomes.values():
        runs.sort(key=lambda run: run.spec.seed)
    target = options.target or default_target(outcomes)
    reference = options.reference if options.reference in outcomes else methods[0]
    write_report(outcomes, options.out, target=target, reference=reference, command=_command())
    head, *lines = table_lines(rows_of(outcomes, target, reference), target, reference)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console(width=max(console.width, 160)).print(table)  # a cell that is cut says nothing; a wide line can be scrolled
    console.print(f"{options.out / 'report.html'}, curves.png and summary.json say more")
    return 0


def _spec(options: argparse.Namespace) -> Spec:
    return Spec(
        settings=parse_settings(options.set),
        seed=options.seed,
        data=options.data,
        data_folder=None if options.data_folder is None else str(options.data_folder),
        split=options.split,
        clients=options.clients,
        links=options.links,
        outages=_outages(options.outages),
        step_s=options.step_s,
        slowdown=options.slowdown,
        seconds=options.seconds,
        points=options.points,
        trainer=options.trainer,
    )


def _outages(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        up_s, down_s = (float(part) for part in text.split(","))
    except ValueError as error:
        raise LocalError(f"--outages {text!r}: give mean seconds up and down, for example 300,20") from error
    return up_s, down_s


def _command() -> str:
    return shlex.join(["regrow", *sys.argv[1:]])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
