"""The options of `regrow serve`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, broker_options, runs_option


def add_parser(commands: Commands) -> None:
    serve = add_command(
        commands,
        "serve",
        "cli.gateway:serve",
        "run a task: broker, coordinator and store",
        "Goes on with the newest unfinished run of the task. Ctrl-C stops; the same command goes on where it was.",
    )
    serve.add_argument("task", type=Path, metavar="TASK", help="task folder, or the folder of a run to go on with")
    runs_option(serve)
    serve.add_argument("--run", metavar="NAME", help="name of a new run (default: task and time)")
    serve.add_argument("--new-run", action="store_true", help="start anew even if a run of this task is unfinished")
    broker_options(serve)
    serve.add_argument("--takeover", action="store_true", help="lead even if another coordinator is alive")
    serve.add_argument("--plain", action="store_true", help="a line an event instead of the live table")
