"""The updater's two files: the settings, which only root may write, and the journal, which says where an update is and anybody may read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.state import sync_folder
from regrow.errors import LocalError, UsageError

SETTINGS = Path("/etc/regrow/update.json")
PREFIX = Path("/opt/regrow")
AGENT = Path("/var/lib/private/regrow-agent")  # where systemd keeps the state of a unit with DynamicUser
RESTART = ("systemctl", "restart", "regrow-agent.service")
SUFFIX = ".bundle"


@dataclass(frozen=True, slots=True)
class Settings:
    """What /etc/regrow/update.json says.

    keys: Ed25519 public keys of the fleet; spool: where the agent lays complete bundles; health: the file that it writes;
    restart: the command that starts it anew; board: "" for what the firmware says.
    """

    keys: tuple[bytes, ...]
    prefix: Path = PREFIX
    spool: Path = AGENT / "spool"
    health: Path = AGENT / "health.json"
    restart: tuple[str, ...] = RESTART
    board: str = ""


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """PREFIX/update/journal.json, which anybody may read.

    step: what is to be done next, "" nothing; number: the newest release that was begun; slot, before: the environments it goes to and
    comes from; starts, began_s, boot: how often its trial began, and when (monotonic) in which boot of the machine; outcome: healthy,
    "rolled back" or failed, why in `reason`; refused: why the file `refused_file` was not taken.
    """

    format: int = 1
    step: str = ""
    number: int = 0
    version: str = ""
    slot: str = ""
    before: str = ""
    trial_minutes: float = 10.0
    wants: str = "round"
    starts: int = 0
    began_s: float = 0.0
    boot: str = ""
    outcome: str = ""
    reason: str = ""
    refused_file: str = ""
    refused: str = ""
    wheels: list[str] = []


def read_settings(path: Path) -> Settings:
    """Read the settings, which only root may have written.

    Raises:
        LocalError: they are missing, somebody else could have written them, or they do not check out.
    """
    try:
        found = path.stat()
        fields: Any = json.loads(path.read_bytes())
        keys = tuple(bytes.fromhex(key) for key in fields["keys"])
        paths = {name: Path(fields[name]) for name in ("prefix", "spool", "health") if name in fields}
        restart = tuple(fields.get("restart", RESTART))
        settings = Settings(keys, restart=restart, board=fields.get("board", ""), **paths)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; docs/updates.md says what belongs there") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} does not check out: {error!r}; docs/updates.md says what belongs there") from error
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise UsageError(f"{path} can be changed by others than root; chown root and chmod 644 it, after a look at its keys")
    if not keys or any(len(key) != 32 for key in keys) or not all(isinstance(word, str) for word in (*restart, settings.board)):
        raise UsageError(f"{path}: keys must be Ed25519 public keys, 64 hexadecimal digits each; restart a list of words; board a name")
    return settings


def read_journal(prefix: Path) -> Journal:
    """What the updater has noted; nothing where it never ran. Raises LocalError: it does not check out."""
    file = prefix / "update" / "journal.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=Journal)
    except FileNotFoundError:
        return Journal()
    except (OSError, msgspec.DecodeError) as error:
        raise LocalError(f"{file} does not check out: {error}; see which of {prefix}/a and b runs, and remove the file") from error


def write_journal(prefix: Path, journal: Journal) -> None:
    """Replace the journal; durable when it returns."""
    file = prefix / "update" / "journal.json"
    aside = file.with_name(".journal.json")
    with aside.open("wb") as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(journal), indent=1) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.chmod(0o644)
    aside.replace(file)
    sync_folder(file.parent)
