from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from export.task import BUILDER_VERSION, build_task, is_stale
from regrow.errors import LocalError
from regrow.task import Training


def saved(path: Path, seed: int = 0) -> Path:
    onnx.save_model(digits_mlp(seed), path)
    return path


def test_a_build_holds_the_programs_and_says_what_it_was_built_from(tmp_path: Path) -> None:
    model_path, task_dir = saved(tmp_path / "model.onnx"), tmp_path / "task"
    assert is_stale(task_dir, model_path)
    build = build_task(task_dir, model_path)
    assert build == task_dir / "build"
    names = {"layout.json", "train.onnx", "train_masked.onnx", "evaluate.onnx", "initial.npy", "memory.json", "build.json"}
    assert {path.name for path in build.iterdir()} == names
    assert [path.name for path in task_dir.iterdir()] == ["build"]
    programs = build_programs(onnx.load(model_path))
    assert (build / "train_masked.onnx").read_bytes() == programs["train_masked"]
    assert np.array_equal(np.load(build / "initial.npy", allow_pickle=False), initial_vector(onnx.load(model_path)))
    assert json.loads((build / "build.json").read_bytes())["builder_version"] == BUILDER_VERSION
    assert not is_stale(task_dir, model_path)


def test_another_model_a_damaged_file_or_another_builder_make_it_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_path = saved(tmp_path / "model.onnx")
    build = build_task(tmp_path, model_path)
    saved(model_path, seed=1)
    assert is_stale(tmp_path, model_path)
    build_task(tmp_path, model_path)
    assert not is_stale(tmp_path, model_path)
    (build / "train.onnx").write_bytes(b"cut")
    assert is_stale(tmp_path, model_path)
    build_task(tmp_path, model_path)
    monkeypatch.setattr("export.task.BUILDER_VERSION", BUILDER_VERSION + 1)
    assert is_stale(tmp_path, model_path)


@pytest.mark.parametrize("training", [Training(class_weights=(1.0,) * 10), Training(optimizer="adam"), Training(train_last=1)])
def test_another_step_or_other_layers_make_it_stale_and_the_rest_of_training_does_not(tmp_path: Path, training: Training) -> None:
    model_path = saved(tmp_path / "model.onnx")
    build_task(tmp_path, model_path)
    assert not is_stale(tmp_path, model_path, training=Training(local_steps=3, learning_rate=0.5))
    assert is_stale(tmp_path, model_path, training=training)
    build_task(tmp_path, model_path, training=training)
    assert not is_stale(tmp_path, model_path, training=training)
    assert is_stale(tmp_path, model_path)


def test_a_model_that_cannot_be_built_leaves_the_old_build_alone(tmp_path: Path) -> None:
    model_path = saved(tmp_path / "model.onnx")
    build = build_task(tmp_path, model_path)
    before = {path.name: path.read_bytes() for path in build.iterdir()}
    model_path.write_bytes(b"not a model")
    with pytest.raises(LocalError, match="cannot read the model"):
        build_task(tmp_path, model_path)
    assert {path.name: path.read_bytes() for path in build.iterdir()} == before
    assert is_stale(tmp_path, model_path)
