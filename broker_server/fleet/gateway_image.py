"""What goes on a Pi's boot partition so that it becomes a fleet's gateway, outdoors too: access point, DHCP, name, clock, data on an SSD.

Strategy: as for a device (images.py), with deploy/image/gateway/install.sh. The fleet's keys are made on the board, by `regrow fleet init`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from broker_server.fleet.boards import deploy_folder
from broker_server.fleet.images import Host, Wifi, keyfile_ssid, shell_settings, write_secret
from regrow.errors import UsageError
from regrow.topics import check_name

ADDRESS = "10.42.0.1"
NETWORK = "10.42.0.0/24"
STATE = "/var/lib/regrow"
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,16}\Z")


@dataclass(frozen=True, slots=True)
class GatewayImage:
    """A gateway's image.

    Args:
        host: it; its name is what devices dial.
        fleet: name of the fleet that is made on it.
        task: folder of the task that it serves.
        access_point: network that it opens for devices; None: it joins the one that is there.
        hosts: further names and addresses that devices may dial.
        ssd: label of the file system that the data lies on; "" keeps it on the card.

    Raises:
        UsageError: a part cannot be carried.
    """

    host: Host
    fleet: str
    task: Path
    access_point: Wifi | None = None
    hosts: tuple[str, ...] = ()
    ssd: str = ""

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        if not (self.task / "task.toml").is_file():
            raise UsageError(f"--task {self.task}: no task.toml there; `regrow task new` makes a task")
        if self.ssd and not _LABEL.match(self.ssd):
            raise UsageError(f"--ssd {self.ssd!r}: a label of 1 to 16 letters, digits, '_' and '-', as given to mkfs.ext4 -L")
        if self.access_point is not None and self.host.wifi is not None:
            raise UsageError("--wifi and --access-point: a Pi has one radio; connect the gateway by cable")
        if self.access_point is not None and not self.host.system.name.startswith("pi-os"):
            raise UsageError(f"--access-point: NetworkManager opens it, which {self.host.system.title} comes without; flash pi-os-trixie")
        for name in self.hosts:
            if not re.match(r"[A-Za-z0-9.:-]+\Z", name):
                raise UsageError(f"--name {name!r}: expected a host name or an address")

    @property
    def names(self) -> tuple[str, ...]:
        """What devices may dial, first what they do dial."""
        # systemd-resolved asks no DNS server for a name of one label, and .local is mDNS's.
        own = (f"{self.host.name}.local",) if self.access_point is None else (f"{self.host.name}.internal", ADDRESS)
        return (*own, *self.hosts)


def write_gateway(image: GatewayImage, folder: Path, debs: Path | None = None) -> bytes:
    """Write everything but the wheels of `regrow/`; returns bytes that tell this image from another one's."""
    deploy, host = deploy_folder(), image.host
    folder.mkdir(parents=True, exist_ok=True)
    country = image.access_point.country if image.access_point else host.wifi.country if host.wifi else ""
    settings = {
        "REGROW_PYTHON": host.system.python,
        "REGROW_FLEET": image.fleet,
        "REGROW_TASK_NAME": image.task.resolve().name,
        "REGROW_SSD": image.ssd,
        "REGROW_COUNTRY": country,
        "REGROW_HOSTS": " ".join(f"--host {name}" for name in image.names),
    }
    (folder / "gateway.conf").write_text(shell_settings(settings))
    (folder / "gateway.env").write_text(
        f"REGROW_TASK={STATE}/tasks/{image.task.resolve().name}\nREGROW_OPTIONS=--host 0.0.0.0 --fleet {STATE}/runs/.gateway/fleet\n"
    )
    (folder / "units").mkdir(exist_ok=True)
    shutil.copyfile(deploy / "regrow-gateway.service", folder / "units" / "regrow-gateway.service")
    shutil.copyfile(deploy / "image" / "gateway" / "install.sh", folder / "install.sh")
    shutil.copyfile(deploy / "image" / "gateway" / "chrony.conf", folder / "chrony.conf")
    shutil.copyfile(deploy / "journald@regrow.conf", folder / "journald@regrow.conf")
    shutil.copytree(image.task, folder / "task", dirs_exist_ok=True)
    if image.access_point is not None:
        _write_access_point(image.access_point, host.name, folder)
    for path in sorted(debs.glob("*.deb")) if debs is not None else ():
        (folder / "debs").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "debs" / path.name)
    return hashlib.sha256(repr(settings).encode()).digest()


def _write_access_point(wifi: Wifi, name: str, folder: Path) -> None:
    """NetworkManager opens the network; with "shared" it also runs a dnsmasq, which serves addresses and names."""
    connection = (
        "[connection]\nid=regrow-access-point\ntype=wifi\ninterface-name=wlan0\nautoconnect=true\n\n"
        f"[wifi]\nmode=ap\nband=bg\nssid={keyfile_ssid(wifi)}\n\n[wifi-security]\nkey-mgmt=wpa-psk\nproto=rsn\npsk={wifi.key}\n\n"
        f"[ipv4]\nmethod=shared\naddress1={ADDRESS}/24\n\n[ipv6]\nmethod=disabled\n"
    )
    write_secret(folder / "access-point.nmconnection", connection.encode())
    # local: nobody else is asked, for its IPv6 address too, which would take a device without the internet 15 s each time.
    (folder / "dnsmasq.conf").write_text(
        f"local=/internal/\nhost-record={name}.internal,{ADDRESS}\ndhcp-option=option:ntp-server,{ADDRESS}\n"
    )
