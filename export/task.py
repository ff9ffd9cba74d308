"""Builds what a task needs from its ONNX model: `build/` in the task's folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from export.from_torch import from_torch_file
from export.memory import lean_variants, step_memory
from export.models import MODELS
from export.programs import build_programs, initial_vector
from export.storage import float16_programs
from export.unit_programs import build_unit_programs
from export.ways import OTHERS
from regrow.errors import LocalError, UsageError
from regrow.local_step import step_of
from regrow.programs import MEMORY, program_file, without_variants
from regrow.task import DEFAULT_TRAINING, Training
from regrow.wire import MAX_PROGRAMS

BUILDER_VERSION = 6
"""Raise it whenever the same model would give other programs."""


def programs_of(
    model: onnx.ModelProto, unit_densities: Sequence[float] | None = None, training: Training = DEFAULT_TRAINING
) -> dict[str, bytes]:
    """The programs of a model: of whole units at these densities, or of single weights."""
    if unit_densities is None:
        return build_programs(model, training=training)
    return build_unit_programs(model, unit_densities, training)


def published_programs(
    model: onnx.ModelProto, unit_densities: Sequence[float] | None = None, training: Training = DEFAULT_TRAINING
) -> dict[str, bytes]:
    """Those of programs_of, the training programs in other ways, which devices may find faster and which take no more memory, and those
    with float16 storage, for devices whose memory is short.

    In the default way alone where a manifest could not name them all.
    """
    if unit_densities is None:
        programs = build_programs(model, training=training, others=OTHERS)
    else:
        programs = build_unit_programs(model, unit_densities, training, OTHERS)
    programs = lean_variants(programs) | float16_programs(programs)
    return programs if len(programs) <= MAX_PROGRAMS else without_variants(programs)


def read_model(model_path: Path) -> onnx.ModelProto:
    """The model in one file.

    Raises:
        LocalError: it cannot be read, or is no ONNX file.
    """
    if model_path.suffix == ".py":
        raise UsageError(f"{model_path} is Python: say {model_path}:FUNCTION, where the function returns (module, example input)")
    try:
        model = onnx.load(model_path, load_external_data=False)  # one file, so that its digest says everything
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise LocalError(f"cannot read the model {model_path}: {error}") from error
    except DecodeError as error:
        raise LocalError(f"cannot read the model {model_path}: it is no ONNX file, or only part of one; export it again") from error
    if not model_path.stat().st_size:
        raise LocalError(f"cannot read the model {model_path}: it is empty; export it again")
    if not model.ir_version or not model.graph.node:
        raise LocalError(
            f"cannot read the model {model_path}: it holds no ONNX graph, so it is another kind of file or was cut short; export it again"
        )
    return model


def model_from(source: str) -> onnx.ModelProto:
    """The model that a user names: an ONNX file; FILE.py:FUNCTION, which gives a torch module (the file is run); or one of ours.

    Raises:
        LocalError: it is none of these, or cannot be read.
    """
    if Path(source).is_file():
        return read_model(Path(source))
    if ".py:" in source:
        return from_torch_file(source)
    if source in MODELS:
        return MODELS[source](1)
    raise UsageError(f"{source}: neither a file, nor FILE.py:FUNCTION, nor one of {', '.join(sorted(MODELS))}")


def build_task(
    task_dir: Path, model_path: Path, unit_densities: Sequence[float] | None = None, training: Training = DEFAULT_TRAINING
) -> Path:
    """The folder task_dir/build, new: the programs, initial.npy (float32 [n]), memory.json, and build.json, which says from what.

    With `unit_densities`, those of the task's levels, the programs are those of granularity "unit". `training` is the task's.

    The folder is written beside its place and renamed, so a reader sees an old build, a new one, or for a moment none; never half.

    Raises:
        LocalError: the model cannot be read or trained, or the folder cannot be written.
    """
    model = read_model(model_path)
    source = model_path.read_bytes()
    programs = published_programs(model, unit_densities, training)
    files = {program_file(name): content for name, content in programs.items()}
    vector = initial_vector(model, training.train_last)
    note = _made_from(hashlib.sha256(source).hexdigest(), unit_densities, training) | {
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    }
    files[program_file(MEMORY)] = step_memory(programs).to_json()  # says nothing of what is trained, so not in build.json
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


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, checked."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)


def is_stale(
    task_dir: Path, model_path: Path, unit_densities: Sequence[float] | None = None, training: Training = DEFAULT_TRAINING
) -> bool:
    """Whether task_dir/build is missing, damaged, by another builder version, for other units or another step, or of another model.

    Raises:
        LocalError: the model cannot be read.
    """
    build = task_dir / "build"
    try:
        note = json.loads((build / "build.json").read_bytes())
        digests = {name: hashlib.sha256((build / name).read_bytes()).hexdigest() for name in note["sha256"]}
        whole = (build / "initial.npy").is_file() and (build / program_file(MEMORY)).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return True
    try:
        model_sha256 = hashlib.sha256(model_path.read_bytes()).hexdigest()
    except OSError as error:
        raise LocalError(f"cannot read the model {model_path}: {error}") from error
    return not whole or bool(note != _made_from(model_sha256, unit_densities, training) | {"sha256": digests})


def _made_from(model_sha256: str, unit_densities: Sequence[float] | None, training: Training) -> dict[str, Any]:
    """What a build depends on, as build.json has it; of the training only what is not the default."""
    note: dict[str, Any] = {
        "builder_version": BUILDER_VERSION,
        "model_sha256": model_sha256,
        "unit_densities": None if unit_densities is None else list(unit_densities),
    }
    step = json.loads(msgspec.json.encode(step_of(training)))  # as it is read again: lists, no tuples
    note |= {"step": step} if step else {}
    return note | ({"train_last": training.train_last} if training.train_last is not None else {})


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
