"""The device: a pure state machine that fetches, trains, sends and waits, and goes on where it was after any cut or reboot.

TRANSITIONS is the whole behaviour at a glance: what is not in it is ignored. Connection and work are independent: a device without a link
goes on with what it has, and everything that the other side must know is said again after the next connect.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from regrow import outgoing, topics, wire
from regrow.errors import LocalError, PeerError
from regrow.fetching import FILTERS_AT_ONCE, Fetched, Shopping, assemble, shopping
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Drop,
    Effect,
    Event,
    Measured,
    Note,
    Persisted,
    Publish,
    Received,
    Save,
    SetTimer,
    Subscribe,
    Train,
    Trained,
    TrainingFailed,
    Unsubscribe,
    Woken,
)

UNACKNOWLEDGED = 2
PROBE_S = 1.0
PROBE_MAX_BYTES = 256 * 1024
HELLO_FIRST_S = 1.0
HELLO_AGAIN_S = 10.0
RECEIPT_WAIT_S = 5.0
RECEIPT_WAIT_MAX_S = 60.0
FETCH_PATIENCE_S = 60.0
PART = "part-"
OUTGOING = "outgoing"


class Phase(Enum):
    IDLE = "idle"
    PROBING = "probing"
    WAITING = "waiting"
    FETCHING = "fetching"
    TRAINING = "training"
    SAVING = "saving"
    SENDING = "sending"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device says of itself. install: new with every installation; boot: new with every start (16 bytes each)."""

    name: str
    install: bytes
    boot: bytes
    examples: int = 0
    validation_examples: int = 0
    software: str = ""


@dataclass(slots=True)
class Meters:
    """What the runtime last measured, for telemetry; the machine itself decides nothing by these."""

    bytes_up: int = 0
    bytes_down: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    step_s: float | None = None


class Device:
    """One device.

    Args:
        identity: who it is.
        saved: name -> bytes, what the folder held at the start; parts are checked against the digest in their name.
        uplink_bps: from an earlier life, or None: a probe will tell.
    """

    def __init__(self, identity: Identity, saved: Mapping[str, bytes], uplink_bps: float | None = None) -> None:
        self.identity = identity
        self.meters = Meters()
        self.uplink_bps = uplink_bps
        self.phase = Phase.IDLE
        self.connected = False
        self.now = 0.0
        self.names: topics.Run | None = None
        self.term = 0
        self.assignment: wire.Assignment | None = None
        self.outgoing: outgoing.Outgoing | None = None
        self.sequence = -1
        self._next: wire.Assignment | None = None
        self._done = 0
        self._heartbeat_s = HELLO_AGAIN_S
        self._parts: dict[bytes, bytes] = {}
        self._shopping: Shopping | None = None
        self._fetched: Fetched | None = None
        self._subscribed: set[str] = set()
        self._progress_s = 0.0
        self._queue: deque[int] = deque()
        self._in_flight: dict[int, int] = {}
        self._token = 0
        self._probe_sent = 0
        self._probe_start_s: float | None = None
        self._receipt_wait_s = RECEIPT_WAIT_S
        self._hello_wait_s = HELLO_FIRST_S
        self._beat_s = self._hello_s = self._ask_s = float("inf")
        self._save_id = 0
        self._job = 0
        self._effects: list[Effect] = []
        self._load(saved)

    def _load(self, saved: Mapping[str, bytes]) -> None:
        for name, data in saved.items():
            digest = wire.digest(data)
            if name == PART + digest.hex():
                self._parts[digest] = data
            elif name.startswith(PART):
                self._effects.append(Drop(name))
        if OUTGOING in saved:
            try:
                self.outgoing = outgoing.from_bytes(saved[OUTGOING], None)
                self.sequence = self.outgoing.sequence
            except LocalError as error:
                self._effects.append(Note("set aside", {"reason": str(error)}))

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event in at monotonic time `now`; returns what the runtime must do, in order."""
        self.now = max(now, self.now)
        try:
            kind, said = self._parse(event)
            handler = TRANSITIONS.get((self.phase, kind))
            if handler is not None:
                handler(self, said)
        except PeerError as error:
            self._effects.append(Note("refused", {"reason": str(error)}))
        effects, self._effects = self._effects, []
        return [*effects, SetTimer(min(self._beat_s, self._hello_s, self._ask_s))]

    def _parse(self, event: Event) -> tuple[Any, Any]:
        if not isinstance(event, Received):
            return type(event), event
        if event.topic == topics.tasks(self.identity.name):
            return "tasks", wire.decode(event.payload, wire.Tasks)[0]
        names = self.names
        if names is None or not event.payload:
            return None, None
        if event.topic == topics.claim(names.task):
            return "claim", wire.decode(event.payload, wire.Claim)[0]
        if event.topic == names.assignment(self.identity.name):
            return "assignment", wire.decode(event.payload, wire.Assignment)[0]
        if event.topic == names.receipt(self.identity.name):
            return "receipt", wire.decode(event.payload, wire.Receipt)[0]
        if self.assignment is not None and event.topic == names.manifest(self.assignment.version):
            return "manifest", wire.decode(event.payload, wire.Manifest)[0]
        return ("part", event) if event.topic in self._subscribed else (None, None)

    # ---- connection ----------------------------------------------------------------------------------------------------------------

    def _connect(self, _: Connected) -> None:
        self.connected = True
        self._hello_wait_s = HELLO_FIRST_S
        self._in_flight.clear()
        self._subscribed.clear()
        self._emit(Subscribe((topics.tasks(self.identity.name),)))
        if self.names is not None:
            self._emit(Subscribe(self._own_topics(self.names)))
        self._hello()
        self._beat_s = self.now + self._heartbeat_s
        if self.phase is Phase.PROBING:
            self._begin_probe()
        elif self.phase is Phase.FETCHING:
            self._progress_s = self.now  # without a link nothing could come
            self._fetch_on()
        elif self.phase is Phase.SENDING:
            self._queue.clear()
            self._ask_receipt()

    def _disconnect(self, _: Disconnected) -> None:
        self.connected = False
        self._in_flight.clear()
        self._subscribed.clear()
        self._beat_s = self._hello_s = self._ask_s = float("inf")

    def _own_topics(self, names: topics.Run) -> tuple[str, ...]:
        who = self.identity.name
        return topics.claim(names.task), names.assignment(who), names.receipt(who)

    def _hello(self) -> None:
        me = self.identity
        message = wire.Hello(
            boot=me.boot,
            install=me.install,
            uplink_bps=self.uplink_bps,
            examples=me.examples,
            validation_examples=me.validation_examples,
            step_s=self.meters.step_s,
            software=me.software,
        )
        self._emit(Publish(topics.hello(me.name), wire.encode(message)))
        idle = self.phase in (Phase.IDLE, Phase.WAITING)
        self._hello_s = self.now + self._hello_wait_s if idle else float("inf")
        self._hello_wait_s = min(2 * self._hello_wait_s, HELLO_AGAIN_S)

    def _telemetry(self, *, failed: str = "", phase: str = "", pending: wire.Pending | None = None) -> None:
        if self.names is None or not self.connected:
            return
        current = self.assignment
        message = wire.Telemetry(
            install=self.identity.install,
            phase=phase or self.phase.value,
            assignment=current.number if current is not None else 0,
            uplink_bps=self.uplink_bps,
            bytes_up=self.meters.bytes_up,
            bytes_down=self.meters.bytes_down,
            disk_bytes=self.meters.disk_bytes,
            memory_bytes=self.meters.memory_bytes,
            step_s=self.meters.step_s,
            failed=failed[:900],
            pending=pending,
        )
        self._emit(Publish(self.names.telemetry(self.identity.name), wire.encode(message)))
        self._beat_s = self.now + self._heartbeat_s

    def _wake(self, _: Woken) -> None:
        if not self.connected:
            return
        if self._hello_s <= self.now:
            self._hello()
        if self._ask_s <= self.now and self.phase is Phase.SENDING:
            self._ask_receipt()
        if self._beat_s <= self.now:
            self._telemetry()
            self._beat_s = self.now + self._heartbeat_s
        if self.phase is Phase.FETCHING and self.now - self._progress_s > FETCH_PATIENCE_S:
            self._give_up("the parts of this version are no longer on the broker")

    def _measure(self, measured: Measured) -> None:
        first = self.uplink_bps is None
        self.uplink_bps = measured.uplink_bps
        if first and self.phase is not Phase.PROBING and self.connected:
            self._hello()

    # ---- what there is to do -------------------------------------------------------------------------------------------------------

    def _hear_tasks(self, message: wire.Tasks) -> None:
        self._heartbeat_s = message.heartbeat_s
        self._beat_s = min(self._beat_s, self.now + self._heartbeat_s)
        if not message.tasks:
            self._leave_task()
            return
        first = message.tasks[0]  # a device trains one task at a time: the best one
        names = topics.Run(first.task, first.run)
        if names == self.names:
            self._hear_term(first.term)
            return
        self._leave_task()
        self.names, self.term = names, first.term
        self._emit(Subscribe(self._own_topics(names)))
        if self.outgoing is not None and self.outgoing.run == names.root:
            self.phase = Phase.WAITING
            self._done = self.outgoing.head.assignment
            if not self.outgoing.closed:
                self.phase = Phase.SENDING
                self._ask_receipt()
        else:
            self.outgoing = None
            if self.uplink_bps is None:
                self.phase = Phase.PROBING
                self._begin_probe()
            else:
                self.phase = Phase.WAITING
        self._hello_s = min(self._hello_s, self.now + HELLO_AGAIN_S)

    def _leave_task(self) -> None:
        if self.names is not None and self.connected:
            self._emit(Unsubscribe((*self._own_topics(self.names), *sorted(self._subscribed))))
        self.names, self.term, self._done = None, 0, 0
        self.assignment = self._next = self._shopping = self._fetched = None
        self._subscribed.clear()
        self._queue.clear()
        self._in_flight.clear()
        self.phase = Phase.IDLE
        self._ask_s = float("inf")
        self._hello_s = min(self._hello_s, self.now + HELLO_AGAIN_S)

    def _hear_claim(self, claim: wire.Claim) -> None:
        if self.names is not None and claim.run == self.names.run:
            self._hear_term(claim.term)
        elif claim.term > self.term:  # another run leads this task now and may not know us; ours will not answer any more
            self._hello()

    def _hear_term(self, term: int) -> None:
        """A higher term is a coordinator that may not know us; lower ones are the past."""
        if term > self.term:
            self.term = term
            self._hello()
            if self.phase is Phase.SENDING:
                self._ask_receipt()

    def _hear_assignment(self, assignment: wire.Assignment) -> None:
        """Begin it now, or after what is being worked on: an update stays valid for what it started with."""
        if assignment.term < self.term or assignment.number <= self._done:
            return
        if self.assignment is not None and assignment.number <= self.assignment.number:
            return
        if self.phase in (Phase.WAITING, Phase.FETCHING):
            self._begin_fetch(assignment)
        else:
            self._next = assignment

    # ---- probing -------------------------------------------------------------------------------------------------------------------

    def _begin_probe(self) -> None:
        self._probe_sent, self._probe_start_s = 0, self.now
        for _ in range(UNACKNOWLEDGED):
            self._send_probe()

    def _send_probe(self) -> None:
        if self.names is None:
            return
        noise = hashlib.shake_128(self.identity.boot + bytes([self._probe_sent % 251])).digest(wire.MIN_CHUNK_BYTES)
        self._token += 1
        self._in_flight[self._token] = -1
        self._probe_sent += len(noise)
        self._emit(Publish(self.names.probe(self.identity.name), noise, token=self._token))

    def _probe_acknowledged(self, ack: Acknowledged) -> None:
        if self._in_flight.pop(ack.token, None) is None:
            return
        started = self._probe_start_s if self._probe_start_s is not None else self.now
        if self.now - started < PROBE_S and self._probe_sent < PROBE_MAX_BYTES:
            self._send_probe()
        elif not self._in_flight:
            self.phase = Phase.WAITING
            self._hello()
            if self._next is not None:
                self._begin_fetch(self._next)

    # ---- fetching ------------------------------------------------------------------------------------------------------------------

    def _begin_fetch(self, assignment: wire.Assignment) -> None:
        if self._subscribed and self.connected:
            self._emit(Unsubscribe(tuple(sorted(self._subscribed))))
        self._subscribed.clear()
        self.assignment, self._next, self._shopping = assignment, None, None
        self.phase = Phase.FETCHING
        self._hello_s = float("inf")
        self._progress_s = self.now
        self._fetch_on()

    def _fetch_on(self) -> None:
        """Subscribe to what is still lacking, some filters at a time; start training when nothing is."""
        if self.names is None or self.assignment is None or self._subscribed:
            return
        if self._shopping is None:
            wanted = [self.names.manifest(self.assignment.version)]
        else:
            wanted = [topic for digest, topic in self._shopping.parts.items() if digest not in self._parts]
            if not wanted:
                self._begin_training(self._shopping)
                return
        self._subscribed = set(wanted[:FILTERS_AT_ONCE])
        if self.connected:
            self._emit(Subscribe(tuple(wanted[:FILTERS_AT_ONCE])))

    def _hear_manifest(self, manifest: wire.Manifest) -> None:
        if self.names is None or self.assignment is None or manifest.term < self.term or self._shopping is not None:
            return
        self._shopping = shopping(self.assignment, manifest, self.names)
        lacking = sum(digest not in self._parts for digest in self._shopping.parts)
        fields = {"number": self.assignment.number, "version": manifest.version, "parts": len(self._shopping.parts), "lacking": lacking}
        self._emit(Note("fetching", fields))
        self._got(self.names.manifest(manifest.version))
        for digest in [digest for digest in self._parts if digest not in self._shopping.parts]:
            del self._parts[digest]
            self._emit(Drop(PART + digest.hex()))
        self._fetch_on()

    def _hear_part(self, event: Received) -> None:
        if self._shopping is None:
            return
        digest = wire.digest(event.payload)
        if self._shopping.parts.get(digest) != event.topic:
            raise PeerError(f"{event.topic}: {len(event.payload)} bytes that the manifest does not name")
        self._parts[digest] = event.payload
        self._emit(Save(PART + digest.hex(), event.payload))
        self._got(event.topic)
        self._fetch_on()

    def _got(self, topic: str) -> None:
        self._progress_s = self.now
        self._subscribed.discard(topic)
        self._emit(Unsubscribe((topic,)))

    def _give_up(self, reason: str, phase: str = "") -> None:
        """Say why this assignment cannot be done, and be ready for another."""
        self._telemetry(failed=reason, phase=phase)
        self._emit(Note("gave up", {"reason": reason}))
        if self._subscribed and self.connected:
            self._emit(Unsubscribe(tuple(sorted(self._subscribed))))
        self._subscribed.clear()
        self._finish_assignment()

    def _finish_assignment(self) -> None:
        if self.assignment is not None:
            self._done = self.assignment.number
        self.assignment = self._shopping = self._fetched = None
        self.phase = Phase.WAITING
        self._ask_s = float("inf")
        self._hello_s = self.now + HELLO_AGAIN_S if self.connected else float("inf")
        following, self._next = self._next, None
        if following is not None and following.number > self._done:
            self._begin_fetch(following)

    # ---- training ------------------------------------------------------------------------------------------------------------------

    def _begin_training(self, wanted: Shopping) -> None:
        try:
            self._fetched = fetched = assemble(wanted, self._parts)
        except PeerError as error:
            self._give_up(str(error))
            return
        self.phase = Phase.TRAINING
        self._job += 1
        self._emit(Note("training", {"number": wanted.assignment.number}))
        self._telemetry()
        assignment, lengths = wanted.assignment, wanted.manifest.lengths
        levels = {assignment.level} | ({assignment.evaluate_level} if assignment.evaluate_level is not None else set())
        self._emit(
            Train(
                number=self._job,
                programs=fetched.programs,
                values=fetched.base,
                coordinates=fetched.coordinates,
                length=lengths[assignment.level],
                evaluate={level: lengths[level] for level in sorted(levels)},
                steps=assignment.steps,
                batch=assignment.batch,
                learning_rate=assignment.learning_rate,
                seed=assignment.seed,
            )
        )

    def _take_trained(self, trained: Trained) -> None:
        fetched, wanted = self._fetched, self._shopping
        if fetched is None or wanted is None or self.names is None or trained.number != self._job:
            return
        length = wanted.manifest.lengths[wanted.assignment.level]
        try:
            self.outgoing = outgoing.make(
                wanted.assignment,
                run=self.names.root,
                sequence=self.sequence + 1,
                trained=trained.values,
                base=fetched.base[:length],
                coordinates=fetched.coordinates[:length],
                size=fetched.layout.size,
                always_kept=wanted.manifest.always_kept,
                owed=self.outgoing.owed if self.outgoing is not None else None,
                examples=trained.examples,
                loss=trained.loss,
                seconds=trained.seconds,
                scores=[wire.Score(*score) for score in trained.scores],
            )
        except PeerError as error:
            self._give_up(str(error), phase="diverged")
            return
        self.sequence += 1
        self.phase = Phase.SAVING
        self._save_id += 1
        self._emit(Save(OUTGOING, self.outgoing.to_bytes(), id=self._save_id))

    def _training_failed(self, failed: TrainingFailed) -> None:
        if failed.number == self._job:
            self._give_up(failed.reason)

    # ---- sending -------------------------------------------------------------------------------------------------------------------

    def _saved(self, persisted: Persisted) -> None:
        if persisted.id != self._save_id or self.outgoing is None:
            return
        self.phase = Phase.SENDING
        self._emit(Note("sending", {"sequence": self.outgoing.sequence, "chunks": self.outgoing.count}))
        self._receipt_wait_s = RECEIPT_WAIT_S
        self._queue = deque(range(self.outgoing.count))
        self._send_on()

    def _send_on(self) -> None:
        """Keep two chunks unacknowledged, so that pings pass and a change of rate shows; then wait for the receipt."""
        if not self.connected or self.names is None or self.outgoing is None:
            return
        while self._queue and len(self._in_flight) < UNACKNOWLEDGED:
            index = self._queue.popleft()
            self._token += 1
            self._in_flight[self._token] = index
            topic = self.names.update(self.identity.name, self.outgoing.sequence, index)
            self._emit(Publish(topic, self.outgoing.chunk(index, self.identity.install), token=self._token))
        self._ask_s = float("inf") if self._in_flight else self.now + self._receipt_wait_s

    def _chunk_acknowledged(self, ack: Acknowledged) -> None:
        if self._in_flight.pop(ack.token, None) is not None:
            self._send_on()

    def _ask_receipt(self) -> None:
        if self.outgoing is None or not self.connected:
            return
        self._telemetry(pending=wire.Pending(self.outgoing.sequence, self.outgoing.count))
        self._ask_s = self.now + self._receipt_wait_s
        self._receipt_wait_s = min(2 * self._receipt_wait_s, RECEIPT_WAIT_MAX_S)

    def _hear_receipt(self, receipt: wire.Receipt) -> None:
        current = self.outgoing
        mine = current is not None and (receipt.install, receipt.sequence) == (self.identity.install, current.sequence)
        if current is None or not mine or receipt.term < self.term:
            return
        if receipt.outcome == "missing":
            self._resend(receipt, current.count)
            return
        if receipt.outcome == "rejected":
            self._emit(Note("rejected", {"reason": receipt.reason}))
            if not receipt.blame:  # what was blamed on the values would only be refused again
                self.outgoing = current.rejected()
                self._emit(Save(OUTGOING, self.outgoing.to_bytes(), id=0))
        else:
            self._emit(Note("accepted", {"sequence": receipt.sequence, "install": receipt.install.hex()}))
        self._queue.clear()
        self._in_flight.clear()
        if self.assignment is None:  # sent after a reboot
            self._done = max(self._done, current.head.assignment)
        self._finish_assignment()

    def _resend(self, receipt: wire.Receipt, count: int) -> None:
        under_way = set(self._in_flight.values())
        lacking = {i for part in receipt.missing for i in range(min(part.start, count), min(part.stop, count))}
        self._queue = deque(sorted(lacking - under_way))
        self._receipt_wait_s = RECEIPT_WAIT_S
        self._send_on()

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)


_ANY: Mapping[Any, Callable[[Device, Any], None]] = {
    Connected: Device._connect,
    Disconnected: Device._disconnect,
    Measured: Device._measure,
    Woken: Device._wake,
    "tasks": Device._hear_tasks,
    "claim": Device._hear_claim,
    "assignment": Device._hear_assignment,
}

TRANSITIONS: Mapping[tuple[Phase, Any], Callable[[Device, Any], None]] = {
    **{(phase, kind): handler for phase in Phase for kind, handler in _ANY.items()},
    (Phase.PROBING, Acknowledged): Device._probe_acknowledged,
    (Phase.FETCHING, "manifest"): Device._hear_manifest,
    (Phase.FETCHING, "part"): Device._hear_part,
    (Phase.TRAINING, Trained): Device._take_trained,
    (Phase.TRAINING, TrainingFailed): Device._training_failed,
    (Phase.SAVING, Persisted): Device._saved,
    (Phase.SENDING, Acknowledged): Device._chunk_acknowledged,
    (Phase.SENDING, "receipt"): Device._hear_receipt,
}
