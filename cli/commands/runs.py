"""The options of `regrow runs`, `rollback` and `verify`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, runs_option


def add_parser(commands: Commands) -> None:
    runs = add_command(commands, "runs", "cli.gateway:runs", "list the runs")
    runs_option(runs)
    rollback = add_command(
        commands,
        "rollback",
        "cli.gateway:rollback",
        "return to an earlier snapshot",
        "The old model becomes the newest version; stop `serve` first and start it again afterwards.",
    )
    rollback.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/watch-20260101-120000")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="version of a snapshot (default: the one before the newest)")
    verify = add_command(
        commands,
        "verify",
        "cli.gateway:verify",
        "check a run's model against its durable log",
        "Feeds every receipted update to the slow reference implementation of the papers' pseudocode.",
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
