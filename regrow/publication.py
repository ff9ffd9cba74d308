"""One version on its way out: the rounded values, cut into chunks that never cross an increment, and the manifest that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from regrow import indexset, values, wire
from regrow.local_rules import LocalRule
from regrow.order import Order
from regrow.values import WireDtype

_ITEM_BYTES = {"float32": 4, "float16": 2}
_SLOT = 10**9  # more versions than any run has; slot 2 of version 17 reads 2000000017 in topics and records
PIECE_BYTES = 64 * 1024


def number_of(version: int, slot: int) -> int:
    """The number by which a published model is known: the version itself, unless the version has several (FedMR)."""
    return slot * _SLOT + version


def version_of(number: int) -> int:
    """k of a published model."""
    return number % _SLOT


def slot_of(number: int) -> int:
    """Which of its version's models this is; 0 where there is only one."""
    return number // _SLOT


@dataclass(frozen=True, eq=False)
class Publication:
    """A published version: exactly the bytes that devices receive, and therefore the base of their deltas.

    Args:
        version: its number: k, or `number_of`.
        order: the order of its epoch.
        dtype: of the pruned part; always-kept values are float32.
        data: values.encode of all n positions.
        chunk_bytes: the most that one chunk carries.
    """

    version: int
    order: Order
    dtype: WireDtype
    data: bytes
    chunk_bytes: int

    @classmethod
    def of(cls, version: int, order: Order, weights: NDArray[np.float32], dtype: WireDtype, chunk_bytes: int) -> Publication:
        """Round float32 [n] (in position order) to what travels."""
        return cls(version, order, dtype, values.encode(weights, dtype, order.always_kept), chunk_bytes)

    def offset(self, position: int) -> int:
        """Bytes before a position."""
        always_kept = self.order.always_kept
        return 4 * min(position, always_kept) + _ITEM_BYTES[self.dtype] * max(position - always_kept, 0)

    @cached_property
    def chunks(self) -> tuple[wire.Chunk, ...]:
        """Every chunk with its digest, in position order."""
        found = []
        for start, stop in self.order.segments():
            step = self.chunk_bytes // (4 if start < self.order.always_kept else _ITEM_BYTES[self.dtype])
            for first in range(start, stop, step):
                last = min(first + step, stop)
                found.append(wire.Chunk(first, last, wire.digest(self.chunk_data(first, last))))
        return tuple(found)

    def chunk_data(self, start: int, stop: int) -> memoryview:
        return memoryview(self.data)[self.offset(start) : self.offset(stop)]

    def base(self, length: int) -> NDArray[np.float32]:
        """float32 [length]: the values that a device at this prefix received."""
        return values.decode(memoryview(self.data)[: self.offset(length)], self.dtype, length, self.order.always_kept)


def blob(name: str, data: bytes) -> wire.Blob:
    """Name, size and digests of a byte string that travels in pieces."""
    digests = [wire.digest(piece) for piece in wire.pieces(data, PIECE_BYTES)]
    return wire.Blob(name, len(data), wire.digest(data), digests)


@dataclass(frozen=True, eq=False)
class CodedOrder:
    """An order together with its coded level sets, made once per epoch."""

    order: Order
    levels: tuple[bytes, ...]

    @classmethod
    def of(cls, order: Order) -> CodedOrder:
        return cls(order, tuple(indexset.encode_levels(order)))

    @cached_property
    def blobs(self) -> list[wire.Blob]:
        return [blob(str(level), data) for level, data in enumerate(self.levels)]


def program_blobs(programs: Mapping[str, bytes]) -> list[wire.Blob]:
    """The programs as a manifest names them."""
    return [blob(name, data) for name, data in sorted(programs.items())]


def manifest(
    publication: Publication,
    coded: CodedOrder,
    programs: list[wire.Blob],
    term: int,
    local: LocalRule = "plain",
    float32_bytes: Sequence[int] = (),
) -> wire.Manifest:
    """Everything that a device needs to know in order to fetch, check and train this version.

    Args:
        programs: `program_blobs`.
        float32_bytes: what a round takes at each level with float32 storage, where programs with float16 storage are there too.
    """
    return wire.Manifest(
        term=term,
        version=publication.version,
        epoch=publication.order.epoch,
        dtype=publication.dtype,
        always_kept=publication.order.always_kept,
        lengths=list(publication.order.lengths),
        chunks=list(publication.chunks),
        levels=coded.blobs,
        programs=programs,
        local=local,
        float32_bytes=list(float32_bytes),
    )
