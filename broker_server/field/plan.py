"""The plan of a field run: a TOML file that says which methods run when, on which devices, and for how long.

Repetitions come in blocks. Each block has every method once, in an order of its own that is drawn from the seed: weather and radio drift
over hours, and what drifts meets all methods alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tomllib

from regrow.errors import UsageError
from regrow.methods import named
from regrow.topics import check_name

Seconds = Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)]
_TEXT = """# A field run of Regrow: `regrow field run {file}` executes it, `regrow field report {file}` reports it.
name = {name}
task = {task}                # the task's folder; a relative one counts from this file
devices = {devices}
methods = {methods}
repetitions = {repetitions}
seed = {seed}                # of the order below

# Before each run: {lead_s} s in which devices hear of it, then baseline_s in which they keep still, then run_s of training.
lead_s = {lead_s}
baseline_s = {baseline_s}
run_s = {run_s}
sample_hz = {sample_hz}          # of the power meters

# The order in time. A block has every method once; {runs} runs, {hours} in all.
blocks = [
{blocks}
]
"""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan file says.

    Args:
        task: folder of the task whose [method], [trigger], [restoration] and [stop] each run replaces by its own.
        lead_s: between the announcement of a phase and its start, so that all devices begin together.
        blocks: the methods in the order in which they run, a row a repetition.
    """

    name: str
    task: str
    devices: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=10_000)]
    methods: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=100)]
    repetitions: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    run_s: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)]
    baseline_s: Seconds = 60.0
    lead_s: Annotated[float, msgspec.Meta(ge=0.5, le=3600)] = 10.0
    sample_hz: Annotated[float, msgspec.Meta(gt=0, le=100)] = 10.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 1
    blocks: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Repetition:
    """One run of the plan; number and block count from 1."""

    number: int
    block: int
    method: str
    name: str


def drawn_blocks(methods: Sequence[str], repetitions: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Every method once in each block, in an order that the seed decides."""
    chance = random.Random(f"field/{seed}")
    return tuple(tuple(chance.sample(list(methods), len(methods))) for _ in range(repetitions))


def repetitions_of(plan: Plan) -> list[Repetition]:
    """The runs in their order."""
    order = [(block, method) for block, methods in enumerate(plan.blocks, 1) for method in methods]
    digits = len(str(len(order)))
    return [
        Repetition(number, block, method, f"{plan.name}-{number:0{digits}d}-{method.replace('+', '-')}")
        for number, (block, method) in enumerate(order, 1)
    ]


def total_s(plan: Plan) -> float:
    """How long the plan takes, when nothing is repeated."""
    return len(plan.methods) * plan.repetitions * (2 * plan.lead_s + plan.baseline_s + plan.run_s)


def in_hours(seconds: float) -> str:
    """As 3 h 20 min, or 45 s."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def checked(plan: Plan, place: str) -> Plan:
    """The plan with its blocks, drawn where it has none.

    Raises:
        UsageError: names are not what topics and runs may be called, a method is unknown or twice there, or a block lacks one.
    """
    try:
        check_name(plan.name, "name")
        for device in plan.devices:
            check_name(device, "device")
        for method in plan.methods:
            named(method)
        for what, names in (("device", plan.devices), ("method", plan.methods)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UsageError(f"{what} {twice[0]} is there twice; name each once")
        plan = plan if plan.blocks else msgspec.structs.replace(plan, blocks=drawn_blocks(plan.methods, plan.repetitions, plan.seed))
        if len(plan.blocks) != plan.repetitions:
            raise UsageError(f"{len(plan.blocks)} blocks for {plan.repetitions} repetitions; leave `blocks` out to have them drawn")
        for number, block in enumerate(plan.blocks, 1):
            if sorted(block) != sorted(plan.methods):
                raise UsageError(f"block {number} is {', '.join(block)}; each block has every method once")
        for repetition in repetitions_of(plan):
            check_name(f"{repetition.name}-99", "name of a run,")
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    return plan


def read_plan(file: Path) -> Plan:
    """The plan in a file.

    Raises:
        UsageError: it cannot be read, or is no plan; with the place and the cure.
    """
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file}: {error}; `regrow field plan` writes a plan") from error
    return plan_from(said, str(file))


def plan_from(said: dict[str, Any], place: str) -> Plan:
    """The plan that a plan's file or options say; every bound is checked before blocks are drawn.

    Raises:
        UsageError: it is no plan; with the place.
    """
    try:
        plan = msgspec.convert(said, Plan)
    except msgspec.ValidationError as error:
        raise UsageError(f"{place}: {error}") from error
    return checked(plan, place)


def task_folder(plan: Plan, file: Path) -> Path:
    """The task's folder, which may be said relative to the plan's file."""
    return file.parent / plan.task


def plan_text(plan: Plan, file: str) -> str:
    """A plan as people read it; `read_plan` gives the same plan back."""
    return _TEXT.format(
        file=file,
        name=_said(plan.name),
        task=_said(plan.task),
        devices=_said(list(plan.devices)),
        methods=_said(list(plan.methods)),
        repetitions=plan.repetitions,
        seed=plan.seed,
        lead_s=_number(plan.lead_s),
        baseline_s=_number(plan.baseline_s),
        run_s=_number(plan.run_s),
        sample_hz=_number(plan.sample_hz),
        runs=len(plan.methods) * plan.repetitions,
        hours=in_hours(total_s(plan)),
        blocks="\n".join(f"    {_said(list(block))}," for block in plan.blocks),
    )


def _said(value: object) -> str:
    """JSON's text and lists are TOML's."""
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
