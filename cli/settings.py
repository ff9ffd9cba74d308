"""Settings of a command from its file, the environment and the command line; the later ones win.

Strategy: what argparse knows of a command is the only list of settings. Each option (but those for one start only) is a key of the file
that --config names and a variable REGROW_KEY; its own type and choices check all three. The file is one flat list of `key = value`, a
part of TOML that Python 3.10 can read too, and whose lines an error can name.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.arguments import FOR_ONE_START
from regrow.errors import UsageError

PREFIX = "REGROW_"
NO_SETTINGS = ("REGROW_OPTIONS", "REGROW_CACHE")  # flags of the units; where the demo keeps its data
_LINE = re.compile(
    r"""\s*(?:(?P<key>[A-Za-z0-9_-]+)\s*=\s*(?P<value>"(?:[^"\\\x00-\x1f\x7f]|\\["\\bfnrt]|\\u(?!d[89a-f])[0-9a-f]{4})*"|'[^'\x00-\x08\x0a-\x1f\x7f]*'"""
    r"""|true|false|[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*)?(?:\#[^\x00-\x08\x0a-\x1f\x7f]*)?""",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"(://[^/:@]*:)[^/@]+@")
_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_UNSET: Any = object()
_Switch = argparse._StoreTrueAction


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is in force; source: "default", "needed", FILE:LINE, the variable, or "flag"."""

    name: str
    value: Any
    source: str

    @property
    def text(self) -> str:
        """The value for people: without its password."""
        return "-" if self.value is None else _PASSWORD.sub(r"\1***@", str(self.value))


def parse(top: argparse.ArgumentParser, name: str | None, words: Sequence[str], known: Callable[[], set[str]]) -> argparse.Namespace:
    """What `top.parse_args(words)` gives, with what the file and the environment say where the words say nothing.

    Args:
        name: of the command; one without --config has no other settings than its words.
        known: the variables that any command reads, asked for when there is one that this command does not know.

    Raises:
        UsageError: the file, a variable, or a required setting that is nowhere.
        SystemExit: the words are wrong, or ask for help; as argparse.
    """
    command = command_of(top, name)
    if command is None or not _configurable(command) or {"-h", "--help"} & set(words):
        return top.parse_args(words)
    options, settings = gather(top, command, words, known)
    options.in_force = [(setting.name, setting.text, setting.source) for setting in settings]  # for the gateway's page
    missing = [setting.name for setting in settings if setting.source == "needed"]
    if missing:
        alone = [group for group in command._mutually_exclusive_groups if missing[0] in {action.dest for action in group._group_actions}]
        first = " or ".join(action.dest for action in alone[0]._group_actions) if alone else missing[0]
        where = f"as an option, in {options.config}, or as {_variable(missing[0])} in the environment"
        raise UsageError(f"{command.prog} needs {first}: {where}")
    return options


def gather(
    top: argparse.ArgumentParser, command: argparse.ArgumentParser, words: Sequence[str], known: Callable[[], set[str]]
) -> tuple[argparse.Namespace, list[Setting]]:
    """(the options, where each setting comes from). Changes the parser, which then serves for nothing else.

    Raises:
        UsageError, SystemExit: as `parse`, but a setting that is nowhere is named with the source "needed".
    """
    actions = {action.dest: action for action in _settings_of(command)}
    needed = {name for name, action in actions.items() if action.required}
    groups = [tuple(action.dest for action in group._group_actions) for group in command._mutually_exclusive_groups if group.required]
    defaults = _forget_defaults(command, actions.values())
    options = top.parse_args(words)
    file = _file_of(command, options, defaults)
    below = _from_file(file, actions, command.prog) if file is not None else {}
    below |= _from_environment(actions, known)
    _let_the_later_win(command, options, below)
    settings = []
    for name in actions:
        if getattr(options, name) is not _UNSET:
            setting = Setting(name, getattr(options, name), "flag")
        else:
            setting = below.get(name) or Setting(name, defaults[name], "needed" if name in needed else "default")
        setattr(options, name, setting.value)
        settings.append(setting)
    return options, _with_groups(settings, groups)


def _let_the_later_win(command: argparse.ArgumentParser, options: argparse.Namespace, below: dict[str, Setting]) -> None:
    """Of settings that exclude each other, forget the one of the file where the environment has another, and both where a flag has."""
    for group in command._mutually_exclusive_groups:
        names = [action.dest for action in group._group_actions]
        said = {name: below[name] for name in names if name in below}
        by_flag = any(getattr(options, name) is not _UNSET for name in names)
        by_variable = any(setting.source.startswith(PREFIX) for setting in said.values())
        for name, setting in said.items():
            if by_flag or (by_variable and not setting.source.startswith(PREFIX)):
                del below[name]
        left = [below[name] for name in names if name in below]
        if len(left) > 1:
            raise UsageError(f"{left[1].source}: {left[1].name} and {left[0].name} ({left[0].source}) exclude each other")


def _with_groups(settings: list[Setting], groups: Sequence[tuple[str, ...]]) -> list[Setting]:
    """Where none of a required group is said, all of it is needed."""
    said = {setting.name for setting in settings if setting.source != "default"}
    needed = {name for group in groups if not said & set(group) for name in group}
    return [Setting(setting.name, setting.value, "needed") if setting.name in needed else setting for setting in settings]


def command_of(top: argparse.ArgumentParser, name: str | None) -> argparse.ArgumentParser | None:
    """The parser of a command of `top`, or None."""
    groups = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return next((group.choices[name] for group in groups if name in group.choices), None)


def variables(top: argparse.ArgumentParser) -> set[str]:
    """The variables that the commands of `top` read."""
    groups = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    commands = (command for group in groups for command in group.choices.values() if _configurable(command))
    return {_variable(action.dest) for command in commands for action in _settings_of(command)}


def _configurable(command: argparse.ArgumentParser) -> bool:
    return any(action.dest == "config" for action in command._actions)


def _settings_of(command: argparse.ArgumentParser) -> list[argparse.Action]:
    once = {action for group in command._action_groups if group.title == FOR_ONE_START for action in group._group_actions}
    return [action for action in command._actions if action.dest not in ("help", "config") and action not in once]


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _forget_defaults(command: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> dict[str, Any]:
    """Make what the words do not say visible, and give every switch an opposite, so that a flag can turn off what the file turns on."""
    defaults = {}
    for action in [*actions, *(action for action in command._actions if action.dest == "config")]:
        defaults[action.dest], action.default, action.required = action.default, _UNSET, False
        if not action.option_strings:
            action.nargs = "?"
        if isinstance(action, _Switch):
            flag = action.option_strings[-1]
            opposite = f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else f"--no-{flag.removeprefix('--')}"
            command.add_argument(opposite, dest=action.dest, action="store_false", default=_UNSET, help=argparse.SUPPRESS)
    for group in command._mutually_exclusive_groups:
        group.required = False
    return defaults


def _file_of(command: argparse.ArgumentParser, options: argparse.Namespace, defaults: Mapping[str, Any]) -> Path | None:
    """The file to read: one that was asked for must be there, the usual one need not."""
    asked = options.config if options.config is not _UNSET else os.environ.get(_variable("config")) or None
    options.config = Path(asked or defaults["config"])
    if asked is not None and not options.config.is_file():
        raise UsageError(f"--config {asked}: there is no such file; `{command.prog} --help` names what can stand in one")
    return options.config if asked is not None or options.config.exists() else None


# ---- the file ------------------------------------------------------------------------------------------------------------------------


def _from_file(file: Path, actions: Mapping[str, argparse.Action], prog: str) -> dict[str, Setting]:
    try:
        text = file.read_text()
        open_to_others = bool(file.stat().st_mode & 0o077)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}; use --config for another file") from error
    found: dict[str, Setting] = {}
    for number, line in enumerate(text.split("\n"), 1):
        place, parts = f"{file}:{number}", _LINE.fullmatch(line)
        if parts is None:
            raise UsageError(f'{place}: expected one `key = value`, the value "text", a number, true or false; tables have no place here')
        name = parts["key"]
        if name is None:
            continue
        if name not in actions:
            raise UsageError(f"{place}: {name} is no setting of `{prog}`{_near(name, actions)}")
        if name in found:
            raise UsageError(f"{place}: {name} stands in {found[name].source} already")
        setting = Setting(name, _value(actions[name], _scalar(parts["value"], place), place), place)
        if open_to_others and setting.text != str(setting.value):
            raise UsageError(f"{place}: {name} holds a password, and others can read the file: chmod 600 it")
        found[name] = setting
    return found


def _near(name: str, actions: Mapping[str, argparse.Action]) -> str:
    if re.search("password|secret|token|key", name):
        return ": secrets have files of their own, see docs/gateway.md"
    near = difflib.get_close_matches(name.replace("-", "_"), actions, 1)
    return f": did you mean {near[0]}?" if near else f": there are {', '.join(sorted(actions))}"


def _scalar(text: str, place: str) -> str | bool | float:
    if text[0] == "'":
        return text[1:-1]
    if text[0] != '"' and (text != text.lower() and text.lower() in ("true", "false")):
        raise UsageError(f"{place}: {text} is no value: true and false are written small")
    try:
        value: str | bool | float = json.loads(text.removeprefix("+"))
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from error
    return value


def _value(action: argparse.Action, given: str | bool | float, place: str) -> Any:
    """The setting's value, which must be of the kind that the option has, and is checked as the option is."""
    if isinstance(action, _Switch) or isinstance(given, bool):
        if not (isinstance(action, _Switch) and isinstance(given, bool)):
            raise UsageError(f"{place}: {action.dest} = {json.dumps(given)}: {_kind(action)}")
        return given
    if not isinstance(given, str) and action.type in (None, Path):
        raise UsageError(f"{place}: {action.dest} = {json.dumps(given)}: {_kind(action)}")
    if isinstance(given, str) and action.type not in (None, Path) and re.fullmatch(r"[+-]?[0-9].*", given):
        raise UsageError(f"{place}: {action.dest} = {json.dumps(given)}: a number is written without quotes")
    return _checked(action, str(given), place)


def _kind(action: argparse.Action) -> str:
    wanted = "true or false" if isinstance(action, _Switch) else '"text" in quotes' if action.type in (None, Path) else "a number"
    return f"expected {wanted}"


# ---- the environment -----------------------------------------------------------------------------------------------------------------


def _from_environment(actions: Mapping[str, argparse.Action], known: Callable[[], set[str]]) -> dict[str, Setting]:
    names = {_variable(name): name for name in (*actions, "config")}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names and name not in NO_SETTINGS)
    if unknown and (strange := [name for name in unknown if name not in known()]):
        raise UsageError(f"{strange[0]} in the environment is no setting{_near(strange[0][len(PREFIX) :].lower(), actions)}")
    found = {}
    for variable, name in names.items():
        text = os.environ.get(variable, "")
        if text and name in actions:
            found[name] = Setting(name, _of_text(actions[name], text, variable), variable)
    return found


def _of_text(action: argparse.Action, text: str, place: str) -> Any:
    if not isinstance(action, _Switch):
        return _checked(action, text, place)
    if text.lower() not in (*_ON, *_OFF):
        raise UsageError(f"{place}={text}: expected one of {', '.join((*_ON, *_OFF))}")
    return text.lower() in _ON


def _checked(action: argparse.Action, text: str, place: str) -> Any:
    try:
        value = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        why = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"{text!r} is not what it takes"
        raise UsageError(f"{place}: {action.dest}: {why}") from error
    if action.choices is not None and value not in action.choices:
        raise UsageError(f"{place}: {action.dest} = {text!r}: choose from {', '.join(map(str, action.choices))}")
    return value
