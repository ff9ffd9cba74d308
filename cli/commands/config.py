"""The options of `regrow config`."""

from __future__ import annotations

import argparse

from cli.arguments import Commands, add_command


def add_parser(commands: Commands) -> None:
    config = commands.add_parser(
        "config",
        help="what the settings are, and where each comes from",
        description="Settings of `regrow serve` and `regrow agent` come from a file, the environment and the command line; the later win.",
    )
    kinds = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = add_command(kinds, "show", "cli.config:show", "tell every setting, its value and where it comes from", "Starts nothing.")
    show.add_argument("--command", dest="of", choices=["serve", "agent"], default="serve", help="whose settings")
    show.add_argument("--json", action="store_true", help="for programs")
    words = "after --: options as the command would get them"
    show.add_argument("words", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help=words)
