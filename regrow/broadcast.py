"""What lies on the broker for devices to fetch: programs, orders, versions, assignments. Each is published once, republished only after
a reconnect (the broker carries, the coordinator remembers), and cleared when nobody needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from regrow import topics, wire
from regrow.ledger import Ledger
from regrow.machine import Effect, Publish
from regrow.member import Lease
from regrow.publication import PIECE_BYTES, CodedOrder, manifest, program_blobs
from regrow.roster import Roster
from regrow.task import Task

MAX_STEPS = 1_000_000  # of one assignment, by the wire


class Broadcast:
    """The retained messages of one run, in the order that keeps devices right: chunks, manifest, assignment, then clearing."""

    def __init__(
        self,
        ledger: Ledger,
        roster: Roster,
        names: topics.Run,
        programs: Mapping[str, bytes],
        emit: Callable[[Effect], None],
        float32_bytes: Sequence[int] = (),
    ) -> None:
        self.ledger, self.names, self.programs, self._float32_bytes = ledger, names, programs, float32_bytes
        self._roster, self._blobs = roster, program_blobs(programs)
        self.fetching: dict[int, set[str]] = {}
        self._emit = emit
        self._epochs: dict[int, list[int]] = {}
        self._told: set[str] = set()
        self._term = 0

    # ---- publishing --------------------------------------------------------------------------------------------------------------

    def everything(self, term: int) -> None:
        """All that is live, after a (re)connect: the broker may remember nothing, or what an earlier life of ours left there."""
        self._term = term
        self._epochs, self.fetching = {}, {}
        self._clear_retired()
        for data in self.programs.values():
            for piece, body in enumerate(wire.pieces(data, PIECE_BYTES)):
                self._retain(self.names.program(wire.digest(data), piece), body)
        leases = {who: device.lease for who, device in self.ledger.devices.items() if device.lease is not None}
        for version in self.ledger.published:
            self.version(version)
        for who in self.ledger.devices:
            self.tasks(who)
        for who, lease in leases.items():
            self.assignment(who, lease)

    def version(self, version: int) -> None:
        """The chunks and the manifest of a version, and its order's level sets if they are not there yet."""
        publication = self.ledger.published[version]
        coded = self.ledger.orders[publication.order.epoch]
        if publication.order.epoch not in self._epochs:
            self._order(publication.order.epoch, coded)
        for index, chunk in enumerate(publication.chunks):
            self._retain(self.names.chunk(version, index), publication.chunk_data(chunk.start, chunk.stop))
        message = manifest(publication, coded, self._blobs, self._term, self.ledger.task.method.local, self._float32_bytes)
        self._retain(self.names.manifest(version), wire.encode(message))
        self.fetching[version] = set()

    def _order(self, epoch: int, coded: CodedOrder) -> None:
        for level, data in enumerate(coded.levels):
            for piece, body in enumerate(wire.pieces(data, PIECE_BYTES)):
                if len(body):
                    self._retain(self.names.order(epoch, level, piece), body)
        self._epochs[epoch] = [len(data) for data in coded.levels]

    def tasks(self, who: str) -> None:
        """Tell a device that there is this task for it; again with every hello, lest the list of a run that is over stay the last."""
        self._told.add(who)
        reference = wire.TaskRef(task=self.names.task, run=self.names.run, term=self._term)
        self._retain(topics.tasks(who), wire.encode(wire.Tasks(tasks=[reference], heartbeat_s=self.ledger.task.fleet.heartbeat_s)))

    def assignment(self, who: str, lease: Lease) -> None:
        task = self.ledger.task
        device = self.ledger.devices[who]
        self.fetching.setdefault(lease.version, set()).add(who)
        transfer_s = device.density / device.uplink_bps
        message = wire.Assignment(
            term=self._term,
            number=lease.number,
            version=lease.version,
            epoch=lease.epoch,
            level=lease.level,
            steps=local_steps(task, transfer_s, self._roster.transfers.least() or transfer_s),
            batch=task.training.batch,
            learning_rate=learning_rate(self.ledger),
            seed=task.seed * 1_000_003 + lease.number,
            dtype=lease.dtype or task.wire.dtypes[-1],
            chunk_bytes=chunk_bytes(device.uplink_bps),
            deadline_s=lease.deadline_s,
            evaluate_level=lease.evaluate_level,
        )
        self._retain(self.names.assignment(who), wire.encode(message))

    def offer_again(self, lease: Lease, who: str) -> None:
        """The device has started anew and may need parts that had left the broker when it had them."""
        if lease.version not in self.fetching:
            self.version(lease.version)
        self.fetching[lease.version].add(who)

    # ---- clearing ----------------------------------------------------------------------------------------------------------------

    def downloaded(self, version: int, who: str) -> None:
        """This device needs nothing more of this version."""
        self.fetching.get(version, set()).discard(who)

    def on_broker(self) -> list[int]:
        return sorted(self.fetching)

    def tidy(self, newest: int) -> None:
        """Take from the broker every version that nobody is fetching, except the newest, and every order whose epoch is over."""
        for version in [v for v, devices in self.fetching.items() if not devices and v != newest]:
            publication = self.ledger.published.get(version)
            if publication is not None:
                self._clear_version(version, len(publication.chunks))
            del self.fetching[version]
        for epoch in [epoch for epoch in self._epochs if epoch not in self.ledger.orders]:
            self._clear_order(epoch, self._epochs.pop(epoch))

    def gone(self, version: int, chunks: int) -> None:
        """The version was retired."""
        if self.fetching.pop(version, None) is not None:
            self._clear_version(version, chunks)

    def clear_everything(self) -> None:
        """Leave a clean broker behind: the run has ended."""
        self._clear_retired()
        for version, publication in self.ledger.published.items():
            self._clear_version(version, len(publication.chunks))
        self.fetching.clear()
        for epoch, coded in self.ledger.orders.items():
            self._clear_order(epoch, [len(data) for data in coded.levels])
        self._epochs.clear()
        for data in self.programs.values():
            for piece, _ in enumerate(wire.pieces(data, PIECE_BYTES)):
                self._retain(self.names.program(wire.digest(data), piece), b"")
        for who in self.ledger.devices:
            self._retain(self.names.assignment(who), b"")
        for who in sorted(self._told.union(self.ledger.devices)):
            self._retain(topics.tasks(who), wire.encode(wire.Tasks()))
        self._retain(topics.claim(self.names.task), b"")

    def _clear_version(self, version: int, chunks: int) -> None:
        self._retain(self.names.manifest(version), b"")
        for index in range(chunks):
            self._retain(self.names.chunk(version, index), b"")

    def _clear_retired(self) -> None:
        """An earlier life of ours may have died between the record of a retirement and the clearing."""
        for version, count in self.ledger.retired:
            self._clear_version(version, count)
        for epoch, sizes in self.ledger.retired_orders:
            self._clear_order(epoch, sizes)

    def _clear_order(self, epoch: int, sizes: list[int]) -> None:
        for level, size in enumerate(sizes):
            for piece in range((size + PIECE_BYTES - 1) // PIECE_BYTES):
                self._retain(self.names.order(epoch, level, piece), b"")

    def _retain(self, topic: str, payload: bytes | memoryview) -> None:
        self._emit(Publish(topic, payload, retain=True))


def local_steps(task: Task, transfer_s: float, quickest_s: float) -> int:
    """Steps of this device's round: more, up to max_steps_factor times, where the link takes longer than the quickest device's.

    While densities match links nobody differs; once a slow device has regrown, its long transfers are used for more local work (ours).
    Both transfers are density / uplink, > 0: seconds but for a constant.
    """
    factor = min(transfer_s / quickest_s, task.training.max_steps_factor)
    return min(round(task.training.local_steps * factor), MAX_STEPS)


def learning_rate(ledger: Ledger) -> float:
    """The rate of this moment: from the first to the final one, falling linearly with what has passed of the planned end."""
    training, stop = ledger.task.training, ledger.task.stop
    if training.final_learning_rate is None:
        return training.learning_rate
    passed = max(
        ledger.elapsed_s / stop.seconds if stop.seconds is not None else 0.0,
        ledger.version / stop.aggregations if stop.aggregations is not None else 0.0,
    )
    return training.learning_rate + min(passed, 1.0) * (training.final_learning_rate - training.learning_rate)


def chunk_bytes(uplink_bps: float) -> int:
    """About one second of a link, within what the wire allows."""
    return min(max(int(uplink_bps / 8), wire.MIN_CHUNK_BYTES), wire.MAX_CHUNK_BYTES)
