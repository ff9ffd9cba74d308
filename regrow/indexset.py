"""Which coordinates an increment holds, coded near the entropy and without a loop over coordinates.

A level's set is coded as ranks among the coordinates that no earlier segment took; both sides know the always-kept
ones. One payload per level:

    byte 0      bits 0-4 r; bit 5: the complement is coded; bit 6: the rest is a zlib stream; bit 7 is zero
    unary       for each gap g between ranks: g >> r zeros and a one; most significant bit first, zero-padded to a byte
    remainders  r planes, lowest bit first; plane b holds bit b of every gap, each zero-padded to a byte

The two streams lie apart so that NumPy can code and decode them whole. r = 0 is the bitmap. An empty set, and a set
of everything that is left (so the last level always), is the empty payload. zlib is tried only where Rice coding
came out more than 6 % above the entropy, which random sets never do and regular ones (width slices) can.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from regrow.errors import PeerError
from regrow.order import Order

MAX_SHIFT = 30  # coordinates are below 2**31
_COMPLEMENT = 0x20
_DEFLATED = 0x40
_TRY_ZLIB_ABOVE = 1.06  # of the entropy


def encode_levels(order: Order) -> list[bytes]:
    """The index set of every level, given the levels before it.

    Returns:
        One payload per level; the last is b"". Their sizes sum to at most 1.10 n H(level sizes) / 8 + 64 bytes a level.
    """
    labels = np.empty(order.size, np.uint8)
    bounds = (0, order.always_kept, *order.lengths)
    for label, (start, stop) in enumerate(pairwise(bounds)):
        labels[order.coordinates[start:stop]] = label
    left = labels.tobytes().replace(b"\0", b"")  # deleting a byte value is twice as fast as a NumPy mask
    payloads = []
    for label in range(1, len(order.lengths) + 1):
        chosen = np.frombuffer(left, np.uint8) == label
        payloads.append(_encode_set(chosen, bounds[label + 1] - bounds[label]))
        left = left.replace(bytes([label]), b"")
    return payloads


def decode_prefix(
    n: int, always_kept_coordinates: NDArray[np.uint32], lengths: Sequence[int], payloads: Sequence[bytes]
) -> NDArray[np.uint32]:
    """The coordinates of the first len(payloads) levels, in position order.

    Args:
        n: size of the layout.
        always_kept_coordinates: uint32, ascending, from the layout.
        lengths: prefix lengths of the levels, at least as many as payloads.
        payloads: what `encode_levels` made for the first levels.

    Returns:
        uint32 [lengths[len(payloads) - 1]], position -> flat coordinate.

    Raises:
        PeerError: the lengths or the bytes are malformed. Never more than O(n) memory is used.
    """
    always_kept = always_kept_coordinates.size
    wanted = list(lengths[: len(payloads)])
    if not 0 < len(payloads) <= len(lengths) or [always_kept, *wanted, n] != sorted([always_kept, *wanted, n]):
        raise PeerError(f"index set: lengths do not rise from {always_kept} to {n}, or {len(payloads)} levels are not there")
    free = np.ones(n, np.bool_)
    free[always_kept_coordinates] = False
    remaining = np.flatnonzero(free).astype(np.uint32)
    prefix = np.empty(wanted[-1], np.uint32)
    prefix[:always_kept] = always_kept_coordinates
    start = always_kept
    for level, (stop, payload) in enumerate(zip(wanted, payloads, strict=True)):
        try:
            ranks, complement = _decode_set(payload, remaining.size, stop - start)
        except PeerError as error:
            raise PeerError(f"index set of level {level}: {error}") from error
        last = level + 1 == len(payloads)
        if complement:
            prefix[start:stop] = _all_but(remaining, ranks)
            remaining = remaining[:0] if last else remaining.take(ranks, mode="clip")
        else:
            prefix[start:stop] = remaining.take(ranks, mode="clip")  # they were checked; three times faster than checking them again
            remaining = remaining[:0] if last else _all_but(remaining, ranks)
        start = stop
    return prefix


def _all_but(values: NDArray[np.uint32], ranks: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The values at all other ranks. Looking for their places first is faster than a mask as an index."""
    others = np.ones(values.size, np.bool_)
    others[ranks] = False
    return values.take(np.flatnonzero(others), mode="clip")


def _entropy_bytes(total: int, count: int) -> float:
    p = count / total
    return total * -(p * math.log2(p) + (1.0 - p) * math.log2(1.0 - p)) / 8.0


def _encode_set(chosen: NDArray[np.bool_], count: int) -> bytes:
    """One level's payload: the places of `count` True among the coordinates not yet taken."""
    if count in (0, chosen.size):
        return b""
    complement = count > chosen.size // 2
    ranks = np.flatnonzero(~chosen if complement else chosen)
    gaps = np.diff(ranks, prepend=-1) - 1
    r = _best_shift(gaps, chosen.size)
    highs = gaps >> r
    unary = np.zeros(int(highs.sum()) + gaps.size, np.bool_)
    unary[np.cumsum(highs + 1) - 1] = True
    planes = [np.packbits((gaps >> b) & 1 != 0).tobytes() for b in range(r)]
    body = b"".join([np.packbits(unary).tobytes(), *planes])
    tag = r | (_COMPLEMENT if complement else 0)
    if len(body) > _TRY_ZLIB_ABOVE * _entropy_bytes(chosen.size, count):
        deflated = zlib.compress(body, 9)
        if len(deflated) < len(body):
            return bytes([tag | _DEFLATED]) + deflated
    return bytes([tag]) + body


def _best_shift(gaps: NDArray[np.int64], total: int) -> int:
    """The r with the fewest bits, tried around the one that suits evenly spread ranks."""
    expected = max(0, round(math.log2(max(1.0, 0.69 * total / gaps.size))))
    candidates = range(max(0, expected - 1), min(MAX_SHIFT, expected + 1) + 1)
    return min(candidates, key=lambda r: gaps.size * r + int((gaps >> r).sum()))


def _decode_set(payload: bytes, total: int, count: int) -> tuple[NDArray[np.int64], bool]:
    """Ascending ranks among the coordinates not yet taken, and whether they are the ones that are *not* chosen."""
    if count in (0, total):
        if payload:
            raise PeerError(f"{len(payload)} bytes where none are needed")
        return np.empty(0, np.int64), count == total
    if not payload or payload[0] & 0x80 or payload[0] & 0x1F > MAX_SHIFT:
        raise PeerError("no or unknown coding")
    r, complement = payload[0] & 0x1F, bool(payload[0] & _COMPLEMENT)
    marks = total - count if complement else count
    plane_bytes = -(-marks // 8)
    longest = -(-(marks + ((total - marks) >> r)) // 8) + r * plane_bytes
    body = _inflate(payload[1:], longest) if payload[0] & _DEFLATED else payload[1:]
    unary_bytes = len(body) - r * plane_bytes
    if not plane_bytes <= unary_bytes or len(body) > longest:
        raise PeerError(f"{len(body)} bytes for {marks} gaps, at most {longest} are possible")
    unary = np.unpackbits(np.frombuffer(body, np.uint8, unary_bytes))
    places = np.flatnonzero(unary.view(np.bool_))  # of bytes it would be several times slower
    if places.size != marks or places[-1] // 8 != unary_bytes - 1:
        raise PeerError(f"{places.size} gaps instead of {marks}, or bytes behind the last")
    steps = np.arange(marks)
    ranks = ((places - steps) << r) + steps
    if r:
        ranks += np.cumsum(_remainders(body[unary_bytes:], r, marks))
    if ranks[-1] >= total:
        raise PeerError(f"rank {ranks[-1]} of {total}")
    return ranks, complement


def _remainders(planes: bytes, r: int, count: int) -> NDArray[np.int64]:
    """int64 [count], the lowest r bits of every gap."""
    bits = np.unpackbits(np.frombuffer(planes, np.uint8).reshape(r, -1), axis=1)
    if bits[:, count:].any():
        raise PeerError("padding bits are set")
    lowest = bits[0, :count].copy()
    for b in range(1, min(r, 8)):
        lowest |= bits[b, :count] << np.uint8(b)  # as bytes: most gaps have no more remainder than that
    remainders = lowest.astype(np.int64)
    for b in range(8, r):
        remainders |= bits[b, :count].astype(np.int64) << b
    return remainders


def _inflate(data: bytes, longest: int) -> bytes:
    """The zlib stream's content, refused beyond `longest` bytes."""
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(data, longest + 1)
    except zlib.error as error:
        raise PeerError(f"not a zlib stream: {error}") from error
    if not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise PeerError("the zlib stream is cut, too long or followed by other bytes")
    return body
