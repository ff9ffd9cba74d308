"""Files between the gateway and a broker that it does not start: what the broker reads, and the coordinator's password."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_server.credentials import Credentials, write_private
from regrow.errors import LocalError

GATEWAY_HOME = ".gateway"  # below RUNS: what the gateway itself needs


def password_in(file: Path) -> str:
    """The first line of a file of the owner's, a systemd credential or a container's secret.

    Raises:
        LocalError: it is empty or unreadable.
    """
    try:
        password = file.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"--broker-password-file {file}: {error}") from error
    if not password:
        raise LocalError(f"--broker-password-file {file} is empty: its first line is the password of the user in --broker")
    return password


def write(options: argparse.Namespace) -> int:
    """Write mosquitto's password_file and acl_file, hashes only, and where asked for the coordinator's password."""
    credentials = Credentials(options.runs / GATEWAY_HOME)
    files = credentials.render(options.out)
    print(f"password_file {files.passwords}\nacl_file {files.access}")
    if options.coordinator_password is not None:
        options.coordinator_password.parent.mkdir(parents=True, exist_ok=True)
        write_private(options.coordinator_password, f"{credentials.coordinator_password}\n".encode())
    print("for a broker that runs already: SIGHUP lets it read them again")
    return 0
