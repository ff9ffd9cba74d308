"""What can happen to a device of the fleet, from its claim to its end; each a change of the registry, made whole or not at all."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from broker_server.durable import write_private
from broker_server.fleet import authority as certificates
from broker_server.fleet import coordinator_key
from broker_server.fleet.authority import Authority, Request
from broker_server.fleet.registry import (
    MEMBERS,
    Certified,
    Claim,
    Device,
    Fleet,
    Registry,
    check_device_name,
    now_s,
    one,
    write_devices,
    write_fleet,
)
from regrow.errors import LocalError, PeerError, UsageError
from regrow.topics import check_name

TLS_PORT, ENROL_PORT = 8883, 8443
CLAIM_DAYS = 7.0
KEEP_REVOKED = 8  # certificates of a device that are revoked, or ended, and still remembered
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*\.?\Z")
Standing = Literal["active", "paused", "draining", "wiping"]


def init(folder: Path, name: str, hosts: Sequence[str], *, tls_port: int = TLS_PORT, enrol_port: int = ENROL_PORT) -> Fleet:
    """Make a fleet: its CA, the coordinator's key, the broker's certificate, an empty list of revoked ones and of devices.

    Args:
        hosts: names and addresses at which devices find the gateway, the first is the one that they dial.

    Raises:
        LocalError: there is a fleet already, or a name or port cannot be one.
    """
    check_name(name, "fleet")
    for host in hosts:
        _check_host(host)
    _check_ports(tls_port, enrol_port)
    if (folder / "fleet.json").exists():
        raise UsageError(f"{folder} holds a fleet already, and its keys cannot be made twice; another fleet needs another --fleet")
    if (folder / "ca.key").exists():
        raise LocalError(f"{folder} holds keys but no fleet.json: an init was cut off, or a backup half restored; remove or restore it")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    fleet = Fleet(name=name, id=secrets.token_hex(8), hosts=list(hosts), tls_port=tls_port, enrol_port=enrol_port, created_s=now_s())
    certificates.make(folder, name, fleet.id)
    authority = Authority(folder)
    authority.certify_broker(fleet.hosts)
    authority.write_list(())
    write_devices(folder, {})
    write_fleet(folder, fleet)
    return fleet


# ---- coming in ----------------------------------------------------------------------------------------------------------------------


def claim(registry: Registry, name: str, *, days: float = CLAIM_DAYS, board: str = "") -> dict[str, Any]:
    """Let a device in: what goes into its claim file. A device that is out of the fleet, or lost its keys, gets another claim.

    Raises:
        LocalError: the device is in the fleet and connected with a certificate that is good; its name cannot be one.
    """
    check_device_name(name)
    fleet, authority = registry.fleet(), Authority(registry.folder)
    token, expires_s = secrets.token_urlsafe(32), now_s() + int(days * 86400)
    with registry.change() as devices:
        known = devices.get(name)
        if known is not None and known.state in MEMBERS:
            raise UsageError(f"{name} is in the fleet already; `regrow fleet revoke {name}` first, if its keys are lost")
        right = Claim(token=_digest(token), expires_s=expires_s)
        if known is None:
            devices[name] = Device(state="claimed", added_s=now_s(), board=board, claim=right, keys=fleet.key_number)
        else:
            devices[name] = replace(known, state="claimed", claim=right, replace=None, board=board or known.board, keys=fleet.key_number)
    return {**_about(fleet, authority, name), "claim": {"token": token, "expires_s": expires_s, "ca": authority.certificate_pem}}


def enrol(registry: Registry, authority: Authority, name: str, token: str, request: Request) -> str:
    """The certificate (PEM) for a claim: the first request gets it, the same one gets it again, another one gets none.

    Raises:
        PeerError: there is no such claim, it has expired or was used by another key. It does not say which: a guess learns nothing.
    """
    with registry.change() as devices:
        device = devices.get(name)
        right = None if device is None else device.claim
        if device is None or right is None or not hmac.compare_digest(right.token, _digest(token)):
            raise PeerError("no such claim")
        if right.expires_s < now_s():
            raise PeerError("no such claim")
        if right.key is not None:
            if right.key != request.key:
                raise PeerError("no such claim")
            return next(certified.pem for certified in device.certificates if certified.key == right.key)
        certified = _certify(authority, request)
        state = "active" if device.state == "claimed" else device.state
        devices[name] = _with(replace(device, state=state, claim=replace(right, key=request.key), number=device.number + 1), certified)
        return certified.pem


def renew(registry: Registry, authority: Authority, request: Request) -> str:
    """Another certificate (PEM) for a device of the fleet; the same request gets the same one again.

    Raises:
        PeerError: the device is not in the fleet.
    """
    with registry.change() as devices:
        device = devices.get(request.device)
        if device is None or device.state not in MEMBERS:
            raise PeerError(f"{request.device} is not in the fleet")
        known = next((certified for certified in device.good if certified.key == request.key), None)
        if known is None:
            known = _certify(authority, request)
            unused = [certified.serial for certified in device.good[1:] if not certified.used]  # of a request that was given up
            devices[request.device] = _with(_revoke(device, unused), known)
            if unused:
                authority.write_list(revoked(devices))
    return known.pem


def in_use(registry: Registry, authority: Authority, name: str, serial: str) -> bool:
    """The device has said over its link which certificate it uses: older ones are revoked now. Returns whether any was.

    Nearly every call changes nothing, and then writes nothing.
    """
    known = registry.devices().get(name)
    if known is None or _after_use(known, serial) == known:
        return False
    with registry.change() as devices:
        device = devices.get(name)
        if device is None:
            return False
        devices[name] = _after_use(device, serial)
        if old := len(device.good) > len(devices[name].good):
            authority.write_list(revoked(devices))
    return old


def _after_use(device: Device, serial: str) -> Device:
    serials = [certified.serial for certified in device.good]
    if serial not in serials:
        return device
    old = serials[: serials.index(serial)]
    used = [replace(certified, used=certified.used or certified.serial == serial) for certified in device.certificates]
    claim_left = device.claim if device.claim is not None and device.claim.key is None else None
    kept = None if device.replace in old else device.replace
    return _revoke(replace(device, certificates=used, claim=claim_left, replace=kept), old)


# ---- standing -----------------------------------------------------------------------------------------------------------------------


def stand(registry: Registry, name: str, standing: Standing) -> Device:
    """Say what the device shall do from now on: work, pause, finish what it has and stop, or remove everything.

    Raises:
        LocalError: it is not in the fleet, or is being wiped.
    """
    with registry.change() as devices:
        device = _member(devices, name)
        if device.state == "wiping" and standing != "wiping":
            raise UsageError(f"{name} is being wiped; that cannot be taken back")
        if device.state != standing:
            devices[name] = replace(device, state=standing, number=device.number + 1)
        return devices[name]


def rotate(registry: Registry, name: str) -> Device:
    """Ask the device for new keys; the old certificate is revoked once the new one is in use. Raises LocalError: it is not in the fleet."""
    with registry.change() as devices:
        device = _member(devices, name)
        if not device.good:
            raise UsageError(f"{name} has no certificate yet")
        devices[name] = replace(device, replace=device.good[0].serial, number=device.number + 1)
        return devices[name]


def revoke(registry: Registry, name: str) -> Device:
    """Put a device out: its certificates are revoked and its claim is void. Raises LocalError: there is no such device."""
    authority = Authority(registry.folder)
    with registry.change() as devices:
        device = one(devices, name)
        serials = [certified.serial for certified in device.good]
        devices[name] = _revoke(replace(device, state="revoked", claim=None, replace=None), serials)
        authority.write_list(revoked(devices))
        return devices[name]


def wiped(registry: Registry, authority: Authority, name: str) -> None:
    """The device has said that everything is gone but its keys, and these go next: its certificates are of no use any more."""
    with registry.change() as devices:
        device = devices.get(name)
        if device is not None and device.state == "wiping":
            serials = [certified.serial for certified in device.good]
            devices[name] = _revoke(replace(device, state="wiped", claim=None, replace=None), serials)
            authority.write_list(revoked(devices))


def revoked(devices: Mapping[str, Device]) -> list[tuple[str, int]]:
    """(serial, when) of every certificate that is revoked."""
    return [(c.serial, c.revoked_s) for device in devices.values() for c in device.certificates if c.revoked_s is not None]


def renew_own(registry: Registry, authority: Authority) -> list[str]:
    """Make anew what runs out: the broker's certificate, the list of revoked ones. Returns what was, in words."""
    said, hosts = [], registry.fleet().hosts
    with registry.change() as devices:
        if authority.broker_is_stale(hosts):
            authority.certify_broker(hosts)
            said.append("the broker has a new certificate")
        if authority.list_is_stale():
            authority.write_list(revoked(devices))
            said.append("the list of revoked certificates is new")
    return said


# ---- files for devices --------------------------------------------------------------------------------------------------------------


def write_claim(registry: Registry, name: str, folder: Path, *, days: float = CLAIM_DAYS, board: str = "") -> Path:
    """Write NAME.claim.json, all that a device needs to join, once; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.claim.json"
    write_private(path, json.dumps(claim(registry, name, days=days, board=board), indent=2).encode() + b"\n")
    return path


def _about(fleet: Fleet, authority: Authority, name: str) -> dict[str, Any]:
    keys = [key.hex() for key in coordinator_key.believed(fleet, authority)]
    where = {"device": name, "fleet": fleet.name, "broker": fleet.broker, "enrol": fleet.enrol}
    releases = {"release_keys": [authority.release_key.hex()]}
    return {**where, "coordinator_keys": keys, "keys_number": fleet.key_number, **releases, "since_s": now_s()}


def _member(devices: Mapping[str, Device], name: str) -> Device:
    device = one(devices, name)
    if device.state not in MEMBERS:
        raise UsageError(f"{name} is {device.state}, not in the fleet")
    return device


def _certify(authority: Authority, request: Request) -> Certified:
    issued = authority.certify_device(request)
    return Certified(
        serial=issued.serial, key=request.key, signing_key=request.signing_key.hex(), pem=issued.pem, not_after_s=issued.not_after_s
    )


def _with(device: Device, certified: Certified) -> Device:
    """The device with one certificate more; long-ended and long-revoked ones are forgotten."""
    old = [known for known in device.certificates if known.revoked_s is not None]
    ended = {known.serial for known in old if known.not_after_s < now_s()} if len(old) > KEEP_REVOKED else set()
    return replace(device, certificates=[*(known for known in device.certificates if known.serial not in ended), certified])


def _revoke(device: Device, serials: Sequence[str]) -> Device:
    when_s = now_s()
    changed = [replace(known, revoked_s=when_s) if known.serial in serials else known for known in device.certificates]
    return replace(device, certificates=changed)


def _check_host(host: str) -> None:
    try:
        if ipaddress.ip_address(host).is_unspecified:
            raise UsageError(f"--host {host!r} stands for all addresses of a machine: say the one that devices dial, or leave --host out")
    except ValueError:
        if not _HOST.match(host):
            raise UsageError(f"--host {host!r}: expected a name or an address of this gateway, as devices see it") from None


def _check_ports(tls_port: int, enrol_port: int) -> None:
    for option, port in (("--tls-port", tls_port), ("--enrol-port", enrol_port)):
        if not 0 < port < 2**16:
            raise UsageError(f"{option} {port}: 1 to 65535; devices carry it in their identities")
    if tls_port == enrol_port:
        raise UsageError(f"--tls-port and --enrol-port are both {tls_port}: two programs listen there, so each needs a port of its own")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
