"""task.toml: every key has a default, and everything else is an error that names its line."""

from __future__ import annotations

import re
import sys
from typing import Any, get_args

import msgspec
import pytest

from regrow.errors import LocalError
from regrow.local_step import Step
from regrow.task import Section, Task, parse_task

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the gateway reads task.toml, and it runs on Python 3.11 and newer")

SECTIONS: dict[str, type[Section | Step]] = {
    field.name: field.type
    for field in msgspec.structs.fields(Task)
    if isinstance(field.type, type) and issubclass(field.type, Section | Step)
}
OTHER_PROBLEMS = {("restoration", "trigger"), ("wire", "versions_held"), ("wire", "versions_on_broker")}


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def refused(text: str) -> tuple[str, int]:
    """(message, line) of a refusal."""
    with pytest.raises(LocalError) as caught:
        parse_task(text, "my.toml")
    found = re.match(r"my\.toml:(\d+): (.*)", str(caught.value), re.S)
    assert found, f"no line in {caught.value}"
    return found.group(2), int(found.group(1))


def test_a_name_is_enough() -> None:
    task = parse_task('name = "toy"')
    assert task == Task(name="toy")


def test_without_a_name_it_is_refused() -> None:
    with pytest.raises(LocalError, match="name"):
        parse_task("seed = 3")


def test_text_that_is_not_toml_names_its_line() -> None:
    with pytest.raises(LocalError, match=r"my\.toml: .*line 2"):
        parse_task('name = "toy"\nseed = = 3', "my.toml")


def test_an_unknown_key_at_the_top() -> None:
    assert refused('name = "toy"\n\nmodle = "x.onnx"') == ("Object contains unknown field `modle`", 3)


def test_an_unknown_table() -> None:
    message, line = refused('name = "toy"\n[trainng]\nbatch = 3')
    assert "trainng" in message
    assert line == 2


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_in_a_table(section: str) -> None:
    message, line = refused(f'name = "toy"\n# a comment\n[{section}]\nno_such_key = 1')
    assert f"$.{section}" in message
    assert "no_such_key" in message
    assert line == 4


def owners(key: str) -> set[str]:
    return {section for section, kind in SECTIONS.items() if key in kind.__struct_fields__}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_in_the_wrong_table(section: str) -> None:
    for other, kind in SECTIONS.items():
        for key in kind.__struct_fields__:
            if section not in owners(key):
                line = f'name = "toy"\n[{other}]\n[{section}]\n{key} = 1'
                if other == section:
                    continue
                message, number = refused(line)
                assert key in message
                assert number == 4


def bounds() -> list[tuple[str, str, Any]]:
    """(section, key, a value just outside) for every numeric bound of every key."""
    found: list[tuple[str, str, Any]] = []
    sections: dict[str, type[msgspec.Struct]] = {"": Task, **SECTIONS}
    for section, kind in sections.items():
        for field in msgspec.structs.fields(kind):
            for part in (field.type, *get_args(field.type)):
                for meta in getattr(part, "__metadata__", ()):
                    whole = get_args(part)[0] is int
                    step = 1 if whole else 1e-6
                    if meta.ge is not None:
                        found.append((section, field.name, meta.ge - step))
                    if meta.gt is not None:
                        found.append((section, field.name, meta.gt))
                    if meta.le is not None:
                        found.append((section, field.name, meta.le + (1 if whole else max(1e-6, meta.le * 1e-6))))
                    if meta.lt is not None:
                        found.append((section, field.name, meta.lt))
    return found


def is_number(field: msgspec.structs.FieldInfo) -> bool:
    return float in (get_args(field.type) or [None]) or any(float in get_args(part) for part in get_args(field.type))


def test_every_number_has_a_bound() -> None:
    bounded = {(section, key) for section, key, _ in bounds()}
    for section, kind in SECTIONS.items():
        for field in msgspec.structs.fields(kind):
            if type(field.default) in (int, float):
                assert (section, field.name) in bounded, f"{section}.{field.name} takes any number"


@pytest.mark.parametrize(("section", "key", "value"), bounds())
def test_a_number_just_outside_its_bound(section: str, key: str, value: Any) -> None:
    head = f"[{section}]\n" if section else ""
    message, line = refused(f'name = "toy"\n{head}{key} = {value}')
    assert key in message
    assert line == (3 if section else 2)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("section", "key"),
    sorted({(section, field.name) for section, kind in SECTIONS.items() for field in msgspec.structs.fields(kind) if is_number(field)}),
)
def test_a_number_that_is_not_finite(section: str, key: str, number: str) -> None:
    with pytest.raises(LocalError, match=key):
        parse_task(f'name = "toy"\n[{section}]\n{key} = {number}')


@pytest.mark.parametrize("section", SECTIONS)
def test_a_value_of_another_type(section: str) -> None:
    for field in msgspec.structs.fields(SECTIONS[section]):
        wrong = '"text"' if not isinstance(field.default, (str, type(None))) else "[3]"
        message, line = refused(f'name = "toy"\n[{section}]\n\n{field.name} = {wrong}')
        assert field.name in message
        assert line == 4


@pytest.mark.parametrize(
    ("table", "why", "line"),
    [
        ("[method]\nladder = [0.5, 0.2, 1.0]", "ascend", 3),
        ("[method]\nladder = [0.5, 0.5, 1.0]", "ascend", 3),
        ("[method]\nladder = [0.5]", "1.0", 3),
        ("[method]\nladder = []", "ladder", 3),
        ("[method]\nladder = [0.0, 1.0]", "ladder", 3),
        ('[restoration]\ntrigger = "fixed"', "planned_s", 3),
        ("[wire]\nversions_held = 3\nversions_on_broker = 5", "at least versions_on_broker", 3),
        ('[method]\nname = "fedavgg"', "fedavgg", 3),
        ('[method]\ngranularity = "unit"\nlocal = "personal_masks"', "single weights", 4),
        ('[method]\nlocal = "dropout"', "dropout", 3),
        ('[method]\naggregation = "recombine"', 'density = "full"', 3),
        ('[method]\nname = "fedmr"\naggregation = "recombine"\n[trigger]\nkind = "arrival"', 'kind = "all"', 4),
        ('[method]\nname = "fedmr"\nweigh_by_examples = true', "weigh_by_examples", 4),
        ('[method]\nname = "fjord"\n[training]\noptimizer = "adam"', 'set "sgd"', 5),
        ('[method]\nlocal = "ordered_dropout"\n[training]\nproximal_mu = 0.1', "take it out", 5),
        ('[method]\ngranularity = "unit"\n[training]\ntrain_last = 2', 'granularity = "weight"', 5),
        ("[training]\nmomentum = 0.5", 'optimizer = "momentum" or optimizer = "nesterov"', 3),
        ('[training]\nbatch = 3\noptimizer = "adam"\nhuber_delta = 2', 'loss = "huber"', 5),
        ('[training]\nloss = "mse"\nlabel_smoothing = 0.1', 'loss = "cross_entropy"', 4),
        ('[training]\ntarget = "input"', 'loss = "mse"', 3),
    ],
)
def test_what_does_not_fit_together(table: str, why: str, line: int) -> None:
    message, number = refused(f'name = "toy"\n{table}')
    assert why in message
    assert number == line


@pytest.mark.parametrize("name", ["", "Toy", "toy task", "a" * 64, "device"])
def test_a_name_that_is_no_topic(name: str) -> None:
    with pytest.raises(LocalError, match=r"my\.toml.*(use 1 to 63|reserved)"):
        parse_task(f'name = "{name}"', "my.toml")


def test_every_default_can_be_written_down() -> None:
    lines = ['name = "toy"']
    for section, kind in SECTIONS.items():
        lines.append(f"[{section}]")
        for field in msgspec.structs.fields(kind):
            value = field.default if field.default is not msgspec.NODEFAULT else {}
            if value is not None and value != {}:
                lines.append(f"{field.name} = {toml(value)}")
    assert parse_task("\n".join(lines)) == Task(name="toy")
