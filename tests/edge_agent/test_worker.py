"""The training thread: results that repeat, failures that are told, an end that comes at once."""

from __future__ import annotations

import gc
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from edge_agent.worker import LevelTrainers, Pace, Worker, train_job
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from export.unit_programs import build_unit_programs
from export.units import find_units
from regrow.local_rules import drawn_levels
from regrow.machine import Train, Trained, TrainingFailed
from regrow.order import Order
from regrow.parameters import Layout
from regrow.unit_order import build_unit_order, ranks_of
from regrow.units import Units

WAIT_S = 20.0
ROOT = Path(__file__).resolve().parents[2]


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


def test_a_label_out_of_range_is_found_before_a_step_and_other_samples_are_looked_at_when_they_come(results: Results, job: Train) -> None:
    data = source(rows=60)
    data.append(np.zeros((1, 64), np.float32), np.array([10]))
    worker = Worker(data, results.queue.put)
    failed = results.of(worker, job)
    assert failed == TrainingFailed(
        3, "the data: row 60 (the first is 0): label 10, but the task's labels are 0 to 9", declined=True
    )  # where only some batches would have had it
    data.append(np.zeros((60, 64), np.float32), np.zeros(60, np.int64))
    trained(results.of(worker, job))
    data.append(np.zeros((1, 64), np.float32), np.array([11]))
    again = results.of(worker, job)
    assert isinstance(again, TrainingFailed)
    assert "label 11" in again.reason
    worker.close()


def test_a_broken_program_is_no_reason_to_decline(worker: Worker, results: Results, job: Train) -> None:
    failed = results.of(worker, replace(job, programs={**job.programs, "train": b"junk"}))
    assert isinstance(failed, TrainingFailed)
    assert not failed.declined


def test_another_model_forgets_what_a_step_of_the_last_one_took(worker: Worker, results: Results, job: Train) -> None:
    trained(results.of(worker, job))
    assert worker.full_step_s is not None
    assert isinstance(results.of(worker, replace(job, programs={**job.programs, "train": b"junk"})), TrainingFailed)
    assert (worker.step_s, worker.full_step_s) == (None, None)


def test_close_ends_the_thread(results: Results, job: Train) -> None:
    worker = Worker(source(), results.queue.put)
    assert worker._thread.is_alive()
    worker.put(replace(job, steps=10_000_000))
    worker.close()
    assert not worker._thread.is_alive(), "a job at hand ends at its next step"


# ---- ordered dropout -----------------------------------------------------------------------------------------------------------------

LADDER = (0.1, 0.4, 1.0)


@pytest.fixture(scope="module")
def widths() -> tuple[Train, Order]:
    """A job of the whole model that may draw any of three nested widths, each with programs of its own."""
    model = digits_mlp(1)
    programs, vector = build_unit_programs(model, LADDER), initial_vector(model)
    layout = Layout.from_json(programs["layout"])
    units = Units.from_json(programs["units"], layout)
    order = build_unit_order(layout, units, ranks_of("first", layout, units, np.abs(vector), 0), LADDER, 0)
    lengths = dict(enumerate(order.lengths))
    return Train(
        number=1, level=2, programs=programs, values=vector[order.coordinates], coordinates=order.coordinates, length=vector.size,
        evaluate={}, steps=9, batch=10, learning_rate=0.1, seed=5, widths=lengths,
    ), order  # fmt: skip


def directly(job: Train, kept: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Plain training of the whole model on the job's batches, in position order."""
    vector = np.empty_like(job.values)
    vector[job.coordinates] = job.values
    batches = source().batches(np.random.default_rng(job.seed), job.batch, job.steps)
    return Trainer(job.programs).train(vector, kept, batches, job.learning_rate).vector[job.coordinates]


@pytest.mark.parametrize("how", ["plain", "one width", "a mask of everything"])
def test_one_width_or_a_full_mask_is_plain_training_to_the_bit(job: Train, how: str) -> None:
    changed = {
        "plain": job,
        "one width": replace(job, widths={4: job.length}),
        "a mask of everything": replace(job, kept=np.ones(job.length, np.bool_)),
    }[how]
    changed = replace(changed, steps=11, batch=7)  # the last batch of an epoch is shorter
    result = train_job(LevelTrainers(job.programs), source(), changed)
    np.testing.assert_array_equal(result.values, directly(changed, None))


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_every_step_trains_the_width_that_is_drawn_for_it(widths: tuple[Train, Order], granularity: str) -> None:
    """Against the full graph with a mask per step, one call each."""
    job, order = widths
    model = digits_mlp(1)
    masked = build_programs(model, find_units(model))
    if granularity == "weight":
        job = replace(job, programs=masked)
    result = train_job(LevelTrainers(job.programs), source(), job)
    drawn = drawn_levels([0, 1, 2], job.steps, job.seed)
    assert set(drawn) == {0, 1, 2}
    full, vector = Trainer(masked), np.empty_like(job.values)
    vector[job.coordinates] = job.values
    for level, batch in zip(drawn, source().batches(np.random.default_rng(job.seed), job.batch, job.steps), strict=True):
        where = order.coordinates[: order.lengths[level]]
        kept = np.zeros(vector.size, np.bool_)
        kept[where] = True
        step = full.train(np.where(kept, vector, np.float32(0)), kept, [batch], job.learning_rate)
        vector[where] = step.vector[where]
    np.testing.assert_allclose(result.values, vector[job.coordinates], rtol=1e-3, atol=2e-6)
    assert result.examples == 88, "nine batches of ten, but the last of an epoch of 48 has eight"
    assert np.abs(result.values - job.values).max() > 1e-3


def test_a_step_changes_its_width_only_and_narrow_widths_are_trained_more_often(widths: tuple[Train, Order]) -> None:
    job, order = widths
    trainers = LevelTrainers(job.programs)
    changes, draws = np.zeros(job.length, np.int64), np.zeros(3, np.int64)
    for seed in range(30):
        one = replace(job, steps=1, seed=seed)
        changed = train_job(trainers, source(), one).values != job.values
        (level,) = drawn_levels([0, 1, 2], 1, seed)
        assert not changed[order.lengths[level] :].any()
        assert changed[: order.lengths[level]].any()
        changes += changed
        draws[: level + 1] += 1
    assert 30 == draws[0] > draws[1] > draws[2] > 0
    starts = [0, *order.lengths[:-1]]
    most = [int(changes[start:stop].max()) for start, stop in zip(starts, order.lengths, strict=True)]
    assert most == draws.tolist(), "the narrowest in every step, the widest only when it was drawn"


def test_a_job_of_small_widths_keeps_no_session_of_the_full_model(worker: Worker, results: Results, widths: tuple[Train, Order]) -> None:
    job, _ = widths
    trained(results.of(worker, job))
    assert worker._trainers is not None
    full = weakref.ref(worker._trainers.at(2))
    narrow = replace(job, level=0, length=job.widths[0], widths={0: job.widths[0]})
    trained(results.of(worker, narrow))
    gc.collect()
    assert full() is None, "it would keep its memory beside that of the level"
    trained(results.of(worker, job))


def test_levels_above_its_own_are_never_drawn(widths: tuple[Train, Order]) -> None:
    job, order = widths
    length = order.lengths[1]
    narrow = replace(job, level=1, length=length, widths={0: order.lengths[0], 1: length}, values=job.values[:length])
    result = train_job(LevelTrainers(job.programs), source(), replace(narrow, coordinates=job.coordinates[:length]))
    assert result.values.size == length


def test_draws_are_uniform_repeat_and_leave_the_batches_alone() -> None:
    drawn = drawn_levels([0, 1, 2, 3], 8000, 7)
    assert drawn == drawn_levels([0, 1, 2, 3], 8000, 7)
    assert drawn != drawn_levels([0, 1, 2, 3], 8000, 8)
    assert all(1850 < drawn.count(level) < 2150 for level in range(4))
    assert drawn[:8] != np.random.default_rng(7).integers(4, size=8).tolist(), "the batches have a stream of their own"


# ---- personal masks ------------------------------------------------------------------------------------------------------------------


def test_a_personal_mask_is_trained_and_scored_inside_the_full_model(job: Train) -> None:
    order = np.random.default_rng(2).permutation(job.length).astype(np.uint32)
    bias = Layout.from_json(job.programs["layout"]).always_kept_coordinates
    flat = np.random.default_rng(3).random(job.length) < 0.3
    flat[bias] = True
    own = replace(job, level=0, coordinates=order, values=job.values[order], kept=flat[order], evaluate={0: job.length, 4: job.length})
    result = train_job(LevelTrainers(job.programs), source(), own)
    inside = np.where(flat, job.values, np.float32(0))
    expected = directly(replace(own, values=inside[order]), flat)
    np.testing.assert_array_equal(result.values, expected)
    assert not result.values[~flat[order]].any()
    assert (result.values[flat[order]] != own.values[flat[order]]).mean() > 0.5
    x, y = source().validation()
    scores = [Trainer(job.programs).evaluate(vector, x, y).loss for vector in (inside, job.values)]
    assert [score[1] for score in result.scores] == scores


def test_a_job_that_is_given_up_ends_at_its_next_step_and_the_one_after_it_runs(results: Results, job: Train) -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow(DataSource):
        def batches(self, rng: np.random.Generator, batch: int, steps: int) -> Iterator[Any]:
            for number, item in enumerate(super().batches(rng, batch, steps)):
                if number == 1 and steps == 1000:
                    reached.set()
                    go_on.wait(WAIT_S)
                yield item

    data = Slow(60, 0.2)
    rng = np.random.default_rng(0)
    data.append(rng.random((60, 64), np.float32), rng.integers(0, 10, 60))
    worker = Worker(data, results.queue.put)
    worker.put(replace(job, number=7, steps=1000))
    worker.put(replace(job, number=8))
    assert reached.wait(WAIT_S)
    worker.abandon()
    worker.put(replace(job, number=9))
    go_on.set()
    found = [results.queue.get(timeout=WAIT_S) for _ in range(3)]
    assert [(result.number, type(result)) for result in found] == [(7, TrainingFailed), (8, TrainingFailed), (9, Trained)]
    worker.close()


ENDS = """
import sys, threading
from pathlib import Path
import numpy as np
import onnxruntime
from edge_agent.data.source import DataSource
from edge_agent.worker import Worker

session = onnxruntime.InferenceSession(str(Path("edge_agent/doctor/step/train.onnx")), providers=["CPUExecutionProvider"])
feeds = {i.name: np.zeros([d if isinstance(d, int) else 8 for d in i.shape], {"tensor(int64)": np.int64}.get(i.type, np.float32))
         for i in session.get_inputs()}
worker, begun = Worker(DataSource(1), print), threading.Event()

def compute():
    for number in range(20_000):
        session.run(None, feeds)
        begun.set()
        if getattr(worker, "_closing", False):
            return

worker.put(compute)
begun.wait()
worker.close()
"""


def test_the_process_ends_well_though_onnxruntime_is_at_work() -> None:
    """The interpreter's end under a thread in onnxruntime is an abort: `terminate called without an active exception`."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_begun_after_the_end() -> None:
    gate, worker = threading.Event(), Worker(source(), lambda _: None)
    begun: list[int] = []
    worker.put(lambda: (begun.append(1), gate.wait(WAIT_S))[0])
    worker.put(lambda: begun.append(2))
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.set()
    closing.join(WAIT_S)
    assert not worker.alive
    assert begun in ([], [1])


# ---- steps that the board was slowed in -------------------------------------------------------------------------------------------------


def pace_of(steps: list[tuple[float, str]], ended_s: float, mark: str = "") -> float | None:
    """The pace of a job: when its steps began, and what slowed the board then."""
    marks = iter([*(word for _, word in steps), mark])
    pace = Pace(lambda: next(marks))
    for began_s, _ in steps:
        pace.step(began_s)
    return pace.step_s(ended_s, len(steps), ended_s)


def test_a_step_in_which_the_board_was_slowed_is_not_timed() -> None:
    slow, ok = "under-voltage", ""
    assert pace_of([(0.5, ok), (1.0, ok), (2.0, ok), (3.0, ok)], 4.0) == 1.0  # all of the job's time, its first batch too
    assert pace_of([(0.0, ok), (1.0, ok), (2.0, slow), (9.0, slow), (16.0, ok), (17.0, ok)], 18.0) == pytest.approx(1.0)
    assert pace_of([(0.0, slow), (5.0, slow)], 10.0, slow) is None
    assert pace_of([(0.0, ok), (5.0, ok)], 10.0, slow) == 5.0


def test_what_a_slowed_job_took_is_not_told_and_what_was_known_before_stays(results: Results, job: Train) -> None:
    slowed = [""]
    worker = Worker(source(), results.queue.put, marked=lambda: slowed[0])
    slowed[0] = "throttled"
    trained(results.of(worker, job))
    assert (worker.step_s, worker.full_step_s) == (None, None)
    slowed[0] = ""
    trained(results.of(worker, job))
    known = worker.step_s
    assert known is not None
    slowed[0] = "throttled"
    trained(results.of(worker, job))
    assert (worker.step_s, worker.full_step_s) == (known, known)
    worker.close()
