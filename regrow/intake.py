"""What a device does about promoted models: which pieces it fetches, when it tries a model, and what it says of it.

A pure state machine beside that of training: it asks for pieces only while that one does not need the link, two at a time, and one model
at a time. It follows the newest announcement of every task; what it has decided is durable, and is said again whenever the announcement is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

from regrow import topics, wire
from regrow.errors import PeerError
from regrow.machine import Connected, Disconnected, Drop, Effect, Event, Note, Publish, Received, Save, Subscribe
from regrow.message import Count, Digest, Positive
from regrow.piecewise import PATIENCE_S, Piecewise, check_blob
from regrow.publication import PIECE_BYTES

PIECE = "promoted-"
DECISION = "promotion-"
MAX_TASKS = 8
ATTEMPTS = 3  # a model that ends the agent each time it is tried must not do so for ever
LOST = "the agent ended each time that it tried this model; look at its log and at the memory that it may take"


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """What a device remembers of a promotion: how often it was tried, and what came of it; `report` None until it is decided."""

    number: Positive
    model: Digest | None
    attempts: Count
    report: wire.PromotionReport | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """Effect: settle this promotion with the models that are in place; every piece is saved. `Intake.tried` takes the answer."""

    task: str
    promotion: wire.Promotion


@dataclass(slots=True)
class _Fetch:
    """What is asked for, and of which task."""

    task: str
    pieces: Piecewise


class Intake:
    """One device's.

    Args:
        device: its name.
        decisions: task -> what was saved of earlier decisions, as bytes.
        pieces: names of the saved pieces.
        held: task -> digests of the models that lie on this device.
        local_head: fetch what trains a last layer, too.
    """

    def __init__(
        self,
        device: str,
        decisions: Mapping[str, bytes],
        pieces: Collection[str],
        held: Mapping[str, Collection[bytes]],
        *,
        local_head: bool = False,
    ) -> None:
        self._device, self._local_head = device, local_head
        self._held = dict(held)
        self._have = set(pieces)
        self._heard: dict[str, wire.Promotion] = {}
        self._tasks: set[str] = set()  # whose promotions are subscribed to on this connection, besides all of them
        self._decided: dict[str, Decision] = {}
        for task, data in decisions.items():
            try:
                self._decided[task] = msgspec.msgpack.decode(data, type=Decision)
            except (msgspec.DecodeError, ValueError):
                continue  # then it is decided again
        self._retry_s: dict[str, float] = {}
        self._fetch: _Fetch | None = None
        self._trying = False
        self._connected = False
        self._effects: list[Effect | Try] = []

    # ---- events --------------------------------------------------------------------------------------------------------------------

    def step(self, event: Event, now: float, *, quiet: bool) -> list[Effect | Try]:
        """Take an event in; the machine of training hears the same one. quiet: that machine does not need the link now."""
        if isinstance(event, Connected):
            self._connected = True
            # Some brokers (RabbitMQ 3) deliver what is retained to exact filters only.
            self._tasks = {*self._held, *self._decided}
            self._effects.append(Subscribe((topics.promotion("+"), *map(topics.promotion, sorted(self._tasks)))))
        elif isinstance(event, Disconnected):
            self._connected, self._fetch = False, None
        elif isinstance(event, Received) and event.payload:
            try:
                self._hear(event, now)
            except PeerError as error:
                self._effects.append(Note("refused", {"reason": str(error)}))
        return self.go_on(now, quiet=quiet)

    def go_on(self, now: float, *, quiet: bool) -> list[Effect | Try]:
        """What is to do at this moment, whatever has happened."""
        if not self._trying:
            self._pursue(now, quiet)
        effects, self._effects = self._effects, []
        return effects

    def tried(
        self, task: str, promotion: wire.Promotion, report: wire.PromotionReport, held: Collection[bytes], now: float, *, final: bool
    ) -> list[Effect | Try]:
        """What came of a Try. final: it would come out the same again; else it is tried again later (a full disk, say)."""
        self._trying, self._fetch = False, None
        self._held[task] = frozenset(held)
        if self._heard.get(task) == promotion:  # else another has come meanwhile, which is settled next
            if final:
                self._decide(task, promotion, report)
            else:
                self._decided.pop(task, None)
                self._put_off(task, now)
            self._say(task, report)
        return self.go_on(now, quiet=False)

    def lost(self, pieces: Collection[str], now: float) -> list[Effect | Try]:
        """The last Try found that these were not kept after all (a power cut): they are fetched again."""
        self._trying, self._fetch = False, None
        self._have -= set(pieces)
        return self.go_on(now, quiet=False)

    def cannot_save(self, piece: str, reason: str, now: float) -> list[Effect | Try]:
        """A piece could not be kept: it is said, and tried again in a while."""
        self._have.discard(piece)
        if self._fetch is not None:
            self._fail(self._fetch.task, reason, now)
        effects, self._effects = self._effects, []
        return effects

    def needs_bytes(self) -> int:
        """Of disk, for what is being fetched: what lacks, and the model once more where it is placed."""
        if self._fetch is None or (blob := self._heard[self._fetch.task].model) is None:
            return 0
        return PIECE_BYTES * len(self._fetch.pieces.lacking) + blob.size

    # ---- hearing -------------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Received, now: float) -> None:
        task = topics.parse_promotion(event.topic)
        if event.topic == topics.tasks(self._device):
            self._hear_tasks({offered.task for offered in wire.decode(event.payload, wire.Tasks)[0].tasks})
        elif task is not None:
            self._hear_promotion(task, wire.decode(event.payload, wire.Promotion)[0])
        elif self._fetch is not None and event.topic in self._fetch.pieces.asked:
            self._take(self._fetch, event, now)

    def _hear_tasks(self, tasks: set[str]) -> None:
        new = sorted(tasks - self._tasks)[:MAX_TASKS]
        if new:
            self._tasks.update(new)
            self._effects.append(Subscribe(tuple(map(topics.promotion, new))))

    def _hear_promotion(self, task: str, promotion: wire.Promotion) -> None:
        if task not in self._heard and len(self._heard) >= MAX_TASKS:
            raise PeerError(f"the model of task {task!r} is one too many: a device takes those of {MAX_TASKS} tasks")
        changed = self._heard.get(task) != promotion
        self._heard[task] = promotion
        if changed and self._fetch is not None and self._fetch.task == task:
            self._stop()
        decided = self._decision(task)
        if decided is not None and decided.report is not None:
            self._sweep()  # an earlier life may have ended before it did
            self._say(task, decided.report)
            return
        self._retry_s.pop(task, None)
        try:
            _check(promotion)
        except PeerError as error:
            report = wire.PromotionReport(number=promotion.number, outcome="failed", reason=str(error))
            self._decide(task, promotion, report)
            self._say(task, report)

    def _take(self, fetch: _Fetch, event: Received, now: float) -> None:
        try:
            digest, effects = fetch.pieces.take(event, now)
        except PeerError as error:
            self._fail(fetch.task, str(error), now)
            return
        name = PIECE + digest.hex()
        self._have.add(name)
        self._effects += [Save(name, event.payload), *effects]

    # ---- doing ---------------------------------------------------------------------------------------------------------------------

    def _pursue(self, now: float, quiet: bool) -> None:
        """Fetch on, or begin with the next promotion that is not decided."""
        if self._fetch is None:
            task = next((task for task in self._heard if self._open(task, now)), None)
            if task is None:
                return
            self._sweep()
            lacking = {digest: topic for digest, topic in self._wanted(task).items() if PIECE + digest.hex() not in self._have}
            self._fetch = _Fetch(task, Piecewise(lacking, now))
        fetch = self._fetch
        if not fetch.pieces.lacking:
            self._try(fetch.task)
        elif self._connected and quiet:
            self._effects += fetch.pieces.ask()
        if fetch.pieces.stalled(now):
            self._fail(fetch.task, "its pieces are not on the broker", now)

    def _try(self, task: str) -> None:
        promotion = self._heard[task]
        before = self._decision(task)
        attempts = 1 + (before.attempts if before is not None else 0)
        if attempts > ATTEMPTS:
            report = wire.PromotionReport(number=promotion.number, outcome="failed", reason=LOST)
            self._fetch = None
            self._decide(task, promotion, report)
            self._say(task, report)
            return
        self._keep(task, Decision(promotion.number, _digest(promotion), attempts))
        self._trying = True
        self._effects.append(Try(task, promotion))

    def _fail(self, task: str, reason: str, now: float) -> None:
        """Say so, and try again in a while: what is wrong may pass."""
        self._stop()
        self._put_off(task, now)
        self._say(task, wire.PromotionReport(number=self._heard[task].number, outcome="failed", reason=reason[:1000]))

    def _put_off(self, task: str, now: float) -> None:
        self._retry_s[task] = now + PATIENCE_S

    def _stop(self) -> None:
        if self._fetch is not None and self._connected:
            self._effects += self._fetch.pieces.stop()
        self._fetch = None if not self._trying else self._fetch

    def _say(self, task: str, report: wire.PromotionReport) -> None:
        if self._connected:
            self._effects.append(Publish(topics.promotion_report(self._device, task), wire.encode(report)))

    def _decide(self, task: str, promotion: wire.Promotion, report: wire.PromotionReport) -> None:
        before = self._decision(task)
        attempts = before.attempts if before is not None else 0
        self._keep(task, Decision(promotion.number, _digest(promotion), attempts, report))
        self._sweep()

    def _keep(self, task: str, decision: Decision) -> None:
        self._decided[task] = decision
        self._effects.append(Save(DECISION + task, msgspec.msgpack.encode(decision), id=0))

    def _sweep(self) -> None:
        """Let go of the pieces that no open promotion needs."""
        wanted = {PIECE + digest.hex() for task in self._heard if self._undecided(task) for digest in self._wanted(task)}
        self._effects += [Drop(name) for name in sorted(self._have - wanted)]
        self._have &= wanted

    # ---- looking -------------------------------------------------------------------------------------------------------------------

    def _decision(self, task: str) -> Decision | None:
        """Of the promotion that is announced now."""
        found, promotion = self._decided.get(task), self._heard.get(task)
        return found if found is not None and promotion is not None and _is_of(found, promotion) else None

    def _undecided(self, task: str) -> bool:
        decision = self._decision(task)
        return decision is None or decision.report is None

    def _open(self, task: str, now: float) -> bool:
        return self._undecided(task) and self._retry_s.get(task, now) <= now

    def _wanted(self, task: str) -> dict[bytes, str]:
        """Digest -> topic of each piece that a promotion needs here; a model that is in place already needs none."""
        promotion = self._heard[task]
        blobs = [] if promotion.model is None or promotion.model.digest in self._held.get(task, ()) else [promotion.model]
        if self._local_head and promotion.head is not None and promotion.model is not None:
            blobs += promotion.head.programs
        return {
            digest: topics.promoted_file(task, blob.digest, piece)
            for blob in blobs
            for piece, digest in enumerate(blob.pieces)
            if blob.size
        }


def _digest(promotion: wire.Promotion) -> bytes | None:
    return None if promotion.model is None else promotion.model.digest


def _is_of(decision: Decision, promotion: wire.Promotion) -> bool:
    return (decision.number, decision.model) == (promotion.number, _digest(promotion))


def _check(promotion: wire.Promotion) -> None:
    """Raises PeerError: a file is too large, or cannot be of these pieces."""
    blobs = [] if promotion.model is None else [promotion.model]
    for blob in [*blobs, *(promotion.head.programs if promotion.head is not None else ())]:
        check_blob(blob, wire.MAX_MODEL_BYTES)
