"""The options of `regrow image`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command

FUNCTIONS = "cli.image"


def add_parser(commands: Commands) -> None:
    image = add_command(
        commands,
        "image",
        f"{FUNCTIONS}:pi",
        "write what makes a board or a machine a device of the fleet",
        "Everything that a device needs is in it: no internet at the first boot, no hand on the board. It holds this one device's claim, "
        "from `regrow fleet add`, and no key: the device makes its own.",
    )
    kinds = image.add_subparsers(title="commands", metavar="COMMAND", required=True)
    pi = add_command(
        kinds,
        "pi",
        f"{FUNCTIONS}:pi",
        "files for the boot partition of stock Raspberry Pi OS or Ubuntu",
        "Flash the stock 64-bit system, then name the mounted boot partition with --out; or copy the folder's contents there.",
    )
    systems = "which system was flashed: pi-os-trixie, pi-os-bookworm, ubuntu-24.04 or ubuntu-22.04"
    pi.add_argument("--os", default="pi-os-trixie", metavar="SYSTEM", help=systems)
    pi.add_argument("--wifi", metavar="SSID", help="network to join; the passphrase is asked for, or comes from --wifi-passphrase")
    _passphrase(pi)
    pi.add_argument("--ssh-key", type=Path, metavar="FILE", help="public keys of those who may log in; without it nobody may")
    pi.add_argument("--user", default="pi", metavar="NAME", help="whom they log in as")
    pi.add_argument("--timezone", default="", metavar="ZONE", help="such as Europe/Berlin")
    _device(pi)
    script = add_command(kinds, "generic", f"{FUNCTIONS}:generic", "one installer script for any 64-bit Linux with systemd and Python")
    script.add_argument("--python", metavar="X.Y", help="that the machines have; needed where the wheels are downloaded")
    _architecture(script)
    _device(script)
    wifi = add_command(
        kinds,
        "wifi",
        f"{FUNCTIONS}:wifi",
        "a Wi-Fi network for a device that is flashed already",
        "Put the card into a reader and name its boot partition: the device takes the network over at its next boot.",
    )
    wifi.add_argument("ssid", metavar="SSID", help="the network's name")
    _passphrase(wifi)
    wifi.add_argument("--out", type=Path, required=True, metavar="DIR", help="the mounted boot partition")
    wheels = add_command(kinds, "wheels", f"{FUNCTIONS}:wheels", "download the wheelhouse of one Python, once for many images")
    wheels.add_argument("--python", required=True, metavar="X.Y", help="of the boards: 3.10, 3.11, 3.12 or 3.13")
    _architecture(wheels)
    wheels.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to fill")
    lock = add_command(kinds, "lock", f"{FUNCTIONS}:lock", "check that every locked wheel of every Python can still be had")
    lock.add_argument("--python", metavar="X.Y", help="of this Python alone")
    lock.add_argument("--write", action="store_true", help="write deploy/locks anew from the package index; otherwise check them")
    add_command(kinds, "systems", f"{FUNCTIONS}:systems", "the matrix of boards, systems and Pythons, and what was tried")


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", required=True, metavar="NAME", help="the device's name, and its host name")
    command.add_argument("--claim", type=Path, metavar="FILE", help="its claim, as `regrow fleet add` wrote it (default: NAME.claim.json)")
    data = "the device's data as `regrow agent --data` takes it; a file here is put into the image"
    command.add_argument("--data", default="/srv/regrow/samples.npz", metavar="DATA", help=data)
    command.add_argument("--agent-options", default="", metavar="WORDS", help="further options of the agent, such as '--threads auto'")
    command.add_argument("--wheels", type=Path, metavar="DIR", help="wheelhouse of `regrow image wheels` (default: downloaded)")
    command.add_argument("--wheel", type=Path, metavar="FILE", help="Regrow's own wheel (default: built from this clone)")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to: new, empty, or a mounted boot partition"
    )


def _architecture(command: argparse.ArgumentParser) -> None:
    command.add_argument("--architecture", choices=["aarch64", "x86_64"], default="aarch64", help="of the machines")


def _passphrase(command: argparse.ArgumentParser) -> None:
    secret = "file with the passphrase ('-': standard input)"
    command.add_argument("--wifi-passphrase", type=Path, metavar="FILE", help=secret)
    command.add_argument("--country", default="", metavar="XX", help="where the radio is, such as DE; needed with Wi-Fi")
