"""`regrow field report` and `traces`: what a field run has shown."""

from __future__ import annotations

import argparse
import shlex
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from msgspec import UNSET

from broker_server.field.plan import read_plan
from broker_server.field.progress import read_field
from broker_server.field.record import FieldRecord, read_record
from broker_server.field.report import write_report
from broker_server.field.summary import default_target
from broker_server.field.traces import write_traces
from broker_server.html_report import Table
from broker_server.observations import FILE, open_observations
from broker_server.runs import load_task
from cli.arguments import GATEWAY_HOME
from cli.scenario import check_out
from export.task import read_model
from export.work import relative_work
from regrow.errors import LocalError, UsageError
from regrow.levels import unit_densities_of
from testbed.outcome import Spec
from testbed.replay import Likeness, likeness, replay, table


def report(options: argparse.Namespace) -> int:
    """Write the report of what is done."""
    if options.data is None and options.data_folder is not None:
        raise UsageError("--data-folder says where data lie: say with --data what they are, such as npz for your own")
    print(f"reading what was recorded of {options.name}", flush=True)
    with _record(options) as record:
        out: Path = options.out or Path(record.field.plan.name)
        check_out(out)
        target = default_target(record) if options.target is None else options.target
        simulated = None if options.data is None else _replayed(options, record, target)
        command = shlex.join(["regrow", *sys.argv[1:]])
        files = write_report(record, out, target, simulated, _why_not(record), command, lambda said: print(said, flush=True))
    print(f"{files[0]}: {len(record.runs)} runs; {len(files) - 1} more files with pictures (PNG, PDF) and every row (CSV, Parquet)")
    return 0


def traces(options: argparse.Namespace) -> int:
    """Write every run's traces, and how a simulation takes them."""
    with _record(options) as record:
        out: Path = options.out or Path(record.field.plan.name) / "traces"
        check_out(out)
        for run in record.runs:
            task = load_task(run.path / "task")
            densities = unit_densities_of(task.task)
            work = {} if densities is None else dict(relative_work(read_model(task.model_path), densities))
            folder = out / run.step.run
            devices = write_traces(run, folder, record.runs, work)
            words = ["--clients", str(len(devices)), "--links", f"trace:{folder / 'links'}", "--steps-trace", str(folder / "steps")]
            seconds = f"{run.step.end_s - run.step.start_s:.0f}"
            print(shlex.join(["regrow", "simulate", str(task.path), *words, "--latency", "0", "--seconds", seconds]))
    return 0


@contextmanager
def _record(options: argparse.Namespace) -> Iterator[FieldRecord]:
    """The record of a field run, named or by its plan's file."""
    file = Path(options.name)
    name = read_plan(file).name if file.suffix == ".toml" else options.name
    field = read_field(options.runs, name)
    home = options.runs / GATEWAY_HOME
    if not (home / FILE).is_file():
        yield read_record(field, None)
        return
    try:
        with closing(open_observations(home)) as db:
            yield read_record(field, db)
    except sqlite3.Error as error:
        raise LocalError(f"cannot read {home / FILE}: {error}; restore it from a backup, or move it away") from error


def _replayed(options: argparse.Namespace, record: FieldRecord, target: float) -> Table:
    """Every run again in simulation; one that lacks what it takes is named in the table."""
    spec = Spec(
        data=options.data,
        data_folder=None if options.data_folder is None else str(options.data_folder),
        split=options.split,
        validation=UNSET if options.validation is None else options.validation,
    )
    found: list[Likeness] = []
    failed: dict[str, str] = {}
    held_out = False
    with tempfile.TemporaryDirectory() as aside:
        for run in record.runs:
            print(f"replaying {run.step.run}", flush=True)
            try:
                replayed, _ = replay(run, Path(aside) / run.step.run, spec, record.runs)
            except UsageError:
                raise
            except LocalError as error:
                failed[run.step.run] = str(error)
                continue
            held_out = load_task(run.path / "task").task.evaluation.data is not None
            found.append(likeness(run, replayed, target))
    return table(found, target, failed, held_out=held_out)


def _why_not(record: FieldRecord) -> str:
    return (
        f"Not asked for. `regrow field report {record.field.plan.name} --data npz --data-folder DIR` replays every run with the links and "
        "step times that were recorded, on data that you name, and shows time to the target, bytes and updates against what was measured."
    )
