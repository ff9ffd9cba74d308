"""Promoted models on the device: the machine of regrow.intake, its files, and the work that the training thread does for it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence

from edge_agent.data.source import DataSource
from edge_agent.model_folder import ModelFolder
from edge_agent.promotion import Settled, settle
from edge_agent.state import StateFolder
from regrow import wire
from regrow.errors import LocalError
from regrow.intake import DECISION, PIECE, Intake, Try
from regrow.machine import Drop, Effect, Event, Save

log = logging.getLogger(__name__)
RESERVE_BYTES = 32 * 1024 * 1024  # what a model must leave free on the disk for the next update


class Models:
    """All promoted models of one agent.

    Args:
        device: its name.
        folder: its durable state; models lie below it.
        source: its own data.
        work: queues what the training thread shall do.
        done: called from that thread with what came of a promotion; `settled` takes it, in the agent's thread.
        threads: for onnxruntime.
        local_head: train the last layer here, and use it where it gains.
        reserve_bytes: what stays free on the disk.
    """

    def __init__(
        self,
        device: str,
        folder: StateFolder,
        source: DataSource,
        work: Callable[[Callable[[], None]], None],
        done: Callable[[Settled], None],
        *,
        threads: int = 1,
        local_head: bool = False,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._folder, self._source, self._work, self._done = folder, source, work, done
        self._threads, self._local_head, self._reserve_bytes = threads, local_head, reserve_bytes
        held = {}
        for task, models in ModelFolder.all(folder.path).items():
            models.sweep()
            held[task] = models.held().keys()
        decisions = {name.removeprefix(DECISION): folder.get(name) for name in folder.list(DECISION)}
        known = {task: data for task, data in decisions.items() if data is not None}
        self._intake = Intake(device, known, folder.list(PIECE), held, local_head=local_head)

    def step(self, event: Event, now: float, *, quiet: bool) -> list[Effect]:
        """What the link must do about an event. quiet: training does not need the link now."""
        return self._perform(self._intake.step(event, now, quiet=quiet), now)

    def go_on(self, now: float, *, quiet: bool) -> list[Effect]:
        """The same without an event, about once a second."""
        return self._perform(self._intake.go_on(now, quiet=quiet), now)

    def settled(self, settled: Settled, now: float) -> list[Effect]:
        """The same for what came of a promotion."""
        held, final = settled.held, settled.final
        return self._perform(self._intake.tried(settled.task, settled.promotion, settled.report, held, now, final=final), now)

    def _perform(self, effects: Iterable[Effect | Try], now: float) -> list[Effect]:
        """Do what concerns this disk and this processor; what concerns the link is left."""
        left: list[Effect] = []
        pending = list(effects)
        while pending:
            effect = pending.pop(0)
            if isinstance(effect, Save):
                pending += self._save(effect, now)
            elif isinstance(effect, Drop):
                self._folder.delete(effect.name, durable=False)
            elif isinstance(effect, Try):
                pending += self._begin(effect, now)
            else:
                left.append(effect)
        return left

    def _save(self, effect: Save, now: float) -> Sequence[Effect | Try]:
        """Keep a piece or a decision. A full disk must not end the agent for them: pieces can wait, a decision can be made again."""
        durable = effect.id is not None
        try:
            if not durable and shutil.disk_usage(self._folder.path).free < self._intake.needs_bytes() + self._reserve_bytes:
                raise LocalError(f"the disk has no room for {self._intake.needs_bytes()} bytes more; free some space")
            self._folder.put(effect.name, bytes(effect.data), durable=durable)
        except (LocalError, OSError) as error:
            log.warning("cannot keep %s: %s", effect.name, error)
            if not durable:
                return self._intake.cannot_save(effect.name, str(error), now)
        return ()

    def _begin(self, effect: Try, now: float) -> Sequence[Effect | Try]:
        """Put the pieces together and leave the rest to the training thread; or fetch again what was not kept after all."""
        models, promotion = ModelFolder(self._folder.path, effect.task), effect.promotion
        held = models.held()
        blobs = [promotion.model] if promotion.model is not None and promotion.model.digest not in held else []
        if self._local_head and promotion.head is not None and promotion.model is not None:
            blobs += promotion.head.programs
        whole: dict[bytes, bytes] = {}
        for blob in blobs:
            pieces = {digest: self._folder.get(PIECE + digest.hex()) for digest in blob.pieces}
            lost = [PIECE + digest.hex() for digest, data in pieces.items() if data is None or wire.digest(data) != digest]
            if lost:
                return self._intake.lost(lost, now)
            whole[blob.digest] = b"".join(pieces[digest] or b"" for digest in blob.pieces)
        wrong = next(
            (blob for blob in blobs if wire.digest(whole[blob.digest]) != blob.digest or len(whole[blob.digest]) != blob.size), None
        )
        if wrong is not None:
            reason = f"{wrong.name}: the pieces do not make the whole that the announcement names"
            report = wire.PromotionReport(number=promotion.number, outcome="failed", reason=reason)
            return self._intake.tried(effect.task, promotion, report, held.keys(), now, final=True)
        self._hand_over(models, promotion, whole)
        return ()

    def _hand_over(self, models: ModelFolder, promotion: wire.Promotion, whole: dict[bytes, bytes]) -> None:
        model = None if promotion.model is None else whole.get(promotion.model.digest)
        head = None
        if self._local_head and promotion.head is not None and promotion.model is not None:
            head = {blob.name: whole[blob.digest] for blob in promotion.head.programs}

        def work() -> None:
            self._done(settle(models, promotion, model, self._source, head=head, threads=self._threads))

        self._work(work)
