"""Writes the parts of the documentation that the code already says: `python -m tests.docs.generate`.

A generated part lies between `<!-- generated: NAME -->` and `<!-- end -->`. What code cannot say (what a field means) stands in
words.py; a field without words is a KeyError here, and so a failing test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from msgspec import inspect

from broker_server import credentials
from broker_server.fleet.boards import SYSTEMS
from broker_server.observations import SCHEMA, TABLES
from cli.doctor import fleet_checks, gateway_checks
from cli.main import parser
from edge_agent.doctor.device import Subject, device_checks, live_checks
from export.lowering import REPLACED
from export.rules import RULES
from regrow import coordinator, device, observations, topics, wire
from regrow.methods import METHODS
from regrow.task import Task
from tests.docs import words

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "architecture.md",
    "bring-your-own.md",
    "cli.md",
    "deploy.md",
    "doctor.md",
    "images.md",
    "protocol.md",
    "store.md",
    "task.md",
    "zoo.md",
)
PAGES = tuple(Path("docs") / name for name in NAMES)
ZOO, STEPS, SEALS = (ROOT / "bench" / "results" / name for name in ("zoo.json", "train_step.json", "seal.json"))
_REGION = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write every generated part anew."""
    for page in PAGES:
        file = ROOT / page
        file.write_text(regenerated(file.read_text()))
    return 0


def regenerated(text: str) -> str:
    """The page with every generated part as the code says it now."""
    return _REGION.sub(lambda found: f"{found[1]}\n{part(found[2])}\n{found[3]}", text)


def part(name: str) -> str:
    """The Markdown of one generated part, for example "wire:Hello" or "cli"."""
    kind, _, what = name.partition(":")
    return _PARTS[kind](what)


# ---- the command line ----------------------------------------------------------------------------------------------------------------


def commands(top: argparse.ArgumentParser | None = None) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(command line, its parser) of every command, groups included, in the order of --help."""
    top = top or parser()
    yield top.prog, top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from commands(child)


def _cli(_: str) -> str:
    with patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        return "\n".join(f"## {name}\n\n```text\n{command.format_help().rstrip()}\n```\n" for name, command in commands())


# ---- methods -------------------------------------------------------------------------------------------------------------------------


def _methods(_: str) -> str:
    """What every name of a method chooses, over the defaults of the tables."""
    sections = ("method", "trigger", "restoration")
    rows = [(f"`{name}`", *(_settings(tables.get(section, {})) for section in sections)) for name, tables in METHODS.items()]
    return table(("name", *(f"[{section}]" for section in sections)), rows)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in values.items()) or "-"


def _systems(_: str) -> str:
    """Boards, systems, Pythons, and what was tried."""
    rows = [
        (f"`{system.name}`", system.title, system.boards, system.python or "3.10 to 3.13", system.form, system.tried)
        for system in SYSTEMS.values()
    ]
    return table(("`--os`", "system", "boards", "Python", "first boot reads", "tried"), rows)


# ---- structs -------------------------------------------------------------------------------------------------------------------------


def _wire(name: str) -> str:
    """The table of one struct of wire.py or observations.py: in the order of the array, or of the map's keys."""
    struct = getattr(wire, name, None) or getattr(observations, name)
    info: Any = inspect.type_info(struct)
    rows = [(f"`{f.name}`", type_text(f.type), default_text(f), words.WIRE[f"{name}.{f.name}"]) for f in info.fields]
    if struct.__struct_config__.tag is not None:
        rows.insert(0, ("kind", f'`"{struct.__struct_config__.tag}"`', "required", "Which kind of row this is."))
    if struct.__struct_config__.array_like:
        numbered = ((str(place), *row) for place, row in enumerate(rows))
        return table(("place", "field", "type and bounds", "default", "meaning"), numbered)
    return table(("field", "type and bounds", "default", "meaning"), rows)


def _observations(_: str) -> str:
    """Every column that SQLite makes of the schema."""
    rows = []
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY rowid")]
        for name in names:
            for _, column, kind, is_needed, _, is_key in db.execute(f"PRAGMA table_info({name})"):
                shown = kind if is_needed or is_key else f"{kind} or NULL"
                rows.append((f"`{name}`", f"`{column}`", shown, _meaning(name, column)))
    return table(("table", "column", "type", "meaning"), rows)


def _meaning(name: str, column: str) -> str:
    if name in TABLES and column in TABLES[name].__struct_fields__:
        return words.WIRE[f"{TABLES[name].__name__}.{column}"]
    return words.OBSERVATIONS.get(f"{name}.{column}") or words.OBSERVATIONS[column]


def _task(section: str) -> str:
    """The table of one section of task.toml; "" is the top."""
    info: Any = inspect.type_info(Task)
    fields = info.fields if not section else next(field.type.fields for field in info.fields if field.encode_name == section)
    rows = []
    for field in fields:
        if isinstance(field.type, inspect.StructType):
            continue
        meaning, source = words.TASK[f"{section}.{field.encode_name}".lstrip(".")]
        rows.append((f"`{field.encode_name}`", type_text(field.type), default_text(field), meaning, source))
    return table(("key", "type", "default", "meaning", "source"), rows)


def type_text(kind: Any) -> str:
    """A msgspec type with its bounds, in words."""
    if isinstance(kind, inspect.UnionType):
        return " or ".join(type_text(member) for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f'`"{value}"`' for value in kind.values)
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        return "int" * isinstance(kind, inspect.IntType) + "float" * isinstance(kind, inspect.FloatType) + _bounds(kind)
    if isinstance(kind, inspect.BytesType):
        size = f"{kind.max_length}" if kind.min_length == kind.max_length else f"at most {kind.max_length}"
        return f"bytes, {size}"
    if isinstance(kind, inspect.StrType):
        return _string(kind)
    if isinstance(kind, inspect.DictType):
        return f"table: name to {type_text(kind.value_type)}"
    if isinstance(kind, inspect.StructType):
        return f"`{kind.cls.__name__}`"
    if isinstance(kind, (inspect.ListType, inspect.VarTupleType)):
        least, most = kind.min_length or 0, kind.max_length
        return f"array of {least} to {most}: {type_text(kind.item_type)}"
    return type(kind).__name__.removesuffix("Type").lower()


def _string(kind: inspect.StrType) -> str:
    if kind.pattern is None:
        return "str" if kind.max_length is None else f"str, at most {kind.max_length} characters"
    body = re.sub(r"^\^|(\\Z|\$)$", "", kind.pattern)
    names = body.strip("()").split("|")
    return " or ".join(f'`"{name}"`' for name in names) if len(names) > 1 else f"str `{body}`"


def _bounds(kind: Any) -> str:
    """ ", 1 to 64", ", at least 0, below 1", ", above 0": whatever is bounded."""
    if kind.ge is not None and kind.le is not None:
        return f", {number(kind.ge)} to {number(kind.le)}"
    limits = (("above", kind.gt), ("at least", kind.ge), ("below", kind.lt), ("at most", kind.le))
    return "".join(f", {word} {number(limit)}" for word, limit in limits if limit is not None)


def number(value: float) -> str:
    """A bound as people write it: 2^53 rather than sixteen digits."""
    named = {2**53: "2^53", 2**32 - 1: "2^32 - 1", 2**31 - 1: "2^31 - 1", 10**12: "10^12"}
    return named.get(int(value), f"{value:g}" if isinstance(value, float) else str(value))


def default_text(field: inspect.Field) -> str:
    """What a missing field means: `required`, `-` for nothing, or the value."""
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{list(value) if isinstance(value, tuple) else value}`"


# ---- state machines and access -------------------------------------------------------------------------------------------------------


def _transitions(name: str) -> str:
    """One row an event and handler, with the phases in which it is heard."""
    module = {"coordinator": coordinator, "device": device}[name]
    transitions: Mapping[tuple[Any, Any], Callable[..., None]] = module.TRANSITIONS
    phases: dict[tuple[str, str], list[str]] = {}
    for (phase, event), handler in transitions.items():
        kind = event if isinstance(event, str) else event.__name__
        phases.setdefault((kind, handler.__name__), []).append(phase.value)
    rows = []
    for (kind, name_of_handler), heard in phases.items():
        where = "any" if len(heard) == len(module.Phase) else ", ".join(heard)
        what = f"message `{kind}`" if kind.islower() else f"`{kind}`"
        rows.append((where, what, f"`{name_of_handler}`", words.HANDLERS[f"{name}.{name_of_handler}"]))
    return table(("phase", "event", "handler", "what it does, and the phase after it"), rows)


def _phases(name: str) -> str:
    module = {"coordinator": coordinator, "device": device}[name]
    return table(("phase", "meaning"), ((f"`{phase.value}`", words.PHASES[f"{name}.{phase.value}"]) for phase in module.Phase))


class _Shown(bytes):
    """Stands for a digest in a topic."""

    def hex(self, *_: Any) -> str:
        return "{digest}"


def _topics(_: str) -> str:
    """Every topic, built by the functions that build the real ones."""
    run: Any = topics.Run("{task}", "{run}")
    shown = {
        "hello": topics.hello("{id}"),
        "status": topics.status("{id}"),
        "tasks": topics.tasks("{id}"),
        "claim": topics.claim("{task}"),
        "manifest": run.manifest("{version}"),
        "chunk": run.chunk("{version}", "{i}"),
        "order": run.order("{epoch}", "{level}", "{i}"),
        "program": run.program(_Shown(), "{i}"),
        "assignment": run.assignment("{id}"),
        "update": run.update("{id}", "{sequence}", "{i}"),
        "receipt": run.receipt("{id}"),
        "telemetry": run.telemetry("{id}"),
        "probe": run.probe("{id}"),
        "promotion": topics.promotion("{task}"),
        "promoted_file": topics.promoted_file("{task}", _Shown(), "{i}"),  # type: ignore[arg-type]  # a place for the number
        "promotion_report": topics.promotion_report("{id}", "{task}"),
        "release": topics.release("{id}"),
        "release_file": topics.release_file(_Shown(), "{i}"),  # type: ignore[arg-type]  # a place for the number
        "release_report": topics.release_report("{id}"),
        "control": topics.control("{id}"),
        "control_report": topics.control_report("{id}"),
        "certificate_request": topics.certificate_request("{id}"),
        "certificate": topics.certificate("{id}"),
        "doctor_request": topics.doctor_request("{id}"),
        "doctor_report": topics.doctor_report("{id}"),
        "doctor_echo": topics.doctor_echoes("{id}")[0],
    }
    rows = []
    for name, topic in shown.items():
        publisher, retained, payload = words.TOPICS[name]
        rows.append((f"`{topic}`", publisher, retained, "yes" if topics.is_sealed(topic) else "no", payload))
    return table(("topic", "publisher", "retained", "sealed", "payload"), rows)


def _doctor(_: str) -> str:
    """Every check, and where it is made: on a device, by an agent that is asked, on a gateway."""
    subject = Subject("d", "mqtts://gateway", None, Path("state"), identity=Path("identity"))
    made = {
        "device": device_checks(subject, {}),
        "asked": live_checks(subject, lambda: None),
        "gateway": [*gateway_checks(Path("runs"), "mqtt://broker"), *fleet_checks(Path("fleet"))],
    }
    names = {place: [name for check in checks for name in check.names] for place, checks in made.items()}
    names["asked"] += ["broker.rights", "model.fit"]  # the first on the agent's own link, the second on the gateway
    every = dict.fromkeys(name for found in names.values() for name in found)
    rows = [(f"`{name}`", *("yes" if name in found else "" for found in names.values()), words.DOCTOR[name]) for name in every]
    return table(("check", "on a device", "asked far away", "on a gateway", "what is looked at"), rows)


def _access(_: str) -> str:
    rows = [(f"`{credentials.COORDINATOR}`", "read and write", f"`{rule}`") for rule in credentials.COORDINATOR_TOPICS]
    for verb, rules in (("write", credentials.DEVICE_WRITES), ("read", credentials.DEVICE_READS)):
        rows += [("each device", verb, f"`{rule}`") for rule in rules]
    return table(("user", "may", "topics"), rows)


def _mosquitto_access(_: str) -> str:
    return f"```text\n{credentials._mosquitto_access()}```\n"


def _operators(_: str) -> str:
    return ", ".join(f"`{op}`" for op in sorted({*RULES, *REPLACED})) + ".\n"


def _zoo_gradients(_: str) -> str:
    head = ("model", "parameters", "worst error", "of torch in float32", "allowed", "decisions that differed", "moved by at most")
    rows = json.loads(ZOO.read_text())["gradients"]
    return table(
        head,
        (
            (
                row["model"],
                f"{row['parameters']:,}".replace(",", " "),
                *(f"{row[key]:.1e}" for key in ("worst", "worst_of_torch", "bound")),
                str(row["otherwise"]),
                f"{row['moved']:.1e}" if row["otherwise"] else "",
            )
            for row in rows
        ),
    )


def _zoo_curves(_: str) -> str:
    head = ("model", "width", "data", "optimizer", "steps", "inside", "twin inside", "furthest from the twin", "between least and most")
    rows = json.loads(ZOO.read_text())["curves"]

    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    return table(
        head,
        (
            (
                *(row["model"], f"{row['width']:g}", row["data"], row["optimizer"], str(row["steps"])),
                *(
                    share(row[key])
                    for key in ("share_inside", "share_inside_of_twin", "furthest_from_twin", "share_between_least_and_most")
                ),
            )
            for row in rows
        ),
    )


def _train_step(_: str) -> str:
    """Each model's row, and the geometric means below."""
    result = json.loads(STEPS.read_text())
    keys = ("time_ratio", "peak_ratio")
    rows = {(row["model"], row["threads"]): row for row in result["rows"]}
    names = list(dict.fromkeys(model for model, _ in rows))
    lines = [(name, *(f"{rows[name, count][key]:.2f}" for key in keys for count in (1, 2))) for name in names]
    means = tuple(f"{result['means'][f'{key}_{count}']:.2f}" for key in keys for count in ("1_thread", "2_threads"))
    head = ("model", "time, 1 thread", "time, 2 threads", "memory, 1 thread", "memory, 2 threads")
    return table(head, [*lines, ("geometric mean", *means)])


def _seal_cost(_: str) -> str:
    """Bytes and microseconds of a message, bare and sealed."""
    rows = json.loads(SEALS.read_text())["messages"]
    head = ("message", "bytes, bare", "sealed", "us to write", "to seal besides", "to read", "to open before")
    keys = ("bytes", "sealed_bytes", "encode_us", "seal_us", "decode_us", "open_us")
    return table(head, ((name, *(f"{row[key]:g}" for key in keys)) for name, row in rows.items()))


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table; cells are escaped where they would end early."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


_PARTS: Mapping[str, Callable[[str], str]] = {
    "access": _access,
    "cli": _cli,
    "doctor": _doctor,
    "methods": _methods,
    "mosquitto-access": _mosquitto_access,
    "observations": _observations,
    "operators": _operators,
    "phases": _phases,
    "seal-cost": _seal_cost,
    "task": _task,
    "topics": _topics,
    "train-step": _train_step,
    "transitions": _transitions,
    "wire": _wire,
    "systems": _systems,
    "zoo-curves": _zoo_curves,
    "zoo-gradients": _zoo_gradients,
}

if __name__ == "__main__":
    sys.exit(main())
