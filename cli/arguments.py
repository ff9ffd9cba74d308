"""What the options of all commands have in common: how a command is added, the kinds of values, and options that several have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
GATEWAY_HOME = ".gateway"
MEMORY_MOST_BYTES = 2**53  # that a hello can say
FOR_ONE_START = "for this start only"  # options that no file and no variable may say for ever (cli.settings)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the options that have one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False)
        return action.help if plain else super()._get_help_string(action)


def add_command(commands: Commands, name: str, function: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    """The parser of a new command.

    Args:
        function: "module:function" that runs it. The module is imported when the command runs, so that parsing needs no room.
        summary: its line in the list of commands; with `more` behind it, its description.
    """
    command = commands.add_parser(name, help=summary, description=f"{summary}. {more}".strip(), formatter_class=_Help)
    command.set_defaults(command=function)
    return command


def runs_option(command: argparse.ArgumentParser) -> None:
    """Add --runs."""
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs and the gateway's secrets are kept")


def config_option(command: argparse.ArgumentParser, file: str) -> None:
    """Add --config: with it every option of the command is a setting that a file and the environment may say (cli.settings)."""
    text = "settings, `key = value` a line, where key is an option, max_uplink_bps for example; below REGROW_KEY in the environment, "
    command.add_argument("--config", type=Path, default=Path(file), metavar="FILE", help=f"{text}which is below an option here")


def broker_options(command: argparse.ArgumentParser) -> None:
    """Add what `cli.gateway.link_of` reads."""
    command.add_argument(
        "--broker",
        metavar="URL",
        help="mqtt://user:password@host:port of a broker that is there (or REGROW_BROKER in the environment, which `ps` does not show)",
    )
    password = "first line: the password, when the URL has none: a systemd credential or a container's secret"
    command.add_argument("--broker-password-file", type=Path, metavar="FILE", help=password)
    command.add_argument("--broker-kind", choices=["auto", "mosquitto", "amqtt"], default="auto", help="which broker to start")
    command.add_argument(
        "--host", metavar="ADDRESS", help="that our broker listens on (default: this machine's only; with a fleet, all, for its devices)"
    )
    command.add_argument("--port", type=port, default=1883, help="port of our broker; 0 picks a free one")
    fleet_option(command, "made by `regrow fleet init` (default: RUNS/.gateway/fleet, where there is one)")
    command.add_argument("--tls-port", type=port, metavar="N", help="port of our broker for the fleet's devices (default: the fleet's)")
    passwords = "with a fleet: TLS by its certificate, but devices with passwords, and nothing sealed; for the bench, on amqtt"
    command.add_argument("--passwords", action="store_true", help=passwords)


def fleet_option(command: argparse.ArgumentParser, text: str) -> None:
    """Add --fleet."""
    command.add_argument("--fleet", type=Path, metavar="DIR", help=f"folder of the fleet, {text}")


def own_fleet(runs: Path) -> Path:
    """Where the gateway keeps its fleet unless it is told otherwise."""
    return runs / GATEWAY_HOME / "fleet"


# ---- kinds of values: each raises ArgumentTypeError, which argparse tells with the option and the usage -----------------------------


def port(text: str) -> int:
    """A TCP port, or 0."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 1 to 65535, or 0 for a free one")
    return int(text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def threads_of(text: str) -> int:
    """A number of threads; for "auto" that of the cores that this process may use."""
    if text != "auto":
        return count(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed(text: str) -> int:
    """A whole number that a seed may be."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def part(text: str) -> float:
    """A number above 0 and below 1."""
    number = positive(text)
    if number >= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part between 0 and 1")
    return number


def percent(text: str) -> float:
    """A number from 0 to 100."""
    value = not_negative(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return value


def memory_mb(text: str) -> float:
    """Megabytes (10^6 bytes) that a hello can say."""
    value = positive(text)
    if value * 1e6 > MEMORY_MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is above 9e9, more than a device can say")
    return value


def disk_mb(text: str) -> float:
    """Megabytes (10^6 bytes) of a disk for observations."""
    value = positive(text)
    if not 1 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1e9")
    return value


def _number(text: str) -> float:
    """What float() makes of it; NaN where it makes nothing."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
