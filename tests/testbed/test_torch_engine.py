"""Jobs of a simulation on torch are those of onnxruntime; who is trained together changes nothing but the time."""

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
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from export.torch_trainer import TorchTrainer
from export.unit_programs import build_unit_programs
from regrow.errors import LocalError
from regrow.machine import Train
from regrow.parameters import Layout
from regrow.task import Training
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


@pytest.mark.parametrize("training", [Training(), Training(optimizer="adamw", weight_decay=0.1, clip_norm=1.0)], ids=["sgd", "adamw"])
def test_jobs_of_several_levels_are_put_together_by_model(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits_mlp(1)
    programs = build_unit_programs(model, DENSITIES, training)
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
