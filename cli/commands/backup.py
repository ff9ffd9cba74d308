"""The options of `regrow backup` and `regrow restore`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, runs_option


def add_parser(commands: Commands) -> None:
    backup = add_command(
        commands,
        "backup",
        "cli.backup:backup",
        "put all that the gateway keeps into one file",
        "A gateway may be at work meanwhile. The file holds passwords and keys: keep it as safe as the gateway.",
    )
    backup.add_argument("file", type=Path, metavar="FILE", help="to write, for example gateway-2026-01-01.tar")
    runs_option(backup)
    backup.add_argument("--fleet", type=Path, metavar="DIR", help="the fleet's folder, where it is not below --runs")
    restore = add_command(
        commands,
        "restore",
        "cli.backup:restore",
        "put a backup in place",
        "It is checked whole before anything changes. Runs go on where the backup was made: start `regrow serve` again.",
    )
    restore.add_argument("file", type=Path, metavar="FILE", help="that `regrow backup` wrote")
    runs_option(restore)
    restore.add_argument("--replace", action="store_true", help="set aside what is there, beside it, instead of refusing")
