"""The training thread: one job at a time, at a lower priority than the link, so that pings and acknowledgements stay prompt."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from edge_agent.trainer import Batch, Score, Trainer, TrainResult
from regrow import wire
from regrow.errors import PeerError, RegrowError
from regrow.machine import Train, Trained, TrainingFailed
from regrow.parameters import Layout

NICE = 5


class Worker:
    """Trains what it is given with what the data source holds at that moment.

    Args:
        source: the device's own data.
        done: called from this thread with every result.
        threads: for onnxruntime.
    """

    def __init__(self, source: DataSource, done: Callable[[Trained | TrainingFailed], None], *, threads: int = 1) -> None:
        self.step_s: float | None = None
        self._source, self._done, self._threads = source, done, threads
        self._jobs: queue.SimpleQueue[Train | None] = queue.SimpleQueue()
        self._trainers: tuple[tuple[bytes, ...], LevelTrainers] | None = None
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def put(self, job: Train) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Let the job at hand go: what it would give is repeated after the next start."""
        self._jobs.put(None)

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (job := self._jobs.get()) is not None:
            try:
                self._done(self._train(job))
            except RegrowError as error:
                self._done(TrainingFailed(job.number, str(error)))

    def _train(self, job: Train) -> Trained:
        trained = train_job(self._trainers_of(job.programs), self._source, job, time.monotonic)
        self.step_s = trained.seconds / max(job.steps, 1)
        return trained

    def _trainers_of(self, programs: Mapping[str, bytes]) -> LevelTrainers:
        """The sessions of these programs, kept until others come."""
        key = tuple(wire.digest(programs[name]) for name in sorted(programs))
        if self._trainers is None or self._trainers[0] != key:
            self._trainers = (key, LevelTrainers(programs, threads=self._threads))
        return self._trainers[1]


def train_job(trainers: LevelTrainers, source: DataSource, job: Train, clock: Callable[[], float] = lambda: 0.0) -> Trained:
    """Score the levels that the job asks for on the validation data, then train its sub-model; `clock` times the training.

    Raises:
        LocalError: there is no training data, or it does not fit the programs.
        PeerError: the programs are malformed or fail.
    """
    x, y = source.validation()
    scores = []
    if len(y):
        for level, length in job.evaluate.items():
            score = trainers.at(level).evaluate(trainers.vector(job, level, length), x, y)
            scores.append((level, score.loss, score.accuracy, score.examples))
    vector = trainers.vector(job, job.level, job.length)
    kept = trainers.kept(job)
    started = clock()
    batches = source.batches(np.random.default_rng(job.seed), job.batch, job.steps)
    result = trainers.at(job.level).train(vector, kept, batches, job.learning_rate)
    seconds = clock() - started
    return Trained(job.number, trainers.values(job, result.vector), result.examples, result.loss, seconds, tuple(scores))


class Training(Protocol):
    """What trains one model; edge_agent.trainer.Trainer says what each means. The simulator has one on torch beside it."""

    @property
    def layout(self) -> Layout: ...

    def train(
        self, vector: NDArray[np.float32], kept: NDArray[np.bool_] | None, batches: Iterable[Batch], learning_rate: float
    ) -> TrainResult: ...

    def evaluate(self, vector: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> Score: ...


class LevelTrainers:
    """The trainers of one task's programs: one for the full model, and one for each level that has a smaller model of its own.

    Without those, a sub-model is the full one with masks (granularity "weight"); with them, it is a graph of its own sizes, whose flat
    vector is that of the sub-model's coordinates in ascending order (granularity "unit", export.unit_programs).

    Args:
        programs: as they came with the version.
        threads: for onnxruntime.
        make: (programs of one model, threads) -> its trainer.

    Raises:
        PeerError: a layout is malformed.
    """

    def __init__(
        self, programs: Mapping[str, bytes], threads: int = 1, make: Callable[[Mapping[str, bytes], int], Training] = Trainer
    ) -> None:
        self._programs, self._threads, self._make = programs, threads, make
        self._full = make(programs, threads)
        self._small: dict[int, Training] = {}

    def at(self, level: int) -> Training:
        """The trainer of a level."""
        if f"layout:{level}" not in self._programs:
            return self._full
        if level not in self._small:
            names = [name for name in ("layout", "train", "evaluate") if f"{name}:{level}" in self._programs]
            own = {name: self._programs[f"{name}:{level}"] for name in names}
            self._small[level] = self._make(own, self._threads)
        return self._small[level]

    def vector(self, job: Train, level: int, length: int) -> NDArray[np.float32]:
        """The level's flat vector out of the downloaded values, float32 [size of its trainer's layout].

        Raises:
            PeerError: the level's program is of another size than the level.
        """
        where, size = job.coordinates[:length], self.at(level).layout.size
        if self.at(level) is not self._full:
            if size != length:
                raise PeerError(f"level {level} has {length} coordinates, its program {size}")
            return job.values[:length][np.argsort(where)]
        vector = np.zeros(size, np.float32)
        vector[where] = job.values[:length]
        return vector

    def kept(self, job: Train) -> NDArray[np.bool_] | None:
        """The mask of a sub-model that is trained inside the full one."""
        if self.at(job.level) is not self._full or job.length == self._full.layout.size:
            return None
        kept = np.zeros(self._full.layout.size, np.bool_)
        kept[job.coordinates[: job.length]] = True
        return kept

    def values(self, job: Train, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """The trained values in position order, float32 [length]."""
        where = job.coordinates[: job.length]
        if self.at(job.level) is self._full:
            return vector[where]
        values = np.empty_like(vector)
        values[np.argsort(where)] = vector
        return values
