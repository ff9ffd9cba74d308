"""What the coordinator knows for certain: the fold of its durable records.

`apply` is the only way in, live and at a restart alike, and it draws on nothing but the record, so a replay ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow import aggregate, indexset, moves, personal, records, restoration, values
from regrow.aggregate import Update
from regrow.density import remember_round
from regrow.errors import LocalError
from regrow.levels import densities_of, next_order, only_prefix
from regrow.machine import Payload, Record
from regrow.member import Device, Lease
from regrow.order import Order, importance
from regrow.parameters import Layout
from regrow.publication import CodedOrder, Publication, slot_of, version_of
from regrow.recombination import recombine, shuffles
from regrow.shelf import Buffered, Shelf, in_memory, reexpressed, shelved
from regrow.task import Task
from regrow.units import Units

RETIRED_REMEMBERED = 32
MEANS = ("mask", "plain", "recombine")  # the new model is a mean of models: everybody's latest may count
MOVES = ("gradient", "delta", "adaptive")  # it is the old one moved by changes: each counts once, and needs the base it started from

Reconstructed = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_] | None]


@dataclass
class Ledger:
    """The durable state of a run. Vectors are float32 [n] in the position order of the current epoch.

    `elapsed_s`: how long the run had been led at the last aggregation; `began_s`: at the first one, since before it the gateway may have
    waited for its fleet. `published` goes by number (publication.number_of). `recombined` are this version's models by slot, empty unless
    it has several. `at_hand` is the latest that `reconstruct` made, until its update is in.
    """

    task: Task
    layout: Layout
    weights: NDArray[np.float32]
    coded: CodedOrder
    anchor: NDArray[np.float32]
    squares: NDArray[np.float32]
    recombined: list[NDArray[np.float32]] = field(default_factory=list)
    version: int = 0
    since_refresh: int = 0
    elapsed_s: float = 0.0
    began_s: float = 0.0
    devices: dict[str, Device] = field(default_factory=dict)
    buffer: dict[str, Buffered] = field(default_factory=dict)
    arrived: dict[str, None] = field(default_factory=dict)
    orders: dict[int, CodedOrder] = field(default_factory=dict)
    published: dict[int, Publication] = field(default_factory=dict)
    retired: list[tuple[int, int]] = field(default_factory=list)
    retired_orders: list[tuple[int, list[int]]] = field(default_factory=list)
    norms: dict[int, list[float]] = field(default_factory=dict)
    restoration: restoration.RestorationState = field(default_factory=restoration.RestorationState)
    global_score: float | None = None
    level_scores: dict[float, float] = field(default_factory=dict)
    trained_out: bool = False
    finished: str = ""
    term: int = 0
    units: Units | None = None
    shelf: Shelf = in_memory
    at_hand: tuple[bytes, tuple[int, int, int, str], Reconstructed] | None = None

    @classmethod
    def start(
        cls, task: Task, layout: Layout, initial: NDArray[np.float32], units: Units | None = None, shelf: Shelf = in_memory
    ) -> Ledger:
        """The ledger before the first record.

        Args:
            initial: float32 [n] by flat coordinate.
            units: of the model, for granularity "unit".
            shelf: where the arrays of `buffer` lie.
        """
        if initial.dtype != np.float32 or initial.shape != (layout.size,) or not np.isfinite(initial).all():
            raise LocalError(f"initial model: expected {layout.size} finite float32 values; rebuild the task with `regrow task build`")
        order = next_order(task, layout, units, importance("w", initial), initial, epoch=0)
        coded = CodedOrder.of(order)
        weights = initial[order.coordinates]
        return cls(task, layout, weights, coded, weights.copy(), np.zeros_like(weights), orders={0: coded}, units=units, shelf=shelf)

    @property
    def order(self) -> Order:
        return self.coded.order

    @property
    def flat_weights(self) -> NDArray[np.float32]:
        """W_k, float32 [n] by flat coordinate."""
        flat = np.empty_like(self.weights)
        flat[self.order.coordinates] = self.weights
        return flat

    @property
    def trained_weights(self) -> NDArray[np.float32]:
        """What there is to deploy, float32 [n] by flat coordinate: W_k.

        While nobody trains all of it, the largest part that somebody does, 0 elsewhere, as the global score is of that level; W_k all the
        same where every round trains another part (FedRolex).
        """
        largest = max((device.density for device in self.devices.values()), default=1.0)
        if largest >= 1.0 or self.task.method.importance == "rolling":
            return self.flat_weights
        return only_prefix(self.order, self.flat_weights, self.reach(self.order, self.level_of(largest)))

    def level_of(self, density: float) -> int:
        """The lowest level that holds this density."""
        return next(level for level, rung in enumerate(densities_of(self.task)) if rung >= density - 1e-9)

    def density_of(self, level: int) -> float:
        return densities_of(self.task)[level]

    def reach(self, order: Order, level: int) -> int:
        """How many positions a device of this level fetches and its update speaks of: all of them where masks are personal."""
        return order.size if self.task.method.local == "personal_masks" else order.lengths[level]

    def largest_update_bytes(self, order: Order, level: int, dtype: values.WireDtype) -> int:
        """The bytes of this level's updates; with personal masks the most that they can have."""
        mask_bytes = personal.bitmap_bytes(order.size) if self.task.method.local == "personal_masks" else 0
        return mask_bytes + values.encoded_size(dtype, self.reach(order, level), order.always_kept)

    def apply(self, entry: records.Entry, payload: Payload = b"") -> None:
        """Take one durable fact in."""
        _APPLY[type(entry)](self, entry, payload)

    def apply_record(self, record: Record) -> None:
        self.apply(records.from_record(record), record.payload)

    def reconstruct(self, entry: records.Accepted, payload: Payload) -> Reconstructed:
        """(w_i, base, presence): float32 [length] each, in the position order of the update's epoch; nobody writes to them.

        presence: bool [length], None where all are present; w_i and base are 0 where nothing is. An update is checked and then taken in:
        what it made is kept in between.

        Raises:
            PeerError: the payload is not such an update.
        """
        source = (entry.version, entry.epoch, entry.level, entry.dtype)
        if self.at_hand is not None and self.at_hand[0] is payload and self.at_hand[1] == source:
            return self.at_hand[2]
        made = self._reconstructed(entry, payload)
        self.at_hand = (payload, source, made) if isinstance(payload, bytes) else None  # other buffers may change
        return made

    def _reconstructed(self, entry: records.Accepted, payload: Payload) -> Reconstructed:
        publication = self.published[entry.version]
        order = publication.order
        base = publication.base(self.reach(order, entry.level))
        presence = None
        if self.task.method.local == "personal_masks":
            presence, payload = personal.split(payload, order.size, order.always_kept, order.lengths[entry.level])
            base = base[presence]
        sent = values.decode(payload, entry.dtype, base.size, order.always_kept)
        # Quantised uploads carry w_i - base, but always-kept values travel as float32 and as deltas too, so one rule serves both.
        trained = base + sent if entry.dtype in values.DELTA_DTYPES else sent
        if presence is None or presence.all():
            return trained, base, None
        return personal.spread(trained, presence), personal.spread(base, presence), presence


# ---- one function per kind of record -------------------------------------------------------------------------------------------------


def _led(ledger: Ledger, entry: records.Led, _: Payload) -> None:
    ledger.term = entry.term


def _joined(ledger: Ledger, entry: records.Joined, _: Payload) -> None:
    known = ledger.devices.get(entry.device)
    if known is None:
        device = Device(entry.install, entry.uplink_bps, entry.density, first_density=entry.density, boot=entry.boot)
        device.step_s, device.memory_density, device.bound_by = entry.step_s, entry.memory_density, entry.bound_by
        device.uncut_density, device.uncut_by = entry.uncut_density or entry.density, entry.uncut_by
        ledger.devices[entry.device] = device
        return
    known.uplink_bps, known.boot = entry.uplink_bps, entry.boot
    known.step_s, known.memory_density = entry.step_s, entry.memory_density
    known.cut_to_ceiling()
    known.rejections, known.declined = 0, False
    if known.install != entry.install:
        known.install, known.last_sequence = entry.install, -1


def _limited(ledger: Ledger, entry: records.Limited, _: Payload) -> None:
    device = ledger.devices[entry.device]
    device.limit_density = entry.density
    device.cut_to_ceiling()


def _assigned(ledger: Ledger, entry: records.Assigned, _: Payload) -> None:
    device = ledger.devices[entry.device]
    device.number = entry.number
    device.lease = Lease(entry.number, entry.version, entry.epoch, entry.level, entry.deadline_s, entry.evaluate_level, entry.dtype)
    device.rounds_since_full = 0 if entry.evaluate_level is not None else device.rounds_since_full + 1
    if ledger.task.method.density == "relative":
        device.set_density(ledger.density_of(entry.level))  # round times decide anew with every assignment


def _accepted(ledger: Ledger, entry: records.Accepted, payload: Payload) -> None:
    device = ledger.devices[entry.device]
    trained, base, presence = ledger.reconstruct(entry, payload)
    ledger.at_hand = None
    old = ledger.orders[entry.epoch].order
    keeps_base = ledger.task.method.aggregation in MOVES
    update, base_update = Update(trained, presence), Update(base, presence)
    if entry.epoch != ledger.order.epoch:
        update = aggregate.reexpress(update, old, ledger.order)
        base_update = aggregate.reexpress(base_update, old, ledger.order)
    held = Buffered(update, entry.version, entry.examples, base_update.values if keeps_base else None)
    ledger.buffer[entry.device] = shelved(held, ledger.shelf)
    ledger.arrived[entry.device] = None
    _close(device, entry.sequence, accepted=True)
    device.updates += 1
    device.rejections = 0
    device.rounds_in_epoch += entry.epoch == ledger.order.epoch
    device.uplink_bps = entry.uplink_bps
    device.full_round_s = list(remember_round(device.full_round_s, entry.round_s, ledger.task.method.round_window))
    for score in entry.scores:
        device.reports[score.level] = score
    ledger.norms[entry.level] = [*ledger.norms.get(entry.level, []), entry.norm][-32:]


def _rejected(ledger: Ledger, entry: records.Rejected, _: Payload) -> None:
    device, ledger.at_hand = ledger.devices[entry.device], None
    _close(device, entry.sequence, accepted=False, reason=entry.reason, blame=entry.blame)
    device.rejections += entry.blame


def _close(device: Device, sequence: int, *, accepted: bool, reason: str = "", blame: bool = False) -> None:
    device.lease = None
    device.last_sequence, device.last_accepted, device.last_reason, device.last_blamed = sequence, accepted, reason, blame


def _released(ledger: Ledger, entry: records.Released, _: Payload) -> None:
    device = ledger.devices[entry.device]
    device.lease = None
    device.rejections += entry.blame
    device.declined |= entry.declined


def _aggregated(ledger: Ledger, entry: records.Aggregated, _: Payload) -> None:
    limit = ledger.task.method.max_staleness
    if limit:
        ledger.buffer = {who: held for who, held in ledger.buffer.items() if ledger.version - version_of(held.version) <= limit}
    previous = ledger.weights
    ledger.weights = _mean(ledger)
    ledger.recombined = _recombined(ledger, entry.version)
    ledger.squares = ledger.squares + np.square(ledger.weights - previous)
    if ledger.version == 0:
        ledger.began_s = entry.elapsed_s
    ledger.version, ledger.elapsed_s = entry.version, entry.elapsed_s
    ledger.since_refresh += 1
    ledger.arrived = {}


def _recombined(ledger: Ledger, version: int) -> list[NDArray[np.float32]]:
    """The models that devices train on next, where that is not the mean itself."""
    task = ledger.task
    if task.method.aggregation != "recombine" or version <= task.method.recombine_after:
        return []
    models = [ledger.buffer[who].update.values for who in sorted(ledger.arrived) if who in ledger.buffer]
    return recombine(models, ledger.layout, ledger.order, shuffles(ledger.layout, task.seed, version, len(models)))


def _mean(ledger: Ledger) -> NDArray[np.float32]:
    """The next global model from the buffer (or, unbuffered and for gradients, from this aggregation's arrivals)."""
    method = ledger.task.method
    everyone = method.buffered and method.aggregation in MEANS
    arrived = [who for who in ledger.arrived if who in ledger.buffer]  # in the order in which they came
    members = [ledger.buffer[who] for who in (sorted(ledger.buffer) if everyone else arrived)]
    if not members:
        return ledger.weights.copy()
    decay = aggregate.staleness(method.staleness, a=method.staleness_a, b=method.staleness_b)
    betas = [decay(ledger.version - version_of(held.version)) * (held.examples if method.weigh_by_examples else 1) for held in members]
    weights = np.array(betas)
    updates = [held.update for held in members]
    if method.aggregation == "plain":
        return aggregate.fed_avg(ledger.weights, updates, weights)
    if method.aggregation in ("mask", "recombine"):
        return aggregate.mask_fed_avg(ledger.weights, updates, weights, ledger.order.segments(), eta_g=method.eta_g)
    if method.aggregation == "mix":
        return moves.mix(ledger.weights, updates, method.mixing * weights)
    bases = [held.base for held in members if held.base is not None]
    if method.aggregation == "delta":
        return moves.add_deltas(ledger.weights, updates, bases, method.eta_g / len(members) * weights)
    if method.aggregation == "adaptive":
        return moves.adaptive_steps(ledger.weights, updates, bases, method.eta_g)
    return moves.gradient_average(ledger.weights, updates, bases, weights)


def _refreshed(ledger: Ledger, entry: records.Refreshed, payload: Payload) -> None:
    old = ledger.order
    view, levels, start = memoryview(payload), [], 0
    for size in entry.sizes:
        levels.append(bytes(view[start : start + size]))
        start += size
    always_kept = ledger.layout.always_kept_coordinates
    coordinates = indexset.decode_prefix(ledger.layout.size, always_kept, tuple(entry.lengths), levels)
    order = Order(entry.epoch, coordinates, tuple(entry.lengths), old.always_kept)
    moved = old.position_of[order.coordinates]
    ledger.weights = ledger.weights[moved]
    ledger.anchor = ledger.weights.copy()
    ledger.squares = ledger.squares[moved]
    ledger.coded = CodedOrder(order, tuple(levels))
    ledger.orders[entry.epoch] = ledger.coded
    ledger.since_refresh = 0
    for who, held in ledger.buffer.items():  # one by one, so that each new array can take an old one's place
        ledger.buffer[who] = shelved(reexpressed(held, old, order), ledger.shelf)
    for device in ledger.devices.values():
        device.rounds_in_epoch = 0
    _forget_orders(ledger)


def _forget_orders(ledger: Ledger) -> None:
    """An epoch dies with its last version."""
    live = {publication.order.epoch for publication in ledger.published.values()} | {ledger.order.epoch}
    gone = [(epoch, [len(data) for data in coded.levels]) for epoch, coded in ledger.orders.items() if epoch not in live]
    ledger.retired_orders = [*ledger.retired_orders, *gone][-RETIRED_REMEMBERED:]
    ledger.orders = {epoch: coded for epoch, coded in ledger.orders.items() if epoch in live}


def _restored(ledger: Ledger, entry: records.Restored, _: Payload) -> None:
    for who, density in entry.densities.items():
        ledger.devices[who].set_density(density)
    ledger.restoration = msgspec.json.decode(bytes(entry.state), type=restoration.RestorationState)
    ledger.global_score, ledger.trained_out = entry.global_score, entry.finished
    ledger.level_scores = {float(density): score for density, score in entry.scores.items()}


def _published(ledger: Ledger, entry: records.Published, _: Payload) -> None:
    models = ledger.recombined or [ledger.weights]
    slot = slot_of(entry.version)
    if version_of(entry.version) != ledger.version or slot >= len(models):
        raise LocalError(f"store: version {entry.version} published while the model is {ledger.version}; the log is out of order")
    dtype = ledger.task.wire.down
    ledger.published[entry.version] = Publication.of(entry.version, ledger.order, models[slot], dtype, entry.chunk_bytes)


def _retired(ledger: Ledger, entry: records.Retired, _: Payload) -> None:
    gone = ledger.published.pop(entry.version)
    remembered = max(RETIRED_REMEMBERED, 2 * len(ledger.recombined))  # a round's models go all at once
    ledger.retired = [*ledger.retired, (entry.version, len(gone.chunks))][-remembered:]
    _forget_orders(ledger)


def _finished(ledger: Ledger, entry: records.Finished, _: Payload) -> None:
    ledger.finished, ledger.elapsed_s = entry.reason, entry.elapsed_s


def _rolled_back(ledger: Ledger, entry: records.RolledBack, payload: Payload) -> None:
    flat = np.frombuffer(payload, np.float32)
    ledger.weights = flat[ledger.order.coordinates]
    ledger.anchor = ledger.weights.copy()
    ledger.squares = np.zeros_like(ledger.weights)
    ledger.version = entry.version
    ledger.buffer, ledger.arrived, ledger.norms = {}, {}, {}
    ledger.finished, ledger.trained_out, ledger.global_score, ledger.level_scores = "", False, None, {}
    ledger.restoration = restoration.RestorationState()
    for version in sorted(ledger.published):
        _retired(ledger, records.Retired(version=version), b"")
    ledger.recombined = []
    for device in ledger.devices.values():
        device.lease, device.rejections, device.reports = None, 0, {}


_APPLY: Mapping[type[records.Entry], Callable[[Ledger, Any, Payload], None]] = {
    records.Led: _led,
    records.Joined: _joined,
    records.Limited: _limited,
    records.Assigned: _assigned,
    records.Accepted: _accepted,
    records.Rejected: _rejected,
    records.Released: _released,
    records.Aggregated: _aggregated,
    records.Refreshed: _refreshed,
    records.Restored: _restored,
    records.Published: _published,
    records.Retired: _retired,
    records.Finished: _finished,
    records.RolledBack: _rolled_back,
}
