"""Finding out what trains fastest: who races when, who wins, what is remembered, and that it changes no result."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from edge_agent.data.source import DataSource
from edge_agent.tuning import GAIN, MOST_S, RACE_STEPS, SHARE, Setting, Tuning
from edge_agent.worker import LevelTrainers, Worker, train_job
from export.models import watch_cnn
from export.programs import initial_vector
from export.task import published_programs
from regrow.errors import PeerError
from regrow.machine import Train, Trained, TrainingFailed
from regrow.programs import without_variants

PROGRAMS = {"layout": b"l", "train": b"a", "train~convolve": b"b", "train~multiply": b"c", "train_masked": b"d", "train:0": b"e"}
ENOUGH = int(RACE_STEPS / SHARE)
WAIT_S = 30.0


class Board:
    """A clock, and how long a step takes on it in each setting."""

    def __init__(self, seconds: Mapping[tuple[str, int], float]) -> None:
        self.now_s, self.steps, self._seconds = 0.0, 0, seconds

    def race(self, setting: Setting) -> Callable[[int], None]:
        return lambda count: self._run(self._seconds[setting.ways.get("train", ""), setting.threads], count)

    def _run(self, seconds: float, count: int) -> None:
        self.now_s += seconds * count
        self.steps += count


def run(tuning: Tuning, board: Board, programs: Mapping[str, bytes] = PROGRAMS) -> list[str]:
    """Race until nothing is left to try; the names of the challengers in their order."""
    names = []
    while challenger := tuning.trained(programs, "train", ENOUGH):
        tuning.race(programs, challenger, board.race)
        names.append(challenger.name)
        assert len(names) < 10
    return names


def test_ways_race_before_threads_and_the_fastest_of_all_is_used() -> None:
    board = Board({("", 4): 1.0, ("convolve", 4): 0.9, ("multiply", 4): 0.95, ("convolve", 2): 0.5, ("convolve", 1): 0.8})
    tuning = Tuning(4, clock=lambda: board.now_s)
    assert tuning.setting(PROGRAMS) == Setting(4)
    assert run(tuning, board) == ["train~convolve", "train~multiply", "train 2", "train 1"]
    assert tuning.setting(PROGRAMS) == Setting(2, {"train": "convolve"})
    assert board.steps == 4 * RACE_STEPS
    chosen = tuning.setting(PROGRAMS).programs(PROGRAMS)
    assert chosen == {"layout": b"l", "train": b"b", "train_masked": b"d", "train:0": b"e"}


def test_a_small_gain_may_be_chance() -> None:
    board = Board({("", 1): 1.0, ("convolve", 1): (1 + GAIN) / 2, ("multiply", 1): 0.99})
    tuning = Tuning(1, clock=lambda: board.now_s)
    run(tuning, board)
    assert tuning.setting(PROGRAMS) == Setting(1)


def test_races_cost_at_most_their_share_of_the_training() -> None:
    tuning = Tuning(1)
    asked = [tuning.trained(PROGRAMS, "train", 7) is not None for _ in range(1000)]
    assert 0 < sum(asked) * RACE_STEPS <= SHARE * 7 * 1000
    assert not any(asked[: ENOUGH // 7])


def test_a_program_without_other_ways_on_one_thread_has_nothing_to_try() -> None:
    assert Tuning(1).trained(PROGRAMS, "train:0", 10 * ENOUGH) is None


def test_a_race_that_takes_too_long_changes_nothing_and_is_not_run_again() -> None:
    board = Board({("", 1): MOST_S / 2, ("convolve", 1): 0.0, ("multiply", 1): 0.0})
    tuning = Tuning(1, clock=lambda: board.now_s)
    assert run(tuning, board) == ["train~convolve", "train~multiply"]
    assert tuning.setting(PROGRAMS) == Setting(1)
    assert board.now_s <= 2 * 2 * MOST_S


def test_a_choice_outlives_the_agent_and_belongs_to_these_programs_and_threads() -> None:
    board = Board({("", 1): 1.0, ("convolve", 1): 0.5, ("multiply", 1): 0.9})
    tuning = Tuning(1, clock=lambda: board.now_s)
    run(tuning, board)
    again = Tuning(1, tuning.to_bytes())
    assert again.setting(PROGRAMS) == tuning.setting(PROGRAMS) == Setting(1, {"train": "convolve"})
    assert again.trained(PROGRAMS, "train", ENOUGH) is None
    assert again.setting(PROGRAMS | {"train": b"other"}) == Setting(1)
    assert Tuning(2, tuning.to_bytes()).setting(PROGRAMS) == Setting(2)


@pytest.mark.parametrize("saved", [b"", b"{", b"[]", b"\xff", b'{"a": {"setting": {"threads": "1"}}}'])
def test_what_is_damaged_is_measured_again(saved: bytes) -> None:
    tuning = Tuning(1, saved)
    assert tuning.setting(PROGRAMS) == Setting(1)
    assert tuning.trained(PROGRAMS, "train", ENOUGH) is not None


def test_a_saved_choice_that_does_not_fit_is_not_used() -> None:
    digest = Tuning(1).digest(PROGRAMS)
    for setting in ('{"threads": 7}', '{"threads": 1, "ways": {"train": "gone"}}', '{"threads": 0}'):
        assert Tuning(1, f'{{"{digest}": {{"setting": {setting}}}}}'.encode()).setting(PROGRAMS) == Setting(1)


def test_only_the_newest_sets_are_remembered() -> None:
    tuning, board = Tuning(1), Board({("", 1): 1.0, ("convolve", 1): 0.5})
    for number in range(30):
        programs = PROGRAMS | {"layout": b"%d" % number}
        challenger = tuning.trained(programs, "train", ENOUGH)
        assert challenger is not None
        tuning.race(programs, challenger, board.race)
    assert len(tuning.to_bytes()) < 1500


# ---- with real programs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job() -> Train:
    model = watch_cnn(1)
    vector = initial_vector(model)
    coordinates = np.arange(vector.size, dtype=np.uint32)
    programs = published_programs(model)
    return Train(1, 4, programs, vector, coordinates, vector.size, {}, ENOUGH, 4, 0.01, 5)


@pytest.fixture
def source() -> DataSource:
    rng = np.random.default_rng(0)
    data = DataSource(60, 0.2)
    data.append(rng.standard_normal((60, 6, 100)).astype(np.float32), rng.integers(0, 7, 60))
    return data


@pytest.fixture
def results() -> queue.SimpleQueue[Trained | TrainingFailed | bytes]:
    return queue.SimpleQueue()


def test_every_way_trains_the_same(job: Train, source: DataSource) -> None:
    short = replace(job, steps=3)
    expected = train_job(LevelTrainers(without_variants(job.programs)), source, short)
    ways = {name.partition("~")[2] for name in job.programs if name.startswith("train~")}
    assert ways
    for way in ways:
        result = train_job(LevelTrainers(Setting(1, {"train": way}).programs(job.programs)), source, short)
        np.testing.assert_allclose(result.values, expected.values, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(result.values, job.values)


def test_every_way_leaves_dropped_coordinates_alone(job: Train, source: DataSource) -> None:
    layout = LevelTrainers(job.programs).at(4).layout
    kept = np.random.default_rng(2).random(layout.size) < 0.5
    kept[layout.always_kept_coordinates] = True
    short = replace(job, steps=3, kept=kept)
    expected = train_job(LevelTrainers(without_variants(job.programs)), source, short)
    ways = {name.partition("~")[2] for name in job.programs if name.startswith("train_masked~")}
    assert ways
    for way in ways:
        result = train_job(LevelTrainers(Setting(1, {"train_masked": way}).programs(job.programs)), source, short)
        np.testing.assert_allclose(result.values, expected.values, rtol=1e-4, atol=1e-6)
        assert not result.values[~kept].any()


def test_the_worker_races_after_its_job_and_says_what_to_save(
    job: Train, source: DataSource, results: queue.SimpleQueue[Trained | TrainingFailed | bytes]
) -> None:
    challengers = sum(name.startswith("train~") for name in job.programs)
    with closing(Worker(source, results.put, tuning=Tuning(1), tuned=results.put)) as worker:
        for _ in range(challengers):
            worker.put(job)
            assert isinstance(results.get(timeout=WAIT_S), Trained)  # the update goes first
            saved = results.get(timeout=WAIT_S)
        worker.put(job)
        last = results.get(timeout=WAIT_S)
    assert isinstance(saved, bytes)
    assert isinstance(last, Trained)
    assert Tuning(1, saved).trained(job.programs, "train", ENOUGH) is None
    by_default = train_job(LevelTrainers(job.programs), source, job)
    np.testing.assert_allclose(last.values, by_default.values, rtol=1e-2, atol=1e-4)


def test_a_variant_that_fails_has_lost(
    job: Train, source: DataSource, results: queue.SimpleQueue[Trained | TrainingFailed | bytes]
) -> None:
    broken = {name: b"not a program" if "~" in name else data for name, data in job.programs.items()}
    with closing(Worker(source, results.put, tuning=Tuning(1), tuned=results.put)) as worker:
        worker.put(replace(job, programs=broken))
        assert isinstance(results.get(timeout=WAIT_S), Trained)
        saved = results.get(timeout=WAIT_S)
        worker.put(replace(job, programs=broken, steps=2))
        assert isinstance(results.get(timeout=WAIT_S), Trained)
    assert isinstance(saved, bytes)
    assert Tuning(1, saved).setting(broken) == Setting(1)


def test_a_broken_default_is_told_as_before(job: Train, source: DataSource) -> None:
    with pytest.raises(PeerError):
        train_job(LevelTrainers(job.programs | {"train": b"not a program"}), source, replace(job, steps=1))
