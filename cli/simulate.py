"""`regrow simulate`: train a task in virtual time on this machine before driving to the field."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import tomllib
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.gateway import built
from regrow.errors import LocalError
from testbed.compare import outcome_text, read_outcome, result_path, write_outcome
from testbed.grid import parse_settings
from testbed.simulate import Outcome, Point, Simulation, Spec, task_of


def simulate(options: argparse.Namespace) -> int:
    """One run per method, in this process; the curve so far stays after Ctrl-C."""
    console = Console()
    folder = built(options.task)
    base = scenario(options)
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
    write_outcome(path, outcome_text(outcome))
    return outcome


def _tell(console: Console, outcome: Outcome, path: Path) -> None:
    last = outcome.points[-1]
    console.print(
        f"{outcome.spec.method or 'task'}: accuracy {outcome.final_accuracy:.4f} after {last.time_s:.0f} virtual seconds, "
        f"{last.version} aggregations of {last.updates} updates, {(last.bytes_up + last.bytes_down) / 1e6:.1f} MB; {path}"
    )


def scenario(options: argparse.Namespace) -> Spec:
    """What the options that both commands have say; no method yet."""
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
    )


def _outages(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        up_s, down_s = (float(part) for part in text.split(","))
    except ValueError as error:
        raise LocalError(f"--outages {text!r}: give mean seconds up and down, for example 300,20") from error
    return up_s, down_s
