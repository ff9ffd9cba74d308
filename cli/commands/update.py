"""The options of `regrow update`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command


def add_parser(commands: Commands) -> None:
    update = add_command(commands, "update", "cli.update:update", "install releases on this device: what regrow-update.service runs")
    what = "apply: go on with what was begun, then install what the agent has fetched; check: only say whether a bundle would be taken; "
    update.add_argument("action", choices=["apply", "check", "status", "rollback"], help=what + "rollback: run the version before this one")
    update.add_argument("bundle", type=Path, nargs="?", metavar="FILE", help="a bundle to check or apply (default: those in the spool)")
    settings = "trusted keys and paths, written by root alone; docs/updates.md"
    update.add_argument("--settings", type=Path, default=Path("/etc/regrow/update.json"), metavar="FILE", help=settings)
