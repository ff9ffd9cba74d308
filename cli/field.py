"""`regrow field plan`, `run` and `annotate`: an experiment with a running fleet."""

from __future__ import annotations

import argparse
import os
import platform
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tomllib

from broker_server.field.observed import told_until
from broker_server.field.plan import Plan, Repetition, in_hours, plan_from, plan_text, read_plan, repetitions_of, task_folder, total_s
from broker_server.field.progress import FieldFolder, Step, in_runs, open_field, task_toml
from broker_server.field_herald import FOLDER, FieldHerald, announce, reports
from broker_server.observations import annotate as keep_annotation
from broker_server.observations import recorder_of
from broker_server.run_record import facts_of
from broker_server.runs import create_run, read_task
from broker_server.stopping import stop_at_signals
from cli.arguments import GATEWAY_HOME
from cli.gateway import Link, built, link_of, serve_run
from cli.main import parser
from cli.promote import turn
from cli.version import version
from regrow.errors import LocalError, UsageError
from regrow.machine import Note
from regrow.methods import named
from regrow.observations import Field
from testbed.machine import machine

ATTEMPTS = 2  # at a repetition in which no device's update came
EMPTY = "nothing was aggregated"
LOOK_S = 0.25
SAY_S = 15.0  # between two lines of progress
EARLY_S = 1.0  # the coordinator begins before the run, so that it leads when the devices may work
GATHER_S = 120.0  # at most, for what devices still hold at the end; they let rows wait for 20 s, to go together
GOODBYE_S = 10.0  # for the end to reach the devices

# ---- plan ----------------------------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> int:
    """Write a plan, or check one that is there; say what it takes."""
    file: Path = options.file
    if options.task is None and options.devices is None:
        _say(read_plan(file), file)
        return 0
    if options.task is None or options.devices is None:
        raise UsageError("a new plan needs --task and --devices; without either, a plan that is there is checked")
    if file.exists():
        raise UsageError(f"{file} exists already: edit it, or write another")
    if file.suffix != ".toml":
        raise UsageError(f"{file}: a plan is a .toml file, and its name that of the field run")
    read_task(options.task)
    said = {name: getattr(options, name) for name in ("repetitions", "run_s", "baseline_s", "lead_s", "sample_hz", "seed")}
    said |= {"name": file.stem, "task": str(options.task.resolve())}
    said |= {name: getattr(options, name).split(",") for name in ("devices", "methods")}
    made = plan_from(said, str(file))
    file.write_text(plan_text(made, file.name), encoding="utf-8")
    try:
        _say(read_plan(file), file)  # what was written is what will be read
    except UsageError:
        file.unlink()
        raise
    return 0


def _say(plan: Plan, file: Path) -> None:
    read_task(task_folder(plan, file))
    for number, block in enumerate(plan.blocks, 1):
        print(f"block {number}: {', '.join(block)}")
    runs = len(plan.methods) * plan.repetitions
    print(f"{file}: {in_runs(runs)} with {len(plan.devices)} devices take {in_hours(total_s(plan))}; next: regrow field run {file}")


# ---- annotate ------------------------------------------------------------------------------------------------------------------------


def annotate(options: argparse.Namespace) -> int:
    """Keep one line of what happens."""
    home = options.runs / GATEWAY_HOME
    if not home.is_dir():
        raise UsageError(f"{home} is not there: name the gateway's runs with --runs")
    text, at_s = " ".join(" ".join(options.text).split()), time.time() - options.ago
    if not text:
        raise UsageError("an annotation without words: say what happens, as in `regrow field annotate moved behind the wall`")
    keep_annotation(home, text, at_s)
    print(f"noted for {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at_s))}: {text}")
    return 0


@contextmanager
def typed_annotations(home: Path) -> Iterator[None]:
    """Every line that is typed is an annotation of its moment, for as long as the block takes; no line is waited for."""
    over = threading.Event()
    reader = threading.Thread(target=_read_lines, args=(home, over), name="annotations", daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def _read_lines(home: Path, over: threading.Event) -> None:
    """Until it is over, or nothing more can come. Not by `for line in sys.stdin`, which nobody can stop."""
    line = b""
    try:
        typed = sys.stdin.fileno()
        while not over.is_set():
            in_background = os.isatty(typed) and os.tcgetpgrp(typed) != os.getpgrp()  # where reading would stop the process
            if in_background or not select.select([typed], [], [], LOOK_S)[0]:
                over.wait(LOOK_S if in_background else 0.0)
                continue
            came = os.read(typed, 4096)
            *whole, line = (line + came).split(b"\n")
            for each in whole:
                _keep_line(home, each.decode(errors="replace").strip())
            if not came:
                return
    except (OSError, ValueError):  # no terminal, or it has gone
        return


def _keep_line(home: Path, text: str) -> None:
    if not text:
        return
    try:
        keep_annotation(home, text, time.time())
        print(f"noted: {text}", flush=True)
    except LocalError as error:
        print(f"regrow: not noted: {error}", file=sys.stderr, flush=True)


# ---- run -----------------------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Execute what a plan still lacks."""
    planned, runs = read_plan(options.plan), options.runs
    read_task(task_folder(planned, options.plan))
    runs.mkdir(parents=True, exist_ok=True)
    with open_field(runs, planned, options.plan) as field:
        _tell_of_the_dead(field)
        lacking = field.lacking()
        if lacking:
            for method in field.plan.methods:  # before anything begins: one that cannot be built would waste the others' time
                _task_of(field, method, len(field.plan.devices))
            link = link_of(options, runs / GATEWAY_HOME, resuming=False)
            try:
                conductor = _Conductor(options, field, link)
                with typed_annotations(runs / GATEWAY_HOME):
                    conductor.conduct(lacking)
            finally:
                link.stop()
        left = len(field.lacking())
    if left:
        stopped = conductor.stopped
        why = "stopped" if stopped else f"in some runs {EMPTY}, in each of {ATTEMPTS} attempts"
        print(f"{why}; {in_runs(left)} {'lacks' if left == 1 else 'lack'}, and the same command goes on from there")
        return 0 if stopped else 1
    print(f"{in_runs(len(repetitions_of(planned)))} done, none lacks; next: regrow field report {planned.name} --runs {runs}")
    return 0


def _tell_of_the_dead(field: FieldFolder) -> None:
    """Attempts whose process died have left a run and no word."""
    known = {step.run for step in field.steps if step.kind in ("run", "interrupted")}
    for repetition in repetitions_of(field.plan):
        for path in sorted(field.path.parent.parent.glob(f"{repetition.name}*/log.sqlite")):
            name = path.parent.name
            if name not in known:
                field.add(Step(kind="interrupted", at_s=time.time(), number=repetition.number, run=name, reason="the process died"))


def _task_of(field: FieldFolder, method: str, devices: int) -> Path:
    """The task's folder for the runs of one method: its own [method], [trigger], [restoration] and [stop]; it waits for so many devices."""
    source, folder = Path(field.plan.task), field.path / "tasks" / method
    task = read_task(source)
    for name in filter(None, (task.model, task.evaluation.data)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, folder / name)
    (folder / "task.toml").write_text(_settings_of(field, method, devices), encoding="utf-8")
    built(folder)
    return folder


def _settings_of(field: FieldFolder, method: str, devices: int) -> str:
    """The task.toml of `_task_of`."""
    tables: dict[str, Any] = tomllib.loads((Path(field.plan.task) / "task.toml").read_text())
    for section in ("method", "trigger", "restoration"):
        tables.pop(section, None)
    tables |= named(method)
    tables["method"] = {**tables["method"], "name": method}  # as the plan calls it, additions and ablations included
    tables["stop"] = {"seconds": field.plan.run_s}
    tables["fleet"] = {"min_devices": devices, **tables.get("fleet", {})}
    if tables.get("restoration", {}).get("trigger") in ("fixed", "mixed"):
        tables["restoration"] = {"planned_s": field.plan.run_s, **tables["restoration"]}
    return task_toml(tables, field.plan.name)


def _waits_for(plan: Plan, absent: Collection[str]) -> int:
    """How many devices a run waits for."""
    return max(len(plan.devices) - len(absent), 1)


class _Conductor:
    """Carries out repetitions until they are done or somebody stops it."""

    def __init__(self, options: argparse.Namespace, field: FieldFolder, link: Link) -> None:
        self._field, self._link, self._options = field, link, options
        self._home: Path = options.runs / GATEWAY_HOME
        self._stopped = threading.Event()
        self._absent: list[str] = []
        self._title = ""
        self._served = False

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it."""
        return self._stopped.is_set()

    def conduct(self, lacking: list[Repetition]) -> None:
        plan = self._field.plan
        where = {key: value for key, value in machine().items() if value is not None}
        facts = {"regrow": version(), **where, "system": platform.platform(), "broker": self._link.url.rpartition("@")[2]}
        self._field.add(Step(kind="began", at_s=time.time(), facts=facts))
        stop_at_signals(self._stopped.set, "stopping: a run that is not over yet is made again later")
        print(f"{plan.name}: {in_runs(len(lacking))}, {in_hours(len(lacking) * total_s(plan) / len(repetitions_of(plan)))}", flush=True)
        try:
            self._greet()
            for repetition in [each for each in lacking for _ in range(ATTEMPTS)]:
                if self._stopped.is_set():
                    return
                if repetition.number not in self._field.done():
                    self._repeat(repetition)
            self._gather()
        finally:
            announce(self._home, plan.devices, Field(number=1))
            until_s = time.monotonic() + GOODBYE_S
            self._listen(lambda: time.monotonic() >= until_s or not any((self._home / FOLDER).glob("*.json")))

    def _gather(self) -> None:
        """Let devices send what they still hold; what does not come now comes when a gateway runs again."""
        announce(self._home, self._field.plan.devices, Field(number=1))
        ended_s, known = time.time(), {name for step in self._field.steps if step.kind == "heard" for name in step.facts}
        print("waiting for the devices' last observations", flush=True)
        looked = [0.0, False]

        def over() -> bool:
            if time.time() >= looked[0] + 1.0:
                told = told_until(self._home, known)
                looked[:] = time.time(), all(told.get(name, 0.0) >= ended_s for name in known)
            return bool(looked[1]) or self._stopped.is_set() or time.time() >= ended_s + GATHER_S

        self._listen(over)

    def _greet(self) -> None:
        """Wait until every planned device has answered.

        Raises:
            LocalError: one did not.
        """
        left = self._announce(Field(number=1, name=self._field.plan.name, sample_hz=self._field.plan.sample_hz), self._options.patience_s)
        self._absent = left
        if left and not self._stopped.is_set():
            raise LocalError(
                f"{', '.join(left)} did not answer in {self._options.patience_s:g} s: start the agents there, or take them out of the plan"
            )

    def _repeat(self, repetition: Repetition) -> None:
        """Baseline, then the run."""
        field, plan = self._field, self._field.plan
        name, total, absent = field.run_name(repetition), len(repetitions_of(plan)), self._absent
        self._title = f"[{repetition.number}/{total}] {repetition.method}"
        if plan.baseline_s > 0:
            start_s = time.time() + plan.lead_s
            end_s, pulse_s = start_s + plan.baseline_s, start_s - plan.lead_s / 2
            print(f"{time.strftime('%H:%M:%S')} {self._title}: keeping still for {plan.baseline_s:g} s", flush=True)
            times = {"start_s": start_s, "end_s": end_s, "pulse_s": pulse_s}
            absent = self._announce(Field(number=1, name=plan.name, phase="baseline", sample_hz=plan.sample_hz, **times), plan.lead_s)
            self._listen(lambda: time.time() >= end_s or self._stopped.is_set())
            if self._stopped.is_set():
                return
            field.add(Step(kind="baseline", at_s=time.time(), number=repetition.number, run=name, start_s=start_s, end_s=end_s))
        task = _task_of(field, repetition.method, _waits_for(plan, absent))
        path = create_run(self._options.runs, built(task), name)  # before the start, for it takes a while
        start_s = time.time() + plan.lead_s
        times = {"start_s": start_s, "end_s": start_s + plan.run_s}
        absent = self._announce(Field(number=1, name=plan.name, phase="run", sample_hz=plan.sample_hz, **times), plan.lead_s)
        # The run must not wait for one that has gone since, nor begin without one that is back.
        (path / "task" / "task.toml").write_text(_settings_of(field, repetition.method, _waits_for(plan, absent)), encoding="utf-8")
        self._listen(lambda: time.time() >= start_s - EARLY_S or self._stopped.is_set())
        if not self._stopped.is_set():
            self._serve(repetition, path, start_s, tuple(absent))

    def _announce(self, said: Field, patience_s: float) -> list[str]:
        """Tell all devices, and wait so long for their answers; returns who did not answer."""
        plan = self._field.plan
        number = announce(self._home, plan.devices, said)
        until_s, told_s = time.monotonic() + patience_s, time.monotonic() + SAY_S

        def lacking() -> list[str]:
            answers = reports(self._home)
            return [name for name in plan.devices if name not in answers or answers[name].announced != number]

        def over() -> bool:
            nonlocal told_s
            left = lacking()
            if left and time.monotonic() >= told_s:
                told_s = time.monotonic() + SAY_S
                print(f"waiting for {', '.join(left)}", flush=True)
            return not left or time.monotonic() >= until_s or self._stopped.is_set()

        self._listen(over)
        answers = {name: heard for name, heard in reports(self._home).items() if name in plan.devices and heard.announced == number}
        facts = {
            name: {"software": heard.report.software, "meter": heard.report.meter, "offset_s": heard.offset_s, "error_s": heard.error_s}
            for name, heard in answers.items()
        }
        self._field.add(Step(kind="heard", at_s=time.time(), facts=facts))
        return lacking()

    def _listen(self, over: Callable[[], bool]) -> None:
        """Be there for the devices while no run is served."""
        with recorder_of(self._home) as recorder:
            if recorder is None:
                raise LocalError("another process records this gateway's observations: stop `regrow serve` first")
            herald = FieldHerald(self._home, recorder.note_clock)
            turn(self._link, [*self._link.companions, recorder, herald], over, self._link.sealing(f"field-{self._field.plan.name}"))

    def _serve(self, repetition: Repetition, path: Path, start_s: float, absent: tuple[str, ...]) -> None:
        """The run itself, in this process."""
        words = ["serve", str(path), "--runs", str(path.parent), "--plain"]
        options = parser("serve").parse_args([*words, "--takeover"] if self._served else words)  # from itself, without waiting
        options.in_force = []
        self._served = True
        step = Step(kind="interrupted", at_s=0.0, number=repetition.number, run=path.name, start_s=start_s, absent=absent)
        reason = "stopped"
        try:
            with _signals_kept():
                serve_run(options, path, self._link, self._progress())
            reason = facts_of(path).finished or reason
        except LocalError as error:
            reason = str(error)
            raise
        finally:
            facts = facts_of(path)
            if not facts.finished:
                self._stopped.set()
            elif facts.version == 0:
                reason = EMPTY
                print(f"{time.strftime('%H:%M:%S')} {self._title}: {EMPTY}, so this run does not count", flush=True)
            kind = "run" if facts.finished and facts.version > 0 else "interrupted"
            self._field.add(msgspec.structs.replace(step, kind=kind, at_s=time.time(), end_s=max(facts.last_s, start_s), reason=reason))

    def _progress(self) -> Callable[[Note], None]:
        """A line now and then."""
        said_s, updates = [time.monotonic()], [0]

        def note(note: Note) -> None:
            updates[0] += note.kind == "update"
            if note.kind == "aggregated" and time.monotonic() >= said_s[0] + SAY_S:
                said_s[0] = time.monotonic()
                score, fields = note.fields["global_score"], note.fields
                known = "not scored yet" if score is None else f"score {score:.3f}"
                print(
                    f"{time.strftime('%H:%M:%S')} {self._title}: {fields['elapsed_s']:.0f} of {self._field.plan.run_s:g} s, "
                    f"version {fields['version']}, {updates[0]} updates, density {fields['mean_density']:.2f}, {known}",
                    flush=True,
                )

        return note


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Give SIGINT and SIGTERM back to who had them, unless one of them came."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            for number, handler in before.items():
                signal.signal(number, handler)
