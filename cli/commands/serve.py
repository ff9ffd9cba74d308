"""The options of `regrow serve`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import FOR_ONE_START, Commands, add_command, broker_options, config_option, disk_mb, port, runs_option


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
    config_option(serve, "/etc/regrow/gateway.toml")
    broker_options(serve)
    serve.add_argument("--plain", action="store_true", help="a line an event instead of the live table")
    served = "serve /metrics for Prometheus on this port; 0 picks a free one (default: not at all)"
    serve.add_argument("--metrics-port", type=port, metavar="PORT", help=served)
    serve.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="address for /metrics, which asks for no password")
    serve.add_argument("--no-observations", action="store_true", help="store no observations of devices, and announce no field runs")
    most = "10^6 bytes that the observations of all devices may take (RUNS/.gateway/observations.sqlite)"
    serve.add_argument("--observations-mb", type=disk_mb, default=4000.0, metavar="N", help=most)
    once = serve.add_argument_group(FOR_ONE_START)
    once.add_argument("--run", metavar="NAME", help="name of a new run (default: task and time)")
    once.add_argument("--new-run", action="store_true", help="start anew even if a run of this task is unfinished")
    once.add_argument("--takeover", action="store_true", help="lead even if another coordinator is alive")
