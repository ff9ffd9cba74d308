"""The device's runtime: one loop that turns the link, steps the machine and keeps its promises to the disk."""

from __future__ import annotations

import logging
import queue
import random
import secrets
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import psutil

from edge_agent.bundle import Bundle
from edge_agent.control import Control
from edge_agent.data.source import DataSource
from edge_agent.identity import Identity as Member
from edge_agent.identity import fleet_context
from edge_agent.memory import spare_bytes
from edge_agent.models import Models
from edge_agent.promotion import Settled
from edge_agent.sealing import Sealing
from edge_agent.senses import Senses
from edge_agent.state import StateFolder
from edge_agent.traffic import Traffic
from edge_agent.trainer import Trainer
from edge_agent.transport import MqttLink
from edge_agent.tuning import Tuning
from edge_agent.vitals import Vitals
from edge_agent.worker import MakeTrainer, Worker
from regrow import outgoing, topics, wire
from regrow.device import OUTGOING, Device
from regrow.errors import LocalError
from regrow.fetching import PART
from regrow.guards import REFUSED
from regrow.machine import (
    Acknowledged,
    Connected,
    DataChanged,
    Disconnected,
    Drop,
    Effect,
    Event,
    Finished,
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
    Train,
    Trained,
    TrainingFailed,
    Unsubscribe,
    Woken,
)
from regrow.outage import Outage
from regrow.presence import Identity
from regrow.programs import StorageRule

log = logging.getLogger(__name__)
IDENTITY = "identity"
TUNING = "tuning"
POLL_S = 1.0
ANEW_S = 60.0  # a source that appends again and again is tried this often
COMPLAINTS = ("declined", "gave up", "rejected", "limited", "refused", REFUSED, "set aside", "without work", "no work yet")


class Companion(Protocol):
    """A machine beside the device's, on the same link: it hears every event, and None about once a second for the time alone."""

    def step(self, event: Event | None, now: float) -> Sequence[Effect]: ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """What to save of the worker's tuning."""

    data: bytes


class Agent:
    """One device, until `stop` is called.

    Args:
        bundle: who it is and where the broker is.
        folder: its durable state, held exclusively.
        source: its own data; nothing of it ever leaves.
        max_uplink_bps, max_downlink_bps: caps on what it sends and takes, wire bits per second.
        threads: for training.
        software: what hello says of us.
        memory_bytes: that a training job may take; None: what is to spare when the agent starts.
        local_head: train the last layer of promoted models here, for use here only.
        storage: of activations while training: "auto" is float16 where float32 does not fit.
        make: what trains.
        tune: find out how to train fastest here (edge_agent.tuning); otherwise in the default way, and results repeat to the bit.
        companions: what else this process does for the device over the same link.
        member: of a fleet, with this identity instead of a password; it then heeds what the fleet tells it.
        sealing: of a device with an identity, which hears nothing unsealed; without, messages travel bare. Closed here.
        vitals: what looks whether it gets anywhere.
        senses: what it observes of itself, and its owner's limits; begun and closed here.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: StateFolder,
        source: DataSource,
        *,
        max_uplink_bps: float | None = None,
        max_downlink_bps: float | None = None,
        threads: int = 1,
        software: str = "",
        memory_bytes: int | None = None,
        local_head: bool = False,
        storage: StorageRule = "auto",
        make: MakeTrainer = Trainer,
        tune: bool = False,
        companions: Sequence[Companion] = (),
        member: Member | None = None,
        sealing: Sealing | None = None,
        vitals: Vitals | None = None,
        senses: Senses | None = None,
    ) -> None:
        self._vitals = vitals or Vitals(folder.path)
        self._sealing, self._senses = sealing, senses or Senses()
        beside = (None if member is None else Control(member, self, self._fleet_s), self._senses.observer, self._senses.energy)
        self._companions: list[Companion] = [*companions, *(companion for companion in beside if companion is not None)]
        self._told: dict[int, str] = {}
        self._clearing = self._cleared = False
        self._folder, self._bundle, self._source = folder, bundle, source
        self._anew_s = 0.0
        self._tried = 0  # how many samples there were when the last job began
        saved = self._load_saved()
        self.identity = Identity(
            name=bundle.device,
            install=self._load_install(),
            boot=secrets.token_bytes(wire.DIGEST_BYTES),
            examples=source.training_size,
            validation_examples=source.validation_size,
            software=software,
            memory_bytes=spare_bytes() if memory_bytes is None else memory_bytes,
            storage=storage,
        )
        self._link = MqttLink(
            bundle.broker,
            device_id=bundle.device,
            password=bundle.password,
            rng=random.Random(self.identity.boot),
            # Bare, so a fleet with keys would not hear it.
            will=(topics.status(bundle.device), wire.encode(wire.Status(online=False))) if sealing is None else None,
            max_uplink_bps=max_uplink_bps,
            max_downlink_bps=max_downlink_bps,
            tls=self._tls_of(member),
        )
        self.traffic = Traffic(folder, self._link, observe=self._senses.take, wall_s=self._senses.clock)
        self.device = Device(self.identity, saved, self.traffic.meter.estimate_bps)
        self._results: queue.SimpleQueue[Trained | TrainingFailed | Settled | Tuned] = queue.SimpleQueue()
        self._worker = Worker(
            source,
            self._trained,
            threads=threads,
            make=make,
            tuning=Tuning(threads, folder.get(TUNING)) if tune else None,
            tuned=lambda data: self._trained(Tuned(data)),
            progress=self._vitals.work,
            marked=lambda: self._senses.marked,
        )
        self._models = Models(bundle.device, folder, source, self._worker.put, self._trained, threads=threads, local_head=local_head)
        self._process = psutil.Process()
        self._on_note: Callable[[Note], None] = lambda _: None
        self._outage = Outage()
        self._timer_s = float("inf")
        self._stopping = False

    # ---- state of earlier lives ----------------------------------------------------------------------------------------------------

    def _load_saved(self) -> dict[str, bytes]:
        saved = {}
        for name in (OUTGOING, *self._folder.list(PART)):
            data = self._folder.get(name)
            if data is not None:
                saved[name] = data
        return saved

    def _load_install(self) -> bytes:
        """The install nonce. A lost sequence number starts a new installation, so that no number is ever used twice."""
        install = self._folder.get(IDENTITY)
        lost = [(name, reason) for name, reason in self._folder.rejected if name == OUTGOING]
        data = self._folder.get(OUTGOING)
        if data is None and (self._folder.path / f"{OUTGOING}.rejected").exists():  # a crash may have come before the new nonce
            lost.append((OUTGOING, "set aside in an earlier life"))
        if data is not None:
            try:
                outgoing.from_bytes(data, None)
            except LocalError as error:
                lost.append((OUTGOING, str(error)))
        for name, reason in self._folder.rejected:
            log.warning("set aside %s: %s", name, reason)
        if install is None or len(install) != wire.DIGEST_BYTES or lost:
            install = secrets.token_bytes(wire.DIGEST_BYTES)
            self._folder.put(IDENTITY, install)
        return install

    # ---- the loop ------------------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End `run` soon; from any thread or a signal handler."""
        self._stopping = True
        self._link.wake()

    @property
    def computes(self) -> bool:
        """Whether a computation goes on after `run` that could not be ended in time: the interpreter must not end under it."""
        return self._worker.alive

    def run(self, on_note: Callable[[Note], None] = lambda _: None) -> None:
        """Serve until stopped.

        Raises:
            LocalError: the disk failed or the state folder is gone; nothing is promised any more, a restart goes on from what is there.
        """
        self._on_note = on_note
        self._senses.start()
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._end()

    def _turn(self) -> None:
        """Wait for something, and do what is due."""
        self._folder.check()  # an agent that waits for work writes nothing, and would not notice
        self._look_at_limits()
        for event in self._link.poll(min(max(self._timer_s - time.monotonic(), 0.0), POLL_S)):
            heard = event if self._sealing is None else self._sealing.open(event, time.monotonic())
            if heard is not None:
                self._take(heard)
        while not self._results.empty():
            self._take_result(self._results.get())
        if not self._clearing:
            self._perform(self._models.go_on(time.monotonic(), quiet=self.quiet))
            self._start_anew(time.monotonic())
        self._look_at_link(time.monotonic())
        self._accompany(None)
        self._senses.follow(self.device, training=not self._vitals.work.idle)
        self._tend_seal()
        if self._timer_s <= time.monotonic() and not self._clearing:
            self._timer_s = float("inf")
            self._step(Woken())
        connected, phase, alive = self._link.connected, self.device.phase, self._worker.alive
        deaf = self._sealing is not None and self._sealing.deaf
        self._vitals.turn(time.monotonic(), connected=connected, phase=phase, alive=alive, deaf=deaf)

    def _tend_seal(self) -> None:
        if self._sealing is not None:
            self._perform(self._sealing.tend(time.monotonic()))
            if self._sealing.must_say_again():
                self._link.reconnect("connecting anew to say again what was refused")

    def _end(self) -> None:
        self._vitals.stopping()
        self._worker.close()
        self._link.close()
        if not self._clearing:
            with suppress(LocalError):  # it ends for what the disk did, or loses an estimate
                self.traffic.save()
            if self._sealing is not None:
                self._sealing.close(time.monotonic())
        self._senses.close(clearing=self._clearing)

    @property
    def quiet(self) -> bool:
        """Training leaves the link alone, the owner lets it be used, and no field run wants the device to keep still."""
        return not self.device.needs_link and self.device.may_use_link and not self._senses.still

    def _look_at_limits(self) -> None:
        if self._clearing:
            return
        allowed = self._senses.allowed(time.monotonic(), self._link.bytes_up + self._link.bytes_down)
        if allowed is not None:
            self._step(Limited(allowed))

    def _take(self, event: Event) -> None:
        self._look_at_limits()
        now = time.monotonic()
        if isinstance(event, Received):
            self.traffic.arrived(event, now)
        elif isinstance(event, Disconnected):
            self.traffic.lost()
        elif isinstance(event, Acknowledged):
            theirs = self.traffic.acknowledged(event, now)
            self._tell_of_rate()  # before the machine hears that its probe is over
            if not theirs:
                return
        self._tell_of_outages(event)
        if not self._clearing:
            self._step(event)
            self._perform(self._models.step(event, time.monotonic(), quiet=self.quiet))
        self._accompany(event)

    def _accompany(self, event: Event | None) -> None:
        for number, companion in enumerate(self._companions):
            for effect in companion.step(event, time.monotonic()):
                self._perform((self._strictest(number, effect) if isinstance(effect, Told) else effect,))

    def _strictest(self, number: int, told: Told) -> Told:
        """What holds of all that the companions say of work: one that lets it go on does not end another's pause."""
        self._told[number] = told.action
        return Told(next((action for action in ("pause", "drain") if action in self._told.values()), told.action))

    # ---- what the fleet may ask of it (edge_agent.control.Body) -------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.device.assignment is not None

    @property
    def cleared(self) -> bool:
        return self._cleared

    def clear(self) -> None:
        self._clearing = True
        self._senses.abandon()
        self._worker.abandon()
        self._worker.put(self._clear)  # in the thread that might still write

    def _clear(self) -> None:
        try:
            self._folder.clear()
        except LocalError as error:
            log.error("%s", error)
        self._cleared = True
        self._link.wake()

    def change(self, identity: Member) -> None:
        if self._sealing is not None:
            self._sealing.identity = identity
        self._link.use(identity.tls_context(self._fleet_s))

    def _fleet_s(self) -> float:
        return time.time() if self._sealing is None else self._sealing.now_s(time.monotonic())

    def _tls_of(self, member: Member | None) -> ssl.SSLContext | None:
        if member is not None:
            return member.tls_context(self._fleet_s)
        return None if self._bundle.authority is None else fleet_context(self._bundle.authority)

    def _take_result(self, result: Trained | TrainingFailed | Settled | Tuned) -> None:
        if self._clearing:
            return
        if isinstance(result, Settled):
            self._perform(self._models.settled(result, time.monotonic()))
        elif isinstance(result, Tuned):
            self._folder.put(TUNING, result.data, durable=False)  # torn, it is measured again
        else:
            self._step(result)

    def _tell_of_outages(self, event: Event) -> None:
        if isinstance(event, Disconnected):
            said = self._outage.lost(event, time.monotonic())
            log.log(logging.WARNING if said else logging.DEBUG, "%s", said or event.reason)
        elif isinstance(event, Connected):
            gone = self._outage.over(time.monotonic())
            log.log(logging.WARNING if gone else logging.INFO, "connected to %s%s", self._bundle.broker, gone)

    def _step(self, event: Event) -> None:
        meters = self.device.meters
        meters.bytes_up, meters.bytes_down = self._link.bytes_up, self._link.bytes_down
        meters.memory_bytes = self._process.memory_info().rss
        meters.disk_bytes = self._folder.bytes_written
        meters.step_s, meters.full_step_s = self._worker.step_s, self._worker.full_step_s
        meters.link, meters.power = self.traffic.link_state(), self._senses.power
        self._perform(self.device.step(event, time.monotonic()))
        self._senses.follow(self.device, training=not self._vitals.work.idle)

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                self._publish(effect)
            elif isinstance(effect, (Subscribe, Unsubscribe)):
                if isinstance(effect, Subscribe):
                    self.traffic.asked(effect.topics, time.monotonic())
                self._link.perform(effect)
            elif isinstance(effect, (Save, Drop)):
                self._keep(effect)
            elif isinstance(effect, Train):
                self._begin(effect)
            elif isinstance(effect, Steer):
                self._steer(effect)
            elif isinstance(effect, SetTimer):
                self._timer_s = effect.at_s
            elif isinstance(effect, Note):
                level = logging.WARNING if effect.kind in COMPLAINTS else logging.INFO
                log.log(level, "%s %s", effect.kind, effect.fields)
                self._on_note(effect)
                self._vitals.note(effect, time.monotonic())
                self._senses.note(self.device, effect, time.monotonic())
            elif isinstance(effect, Told):
                self._heed(effect)
            elif isinstance(effect, Finished):
                log.warning("%s", effect.reason)
                self._stopping = True

    def _begin(self, job: Train) -> None:
        self._tried = self._source.appended
        self._senses.begins(self.device, job)
        self._worker.put(job)

    def _steer(self, steer: Steer) -> None:
        if steer.action == "give up":
            self._worker.abandon()
        else:
            self._worker.hold(steer.action == "stand still")

    def _keep(self, effect: Save | Drop) -> None:
        if isinstance(effect, Drop):
            self._folder.delete(effect.name, durable=False)
            return
        self._folder.put(effect.name, bytes(effect.data), durable=effect.id is not None)
        if effect.id is not None:
            self._step(Persisted(effect.id))

    def _heed(self, told: Told) -> None:
        if told.action == "pause":
            self._worker.abandon()
        if not self._clearing:
            self._step(told)

    def _start_anew(self, now: float) -> None:
        """Where the last job failed and samples have come since: perhaps these can be trained on."""
        if not self.device.in_trouble or self._source.appended == self._tried or now < self._anew_s:
            return
        self._tried, self._anew_s = self._source.appended, now + ANEW_S
        boot = secrets.token_bytes(wire.DIGEST_BYTES)
        self._step(DataChanged(boot, self._source.training_size, self._source.validation_size))

    def _publish(self, effect: Publish) -> None:
        effect = self.traffic.leaves(effect)
        self._link.perform(effect if self._sealing is None else self._sealing.seal(effect, time.monotonic()))

    def _trained(self, result: Trained | TrainingFailed | Settled | Tuned) -> None:
        self._results.put(result)
        self._link.wake()

    def _look_at_link(self, now: float) -> None:
        names, assignment = self.device.names, self.device.assignment
        self.traffic.run = "" if names is None else names.run
        self.traffic.number = 0 if assignment is None else assignment.number
        self.traffic.turn(now, busy=self.device.needs_link)
        self._tell_of_rate()

    def _tell_of_rate(self) -> None:
        if not self._clearing and (estimate_bps := self.traffic.news_bps()) is not None:
            self._step(Measured(estimate_bps))
