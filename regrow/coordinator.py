"""The coordinator: a pure state machine. Events in, effects out; nothing promised before it is durable.

Every decision becomes records, applied to the ledger at once; whatever leaves towards devices waits in the outbox until `Persisted` says
that the records before it would survive a power cut. TRANSITIONS is the whole behaviour at a glance: what is not in it is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from regrow import topics, uploads, wire
from regrow.broadcast import Broadcast
from regrow.claim import Claim, term_above
from regrow.errors import PeerError
from regrow.ledger import Ledger
from regrow.machine import (
    Connected,
    Disconnected,
    Effect,
    Evaluated,
    Event,
    Finished,
    Note,
    Payload,
    Persisted,
    Publish,
    Received,
    SetTimer,
    Standing,
    Subscribe,
    Woken,
)
from regrow.outbox import Outbox
from regrow.planning import Planner
from regrow.programs import MEMORY
from regrow.publication import version_of
from regrow.receipts import missing_of, receipt
from regrow.records import Entry, Joined, Led, Rejected, Released, to_record
from regrow.reported import limit_note, telemetry_fields
from regrow.roster import Roster
from regrow.step_memory import memory_of, needs_bytes
from regrow.trigger import due_s, has_quorum

MIN_LINK_BPS = 1.0  # a claimed link below this would make a deadline that is not a number any more


class Phase(Enum):
    OFFLINE = "offline"
    CLAIMING = "claiming"
    LEADING = "leading"
    DONE = "done"


class Coordinator:
    """One run's coordinator.

    Args:
        ledger: the durable state, new or replayed; owned and mutated here.
        run: name of the run.
        programs: what devices execute, by name; and `memory`, which they never hear of.
        nonce: 31 random bits that tell this process's terms from others'.
        takeover: lead even if another coordinator is alive.
    """

    def __init__(self, ledger: Ledger, run: str, programs: Mapping[str, bytes], nonce: int, *, takeover: bool = False) -> None:
        self.ledger = ledger
        self.names = topics.Run(ledger.task.name, run)
        self.phase = Phase.DONE if ledger.finished else Phase.OFFLINE
        self.claim = Claim(self.names, term_above(ledger.term, nonce), nonce, takeover)
        self.memory = memory_of(programs, ledger.task)
        self.programs = {name: data for name, data in programs.items() if name != MEMORY}
        self.roster = Roster(ledger)
        float32_bytes = needs_bytes(self.memory, ledger.task) if self.memory.float16 else ()
        self.broadcast = Broadcast(ledger, self.roster, self.names, self.programs, self.emit, float32_bytes)
        self.planner = Planner(self)
        self.telemetry: dict[str, wire.Telemetry] = {}
        self.step_s: dict[str, float] = {}
        self.waiting: dict[str, Joined] = {}
        self.assemblies: dict[str, uploads.Assembly] = {}
        self.paused: frozenset[str] = frozenset()
        self.quorum_s: float | None = None
        self.last_s = 0.0
        self.now = 0.0
        self._lead_s = 0.0
        self._elapsed_before = ledger.elapsed_s
        self._outbox = Outbox()

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event in at monotonic time `now`; returns what the runtime must do, in order."""
        self.now = max(now, self.now)
        self.roster.pass_time(self.now)
        urgent: list[Effect] = []
        if isinstance(event, Persisted):
            urgent += self._outbox.release(event)
        else:
            kind: Any = type(event)
            message = None
            if isinstance(event, Received):
                kind, message = self._parse(event)
            handler = TRANSITIONS.get((self.phase, kind))
            if handler is not None:
                handler(self, message if message is not None else event)
        return [*urgent, *self._flush()]

    # ---- what leaves -------------------------------------------------------------------------------------------------------------

    def commit(self, entry: Entry, payload: Payload = b"") -> None:
        """Take a fact into the ledger and into the records of this step."""
        self.ledger.apply(entry, payload)
        self.roster.heed(entry, self.now)
        self._outbox.commit(to_record(entry, payload))

    def emit(self, effect: Effect) -> None:
        """Queue something that leaves the coordinator; it waits for everything committed before it."""
        self._outbox.emit(effect)

    def _flush(self) -> list[Effect]:
        wake = self._next_wake_s()
        return [*self._outbox.flush(), *([SetTimer(wake)] if wake is not None else [])]

    def _next_wake_s(self) -> float | None:
        if self.phase is Phase.CLAIMING:
            return self.claim.wait_s
        if self.phase is not Phase.LEADING:
            return None
        joins = (self.planner.join_due_s(), self.planner.restarts.due_s())
        times = (self.roster.deadlines.least(), self._due_s(), *joins, self.planner.plan_due_s(), self.planner.stop_due_s())
        return min([self.claim.beat_s, *(at for at in times if at is not None)])

    # ---- who leads ---------------------------------------------------------------------------------------------------------------

    def _parse(self, event: Received) -> tuple[Any, Any]:
        """(kind, arguments) of a message, or (None, None) with a note when its bytes are not one."""
        try:
            if event.topic == topics.claim(self.names.task):
                return ("claim", wire.decode(event.payload, wire.Claim)[0]) if event.payload else (None, None)
            source = topics.parse_from_device(event.topic, self.names)
            if source is None:
                return None, None
            message, payload = wire.decode(event.payload, _MESSAGES[source.kind])
            return source.kind, (source, message, payload)
        except PeerError as error:
            self.emit(Note("refused", {"topic": event.topic, "reason": str(error)}))
            return None, None

    def _begin_claim(self, _: Connected) -> None:
        self.phase = Phase.CLAIMING
        self.claim.begin(self.now)
        self.emit(Subscribe((topics.claim(self.names.task),)))

    def _weigh_claim(self, claim: wire.Claim) -> None:
        reason = self.claim.weigh(claim, self.now)
        if reason:
            self._stop(reason)

    def _lead(self, _: Woken) -> None:
        if self.now < self.claim.wait_s:
            return
        self.claim.take()
        self.phase = Phase.LEADING
        if self.claim.term != self.ledger.term:
            self.commit(Led(term=self.claim.term))
        self._lead_s = self.last_s = self.now
        self.roster.restart_deadlines(self.now)
        self.emit(Subscribe(self.names.from_devices()))
        self.emit(self.claim.beaten(self.now))
        self.broadcast.everything(self.claim.term)
        self._release_paused()
        self._advance()

    def _defend_claim(self, claim: wire.Claim) -> None:
        if claim.term > self.claim.term:
            self._stop(f"run {claim.run} has taken the task over (term {claim.term} against {self.claim.term})")
        elif claim.term < self.claim.term:
            self.emit(self.claim.beaten(self.now))

    def _go_offline(self, _: Disconnected) -> None:
        self._elapsed_before = self.elapsed_s()
        self.phase = Phase.OFFLINE
        self.roster.silence_all()

    def _stop(self, reason: str) -> None:
        """Leave without touching the run: it is someone else's to lead, or to be continued."""
        self.phase = Phase.DONE
        self.emit(Finished(reason))

    def elapsed_s(self) -> float:
        """Seconds that this run has been led, over all restarts."""
        return self._elapsed_before + (self.now - self._lead_s if self.phase is Phase.LEADING else 0.0)

    # ---- devices -----------------------------------------------------------------------------------------------------------------

    def live(self, who: str) -> bool:
        """Heard of within three heartbeats, and no will since."""
        return self.roster.live(who)

    def _hear_status(self, said: tuple[topics.FromDevice, wire.Status, Payload]) -> None:
        source, status, _ = said
        if not status.online:
            self.roster.silence(source.device)
            self._advance()

    def _hear_hello(self, said: tuple[topics.FromDevice, wire.Hello, Payload]) -> None:
        source, hello, _ = said
        who, known = source.device, self.ledger.devices.get(source.device)
        self.roster.hear(who, self.now)
        if hello.step_s:
            self.step_s[who] = hello.step_s
        self.broadcast.tasks(who)
        rebooted = known is not None and known.boot != hello.boot.hex()
        if hello.uplink_bps:  # the hello before its first probe is not yet a start to count
            self.planner.take_in(who, hello, max(hello.uplink_bps, MIN_LINK_BPS))
        if rebooted and known is not None and known.lease is not None:
            self.broadcast.offer_again(known.lease, who)
        self._advance()

    def _hear_telemetry(self, said: tuple[topics.FromDevice, wire.Telemetry, Payload]) -> None:
        source, telemetry, _ = said
        who, known = source.device, self.ledger.devices.get(source.device)
        self.roster.hear(who, self.now)
        self.telemetry[who] = telemetry
        if telemetry.step_s:
            self.step_s[who] = telemetry.step_s
        self._take_limit(who, telemetry)
        if known is None or known.install != telemetry.install.hex():
            return
        self.emit(Note("telemetry", telemetry_fields(who, telemetry)))
        lease = known.lease
        if lease is not None and lease.number == telemetry.assignment:
            if telemetry.failed:
                blame, declined = telemetry.phase in ("diverged", "failed"), telemetry.phase == wire.DECLINED
                self.release_lease(who, telemetry.failed, blame=blame, declined=declined)
            elif telemetry.phase in ("training", "sending"):
                self.broadcast.downloaded(lease.version, who)
        if telemetry.pending is not None:
            self._answer_pending(who, telemetry.install, telemetry.pending)
        self._advance()

    def _take_limit(self, who: str, telemetry: wire.Telemetry) -> None:
        """Work that a device's owner does not allow now, and that it does not have at hand, is not for it."""
        news = limit_note(who, self.roster.limits.get(who), telemetry.limit)
        self.roster.limit(who, telemetry.limit)
        if news is not None:
            self.emit(news)
        known, limit = self.ledger.devices.get(who), telemetry.limit
        if known is None or known.install != telemetry.install.hex() or known.lease is None or limit is None:
            return
        if limit.density is None and telemetry.assignment == 0 and telemetry.phase == "waiting":
            self.release_lease(who, f"limit: {limit.said}")

    def release_lease(self, who: str, reason: str, *, blame: bool = False, declined: bool = False) -> None:
        lease = self.ledger.devices[who].lease
        self.commit(Released(device=who, reason=reason, blame=blame, declined=declined))
        if lease is not None:
            self.broadcast.downloaded(lease.version, who)
        self.emit(Note("declined" if declined else "released", {"device": who, "reason": reason}))

    def _take_standing(self, standing: Standing) -> None:
        """Who was put to rest does not hold up a round; what a draining device still delivers counts."""
        self.paused = standing.paused
        self.roster.rest(standing.paused | standing.draining)
        for who in self.roster.resting & self.waiting.keys():  # it says hello again, and joins when it may work
            del self.waiting[who]
        if self.phase is Phase.LEADING:
            self._release_paused()
            self._advance()

    def _release_paused(self) -> None:
        for who in sorted(self.paused):
            known = self.ledger.devices.get(who)
            if known is not None and known.lease is not None:
                self.release_lease(who, "paused")

    # ---- updates -----------------------------------------------------------------------------------------------------------------

    def _hear_update(self, said: tuple[topics.FromDevice, wire.UpdateChunk, memoryview]) -> None:
        source, chunk, payload = said
        who, known = source.device, self.ledger.devices.get(source.device)
        self.roster.hear(who, self.now)
        if known is None or known.install != chunk.install.hex():
            return
        if source.sequence <= known.last_sequence:
            self._receipt(who, chunk.install, source.sequence)
            return
        try:
            quota = uploads.quota_bytes(self.ledger)
            assembly = uploads.add_chunk(self.assemblies.get(who), chunk, payload, source.sequence, source.index, quota)
        except PeerError as error:
            self.emit(Note("refused", {"device": who, "reason": str(error)}))
            return
        self.assemblies[who] = assembly
        if assembly.whole:
            self._take_update(who, assembly)

    def _take_update(self, who: str, assembly: uploads.Assembly) -> None:
        del self.assemblies[who]
        payload = uploads.whole_payload(assembly)
        if payload is None or assembly.head is None:
            self._receipt(who, assembly.install, assembly.sequence, [wire.Range(0, assembly.count)])
            return
        version = assembly.head.version
        try:
            entry = uploads.checked(self.ledger, who, assembly, payload, self._uplink_bps(who))
            self.commit(entry, payload)
        except PeerError as error:
            late = isinstance(error, uploads.TooLateError)
            self.commit(
                Rejected(device=who, install=assembly.install.hex(), sequence=assembly.sequence, reason=str(error)[:900], blame=not late)
            )
            self.emit(Note("rejected", {"device": who, "reason": str(error)}))
        else:
            self.roster.deliver(who)
            self._note_arrival(who, assembly.head)
        self.broadcast.downloaded(version, who)
        self._receipt(who, assembly.install, assembly.sequence)
        self._advance()

    def _note_arrival(self, who: str, head: wire.UpdateHead) -> None:
        version = version_of(head.version)
        staleness = self.ledger.version - version
        fields = {"device": who, "version": version, "staleness": staleness, "level": head.level, "bytes": head.size}
        self.emit(Note("update", {**fields, "loss": head.loss, "seconds": head.seconds, "examples": head.examples}))

    def _uplink_bps(self, who: str) -> float:
        telemetry = self.telemetry.get(who)
        measured = telemetry.uplink_bps if telemetry is not None else None
        return max(measured, MIN_LINK_BPS) if measured else self.ledger.devices[who].uplink_bps

    def _answer_pending(self, who: str, install: bytes, pending: wire.Pending) -> None:
        here = pending.sequence <= self.ledger.devices[who].last_sequence
        missing = None if here else missing_of(self.assemblies.get(who), install, pending)
        self._receipt(who, install, pending.sequence, missing)

    def _receipt(self, who: str, install: bytes, sequence: int, missing: list[wire.Range] | None = None) -> None:
        message = receipt(self.ledger.devices[who], self.claim.term, install, sequence, missing)
        self.emit(Publish(self.names.receipt(who), wire.encode(message)))

    # ---- progress ----------------------------------------------------------------------------------------------------------------

    def _due_s(self) -> float | None:
        return due_s(
            self.ledger.task.trigger,
            arrived=len(self.ledger.arrived),
            outstanding=len(self.roster.outstanding),
            fastest_class=self.roster.fastest_class(),
            quorum_s=self.quorum_s,
            last_s=self.last_s,
            now_s=self.now,
        )

    def _tick(self, _: Woken) -> None:
        for who in self.roster.miss_deadlines(self.now):
            self.release_lease(who, "deadline passed")
        if self.claim.beat_s <= self.now:
            self.emit(self.claim.beaten(self.now))
        self._advance()

    def _advance(self) -> None:
        """Do everything that has become due: densities, aggregations, assignments, the end."""
        if self.phase is not Phase.LEADING:
            return
        self.planner.admit()
        roster, arrived = self.roster, len(self.ledger.arrived)
        if self.quorum_s is None and has_quorum(self.ledger.task.trigger, arrived, len(roster.outstanding), roster.fastest_class()):
            self.quorum_s = self.now
        due = self._due_s()
        if due is not None and due <= self.now:
            self.last_s, self.quorum_s = self.now, None
            self.planner.aggregate()
        self.planner.keep_to_plan()
        reason = self.planner.finish_reason()
        if reason:
            self.planner.finish(reason)
            self.phase = Phase.DONE
            self.broadcast.clear_everything()
            self.emit(Finished(reason))
            return
        self.planner.assign_idle()

    def _take_evaluation(self, evaluated: Evaluated) -> None:
        self.planner.take_evaluation(evaluated)
        self._advance()

    def _announce_end(self, _: Connected) -> None:
        if self.ledger.finished:
            self.broadcast.clear_everything()
            self.emit(Finished(self.ledger.finished))


_MESSAGES: Mapping[str, type[wire.Message]] = {
    "status": wire.Status,
    "hello": wire.Hello,
    "telemetry": wire.Telemetry,
    "update": wire.UpdateChunk,
}

TRANSITIONS: Mapping[tuple[Phase, Any], Callable[[Coordinator, Any], None]] = {
    **{(phase, Standing): Coordinator._take_standing for phase in Phase},
    (Phase.OFFLINE, Connected): Coordinator._begin_claim,
    (Phase.CLAIMING, Disconnected): Coordinator._go_offline,
    (Phase.CLAIMING, "claim"): Coordinator._weigh_claim,
    (Phase.CLAIMING, Woken): Coordinator._lead,
    (Phase.LEADING, Disconnected): Coordinator._go_offline,
    (Phase.LEADING, "claim"): Coordinator._defend_claim,
    (Phase.LEADING, "status"): Coordinator._hear_status,
    (Phase.LEADING, "hello"): Coordinator._hear_hello,
    (Phase.LEADING, "telemetry"): Coordinator._hear_telemetry,
    (Phase.LEADING, "update"): Coordinator._hear_update,
    (Phase.LEADING, Evaluated): Coordinator._take_evaluation,
    (Phase.LEADING, Woken): Coordinator._tick,
    (Phase.DONE, Connected): Coordinator._announce_end,
}
