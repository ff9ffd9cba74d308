"""`regrow runs`, `rollback` and `verify`: what runs there are, what became of them, and what is left of them."""

from __future__ import annotations

import argparse
import math
import shutil
import sqlite3
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from broker_server.audit import audit
from broker_server.field.observed import TABLES, Observed, observe, observed_devices
from broker_server.field.record import bytes_in_all, bytes_until, have_transfers
from broker_server.observations import FILE, open_observations
from broker_server.promotions import use_of
from broker_server.report import plot_runs
from broker_server.run_files import take_lock
from broker_server.run_record import Course, course_of
from broker_server.runs import RunInfo, list_runs, read_task, run_info
from broker_server.runs import rollback as roll_back
from broker_server.store import Store
from broker_server.tabular import Frame, formats_of, frame, write_frames
from cli.arguments import GATEWAY_HOME
from cli.gateway import check_run
from cli.models import find_run
from cli.scenario import check_out
from regrow.errors import LocalError, UsageError

NOT_KNOWN = "-"
OF_PACKETS = "MB: packets of models, updates and probes, as the devices observed their transfers"
OF_HEARTBEATS = (
    "MB: all payload by each device's last heartbeat before that moment, so rather less; not every device observed its transfers"
)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)  # nothing is left out for a pipe


def runs(options: argparse.Namespace) -> int:
    """List the runs."""
    table = Table(Column("run", no_wrap=True), "task", "method", "started", "version", "devices", "updates", "score", "in use", "state",
                  pad_edge=False)  # fmt: skip
    found = list(list_runs(options.runs))
    for info in found:
        numbers = (str(info.version), str(info.devices), str(info.updates), _score(info), use_of(info.path, info.task) or NOT_KNOWN)
        table.add_row(info.path.name, info.task, info.method, _clock(info.started_s), *numbers, info.finished or "unfinished")
    _console().print(table if found else f"no runs in {options.runs}: try `regrow demo`")
    return 0


def _score(info: RunInfo) -> str:
    return NOT_KNOWN if info.score is None else f"{info.score_name} {info.score:.3f}"


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


# ---- show ----------------------------------------------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> int:
    """One run in detail."""
    path = find_run(options.run, options.runs)
    info, course = run_info(path), course_of(path)
    task, console = read_task(path / "task"), _console()
    last = course.points[-1] if course.points else None
    with Store.open(path, read_only=True) as store:
        snapshots = [str(kept.version) for kept in store.snapshots()]
    stop = {name: value for name, value in msgspec.to_builtins(task.stop).items() if value is not None}
    sent, received = (sum(getattr(device, name) for device in course.devices.values()) for name in ("bytes_up", "bytes_down"))
    facts = {
        "task": f"{info.task}, seed {task.seed}",
        "method": info.method,
        "started": _clock(info.started_s),
        "state": info.finished or "unfinished",
        "stops at": ", ".join(f"{name} {value}" for name, value in stop.items()) or "when it no longer improves",
        "version": f"{info.version}, snapshots of {', '.join(snapshots) or 'none'}",
        "score": _score(info),
        "trained for": NOT_KNOWN if last is None else f"{last.elapsed_s:.0f} s",
        "mean density": NOT_KNOWN if last is None else f"{last.mean_density:.2f}",
        "payload": f"{sent / 1e6:.2f} MB up, {received / 1e6:.2f} MB down" if course.devices else NOT_KNOWN,
        "model in use": use_of(path, info.task) or "not promoted",
        "on disk": f"{_size(path) / 1e6:.1f} MB in {path}",
    }
    for name, value in facts.items():
        console.print(f"{name:13} {value}", soft_wrap=True, highlight=False)
    console.print(_devices(course))
    return 0


def _devices(course: Course) -> Table:
    table = Table("device", "updates", "staleness", "first density", "density", "uplink kbit/s", "MB up", "MB down", pad_edge=False)
    for name, device in sorted(course.devices.items()):
        densities = [f"{device.densities[index][1]:g}" if device.densities else NOT_KNOWN for index in (0, -1)]
        staleness = NOT_KNOWN if device.staleness is None else f"{device.staleness:.2f}"
        uplink = f"{device.uplinks[-1][1] / 1000:.0f}" if device.uplinks else NOT_KNOWN
        table.add_row(
            name, str(len(device.updates)), staleness, *densities, uplink, f"{device.bytes_up / 1e6:.2f}", f"{device.bytes_down / 1e6:.2f}"
        )
    return table


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- compare -------------------------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> int:
    """A table of several runs, and a picture of their scores."""
    paths = [find_run(run, options.runs) for run in options.run]
    if len({path.resolve() for path in paths}) < len(paths) or len(paths) < 2:
        raise UsageError("name two runs or more to compare, each once")
    infos, courses = [run_info(path) for path in paths], [course_of(path) for path in paths]
    names = {info.score_name for info in infos}
    if len(names) > 1:
        raise UsageError(f"these runs are scored differently ({', '.join(sorted(names))}), so they cannot be compared")
    (score,) = names
    best = [point.score for course in courses for point in course.points if point.score is not None]
    target = options.target
    if target is None and best and max(best) > 0:
        target = math.floor(95 * max(best)) / 100 or max(best)  # as it is printed
    goal = NOT_KNOWN if target is None else f"{target:g}"
    seen = [_seen(info.path, course, min(info.started_s, course.began_s or math.inf)) for info, course in zip(infos, courses, strict=True)]
    in_packets = all(have_transfers(course, observed) for course, observed in zip(courses, seen, strict=True))
    head: list[Column | str] = [
        Column("run", no_wrap=True),
        "task",
        "method",
        "state",
        score,
        f"s to {goal}",
        f"MB to {goal}",
        "version",
        "updates",
        "density",
        "MB",
    ]
    table = Table(*head, pad_edge=False)
    for info, course, observed in zip(infos, courses, seen, strict=True):
        table.add_row(*_line(info, course, target, observed if in_packets else {}))
    console = _console()
    console.print(table)
    console.print(OF_PACKETS if in_packets else OF_HEARTBEATS, soft_wrap=True, highlight=False)
    if options.out is not None:
        plot_runs({info.path.name: course for info, course in zip(infos, courses, strict=True)}, options.out, score=score)
        console.print(f"{options.out}: {score} and density over time", soft_wrap=True, highlight=False)
    return 0


def _line(info: RunInfo, course: Course, target: float | None, observed: Mapping[str, Observed]) -> list[str]:
    scored = [point for point in course.points if point.score is not None]
    reached = next((point for point in scored if target is not None and (point.score or 0.0) >= target), None)
    last = course.points[-1] if course.points else None
    return [
        info.path.name,
        info.task,
        info.method,
        info.finished or "unfinished",
        f"{scored[-1].score:.3f}" if scored else NOT_KNOWN,
        "never" if reached is None else f"{reached.elapsed_s:.0f}",
        "never" if reached is None else f"{bytes_until(course, observed, [reached])[0] / 1e6:.2f}",
        str(info.version),
        str(info.updates),
        NOT_KNOWN if last is None else f"{last.mean_density:.2f}",
        f"{bytes_in_all(course, observed) / 1e6:.2f}" if course.devices else NOT_KNOWN,
    ]


# ---- export --------------------------------------------------------------------------------------------------------------------------


def export(options: argparse.Namespace) -> int:
    """A run as tables."""
    path, formats = find_run(options.run, options.runs), formats_of(options.format)
    out: Path = options.out or Path(f"{path.name}-data")
    check_out(out)
    files = write_frames(_frames(path), out, formats)
    print(f"{out}: {', '.join(file.name for file in files)}")
    return 0


def _frames(path: Path) -> list[Frame]:
    """The run, its curve, a table for each kind of metric, and what its devices observed meanwhile, on the gateway's clock."""
    info, course = run_info(path), course_of(path)
    facts = {"run": path.name, "task": info.task, "method": info.method, "started_s": info.started_s, "version": info.version,
             "devices": info.devices, "updates": info.updates, "score": info.score, "score_name": info.score_name,
             "state": info.finished or "unfinished"}  # fmt: skip
    kinds: dict[str, list[dict[str, Any]]] = {}
    with Store.open(path, read_only=True) as store:
        for metric in store.metrics():
            row = {"wall_s": metric.wall_time, "elapsed_s": metric.wall_time - (course.began_s or 0.0), **metric.fields}
            kinds.setdefault(metric.kind.replace(" ", "-"), []).append(row)
    points = (msgspec.to_builtins(point) for point in course.points)
    return [frame("run", [facts]), frame("curve", points), *(frame(kind, rows) for kind, rows in kinds.items()), *_observed(path, course)]


def _observed(path: Path, course: Course) -> list[Frame]:
    seen = _seen(path, course, course.began_s or 0.0).values()
    return [frame(f"observed-{table}", (row for each in seen for row in each.rows[table]), ("device", "at_s")) for table in TABLES if seen]


def _seen(path: Path, course: Course, began_s: float) -> dict[str, Observed]:
    """What the devices of a run observed from this time to its end, by device; none where nothing is kept."""
    home = path.parent / GATEWAY_HOME
    if course.began_s is None or course.ended_s is None or not (home / FILE).is_file():
        return {}
    try:
        with closing(open_observations(home)) as db:
            names = sorted(set(observed_devices(db)) & set(course.devices))
            return {name: observe(db, name, began_s, course.ended_s) for name in names}
    except sqlite3.Error as error:
        raise LocalError(f"cannot read {home / FILE}: {error}; restore it from a backup, or move it away") from error


# ---- delete --------------------------------------------------------------------------------------------------------------------------


def delete(options: argparse.Namespace) -> int:
    """Remove runs for good, after saying what goes and being told yes."""
    paths = [find_run(run, options.runs) for run in options.run]
    fields = {run: name for path in paths for run, name in _field_runs(path.parent).items()}
    for path in paths:
        take_lock(path).close()  # in use: refused before anything is asked
        _say_what_goes(path, fields.get(path.name))
    if not options.yes:
        if not sys.stdin.isatty():
            raise UsageError("--yes: nobody is there to be asked; say it to delete them")
        if input("Delete for good? Type yes: ").strip() != "yes":
            print("nothing is deleted")
            return 0
    for path in paths:
        with take_lock(path):  # held until its own file is gone
            aside = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(aside, ignore_errors=True)  # of a deletion that was cut off
            path.rename(aside)
            shutil.rmtree(aside)
        print(f"{path} is deleted")
    return 0


def _say_what_goes(path: Path, field: str | None) -> None:
    try:
        info = run_info(path)
        what = f"{info.task}, {info.method}, version {info.version} of {info.updates} updates, {info.finished or 'unfinished'}"
        kept = "; its promoted model stays" if use_of(path, info.task) else ""
    except LocalError as error:  # a damaged one may go, too
        what, kept = f"unreadable: {error}", ""
    counts = f"; it counts in the field run {field}, whose report will lack it" if field else ""
    print(f"{path}: {_size(path) / 1e6:.1f} MB: {what}{kept}{counts}; what devices observed stays in {GATEWAY_HOME}/{FILE}")


def _field_runs(runs: Path) -> dict[str, str]:
    """Which field run each run counts in."""
    from broker_server.field.progress import FIELDS, read_field

    found: dict[str, str] = {}
    for plan in sorted((runs / FIELDS).glob("*/plan.toml")):
        field = read_field(runs, plan.parent.name)
        found |= {step.run: field.plan.name for step in field.done().values()}
    return found


# ---- rollback, verify ----------------------------------------------------------------------------------------------------------------


def rollback(options: argparse.Namespace) -> int:
    """Return to an earlier snapshot."""
    check_run(options.run)
    old, new = roll_back(options.run, options.to)
    print(f"{options.run}: the model of version {old} is now version {new}; go on with `regrow serve {options.run}`")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Replay a run's log through reference.py."""
    check_run(options.run)
    print(f"replaying {options.run} through the reference", flush=True)
    outcome = audit(options.run)
    print(
        f"{options.run}: {outcome.updates} receipted updates, {outcome.aggregations} aggregations; the model differs from the "
        f"reference by at most {outcome.worst:.2g} of the tolerance"
    )
    return 0 if outcome.worst <= 1.0 else 1
