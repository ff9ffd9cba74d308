"""Snapshot files: safetensors, written durably, and read only when size and digest are the recorded ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from broker_server.durable import sync_folder
from regrow.errors import LocalError

_HASH_BLOCK_BYTES = 2**20
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"}
_DTYPES |= {"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}


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
        with temporary.open("wb") as stream:
            _save(arrays, stream)
            stream.flush()
            os.fsync(stream.fileno())
        digest = _sha256(temporary)
        written = SnapshotFile(f"{log_id:012d}-{digest[:16]}.safetensors", temporary.stat().st_size, digest)
        temporary.replace(folder / written.name)
        sync_folder(folder)
    except (OSError, KeyError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LocalError(f"snapshot at record {log_id} not written to {folder}, older ones stay: {error!r}") from error
    return written


def _save(arrays: Mapping[str, NDArray[Any]], stream: IO[bytes]) -> None:
    """The safetensors format, array by array: the library's own writer first puts a copy of all of them into memory."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # the widest first, so that each is aligned
    for name in names:
        array = arrays[name]
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        array = arrays[name]
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        stream.write(little_endian.reshape(-1).view(np.uint8).data)


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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
