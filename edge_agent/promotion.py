"""Settles one promotion on the device: goes back from what is withdrawn, scores what is new, and places it where it is not worse.

"Not worse" is by accuracy on the device's own validation data as they are now, tolerance 0, against what is in place, scored on the same
examples. Runs in the training thread, between jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from edge_agent.inference import Head, Inference
from edge_agent.model_folder import About, ModelFolder, Placed
from edge_agent.trainer import Trainer
from regrow import wire
from regrow.errors import LocalError, PeerError, RegrowError
from regrow.local_step import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What came of a promotion. held: digests of the models that are on the device; final: it would come out the same again."""

    task: str
    promotion: wire.Promotion
    report: wire.PromotionReport
    held: frozenset[bytes]
    final: bool


@dataclass(frozen=True, eq=False)
class Judged:
    """A model's scores: of itself and, where a head was trained here, with it; the head only where it gains."""

    own: wire.ModelScore | None
    tuned: wire.ModelScore | None = None
    head: Head | None = None

    @property
    def best(self) -> wire.ModelScore | None:
        return self.tuned if self.head and self.tuned is not None else self.own


def settle(
    folder: ModelFolder,
    promotion: wire.Promotion,
    model: bytes | None,
    source: DataSource,
    *,
    head: Mapping[str, bytes] | None = None,
    threads: int = 1,
) -> Settled:
    """Do what the promotion says, as far as this device's data agree.

    Args:
        folder: of the task.
        model: the file that the promotion names, checked; None where it is in place already, or the promotion names none.
        source: the device's own data.
        head: the programs of `promotion.head`, checked; None: no local head.
        threads: for onnxruntime.
    """
    try:
        folder.withdraw(promotion.withdrawn)
        report, final = _settle(folder, promotion, model, source, head, threads), True
    except PeerError as error:
        report, final = _failed(promotion, folder, str(error)), True
    except LocalError as error:
        report, final = _failed(promotion, folder, f"it does not fit this device's data: {error}"), True
    except OSError as error:
        report, final = _failed(promotion, folder, f"cannot write {folder.path}: {error.strerror or error}; free space on the disk"), False
    log.info("model of %s, promotion %d: %s %s", folder.task, promotion.number, report.outcome, report.reason)
    return Settled(folder.task, promotion, report, frozenset(folder.held()), final)


def _settle(
    folder: ModelFolder,
    promotion: wire.Promotion,
    model: bytes | None,
    source: DataSource,
    head: Mapping[str, bytes] | None,
    threads: int,
) -> wire.PromotionReport:
    current, number, blob = folder.current(), promotion.number, promotion.model
    step = Step.from_metadata(promotion.step or None)
    x, y = source.validation() if len(source) else (np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
    if blob is None:
        outcome = "removed" if current is None else "kept"
        return wire.PromotionReport(number=number, outcome=outcome, current=None if current is None else current.digest)
    if current is not None and current.digest == blob.digest:
        return wire.PromotionReport(number=number, outcome="placed", current=blob.digest, new=_score(current, x, y, step, threads))
    if model is None:
        model = _held(folder, blob.digest)
    old = None if current is None else _score(current, x, y, step, threads)
    found = _judge(model, x, y, step, source, promotion.head if head else None, head or {}, threads)
    worse = old is not None and found.best is not None and found.best.accuracy < old.accuracy
    if not worse:
        current = folder.place(model, _about(folder.task, promotion, blob, found.best), found.head)
    return wire.PromotionReport(
        number=number,
        outcome="kept" if worse else "placed",
        reason="worse on this device's validation data" if worse else "",
        current=None if current is None else current.digest,
        new=found.own,
        old=old,
        tuned=found.tuned,
    )


def _held(folder: ModelFolder, digest: bytes) -> bytes:
    """A model that is in place, to be placed once more."""
    placed = folder.held().get(digest)
    if placed is None:
        raise FileNotFoundError(f"{digest.hex()} is no longer there")
    return placed.model()


def _judge(
    model: bytes,
    x: NDArray[Any],
    y: NDArray[Any],
    step: Step,
    source: DataSource,
    plan: wire.Head | None,
    head: Mapping[str, bytes],
    threads: int,
) -> Judged:
    inference = Inference(model, threads)
    if not len(y):
        return Judged(None)
    own = inference.score(x, y, step)
    if plan is None or not source.training_size:
        return Judged(own)
    try:
        trained = _train_head(plan, head, source, threads)
        tuned = inference.score(x, y, step, trained)
    except RegrowError as error:  # the model itself is none the worse for it
        log.warning("no local head: %s", error)
        return Judged(own)
    return Judged(own, tuned, trained if tuned.accuracy > own.accuracy else None)


def _train_head(plan: wire.Head, programs: Mapping[str, bytes], source: DataSource, threads: int) -> dict[str, NDArray[np.float32]]:
    """The last layer after some steps on the device's training data, by initializer.

    Raises:
        PeerError: the programs are malformed or fail, or training diverged.
        LocalError: the data do not fit them.
    """
    trainer = Trainer({name: programs[name] for name in ("layout", "train") if name in programs}, threads)
    if len(programs.get("initial", b"")) != 4 * trainer.layout.size:
        raise PeerError(f"the head's first values have {len(programs.get('initial', b''))} bytes, its layout {trainer.layout.size} values")
    first = np.frombuffer(programs["initial"], "<f4").astype(np.float32)
    result = trainer.train(first, None, source.batches(np.random.default_rng(0), plan.batch, plan.steps), plan.learning_rate)
    if not np.isfinite(result.vector).all():
        raise PeerError("training the last layer diverged")
    return {name: np.array(values, np.float32) for name, values in trainer.layout.unflatten(result.vector).items()}


def _score(placed: Placed, x: NDArray[Any], y: NDArray[Any], step: Step, threads: int) -> wire.ModelScore | None:
    """Of a model in place, as applications run it; None where there is nothing to score by, or it runs no more."""
    if not len(y):
        return None
    try:
        return Inference(placed.model(), threads).score(x, y, step, placed.head())
    except RegrowError as error:
        log.warning("%s cannot be scored: %s", placed.path, error)
        return None


def _about(task: str, promotion: wire.Promotion, blob: wire.Blob, score: wire.ModelScore | None) -> About:
    about = About(task, promotion.number, blob.digest.hex(), promotion.run, promotion.version, promotion.step)
    return about if score is None else replace(about, examples=score.examples, accuracy=score.accuracy, loss=score.loss)


def _failed(promotion: wire.Promotion, folder: ModelFolder, reason: str) -> wire.PromotionReport:
    current = folder.current()
    return wire.PromotionReport(
        number=promotion.number, outcome="failed", reason=reason[:1000], current=None if current is None else current.digest
    )
