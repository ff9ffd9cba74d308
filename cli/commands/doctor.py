"""The options of `regrow doctor`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, runs_option


def add_parser(commands: Commands) -> None:
    doctor = add_command(
        commands,
        "doctor",
        "cli.doctor:doctor",
        "find out what ails this device, this gateway, or a device far away",
        "A line each: ok, warn, fail or unknown, with the cure. Takes 20 s at most and changes nothing; exit status 0 when nothing failed.",
    )
    where = doctor.add_mutually_exclusive_group()
    where.add_argument("--bundle", type=Path, metavar="FILE", help="examine this device: its NAME.json")
    where.add_argument("--identity", type=Path, metavar="DIR", help="examine this device: the folder of its identity")
    far = "ask this device through the gateway that runs here with --runs (default: examine the gateway)"
    where.add_argument("--device", metavar="NAME", help=far)
    state = "of the device (default: regrow-state-NAME here)"
    doctor.add_argument("--state", type=Path, metavar="DIR", help=state)
    task = "task folder whose models must fit this device (default on a gateway: those of its unfinished runs)"
    doctor.add_argument("--task", type=Path, metavar="TASK", help=task)
    doctor.add_argument("--broker", metavar="URL", help="of a gateway with an external broker, as for `serve` (or REGROW_BROKER)")
    runs_option(doctor)
    doctor.add_argument("--json", action="store_true", help="an array of objects: check, state, said, cure")
