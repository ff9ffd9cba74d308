"""Snapshot files: safetensors, written durably, and read only when size and digest are the recorded ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from regrow.errors import LocalError

_HASH_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """What the database records of a file: its name in the snapshot folder, size, and SHA-256 digest in hex."""

    name: str
    bytes: int
    sha256: str


def write(folder: Path, log_id: int, arrays: Mapping[str, NDArray[Any]]) -> SnapshotFile:
    """Write the arrays as one file below `folder`, durable under its final name when this returns.

    The name carries the digest, so a second snapshot of one record never overwrites the first.

    Raises:
        LocalError: the disk failed, or an array's dtype is none of safetensors' (then nothing is left behind).
    """
    temporary = folder / f"{log_id:012d}.tmp"
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        digest = _sha256(temporary)
        written = SnapshotFile(f"{log_id:012d}-{digest[:16]}.safetensors", temporary.stat().st_size, digest)
        temporary.replace(folder / written.name)
        sync_folder(folder)
    except (OSError, SafetensorError, KeyError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LocalError(f"snapshot at record {log_id} not written to {folder}, older ones stay: {error!r}") from error
    return written


def load(folder: Path, recorded: SnapshotFile) -> dict[str, NDArray[Any]]:
    """The arrays of a file that is the recorded one, writable.

    Raises:
        ValueError: it is not, or it cannot be read; the text says why.
    """
    file = folder / recorded.name
    try:
        if (size := file.stat().st_size) != recorded.bytes:
            raise ValueError(f"{size} bytes instead of {recorded.bytes}")
        if _sha256(file) != recorded.sha256:
            raise ValueError("its SHA-256 digest is not the recorded one")
        arrays: dict[str, NDArray[Any]] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    return arrays


def set_aside(file: Path, reason: str) -> None:
    """Rename a damaged file to *.rejected and write the reason to *.rejected.txt beside it."""
    try:
        Path(f"{file}.rejected.txt").write_text(f"{reason}\n")
        if file.exists():
            file.rename(f"{file}.rejected")
        sync_folder(file.parent)
    except OSError as error:
        raise LocalError(f"cannot set aside the damaged snapshot {file} ({reason}): {error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
