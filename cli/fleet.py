"""`regrow fleet`: who is in the fleet, and what each device shall do."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from broker_server.fleet import coordinator_key, members
from broker_server.fleet.authority import Authority, check_request
from broker_server.fleet.registry import Device, Fleet, Registry, now_s, read_seen
from cli.arguments import own_fleet
from edge_agent import identity
from edge_agent.identity_folder import adopt, new_claim
from regrow.errors import UsageError

COLUMNS = ("device", "state", "doing", "heard of", "certificate until", "board")
SHOWN = {
    "board": "board",
    "added_s": "added",
    "claim_until_s": "claim until",
    "doing": "doing",
    "heard_s": "heard of",
    "shall_replace": "shall replace certificate",
}


def fleet_folder(options: argparse.Namespace) -> Path:
    """The fleet that the options mean."""
    named: Path | None = options.fleet
    return own_fleet(options.runs) if named is None else named


def init(options: argparse.Namespace) -> int:
    """Make a fleet."""
    folder = fleet_folder(options)
    hosts = options.host or _own_hosts()
    fleet = members.init(folder, options.name, hosts, tls_port=options.tls_port, enrol_port=options.enrol_port)
    print(f"fleet {fleet.name} in {folder}: back it up, and let nobody read it")
    others = f"; the certificate also names {', '.join(hosts[1:])}" if hosts[1:] else ""
    print(f"devices find the broker at {fleet.broker} and join at {fleet.enrol}{others}")
    print("next: regrow fleet add NAME, for each device; then regrow serve TASK")
    return 0


def _own_hosts() -> list[str]:
    """This machine's addresses and its mDNS name: what devices on the same network find it by."""
    found = [address.address for addresses in psutil.net_if_addrs().values() for address in addresses if address.family == socket.AF_INET]
    reachable = [address for address in found if not address.startswith(("127.", "169.254."))]
    if not reachable:
        raise UsageError("this machine has no address that devices could find it by; say --host NAME_OR_ADDRESS")
    return [*reachable, f"{socket.gethostname().split('.')[0].lower()}.local", "localhost", "127.0.0.1"]


def add(options: argparse.Namespace) -> int:
    """Let a device join."""
    registry = Registry(fleet_folder(options))
    before = registry.devices().get(options.name)
    if options.offline:
        folder = _offline(registry, options)
        print(f"{folder}: a whole identity. Its keys were made here and travel with it: for the lab only; a device's own never leave it")
        return 0
    path = members.write_claim(registry, options.name, options.out, days=options.days, board=options.board)
    until = day(registry.device(options.name).claim.expires_s)  # type: ignore[union-attr]  # it has just been made
    print(f"{path}: for {options.name} alone, once, until {until}; on the device: regrow join {path.name} --identity DIR")
    if before is not None and before.claim is not None and before.may_join:
        old = f"the claim made before, until {day(before.claim.expires_s)}, no longer works"
        print(f"{old}: use this file in its place, also on a card or in an image that was written with the old one")
    return 0


def _offline(registry: Registry, options: argparse.Namespace) -> Path:
    """The identity folder of a device that joins here and now, as it would over the network."""
    folder: Path = options.out / options.name
    if folder.exists():
        raise UsageError(f"{folder} is there already; remove it, or choose another --out")
    path = members.write_claim(registry, options.name, options.out, days=options.days, board=options.board)
    try:
        about = adopt(folder, path)
        asked = identity.request(folder)
        request = check_request(asked.csr, asked.signing_key, asked.proof, options.name)
        token = "" if about.claim is None else about.claim.token
        identity.accept(folder, members.enrol(registry, Authority(registry.folder), options.name, token, request).encode())
    finally:
        path.unlink()
    return folder


# ---- looking ------------------------------------------------------------------------------------------------------------------------


def list_devices(options: argparse.Namespace) -> int:
    """List the devices."""
    registry = Registry(fleet_folder(options))
    devices, seen = registry.devices(), read_seen(registry.folder)
    if options.json:
        print(json.dumps({name: _facts(device, seen.get(name, {})) for name, device in devices.items()}, indent=2))
        return 0
    deaf = coordinator_key.missed(registry.fleet(), devices)
    rows = [COLUMNS, *(_row(name, device, seen.get(name, {}), deaf=name in deaf) for name, device in devices.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows if devices else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not devices:
        print("no devices yet: regrow fleet add NAME")
    tell_of_missed(registry.fleet(), devices)
    tell_of_expired(devices)
    return 0


def tell_of_missed(fleet: Fleet, devices: Mapping[str, Device]) -> None:
    """Say who of these does not know the key that the coordinator seals with, and what helps."""
    for name in coordinator_key.missed(fleet, devices):
        print(missed_in_words(name, devices[name]))


def missed_in_words(name: str, device: Device) -> str:
    """Why a device that missed the change of the coordinator's key hears nothing, and what helps."""
    if device.state == "claimed":
        return f"the claim of {name} is from before the change of the coordinator's key: `regrow fleet add {name}` makes another"
    return f"{name} missed the change of the coordinator's key and hears nothing any more: {new_claim(name)}"


def tell_of_expired(devices: Mapping[str, Device]) -> None:
    """Say whose claim can no longer be used, and what helps."""
    for name, device in devices.items():
        if device.state == "claimed" and not device.may_join:
            print(f"the claim of {name} has expired: `regrow fleet add {name}` makes another")


def show(options: argparse.Namespace) -> int:
    """Show one device."""
    registry = Registry(fleet_folder(options))
    facts = _facts(registry.device(options.name), read_seen(registry.folder).get(options.name, {}))
    if options.json:
        print(json.dumps({"device": options.name, **facts}, indent=2))
        return 0
    only = {options.name: registry.device(options.name)}
    print(f"{options.name}: {_state_in_words(only[options.name])}")
    tell_of_missed(registry.fleet(), only)
    tell_of_expired(only)
    for name, said in SHOWN.items():
        if facts[name] not in (None, ""):
            print(f"  {said}: {day(facts[name]) if name.endswith('_s') else facts[name]}")
    for key in facts["signing_keys"]:
        print(f"  signing key: {key}")
    for number, certified in enumerate(facts["certificates"], 1):
        print(f"  certificate {number}: {certified['serial']}, {_state_of(certified)}")
    return 0


def _state_in_words(device: Device) -> str:
    """Its state, in words."""
    return "claim expired" if device.state == "claimed" and not device.may_join else device.state


def _facts(device: Device, seen: dict[str, Any]) -> dict[str, Any]:
    """What may be shown: no token, not even its hash."""
    return {
        "state": device.state,
        "board": device.board,
        "added_s": device.added_s,
        "claim_until_s": None if device.claim is None else device.claim.expires_s,
        "doing": _doing(device, seen),
        "heard_s": seen.get("seen_s"),
        "shall_replace": device.replace,
        "signing_keys": [key.hex() for key in device.signing_keys],
        "certificates": [
            {"serial": c.serial, "not_after_s": c.not_after_s, "used": c.used, "revoked_s": c.revoked_s} for c in device.certificates
        ],
    }


def _state_of(certified: dict[str, Any]) -> str:
    """The one thing that matters of a certificate now."""
    if certified["revoked_s"] is not None:
        return f"revoked {day(certified['revoked_s'])}"
    if certified["not_after_s"] < now_s():
        return f"ended {day(certified['not_after_s'])}"
    return f"{'in use' if certified['used'] else 'not yet used'}, until {day(certified['not_after_s'])}"


def _row(name: str, device: Device, seen: dict[str, Any], *, deaf: bool) -> tuple[str, ...]:
    good = device.good
    heard = _ago(now_s() - seen["seen_s"]) if "seen_s" in seen else "-"
    claimed = f"claim until {day(device.claim.expires_s)}" if device.state == "claimed" and device.claim is not None else "-"
    doing = "hears nothing" if deaf and device.state != "claimed" else _doing(device, seen) or "-"
    return name, _state_in_words(device), doing, heard, day(good[-1].not_after_s) if good else claimed, device.board or "-"


def _doing(device: Device, seen: dict[str, Any]) -> str | None:
    """What it said last, unless it is out of the fleet since."""
    return None if device.state in ("claimed", "revoked") else seen.get("doing")


def day(unix_s: float) -> str:
    """2026-11-21 20:59, in this machine's time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _ago(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


# ---- saying -------------------------------------------------------------------------------------------------------------------------


def revoke(options: argparse.Namespace) -> int:
    """Put a device out."""
    members.revoke(Registry(fleet_folder(options)), options.name)
    print(f"{options.name} is out: its certificate is revoked, and a running gateway ends its connection within seconds")
    return 0


def pause(options: argparse.Namespace) -> int:
    """Stop a device's training."""
    return _stand(options, "paused", "stops training and stays connected")


def resume(options: argparse.Namespace) -> int:
    """Let a device work again."""
    return _stand(options, "active", "works again")


def drain(options: argparse.Namespace) -> int:
    """Let a device finish its job."""
    return _stand(options, "draining", "finishes its job and takes no other")


def wipe(options: argparse.Namespace) -> int:
    """Have a device remove everything."""
    if not options.yes:
        raise UsageError(f"this removes {options.name}'s training state, models and keys, and cannot be taken back: say --yes")
    return _stand(options, "wiping", "removes its state, models and at last its keys; what it has not sent is lost")


def _stand(options: argparse.Namespace, standing: members.Standing, said: str) -> int:
    members.stand(Registry(fleet_folder(options)), options.name, standing)
    print(f"{options.name} {said}, as soon as it is connected; `regrow fleet list` says what it does")
    return 0
