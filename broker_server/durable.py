"""How what the gateway writes outlasts a power cut."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from regrow.errors import LocalError


def write_private(path: Path, data: bytes) -> None:
    """Replace a file with mode 0600 so that a power cut leaves the old or the new one, never a part; root writes for the folder's owner."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            keep_owner(file.fileno(), path.parent)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = str(path)  # a write that fails for want of space names nothing
        raise
    sync_folder(path.parent)


def disk_failed(what: str, error: OSError, place: Path) -> LocalError:
    """What to raise where a disk failed: the system names no file for a full one, and of a copy the source.

    Args:
        what: was to be done.
        place: where it was written.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cure = f"free space at {place}" if full else "check the path, its owner and the disk"
    return LocalError(f"{what}: {error.strerror or error} ({place if full else error.filename or place}); {cure}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_owner(descriptor: int, folder: Path) -> None:
    """Give a file that root has made to the folder's owner: a service that runs as another user must be able to read it."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
