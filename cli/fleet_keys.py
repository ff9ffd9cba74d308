"""`regrow fleet rotate`: new keys for a device, or for the coordinator."""

from __future__ import annotations

import argparse

from broker_server.fleet import coordinator_key, members
from broker_server.fleet.registry import MEMBERS, Registry
from cli.fleet import day, fleet_folder, tell_of_missed
from regrow.errors import UsageError


def rotate(options: argparse.Namespace) -> int:
    """Have a device, or the coordinator, change its keys."""
    if options.coordinator == (options.name is not None):
        raise UsageError("say whose keys: the NAME of a device, or --coordinator")
    if options.coordinator:
        return _coordinator(options)
    if options.days is not None or options.finish:
        raise UsageError("--days and --finish are for --coordinator: a device changes its keys as soon as it hears of it")
    members.rotate(Registry(fleet_folder(options)), options.name)
    print(f"{options.name} shall make new keys; `regrow fleet show {options.name}` says when the old certificate is revoked")
    return 0


def _coordinator(options: argparse.Namespace) -> int:
    registry = Registry(fleet_folder(options))
    if options.finish:
        coordinator_key.finish(registry)
        print("the old key is gone; devices and a running gateway follow at once")
        tell_of_missed(registry.fleet(), registry.devices())
        print(f"back up {registry.folder} now: with an older backup the devices would not believe their gateway")
        return 0
    fleet = registry.fleet()
    if fleet.key_change_until_s is None:
        fleet = coordinator_key.begin(registry, coordinator_key.OVERLAP_DAYS if options.days is None else options.days)
        print("the coordinator has another key, which a running `regrow serve` announces to the devices under the old one")
        print(f"back up {registry.folder} now, and again when the change is over")
    elif options.days is not None:
        fleet = coordinator_key.prolong(registry, options.days)
    devices = registry.devices()
    waits = coordinator_key.awaited(fleet, devices)
    in_fleet = [name for name, device in devices.items() if device.state in MEMBERS]
    late, claims = [name for name in in_fleet if name in waits], [name for name in waits if name not in in_fleet]
    lacking = f"; not yet: {', '.join(late)}" if late else ""
    lacking += f"; claims made before it, not used yet: {', '.join(claims)}" if claims else ""
    until = "" if fleet.key_change_until_s is None else f", at the latest on {day(fleet.key_change_until_s)}"
    know = f"{len(in_fleet) - len(late)} of {len(in_fleet)} devices know the new key"
    print(f"{know}{lacking}; the old one goes when all know it{until} (--finish: now)")
    return 0
