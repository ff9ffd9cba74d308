"""What has been done of a field run: RUNS/.fields/NAME with a copy of the plan and a line for each step, so that it can go on.

.fields/NAME/plan.toml      the plan as it is executed; another one of this name is refused
.fields/NAME/steps.jsonl    a `Step` a line, each durable before the next thing is done
.fields/NAME/tasks/METHOD   the task as the runs of a method have it
.fields/NAME/lock           held by the `regrow field run` that executes it
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from broker_server.durable import sync_folder, write_private
from broker_server.field.plan import Plan, Repetition, plan_text, read_plan, repetitions_of
from regrow.errors import LocalError, UsageError

FIELDS = ".fields"


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened.

    kind: "began", a process took the plan up, with what it and its broker are in `facts`; "heard", what devices answered to an
    announcement; "baseline" and "run", a phase that is over; "interrupted", a run that was stopped before its end and does not count.
    number, run: of the repetition. start_s, end_s: unix seconds of the gateway. reason: why it ended. absent: planned devices that had
    not answered before it.
    """

    kind: Literal["began", "heard", "baseline", "run", "interrupted"]
    at_s: float
    number: int = 0
    run: str = ""
    start_s: float = 0.0
    end_s: float = 0.0
    reason: str = ""
    absent: tuple[str, ...] = ()
    facts: dict[str, Any] = {}


class FieldFolder:
    """The memory of one field run; made by `open_field` (to execute) or `read_field` (to look)."""

    def __init__(self, path: Path, plan: Plan, steps: list[Step]) -> None:
        self.path, self.plan, self.steps = path, plan, steps

    def done(self) -> dict[int, Step]:
        """The step "run" of every repetition that was run to its end, by number."""
        return {step.number: step for step in self.steps if step.kind == "run"}

    def lacking(self) -> list[Repetition]:
        """The repetitions that are still to be run, in order."""
        done = self.done()
        return [repetition for repetition in repetitions_of(self.plan) if repetition.number not in done]

    def run_name(self, repetition: Repetition) -> str:
        """The name of the next attempt's run: an interrupted one keeps its own."""
        tries = list(self.path.parent.parent.glob(f"{repetition.name}*"))
        return repetition.name if not tries else f"{repetition.name}-{len(tries) + 1}"

    def add(self, step: Step) -> None:
        """Keep a step, durably."""
        file = self.path / "steps.jsonl"
        with file.open("ab") as out:
            out.write(msgspec.json.encode(step) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        if not self.steps:
            sync_folder(self.path)
        self.steps.append(step)


@contextmanager
def open_field(runs: Path, plan: Plan, file: Path) -> Iterator[FieldFolder]:
    """The folder of the plan's field run, for the one process that executes it; made where there is none.

    Raises:
        LocalError: another process executes it, or its steps cannot be read.
        UsageError: one of this name was begun with another plan.
    """
    path = runs / FIELDS / plan.name
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(f"{path} is in use: another `regrow field run` executes {plan.name}") from None
        copy, text = path / "plan.toml", plan_text(_absolute(plan, file), file.name)
        if not copy.exists():
            write_private(copy, text.encode())
        elif read_plan(copy) != _absolute(plan, file):
            raise UsageError(f"{file}: {plan.name} was begun with another plan ({copy}); give this one another name")
        steps = _steps(path / "steps.jsonl", mend=True)
        yield FieldFolder(path, plan, steps)


def read_field(runs: Path, name: str) -> FieldFolder:
    """What has been done of a field run; a process may be at it.

    Raises:
        UsageError: there is none of this name.
    """
    path = runs / FIELDS / name
    if not (path / "plan.toml").is_file():
        known = ", ".join(sorted(each.parent.name for each in (runs / FIELDS).glob("*/plan.toml"))) or "none"
        raise UsageError(f"no field run {name!r} in {runs}: begun were {known}; `regrow field run` begins one")
    return FieldFolder(path, read_plan(path / "plan.toml"), _steps(path / "steps.jsonl"))


def field_of(run: Path) -> str | None:
    """The field run that a run was made for, finished or not; None where there is none."""
    for file in sorted((run.parent / FIELDS).glob("*/plan.toml")):
        if run.name.startswith(f"{file.parent.name}-"):
            names = "|".join(re.escape(repetition.name) for repetition in repetitions_of(read_plan(file)))
            if re.fullmatch(rf"({names})(-\d+)?", run.name):
                return file.parent.name
    return None


def _absolute(plan: Plan, file: Path) -> Plan:
    """The plan with a task that does not depend on where the file lies."""
    return msgspec.structs.replace(plan, task=str((file.parent / plan.task).resolve()))


def _steps(file: Path, *, mend: bool = False) -> list[Step]:
    """The steps of a file; a torn last line, which a power cut leaves, is passed over, and with `mend` cut off."""
    data = file.read_bytes() if file.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(file, len(whole))
    steps = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            steps.append(msgspec.json.decode(line, type=Step))
        except msgspec.DecodeError as error:
            raise LocalError(f"{file}:{number}: {error}; restore the file from a backup, or begin a field run of another name") from error
    return steps


def in_runs(count: int) -> str:
    """A number of runs in words."""
    return f"{count} run" if count == 1 else f"{count} runs"


def task_toml(tables: Mapping[str, Any], name: str) -> str:
    """task.toml's text for these tables; parsing it gives them back.

    Args:
        name: of the plan, for its first line.
    """
    lines = [f"# Made by `regrow field run` for {name}."]
    lines += [f"{key} = {_value(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for section, values in tables.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(str(key))} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return repr(value)
