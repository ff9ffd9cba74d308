"""A model with batch normalisation, trained by several devices at several levels: it learns, and running statistics stay where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_server.runs import TaskFolder, load_task
from cli.deployable import write_deployable
from cli.main import main
from edge_agent.trainer import Trainer
from edge_agent.worker import drawn_examples
from export.forward import read_forward
from export.programs import initial_vector
from export.task import read_model, save_model
from export.unit_programs import build_unit_programs
from regrow.ledger import Ledger
from regrow.local_training import statistics_from
from regrow.task import task_from_tables
from testbed.simulate import Simulation, task_of
from testbed.torch_engine import TorchEngine
from testbed.trainers import OnnxEngine
from tests.export.unit_models import batch_norm_net, batch_norm_perceptron
from tests.testbed.bars import spec
from tests.testbed.test_torch_engine import DENSITIES, jobs_of


@pytest.fixture(scope="module")
def normal_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "bars"
    folder.mkdir()
    save_model(batch_norm_net((1, 28, 28), 10), folder / "forward.onnx")
    assert main(["task", "new", str(folder), "--model", str(folder / "forward.onnx")]) == 0
    return folder


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_devices_of_several_levels_train_it(normal_task: Path, images: Path, granularity: str) -> None:
    folder = load_task(normal_task)
    settings = {
        "method.granularity": granularity,
        "method.full_density_bps": 4e5,
        "training.local_steps": 5,
        "training.learning_rate": 0.3,
        "trigger.interval_s": 0.5,
    }
    run = spec(images, method="fedgmr", seconds=24.0, clients=3, links="400000,100000,50000", settings=settings)
    simulation = Simulation(folder, task_of(folder, {"name": "bars"}, run), run)
    outcome = simulation.run()
    assert outcome.rejected == 0
    assert outcome.points[-1].updates > 20
    assert len({first for first, _ in outcome.densities.values()}) > 1, "not one level only"
    assert outcome.points[-1].loss < 0.9 * outcome.points[0].loss
    # What travels is positions of the layout, and no statistic has one.
    ledger = simulation._ledger
    assert not any("mean" in tensor.name or "variance" in tensor.name for tensor in ledger.layout.tensors)
    assert max(ledger.order.lengths) == ledger.layout.size
    trainer = Trainer(folder.programs)
    assert trainer.layout.size == ledger.layout.size
    # They are each device's own.
    own = [trainer.statistics(ledger.trained_weights, drawn_examples(source, 10, 1)) for source in simulation._sources.values()]
    assert not np.array_equal(own[0]["norm1.mean"], own[1]["norm1.mean"])


def test_jobs_on_torch_are_those_of_the_device() -> None:
    """Clients of three levels, with short batches: what they learn, their losses and their scores with their own statistics."""
    model = batch_norm_perceptron(64, 10)
    programs = build_unit_programs(model, DENSITIES)
    jobs = jobs_of(programs, initial_vector(model), [0, 0, 0, 1, 2, 1, 2])
    for (_, job), one, other in zip(jobs, TorchEngine(programs).train(jobs), OnnxEngine(programs).train(jobs), strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-5)
        assert (one.number, one.examples, len(one.scores)) == (job.number, other.examples, len(other.scores))
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        for mine, theirs in zip(one.scores, other.scores, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


def test_the_gateway_s_statistics_are_of_its_data_or_a_line_says_that_there_are_none(
    normal_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load_task(normal_task)
    file = tmp_path / "model.onnx"

    def statistics(folder: TaskFolder) -> dict[str, NDArray[np.float32]]:
        write_deployable(folder, Ledger.start(folder.task, folder.layout, folder.initial, folder.units), file)
        return read_forward(read_model(file)).statistics

    before = read_forward(read_model(plain.model_path)).statistics
    for name, array in statistics(plain).items():
        assert np.array_equal(array, before[name])
    assert "running means and variances of the model that the run began with" in capsys.readouterr().out
    x = np.random.default_rng(0).random((40, 1, 28, 28), np.float32)
    np.savez(tmp_path / "held.npz", x=x, y=np.zeros(40, np.int64))
    task = task_from_tables({"name": "bars", "evaluation": {"data": str(tmp_path / "held.npz")}}, "here")
    found = statistics(TaskFolder(plain.path, task, plain.layout, plain.programs, plain.initial, plain.units))
    assert capsys.readouterr().out == ""
    exact = statistics_from(Trainer(plain.programs), plain.initial, x)
    assert sorted(found) == sorted(exact)
    assert all(np.array_equal(found[name], exact[name]) for name in exact)
