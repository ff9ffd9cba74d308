"""Where the models of one task lie on the device: a path that always holds a whole model, and the one before it.

    models/TASK/current                 -> NUMBER-DIGEST, a symbolic link that is replaced by a rename
    models/TASK/NUMBER-DIGEST/model.onnx, about.json, head.npz (where there is a local head), previous -> ../NUMBER-DIGEST

A folder is written aside, fsynced and renamed, and then the link is; `previous` lies in the new folder, so that one rename changes both.
A crash at any point leaves the old model current or the new one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.state import sync_folder
from regrow import wire
from regrow.errors import LocalError

log = logging.getLogger(__name__)
MODELS = "models"
_FRESH, _LINK = ".new", ".current"


@dataclass(frozen=True, slots=True)
class About:
    """What about.json says of a model.

    digest: hexadecimal; step: what it is scored by, as in wire.Promotion; examples, accuracy, loss: of this device's validation data when
    it was placed.
    """

    task: str
    number: int
    digest: str
    run: str
    version: int
    step: str = ""
    examples: int = 0
    accuracy: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A model that is in place; its path stays valid until two others have been placed after it."""

    path: Path
    about: About

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.about.digest)

    def model(self) -> bytes:
        return (self.path / "model.onnx").read_bytes()

    def head(self) -> dict[str, NDArray[np.float32]]:
        """The last layer that was trained here, by initializer; empty without one.

        Raises:
            LocalError: it is there, and damaged.
        """
        file = self.path / "head.npz"
        if not file.is_file():
            return {}
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise LocalError(f"{file} is damaged: {error}; the next promotion replaces it") from error

    def previous(self) -> Placed | None:
        """The model before this one."""
        return read_placed(self.path / "previous")


def read_placed(path: Path) -> Placed | None:
    """The model in a folder, or behind a link to one; None when there is none that checks out."""
    try:
        real = path.resolve(strict=True)
        said = json.loads((real / "about.json").read_bytes())
        about = About(**{field.name: said[field.name] for field in fields(About) if field.name in said})
        placed = Placed(real, about)
        return placed if wire.digest(placed.model()).hex() == about.digest else None
    except (OSError, ValueError, TypeError, RuntimeError):  # RuntimeError: links in a circle, on Python before 3.13
        return None


class ModelFolder:
    """The models of one task below a state folder; one thread of one process changes it, anybody may read it at any time."""

    def __init__(self, state: Path, task: str) -> None:
        self.path = state / MODELS / task
        self.task = task

    @classmethod
    def all(cls, state: Path) -> dict[str, ModelFolder]:
        """Those of every task that has had a model here, by task."""
        folder = state / MODELS
        tasks = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        return {task: cls(state, task) for task in tasks}

    def current(self) -> Placed | None:
        """The model that applications load."""
        return read_placed(self.path / "current")

    def held(self) -> dict[bytes, Placed]:
        """The current model and the one before it, by digest."""
        current = self.current()
        there = () if current is None else (current, current.previous())
        return {placed.digest: placed for placed in there if placed is not None}

    def place(self, model: bytes, about: About, head: Mapping[str, NDArray[np.float32]] | None = None) -> Placed:
        """Make this the current model, and the one that was current its `previous`; durable when this returns.

        Raises:
            OSError: the disk failed; what was current still is.
        """
        before = self.current()
        fresh, final = self.path / _FRESH, self.path / f"{about.number}-{about.digest}"
        if before is not None and before.path == final.resolve():
            raise LocalError(f"{final} is in place already")
        self._make()
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            _write(fresh / "model.onnx", model)
            if head:
                packed = io.BytesIO()
                np.savez(packed, allow_pickle=False, **head)
                _write(fresh / "head.npz", packed.getvalue())
            _write(fresh / "about.json", json.dumps(asdict(about), indent=1).encode() + b"\n")
            if before is not None:
                (fresh / "previous").symlink_to(f"../{before.path.name}")
            sync_folder(fresh)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)  # a crash before the link was replaced left it
        fresh.rename(final)
        sync_folder(self.path)
        self._point(final.name)
        self.sweep()
        return Placed(final, about)

    def withdraw(self, digests: Collection[bytes]) -> None:
        """While the current model is one of these, go back to the one before it; without one, there is none any more.

        Raises:
            OSError: the disk failed.
        """
        placed = self.current()
        if placed is None or placed.digest not in digests:
            return
        while placed is not None and placed.digest in digests:
            placed = placed.previous()
        self._point(None if placed is None else placed.path.name)
        self.sweep()

    def sweep(self) -> None:
        """Remove what a crash left, and models older than the previous one; go back to that one if the current is damaged."""
        link = self.path / "current"
        if link.is_symlink() and self.current() is None:
            before = read_placed(link / "previous")
            log.warning("%s is damaged: %s", link, "none is in place" if before is None else f"back to {before.path.name}")
            self._point(None if before is None else before.path.name)
        kept = {placed.path.name for placed in self.held().values()} | {"current"}
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    def _make(self) -> None:
        for folder in (self.path.parent, self.path):
            if not folder.is_dir():
                folder.mkdir()
                sync_folder(folder.parent)

    def _point(self, name: str | None) -> None:
        link = self.path / _LINK
        link.unlink(missing_ok=True)
        if name is None:
            (self.path / "current").unlink(missing_ok=True)
        else:
            link.symlink_to(name)
            link.replace(self.path / "current")
        sync_folder(self.path)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
