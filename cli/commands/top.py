"""The options of `regrow top`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, count, positive, runs_option


def add_parser(commands: Commands) -> None:
    top = add_command(
        commands,
        "top",
        "cli.top:command",
        "the fleet as it is now, in a terminal",
        "Reads the page of a running `regrow serve`, or, where there is none, what the run's folder says. Ctrl-C ends it.",
    )
    runs_option(top)
    top.add_argument("--url", metavar="URL", help="address of a page, http://127.0.0.1:8080 for example (default: that of the newest run)")
    top.add_argument("--run", metavar="NAME", help="a run of --runs (default: the newest)")
    top.add_argument("--token-file", type=Path, metavar="FILE", help="first line: the page's token, for a page on another machine")
    top.add_argument("--every", type=positive, default=1.0, metavar="S", help="seconds between two pictures")
    top.add_argument("--rows", type=count, metavar="N", help="devices shown at most (default: what fits)")
    top.add_argument("--once", action="store_true", help="one picture, for pipes")
