from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.memory import lean_variants, step_memory
from export.models import digits_mlp, watch_cnn
from export.programs import build_programs, initial_vector
from export.task import BUILDER_VERSION, build_task, is_stale, programs_of, published_programs
from export.ways import OTHERS
from regrow.errors import LocalError
from regrow.programs import program_file, program_name, variant, ways_of, without_variants
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


def ways_in(build: Path) -> set[str]:
    return {path.name for path in build.iterdir() if "~" in path.name}


def test_a_build_publishes_training_programs_in_other_ways_where_they_differ(tmp_path: Path) -> None:
    assert ways_in(build_task(tmp_path / "digits", saved(tmp_path / "digits.onnx"))) == set(), "dense layers have one way"
    model_path = tmp_path / "watch.onnx"
    onnx.save_model(watch_cnn(1), model_path)
    build = build_task(tmp_path / "watch", model_path)
    assert {"train~convolve.onnx", "train_masked~convolve.onnx"} <= ways_in(build)
    assert len(ways_in(build)) <= 2 * len(OTHERS)
    assert not is_stale(tmp_path / "watch", model_path)
    plain = build_programs(watch_cnn(1))
    assert (build / "memory.json").read_bytes() == step_memory(plain).to_json()
    (build / "train~convolve.onnx").write_bytes(b"cut")
    assert is_stale(tmp_path / "watch", model_path)


def test_levels_of_whole_units_have_their_own_ways_and_names_come_back_from_files() -> None:
    programs = published_programs(watch_cnn(1), (0.2, 1.0))
    assert {"train~convolve", "train:0~convolve"} <= programs.keys()
    assert not any(name.startswith("train_masked") for name in programs)
    assert len(set(programs.values())) == len(programs), "no variant is its default"
    assert all(program_name(program_file(name)) == name for name in programs)
    assert len(step_memory(programs).levels) == 2
    assert without_variants(programs) == programs_of(watch_cnn(1), (0.2, 1.0))


def test_no_published_way_takes_more_memory_than_the_default() -> None:
    built = build_programs(watch_cnn(1), others=OTHERS)
    lean = lean_variants(built)
    assert "train~multiply" in built.keys() - lean.keys(), "the unfolded input of 1-D convolutions is large"
    for way in ways_of(lean, "train"):
        own, default = (step_memory(built | {"train_masked": built[name]}).levels[0] for name in (variant("train", way), "train"))
        assert all(own.fixed + batch * own.trained <= default.fixed + batch * default.trained + 2 for batch in (1, 20, 1000))  # rounded up
