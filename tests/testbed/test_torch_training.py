"""Torch trains what onnxruntime trains, alone and in waves; waves change nothing but the time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from broker_server.runs import load_task
from cli.main import main
from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from export.models import MODELS, digits_mlp, reduced_cnn
from export.programs import build_programs, initial_vector
from export.torch_trainer import Share, TorchTrainer
from export.unit_programs import build_unit_programs
from regrow.errors import LocalError
from regrow.local_training import Batch, TrainResult
from regrow.machine import Train
from regrow.parameters import Layout
from regrow.unit_order import build_unit_order
from regrow.units import Units
from testbed.outcome import Outcome, Spec
from testbed.simulate import Simulation, task_of
from testbed.torch_engine import TorchEngine
from testbed.trainers import OnnxEngine, engine_of
from testbed.waves import Waves
from tests.regrow.fleet import task as toy_task
from tests.regrow.fleet import train as toy_train
from tests.regrow.harness import begin
from tests.testbed.bars import spec

ROOT = Path(__file__).resolve().parents[2]


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
        ("labels from 0 to 9, got 0 to 10", (vector, None, [(x, np.array([0, 10, 1]))], 0.1)),
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


# ---- whole jobs ----------------------------------------------------------------------------------------------------------------------


def source_of(seed: int, rows: int, shape: Sequence[int]) -> DataSource:
    rng = np.random.default_rng(seed)
    source = DataSource(rows, 0.2 if seed != 2 else 0.0)  # the third client has no validation data
    source.append(rng.normal(size=(rows, *shape)).astype(np.float32), rng.integers(0, 10, rows))
    return source


def jobs_of(programs: dict[str, bytes], vector: NDArray[np.float32], levels: Sequence[int]) -> list[tuple[DataSource, Train]]:
    """Unit granularity: client i trains levels[i] and scores the next one too; rows differ, so short batches do."""
    layout = Layout.from_json(programs["layout"])
    units = Units.from_json(programs["units"], layout)
    order = build_unit_order(layout, units, [-np.arange(group.size, dtype=np.float64) for group in units.groups], DENSITIES, 0)
    jobs = []
    for client, level in enumerate(levels):
        top = min(level + 1, len(DENSITIES) - 1)
        longest = order.lengths[top]
        coordinates = order.coordinates[:longest]
        evaluate = {each: order.lengths[each] for each in sorted({level, top})}
        job = Train(7 + client, level, programs, vector[coordinates], coordinates, order.lengths[level], evaluate, 4, 6, 0.05, seed=client)
        jobs.append((source_of(client, 17 + 5 * client, (64,)), job))
    return jobs


DENSITIES = (0.25, 0.5, 1.0)


def test_jobs_of_several_levels_are_put_together_by_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits_mlp(1)
    programs = build_unit_programs(model, DENSITIES)
    jobs = jobs_of(programs, initial_vector(model), [0, 0, 0, 1, 2, 1, 2])
    theirs = OnnxEngine(programs).train(jobs)
    waves: list[int] = []
    train_together = TorchTrainer.train_together
    monkeypatch.setattr(TorchTrainer, "train_together", lambda self, shares: waves.append(len(shares)) or train_together(self, shares))
    engines = [(TorchEngine(programs), [3, 2, 2]), (TorchEngine(programs, together=False), [1] * 7)]
    monkeypatch.setattr("testbed.torch_engine.CPU_WAVE_PARAMETERS", Layout.from_json(programs["layout"]).size - 1)
    engines.append((TorchEngine(programs), [3, 2, 1, 1]))
    for engine, sizes in engines:
        waves.clear()
        mine = engine.train(jobs)
        assert waves == sizes
        for (_, job), one, other in zip(jobs, mine, theirs, strict=True):
            assert (one.number, one.examples) == (other.number, other.examples) == (job.number, one.examples)
            np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-5)
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert [(level, hits, count) for level, _, hits, count in one.scores] == [
                (level, hits, count) for level, _, hits, count in other.scores
            ]
    assert [len(one.scores) for one in theirs] == [2, 2, 0, 2, 1, 2, 1]


# ---- waves in virtual time -----------------------------------------------------------------------------------------------------------


def test_a_world_with_waves_says_what_one_without_says_and_a_killed_device_is_not_trained() -> None:
    settings = toy_task(stop={"aggregations": 6})
    trained: list[list[str]] = []

    def together(jobs: Any) -> list[Any]:
        trained.append([name for name, _ in jobs])
        return [toy_train(name, job)[1] for name, job in jobs]

    def lasting(trainer: Any) -> Any:
        return lambda name, job: (toy_train(name, job)[0], trainer(name, job)[1])

    eager = begin(settings, trainer=toy_train)
    eager.finish()
    for all_at_once in (True, False):
        trained.clear()
        waves = begin(settings, trainer=lasting(Waves(together, together=all_at_once)))
        waves.finish()
        assert waves.sent == eager.sent
        assert (max(map(len, trained)) > 1) is all_at_once
    trained.clear()
    world = begin(settings, trainer=lasting(Waves(together, together=True)))
    victim = next(iter(name for name in world.clients if name != "coordinator"))
    world.run(600, stop=lambda: world.clients[victim].training is not None)
    world.kill(victim)
    world.finish()
    assert world.ended()
    assert victim not in [name for wave in trained for name in wave]


def outcome_of(folder: Path, settings: Spec) -> tuple[Outcome, list[int]]:
    """The outcome and how many jobs each call trained."""
    task_folder = load_task(folder)
    simulation = Simulation(task_folder, task_of(task_folder, {"name": "bars"}, settings), settings)
    train, sizes = simulation._engine.train, list[int]()

    def counted(jobs: Any) -> Any:
        sizes.append(len(jobs))
        return train(jobs)

    simulation._engine.train = counted  # type: ignore[method-assign]  # the engine is this simulation's own
    return simulation.run(), sizes


def test_with_onnxruntime_waves_change_no_bit(task: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained at once as before there were waves, trained when due, and trained together."""
    settings = spec(images, method="fedgmr", step_s=0.5)
    late, _ = outcome_of(task, settings)
    monkeypatch.setattr("testbed.simulate.Waves", lambda train, **_: lambda name, job: (0.0, train([(name, job)])[0]))
    eager, _ = outcome_of(task, settings)
    monkeypatch.setattr("testbed.simulate.Waves", lambda train, **_: Waves(train, together=True))
    joint, sizes = outcome_of(task, settings)
    assert msgspec.json.encode(late) == msgspec.json.encode(eager) == msgspec.json.encode(joint)
    assert max(sizes) > 1
    assert eager.points[-1].updates > 5


@pytest.mark.parametrize("method", ["fedgmr", "fedrolex+restore"])
def test_a_run_on_torch_repeats_and_is_onnxruntime_s_but_for_rounding(task: Path, images: Path, method: str) -> None:
    settings = spec(images, method=method, step_s=0.5)
    first, sizes = outcome_of(task, msgspec.structs.replace(settings, trainer="torch"))
    again, _ = outcome_of(task, msgspec.structs.replace(settings, trainer="torch"))
    assert msgspec.json.encode(first) == msgspec.json.encode(again)
    assert max(sizes) > 1
    other, _ = outcome_of(task, settings)
    # Later on rounding may change what the coordinator decides.
    assert first.points[1].updates == other.points[1].updates > 0
    assert first.points[1].loss == pytest.approx(other.points[1].loss, rel=1e-2)


# ---- the choice ----------------------------------------------------------------------------------------------------------------------


def test_the_choice_of_a_trainer(
    task: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = build_programs(digits_mlp(0))
    assert isinstance(engine_of("onnxruntime", programs), OnnxEngine)
    assert isinstance(engine_of("torch", programs), TorchEngine)
    with pytest.raises(LocalError, match="known are onnxruntime, torch, torch-cuda"):
        engine_of("tensorflow", programs)
    scenario = ["simulate", str(task), "--data-folder", str(images), "--clients", "3", "--seconds", "20", "--points", "2"]
    scenario += ["--out", str(tmp_path), "--set", "training.local_steps=2"]
    assert main([*scenario, "--trainer", "torch"]) == 0
    (written,) = tmp_path.glob("*.json")
    assert msgspec.json.decode(written.read_bytes())["spec"]["trainer"] == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*scenario, "--trainer", "torch-cuda"]) == 1
    assert "torch finds no CUDA device on this machine" in capsys.readouterr().err
    words = ["--methods", "fedavg", "--trainer", "torch-cuda", "--out", str(tmp_path / "compared")]
    assert main(["compare", str(task), "--data-folder", str(images), *words]) == 1
    assert "torch finds no CUDA device on this machine" in capsys.readouterr().err
    assert not (tmp_path / "compared").exists(), "known before the first run"
    for module in ("testbed.torch_engine", "export.torch_trainer", "export.torch_graph", "export.torch_ops"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(LocalError, match=r"torch is not installed here; pip install 'regrow\[sim,torch\]'"):
        engine_of("torch", programs)


def test_torch_is_loaded_only_when_it_is_asked_for() -> None:
    code = "import cli.main, cli.simulate, testbed.simulate, export.task, edge_agent.agent, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
