"""The device: a pure state machine that fetches, trains, sends and waits, and goes on where it was after any cut or reboot.

TRANSITIONS is the whole behaviour at a glance: what is not in it is ignored. Connection and work are independent: a device without a link
goes on with what it has, and everything that the other side must know is said again after the next connect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from regrow import outgoing, topics, training, wire
from regrow.errors import LocalError, PeerError
from regrow.fetching import Fetched, Fetching
from regrow.hearing import own_topics, recognise
from regrow.machine import (
    Acknowledged,
    Connected,
    DataChanged,
    Disconnected,
    Effect,
    Event,
    Limited,
    Measured,
    Note,
    Persisted,
    Publish,
    Received,
    Save,
    SetTimer,
    Steer,
    Subscribe,
    Told,
    Trained,
    TrainingFailed,
    Unsubscribe,
    Woken,
)
from regrow.presence import HELLO_AGAIN_S, TRY_AGAIN, Identity, Presence
from regrow.restraint import MESSAGE_BYTES, Restraint, essence
from regrow.sending import PROBE_MAX_BYTES, Sending
from regrow.wire import DECLINED

OUTGOING = "outgoing"
PROBE_PART = 8  # of the bytes that its owner still allows today, a probe takes one in so many at most


class Phase(Enum):
    IDLE = "idle"
    PROBING = "probing"
    WAITING = "waiting"
    FETCHING = "fetching"
    TRAINING = "training"
    SAVING = "saving"
    SENDING = "sending"


class Device:
    """One device.

    Args:
        identity: who it is.
        saved: name -> bytes, what the folder held at the start; parts are checked against the digest in their name.
        uplink_bps: from an earlier life, or None: a probe will tell.
    """

    def __init__(self, identity: Identity, saved: Mapping[str, bytes], uplink_bps: float | None = None) -> None:
        self.identity = identity
        self.uplink_bps = uplink_bps
        self.phase = Phase.IDLE
        self.told = "work"
        self.connected = False
        self.now = 0.0
        self.names: topics.Run | None = None
        self.term = 0
        self.assignment: wire.Assignment | None = None
        self.outgoing: outgoing.Outgoing | None = None
        self._next: wire.Assignment | None = None
        self._done = 0
        self._presence = Presence(identity)
        self.meters = self._presence.meters
        self._fetching = Fetching()
        self._fetched: Fetched | None = None
        self._sending = Sending()
        self._restraint = Restraint()
        self._save_id = 0
        self._job = 0
        self._effects = self._fetching.load(saved)
        if OUTGOING in saved:
            try:
                self.outgoing = outgoing.from_bytes(saved[OUTGOING], None)
            except LocalError as error:
                self._emit(Note("set aside", {"reason": str(error)}))

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event in at monotonic time `now`; returns what the runtime must do, in order."""
        self.now = max(now, self.now)
        try:
            kind, said = recognise(event, self.identity.name, self.names, self.assignment, self._fetching.subscribed)
            handler = TRANSITIONS.get((self.phase, kind))
            if handler is not None:
                handler(self, said)
        except PeerError as error:
            self._effects.append(Note("refused", {"reason": str(error)}))
        effects, self._effects = self._effects, []
        return [*effects, SetTimer(min(self._presence.beat_s, self._presence.hello_s, self._sending.ask_s))]

    @property
    def in_trouble(self) -> bool:
        """Whether the last assignment could not be done for what is wrong here."""
        return bool(self._presence.trouble)

    @property
    def needs_link(self) -> bool:
        """Whether parts or chunks are on their way; waiting for a receipt leaves the link to others."""
        return self.phase in (Phase.PROBING, Phase.FETCHING) or bool(self._sending.in_flight)

    @property
    def may_use_link(self) -> bool:
        """Whether its owner's limits let it send and fetch more than what it says of itself."""
        return self._restraint.allowed.link

    @property
    def share(self) -> float | None:
        """The share of the model that the job at hand trains, None without one."""
        manifest = None if self._fetched is None else self._fetched.wanted.manifest
        return None if manifest is None or self.assignment is None else manifest.lengths[self.assignment.level] / manifest.lengths[-1]

    # ---- connection ----------------------------------------------------------------------------------------------------------------

    def _connect(self, _: Connected) -> None:
        self.connected = True
        self._presence.connect(self.now)
        self._emit(Subscribe((topics.tasks(self.identity.name),)))
        if self.names is not None:
            self._emit(Subscribe(self._own_topics(self.names)))
        self._tell_limit()
        self._hello()
        if self.phase is Phase.PROBING:
            self._begin_probe()
        elif self.phase is Phase.FETCHING:
            self._fetching.progress_s = self.now  # without a link nothing could come
            self._fetch_on()
        elif self.phase is Phase.SENDING:
            self._ask_receipt()

    def _disconnect(self, _: Disconnected) -> None:
        self.connected = False
        self._presence.disconnect()
        self._sending.stop()
        self._fetching.subscribed.clear()

    def _own_topics(self, names: topics.Run) -> tuple[str, ...]:
        return own_topics(names, self.identity.name, quiet=self._presence.quiet)

    def _tell_limit(self) -> None:
        """Said before hello, lest a limited device gets work that it may not do."""
        if self._restraint.limit(self.now) is not None:
            self._telemetry()

    def _hello(self) -> None:
        self._emit(self._presence.hello(self.uplink_bps, self.now, again=self.phase in (Phase.IDLE, Phase.WAITING)))

    def _telemetry(self, *, failed: str = "", phase: str = "", pending: wire.Pending | None = None) -> None:
        if self.names is None or not self.connected:
            return
        phase = phase or self.phase.value
        limit = self._restraint.limit(self.now)
        self._emit(self._presence.telemetry(self.names, self.now, phase, self.assignment, self.uplink_bps, failed, pending, limit))

    def _wake(self, _: Woken) -> None:
        if not self.connected:
            return
        if self._presence.hello_s <= self.now:
            self._hello()
        if self._sending.ask_s <= self.now and self.phase is Phase.SENDING:
            self._ask_receipt()
        if self._presence.beat_s <= self.now:
            self._telemetry()
            self._presence.beaten(self.now)
            may_work = self.phase is Phase.WAITING and not self._restraint.refuses
            self._effects += self._presence.complaints(self.now) if may_work else ()
        if self.phase is Phase.FETCHING and self._fetching.stalled(self.now):
            self._give_up("the parts of this version are no longer on the broker")

    def _measure(self, measured: Measured) -> None:
        first = self.uplink_bps is None
        self.uplink_bps = measured.uplink_bps
        if first and self.phase is not Phase.PROBING and self.connected:
            self._hello()

    def _start_anew(self, data: DataChanged) -> None:
        self.identity = self._presence.start_anew(data)
        if self.connected:
            self._hello()

    # ---- what there is to do -------------------------------------------------------------------------------------------------------

    def _hear_tasks(self, message: wire.Tasks) -> None:
        self._presence.hear_heartbeat(message.heartbeat_s, self.now)
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
        last = self._last()
        self._done = 0 if last is None else last.head.assignment
        self.phase = Phase.WAITING
        if last is not None and not last.closed:
            self.phase = Phase.SENDING
            self._ask_receipt()
        elif last is None and self.uplink_bps is None:
            self.phase = Phase.PROBING
            self._begin_probe()
        self._tell_limit()
        self._presence.hello_soon(self.now)

    def _leave_task(self) -> None:
        if self.names is not None and self.connected:
            self._emit(Unsubscribe((*self._own_topics(self.names), *sorted(self._fetching.subscribed))))
        self.names, self.term, self._done = None, 0, 0
        self.assignment = self._next = self._fetching.wanted = self._fetching.known = self._fetched = None
        self._fetching.subscribed.clear()
        self._sending.stop()
        self._presence.trouble = ""
        self._restraint.costs, self._restraint.waiting_bytes = (), 0
        self.phase = Phase.IDLE
        self._presence.hello_soon(self.now)

    def _hear_claim(self, claim: wire.Claim) -> None:
        if self.names is not None and claim.run == self.names.run:
            if self.phase not in (Phase.IDLE, Phase.WAITING):
                self._presence.at_work(self.now)
            self._hear_term(claim.term)
        elif claim.term > self.term:  # another run leads this task now and may not know us; ours will not answer any more
            self._hello()

    def _hear_term(self, term: int) -> None:
        """A higher term is a coordinator that may not know us; lower ones are the past."""
        if term > self.term:
            self.term = term
            self._tell_limit()
            self._hello()
            if self.phase is Phase.SENDING:
                self._ask_receipt()

    def _hear_assignment(self, assignment: wire.Assignment) -> None:
        """Begin it now, or after what is being worked on: an update stays valid for what it started with."""
        newest = self._done if self.assignment is None else self.assignment.number
        if assignment.term < self.term or assignment.number <= newest or self.told != "work":
            return
        if self.phase in (Phase.WAITING, Phase.FETCHING):
            self._begin_fetch(assignment)
        else:
            self._next = assignment

    def _hear_told(self, told: Told) -> None:
        """An update that is ready still leaves; of a job that is given up nothing is kept, and its result is not looked at."""
        rested, self.told = self.told != "work", told.action
        if told.action != "work":
            self._next = None
        elif rested and self.connected:
            self._presence.rested()
            self._hello()
        if told.action == "pause" and self.phase in (Phase.FETCHING, Phase.TRAINING):
            self._give_up("paused")

    # ---- the owner's limits --------------------------------------------------------------------------------------------------------

    def _hear_limited(self, limited: Limited) -> None:
        """Give back what may not go on, stand still where it is too hot, go on with what may; say what is news to the coordinator."""
        before, told = self._restraint.allowed, essence(self._restraint.limit(self.now))
        self._restraint.allowed = allowed = limited.allowed
        if allowed.link != before.link:
            self._turn_quiet(not allowed.link)
        if allowed.cool != before.cool:
            self._emit(Steer("go on" if allowed.cool else "stand still"))
        if self.phase is Phase.TRAINING and not allowed.train:
            self._emit(Steer("give up"))
            self._give_up(f"limit: {allowed.said}")
        elif self.phase is Phase.FETCHING and not (allowed.train and allowed.link):
            self._give_up(f"limit: {allowed.said}")
        elif self.phase in (Phase.PROBING, Phase.SENDING) and not allowed.link:
            self._sending.stop()
        elif not before.link or self._restraint.waiting_bytes:
            self._send_what_waited()
        now_told = self._restraint.limit(self.now)
        if essence(now_told) != told:
            self._emit(Note("limited", {"reason": now_told.said}) if now_told is not None else Note("free again"))
            self._telemetry()

    def _send_what_waited(self) -> None:
        if self.phase is Phase.PROBING and self.connected and not self._sending.in_flight:
            self._begin_probe()
        elif self.phase is Phase.SENDING and self._restraint.may_send(self._restraint.waiting_bytes):
            self._ask_receipt()

    def _turn_quiet(self, quiet: bool) -> None:
        """Where the link is not to be used, a claim every two seconds is too much, and so is a heartbeat."""
        self._presence.quiet = quiet
        if not self.connected:
            return
        if self.names is not None:
            claim = (topics.claim(self.names.task),)
            self._emit(Unsubscribe(claim) if quiet else Subscribe(claim))
        self._presence.hello_in(HELLO_AGAIN_S, self.now)
        self._presence.beaten(self.now)

    # ---- probing -------------------------------------------------------------------------------------------------------------------

    def _begin_probe(self) -> None:
        left = self._restraint.allowed.bytes_left
        most = PROBE_MAX_BYTES if left is None else min(PROBE_MAX_BYTES, left // PROBE_PART)
        if self._restraint.may_send(max(most, wire.MIN_CHUNK_BYTES)):
            self._sending.begin_probe(self.now, most)
            self._probe_on()

    def _probe_on(self) -> None:
        if self.names is not None:
            for token, noise in self._sending.next_probes(self.identity.boot, self.now):
                self._emit(Publish(self.names.probe(self.identity.name), noise, token=token))

    def _probe_acknowledged(self, ack: Acknowledged) -> None:
        if not self._sending.acknowledged(ack.token):
            return
        self._probe_on()
        if not self._sending.in_flight:
            self.phase = Phase.WAITING
            self._hello()
            if self._next is not None:
                self._begin_fetch(self._next)

    # ---- fetching ------------------------------------------------------------------------------------------------------------------

    def _begin_fetch(self, assignment: wire.Assignment) -> None:
        self._effects += self._fetching.begin(self.connected, self.now)
        self.assignment, self._next, self._presence.fresh = assignment, None, False
        if self._restraint.refuses:
            self._give_up(self._restraint.refuses)
            return
        self.phase = Phase.FETCHING
        if self.connected:
            self._presence.at_work(self.now)
        self._fetch_on()

    def _fetch_on(self) -> None:
        """Ask for what is still lacking; start training when nothing is."""
        if self.names is None or self.assignment is None or self._fetching.subscribed:
            return
        asked = self._fetching.ask(self.names.manifest(self.assignment.version), self.connected)
        if not asked:
            self._begin_training()
        elif self.connected:
            self._emit(Subscribe(asked))

    def _hear_manifest(self, manifest: wire.Manifest) -> None:
        if self.names is None or self.assignment is None or manifest.term < self.term or self._fetching.wanted is not None:
            return
        self._effects += self._fetching.plan(self.assignment, manifest, self.names, self.now, self.identity)
        wanted = self._fetching.wanted
        refused = "" if wanted is None else self._restraint.weigh(wanted, self._fetching.parts, self.names, self.identity)
        if refused:
            self._give_up(refused)
        else:
            self._fetch_on()

    def _hear_part(self, event: Received) -> None:
        self._presence.at_work(self.now)  # on a slow link claims wait behind the parts
        if self._fetching.wanted is not None:
            self._effects += self._fetching.take(event.topic, event.payload, self.now)
            self._fetch_on()

    def _give_up(self, reason: str, phase: str = "") -> None:
        """Say why this assignment cannot be done, and be ready for another."""
        self._telemetry(failed=reason, phase=phase)
        if phase:
            self._presence.in_trouble(reason, self.now, once=phase == DECLINED)
        cure = {"cure": TRY_AGAIN} if phase == DECLINED else {}
        self._emit(Note("declined" if cure else "gave up", {"reason": reason, **cure}))
        self._effects += self._fetching.stop(self.connected)
        self._finish_assignment()

    def _finish_assignment(self) -> None:
        if self.assignment is not None:
            self._done = self.assignment.number
        self.assignment = self._fetching.wanted = self._fetched = None
        self.phase = Phase.WAITING
        self._sending.stop()
        self._restraint.waiting_bytes = 0
        self._presence.hello_s = float("inf")
        if self.connected:
            self._presence.hello_in(HELLO_AGAIN_S, self.now)
        if self._next is not None and self._next.number > self._done:
            self._begin_fetch(self._next)

    # ---- training ------------------------------------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        wanted = self._fetching.wanted
        if wanted is None:
            return
        try:
            self._fetched = self._fetching.assemble(wanted)
        except PeerError as error:
            self._give_up(str(error))
            return
        self.phase = Phase.TRAINING
        self._job += 1
        self._emit(Note("training", {"number": wanted.assignment.number}))
        self._telemetry()
        self._emit(training.job(self._job, self._fetched, self._last()))

    def _last(self) -> outgoing.Outgoing | None:
        """The update before, whose debt and mask the next one takes on; an update of another run is none."""
        return self.outgoing if self.outgoing is not None and self.names is not None and self.outgoing.run == self.names.root else None

    def _take_trained(self, trained: Trained) -> None:
        if self._fetched is None or self.names is None or trained.number != self._job:
            return
        try:
            self.outgoing = training.update(trained, self._fetched, self.names.root, self.outgoing)
        except PeerError as error:
            self._give_up(str(error), phase="diverged")
            return
        self._presence.trouble = ""
        self.phase = Phase.SAVING
        self._save_id += 1
        self._emit(Save(OUTGOING, self.outgoing.to_bytes(), id=self._save_id))

    def _training_failed(self, failed: TrainingFailed) -> None:
        if failed.number == self._job:
            self._give_up(failed.reason, phase=DECLINED if failed.declined else "failed")

    # ---- sending -------------------------------------------------------------------------------------------------------------------

    def _saved(self, persisted: Persisted) -> None:
        if persisted.id != self._save_id or self.outgoing is None:
            return
        self.phase = Phase.SENDING
        self._emit(Note("sending", {"sequence": self.outgoing.sequence, "chunks": self.outgoing.count}))
        self._begin_sending(range(self.outgoing.count), self.outgoing)

    def _begin_sending(self, chunks: Iterable[int], update: outgoing.Outgoing) -> None:
        """Send these chunks; what today's bytes do not hold waits until they do."""
        wanted = list(chunks)
        if self._restraint.may_send(len(wanted) * min(update.chunk_bytes, len(update.payload)) + MESSAGE_BYTES * len(wanted)):
            self._sending.start(wanted)
            self._send_on()
        else:
            self._sending.stop()
            self._telemetry()

    def _send_on(self) -> None:
        if not self.connected or self.names is None or self.outgoing is None:
            return
        for token, index in self._sending.next_chunks(self.now):
            topic = self.names.update(self.identity.name, self.outgoing.sequence, index)
            self._emit(Publish(topic, self.outgoing.chunk(index, self.identity.install), token=token))

    def _chunk_acknowledged(self, ack: Acknowledged) -> None:
        if self._sending.acknowledged(ack.token):
            self._send_on()

    def _ask_receipt(self) -> None:
        if self.outgoing is not None and self.connected and self._restraint.allowed.link:
            self._telemetry(pending=wire.Pending(self.outgoing.sequence, self.outgoing.count))
            self._sending.asked(self.now)

    def _hear_receipt(self, receipt: wire.Receipt) -> None:
        current = self.outgoing
        if current is None or not current.is_meant_by(receipt, self.identity.install) or receipt.term < self.term:
            return
        if receipt.outcome == "missing":
            self._begin_sending(current.missing(receipt), current)
            return
        if receipt.outcome == "rejected":
            self._emit(Note("rejected", {"reason": receipt.reason}))
            if not receipt.blame:  # what was blamed on the values would only be refused again
                self.outgoing = current.rejected()
                self._emit(Save(OUTGOING, self.outgoing.to_bytes(), id=0))
        else:
            self._emit(Note("accepted", {"sequence": receipt.sequence, "install": receipt.install.hex()}))
        if self.assignment is None:  # sent after a reboot
            self._done = max(self._done, current.head.assignment)
        self._finish_assignment()

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)


_ANY: Mapping[Any, Callable[[Device, Any], None]] = {
    Connected: Device._connect,
    Disconnected: Device._disconnect,
    Measured: Device._measure,
    DataChanged: Device._start_anew,
    Woken: Device._wake,
    Told: Device._hear_told,
    Limited: Device._hear_limited,
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
