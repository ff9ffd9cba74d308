"""What goes on a board's boot partition, or onto any Linux, so that it becomes one device of a fleet with nobody's hand on it.

Strategy: every image holds the same folder `regrow/`: the device's own claim, an offline wheelhouse, the units and deploy/image/install.sh,
which does all the work. Around it stands what the system's first boot reads: cloud-init's files, which are YAML and are written as JSON
(which is YAML, and leaves nothing to quoting); a firstrun.sh for older Raspberry Pi OS; or one self-extracting script.

No image holds a key: the device makes its own. What is secret in it is the device's one-shot claim and, where Wi-Fi is asked for, that
network's key, derived from the passphrase as WPA2 does.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_server.fleet.boards import Role, System, deploy_folder, download, own_wheel
from regrow.broker_url import parse_broker_url
from regrow.errors import UsageError
from regrow.release import PYTHONS, wheel_fits
from regrow.topics import check_name

FIRST_RUN = "systemd.run={boot}/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target"
NEEDED: Mapping[Role, tuple[str, ...]] = {
    "agent": ("regrow", "pip", "numpy", "onnxruntime", "cryptography"),
    "gateway": ("regrow", "pip", "numpy", "onnxruntime", "cryptography", "onnx", "amqtt", "rich"),
}
UNITS = ("regrow-agent.service", "regrow-update.service", "regrow-update.path")
UPDATES = "--updates /etc/regrow/update.json"
PUBLIC_CLOCKS = "0.debian.pool.ntp.org 1.debian.pool.ntp.org 2.debian.pool.ntp.org 3.debian.pool.ntp.org"
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}\Z")
_SSH_KEY = re.compile(r"(ssh-ed25519|ecdsa-sha2-\S+|ssh-rsa|sk-\S+) [A-Za-z0-9+/=]+( .*)?\Z")
_TIMEZONE = re.compile(r"[A-Za-z0-9_+/-]+\Z")
_PLAIN = re.compile(r"[^\s\"'\\$`]+\Z")
_WPA_ITERATIONS = 4096  # IEEE 802.11i
_GLIBC = (2, 35)  # of the oldest system in the matrix
# cloud-init counts a runcmd as done when it begins. Where it failed, or the power did, the next boot runs it again.
_UNTIL_INSTALLED = "cd /var/lib/cloud/instance/sem; [ -e /etc/regrow/installed ] || rm -f config_runcmd config_scripts_user"


@dataclass(frozen=True, slots=True)
class Wifi:
    """A network and its 256-bit key, hexadecimal. country: two letters, which say what the radio may do."""

    ssid: str
    key: str
    country: str


@dataclass(frozen=True, slots=True)
class Host:
    """What any board's first boot is told.

    Args:
        system: that the image is for.
        name: of the host; a device's name too.
        wifi: network to join; None: Ethernet.
        user, ssh_keys: who may log in, by key alone; without keys nobody may.
        timezone: such as Europe/Berlin; "" leaves the system's.

    Raises:
        UsageError: a part cannot be carried.
    """

    system: System
    name: str
    wifi: Wifi | None = None
    user: str = "pi"
    ssh_keys: tuple[str, ...] = ()
    timezone: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "device")
        if self.name.endswith("-"):
            raise UsageError(f"{self.name!r} cannot be a host name, which ends with a letter or a digit; choose another name")
        if not _USER.match(self.user) or self.user in ("root", "regrow"):
            raise UsageError(f"--user {self.user!r}: lower-case letters, digits, '_' and '-', and neither root nor regrow")
        if self.timezone and not _TIMEZONE.match(self.timezone):
            raise UsageError(f"--timezone {self.timezone!r}: expected a name such as Europe/Berlin")


@dataclass(frozen=True, slots=True)
class Image:
    """One device's.

    Args:
        host: it, its name being the device's.
        claim: bytes of its claim, as `regrow fleet add` wrote it.
        data: where the device's data is, as `regrow agent --data` takes it.
        options: further options of the agent.

    Raises:
        UsageError: a part cannot be carried, or the claim is another device's.
    """

    host: Host
    claim: bytes
    data: str
    options: str = ""

    def __post_init__(self) -> None:
        for words, name in ((self.data, "--data"), *((word, "--agent-options") for word in self.options.split())):
            if not _PLAIN.match(words):
                raise UsageError(f"{name} {words!r}: quotes, blanks, '\\', '$' and '`' cannot be carried to the device's settings")
        claimed = claimed_device(self.claim)
        if claimed != self.host.name:
            raise UsageError(f"the claim is {claimed}'s, not {self.host.name}'s")


def claimed_device(claim: bytes) -> str:
    """Whose claim this is.

    Raises:
        UsageError: it is no claim, or it is an identity with keys in it, which no image may hold.
    """
    try:
        fields: Any = json.loads(claim)
        device, token, keys = fields["device"], fields["claim"], fields["coordinator_keys"]
        parse_broker_url(fields["broker"])
    except (ValueError, KeyError, TypeError, AttributeError, UsageError):
        raise UsageError("the claim: expected the file that `regrow fleet add NAME` wrote") from None
    if b"PRIVATE KEY" in claim or not isinstance(device, str) or not isinstance(token, dict) or not isinstance(keys, list):
        raise UsageError("the claim: expected the file that `regrow fleet add NAME` wrote, with no key in it")
    return device


def wifi_of(ssid: str, passphrase: str, country: str) -> Wifi:
    """The network with its key: PBKDF2-HMAC-SHA1 of the passphrase, as WPA2-Personal derives it.

    Raises:
        UsageError: the name, the passphrase or the country cannot be one. The passphrase is not repeated.
    """
    if not 1 <= len(ssid.encode()) <= 32 or any(ord(letter) < 32 for letter in ssid):
        raise UsageError(f"--wifi {ssid!r}: a network's name has 1 to 32 bytes")
    if not 8 <= len(passphrase) <= 63 or not all(32 <= ord(letter) < 127 for letter in passphrase):
        raise UsageError("the Wi-Fi passphrase: expected 8 to 63 printable ASCII characters")
    if not re.match(r"[A-Z]{2}\Z", country):
        raise UsageError(f"--country {country!r}: two capital letters, such as DE; the radio stays off without it")
    return Wifi(ssid, hashlib.pbkdf2_hmac("sha1", passphrase.encode(), ssid.encode(), _WPA_ITERATIONS, 32).hex(), country)


def ssh_keys_of(path: Path) -> tuple[str, ...]:
    """The public keys of a file.

    Raises:
        UsageError: it holds none, or something else.
    """
    text = path.read_text(errors="replace")
    if "PRIVATE KEY" in text:
        raise UsageError(f"{path} is a private key: name the .pub file beside it")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not lines or not all(_SSH_KEY.match(line) for line in lines):
        raise UsageError(f"{path}: expected one or more SSH public keys, such as those that ssh-keygen writes into .pub files")
    return lines


def collect_wheels(system: System, folder: Path, wheels: Path | None, wheel: Path | None, architecture: str, role: Role = "agent") -> None:
    """Fill a wheelhouse: from a folder of earlier downloads, or from the package index; and Regrow's own wheel.

    Raises:
        UsageError: something is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if wheels is not None:
        for path in _fitting(wheels, system.python, architecture, role):
            shutil.copyfile(path, folder / path.name)
    else:
        download(system.python, folder, architecture, role)
    if wheel is not None:
        shutil.copyfile(wheel, folder / wheel.name)
    elif not list(folder.glob("regrow-*.whl")):
        own_wheel(folder)
    for needed in NEEDED[role]:
        if not list(folder.glob(f"{needed}-*.whl")):
            raise UsageError(f"the wheelhouse has no wheel of {needed}: {_wheels_command(system.python, architecture, role)} fills one")


def _fitting(folder: Path, python: str, architecture: str, role: Role) -> list[Path]:
    """The folder's wheels that install there. python: "" for any.

    Raises:
        UsageError: there are none, or of something there is only one for another Python or processor.
    """
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise UsageError(f"--wheels {folder}: there are no wheels in it; {_wheels_command(python, architecture, role)} fills such a folder")
    pythons = [python] if python else PYTHONS
    fitting = [path for path in found if any(wheel_fits(path.name, one, architecture, _GLIBC) for one in pythons)]
    there = {_distribution(path) for path in fitting}
    misfit = next((path for path in found if _distribution(path) not in there), None)
    if misfit is not None:
        wanted = f"Python {python} on {architecture}" if python else architecture
        cure = f"{_wheels_command(python, architecture, role)} makes the right folder"
        raise UsageError(f"--wheels {folder}: {misfit.name} is not for {wanted}; {cure}")
    return fitting


def _distribution(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _wheels_command(python: str, architecture: str, role: Role) -> str:
    return f"`regrow image wheels --python {python or 'X.Y'} --architecture {architecture} --role {role} --out DIR`"


def write_payload(image: Image, folder: Path, data_file: Path | None = None) -> None:
    """Write everything but the wheels of `regrow/`: settings, claim, units, scripts."""
    deploy, host = deploy_folder(), image.host
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "REGROW_DEVICE": host.name,
        "REGROW_PYTHON": host.system.python,
        "REGROW_USER": host.user if host.ssh_keys else "",
        "REGROW_TIMEZONE": host.timezone,
        "REGROW_COUNTRY": host.wifi.country if host.wifi else "",
    }
    (folder / "device.env").write_text(shell_settings(settings))
    (folder / "agent.env").write_text(f"REGROW_DATA={image.data}\nREGROW_OPTIONS={' '.join(filter(None, (UPDATES, image.options)))}\n")
    write_secret(folder / "claim.json", image.claim)
    claim = json.loads(image.claim)
    keys: list[str] = claim.get("release_keys", claim["coordinator_keys"])  # public ones: what signs the fleet's releases
    (folder / "update.json").write_text(json.dumps({"keys": keys}, indent=2) + "\n")
    # timesyncd hears nothing of what NetworkManager learns by DHCP. It asks these in turn; a gateway that is an image is one of them.
    (folder / "timesyncd.conf").write_text(f"[Time]\nFallbackNTP={parse_broker_url(claim['broker']).host} {PUBLIC_CLOCKS}\n")
    (folder / "authorized_keys").write_text("".join(f"{key}\n" for key in host.ssh_keys))
    (folder / "units").mkdir(exist_ok=True)
    units = (*(deploy / name for name in UNITS), deploy / "image" / "regrow-wifi.service")
    for unit in units:
        shutil.copyfile(unit, folder / "units" / unit.name)
    for settings_file in ("regrow-agent-identity.conf", "journald@regrow.conf"):
        shutil.copyfile(deploy / settings_file, folder / settings_file)
    for script in ("install.sh", "wifi.sh"):
        shutil.copyfile(deploy / "image" / script, folder / script)
    shutil.rmtree(folder / "data", ignore_errors=True)  # of an image that was written here before
    if data_file is not None:
        (folder / "data").mkdir(exist_ok=True)
        shutil.copyfile(data_file, folder / "data" / data_file.name)


# ---- the three forms of a first boot --------------------------------------------------------------------------------------------------


def write_cloud_init(host: Host, instance: bytes, out: Path) -> None:
    """Write user-data, meta-data and network-config, as cloud-init's NoCloud source reads them from the boot partition.

    Args:
        instance: cloud-init does everything once per instance; other bytes are another instance.
    """
    user_data: dict[str, Any] = {
        "hostname": host.name,
        "manage_etc_hosts": True,
        "ssh_pwauth": False,
        "disable_root": True,
        "ssh_deletekeys": True,
        "users": [],
        "bootcmd": [["sh", "-c", _UNTIL_INSTALLED]],
        "runcmd": [["sh", f"{host.system.boot}/regrow/install.sh"]],
    }
    if host.ssh_keys:
        login: dict[str, Any] = {"name": host.user, "lock_passwd": True, "shell": "/bin/bash", "groups": "sudo"}
        user_data["users"] = [{**login, "sudo": "ALL=(ALL) NOPASSWD:ALL", "ssh_authorized_keys": list(host.ssh_keys)}]
    if host.timezone:
        user_data["timezone"] = host.timezone
    name = f"regrow-{host.name}-{hashlib.sha256(instance).hexdigest()[:8]}"
    (out / "user-data").write_text(f"#cloud-config\n{json.dumps(user_data, indent=2)}\n")
    (out / "meta-data").write_text(json.dumps({"instance-id": name, "local-hostname": host.name}, indent=2) + "\n")
    write_secret(out / "network-config", json.dumps(_network(host.wifi), indent=2).encode() + b"\n")


def shell_settings(settings: Mapping[str, str]) -> str:
    """Lines that a shell script reads with "."."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())


def _network(wifi: Wifi | None) -> dict[str, Any]:
    """Netplan's form, version 2. Both links are optional: a boot waits for neither."""
    network: dict[str, Any] = {"version": 2, "ethernets": {"eth0": {"dhcp4": True, "optional": True}}}
    if wifi is not None:
        points = {wifi.ssid: {"password": wifi.key}}
        network["wifis"] = {"wlan0": {"dhcp4": True, "optional": True, "regulatory-domain": wifi.country, "access-points": points}}
    return network


def write_first_run(host: Host, out: Path, boot: Path) -> str:
    """Write firstrun.sh, and a cmdline.txt that starts it where `boot` has one; returns what is left to do by hand, or ""."""
    shutil.copyfile(deploy_folder() / "image" / "firstrun.sh", out / "firstrun.sh")
    if host.wifi is not None:
        write_wifi(host.wifi, out / "regrow" / "wifi")
    words = FIRST_RUN.format(boot=host.system.boot)
    line = boot / "cmdline.txt"
    if not line.is_file():
        return f"append this to the one line of cmdline.txt on the boot partition: {words}"
    before = line.read_bytes().strip()
    if b"systemd.run=" not in before:
        (out / line.name).write_bytes(before + f" {words}\n".encode())
    return ""


def write_wifi(wifi: Wifi, folder: Path) -> None:
    """Write a network for deploy/image/wifi.sh to take over: NetworkManager's form and netplan's."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = (
        f"[connection]\nid=regrow-wifi\ntype=wifi\nautoconnect=true\n\n[wifi]\nmode=infrastructure\nssid={keyfile_ssid(wifi)}\n\n"
        f"[wifi-security]\nkey-mgmt=wpa-psk\npsk={wifi.key}\n\n[ipv4]\nmethod=auto\n\n[ipv6]\nmethod=auto\n"
    )
    write_secret(folder / "regrow-wifi.nmconnection", connection.encode())
    network = _network(wifi)
    del network["ethernets"]
    write_secret(folder / "60-regrow-wifi.yaml", json.dumps({"network": network}, indent=2).encode() + b"\n")


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, where the file system knows owners."""
    path.unlink(missing_ok=True)  # of another mode
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def keyfile_ssid(wifi: Wifi) -> str:
    """The network's name as NetworkManager's files take it: bytes in decimal, so that no name needs quoting."""
    return "".join(f"{byte};" for byte in wifi.ssid.encode())


def write_script(payload: Path, path: Path) -> None:
    """Write one script that unpacks the folder into a temporary one and runs its install.sh."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        archive.add(payload, "regrow", filter=_nobodys)
    head = (
        "#!/bin/sh\n# Makes this machine one device of a Regrow fleet. Run once, as root.\nset -eu\n"
        "scratch=$(mktemp -d)\ntrap 'rm -rf \"$scratch\"' EXIT\n"
        'sed \'1,/^__REGROW__$/d\' "$0" | base64 -d | tar xzf - -C "$scratch"\nsh "$scratch/regrow/install.sh"\nexit 0\n__REGROW__\n'
    )
    path.write_bytes(head.encode() + base64.encodebytes(raw.getvalue()))
    path.chmod(0o700)


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
