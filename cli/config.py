"""`regrow config show`."""

from __future__ import annotations

import argparse
import json

from cli import settings
from cli.main import parser
from regrow.errors import LocalError


def show(options: argparse.Namespace) -> int:
    """Tell every setting of a command, as it would be if the command were started here and now; passwords are left out."""
    top = parser(options.of)
    command = settings.command_of(top, options.of)
    if command is None:
        raise LocalError(f"there is no command {options.of!r}")
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    given, found = settings.gather(top, command, [options.of, *words], lambda: settings.variables(parser()))
    if options.json:
        rows = [
            {"name": setting.name, "value": None if setting.value is None else _plain(setting), "source": setting.source}
            for setting in found
        ]
        print(json.dumps({"command": options.of, "file": str(given.config), "settings": rows}, indent=1))
        return 0
    rows_of_text = [("setting", "value", "from"), *((setting.name, setting.text, setting.source) for setting in found)]
    wide = [max(len(row[column]) for row in rows_of_text) for column in (0, 1)]
    print(f"{options.of}: {given.config}{'' if given.config.exists() else ' (there is none)'}")
    for name, value, source in rows_of_text:
        print(f"{name:{wide[0]}}  {value:{wide[1]}}  {source}")
    return 0


def _plain(setting: settings.Setting) -> bool | int | float | str:
    return setting.value if isinstance(setting.value, (bool, int, float)) else setting.text
