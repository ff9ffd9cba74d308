"""Whole jobs of a simulation on torch, as many clients together as pays. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from edge_agent.worker import LevelTrainers, train_job
from export.torch_trainer import Share, TorchTrainer
from regrow.local_training import Score
from regrow.machine import Train, Trained

WAVE_CLIENTS = 64  # trained in one call; more only take more memory
# On the CPU a wave pays for small models only: bench/results/trainers.json has one of 52 266 parameters, trainers-leaf.json one of 6.6 M,
# which is faster one client after the other. The bound between them is a guess.
CPU_WAVE_PARAMETERS = 2**20


class TorchEngine:
    """Trains whole jobs on torch, those of one model and as many steps together where `together` says so.

    Args:
        programs: as the gateway publishes them, levels included.
        device: "cpu" or "cuda".

    Raises:
        PeerError, LocalError: as TorchTrainer.
    """

    def __init__(self, programs: Mapping[str, bytes], *, device: str = "cpu", together: bool = True) -> None:
        make = partial(TorchTrainer, device=device)
        self.together = together
        self._most_parameters = CPU_WAVE_PARAMETERS if device == "cpu" else math.inf
        self.whole = make(programs)
        self._trainers = LevelTrainers(programs, make=make)

    def train(self, jobs: Sequence[tuple[DataSource, Train]]) -> list[Trained]:
        """The jobs' results in their order; see edge_agent.worker.train_job.

        Raises:
            PeerError, LocalError: as train_job.
        """
        groups: dict[tuple[TorchTrainer, int], list[int]] = {}
        for index, (_, job) in enumerate(jobs):
            groups.setdefault((self._at(job.level), job.steps), []).append(index)
        results: dict[int, Trained] = {}
        for (trainer, _), members in groups.items():
            for start in range(0, len(members), WAVE_CLIENTS):
                part = members[start : start + WAVE_CLIENTS]
                mine = [jobs[index] for index in part]
                results.update(zip(part, self._train_group(trainer, mine), strict=True))
        return [results[index] for index in range(len(jobs))]

    def _train_group(self, trainer: TorchTrainer, jobs: Sequence[tuple[DataSource, Train]]) -> list[Trained]:
        alone = trainer.has_statistics or any(job.widths or job.kept is not None for _, job in jobs)
        if alone or not self.together or len(jobs) == 1 or trainer.layout.size > self._most_parameters:
            return [train_job(self._trainers, source, job) for source, job in jobs]
        scores = self._scores(jobs)
        places = [self._trainers.place(job, job.level, job.length) for _, job in jobs]
        shares = [
            Share(
                place.vector(job.values),
                place.mask(None),
                source.batches(np.random.default_rng(job.seed), job.batch, job.steps),
                job.learning_rate,
            )
            for place, (source, job) in zip(places, jobs, strict=True)
        ]
        results = zip(jobs, places, trainer.train_together(shares), scores, strict=True)
        return [
            Trained(job.number, result.vector[place.slots], result.examples, result.loss, 0.0, tuple(found))
            for (_, job), place, result, found in results
        ]

    def _scores(self, jobs: Sequence[tuple[DataSource, Train]]) -> list[list[tuple[int, float, float, int]]]:
        """(level, loss, accuracy, examples) of every level that a job asks for, one list for each job."""
        validation = [source.validation() for source, _ in jobs]
        asked: dict[TorchTrainer, list[tuple[int, int, int]]] = {}
        for index, (_, job) in enumerate(jobs):
            for level, length in job.evaluate.items() if len(validation[index][1]) else ():
                asked.setdefault(self._at(level), []).append((index, level, length))
        found: dict[tuple[int, int], Score] = {}
        for trainer, wanted in asked.items():
            vectors = [self._placed(jobs[index][1], level, length) for index, level, length in wanted]
            scores = trainer.evaluate_together(vectors, [validation[index] for index, _, _ in wanted])
            found.update(((index, level), score) for (index, level, _), score in zip(wanted, scores, strict=True))
        told: list[list[tuple[int, float, float, int]]] = []
        for index, (_, job) in enumerate(jobs):
            mine = [(level, found[index, level]) for level in job.evaluate if (index, level) in found]
            told.append([(level, score.loss, score.accuracy, score.examples) for level, score in mine])
        return told

    def _placed(self, job: Train, level: int, length: int) -> NDArray[np.float32]:
        return self._trainers.place(job, level, length).vector(job.values)

    def _at(self, level: int) -> TorchTrainer:
        trainer = self._trainers.at(level)
        if not isinstance(trainer, TorchTrainer):
            raise TypeError(f"level {level} has a {type(trainer).__name__}")
        return trainer
