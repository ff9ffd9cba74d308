"""A device's update on its way out, and the rounding that it still owes (error feedback).

Update and residual are committed together in one durable file, so that a power cut leaves both old or both new.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow import personal, values, wire
from regrow.errors import LocalError, PeerError


class _File(msgspec.Struct, frozen=True, array_like=True):
    run: str
    sequence: int
    chunk_bytes: Annotated[int, msgspec.Meta(ge=wire.MIN_CHUNK_BYTES, le=wire.MAX_CHUNK_BYTES)]
    closed: bool
    head: wire.UpdateHead
    payload: bytes
    owed_where: bytes
    owed: bytes
    mask: bytes = b""


@dataclass(frozen=True, eq=False)
class Outgoing:
    """One update.

    Args:
        run: the run it belongs to, by the root of its topics: run names alone may repeat from task to task.
        sequence: grows with every update of this installation.
        head: what it is.
        payload: its values as they travel.
        chunk_bytes: how it is cut.
        owed: float16 [n] by flat coordinate, what rounding has lost so far; None while nothing was ever rounded.
        sent: (uint32 coordinates, float32 values) of the delta, to be owed again if it is rejected; None after a reboot.
        closed: its receipt has come.
        mask: the device's own mask as a bitmap by flat coordinate (regrow.personal); empty: it has none.
    """

    run: str
    sequence: int
    head: wire.UpdateHead
    payload: bytes
    chunk_bytes: int
    owed: NDArray[np.float16] | None
    sent: tuple[NDArray[np.uint32], NDArray[np.float32]] | None = None
    closed: bool = False
    mask: bytes = b""

    @property
    def count(self) -> int:
        return max(1, -(-len(self.payload) // self.chunk_bytes))

    def chunk(self, index: int, install: bytes) -> bytes:
        """The message of chunk `index`; chunk 0 carries the head."""
        part = memoryview(self.payload)[index * self.chunk_bytes : (index + 1) * self.chunk_bytes]
        head = self.head if index == 0 else None
        return wire.encode(wire.UpdateChunk(install=install, count=self.count, chunk_bytes=self.chunk_bytes, head=head), part)

    def is_meant_by(self, receipt: wire.Receipt, install: bytes) -> bool:
        """Whether this is the update that the receipt speaks of."""
        return (receipt.install, receipt.sequence) == (install, self.sequence)

    def missing(self, receipt: wire.Receipt) -> Iterator[int]:
        """The chunks that the receipt asks for, of those that there are."""
        for part in receipt.missing:
            yield from range(min(part.start, self.count), min(part.stop, self.count))

    def to_bytes(self) -> bytes:
        """What is saved: only coordinates that owe something take room."""
        owed = self.owed if self.owed is not None else np.empty(0, np.float16)
        owes = owed.view(np.uint16) & 0x7FFF != 0  # neither 0.0 nor -0.0, without a conversion of every value
        where = np.flatnonzero(owes)
        # A bitmap takes at most n / 8 bytes, an eighth of what the float16 values take at least.
        bitmap = np.packbits(owes[: where[-1] + 1 if where.size else 0])
        fields = (self.run, self.sequence, self.chunk_bytes, self.closed, self.head, self.payload)
        return msgspec.msgpack.encode(_File(*fields, bitmap.tobytes(), owed[where].astype("<f2").tobytes(), self.mask))

    def rejected(self) -> Outgoing:
        """The same, closed, with the sent delta owed again: it came too late, what was learned is not lost."""
        owed = self.owed
        if owed is not None and self.sent is not None:
            where, delta = self.sent
            owed = owed.copy()
            owed[where] = to_float16(owed[where].astype(np.float32) + delta)
        return Outgoing(self.run, self.sequence, self.head, b"", self.chunk_bytes, owed, None, closed=True, mask=self.mask)


def from_bytes(data: bytes, size: int | None) -> Outgoing:
    """What `to_bytes` saved. size: n, where it is known; the residual grows to it.

    Raises:
        LocalError: the bytes are not such a file; the update is lost, the device goes on.
    """
    try:
        saved = msgspec.msgpack.decode(data, type=_File)
    except (msgspec.DecodeError, ValueError) as error:  # a text that is not UTF-8 is a ValueError
        raise LocalError(f"saved update: {error}; it is set aside and the device goes on without it") from error
    if not saved.closed and wire.digest(saved.payload) != saved.head.digest:
        raise LocalError("saved update: its values are not those of its digest; it is set aside and the device goes on without it")
    where = np.flatnonzero(np.unpackbits(np.frombuffer(saved.owed_where, np.uint8)))
    owed_values = np.frombuffer(saved.owed[: len(saved.owed) // 2 * 2], "<f2")
    if where.size != owed_values.size or not np.isfinite(owed_values).all():
        raise LocalError("saved update: its residual does not fit; it is set aside and the device goes on without it")
    owed = None
    if where.size:
        owed = np.zeros(max(size or 0, int(where[-1]) + 1), np.float16)
        owed[where] = owed_values
    return Outgoing(saved.run, saved.sequence, saved.head, saved.payload, saved.chunk_bytes, owed, None, saved.closed, saved.mask)


def make(
    assignment: wire.Assignment,
    *,
    run: str,
    sequence: int,
    trained: NDArray[np.float32],
    base: NDArray[np.float32],
    coordinates: NDArray[np.uint32],
    size: int,
    always_kept: int,
    owed: NDArray[np.float16] | None,
    examples: int,
    loss: float,
    seconds: float,
    scores: list[wire.Score],
    kept: NDArray[np.bool_] | None = None,
) -> Outgoing:
    """Turn trained values into an update.

    Args:
        assignment: what was trained.
        trained: float32 [length], in position order.
        base: float32 [length], the values as received.
        coordinates: uint32 [length], their flat coordinates.
        size: n.
        always_kept: how many positions travel as float32.
        owed: float16 [n] by flat coordinate, from the update before.
        kept: bool [length], the personal mask: nothing else travels or is owed, and it is saved. Then length is n.

    Raises:
        PeerError: training gave a number that is not finite; such an update never leaves the device.

    Source: algorithms.md section 1, "What travels".
    """
    if not np.isfinite(trained).all() or not np.isfinite(loss):
        raise PeerError("training diverged: a value or the loss is not finite; lower learning_rate in task.toml")
    mask = personal.to_flat(kept, coordinates) if kept is not None else b""
    if kept is not None:
        trained, base, coordinates = trained[kept], base[kept], coordinates[kept]
    sent = None
    if assignment.dtype in values.DELTA_DTYPES:
        owed = _grown(owed, size)
        residual = owed[coordinates].astype(np.float32)
        payload, delta, left = values.quantise_with_feedback(trained - base, residual, assignment.dtype, always_kept)
        owed = owed.copy()
        owed[coordinates] = to_float16(left)
        owed[coordinates[:always_kept]] = 0  # they travel as float32: the last bit of a sum is not a debt
        sent = (coordinates[always_kept:], delta[always_kept:])
    else:
        payload = values.encode(trained, assignment.dtype, always_kept)
    if kept is not None:
        payload = personal.bitmap(kept) + payload
    head = wire.UpdateHead(
        assignment=assignment.number,
        version=assignment.version,
        epoch=assignment.epoch,
        level=assignment.level,
        dtype=assignment.dtype,
        examples=max(examples, 1),
        size=len(payload),
        digest=wire.digest(payload),
        seconds=seconds,
        loss=loss,
        scores=[score for score in scores if math.isfinite(score.loss) and math.isfinite(score.accuracy)],
    )
    return Outgoing(run, sequence, head, payload, assignment.chunk_bytes, owed, sent, mask=mask)


def _grown(owed: NDArray[np.float16] | None, size: int) -> NDArray[np.float16]:
    if owed is None:
        return np.zeros(size, np.float16)
    return owed if owed.size == size else np.concatenate([owed, np.zeros(max(size - owed.size, 0), np.float16)])[:size]


def to_float16(numbers: NDArray[np.float32]) -> NDArray[np.float16]:
    limit = np.float32(values.FLOAT16_MAX)
    return np.clip(numbers, -limit, limit).astype(np.float16)
