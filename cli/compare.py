"""`regrow compare`: methods x settings x seeds in virtual time, after an equal tuning budget for each, and a report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import tomllib
from rich.console import Console
from rich.table import Table

from broker_server.runs import TaskFolder
from cli.gateway import built
from cli.scenario import check_out, say_replaced, spec_of
from cli.simulate import journal_bytes
from regrow.errors import LocalError, UsageError
from testbed.compare import Engine, Failure, in_processes, run_all
from testbed.comparison import default_target, rows_of
from testbed.grid import (
    Choice,
    Variant,
    by_seed,
    choose,
    parse_choices,
    parse_own,
    specs_of,
    tuning_seed,
    tuning_specs,
    tuning_variants,
    variants_of,
)
from testbed.outcome import Outcome, Spec, remarks
from testbed.report import Comparison, write_report
from testbed.simulate import task_of
from testbed.tables import overview, settings_text
from testbed.trainers import check_trainer

Results = Mapping[str, Sequence[Outcome | None]]


@dataclass(frozen=True)
class _Session:
    """What every batch of runs of this command shares; failed runs are added to `failures`."""

    console: Console
    folder: TaskFolder
    engine: Engine
    failures: list[Failure] = field(default_factory=list)


def compare(options: argparse.Namespace) -> int:
    """All rows and seeds, then the report; after Ctrl-C the same command goes on with what is missing.

    Exit status 1 where a run failed; the others are finished and reported all the same."""
    console = Console()
    folder = built(options.task)
    methods = list(dict.fromkeys(method for text in options.methods for method in text.split(",") if method))
    if not methods:
        raise UsageError("--methods names none; give some, for example --methods fedgmr,fedasync")
    _check_options(options, methods)
    base = spec_of(options)
    if options.engine == "local":
        check_trainer(base.trainer)
    variants = variants_of(methods, parse_choices(options.grid, "--grid"), parse_own(options.set_for))
    _check(folder, specs_of(base, variants, 1))
    say_replaced(folder)
    session = _Session(console, folder, _engine(options))
    try:
        choices = _tuned(session, options, base, variants)
        rows = specs_of(base, [variant for variant in variants if not options.tune or variant.name in choices], options.seeds, choices)
        _check(folder, rows)
        results = _run(session, rows, options.out)
    except KeyboardInterrupt:
        console.print("stopped; what is finished stays, and the same command goes on with the rest")
        raise
    outcomes = {row: runs for row, found in results.items() if (runs := [outcome for outcome in found if outcome is not None])}
    for failure in session.failures:
        print(f"regrow: failed: {failure}", file=sys.stderr)
    if not outcomes:
        raise LocalError("none of the runs gave an outcome, so there is nothing to report; see above")
    reference = _reference(options.reference, variants, outcomes)
    target = options.target or default_target(outcomes)
    comparison = Comparison(outcomes, target, reference, _command(), choices, session.failures, options.seeds)
    write_report(comparison, options.out)
    _tell(console, options.out, comparison)
    return 1 if session.failures else 0


def _check_options(options: argparse.Namespace, methods: Sequence[str]) -> None:
    """What can be told of the options before anything is run."""
    check_out(options.out)
    if options.reference not in (*methods, "fedgmr") and "[" not in options.reference:
        raise UsageError(f"--reference {options.reference}: it is not among --methods {','.join(methods)}")
    if options.target is not None and options.target > 1:
        raise UsageError(f"--target {options.target:g}: an accuracy is at most 1")
    if options.ray_address is not None and options.engine != "ray":
        raise UsageError("--ray-address is for --engine ray; give both")
    for option, given in (("--tune-seconds", options.tune_seconds is not None), ("--tune-base", options.tune_base)):
        if given and not options.tune:
            raise UsageError(f"{option} is for --tune; give both")


def _tuned(session: _Session, options: argparse.Namespace, base: Spec, variants: Sequence[Variant]) -> dict[str, Choice]:
    """What tuning chose for each row; nothing without --tune. A row of which no tuning run gave an outcome has no choice."""
    tune = parse_choices(options.tune, "--tune")
    if not tune:
        return {}
    seed, seconds = tuning_seed(base, options.seeds), options.tune_seconds or base.seconds
    deciding = tuning_variants(variants, tune, options.tune_base)
    rows = tuning_specs(base, list({variant.name: variant for variant in deciding.values()}.values()), tune, seed, seconds)
    _check(session.folder, rows)
    session.console.print(f"tuning: {sum(map(len, rows.values()))} runs of {seconds:g} virtual seconds with seed {seed}")
    results = _run(session, rows, options.out / "tuning")
    found = {name: choice for name, runs in results.items() if (choice := choose(name, tune, runs, seed, seconds)) is not None}
    for name, choice in found.items():
        session.console.print(f"{name}: {settings_text(choice.chosen)}", highlight=False, markup=False)
    return {row: found[variant.name] for row, variant in deciding.items() if variant.name in found}


def _check(folder: TaskFolder, rows: Mapping[str, Sequence[Spec]]) -> None:
    """Every method's name and setting, before the first run."""
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    for specs in rows.values():
        for spec in specs:
            task_of(folder, tables, spec)


def _run(session: _Session, rows: Mapping[str, Sequence[Spec]], out: Path) -> Results:
    """Run them all, with a line for each; one that failed leaves None in its place."""
    specs = by_seed(rows)
    names = [name for _ in range(len(specs) // max(len(rows), 1)) for name in rows]
    results: list[Outcome | None] = [None] * len(specs)
    began = time.monotonic()
    done = fresh = 0
    with closing(run_all(session.folder.path, specs, out, session.engine)) as finished:
        for number, result in finished:
            done += 1
            waited = time.monotonic() - began
            fresh += waited > 1.0  # what was there already comes at once and says nothing about the rest
            if isinstance(result, Failure):
                session.failures.append(result)
                said = f"failed: {result.message}"
            else:
                results[number] = result
                said = f"accuracy {result.final_accuracy:.4f}, {result.validation_accuracy:.4f} on validation data"
                said += "".join(f"; {remark}" for remark in remarks(result))
            left = f", about {_duration(waited / fresh * (len(specs) - done))} left" if fresh and done < len(specs) else ""
            line = f"{done}/{len(specs)}{left}: {names[number]} seed {specs[number].seed}: {said}"
            session.console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {name: results[place :: len(rows)] for place, name in enumerate(rows)}


def _engine(options: argparse.Namespace) -> Engine:
    processes = options.processes or _cores()
    if options.engine == "local":
        return in_processes(processes, journal_bytes(options))
    from testbed.ray_engine import on_ray

    return on_ray(processes, options.ray_address)


def _reference(wanted: str, variants: Sequence[Variant], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """The row of that name, or else the method's first; or else the first row of all.

    Raises:
        LocalError: a row with settings that is not there.
    """
    if wanted in outcomes:
        return wanted
    if "[" in wanted:
        raise UsageError(f"--reference {wanted}: rows are {', '.join(outcomes)}")
    rows = [variant.name for variant in variants if variant.method == wanted and variant.name in outcomes]
    return rows[0] if rows else next(iter(outcomes))


def _tell(console: Console, out: Path, comparison: Comparison) -> None:
    target, reference = comparison.target, comparison.reference
    shown = overview(rows_of(comparison.outcomes, target, reference), target, reference, comparison.seeds)
    table = Table(*shown.head)
    for line in shown.lines:
        table.add_row(*(text.replace("[", r"\[") for text in line))
    Console(width=max(console.width, 160)).print(table)  # a cell that is cut says nothing; a wide line can be scrolled
    console.print(f"{out / 'report.html'}, report.md, curves.png and summary.json say more", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _command() -> str:
    return shlex.join(["regrow", *sys.argv[1:]])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
