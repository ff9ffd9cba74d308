"""The files that a simulated run reads beside its task folder, as one digest, by which a finished run knows them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from msgspec import UNSET

from regrow.errors import LocalError
from testbed.conditions import NIGHTLY
from testbed.datasets import files_of
from testbed.outcome import Spec
from testbed.scenario import TRACES

_CHUNK_BYTES = 2**20


def inputs_digest(spec: Spec) -> str:
    """32 hex digits for the data set, recorded links and steps, and the file of attendances; "" where they cannot all be read here.

    Of the files' names and bytes: the same pictures in another container are other data.
    """
    hasher = hashlib.blake2b(digest_size=16)
    try:
        for file in _files(spec):
            hasher.update(f"{file.name}:{file.stat().st_size};".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    hasher.update(chunk)
    except (OSError, LocalError):
        return ""  # the run itself has the words for it
    return hasher.hexdigest()


def same_inputs(digest: str, other: str) -> bool:
    """Whether these may be the same data; outcomes written before there were digests have none."""
    return not digest or not other or digest == other


def _files(spec: Spec) -> list[Path]:
    files = files_of(spec.data, None if spec.data_folder is None else Path(spec.data_folder))
    if spec.links.startswith(TRACES):
        files += sorted(Path(spec.links.removeprefix(TRACES)).glob("*.csv"))
    if spec.steps_trace is not UNSET:
        files += sorted(Path(spec.steps_trace).glob("*.csv"))
    if spec.attend is not UNSET and not spec.attend.startswith(NIGHTLY):
        files.append(Path(spec.attend))
    return files
