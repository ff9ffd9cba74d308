"""Is the model the one that the receipted updates give? The durable log, replayed through the papers' pseudocode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_server.runs import load_task
from broker_server.store import Store
from regrow import aggregate, records, reference
from regrow.errors import LocalError
from regrow.ledger import MEANS, Ledger
from regrow.publication import version_of
from regrow.recombination import shuffles

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Outcome:
    """worst: the largest difference, in units of the tolerance; at most 1.0 means that the run checks out."""

    updates: int
    aggregations: int
    worst: float


class _Oracle:
    """The run as reference.py sees it: dense masks, flat coordinates, float64."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.weights: NDArray[np.float64] = ledger.flat_weights.astype(np.float64)
        self._buffer: dict[str, tuple[int, int, NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]] = {}
        self._arrived: dict[str, None] = {}
        self._trained: list[NDArray[np.float64]] = []
        self.worst = 0.0

    def accept(self, entry: records.Accepted, payload: bytes) -> None:
        """Take w_i on its mask; quantised uploads are deltas on the base that the log says was published."""
        trained, base, presence = self._ledger.reconstruct(entry, payload)
        where = self._ledger.orders[entry.epoch].order.coordinates[: trained.size]
        n = self._ledger.layout.size
        mask, values, bases = np.zeros(n, np.bool_), np.zeros(n), np.zeros(n)
        mask[where], values[where], bases[where] = True if presence is None else presence, trained, base
        self._buffer[entry.device] = (version_of(entry.version), entry.examples, mask, values, bases)
        self._arrived[entry.device] = None

    def aggregate(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(next W, the scale that the tolerance is relative to)."""
        method, k = self._ledger.task.method, self._ledger.version
        if method.max_staleness:
            self._buffer = {who: held for who, held in self._buffer.items() if k - held[0] <= method.max_staleness}
        decay = aggregate.staleness(method.staleness, a=method.staleness_a, b=method.staleness_b)
        everyone = method.buffered and method.aggregation in MEANS
        members = [
            reference.DenseUpdate(mask, values, decay(k - version) * (examples if method.weigh_by_examples else 1), base)
            for who, (version, examples, mask, values, base) in self._members(everyone)
        ]
        self._trained = [self._buffer[who][3] for who in sorted(self._arrived) if who in self._buffer]
        self._arrived.clear()
        scale = reference.magnitude(self.weights, members, with_bases=method.aggregation not in MEANS)
        return reference.next_model(method.aggregation, self.weights, members, method.eta_g, method.mixing), scale

    def _members(self, everyone: bool) -> list[tuple[str, tuple[int, int, NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]]]:
        return sorted(self._buffer.items()) if everyone else [(who, self._buffer[who]) for who in self._arrived if who in self._buffer]

    def differs_when_recombined(self) -> bool:
        """Whether the models handed out next are others than the reference's; nothing is calculated there, so every bit counts."""
        ledger = self._ledger
        if not ledger.recombined:
            return False
        chosen = shuffles(ledger.layout, ledger.task.seed, ledger.version, len(self._trained))
        wanted = reference.recombine(self._trained, ledger.layout, list(chosen.values()))
        coordinates = ledger.order.coordinates
        return not all(np.array_equal(model, dense[coordinates]) for model, dense in zip(ledger.recombined, wanted, strict=True))

    def reset(self, flat: NDArray[np.float32]) -> None:
        """After a rollback the model is the snapshot's and the buffer is empty."""
        self.weights = flat.astype(np.float64)
        self._buffer.clear()
        self._arrived.clear()


def audit(run: Path) -> Outcome:
    """Compare every aggregation of a run with the reference.

    The published bases are taken from the replay, because devices' deltas are relative to those rounded values; everything else
    follows the papers' pseudocode in float64.

    Raises:
        LocalError: the log is not complete: the task did not say `[store] keep_updates = true`.
    """
    folder = load_task(run / "task")
    ledger = Ledger.start(folder.task, folder.layout, folder.initial, folder.units)
    oracle = _Oracle(ledger)
    updates = aggregations = 0
    with Store.open(run, read_only=True) as store:
        for log_id, record in store.replay():
            entry = records.from_record(record)
            try:
                if isinstance(entry, records.Accepted):
                    oracle.accept(entry, bytes(record.payload))
                    updates += 1
                wanted, scale = oracle.aggregate() if isinstance(entry, records.Aggregated) else (oracle.weights, None)
                ledger.apply(entry, record.payload)
            except KeyError as error:
                raise LocalError(f"{run}: record {log_id} ({record.kind}) refers to {error}, which the log does not hold") from error
            if scale is not None:
                # A sum of steps collects their roundings: there each step is checked from where the run itself was.
                steps = folder.task.method.aggregation not in MEANS
                oracle.weights = ledger.flat_weights.astype(np.float64) if steps else wanted
                aggregations += 1
                difference = np.abs(ledger.flat_weights - wanted)
                allowed = TOLERANCE * scale
                oracle.worst = max(oracle.worst, _ratio(difference, allowed), np.inf if oracle.differs_when_recombined() else 0.0)
            elif isinstance(entry, records.RolledBack):
                oracle.reset(ledger.flat_weights)
            _compare_snapshot(store, log_id, ledger)
    return Outcome(updates, aggregations, oracle.worst)


def _compare_snapshot(store: Store, log_id: int, ledger: Ledger) -> None:
    """Raise LocalError if there is a snapshot at this record that is not, bit for bit, what the log gives."""
    if log_id not in {info.log_id for info in store.snapshots()}:
        return
    found = store.load_snapshot(log_id)
    if found is not None and found[0] == log_id and not np.array_equal(found[2]["flat_weights"], ledger.flat_weights):
        raise LocalError(f"{store.path}: the snapshot at record {log_id} is not what the log gives; remove it and start the gateway again")


def _ratio(difference: NDArray[np.float64], allowed: NDArray[np.float64]) -> float:
    exact = difference == 0
    return float(np.where(exact, 0.0, difference / np.where(allowed > 0, allowed, np.finfo(np.float64).tiny)).max())
