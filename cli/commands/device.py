"""The options of `regrow device add`, `remove` and `list`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, runs_option


def add_parser(commands: Commands) -> None:
    device = commands.add_parser("device", help="who may connect to the gateway", description="Devices and their passwords.")
    kinds = device.add_subparsers(title="commands", metavar="COMMAND", required=True)
    more = "A running gateway notices."
    add = add_command(kinds, "add", "cli.gateway:device_add", "let a device in and write its bundle NAME.json", more)
    add.add_argument("name", metavar="NAME", help="a-z, 0-9 and '-'")
    add.add_argument("--broker", metavar="URL", default="mqtt://127.0.0.1:1883", help="where the device finds the gateway's broker")
    add.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write the bundle")
    runs_option(add)
    remove = add_command(kinds, "remove", "cli.gateway:device_remove", "take a device's access away")
    remove.add_argument("name", metavar="NAME", help="device to remove")
    runs_option(remove)
    listing = add_command(kinds, "list", "cli.gateway:device_list", "name the devices that may connect")
    runs_option(listing)
