"""A World that remembers every message, can die at any durable step, and is checked against the papers' pseudocode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow import aggregate, checkpoint, records, reference, topics, wire
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import MEANS, Ledger
from regrow.machine import Effect, Event, Persist, Publish, Received, Record
from regrow.publication import version_of
from regrow.recombination import shuffles
from regrow.task import Task
from testbed.memory import COORDINATOR, Client, World, saved_of
from tests.regrow.fleet import LAYOUT, LINKS, UNITS, identity, new_coordinator, programs_of, start_ledger, train

NAMES = topics.Run("toy", "r1")
TWO = {"d0": 4_000_000.0, "d1": 400_000.0}
TOLERANCE = 1e-6


class Tape(World):
    """`sent`: (time, sender, topic, payload) of everything that was published.

    With `crash_at` = (k, after) the coordinator dies at its k-th Persist: before it is written, or after it and before `Persisted`.
    """

    crash_at: tuple[int, bool] | None = None
    persists = 0
    crashed = False

    def __init__(self, trainer: Any = train, *, latency_s: float = 0.01, persist_s: float = 0.001) -> None:
        super().__init__(trainer, latency_s=latency_s, persist_s=persist_s)
        self.sent: list[tuple[float, str, str, bytes]] = []

    def _publish(self, name: str, client: Client, effect: Publish) -> None:
        if client.connected:
            self.sent.append((self.now, name, effect.topic, bytes(effect.payload)))
        super()._publish(name, client, effect)

    def _perform(self, name: str, effects: Sequence[Effect]) -> None:
        if name == COORDINATOR:
            for index, effect in enumerate(effects):
                if not isinstance(effect, Persist):
                    continue
                self.persists += 1
                if self.crash_at is not None and self.persists == self.crash_at[0]:
                    super()._perform(name, effects[: index + self.crash_at[1]])
                    self.kill(COORDINATOR)
                    self.crashed = True
                    return
        super()._perform(name, effects)

    def coordinator(self) -> Coordinator:
        machine = self.clients[COORDINATOR].machine
        if not isinstance(machine, Coordinator):
            raise TypeError("no coordinator")
        return machine

    def device(self, name: str) -> Device:
        machine = self.clients[name].machine
        if not isinstance(machine, Device):
            raise TypeError("no device")
        return machine

    def ended(self) -> bool:
        return COORDINATOR in self.finished

    def finish(self, within_s: float = 600.0) -> None:
        """Run to the end of the run, and a little longer, so that everybody hears of it."""
        self.run(self.now + within_s, stop=self.ended)
        if not self.ended():
            raise AssertionError(f"the run has not ended within {within_s} s: version {self.coordinator().ledger.version}")
        self.run(self.now + 5.0)

    def notes_of(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        return [note.fields for _, who, note in self.notes if note.kind == kind and name in (None, who)]

    def reboot(self, name: str, boot: int = 1, install: int = 0, *, uplink_bps: float | None = None) -> Device:
        """The device's process dies and starts again from what it had saved."""
        old = self.clients[name]
        self.kill(name)
        device = Device(identity(name, boot, install), saved_of(self, name), uplink_bps)
        self.add(name, device, up_bps=old.up_bps, down_bps=old.down_bps)
        return device


def begin(settings: Task, links: Mapping[str, float] = LINKS, trainer: Any = train, **options: float) -> Tape:
    world = Tape(trainer, **options)
    world.add(COORDINATOR, new_coordinator(settings))
    for name, bps in links.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    return world


def replay(log: Sequence[Record], settings: Task) -> Ledger:
    ledger = start_ledger(settings)
    for record in log:
        ledger.apply_record(record)
    return ledger


def fingerprint(ledger: Ledger) -> tuple[bytes, dict[str, bytes]]:
    """Every bit of a ledger."""
    meta, arrays = checkpoint.dump(ledger)
    return meta, {name: array.tobytes() for name, array in arrays.items()}


def replay_with_snapshot(log: Sequence[Record], settings: Task, at: int) -> Ledger:
    """The first `at` records through a snapshot, the rest replayed on top."""
    meta, arrays = checkpoint.dump(replay(log[:at], settings))
    ledger = checkpoint.load(settings, start_ledger(settings).layout, meta, {name: array.copy() for name, array in arrays.items()}, UNITS)
    for record in log[at:]:
        ledger.apply_record(record)
    return ledger


def restart_coordinator(
    world: Tape, settings: Task, *, nonce: int = 8, snapshot_at: int | None = None, takeover: bool = False
) -> Coordinator:
    """The coordinator's next life, from the durable log, with a snapshot in the middle where asked for."""
    log = world.log
    ledger = replay(log, settings) if snapshot_at is None else replay_with_snapshot(log, settings, min(snapshot_at, len(log)))
    coordinator = Coordinator(ledger, "r1", programs_of(settings), nonce, takeover=takeover)
    world.add(COORDINATOR, coordinator)
    return coordinator


def worst_difference(log: Sequence[Record], settings: Task) -> float:
    """The log replayed through reference.py: the largest difference, in units of 1e-6 * max(|W_prev|, sum beta|w| / sum beta)."""
    ledger = start_ledger(settings)
    weights = ledger.flat_weights.astype(np.float64)
    held: dict[str, tuple[int, int, NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]] = {}
    arrived: dict[str, None] = {}
    worst = 0.0
    for record in log:
        entry = records.from_record(record)
        if isinstance(entry, records.Accepted):
            trained, base, presence = ledger.reconstruct(entry, record.payload)
            where = ledger.orders[entry.epoch].order.coordinates[: trained.size]
            mask, dense, bases = np.zeros(LAYOUT.size, np.bool_), np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
            mask[where], dense[where], bases[where] = True if presence is None else presence, trained, base
            held[entry.device] = (version_of(entry.version), entry.examples, mask, dense, bases)
            arrived[entry.device] = None
        if not isinstance(entry, records.Aggregated):
            ledger.apply(entry, record.payload)
            continue
        wanted, scale = _oracle(ledger, settings, weights, held, arrived)
        ledger.apply(entry, record.payload)
        _check_recombined(ledger, [held[who][3] for who in sorted(arrived)])
        arrived.clear()
        difference = np.abs(ledger.flat_weights - wanted)
        worst = max(worst, float((difference / np.maximum(TOLERANCE * scale, 1e-300)).max()))
        # A sum of steps collects their roundings: there each step is checked from where the run itself was.
        weights = wanted if settings.method.aggregation in MEANS else ledger.flat_weights.astype(np.float64)
    return worst


def _oracle(
    ledger: Ledger, settings: Task, weights: NDArray[np.float64], held: Mapping[str, Any], arrived: Mapping[str, None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    method, k = settings.method, ledger.version
    decay = aggregate.staleness(method.staleness, a=method.staleness_a, b=method.staleness_b)
    everyone = method.buffered and method.aggregation in MEANS
    chosen = sorted(held.items()) if everyone else [(who, held[who]) for who in arrived if who in held]
    members = [
        reference.DenseUpdate(mask, dense, decay(k - version) * (examples if method.weigh_by_examples else 1), base)
        for _, (version, examples, mask, dense, base) in chosen
    ]
    scale = reference.magnitude(weights, members, with_bases=method.aggregation not in MEANS)
    return reference.next_model(method.aggregation, weights, members, method.eta_g, method.mixing), scale


def _check_recombined(ledger: Ledger, clients: Sequence[NDArray[np.float64]]) -> None:
    """Nothing is calculated when layers are shuffled, so the reference's models are met to the bit."""
    if not ledger.recombined:
        return
    chosen = shuffles(ledger.layout, ledger.task.seed, ledger.version, len(clients))
    wanted = reference.recombine(clients, ledger.layout, list(chosen.values()))
    for model, dense in zip(ledger.recombined, wanted, strict=True):
        assert np.array_equal(model, dense[ledger.order.coordinates])


def receipts(world: Tape) -> list[tuple[str, wire.Receipt]]:
    """(device, receipt) of everything that coordinators said about updates."""
    found = []
    for _, _, topic, payload in world.sent:
        if topic.endswith("/receipt"):
            found.append((topic.split("/")[-2], wire.decode(payload, wire.Receipt)[0]))
    return found


def accepted_in_log(log: Sequence[Record]) -> list[tuple[str, str, int]]:
    entries = [records.from_record(record) for record in log]
    return [(entry.device, entry.install, entry.sequence) for entry in entries if isinstance(entry, records.Accepted)]


def check_run(world: Tape, settings: Task) -> None:
    """What holds at the end of every run, whatever happened in it."""
    counted = accepted_in_log(world.log)
    assert len(counted) == len(set(counted)), "an update counts twice"
    promised = {(who, said.install.hex(), said.sequence) for who, said in receipts(world) if said.outcome == "accepted"}
    assert promised <= set(counted), "a receipted update is lost"
    ledger = world.coordinator().ledger
    assert fingerprint(replay(world.log, settings)) == fingerprint(ledger), "the log does not give the live ledger"
    assert worst_difference(world.log, settings) <= 1.0


def leftovers(world: World) -> list[str]:
    """Retained topics besides empty task lists."""
    left = []
    for topic, payload in world.retained.items():
        if not topic.endswith("/tasks") or wire.decode(payload, wire.Tasks)[0].tasks:
            left.append(topic)
    return left


def feed(world: Tape, name: str, event: Event) -> None:
    """One event for one machine, now."""
    world._perform(name, world.clients[name].machine.step(event, world.now))


def inject(world: Tape, topic: str, payload: bytes) -> None:
    """A message from nowhere reaches the coordinator, now."""
    feed(world, COORDINATOR, Received(topic, payload))


def phase_reached(world: Tape, name: str, phase: Any) -> Callable[[], bool]:
    return lambda: world.clients[name].machine.phase is phase


def snapshot(thing: Any, skip: frozenset[str] = frozenset({"now"}), seen: frozenset[int] = frozenset()) -> Any:
    """Any object as comparable plain values; cycles end, `skip` names attributes that may change."""
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    if isinstance(thing, (str, bytes, int, float, bool, type(None))) or callable(thing):
        return thing
    if id(thing) in seen:
        return "..."
    seen = seen | {id(thing)}
    if isinstance(thing, Mapping):
        return {str(key): snapshot(value, skip, seen) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set, frozenset)) or type(thing).__name__ == "deque":
        items = [snapshot(item, skip, seen) for item in thing]
        return sorted(items, key=repr) if isinstance(thing, (set, frozenset)) else items
    names = list(getattr(thing, "__dict__", {})) + [slot for kind in type(thing).__mro__ for slot in getattr(kind, "__slots__", ())]
    fields = getattr(thing, "__struct_fields__", ())
    return {name: snapshot(getattr(thing, name, None), skip, seen) for name in sorted({*names, *fields} - skip)}
