"""The folder that holds a device's identity: every file is the owner's only, and a change of keys is made wholly or not at all.

New keys are made in `pending/`; when the certificate for them has come that folder is renamed to `ready/`, which decides it, and its
files then take the places of the old ones. Whoever opens the folder finishes that move first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.state import sync_folder
from regrow import topics
from regrow.broker_url import parse_broker_url
from regrow.errors import LocalError, UsageError

KEY, CERTIFICATE, SIGNING_KEY, AUTHORITY, WIPING = "device.key", "device.crt", "signing.key", "ca.crt", "wiping"
RUNNING = "running"


def new_claim(device: str = "NAME", folder: Path | str = "DIR") -> str:
    """The commands that let a device in again, whatever it has lost."""
    return (
        f"`regrow fleet revoke {device}` and `regrow fleet add {device}` on the gateway, "
        f"then `regrow join {device}.claim.json --identity {folder}` on the device"
    )


CURE = f"let this device in anew: {new_claim()}"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to be certified once, until then (unix seconds)."""

    token: str
    expires_s: int


@dataclass(frozen=True, slots=True)
class About:
    """device.json: where the fleet is, and who speaks for it.

    coordinator_keys: Ed25519 public keys, 32 bytes each; keys_number: of the announcement that they are from, 0: none; authority: the
    fleet's CA, PEM, of the claim or of ca.crt; since_s: unix seconds at which the gateway wrote this: it is later now, whatever the
    clock says; claim: not yet used.
    """

    device: str
    fleet: str
    broker: str
    enrol: str
    coordinator_keys: tuple[bytes, ...]
    authority: str
    since_s: int
    claim: Claim | None = None
    keys_number: int = 0


def adopt(folder: Path, claim_file: Path) -> About:
    """Make the claim file NAME.claim.json this folder's; what it was before stays until the new certificate has come.

    Raises:
        LocalError: it is no claim, or the folder cannot be written.
    """
    about = claim_in(claim_file)
    with opened(folder):
        shutil.rmtree(folder / "pending", ignore_errors=True)
        write(folder / "device.json", claim_file.read_bytes())
    return about


def claim_in(file: Path) -> About:
    """What the claim file says. Raises LocalError: it is no claim."""
    about = _about(file, "copy it from the gateway again, or make another there: `regrow fleet add NAME`")
    if about.claim is None:
        raise UsageError(f"{file}: no claim in it; make one on the gateway with `regrow fleet add NAME`")
    return about


def has_used(folder: Path, claim: Claim) -> bool:
    """Whether the certificate in the folder is what this very claim was turned into."""
    if not has_certificate(folder):
        return False
    settle(folder)
    read_about(folder)
    return bool(json.loads((folder / "device.json").read_text()).get("claimed") == _digest(claim))


def settle(folder: Path) -> None:
    """Finish what a power cut interrupted. Raises LocalError: the folder cannot be used."""
    with opened(folder):
        pass


def read_about(folder: Path) -> About:
    """What device.json says. Raises LocalError: there is none, or it does not check out."""
    return _about(folder / "device.json", f"put a copy of it back, or {CURE}")


def believe(folder: Path, keys: Sequence[bytes], number: int) -> About:
    """Let these be the coordinator's keys from now on, durably, unless a later announcement is known; returns what is there then.

    Raises:
        LocalError: the folder cannot be written.
    """
    with opened(folder):
        if number > read_about(folder).keys_number:
            said = json.loads((folder / "device.json").read_text())
            said |= {"coordinator_keys": [key.hex() for key in keys], "keys_number": number}
            write(folder / "device.json", json.dumps(said, indent=2).encode() + b"\n")
        return read_about(folder)


def has_certificate(folder: Path) -> bool:
    return (folder / CERTIFICATE).exists() or (folder / "ready").exists()


def begin_wipe(folder: Path) -> None:
    """Remember, durably, that everything is to be removed: whoever opens the folder next goes on with it."""
    with opened(folder):
        write(folder / WIPING, b"\n")


def is_news(claim_file: Path, folder: Path) -> bool:
    """Whether the claim file is later than what the folder has, or that has nothing; a file that is gone is none where there is something.

    Raises:
        LocalError: it is no claim.
    """
    known = (folder / "device.json").exists()
    if known and not claim_file.exists():
        return False
    return not known or claim_in(claim_file).since_s > read_about(folder).since_s


def is_wiping(folder: Path) -> bool:
    return (folder / WIPING).exists()


def can_speak(folder: Path) -> bool:
    """Whether there are keys to say anything with."""
    return all((folder / name).exists() for name in (KEY, SIGNING_KEY, CERTIFICATE, "device.json"))


def wipe(folder: Path) -> None:
    """Remove the identity: keys first, the mark of `begin_wipe` last. What flash keeps under other blocks is beyond a file system.

    Raises:
        LocalError: something cannot be removed.
    """
    try:
        for name in (SIGNING_KEY, KEY):
            if (folder / name).exists():
                with (folder / name).open("r+b") as file:
                    file.write(bytes((folder / name).stat().st_size))
                    file.flush()
                    os.fsync(file.fileno())
                (folder / name).unlink()
        for entry in list(folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != WIPING:
                entry.unlink()
        sync_folder(folder)
        (folder / WIPING).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise LocalError(f"cannot remove {error.filename or folder}: {error.strerror or error}") from error


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Alone in the folder, with an interrupted change finished."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        with os.fdopen(os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            finish_change(folder)
            yield
    except OSError as error:
        raise LocalError(f"{error.filename or folder}: {error.strerror or error}; check its owner and the disk") from error


@contextmanager
def in_use(folder: Path) -> Iterator[Callable[[Path], None]]:
    """An agent runs with this identity, for as long as the block takes: two would throw each other out.

    Yields:
        What notes the agent's state folder, for whoever examines the device meanwhile.

    Raises:
        LocalError: another one does, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.fdopen(os.open(folder / RUNNING, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    except OSError as error:
        raise LocalError(f"{error.filename or folder / RUNNING}: {error.strerror}; check its owner and the disk") from error

    def note(state: Path) -> None:
        file.write(os.fsencode(state.resolve()))
        file.flush()

    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = "stop it, or let this device in under a name of its own: `regrow fleet add NAME` on the gateway"
            raise LocalError(f"another agent runs with the identity in {folder}: {other}") from error
        file.truncate()
        yield note


def state_in_use(folder: Path) -> Path | None:
    """The state folder of the agent that runs with this identity; None when none does, or it is still joining."""
    try:
        with (folder / RUNNING).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        noted = (folder / RUNNING).read_bytes()
        return Path(os.fsdecode(noted)) if noted else None
    except OSError:
        return None
    return None


def finish_change(folder: Path) -> None:
    """Move what is `ready` to its place; again, as often as it is interrupted."""
    ready = folder / "ready"
    if not ready.exists():
        return
    for name in (KEY, SIGNING_KEY, CERTIFICATE):
        if (ready / name).exists():
            (ready / name).replace(folder / name)
    sync_folder(folder)
    said = json.loads((folder / "device.json").read_text())
    claim = said.pop("claim", None)
    if claim is not None:
        write(folder / AUTHORITY, claim["ca"].encode())
        said["claimed"] = _digest(Claim(claim["token"], claim["expires_s"]))
        write(folder / "device.json", json.dumps(said, indent=2).encode() + b"\n")
    shutil.rmtree(ready)
    sync_folder(folder)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}; {CURE}") from error


def write(path: Path, data: bytes) -> None:
    """Replace a file, the owner's only, so that a power cut leaves the old or the new one."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def _digest(claim: Claim) -> str:
    return hashlib.sha256(claim.token.encode()).hexdigest()


def _about(path: Path, cure: str) -> About:
    wrong = f"{path}: not a device's identity or claim"
    try:
        said = json.loads(path.read_text())
        claim = said.get("claim")
        about = About(
            device=topics.check_name(_text(said, "device"), "device"),
            fleet=_text(said, "fleet"),
            broker=_text(said, "broker"),
            enrol=_text(said, "enrol"),
            coordinator_keys=tuple(bytes.fromhex(key) for key in said["coordinator_keys"]),
            authority=_text(claim, "ca") if claim is not None else (path.parent / AUTHORITY).read_text(),
            since_s=_whole(said, "since_s"),
            claim=None if claim is None else Claim(_text(claim, "token"), _whole(claim, "expires_s")),
            keys_number=_whole(said, "keys_number") if "keys_number" in said else 0,
        )
    except OSError as error:
        raise LocalError(f"{error.filename or path}: {error.strerror}; {cure}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "it is not JSON of that form"  # its content may be secret
        raise LocalError(f"{wrong}, {what}; {cure}") from error
    if not parse_broker_url(about.broker, of_device=True).tls or not about.enrol.startswith("https://"):
        raise LocalError(f"{wrong}: a fleet is reached by mqtts:// and https:// only; {cure}")
    if not about.coordinator_keys or any(len(key) != 32 for key in about.coordinator_keys):
        raise LocalError(f"{wrong}: coordinator_keys are Ed25519 keys of 32 bytes each; {cure}")
    return about


def _text(said: Any, name: str) -> str:
    value = said[name]
    if not isinstance(value, str) or not value:
        raise TypeError(name)
    return value


def _whole(said: Any, name: str) -> int:
    value = said[name]
    if type(value) is not int or not 0 <= value < 2**53:
        raise TypeError(name)
    return value
