"""The fleet's folder: what it is (fleet.json) and who belongs to it (devices.json), changed by one process at a time.

Every command and the gateway read and change the same two files, so a change is made under a lock, from what is there at that moment,
and written whole; a reader without the lock sees the one before or the one after.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

import msgspec

from broker_server.credentials import COORDINATOR, DEVICE_NAME
from broker_server.durable import keep_owner, write_private
from regrow.errors import LocalError, UsageError

State = Literal["claimed", "active", "paused", "draining", "wiping", "wiped", "revoked"]
MEMBERS: tuple[State, ...] = ("active", "paused", "draining", "wiping")  # who may connect
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]+\Z", max_length=128)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
T = TypeVar("T")


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """fleet.json. hosts: names and addresses of the gateway, the first is what devices dial; created_s: unix seconds.

    key_number: of what was announced last of the coordinator's keys, 0 nothing ever; key_change_until_s: unix seconds at which the
    change that is under way ends at the latest, None: there is none.
    """

    name: str
    id: Hex
    hosts: Annotated[list[str], msgspec.Meta(min_length=1)]
    tls_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    enrol_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    created_s: Seconds
    key_number: Annotated[int, msgspec.Meta(ge=0)] = 0
    key_change_until_s: Seconds | None = None

    @property
    def broker(self) -> str:
        return f"mqtts://{_bracketed(self.hosts[0])}:{self.tls_port}"

    @property
    def enrol(self) -> str:
        return f"https://{_bracketed(self.hosts[0])}:{self.enrol_port}"


class Certified(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One certificate of a device, with the signing key that was handed in with it.

    key: SHA-256 of its TLS key; used: the device has said that it is connected with it; revoked_s: unix seconds, None: it is good.
    """

    serial: Hex
    key: Hex
    signing_key: Hex
    pem: str
    not_after_s: Seconds
    used: bool = False
    revoked_s: Seconds | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The right to be certified once. token: SHA-256; key: SHA-256 of the TLS key that has used it."""

    token: Hex
    expires_s: Seconds
    key: Hex | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the fleet knows of a device.

    number: of the last thing it was told, raised with every change of what it shall do; replace: serial of the certificate that it shall
    replace at once; board: what an image or a release must be for, where it was told; keys: which announcement of the coordinator's
    keys it believes.
    """

    state: State
    added_s: Seconds
    number: Annotated[int, msgspec.Meta(ge=1)] = 1
    board: str = ""
    claim: Claim | None = None
    certificates: list[Certified] = []
    replace: Hex | None = None
    keys: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def good(self) -> list[Certified]:
        """The certificates that are not revoked, the newest last."""
        return [certified for certified in self.certificates if certified.revoked_s is None]

    @property
    def may_join(self) -> bool:
        """Whether a claim of it waits to be used."""
        return self.claim is not None and self.claim.key is None and self.claim.expires_s >= now_s()

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """Ed25519 public keys that this device may sign with now, 32 bytes each; two while it changes its keys, none when it is out."""
        return tuple(bytes.fromhex(certified.signing_key) for certified in self.good) if self.state in MEMBERS else ()


class _Devices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    devices: dict[str, Device]


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same, with fields in it that earlier versions wrote."""

    version: Literal[1]
    devices: dict[str, dict[str, Any]]


class Registry:
    """The fleet whose files are in this folder.

    Raises:
        LocalError: there is no fleet, or others can read it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "fleet.json").is_file():
            raise UsageError(f"no fleet in {folder}: make one with `regrow fleet init NAME --fleet {folder}`")
        if folder.stat().st_mode & 0o077:
            raise LocalError(f"{folder} can be read by others, and holds the keys of the fleet; chmod 700 it")

    def fleet(self) -> Fleet:
        """Raises LocalError: fleet.json does not check out."""
        return _read(self.folder / "fleet.json", Fleet)

    def devices(self) -> dict[str, Device]:
        """By name, sorted. Raises LocalError: devices.json does not check out."""
        path = self.folder / "devices.json"
        listed = _read(path, _Listed).devices
        for name, fields in listed.items():
            check_device_name(name)
            fields.pop("percentile", None)  # of earlier versions, which drew it and never read it
        try:
            return dict(sorted(msgspec.convert(listed, dict[str, Device]).items()))
        except msgspec.ValidationError as error:
            raise _damaged(path, error) from error

    def device(self, name: str) -> Device:
        """Raises LocalError: there is none of that name."""
        return one(self.devices(), name)

    def stamp(self) -> tuple[int, ...]:
        """Another one whenever the devices, or the fleet's own settings, have changed."""
        found = [(self.folder / name).stat() for name in ("devices.json", "fleet.json")]
        return tuple(number for file in found for number in (file.st_mtime_ns, file.st_ino))

    @contextmanager
    def change(self) -> Iterator[dict[str, Device]]:
        """The devices, to be changed in the block; durable when it ends, unchanged when it raises. Others wait meanwhile."""
        with _locked(self.folder / "lock"):
            devices = self.devices()
            before = dict(devices)
            yield devices
            if devices != before:
                write_devices(self.folder, devices)


def write_fleet(folder: Path, fleet: Fleet) -> None:
    """Write fleet.json, the file that makes a folder a fleet: last of all."""
    write_private(folder / "fleet.json", msgspec.json.format(msgspec.json.encode(fleet)) + b"\n")


def write_devices(folder: Path, devices: Mapping[str, Device]) -> None:
    write_private(folder / "devices.json", msgspec.json.format(msgspec.json.encode(_Devices(1, dict(devices)))) + b"\n")


def read_seen(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> {seen_s, doing, serial} of the devices that were heard of; nothing durable hangs on it."""
    try:
        found = json.loads((folder / "seen.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def one(devices: Mapping[str, Device], name: str) -> Device:
    """Raises LocalError: there is none of that name."""
    if name not in devices:
        raise UsageError(f"no device {name!r} in this fleet: `regrow fleet list` names those that there are")
    return devices[name]


def check_device_name(name: str) -> str:
    """Returns the name. Raises LocalError: it cannot be a device's; the coordinator's rights go by its name."""
    if not DEVICE_NAME.fullmatch(name) or name == COORDINATOR:
        raise UsageError(f"device name {name!r}: expected 1 to 63 of a-z, 0-9, -, not first a -, and not {COORDINATOR!r}")
    return name


def now_s() -> int:
    """Unix seconds."""
    return int(time.time())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> LocalError:
    return LocalError(f"{path} does not check out: {error}; restore the fleet's folder from its backup")


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        keep_owner(file.fileno(), path.parent)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
