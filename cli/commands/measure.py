"""The options of `regrow measure`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, positive
from cli.commands import measure_power


def add_parser(commands: Commands) -> None:
    about = "Measure this device, apart from any training."
    measure = commands.add_parser("measure", help="measure this device, apart from any training", description=about)
    kinds = measure.add_subparsers(title="what", metavar="WHAT", required=True)
    uplink = add_command(
        kinds,
        "uplink",
        "cli.measure:uplink",
        "goodput, round-trip time and retransmissions of the link to the gateway",
        "Like iperf3, but over MQTT in chunks as updates travel. Stop the agent of this device first: one of the two is let in at a time.",
    )
    who = uplink.add_mutually_exclusive_group(required=True)
    who.add_argument("--identity", type=Path, metavar="DIR", help="folder of this device's identity in a fleet")
    who.add_argument("--bundle", type=Path, metavar="FILE", help="NAME.json from `regrow device add`")
    uplink.add_argument("--seconds", type=positive, default=10.0, metavar="N", help="how long, each direction")
    uplink.add_argument("--every", type=positive, default=1.0, metavar="N", help="seconds between two lines")
    uplink.add_argument(
        "--down", action="store_true", help="then the downlink too: a few chunks are left on the broker, fetched over and over, and cleared"
    )
    uplink.add_argument("--max-uplink-bps", type=positive, metavar="N", help="send at most this many bits a second, as the agent's")
    uplink.add_argument("--max-downlink-bps", type=positive, metavar="N", help="take at most this many bits a second")
    uplink.add_argument("--json", action="store_true", help="JSON: an object a line, intervals and then a summary, for each direction")
    measure_power.declare(kinds)
