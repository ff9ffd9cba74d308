"""The options of `regrow join`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, not_negative


def add_parser(commands: Commands) -> None:
    join = add_command(
        commands,
        "join",
        "cli.join:join",
        "turn a claim into this device's identity",
        "The keys are made here and stay here. `regrow agent --identity` does the same by itself when it finds a claim.",
    )
    join.add_argument("claim", type=Path, metavar="CLAIM", help="NAME.claim.json from `regrow fleet add`")
    join.add_argument("--identity", type=Path, required=True, metavar="DIR", help="folder of the identity; made when missing")
    wait = "how long a gateway that does not answer is asked again"
    join.add_argument("--wait", type=not_negative, default=20.0, metavar="SECONDS", help=wait)
