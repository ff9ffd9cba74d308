"""Publishes a task's promoted model to devices and notes what they say of it: a machine beside the coordinator's, on the same link.

Order of publication: the pieces, some at a time and each acknowledged, so that assignments do not wait behind a large model; then the
announcement that names them; then what an older one left is cleared. After every reconnect all of it again: nothing relies on the
broker's memory. A device answers every announcement, so no receipts are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from broker_server.promotions import Promotions, SignOff, in_words
from broker_server.queueing import Queueing
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Effect, Event, Note, Received, Subscribe
from regrow.publication import PIECE_BYTES

log = logging.getLogger(__name__)
LOOK_S = 1.0
_FIRST_TOKEN = 1 << 40  # the coordinator gives its publishes none


class Herald:
    """One task's. `step` takes every event of the link; whoever owns the link carries the effects out.

    Args:
        promotions: of the task; the newest decision is what is published.
    """

    def __init__(self, promotions: Promotions) -> None:
        self._promotions = promotions
        self._number = -1  # of the decision that is published or being published on this connection
        self._current: dict[str, bytes] = {}
        self._queue = Queueing(_FIRST_TOKEN)
        self._look_s = float("-inf")
        self._known = promotions.reports()
        self._changed: dict[str, wire.PromotionReport] = {}

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:
        """Take an event in, or None for the time alone. leads: this process may speak for the task."""
        effects: list[Effect] = []
        self._queue.heed(event)
        if isinstance(event, Connected):
            self._number, self._look_s = -1, now
            effects.append(Subscribe((topics.promotion_report("+", self._promotions.task),)))
        elif isinstance(event, Received):
            self._hear(event)
        if now >= self._look_s:
            self._look_s = now + LOOK_S
            effects += self._notes()
            if self._queue.connected and leads and self._promotions.newest_number() != max(self._number, 0):
                self._begin()
        return [*effects, *self._queue.send()]

    # ---- publishing ----------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Queue the newest decision; one whose files do not check out is not published, and what is there stays."""
        self._queue.clear()
        self._number = self._promotions.newest_number()
        try:
            history = self._promotions.history()
            announcement = self._promotions.announcement(history[-1])
            files = self._promotions.files(history[-1])
        except LocalError as error:
            log.warning("model %d is not published: %s", self._number, error)
            return
        task = self._promotions.task
        pieces = {
            topics.promoted_file(task, digest, number): bytes(piece)
            for digest, data in files.items()
            for number, piece in enumerate(wire.pieces(data, PIECE_BYTES))
        }
        old = {**self._current, **self._left_by(history)}
        self._current = dict.fromkeys(pieces, b"")
        self._queue.put(pieces.items())
        self._queue.put([(topics.promotion(task), wire.encode(announcement))], after_all=True)
        self._queue.put((topic, b"") for topic in old if topic not in pieces)

    def _left_by(self, history: list[SignOff]) -> dict[str, bytes]:
        """What the decision before may have left on a broker that outlived its publisher."""
        before = next((old for old in reversed(history[:-1]) if old.digest is not None), None)
        if before is None:
            return {}
        try:
            files = self._promotions.files(before)
        except LocalError:
            return {}
        return {
            topics.promoted_file(self._promotions.task, digest, number): b""
            for digest, data in files.items()
            for number in range(len(wire.pieces(data, PIECE_BYTES)))
        }

    # ---- hearing -------------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Received) -> None:
        found = topics.parse_promotion_report(event.topic)
        if found is None or found[1] != self._promotions.task or not event.payload:
            return
        try:
            report = wire.decode(event.payload, wire.PromotionReport)[0]
        except PeerError as error:
            log.warning("%s: %s", found[0], error)
            return
        if report.number <= self._number:
            self._changed[found[0]] = report

    def _notes(self) -> list[Effect]:
        """What is new since the last look: however much a device says, it costs one small file a second."""
        notes: list[Effect] = []
        for device, report in self._changed.items():
            if self._known.get(device) == report:
                continue
            self._known[device] = report
            try:
                self._promotions.note_report(device, report)
            except OSError as error:
                log.warning("cannot keep what %s says of the model: %s", device, error)
            notes.append(Note("promotion", _fields(device, report)))
        self._changed.clear()
        return notes


@contextmanager
def herald_of(promotions: Promotions) -> Iterator[Herald | None]:
    """The one herald of a task for as long as the block takes, or None when another process is it."""
    lock = promotions.lock()
    try:
        yield None if lock is None else Herald(promotions)
    finally:
        if lock is not None:
            lock.close()


def _fields(device: str, report: wire.PromotionReport) -> dict[str, object]:
    fields: dict[str, object] = {"device": device, "promotion": report.number, "outcome": report.outcome, "said": in_words(report)}
    for name, score in (("", report.new), ("old_", report.old), ("tuned_", report.tuned)):
        if score is not None:
            fields |= {f"{name}accuracy": score.accuracy, f"{name}loss": score.loss, "examples": score.examples}
    return fields
