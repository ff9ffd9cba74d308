"""Torch trains what onnxruntime trains, alone and in waves; waves change nothing but the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.trainer import Trainer
from export.models import MODELS, digits_mlp, reduced_cnn
from export.programs import build_programs, initial_vector
from export.torch_trainer import Share, TorchTrainer
from regrow.errors import LocalError
from regrow.local_training import Batch, TrainResult


def example_shape(programs: dict[str, bytes]) -> tuple[int, ...]:
    return TorchTrainer(programs)._graph.input_shape


def batches_of(programs: dict[str, bytes], steps: int, seed: int, size: int = 8, last: int | None = None) -> list[Batch]:
    rng, shape = np.random.default_rng(seed), example_shape(programs)
    sizes = [size] * (steps - 1) + [last or size]
    return [(rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, 7, count)) for count in sizes]


def mask_of(trainer: Trainer | TorchTrainer, seed: int) -> NDArray[np.bool_]:
    kept = np.random.default_rng(seed).random(trainer.layout.size) < 0.3
    kept[trainer.layout.always_kept_coordinates] = True
    return kept


def assert_same_training(mine: TrainResult, theirs: TrainResult, start: NDArray[np.float32], rtol: float) -> None:
    """The way that training went differs by less than `rtol` of its length."""
    way = float(np.linalg.norm(theirs.vector - start))
    assert way > 0
    assert float(np.linalg.norm(mine.vector - theirs.vector)) <= rtol * way
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert (mine.examples, mine.steps, mine.vector.dtype) == (theirs.examples, theirs.steps, np.float32)


# ---- one model -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["digits_mlp", "watch_cnn", "reduced_cnn"])
def test_twenty_steps_are_those_of_onnxruntime(name: str, masked: bool) -> None:
    model = MODELS[name](1)
    programs, vector = build_programs(model), initial_vector(model)
    onnx, mine = Trainer(programs), TorchTrainer(programs)
    kept = mask_of(onnx, 4) if masked else None
    batches = batches_of(programs, 20, 3, last=5)
    result = mine.train(vector, kept, batches, 0.05)
    assert_same_training(result, onnx.train(vector, kept, batches, 0.05), vector, 1e-3)
    if kept is not None:
        np.testing.assert_array_equal(result.vector[~kept], vector[~kept])
    assert np.array_equal(vector, initial_vector(model))
    np.testing.assert_array_equal(mine.train(vector, kept, batches, 0.05).vector, result.vector)


@pytest.mark.parametrize("name", ["leaf_cnn", "vgg11", "resnet18_gn"])
def test_one_step_of_a_large_model_is_that_of_onnxruntime(name: str) -> None:
    model = MODELS[name](1)
    programs, vector = build_programs(model), initial_vector(model)
    batches = batches_of(programs, 1, 3, size=2)
    mine = TorchTrainer(programs).train(vector, None, batches, 0.05)
    assert_same_training(mine, Trainer(programs).train(vector, None, batches, 0.05), vector, 2e-3)


@pytest.mark.parametrize("name", ["digits_mlp", "watch_cnn", "reduced_cnn"])
def test_a_wave_trains_every_client_as_onnxruntime_does(name: str) -> None:
    """With its own weights, mask, batch sizes and learning rate; a full model and sub-models together."""
    model = MODELS[name](1)
    programs, vector = build_programs(model), initial_vector(model)
    onnx, rng = Trainer(programs), np.random.default_rng(1)
    shares = []
    for client in range(4):
        start = vector + rng.normal(0, 0.01, vector.size).astype(np.float32)
        kept = None if client == 0 else mask_of(onnx, client)
        shares.append(Share(start, kept, batches_of(programs, 5, client, size=4 + client, last=2 + client), 0.02 * (1 + client)))
    results = TorchTrainer(programs).train_together(shares)
    for share, result in zip(shares, results, strict=True):
        assert_same_training(result, onnx.train(share.vector, share.kept, share.batches, share.learning_rate), share.vector, 1e-3)
        if share.kept is not None:
            np.testing.assert_array_equal(result.vector[~share.kept], share.vector[~share.kept])


def test_scores_are_those_of_onnxruntime() -> None:
    model = MODELS["watch_cnn"](1)
    programs, vector = build_programs(model), initial_vector(model)
    onnx, mine = Trainer(programs), TorchTrainer(programs)
    vectors = [vector, vector * np.float32(0.5), vector + np.float32(0.01)]
    data = [batches_of(programs, 1, seed, size=count)[0] for seed, count in enumerate((300, 7, 64))]
    together = mine.evaluate_together(vectors, data)
    for values, (x, y), score in zip(vectors, data, together, strict=True):
        theirs = onnx.evaluate(values, x, y)
        for found in (score, mine.evaluate(values, x, y)):
            assert found.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert (found.accuracy, found.examples) == (theirs.accuracy, theirs.examples)


def test_what_does_not_fit_is_refused_as_by_the_device_s_trainer() -> None:
    programs = build_programs(digits_mlp(0))
    trainer, vector = TorchTrainer(programs), initial_vector(digits_mlp(0))
    x, y = np.zeros((3, 64), np.float32), np.zeros(3, np.int64)
    wrong: Sequence[tuple[str, tuple[Any, ...]]] = [
        ("vector", (vector[:-1], None, [(x, y)], 0.1)),
        ("always|belong", (vector, np.zeros(vector.size, np.bool_), [(x, y)], 0.1)),
        ("kept", (vector, np.ones(3, np.bool_), [(x, y)], 0.1)),
        ("x: expected float32 .batch, 64.", (vector, None, [(x[:, :3], y)], 0.1)),
        ("at least one example", (vector, None, [(x[:0], y[:0])], 0.1)),
        ("label 10, but the task.s labels are 0 to 9", (vector, None, [(x, np.array([0, 10, 1]))], 0.1)),
        ("y: expected int64", (vector, None, [(x, y[:2])], 0.1)),
        ("no batches", (vector, None, [], 0.1)),
    ]
    onnx = Trainer(programs)
    for message, arguments in wrong:
        for each in (trainer, onnx):
            with pytest.raises(LocalError, match=message):
                each.train(*arguments)
    with pytest.raises(LocalError, match="different numbers of batches"):
        trainer.train_together([Share(vector, None, [(x, y)] * count, 0.1) for count in (1, 2)])
    with pytest.raises(LocalError, match="'evaluate'"):
        TorchTrainer({"layout": programs["layout"]})
    with pytest.raises(LocalError, match="not that of the evaluation program"):
        TorchTrainer({"layout": programs["layout"], "evaluate": build_programs(reduced_cnn(0))["evaluate"]})
