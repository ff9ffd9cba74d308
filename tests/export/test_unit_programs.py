"""Programs of whole units, as the device runs them: smaller graphs that train like the masked full model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from edge_agent.worker import LevelTrainers, train_job
from export.models import digits_mlp, watch_cnn
from export.programs import build_programs, initial_vector
from export.unit_programs import build_unit_programs
from export.units import find_units
from regrow.errors import PeerError
from regrow.machine import Train
from regrow.order import Order
from regrow.parameters import Layout
from regrow.unit_order import build_unit_order, ranks_of
from regrow.units import Units

LADDER = (0.05, 0.2, 1.0)
SHAPES = {"digits": (64,), "watch": (6, 100)}
MODELS = {"digits": digits_mlp(1), "watch": watch_cnn(1)}


def order_of(programs: dict[str, bytes], vector: np.ndarray) -> Order:
    layout = Layout.from_json(programs["layout"])
    units = Units.from_json(programs["units"], layout)
    return build_unit_order(layout, units, ranks_of("w", layout, units, np.abs(vector), 0), LADDER, 0)


def job_of(programs: dict[str, bytes], order: Order, vector: np.ndarray, level: int) -> Train:
    return Train(
        number=1,
        level=level,
        programs=programs,
        values=vector[order.coordinates],
        coordinates=order.coordinates,
        length=order.lengths[level],
        evaluate={level: order.lengths[level], 2: order.lengths[2]},
        steps=4,
        batch=8,
        learning_rate=0.05,
        seed=3,
    )


def source(shape: tuple[int, ...]) -> DataSource:
    rng = np.random.default_rng(0)
    data = DataSource(60)
    data.append(rng.random((60, *shape), np.float32), rng.integers(0, 7, 60))
    return data


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_trains_as_the_masked_full_model_does(name: str, level: int) -> None:
    model: onnx.ModelProto = MODELS[name]
    programs, vector = build_unit_programs(model, LADDER), initial_vector(model)
    order = order_of(programs, vector)
    job, data = job_of(programs, order, vector, level), source(SHAPES[name])
    trained = train_job(LevelTrainers(programs), data, job)

    where = order.coordinates[: order.lengths[level]]
    kept = np.zeros(vector.size, np.bool_)
    kept[where] = True
    inside = np.where(kept, vector, np.float32(0))
    full = Trainer(build_programs(model, find_units(model)))
    batches = data.batches(np.random.default_rng(job.seed), job.batch, job.steps)
    expected = full.train(inside, kept, batches, job.learning_rate)
    np.testing.assert_allclose(trained.values, expected.vector[where], rtol=1e-3, atol=2e-6)
    assert np.abs(trained.values - vector[where]).max() > 1e-3
    assert trained.loss == pytest.approx(expected.loss, rel=1e-4)
    x, y = data.validation()
    assert [score[0] for score in trained.scores] == ([2] if level == 2 else [level, 2])
    assert trained.scores[0][1] == pytest.approx(full.evaluate(inside, x, y).loss, rel=1e-4)
    assert trained.scores[-1][1] == pytest.approx(full.evaluate(vector, x, y).loss, rel=1e-4)


def test_small_programs_are_small() -> None:
    programs, vector = build_unit_programs(MODELS["watch"], LADDER), initial_vector(MODELS["watch"])
    order = order_of(programs, vector)
    sizes = [Layout.from_json(programs[f"layout:{level}"]).size for level in (0, 1)]
    assert sizes == list(order.lengths[:2])
    assert sizes[0] < 0.06 * vector.size
    assert "layout:2" not in programs
    assert order.always_kept == 7  # the last bias: no unit owns it


def test_a_program_of_another_size_is_the_peers_fault() -> None:
    programs, vector = build_unit_programs(MODELS["digits"], LADDER), initial_vector(MODELS["digits"])
    job = job_of(programs, order_of(programs, vector), vector, 1)
    swapped = {**programs, **{f"{kind}:1": programs[f"{kind}:0"] for kind in ("layout", "train", "evaluate")}}
    with pytest.raises(PeerError, match="level 1 has"):
        train_job(LevelTrainers(swapped), source((64,)), job)
