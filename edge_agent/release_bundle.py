"""Release bundles as files: opened against the fleet's keys, and their wheels written out, each checked while it is written.

The updater (edge_agent.updater) and the agent (edge_agent.release) both read by this, and neither believes the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from edge_agent.identity import verify
from edge_agent.state import sync_folder
from regrow.errors import PeerError
from regrow.release import SHA_BYTES, Manifest, Wheel, open_manifest, split_head

BLOCK_BYTES = 1 << 20


def open_bundle(stream: BinaryIO, keys: Iterable[bytes]) -> Manifest:
    """The manifest of a bundle that one of the keys signed; the stream then stands before its wheels.

    Raises:
        PeerError: it is none, or nobody of them signed it.
    """
    manifest, signature = split_head(stream.read)
    return open_manifest(manifest, signature, keys, verify)


def read_wheels(stream: BinaryIO, wheels: Sequence[Wheel], folder: Path | None) -> None:
    """Read a bundle to its end; whole wheels lie in the folder afterwards, fsynced and under their names.

    Args:
        stream: stands before the first wheel.
        wheels: which it may hold.
        folder: where to; None only checks.

    Raises:
        PeerError: it was cut off, altered, or holds something else.
    """
    left = {bytes.fromhex(wheel.sha256): wheel for wheel in wheels}
    while digest := stream.read(SHA_BYTES):
        wheel = left.pop(digest, None)
        if wheel is None:
            cut = len(digest) < SHA_BYTES
            raise PeerError("the bundle was cut off; send it again" if cut else "the bundle holds a file that this device was not to get")
        _read_wheel(stream, wheel, folder)
    if folder is not None:
        sync_folder(folder)


def _read_wheel(stream: BinaryIO, wheel: Wheel, folder: Path | None) -> None:
    aside = None if folder is None else folder / f".{wheel.name}.new"
    target = Path(os.devnull) if aside is None else aside
    hashed, left = hashlib.sha256(), wheel.size
    try:
        with target.open("wb") as file:
            while left:
                block = stream.read(min(left, BLOCK_BYTES))
                if not block:
                    raise PeerError(f"the bundle ends within {wheel.name}: it was cut off; send it again")
                hashed.update(block)
                file.write(block)
                left -= len(block)
            if hashed.hexdigest() != wheel.sha256:
                raise PeerError(f"{wheel.name} is not the file that was signed: it was altered or damaged on the way")
            if aside is not None:
                file.flush()
                os.fsync(file.fileno())
        if aside is not None and folder is not None:
            aside.replace(folder / wheel.name)
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def has_wheel(folder: Path, wheel: Wheel) -> bool:
    """Whether the folder holds exactly this file."""
    file = folder / wheel.name
    try:
        if file.stat().st_size != wheel.size:
            return False
        hashed = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                hashed.update(block)
    except OSError:
        return False
    return hashed.hexdigest() == wheel.sha256
