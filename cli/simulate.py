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
from cli.scenario import check_out, say_replaced, spec_of
from testbed.compare import finished_run, jobs_of
from testbed.journal import Journal
from testbed.outcome import Outcome, Point, remarks, seconds_of, write_outcome
from testbed.simulate import Simulation, open_journal, task_of
from testbed.trainers import check_trainer


def simulate(options: argparse.Namespace) -> int:
    """One run per method, in this process; after Ctrl-C the same command with --resume goes on."""
    console = Console()
    folder = built(options.task)
    base = spec_of(options)
    check_trainer(base.trainer)
    check_out(options.out)
    methods = dict.fromkeys(options.method or [None])
    if options.method:
        say_replaced(folder)
    jobs = jobs_of(folder, [msgspec.structs.replace(base, method=method) for method in methods])
    options.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        path, task = options.out / job.name, task_of(folder, tomllib.loads(job.toml), job.spec)
        outcome = finished_run(job, options.out) if options.resume else None
        if outcome is None:
            if options.resume and path.exists():
                console.print(f"{path}: the data has changed since; it is run again", soft_wrap=True, highlight=False)
            journal = open_journal(path, journal_bytes(options), resume=options.resume)
            outcome = _watched(console, Simulation(folder, task, job.spec, journal), path, journal, job.inputs)
        if outcome is None:
            raise KeyboardInterrupt  # told already
        _tell(console, outcome, job.spec.method or f"task ({task.method.name})", path)
    return 0


def journal_bytes(options: argparse.Namespace) -> int:
    """How large the journal of one run may become."""
    return int(options.journal_gb * 1e9)


def _watched(console: Console, simulation: Simulation, path: Path, journal: Journal | None, inputs: str) -> Outcome | None:
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
            outcome = msgspec.structs.replace(simulation.run(on_point), inputs_digest=inputs)
        except KeyboardInterrupt:
            left = "before the first point of the curve"
            if points:
                part = path.with_suffix(".part.json")
                part.write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1))
                left = f"the curve so far is in {part}"
            console.print(f"stopped after {simulation.world.now:.0f} of {spec.seconds:.0f} virtual seconds; {left}", soft_wrap=True)
            console.print(f"to go on: {_command('--resume')}", soft_wrap=True, highlight=False)
            if journal is not None:
                journal.close()
            return None
    write_outcome(path, outcome, journal)
    path.with_suffix(".part.json").unlink(missing_ok=True)
    return outcome


def _tell(console: Console, outcome: Outcome, method: str, path: Path) -> None:
    last, spec = outcome.points[-1], outcome.spec
    console.print(
        f"{method} on {spec.data}, {spec.split} over {spec.clients} devices, links {spec.links}: "
        f"accuracy {outcome.final_accuracy:.4f} after {seconds_of(outcome)[-1]:.0f} virtual seconds, "
        f"{last.version} aggregations of {last.updates} updates, {(last.bytes_up + last.bytes_down) / 1e6:.1f} MB; {path}",
        soft_wrap=True,
    )
    for remark in remarks(outcome):
        print(f"regrow: {method}: {remark}", file=sys.stderr)


def _command(*more: str) -> str:
    return shlex.join(["regrow", *sys.argv[1:], *(option for option in more if option not in sys.argv)])
