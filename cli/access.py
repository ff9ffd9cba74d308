"""Who may connect: devices' passwords, and the files of a broker that the gateway does not start."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_server.credentials import Credentials
from broker_server.durable import write_private
from cli.arguments import GATEWAY_HOME, own_fleet
from regrow.broker_url import parse_broker_url
from regrow.errors import UsageError


def add(options: argparse.Namespace) -> int:
    """Give a device its password and write its bundle."""
    parse_broker_url(options.broker, of_device=True)  # here, and not on a device that somebody then has to reach
    credentials = Credentials(options.runs / GATEWAY_HOME)
    credentials.add_device(options.name)
    fleet = own_fleet(options.runs) / "ca.crt"
    authority = fleet.read_text() if options.broker.startswith("mqtts") and fleet.exists() else None
    print(credentials.write_bundle(options.name, options.broker, options.out, authority))
    return 0


def remove(options: argparse.Namespace) -> int:
    """Take a device's access away."""
    Credentials(options.runs / GATEWAY_HOME).remove_device(options.name)
    print(f"{options.name} can no longer connect")
    return 0


def listing(options: argparse.Namespace) -> int:
    """Name the devices that may connect."""
    print("\n".join(Credentials(options.runs / GATEWAY_HOME).devices()) or "no devices yet: regrow device add NAME")
    return 0


def password_in(file: Path) -> str:
    """The first line of a file of the owner's, a systemd credential or a container's secret.

    Raises:
        LocalError: it is empty or unreadable.
    """
    try:
        password = file.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--broker-password-file {file}: {error}") from error
    if not password:
        raise UsageError(f"--broker-password-file {file} is empty: its first line is the password of the user in --broker")
    return password


def broker_files(options: argparse.Namespace) -> int:
    """Write mosquitto's password_file and acl_file, hashes only, and where asked for the coordinator's password."""
    credentials = Credentials(options.runs / GATEWAY_HOME)
    files = credentials.render(options.out)
    print(f"password_file {files.passwords}\nacl_file {files.access}")
    if options.coordinator_password is not None:
        options.coordinator_password.parent.mkdir(parents=True, exist_ok=True)
        write_private(options.coordinator_password, f"{credentials.coordinator_password}\n".encode())
    print("for a broker that runs already: SIGHUP lets it read them again")
    return 0
