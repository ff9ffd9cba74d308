"""The training thread: one job at a time, at a lower priority than the link, so that pings and acknowledgements stay prompt."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from edge_agent.tuning import Setting, Tuning
from regrow import wire
from regrow.errors import LocalError, PeerError, RegrowError
from regrow.local_rules import drawn_levels
from regrow.local_training import STATISTICS_BATCHES, Batch, Training
from regrow.machine import Train, Trained, TrainingFailed
from regrow.watchdog import Progress

log = logging.getLogger(__name__)
NICE = 5
HOLD_LOOK_S = 1.0
CLOSE_S = 5.0

MakeTrainer = Callable[[Mapping[str, bytes], int], Training]
"""(programs of one model, threads) -> its trainer; raises PeerError, LocalError as edge_agent.trainer.Trainer."""


class Worker:
    """Trains what it is given with what the data source holds at that moment.

    Args:
        source: the device's own data.
        done: called from this thread with every result.
        threads: for training.
        make: what trains.
        tuning: what finds out, between jobs, how to train fastest; None: always the default way, to the bit.
        tuned: called from this thread with what to save of it.
        progress: what this thread tells of its advance.
        marked: what slows the board at this moment, nothing where it runs at its own pace; steps that it slowed are not timed.

    Attributes:
        step_s: seconds of a step of the last job; full_step_s: of the last that trained the full model. None until these programs did.
    """

    def __init__(
        self,
        source: DataSource,
        done: Callable[[Trained | TrainingFailed], None],
        *,
        threads: int = 1,
        make: MakeTrainer = Trainer,
        tuning: Tuning | None = None,
        tuned: Callable[[bytes], None] = lambda _: None,
        progress: Progress | None = None,
        marked: Callable[[], str] = lambda: "",
    ) -> None:
        self.step_s: float | None = None
        self.full_step_s: float | None = None
        self._source, self._done, self._threads, self._make = source, done, threads, make
        self._tuning, self._tuned = tuning, tuned
        self._progress = progress or Progress("training")
        self._marked = marked
        self._jobs: queue.SimpleQueue[Train | Callable[[], None] | None] = queue.SimpleQueue()
        self._put = self._given_up = 0  # numbers of jobs
        self._moving = threading.Event()
        self._moving.set()
        self._held_s = 0.0
        self._closing = False
        self._key: tuple[bytes, ...] = ()
        self._trainers: LevelTrainers | None = None
        self._fitting = 0  # samples before this number fit these programs
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def put(self, job: Train | Callable[[], None]) -> None:
        """Queue a job of training, or other work that must neither disturb one nor the link; such work raises nothing."""
        if isinstance(job, Train):
            self._put = job.number
        self._jobs.put(job)

    def abandon(self) -> None:
        """Give up every job of training that was put until now, the one at hand at its next step."""
        self._given_up = self._put

    def hold(self, still: bool) -> None:
        """Let the job at hand, and any that comes, stand still at its next step; or go on."""
        if still:
            self._moving.clear()
        else:
            self._moving.set()

    def _moved_s(self) -> float:
        """Monotonic seconds, without those that it stood still."""
        return time.monotonic() - self._held_s

    def _go_on(self, job: Train, pace: Pace) -> None:
        self._stand_still(job)
        self._progress.step(time.monotonic())
        pace.step(self._moved_s())

    def _stand_still(self, job: Train) -> None:
        """Wait while the job may not go on; that is neither time of a step nor a hang."""
        began_s = time.monotonic()
        while not self._moving.wait(HOLD_LOOK_S) and not self._over(job):
            self._progress.begin(f"standing still in job {job.number}", self._progress.patience.first_s, time.monotonic())
        self._held_s += time.monotonic() - began_s
        if self._over(job):
            raise LocalError("given up")

    def _over(self, job: Train) -> bool:
        return self._closing or job.number <= self._given_up

    def close(self) -> None:
        """Let the job at hand go, which is repeated after the next start, and wait until it does, for CLOSE_S at most.

        onnxruntime must not be at work when the interpreter ends: its thread would come back into one that is gone, and C++ aborts.
        """
        self._closing = True
        self._jobs.put(None)
        self._thread.join(CLOSE_S)

    @property
    def alive(self) -> bool:
        """Whether the thread runs: an error that nobody foresaw ends it."""
        return self._thread.is_alive()

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        patience = self._progress.patience
        while (job := self._jobs.get()) is not None and not self._closing:
            if not isinstance(job, Train):
                self._progress.begin("work between two jobs", patience.other_s, time.monotonic())
                job()
            else:
                self._progress.begin(f"training job {job.number}", patience.first_s, time.monotonic())
                self._work(job)
            self._progress.end()

    def _work(self, job: Train) -> None:
        try:
            trained = self._train(job)
        except RegrowError as error:
            self._done(TrainingFailed(job.number, str(error), declined=isinstance(error, LocalError)))
            return
        self._done(trained)
        if self._tuning is not None and self._jobs.empty() and not self._closing and not self._marked():  # while the update travels
            self._progress.begin("trying another setting", self._progress.patience.first_s, time.monotonic())
            self._tune(self._tuning, job, trained)

    def _train(self, job: Train) -> Trained:
        self._stand_still(job)
        trainers = self._trainers_of(job.programs)
        trainers.keep({job.level, *job.widths, *job.evaluate}, whole=job.kept is not None)
        if self._source.appended > self._fitting:
            place = trainers.place(job, job.level, job.length)
            self._fitting = self._source.check(place.trainer.examples(masked=place.mask(job.kept) is not None), self._fitting)
        pace = Pace(self._marked)
        trained = train_job(trainers, self._source, job, self._moved_s, lambda: self._go_on(job, pace))
        step_s = pace.step_s(trained.seconds, job.steps, self._moved_s())
        if step_s is not None:
            self.step_s = step_s
            if trainers.is_full(job.level) and not job.widths:
                self.full_step_s = step_s
        return trained

    def _trainers_of(self, programs: Mapping[str, bytes]) -> LevelTrainers:
        """The sessions of these programs, kept until others come."""
        key = tuple(wire.digest(programs[name]) for name in sorted(programs))
        if self._key != key:
            self._key, self._trainers, self._fitting = key, None, 0
            self.step_s = self.full_step_s = None  # what was measured is of another model
        if self._trainers is None:
            setting = Setting(self._threads) if self._tuning is None else self._tuning.setting(programs)
            self._trainers = LevelTrainers(setting.programs(programs), setting.threads, self._make)
        return self._trainers

    def _tune(self, tuning: Tuning, job: Train, trained: Trained) -> None:
        """Race another setting against the one in use, if it is time to; a program that fails has lost."""
        challenger = tuning.trained(job.programs, self._trainers_of(job.programs).program_of(job), job.steps)
        if challenger is None:
            return
        self._trainers = None  # one session at a time
        try:
            won = tuning.race(job.programs, challenger, lambda setting: self._steps(job, setting, trained.values))
            log.info("%s: %s", challenger.name, "faster, and in use from now on" if won else "not faster")
        except RegrowError as error:
            if self._closing:
                return
            log.warning("%s: %s", challenger.name, error)
        self._tuned(tuning.to_bytes())

    def _steps(self, job: Train, setting: Setting, values: NDArray[np.float32]) -> Callable[[int], object]:
        """What runs so many steps of the job's level from its trained values, with nothing to show for it."""
        place = LevelTrainers(setting.programs(job.programs), setting.threads, self._make).place(job, job.level, job.length)
        vector, mask = place.vector(values), place.mask(job.kept)
        batch = next(iter(self._source.batches(np.random.default_rng(job.seed), job.batch, 1)))

        def run(count: int) -> object:
            if self._closing:
                raise LocalError("given up")
            return place.trainer.train(vector, mask, [batch] * count, job.learning_rate)

        return run


class Pace:
    """How long a step of one job takes while nothing slows the board.

    Args:
        marked: as for the worker.
    """

    def __init__(self, marked: Callable[[], str]) -> None:
        self._marked = marked
        self._last: tuple[float, bool] | None = None  # when the step at hand began, and whether the board was slowed then
        self._good_s, self._good, self._bad = 0.0, 0, 0

    def step(self, now: float) -> None:
        """A step begins at monotonic `now`: the one before it is over."""
        slowed = bool(self._marked())
        if self._last is not None:
            began_s, was_slowed = self._last
            if slowed or was_slowed:
                self._bad += 1
            else:
                self._good += 1
                self._good_s += now - began_s
        self._last = (now, slowed)

    def step_s(self, seconds: float, steps: int, now: float) -> float | None:
        """The mean step of a job that took these seconds and is over at `now`; None where every step was slowed."""
        self.step(now)
        if not self._bad:
            return seconds / max(steps, 1)
        return self._good_s / self._good if self._good else None


def train_job(
    trainers: LevelTrainers,
    source: DataSource,
    job: Train,
    clock: Callable[[], float] = lambda: 0.0,
    on_step: Callable[[], None] = lambda: None,
) -> Trained:
    """Score the levels that the job asks for on the validation data, then train its sub-model.

    Args:
        clock: times the training.
        on_step: called before every step.

    Raises:
        LocalError: there is no training data, or it does not fit the programs.
        PeerError: the programs are malformed or fail.
    """
    first = job.values[: job.length].copy()
    if job.kept is not None:
        first[~job.kept] = 0
    x, y = source.validation()
    scores = []
    if len(y):
        for level, length in job.evaluate.items():
            place = trainers.place(job, level, length)
            vector = place.vector(first if level == job.level else job.values)
            # Of this level, from this device's training data: a running mean is of the parameters that made it.
            statistics = place.trainer.statistics(vector, drawn_examples(source, job.batch, job.seed))
            score = place.trainer.evaluate(vector, x, y, statistics=statistics)
            scores.append((level, score.loss, score.accuracy, score.examples))
    widths = job.widths or {job.level: job.length}
    drawn = drawn_levels(list(widths), job.steps, job.seed)
    places = {level: trainers.place(job, level, widths[level]) for level in sorted(set(drawn))}
    started = clock()
    batches = _telling(source.batches(np.random.default_rng(job.seed), job.batch, job.steps), on_step)
    result = _train(job, zip(drawn, batches, strict=True), places, first)
    return Trained(job.number, *result, clock() - started, tuple(scores))


def _telling(batches: Iterable[Batch], on_step: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        on_step()
        yield batch


def drawn_examples(source: DataSource, batch: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """A bounded number of training batches, without labels, for running statistics; the same ones for one seed.

    Raises:
        LocalError: with the first batch, if there is no training data.
    """
    for x, _ in source.batches(np.random.default_rng(seed), batch, STATISTICS_BATCHES):
        yield x


def _train(
    job: Train, steps: Iterable[tuple[int, Batch]], places: Mapping[int, Place], values: NDArray[np.float32]
) -> tuple[NDArray[np.float32], int, float]:
    """(values, examples, mean loss) after all steps, each on its level.

    Neighbouring steps of one level are one call of its trainer; with a single level that is plain training, to the bit.

    Args:
        steps: (level, batch).
        places: of these levels.
        values: float32 [length], in position order; written to.
    """
    masks = {level: place.mask(job.kept) for level, place in places.items()}
    loss, examples = 0.0, 0
    for level, run in groupby(steps, key=itemgetter(0)):
        place = places[level]
        result = place.trainer.train(place.vector(values), masks[level], (batch for _, batch in run), job.learning_rate)
        values[: place.slots.size] = result.vector[place.slots]
        loss += result.loss * result.examples
        examples += result.examples
    return values, examples, loss / examples


@dataclass(frozen=True, eq=False)
class Place:
    """Where a level lies in the flat vector of the program that trains it.

    Args:
        trainer: of the level.
        slots: uint32 [length], the vector's index of each position of the level.
    """

    trainer: Training
    slots: NDArray[np.uint32]

    def vector(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The program's vector of these values (float32 [>= length], in position order), 0 outside the level."""
        vector = np.zeros(self.trainer.layout.size, np.float32)
        vector[self.slots] = values[: self.slots.size]
        return vector

    def mask(self, kept: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """What the program may change, bool [its n]; None for all of it. kept: bool [length], a mask within the level."""
        slots = self.slots if kept is None else self.slots[kept]
        if slots.size == self.trainer.layout.size:
            return None
        mask = np.zeros(self.trainer.layout.size, np.bool_)
        mask[slots] = True
        return mask


class LevelTrainers:
    """The trainers of one task's programs: one for the full model, and one for each level that has a smaller model of its own.

    Without those, a sub-model is the full one with masks (granularity "weight"); with them, it is a graph of its own sizes, whose flat
    vector is that of the sub-model's coordinates in ascending order (granularity "unit", export.unit_programs).

    Args:
        programs: as they came with the version.
        threads: for training.
        make: what trains.

    Raises:
        PeerError: a layout is malformed.
    """

    def __init__(self, programs: Mapping[str, bytes], threads: int = 1, make: MakeTrainer = Trainer) -> None:
        self._programs, self._threads, self._make = programs, threads, make
        self._full: Training | None = make(programs, threads)
        self._small: dict[int, Training] = {}

    def is_full(self, level: int) -> bool:
        """Whether a step of this level costs what one of the full model does."""
        return f"layout:{level}" not in self._programs

    def program_of(self, job: Train) -> str:
        """The name of the program that trains the job's own level."""
        place = self.place(job, job.level, job.length)
        if place.trainer is not self._full:
            return f"train:{job.level}"
        return "train" if place.mask(job.kept) is None else "train_masked"

    def keep(self, levels: Collection[int], *, whole: bool = False) -> None:
        """Let go of the models of other levels, the full one too unless one of these trains it: a session keeps its memory.

        Args:
            levels: that a job needs.
            whole: it needs the full model whatever its levels (personal masks).
        """
        if not whole and not any(map(self.is_full, levels)):
            self._full = None
        self._small = {level: trainer for level, trainer in self._small.items() if level in levels}

    def at(self, level: int) -> Training:
        """The trainer of a level."""
        if self.is_full(level):
            return self._of_all()
        if level not in self._small:
            names = [name for name in ("layout", "train", "evaluate", "statistics") if f"{name}:{level}" in self._programs]
            own = {name: self._programs[f"{name}:{level}"] for name in names}
            self._small[level] = self._make(own, self._threads)
        return self._small[level]

    def _of_all(self) -> Training:
        if self._full is None:
            self._full = self._make(self._programs, self._threads)
        return self._full

    def place(self, job: Train, level: int, length: int) -> Place:
        """Where the first `length` positions of the job lie in the level's vector; personal masks lie in the full model whatever the level.

        Raises:
            PeerError: the level's program is of another size than the level.
        """
        where = job.coordinates[:length]
        trainer = self.at(level) if job.kept is None else self._of_all()
        if trainer is self._full:
            return Place(trainer, where)
        if trainer.layout.size != length:
            raise PeerError(f"level {level} has {length} coordinates, its program {trainer.layout.size}")
        slots = np.empty_like(where)
        slots[np.argsort(where)] = np.arange(length, dtype=np.uint32)
        return Place(trainer, slots)
