"""The options of `regrow runs`, `rollback` and `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command, runs_option

ONE = "folder of the run, or its name below --runs"


def add_parser(commands: Commands) -> None:
    _runs(commands)
    rollback = add_command(
        commands,
        "rollback",
        "cli.runs:rollback",
        "return to an earlier snapshot",
        "The old model becomes the newest version; stop `serve` first and start it again afterwards.",
    )
    rollback.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/watch-20260101-120000")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="version of a snapshot (default: the one before the newest)")
    verify = add_command(
        commands,
        "verify",
        "cli.runs:verify",
        "check a run's model against its durable log",
        "Feeds every receipted update to the slow reference implementation of the papers' pseudocode.",
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="folder of the run")


def _runs(commands: Commands) -> None:
    """`regrow runs` alone lists them."""
    runs = add_command(commands, "runs", "cli.runs:runs", "list the runs, or look into them")
    runs_option(runs)
    below = runs.add_subparsers(metavar="COMMAND")
    show = add_command(below, "show", "cli.runs:show", "one run in detail")
    show.add_argument("run", type=Path, metavar="RUN", help=ONE)
    _runs_too(show)
    compare = add_command(below, "compare", "cli.runs:compare", "several runs side by side", "Bytes are payload as devices meter it.")
    compare.add_argument("run", type=Path, nargs="+", metavar="RUN", help=ONE)
    compare.add_argument("--target", type=float, metavar="X", help="score to reach (default: 95 %% of the best)")
    compare.add_argument("--out", type=Path, metavar="FILE", help="a picture of scores and densities over time: .png, .pdf or .svg")
    _runs_too(compare)
    export = add_command(
        below,
        "export",
        "cli.runs:export",
        "write a run as tables",
        "Its facts, its curve, every kind of metric and what its devices observed.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help=ONE)
    export.add_argument("--out", type=Path, metavar="DIR", help="where the tables are written (default: RUN-data)")
    export.add_argument("--format", default="csv", metavar="F,...", help="csv, parquet or json, or several with commas between")
    _runs_too(export)
    delete = add_command(below, "delete", "cli.runs:delete", "remove runs for good", "Says what goes, and asks. A run in use is refused.")
    delete.add_argument("run", type=Path, nargs="+", metavar="RUN", help=ONE)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    _runs_too(delete)


def _runs_too(command: argparse.ArgumentParser) -> None:
    """Add --runs where `regrow runs --runs DIR COMMAND` may have said it already."""
    command.add_argument("--runs", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="where runs are kept (default: runs)")
