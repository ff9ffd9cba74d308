"""The training thread: results that repeat, failures that are told, an end that comes at once."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from edge_agent.data.source import DataSource
from edge_agent.worker import Worker
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from regrow.machine import Train, Trained, TrainingFailed

WAIT_S = 20.0


@pytest.fixture(scope="module")
def job() -> Train:
    model = digits_mlp(1)
    vector = initial_vector(model)
    return Train(
        number=3,
        level=4,
        programs=build_programs(model),
        values=vector,
        coordinates=np.arange(vector.size, dtype=np.uint32),
        length=vector.size,
        evaluate={4: vector.size},
        steps=3,
        batch=10,
        learning_rate=0.1,
        seed=5,
    )


def source(width: int = 64, validation: float = 0.2, rows: int = 60) -> DataSource:
    rng = np.random.default_rng(0)
    data = DataSource(rows, validation)
    data.append(rng.random((rows, width), np.float32), rng.integers(0, 10, rows))
    return data


class Results:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Trained | TrainingFailed] = queue.SimpleQueue()

    def of(self, worker: Worker, job: Train) -> Trained | TrainingFailed:
        worker.put(job)
        return self.queue.get(timeout=WAIT_S)


@pytest.fixture
def results() -> Results:
    return Results()


@pytest.fixture
def worker(results: Results) -> Iterator[Worker]:
    worker = Worker(source(), results.queue.put)
    yield worker
    worker.close()


def trained(result: Trained | TrainingFailed) -> Trained:
    assert isinstance(result, Trained), result
    return result


def test_the_same_job_gives_the_same_bits(worker: Worker, results: Results, job: Train) -> None:
    first, second = (trained(results.of(worker, job)) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    assert not np.array_equal(first.values, job.values)
    assert (first.number, first.examples) == (3, 30)
    assert worker.step_s is not None
    other = trained(results.of(worker, replace(job, seed=6)))
    assert not np.array_equal(first.values, other.values)


def test_the_levels_are_scored_before_training(worker: Worker, results: Results, job: Train) -> None:
    ((level, loss, accuracy, examples),) = trained(results.of(worker, job)).scores
    assert (level, examples) == (4, 12)
    assert 0 < loss < 100
    assert 0 <= accuracy <= 1


def test_a_part_of_the_model_is_trained_in_its_own_positions(worker: Worker, results: Results, job: Train) -> None:
    where = np.r_[2048:2410, 0:500].astype(np.uint32)  # the first layer's bias, the whole second layer, a part of the first
    part = trained(results.of(worker, replace(job, coordinates=where, values=job.values[where], length=where.size, evaluate={})))
    assert part.values.shape == where.shape
    moved = part.values != job.values[where]
    assert moved[362:].any()
    assert moved[:362].any()


def test_without_validation_data_there_are_no_scores(results: Results, job: Train) -> None:
    worker = Worker(source(validation=0.0), results.queue.put)
    assert trained(results.of(worker, job)).scores == ()
    worker.close()


def test_what_cannot_be_trained_is_told_and_the_next_job_is_done(worker: Worker, results: Results, job: Train) -> None:
    for name in ("layout", "train", "evaluate"):
        broken = results.of(worker, replace(job, programs={**job.programs, name: b"\x08rubbish"}))
        assert isinstance(broken, TrainingFailed)
        assert broken.number == 3
        assert broken.reason
    missing = results.of(worker, replace(job, programs={"layout": job.programs["layout"]}))
    assert isinstance(missing, TrainingFailed)
    trained(results.of(worker, job))


@pytest.mark.parametrize(("width", "says"), [(10, "x: expected"), (640, "x: expected")])
def test_data_that_does_not_fit_the_model_is_told(results: Results, job: Train, width: int, says: str) -> None:
    worker = Worker(source(width), results.queue.put)
    failed = results.of(worker, job)
    assert isinstance(failed, TrainingFailed)
    assert says in failed.reason
    worker.close()


def test_close_ends_the_thread(results: Results) -> None:
    worker = Worker(source(), results.queue.put)
    assert worker._thread.is_alive()
    worker.close()
    worker._thread.join(WAIT_S)
    assert not worker._thread.is_alive()
