"""The options of `regrow field`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command, broker_options, count, not_negative, part, positive, rate_hz, runs_option, seed

LONGEST_S = 30 * 86_400  # as broker_server.field.plan has them
MOST_REPETITIONS = 1000
LONGEST_LEAD_S = 3600


def add_parser(commands: Commands) -> None:
    summary = "an experiment with a running fleet: plan, run, report"
    field = commands.add_parser("field", help=summary, description=f"{summary}.").add_subparsers(metavar="COMMAND", required=True)
    _plan(field)
    _run(field)
    report = add_command(
        field,
        "report",
        "cli.field_report:report",
        "report a field run: HTML, pictures, tables as CSV and Parquet",
        "Works while it is still being run, on the repetitions that are done.",
    )
    report.add_argument("name", metavar="PLAN", help="name of the field run, or its plan file")
    runs_option(report)
    report.add_argument("--out", type=Path, metavar="DIR", help="where the report is written (default: the field run's name)")
    report.add_argument("--target", type=float, metavar="X", help="score to reach (default: 95 %% of the best method's)")
    replay = report.add_argument_group(
        "replay in simulation", "with the links and step times that were recorded; --data npz says with what data"
    )
    replay.add_argument("--data", metavar="NAME", help="fashion-mnist, watch, femnist, cifar10, or npz: your own (default: no simulation)")
    replay.add_argument("--data-folder", type=Path, metavar="DIR", help="where its published files lie, or your train.npz and test.npz")
    replay.add_argument("--split", default="user", metavar="S", help="iid, dirichlet:ALPHA, user (device after device) or shards:COUNT")
    replay.add_argument(
        "--validation", type=part, metavar="PART", help="share of every device's data that is kept for validation (default: 0.2)"
    )
    traces = add_command(
        field,
        "traces",
        "cli.field_report:traces",
        "write the links and step times of recorded runs for `regrow simulate`",
        "A folder a run: links for --links trace:DIR, steps for --steps-trace DIR.",
    )
    traces.add_argument("name", metavar="PLAN", help="name of the field run, or its plan file")
    runs_option(traces)
    traces.add_argument("--out", type=Path, metavar="DIR", help="where they are written (default: the field run's name, traces)")
    annotate = add_command(
        field,
        "annotate",
        "cli.field:annotate",
        "write down what happens, such as: moved behind the wall",
        "While `regrow field run` is at work a line typed there does the same.",
    )
    annotate.add_argument("text", nargs="+", metavar="TEXT", help="what happens, in one line")
    annotate.add_argument("--ago", type=_seconds_from_0, default=0.0, metavar="S", help="that it happened so many seconds ago")
    runs_option(annotate)


def _plan(field: Commands) -> None:
    plan = add_command(
        field,
        "plan",
        "cli.field:plan",
        "write the plan of a field run, and say how long it takes",
        "Methods take turns in blocks, in an order drawn from the seed. With only a file that is there, checks it.",
    )
    plan.add_argument("file", type=Path, metavar="FILE", help="the plan, such as orchard.toml; its name is that of the field run")
    plan.add_argument("--task", type=Path, metavar="TASK", help="task folder")
    plan.add_argument("--devices", metavar="NAME,...", help="devices that take part; the run waits for all of them")
    plan.add_argument("--methods", default="fedgmr,fedasync,fedavg", metavar="M,...", help="methods by name")
    plan.add_argument("--repetitions", type=_repetitions, default=3, metavar="N", help="runs of each method")
    plan.add_argument("--run-s", type=_seconds, default=600.0, metavar="S", help="seconds of each run")
    plan.add_argument(
        "--baseline-s", type=_seconds_from_0, default=60.0, metavar="S", help="seconds before each run in which devices keep still"
    )
    plan.add_argument(
        "--lead-s", type=_lead_seconds, default=10.0, metavar="S", help="seconds between an announcement and what it announces"
    )
    plan.add_argument("--sample-hz", type=rate_hz, default=10.0, metavar="N", help="samples a second of the power meters")
    plan.add_argument("--seed", type=seed, default=1, metavar="N", help="of the order")


def _run(field: Commands) -> None:
    run = add_command(
        field,
        "run",
        "cli.field:run",
        "execute a plan with the fleet",
        "In the place of `regrow serve`, with its broker options. Lines that you type are annotations. Ctrl-C stops; the same command "
        "goes on with the repetitions that lack.",
    )
    run.add_argument("plan", type=Path, metavar="PLAN", help="the plan's file")
    runs_option(run)
    broker_options(run)
    run.add_argument(
        "--patience-s", type=_seconds, default=120.0, metavar="S", help="how long to wait for planned devices that do not answer"
    )


def _repetitions(text: str) -> int:
    value = count(text)
    if value > MOST_REPETITIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is too many: {MOST_REPETITIONS} at most")
    return value


def _seconds_from_0(text: str) -> float:
    value = not_negative(text)
    if value > LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is too long: {LONGEST_S} s (30 days) at most")
    return value


def _seconds(text: str) -> float:
    return _seconds_from_0(str(positive(text)))


def _lead_seconds(text: str) -> float:
    value = positive(text)
    if not 0.5 <= value <= LONGEST_LEAD_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.5 to {LONGEST_LEAD_S}")
    return value
