"""The coordinator's runtime: MQTT events in, effects out, records to disk, and a snapshot now and then.

One thread steps the machine, one writes the store (whatever is queued goes into one transaction, so that a burst of arrivals costs one
fsync), and paho has its own. If the disk fails the gateway stops: it must not promise what it cannot keep.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from broker_server.store import Store
from broker_server.transport import MqttBus
from broker_server.vitals import Vitals
from regrow import checkpoint
from regrow.coordinator import Coordinator, Phase
from regrow.errors import LocalError, RegrowError
from regrow.machine import (
    Connected,
    Disconnected,
    Effect,
    Evaluate,
    Evaluated,
    Event,
    Finished,
    Note,
    Persist,
    Persisted,
    Publish,
    SetTimer,
    Standing,
    Subscribe,
    Unsubscribe,
    Woken,
)
from regrow.outage import Outage
from regrow.task import StoreSettings
from regrow.watchdog import Progress

if TYPE_CHECKING:
    from broker_server.fleet.sealing import Sealing
    from broker_server.instructions import Instructions

log = logging.getLogger(__name__)
POLL_S = 0.5
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The ledger between two writes; it shares the arrays, which the ledger replaces and never changes."""

    meta: bytes
    arrays: dict[str, NDArray[Any]]


class Writer:
    """The store's own thread. Work is done in the order in which it was given; `None` ends it.

    progress: what the thread tells of its advance.
    """

    def __init__(
        self, store: Store, settings: StoreSettings, on_event: Callable[[Event | LocalError], None], progress: Progress | None = None
    ) -> None:
        self._store, self._settings, self._on_event = store, settings, on_event
        self._progress = progress or Progress("store")
        self._work: queue.SimpleQueue[Persist | _Snapshot | None] = queue.SimpleQueue()
        self._given_s: deque[float] = deque()  # when each Persist came that is not durable yet
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    @property
    def lag_s(self) -> float:
        """Age of the oldest Persist that is not durable yet; from the thread that puts."""
        waiting = tuple(self._given_s)
        return time.monotonic() - waiting[0] if waiting else 0.0

    def put(self, work: Persist | _Snapshot) -> None:
        if isinstance(work, Persist):
            self._given_s.append(time.monotonic())
        self._work.put(work)

    def close(self) -> None:
        """Finish what was given, then end."""
        self._work.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                self._progress.end()
                batch = [self._work.get()]
                with suppress(queue.Empty):
                    while True:
                        batch.append(self._work.get_nowait())
                self._progress.begin(f"writing {len(batch)} of its tasks", self._progress.patience.other_s, time.monotonic())
                if not self._write(batch):
                    return
        except LocalError as error:
            self._on_event(error)

    def _write(self, batch: Sequence[Persist | _Snapshot | None]) -> bool:
        """Neighbouring Persists share a transaction; a snapshot is of the log up to itself."""
        waiting: list[Persist] = []
        for work in batch:
            if isinstance(work, Persist):
                waiting.append(work)
                continue
            self._commit(waiting)
            waiting = []
            if work is None:
                return False
            self._store.save_snapshot(self._store.last_id, work.meta, work.arrays)
            self._store.prune(self._settings.keep_snapshots, self._settings.keep_updates)
        self._commit(waiting)
        return True

    def _commit(self, waiting: Sequence[Persist]) -> None:
        if waiting:
            self._store.append([record for persist in waiting for record in persist.records])
            for _ in waiting:
                self._given_s.popleft()
            self._on_event(Persisted(waiting[-1].id))


class Companion(Protocol):
    """A machine beside the coordinator's, on the same link: it hears every event, and None about twice a second for the time alone."""

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> Sequence[Effect]:
        """leads: this process may speak for the task."""


class Gateway:
    """Runs one coordinator until its run ends, another takes over, or it is stopped.

    Args:
        coordinator: with a ledger that is new or replayed from this store.
        store: open for writing; closed by the caller.
        url, username, password: the broker.
        evaluate: scores prefixes on held-out data, on a thread of its own; needed when the task names such data.
        companions: what else this process says to devices, such as the herald of the task's promoted models.
        sealing: of a fleet with keys; without, messages travel bare. Closed here.
        vitals: what looks whether it gets anywhere.
        instructions: what a person has told the run.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        store: Store,
        *,
        url: str,
        username: str,
        password: str,
        evaluate: Callable[[Evaluate], Evaluated] | None = None,
        companions: Sequence[Companion] = (),
        sealing: Sealing | None = None,
        vitals: Vitals | None = None,
        instructions: Instructions | None = None,
    ) -> None:
        self.coordinator, self.store = coordinator, store
        self._instructions = instructions
        self._vitals = vitals or Vitals(store.path)
        self._on_note: Callable[[Note], None] = lambda _: None
        self._housekeeping: Callable[[], str | None] = lambda: None
        self._housekeeping_s = 0.0
        self._events: queue.SimpleQueue[Event | LocalError | None] = queue.SimpleQueue()
        self._writer = Writer(store, coordinator.ledger.task.store, self._events.put, self._vitals.store)
        self._bus = MqttBus(url, client_id=username, username=username, password=password, on_event=self._events.put)
        self._evaluate, self._companions, self._sealing = evaluate, companions, sealing
        self._standing: dict[int, Standing] = {}
        self._evaluating: threading.Thread | None = None
        self._outage = Outage()
        self._timer_s = float("inf")
        self._snapshot_version = coordinator.ledger.version
        self._finished = ""

    @property
    def store_lag_s(self) -> float:
        """Age of the oldest record that is not durable yet."""
        return self._writer.lag_s

    @property
    def connected(self) -> bool:
        """Whether the broker is there."""
        return self._bus.connected

    @property
    def paused(self) -> bool:
        """Whether a person has told the run to give out no new work."""
        return self._instructions is not None and self._instructions.told.paused

    def stop(self) -> None:
        """End `run` soon; from any thread or a signal handler."""
        self._events.put(None)

    def nudge(self) -> None:
        """Let the coordinator look now at what it has to do: new instructions have come; from any thread."""
        self._events.put(Woken())

    def run(self, *, on_note: Callable[[Note], None] = lambda _: None, housekeeping: Callable[[], str | None] = lambda: None) -> str:
        """Serve. Returns why it ended; "" when it was stopped and the run can go on later.

        Args:
            on_note: called with every note, after it went into the metrics.
            housekeeping: called about twice a second; what it returns is logged.

        Raises:
            LocalError: the disk failed, or the broker cannot be kept alive.
        """
        self._on_note, self._housekeeping = on_note, housekeeping
        if self._sealing is not None:
            self._sealing.wait()
        self._bus.start()
        try:
            while not self._finished:
                event = self._next_event()
                if isinstance(event, LocalError):
                    raise event
                if event is None:
                    break
                heard = event if self._sealing is None else self._sealing.open(event, time.monotonic())
                if heard is not None:
                    self._take(heard)
            self._snapshot()  # not after an error: the ledger may then be ahead of the log
            if self._sealing is not None:
                self._sealing.close(time.monotonic())
        finally:
            if self._sealing is not None:
                self._sealing.abandon()
            self._vitals.stopping()
            self._writer.close()
            self._bus.close()
            if self._evaluating is not None:  # onnxruntime must not be at work when the interpreter ends: C++ would abort
                self._evaluating.join(CLOSE_S)
        return self._finished

    def _take(self, event: Event) -> None:
        self._tell_of_outages(event)
        told = self._instructions
        for heard in (event,) if told is None else told.before(event, self.coordinator.ledger.devices):
            self._perform(self.coordinator.step(heard, time.monotonic()))
        self._accompany(event)
        self._snapshot_if_due()

    def _accompany(self, event: Event | None) -> None:
        for number, companion in enumerate(self._companions):
            for effect in companion.step(event, time.monotonic(), leads=self.coordinator.phase is Phase.LEADING):
                self._perform((self._resting(number, effect) if isinstance(effect, Standing) else effect,))

    def _resting(self, number: int, standing: Standing) -> Standing:
        """Who rests for any of the companions."""
        self._standing[number] = standing
        every = self._standing.values()
        return Standing(frozenset().union(*(one.paused for one in every)), frozenset().union(*(one.draining for one in every)))

    def _tell_of_outages(self, event: Event) -> None:
        said = ""
        if isinstance(event, Disconnected):
            said = self._outage.lost(event, time.monotonic())
        elif isinstance(event, Connected) and (gone := self._outage.over(time.monotonic())):
            said = f"connected to the broker{gone}"
        if said:
            log.warning("%s", said)

    def _next_event(self) -> Event | LocalError | None:
        while True:
            now = time.monotonic()
            if now >= self._housekeeping_s:
                self._housekeeping_s = now + POLL_S
                said = self._housekeeping()
                if said:
                    log.warning("%s", said)
                if self._sealing is not None:
                    self._perform(self._sealing.tend(now))
                self._accompany(None)
                self._bus.tend()
                self._look_at_vitals(now)
            if self._timer_s <= now and self._events.empty():
                self._timer_s = float("inf")
                return Woken()
            try:
                return self._events.get(timeout=max(0.0, min(self._timer_s - now, POLL_S)))
            except queue.Empty:
                continue

    def _look_at_vitals(self, now: float) -> None:
        dead = "" if self._writer.alive else "store"
        dead = dead or ("" if self._bus.alive else "link")
        self._vitals.turn(now, connected=self._bus.connected, phase=self.coordinator.phase.value, dead=dead)

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                self._bus.perform(effect if self._sealing is None else self._sealing.seal(effect, time.monotonic()))
            elif isinstance(effect, (Subscribe, Unsubscribe)):
                self._bus.perform(effect)
            elif isinstance(effect, Persist):
                self._writer.put(effect)
            elif isinstance(effect, SetTimer):
                self._timer_s = effect.at_s
            elif isinstance(effect, Evaluate):
                self._begin_evaluation(effect)
            elif isinstance(effect, Note):
                self.store.metric(effect.kind, effect.fields)
                self._on_note(effect)
                self._vitals.note(effect, time.monotonic())
            elif isinstance(effect, Standing):
                self._events.put(effect)
            elif isinstance(effect, Finished):
                self._finished = effect.reason

    def _begin_evaluation(self, effect: Evaluate) -> None:
        """One at a time: where evaluating takes longer than aggregating, versions between are left out."""
        evaluate = self._evaluate
        if evaluate is None:
            raise LocalError("the task names [evaluation] data, but this gateway was started without it")
        if self._evaluating is not None and self._evaluating.is_alive():
            return

        progress = self._vitals.evaluation
        progress.begin(f"evaluation of version {effect.version}", progress.patience.other_s, time.monotonic())

        def work() -> None:
            try:
                self._events.put(evaluate(effect))
            except RegrowError as error:
                self._events.put(LocalError(f"evaluation of version {effect.version}: {error}"))
            progress.end()

        self._evaluating = threading.Thread(target=work, name="evaluation", daemon=True)
        self._evaluating.start()

    def _snapshot_if_due(self) -> None:
        every = self.coordinator.ledger.task.store.snapshot_every
        if self.coordinator.ledger.version >= self._snapshot_version + every:
            self._snapshot()

    def _snapshot(self) -> None:
        ledger = self.coordinator.ledger
        self._snapshot_version = ledger.version
        meta, arrays = checkpoint.dump(ledger)
        self._writer.put(_Snapshot(meta, arrays))
