"""Updates on their way in: reassembly under a quota, and everything that is checked before an update may touch the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow import records, values, wire
from regrow.claim import RESTORED_NUMBER_SHIFT, restores_of
from regrow.density import full_density_round_s
from regrow.errors import PeerError
from regrow.ledger import Ledger
from regrow.publication import version_of

ENOUGH_NORMS = 3
SMALLEST_CHANGE = 1e-2  # of the base: what hardly moved for a while, or for one device with hardly any data, may move again


class TooLateError(PeerError):
    """Nobody's fault: the update came after its version was given up."""


@dataclass(slots=True)
class Assembly:
    """One update of one device, as far as it has come."""

    install: bytes
    sequence: int
    count: int
    chunk_bytes: int
    head: wire.UpdateHead | None = None
    chunks: dict[int, bytes] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.chunks) == self.count

    def missing(self) -> list[wire.Range]:
        return ranges(index for index in range(self.count) if index not in self.chunks)


def ranges(indices: Iterable[int]) -> list[wire.Range]:
    """Ascending indices as half-open ranges."""
    found: list[wire.Range] = []
    for index in indices:
        if found and found[-1].stop == index:
            found[-1] = wire.Range(found[-1].start, index + 1)
        else:
            found.append(wire.Range(index, index + 1))
    return found


def add_chunk(
    assembly: Assembly | None, chunk: wire.UpdateChunk, payload: memoryview, sequence: int, index: int, quota_bytes: int
) -> Assembly:
    """The assembly with this chunk in it; a newer sequence or another install replaces what a device had begun.

    Raises:
        PeerError: the chunk contradicts the ones before it, or the update would be larger than any that this run can have.
    """
    if chunk.count * chunk.chunk_bytes >= quota_bytes + chunk.chunk_bytes:
        raise PeerError(f"update {sequence}: {chunk.count} chunks of {chunk.chunk_bytes} bytes, this run's updates have {quota_bytes}")
    full = index < chunk.count - 1
    if index >= chunk.count or len(payload) > chunk.chunk_bytes or (full and len(payload) != chunk.chunk_bytes):
        raise PeerError(f"update {sequence}: chunk {index} of {chunk.count} has {len(payload)} bytes, chunks are {chunk.chunk_bytes}")
    if assembly is None or (assembly.install, assembly.sequence) != (chunk.install, sequence):
        assembly = Assembly(chunk.install, sequence, chunk.count, chunk.chunk_bytes)
    if (assembly.count, assembly.chunk_bytes) != (chunk.count, chunk.chunk_bytes):
        raise PeerError(f"update {sequence}: chunk {index} speaks of {chunk.count} chunks, the ones before of {assembly.count}")
    if index == 0:
        if chunk.head is None:
            raise PeerError(f"update {sequence}: chunk 0 has no head")
        assembly.head = chunk.head
    assembly.chunks[index] = bytes(payload)
    return assembly


def quota_bytes(ledger: Ledger) -> int:
    """The largest update that this run can have."""
    return ledger.largest_update_bytes(ledger.order, len(ledger.order.lengths) - 1, "float32")


def whole_payload(assembly: Assembly) -> bytes | None:
    """The bytes of a whole update, or None when they are not what its digest promised (it is then to be sent again)."""
    payload = b"".join(assembly.chunks[index] for index in range(assembly.count))
    head = assembly.head
    return payload if head is not None and wire.digest(payload) == head.digest and len(payload) == head.size else None


def checked(ledger: Ledger, device: str, assembly: Assembly, payload: bytes, uplink_bps: float) -> records.Accepted:
    """The record of a valid update.

    An update is valid in the (epoch, level, base version) that it started with, whatever was assigned to the device meanwhile.

    Raises:
        PeerError: the reason for which it must not count.
    """
    head = assembly.head
    if head is None:
        raise PeerError("no head")
    known = ledger.devices[device]
    lease, dtypes = known.lease, ledger.task.wire.dtypes
    if lease is not None and head.assignment == lease.number:
        if (head.version, head.epoch, head.level) != (lease.version, lease.epoch, lease.level):
            raise PeerError(f"version {head.version}, epoch {head.epoch}, level {head.level} is not what was assigned")
        dtypes = dtypes if lease.dtype is None else (lease.dtype,)
    else:
        _check_given(ledger, head.assignment, known.number)
    if head.version not in ledger.published:
        if version_of(head.version) > ledger.version:
            raise PeerError(f"version {version_of(head.version)} was never given")
        raise TooLateError(f"version {version_of(head.version)} is no longer held: the update came after its deadline")
    publication = ledger.published[head.version]
    order = publication.order
    if head.epoch != order.epoch or head.level >= len(order.lengths):
        raise PeerError(f"version {head.version} has epoch {order.epoch} and {len(order.lengths)} levels, not {head.epoch}, {head.level}")
    if head.dtype not in dtypes:
        raise PeerError(f"values are {head.dtype}, this run takes {' or '.join(dtypes)}")
    expected = ledger.largest_update_bytes(order, head.level, head.dtype)
    if head.size != expected and ledger.task.method.local != "personal_masks":  # theirs are as long as their mask says: reconstruct sees
        raise PeerError(f"{head.size} bytes, level {head.level} has {expected} in {head.dtype}")
    # A step with masks costs what a full one does; only models of whole units become smaller.
    share = ledger.density_of(head.level) if ledger.task.method.granularity == "unit" else 1.0
    # One measure for all rounds, whichever dtype this one had.
    full_bytes = values.encoded_size(ledger.task.wire.dtypes[0], order.size, order.always_kept)
    entry = records.Accepted(
        device=device,
        install=assembly.install.hex(),
        sequence=assembly.sequence,
        version=head.version,
        epoch=head.epoch,
        level=head.level,
        dtype=head.dtype,
        examples=head.examples,
        norm=0.0,
        loss=head.loss,
        seconds=head.seconds,
        round_s=full_density_round_s(head.seconds, share, full_bytes, uplink_bps),
        uplink_bps=uplink_bps,
        scores=[score for score in head.scores if score.level < len(order.lengths)],
    )
    trained, base, presence = ledger.reconstruct(entry, payload)
    count = trained.size if presence is None else int(np.count_nonzero(presence))
    norm = _norm(trained - base)
    if not norm <= norm_bound(ledger, head.level, 0.0):  # the bound grows with the base, whose norm is seldom needed
        # A level of biases that are all 0 must be allowed to move too: as far as weights of the usual size would.
        usual = _norm(ledger.weights) * (count / order.size) ** 0.5
        bound = norm_bound(ledger, head.level, max(_norm(base), usual))
        if not norm <= bound:
            raise PeerError(f"norm {norm:.3g} of its change exceeds {bound:.3g}, {ledger.task.fleet.norm_bound:g} times what is usual")
    return msgspec.structs.replace(entry, norm=norm)


def _check_given(ledger: Ledger, assignment: int, newest: int) -> None:
    """Raises PeerError: the device cannot have been given this assignment, or not by this gateway's past."""
    if assignment <= newest and assignment >> RESTORED_NUMBER_SHIFT == newest >> RESTORED_NUMBER_SHIFT:
        return
    if restores_of(ledger.term):  # the versions that it speaks of may mean something else by now
        raise TooLateError(f"assignment {assignment} is from before the gateway was restored from a backup")
    raise PeerError(f"assignment {assignment} was never given")


def _norm(vector: NDArray[np.float32]) -> float:
    """The 2-norm, summed in float64; not np.linalg.norm, whose BLAS threads wait spinning where cores are few."""
    return float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))


def norm_bound(ledger: Ledger, level: int, base_norm: float) -> float:
    """The largest norm of a change that this level's recent updates make plausible.

    The median of the level's recent norms; while there are too few of them, that of all levels, each scaled by the square root of
    its length; and before any, the norm of the base itself.
    """
    factor = ledger.task.fleet.norm_bound
    recent = ledger.norms.get(level, [])
    smallest = max(SMALLEST_CHANGE * base_norm, 1e-6)
    if len(recent) >= ENOUGH_NORMS:
        return factor * max(median(recent), smallest)
    lengths = [ledger.reach(ledger.order, each) for each in range(len(ledger.order.lengths))]
    scaled = [norm * (lengths[level] / lengths[other]) ** 0.5 for other, norms in ledger.norms.items() for norm in norms]
    return factor * (max(median(scaled), smallest) if len(scaled) >= ENOUGH_NORMS else max(base_norm, 1e-3))
