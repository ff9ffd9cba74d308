"""The options of `regrow measure`."""

from __future__ import annotations

from cli.arguments import Commands
from cli.commands import measure_power


def add_parser(commands: Commands) -> None:
    measure = commands.add_parser("measure", help="measure links and power", description="What links carry and what devices draw.")
    kinds = measure.add_subparsers(title="commands", metavar="COMMAND", required=True)
    measure_power.declare(kinds)
