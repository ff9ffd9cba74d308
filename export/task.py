"""Builds what a task needs from its ONNX model: `build/` in the task's folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from numpy.typing import NDArray

from export.programs import build_programs, initial_vector, write_model
from regrow.errors import LocalError

BUILDER_VERSION = 2
"""Raise it whenever the same model would give other programs."""

FILES = {"layout": "layout.json", "train": "train.onnx", "train_masked": "train_masked.onnx", "evaluate": "evaluate.onnx"}


def build_task(task_dir: Path, model_path: Path) -> Path:
    """The folder task_dir/build, new: the four programs, initial.npy (float32 [n]) and build.json, which says from what.

    The folder is written beside its place and renamed, so a reader sees an old build, a new one, or for a moment none; never half.

    Raises:
        LocalError: the model cannot be read or trained, or the folder cannot be written.
    """
    try:
        source = model_path.read_bytes()
        model = onnx.load(model_path, load_external_data=False)  # one file, so that its digest says everything
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise LocalError(f"cannot read the model {model_path}: {error}") from error
    files = {FILES[name]: content for name, content in build_programs(model).items()}
    vector = initial_vector(model)
    note = {
        "builder_version": BUILDER_VERSION,
        "model_sha256": hashlib.sha256(source).hexdigest(),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["build.json"] = json.dumps(note, indent=1, sort_keys=True).encode() + b"\n"
    try:
        task_dir.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".build-", dir=task_dir))
        try:
            np.save(fresh / "initial.npy", vector, allow_pickle=False)
            for name, content in files.items():
                (fresh / name).write_bytes(content)
            return _put_in_place(fresh, task_dir / "build")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise LocalError(f"cannot write the build in {task_dir}: {error}") from error


def write_trained(model_path: Path, vector: NDArray[np.float32], path: Path) -> None:
    """Write the model of `model_path` with the weights of `vector`, float32 [n] by flat coordinate.

    Raises:
        LocalError: the model cannot be read, or the vector does not fit it.
    """
    try:
        model = onnx.load(model_path)
    except (OSError, DecodeError, ValueError) as error:
        raise LocalError(f"cannot read the model {model_path}: {error}") from error
    write_model(model, vector, path)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, checked."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)


def is_stale(task_dir: Path, model_path: Path) -> bool:
    """Whether task_dir/build is missing, damaged, by another builder version, or from another model than the file at model_path.

    Raises:
        LocalError: the model cannot be read.
    """
    build = task_dir / "build"
    try:
        note = json.loads((build / "build.json").read_bytes())
        digests = {name: hashlib.sha256((build / name).read_bytes()).hexdigest() for name in FILES.values()}
        whole = (build / "initial.npy").is_file()
    except (OSError, ValueError):
        return True
    try:
        model_sha256 = hashlib.sha256(model_path.read_bytes()).hexdigest()
    except OSError as error:
        raise LocalError(f"cannot read the model {model_path}: {error}") from error
    expected = {"builder_version": BUILDER_VERSION, "model_sha256": model_sha256, "sha256": digests}
    return not whole or bool(note != expected)


def _put_in_place(fresh: Path, build: Path) -> Path:
    """Durable, then renamed: an existing build steps aside first, since a rename cannot replace a full folder."""
    fresh.chmod(0o755)
    for path in (*fresh.iterdir(), fresh):
        _sync(path)
    with tempfile.TemporaryDirectory(prefix=".old-", dir=build.parent) as aside:
        if build.exists():
            build.rename(Path(aside) / "build")
        fresh.rename(build)
        _sync(build.parent)
    return build


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
