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
    _host(pi)
    _device(pi)
    gateway = add_command(
        kinds,
        "gateway",
        f"{FUNCTIONS}:gateway",
        "files for the boot partition of a Pi that becomes the gateway",
        "It makes its fleet's keys at its first boot, serves the task, and is the fleet's clock; with --access-point it also opens the "
        "network that devices join, with addresses and its own name in it.",
    )
    gateway.add_argument("--name", default="gateway", metavar="NAME", help="its host name, which devices dial")
    gateway.add_argument("--fleet-name", required=True, metavar="FLEET", help="the fleet that it makes")
    gateway.add_argument("--task", type=Path, required=True, metavar="TASK", help="folder of the task that it serves")
    gateway.add_argument("--access-point", metavar="SSID", help="network to open for devices (passphrase as for --wifi)")
    names = "further name or address that devices may dial; may be repeated"
    gateway.add_argument("--host", action="append", default=[], metavar="HOST", help=names)
    gateway.add_argument("--ssd", default="", metavar="LABEL", help="label of the ext4 file system that the data goes on")
    gateway.add_argument("--debs", type=Path, metavar="DIR", help="mosquitto's, chrony's and their dependencies' .deb files for arm64")
    _host(gateway)
    _wheels(gateway)
    script = add_command(kinds, "generic", f"{FUNCTIONS}:generic", "one installer script for any 64-bit Linux with systemd and Python")
    script.add_argument("--python", metavar="X.Y", help="that the machines have; needed where the wheels are downloaded")
    _architecture(script)
    _device(script)
    jetson = add_command(kinds, "jetson", f"{FUNCTIONS}:jetson", "a container for a flashed Jetson, matched to its JetPack, with the GPU")
    jetson.add_argument("--jetpack", default="6.2", metavar="X.Y", help="of the board: 6.0, 6.1 or 6.2")
    jetson.add_argument("--base", metavar="IMAGE", help="another L4T container image with Python 3.10")
    torch = "NVIDIA's torch wheel for that JetPack; with --agent-options '--trainer torch-cuda' the GPU trains"
    jetson.add_argument("--torch", type=Path, metavar="FILE", help=torch)
    _device(jetson)
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
    wheels.add_argument("--role", choices=["agent", "gateway"], default="agent", help="of what")
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
    _wheels(command)


def _wheels(command: argparse.ArgumentParser) -> None:
    command.add_argument("--wheels", type=Path, metavar="DIR", help="wheelhouse of `regrow image wheels` (default: downloaded)")
    command.add_argument("--wheel", type=Path, metavar="FILE", help="Regrow's own wheel (default: built from this clone)")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to: new, empty, or a mounted boot partition"
    )


def _host(command: argparse.ArgumentParser) -> None:
    systems = "which system was flashed: pi-os-trixie, pi-os-bookworm, ubuntu-24.04 or ubuntu-22.04"
    command.add_argument("--os", default="pi-os-trixie", metavar="SYSTEM", help=systems)
    command.add_argument("--wifi", metavar="SSID", help="network to join; the passphrase is asked for, or comes from --wifi-passphrase")
    _passphrase(command)
    command.add_argument("--ssh-key", type=Path, metavar="FILE", help="public keys of those who may log in; without it nobody may")
    command.add_argument("--user", default="pi", metavar="NAME", help="whom they log in as")
    command.add_argument("--timezone", default="", metavar="ZONE", help="such as Europe/Berlin")
    _architecture(command)


def _architecture(command: argparse.ArgumentParser) -> None:
    command.add_argument("--architecture", choices=["aarch64", "x86_64"], default="aarch64", help="of the machines")


def _passphrase(command: argparse.ArgumentParser) -> None:
    secret = "file with the passphrase ('-': standard input)"
    command.add_argument("--wifi-passphrase", type=Path, metavar="FILE", help=secret)
    command.add_argument("--country", default="", metavar="XX", help="where the radio is, such as DE; needed with Wi-Fi")
