"""`regrow simulate`: train a task in virtual time on this machine before driving to the field."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import msgspec
import tomllib
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.gateway import built
from cli.scenario import spec_of
from testbed.compare import read_outcome, result_path
from testbed.journal import Journal
from testbed.outcome import Outcome, Point, write_outcome
from testbed.simulate import Simulation, open_journal, task_of


def simulate(options: argparse.Namespace) -> int:
    """One run per method, in this process; after Ctrl-C the same command with --resume goes on."""
    console = Console()
    folder = built(options.task)
    base = spec_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    for method in options.method or [None]:
        spec = msgspec.structs.replace(base, method=method)
        path = result_path(options.out, folder.path, spec)
        outcome = read_outcome(path) if options.resume else None
        if outcome is None:
            task = task_of(folder, tables, spec)
            journal = open_journal(path, journal_bytes(options), resume=options.resume)
            outcome = _watched(console, Simulation(folder, task, spec, journal), path, journal)
        if outcome is None:
            return 130
        _tell(console, outcome, path)
    return 0


def journal_bytes(options: argparse.Namespace) -> int:
    """How large the journal of one run may become."""
    return int(options.journal_gb * 1e9)


def _watched(console: Console, simulation: Simulation, path: Path, journal: Journal | None) -> Outcome | None:
    """Run with a bar; None after Ctrl-C, which leaves the curve so far and the journal beside the place of the outcome."""
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
            again = "replaying  " if journal is not None and journal.replaying else ""
            state = f"{again}accuracy {point.accuracy:.3f}  version {point.version}  density {point.mean_density:.2f}"
            progress.update(bar, completed=point.time_s, state=state)

        try:
            outcome = simulation.run(on_point)
        except KeyboardInterrupt:
            part = path.with_suffix(".part.json")
            part.write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1))
            console.print(f"stopped after {simulation.world.now:.0f} of {spec.seconds:.0f} virtual seconds; the curve so far is in {part}")
            console.print(f"to go on: {_command('--resume')}", soft_wrap=True, highlight=False)
            if journal is not None:
                journal.close()
            return None
    write_outcome(path, outcome, journal)
    path.with_suffix(".part.json").unlink(missing_ok=True)
    return outcome


def _tell(console: Console, outcome: Outcome, path: Path) -> None:
    last, spec = outcome.points[-1], outcome.spec
    console.print(
        f"{spec.method or 'task'} on {spec.data}, {spec.split} over {spec.clients} devices, links {spec.links}: "
        f"accuracy {outcome.final_accuracy:.4f} after {last.time_s:.0f} virtual seconds, "
        f"{last.version} aggregations of {last.updates} updates, {(last.bytes_up + last.bytes_down) / 1e6:.1f} MB; {path}"
    )


def _command(*more: str) -> str:
    return shlex.join(["regrow", *sys.argv[1:], *(option for option in more if option not in sys.argv)])
