"""The change of the coordinator's signing key: the next is announced under the old one, both count for a while, then the old one is gone.

    signing.key        seals what devices are told
    signing.next.key   while a change is under way: the key that follows
    release.key        the fleet's first key, kept at its first change: releases stay signed by it, for the updater of a device believes
                       the keys in a file that only root writes, and no announcement

Every device says which announcement it believes. The change ends when all do, or its time is over: one rename puts the next key in
the place of the old one, which decides it, and whatever was cut off is done again. A device that missed it hears nothing any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from broker_server.durable import sync_folder, write_private
from broker_server.fleet import authority as certificates
from broker_server.fleet.authority import NEXT_KEY, RELEASE_KEY, SIGNING_KEY, Authority
from broker_server.fleet.registry import MEMBERS, Device, Fleet, Registry, now_s, write_fleet
from regrow import wire
from regrow.errors import UsageError

OVERLAP_DAYS = 30.0


def begin(registry: Registry, days: float = OVERLAP_DAYS) -> Fleet:
    """Make the next key and let it be announced; a running gateway does so within a second.

    Args:
        days: the change ends after these at the latest.

    Raises:
        LocalError: a change is under way already, or the folder cannot be written.
    """
    with registry.change():
        fleet = registry.fleet()
        if fleet.key_change_until_s is not None:
            raise UsageError(f"the coordinator's key of {fleet.name} is being changed already")
        certificates.make_signing_key(registry.folder / NEXT_KEY)
        fleet = replace(fleet, key_number=fleet.key_number + 1, key_change_until_s=now_s() + int(days * 86400))
        write_fleet(registry.folder, fleet)
    return fleet


def prolong(registry: Registry, days: float) -> Fleet:
    """Let the change that is under way end so many days from now. Raises LocalError: none is."""
    with registry.change():
        fleet = replace(_changing(registry), key_change_until_s=now_s() + int(days * 86400))
        write_fleet(registry.folder, fleet)
    return fleet


def finish(registry: Registry) -> list[str]:
    """End the change that is under way: from now on only the next key counts. Returns who had not heard of it.

    Raises:
        LocalError: none is under way.
    """
    with registry.change() as devices:
        fleet = _changing(registry)
        late = awaited(fleet, devices)
        _finish(registry.folder, fleet)
    return late


def finish_if_due(registry: Registry) -> list[str]:
    """End a change that everybody believes, or whose time is over; returns what was done, in words."""
    if registry.fleet().key_change_until_s is None:
        return []
    with registry.change() as devices:
        fleet = registry.fleet()
        if fleet.key_change_until_s is None:
            return []
        late = awaited(fleet, devices)
        if late and now_s() < fleet.key_change_until_s:
            return []
        _finish(registry.folder, fleet)
    named = f"; {', '.join(late)} did not hear of it: `regrow fleet list` says what to do" if late else ""
    return [f"the coordinator has changed its signing key{named}"]


def _finish(folder: Path, fleet: Fleet) -> None:
    signing, following = folder / SIGNING_KEY, folder / NEXT_KEY
    if following.exists():  # else a cut came after the rename
        if not (folder / RELEASE_KEY).exists():
            write_private(folder / RELEASE_KEY, signing.read_bytes())
        following.replace(signing)
        sync_folder(folder)
    write_fleet(folder, replace(fleet, key_number=fleet.key_number + 1, key_change_until_s=None))


def _changing(registry: Registry) -> Fleet:
    fleet = registry.fleet()
    if fleet.key_change_until_s is None:
        raise UsageError(f"the coordinator's key of {fleet.name} is not being changed: `regrow fleet rotate --coordinator` begins it")
    return fleet


# ---- who believes what --------------------------------------------------------------------------------------------------------------


def announced(registry: Registry, authority: Authority) -> wire.CoordinatorKeys | None:
    """What every device is told of the coordinator's keys; None while they are those that it joined with."""
    fleet = registry.fleet()
    return wire.CoordinatorKeys(number=fleet.key_number, keys=believed(fleet, authority)) if fleet.key_number else None


def believed(fleet: Fleet, authority: Authority) -> list[bytes]:
    """The public keys whose seals count now: one, or two while the coordinator changes its own."""
    following = None if fleet.key_change_until_s is None else authority.next_key()
    return [authority.signing_key, *([] if following is None else [following])]


def heard(registry: Registry, name: str, number: int) -> None:
    """The device has said which announcement it believes. Nearly every call changes nothing, and then writes nothing."""
    known = registry.devices().get(name)
    if known is None or known.keys >= min(number, registry.fleet().key_number):
        return
    with registry.change() as devices:
        if name in devices:
            devices[name] = replace(devices[name], keys=min(number, registry.fleet().key_number))


def awaited(fleet: Fleet, devices: Mapping[str, Device]) -> list[str]:
    """Whom a change that is under way waits for: devices of the fleet, and those whose claim is from before it."""
    return [name for name, device in devices.items() if device.keys < fleet.key_number and _counts(device)]


def missed(fleet: Fleet, devices: Mapping[str, Device]) -> list[str]:
    """Who does not know the key that seals now, and so hears nothing."""
    needed = fleet.key_number - 1  # of the announcement that brought it
    settled = fleet.key_change_until_s is None
    return [name for name, device in devices.items() if settled and device.keys < needed and _counts(device)]


def _counts(device: Device) -> bool:
    return device.state in MEMBERS or (device.state == "claimed" and device.may_join)
