"""The training thread: one job at a time, at a lower priority than the link, so that pings and acknowledgements stay prompt."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from regrow import wire
from regrow.errors import RegrowError
from regrow.machine import Train, Trained, TrainingFailed

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
        self._trainer: tuple[tuple[bytes, ...], Trainer] | None = None
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
        trained = train_job(self._trainer_of(job.programs), self._source, job, time.monotonic)
        self.step_s = trained.seconds / max(job.steps, 1)
        return trained

    def _trainer_of(self, programs: Mapping[str, bytes]) -> Trainer:
        """The sessions of these programs, kept until others come."""
        key = tuple(wire.digest(programs[name]) for name in sorted(programs))
        if self._trainer is None or self._trainer[0] != key:
            self._trainer = (key, Trainer(programs, threads=self._threads))
        return self._trainer[1]


def train_job(trainer: Trainer, source: DataSource, job: Train, clock: Callable[[], float] = lambda: 0.0) -> Trained:
    """Score the levels that the job asks for on the validation data, then train its sub-model; `clock` times the training.

    Raises:
        LocalError: there is no training data, or it does not fit the programs.
        PeerError: the programs are malformed or fail.
    """
    size = trainer.layout.size
    x, y = source.validation()
    scores = []
    if len(y):
        for level, length in job.evaluate.items():
            prefix = np.zeros(size, np.float32)
            prefix[job.coordinates[:length]] = job.values[:length]
            score = trainer.evaluate(prefix, x, y)
            scores.append((level, score.loss, score.accuracy, score.examples))
    where = job.coordinates[: job.length]
    vector = np.zeros(size, np.float32)
    vector[where] = job.values[: job.length]
    kept = None
    if job.length < size:
        kept = np.zeros(size, np.bool_)
        kept[where] = True
    started = clock()
    batches = source.batches(np.random.default_rng(job.seed), job.batch, job.steps)
    result = trainer.train(vector, kept, batches, job.learning_rate)
    return Trained(job.number, result.vector[where], result.examples, result.loss, clock() - started, tuple(scores))
