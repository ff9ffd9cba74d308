"""Who may connect to the broker and what they may say: secrets on the gateway, files for either broker.

Strategy: one JSON file (0600) in the gateway's home holds the secrets; everything a broker reads is rendered from it
and holds salted hashes only. The access rules are data here, rendered for mosquitto and evaluated by the embedded
broker, so that both enforce the same list.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_server.durable import write_private
from regrow.errors import LocalError, UsageError

COORDINATOR = "coordinator"
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# The secrets are 256 random bits: no amount of hashing makes them harder to guess, and every reconnect of a fleet
# pays for
# each iteration. 101 is mosquitto's own default.
PBKDF2_ITERATIONS = 101
SALT_BYTES = 12

# All that a device leaves retained, for a while: the chunks by which `regrow measure uplink --down` measures, and no more of them.
DEVICE_RETAINS = tuple(f"regrow/v1/measure/uplink/device/%u/probe/{group}/{index}" for group in range(2) for index in range(4))
# %u is the user, who is the device. `#` also matches the topic above it. What a device may write is named topic by topic: with a wildcard
# it could fill the broker with retained messages on topics that nobody knows of.
DEVICE_WRITES = (
    "regrow/v1/device/%u/hello",
    "regrow/v1/device/%u/status",
    "regrow/v1/device/%u/promotion/+",
    "regrow/v1/device/%u/release-report",
    "regrow/v1/device/%u/control-report",
    "regrow/v1/device/%u/certificate-request",
    "regrow/v1/device/%u/observations",
    "regrow/v1/device/%u/field-report",
    "regrow/v1/device/%u/doctor-report",
    "regrow/v1/device/%u/doctor-echo",
    "regrow/v1/device/%u/meter",  # of an external meter, which has a login of its own: what another device's agent listens to
    "regrow/v1/+/+/device/%u/update/+/+",
    "regrow/v1/+/+/device/%u/telemetry",
    "regrow/v1/+/+/device/%u/probe",
    *DEVICE_RETAINS,
)
DEVICE_READS = (
    "regrow/v1/device/%u/#",
    "regrow/v1/device/+/meter",
    "regrow/v1/+/claim",
    "regrow/v1/release/#",
    "regrow/v1/+/promotion",
    "regrow/v1/+/promotion/file/#",
    "regrow/v1/+/+/manifest/#",
    "regrow/v1/+/+/program/#",
    "regrow/v1/+/+/order/#",
    "regrow/v1/+/+/chunk/#",
    "regrow/v1/+/+/device/%u/#",
)
COORDINATOR_TOPICS = ("regrow/v1/#",)
# What only devices say, all devices. Nobody else subscribes to these very filters, so they come and go without harm.
FROM_DEVICES = tuple(f"{rule.replace('%u', '+')}/#" for rule in DEVICE_WRITES)


def may_write(user: str, topic: str) -> bool:
    """Whether the user may publish to this topic."""
    rules = COORDINATOR_TOPICS if user == COORDINATOR else DEVICE_WRITES
    return any(covers(rule.replace("%u", user), topic) for rule in rules)


def may_retain(user: str, topic: str) -> bool:
    """Whether the broker may keep what the user publishes there."""
    return user == COORDINATOR or any(covers(rule.replace("%u", user), topic) for rule in DEVICE_RETAINS)


def may_read(user: str, topic_filter: str) -> bool:
    """Whether the user may hear everything that this filter (or topic) matches."""
    rules = COORDINATOR_TOPICS if user == COORDINATOR else DEVICE_READS
    return any(covers(rule.replace("%u", user), topic_filter) for rule in rules)


def covers(rule: str, topic_filter: str) -> bool:
    """Whether every topic that the filter matches is matched by the rule; a plain topic matches itself."""
    rule_levels, levels = rule.split("/"), topic_filter.split("/")
    for at, wanted in enumerate(rule_levels):
        if wanted == "#":
            return True
        if at >= len(levels) or levels[at] == "#":
            return False
        if wanted not in ("+", levels[at]):
            return False
    return len(levels) == len(rule_levels)


def hash_password(password: str, salt: bytes) -> str:
    """The `$7$` form of mosquitto 2.x: PBKDF2-HMAC-SHA512, 64 bytes."""
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, PBKDF2_ITERATIONS, 64)
    return f"$7${PBKDF2_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def check_password(password: str, hashed: str) -> bool:
    """Whether the password is the one that `hash_password` hashed; False, too, for a hash that is not one."""
    try:
        empty, kind, iterations, salt, digest = hashed.split("$")
        wanted = base64.b64decode(digest, validate=True)
        found = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), int(iterations), len(wanted))
    except (ValueError, OverflowError):
        return False
    return empty == "" and kind == "7" and hmac.compare_digest(found, wanted)


@dataclass(frozen=True, slots=True)
class BrokerFiles:
    """What was rendered for a broker to read."""

    passwords: Path  # mosquitto password_file
    access: Path  # mosquitto acl_file
    embedded: Path  # JSON {user: hash}


class Credentials:
    """The gateway's secrets in HOME/credentials.json; made on first use, written atomically, the owner's only.

    Raises:
        LocalError: the file does not check out, or others can read it.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / "credentials.json"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._path.exists():
            self._coordinator, self._devices = _load(self._path)
        else:
            self._coordinator, self._devices = secrets.token_urlsafe(32), dict[str, str]()
            self._save()

    @property
    def coordinator_password(self) -> str:
        return self._coordinator

    def devices(self) -> tuple[str, ...]:
        """The names of all devices, sorted."""
        return tuple(sorted(self._devices))

    def password(self, device: str) -> str:
        """Raises LocalError: no such device."""
        try:
            return self._devices[device]
        except KeyError:
            raise UsageError(f"no device {device!r}; add it first") from None

    def add_device(self, device: str) -> str:
        """Give a device its password; returns it. A device that is there already keeps the one it has.

        Raises:
            LocalError: the name is not [a-z0-9][a-z0-9-]{0,62}, or is the coordinator's.
        """
        if not DEVICE_NAME.fullmatch(device) or device == COORDINATOR:
            raise UsageError(f"device name {device!r}: expected 1 to 63 of a-z, 0-9, -, not first a -, and not {COORDINATOR!r}")
        if device not in self._devices:
            self._devices[device] = secrets.token_urlsafe(32)
            self._save()
        return self._devices[device]

    def remove_device(self, device: str) -> None:
        """Take a device's access away; takes effect with the broker's reload. Raises LocalError: no such device."""
        if device not in self._devices:
            raise UsageError(f"no device {device!r}: `regrow device list` names those that there are")
        del self._devices[device]
        self._save()

    def write_bundle(self, device: str, broker_url: str, folder: Path, authority: str | None = None) -> Path:
        """Write NAME.json, all that a device needs to connect, readable by the owner only; returns its path.

        Args:
            authority: the CA that the device checks the broker by, PEM; None: the system's.
        """
        bundle = {"device": device, "broker": broker_url, "password": self.password(device)}
        if authority is not None:
            bundle["ca"] = authority
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{device}.json"
        write_private(path, json.dumps(bundle, indent=2).encode() + b"\n")
        return path

    def render(self, folder: Path, *, passwords: bool = True, denied: Iterable[str] = ()) -> BrokerFiles:
        """Write the files that the brokers read, hashes only; unchanged users keep their salt while the files exist.

        Args:
            passwords: also those of devices; else they come with certificates, and only the coordinator has one.
            denied: devices that mosquitto gives no topic at all, whatever they show.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        files = BrokerFiles(folder / "passwords", folder / "access", folder / "users.json")
        before = _hashes(files.embedded)
        hashes: dict[str, str] = {}
        for user, password in {COORDINATOR: self._coordinator, **(self._devices if passwords else {})}.items():
            known = before.get(user, "")
            fresh = check_password(password, known)
            hashes[user] = known if fresh else hash_password(password, secrets.token_bytes(SALT_BYTES))
        write_private(files.passwords, "".join(f"{user}:{hashed}\n" for user, hashed in hashes.items()).encode())
        write_private(files.access, _mosquitto_access(denied).encode())
        write_private(files.embedded, json.dumps(hashes, indent=1).encode())
        return files

    def _save(self) -> None:
        state = {"coordinator": self._coordinator, "devices": self._devices}
        write_private(self._path, json.dumps(state, indent=2, sort_keys=True).encode() + b"\n")


def _mosquitto_access(denied: Iterable[str] = ()) -> str:
    lines = [f"user {COORDINATOR}"]
    lines += [f"topic readwrite {topic}" for topic in COORDINATOR_TOPICS]
    lines += [line for device in sorted(denied) for line in (f"user {device}", "topic deny #")]
    lines += [f"pattern write {rule}" for rule in DEVICE_WRITES]
    lines += [f"pattern read {rule}" for rule in DEVICE_READS]
    return "\n".join(lines) + "\n"


def _load(path: Path) -> tuple[str, dict[str, str]]:
    if path.stat().st_mode & 0o077:
        raise LocalError(f"{path} can be read by others; chmod 600 it and issue new secrets if it may have been read")
    try:
        state: Any = json.loads(path.read_bytes())
        coordinator, devices = state["coordinator"], state["devices"]
    except (ValueError, KeyError, TypeError) as err:
        raise LocalError(f"{path} does not check out: {err!r}") from err
    if not isinstance(coordinator, str) or not coordinator or not isinstance(devices, dict):
        raise LocalError(f"{path} does not check out: expected a coordinator secret and a table of devices")
    for name, password in devices.items():
        if not DEVICE_NAME.fullmatch(name) or not isinstance(password, str) or not password:
            raise LocalError(f"{path} does not check out: device {name!r}")
    return coordinator, devices


def _hashes(path: Path) -> dict[str, str]:
    """The hashes of the last rendering; none when there was none or it does not check out (then all get new salts)."""
    try:
        known: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {user: hashed for user, hashed in known.items() if isinstance(hashed, str)}
