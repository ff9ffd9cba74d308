"""The options of `regrow fleet`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command, count, days, fleet_option, percent, runs_option, trial_minutes


def add_parser(commands: Commands) -> None:
    fleet = commands.add_parser("fleet", help="identities of devices, and what they shall do", description="A fleet with certificates.")
    kinds = fleet.add_subparsers(title="commands", metavar="COMMAND", required=True)
    init = add_command(
        kinds,
        "init",
        "cli.fleet:init",
        "make a fleet: its CA, the coordinator's key, the broker's certificate",
        "Once on the gateway, before anything else. The folder is the fleet: back it up, and let nobody read it.",
    )
    init.add_argument("name", metavar="NAME", help="a-z, 0-9 and '-'")
    hosts = "name or address at which devices find this gateway, the best first; again for others (default: this machine's)"
    init.add_argument("--host", action="append", metavar="HOST", help=hosts)
    init.add_argument("--tls-port", type=count, default=8883, metavar="N", help="where devices find the broker")
    init.add_argument("--enrol-port", type=count, default=8443, metavar="N", help="where devices join; open only while one is to")
    _folder(init)
    add = add_command(
        kinds,
        "add",
        "cli.fleet:add",
        "let a device join: write its claim NAME.claim.json",
        "The device makes its keys itself and turns the claim into a certificate, once, while `serve` runs.",
    )
    add.add_argument("name", metavar="NAME", help="of the device: a-z, 0-9 and '-'")
    add.add_argument("--days", type=days, default=7.0, metavar="N", help="how long the claim may be used")
    add.add_argument("--board", default="", metavar="BOARD", help="what the device is, for images and updates")
    offline = "make a whole identity folder DIR/NAME here, keys and all, instead of a claim: for the lab, where keys may travel"
    add.add_argument("--offline", action="store_true", help=offline)
    add.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write it")
    _folder(add)
    listing = add_command(kinds, "list", "cli.fleet:list_devices", "the devices, what they do, and until when their certificates hold")
    listing.add_argument("--json", action="store_true", help="for programs")
    _folder(listing)
    show = _one(kinds, "show", "cli.fleet:show", "all that the fleet knows of a device")
    show.add_argument("--json", action="store_true", help="for programs")
    running = "A running gateway notices within a second."
    _one(kinds, "revoke", "cli.fleet:revoke", "put a device out: its certificate holds no more and its connection ends", running)
    _rotate(kinds, running)
    _one(kinds, "pause", "cli.fleet:pause", "stop a device's training at once; it stays connected", running)
    _one(kinds, "resume", "cli.fleet:resume", "let a paused or drained device work again", running)
    _one(kinds, "drain", "cli.fleet:drain", "let a device finish the job that it has, and give it no other", running)
    wipe = _one(kinds, "wipe", "cli.fleet:wipe", "have a device remove its training state, models and at last its keys", running)
    wipe.add_argument("--yes", action="store_true", help="really; it cannot be taken back")
    _update(kinds)


def _rotate(kinds: Commands, running: str) -> None:
    rotate = add_command(
        kinds,
        "rotate",
        "cli.fleet_keys:rotate",
        "change the keys of a device, or the coordinator's signing key",
        f"A device makes new keys; its old certificate is revoked when the new one is in use. {running}",
    )
    rotate.add_argument("name", nargs="?", metavar="NAME", help="of the device")
    coordinator = "change the coordinator's signing key: the new one is announced to all devices; said again, how many know it"
    rotate.add_argument("--coordinator", action="store_true", help=coordinator)
    overlap = "with --coordinator: after so many days the old key goes even if a device has not heard of the new one (default: 30)"
    rotate.add_argument("--days", type=days, metavar="N", help=overlap)
    finish = "with --coordinator: let the old key go now; a device that does not know the new one needs a new claim"
    rotate.add_argument("--finish", action="store_true", help=finish)
    _folder(rotate)


def _update(kinds: Commands) -> None:
    update = add_command(
        kinds,
        "update",
        "cli.fleet_update:update",
        "bring other software to the devices: sign a release and offer it to a part of them",
        "A running `regrow serve` publishes it within a second. The same command with a higher --percent widens the stage.",
    )
    what = update.add_mutually_exclusive_group(required=True)
    what.add_argument("--wheel", type=Path, metavar="FILE", help="regrow-VERSION-py3-none-any.whl, as `pip wheel --no-deps .` makes it")
    what.add_argument("--status", action="store_true", help="how far each device is")
    what.add_argument("--halt", action="store_true", help="offer the newest release to nobody any more; what has begun to install goes on")
    wheels = "folder of wheels that it depends on, for every kind of board in the fleet (`pip download`)"
    update.add_argument("--wheels", type=Path, metavar="DIR", help=wheels)
    update.add_argument("--percent", type=percent, default=10.0, metavar="N", help="of the devices that it may be for")
    update.add_argument("--board", action="append", default=None, metavar="BOARD", help="only for these; again for others (default: all)")
    update.add_argument("--force-downgrade", action="store_true", help="let devices install it though it is older than what they have")
    minutes = "a device that has not reached the broker and finished a round so long after the switch goes back by itself"
    update.add_argument("--minutes", type=trial_minutes, default=10.0, metavar="N", help=minutes)
    idle = "let contact with the broker be enough: for fleets that have nothing to train"
    update.add_argument("--contact-only", action="store_true", help=idle)
    update.add_argument("--json", action="store_true", help="with --status: for programs")
    _folder(update)


def _one(kinds: Commands, name: str, function: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    command = add_command(kinds, name, function, summary, more)
    command.add_argument("name", metavar="NAME", help="of the device")
    _folder(command)
    return command


def _folder(command: argparse.ArgumentParser) -> None:
    runs_option(command)
    fleet_option(command, " (default: RUNS/.gateway/fleet)")
