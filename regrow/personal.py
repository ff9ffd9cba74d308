"""Personal masks (Sub-FedAvg): which single weights a device keeps for itself, how it prunes them, and how they travel.

A mask is bool [n] in position order; always-kept positions are in every one. What a device saves is a bitmap by flat coordinate instead,
because positions change with the order's epoch. A bitmap has the most significant bit first and is padded with zeros to a byte.

    payload   bitmap of all n positions, then regrow.values of the kept ones, in position order
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regrow.errors import PeerError
from regrow.machine import Payload

ONE_IN = 5  # a fifth of what is still to go is pruned in a round


def bitmap_bytes(length: int) -> int:
    return -(-length // 8)


def bitmap(kept: NDArray[np.bool_]) -> bytes:
    return np.packbits(kept).tobytes()


def start(saved: bytes, base: NDArray[np.float32], coordinates: NDArray[np.uint32], always_kept: int, target: int) -> NDArray[np.bool_]:
    """The mask that a round trains within: everything on a new device, else the device's own.

    Where its level has risen above what it keeps, the weights that the global model has largest come back.

    Args:
        saved: bitmap by flat coordinate from the round before; empty, or of another model: there is none.
        base: float32 [n], the global model as received, in position order.
        coordinates: uint32 [n], the flat coordinates of the positions.
        always_kept: positions that are in every mask.
        target: positions of the device's level, >= always_kept.

    Returns:
        bool [n], at least `target` of them true.

    Source: Sub-FedAvg (arXiv 2105.00562), whose masks begin full. That they can grow again is ours: restoration needs it.
    """
    if len(saved) != bitmap_bytes(coordinates.size):
        return np.ones(coordinates.size, np.bool_)
    kept = np.unpackbits(np.frombuffer(saved, np.uint8), count=coordinates.size).view(np.bool_)[coordinates]
    kept[:always_kept] = True
    lacking = target - int(np.count_nonzero(kept))
    if lacking > 0:
        outside = np.flatnonzero(~kept)
        kept[outside[np.argsort(-np.abs(base[outside]), kind="stable")[:lacking]]] = True
    return kept


def pruned(trained: NDArray[np.float32], kept: NDArray[np.bool_], always_kept: int, target: int) -> NDArray[np.bool_]:
    """The mask after a round: without the smallest |w| of its prunable positions, a fifth (rounded up) of those above the target.

    Args:
        trained: float32 [n], in position order; looked at only where `kept`.
        kept: bool [n], what was trained. Not modified.
        always_kept: positions that are never pruned.
        target: positions of the device's level, >= always_kept.

    Source: Sub-FedAvg (arXiv 2105.00562), the unstructured variant. Differs: it prunes a fixed share of the weights, and only in rounds
    in which the device's validation accuracy is above a threshold and its mask still changes; both thresholds are left out here.
    """
    surplus = int(np.count_nonzero(kept)) - target
    if surplus <= 0:
        return kept
    inside = always_kept + np.flatnonzero(kept[always_kept:])
    left = kept.copy()
    left[inside[np.argsort(np.abs(trained[inside]), kind="stable")[: -(-surplus // ONE_IN)]]] = False
    return left


def to_flat(kept: NDArray[np.bool_], coordinates: NDArray[np.uint32]) -> bytes:
    """What the device saves: the mask as a bitmap by flat coordinate. kept: bool [n]; coordinates: uint32 [n]."""
    flat = np.zeros(kept.size, np.bool_)
    flat[coordinates[kept]] = True
    return bitmap(flat)


def split(payload: Payload, length: int, always_kept: int, at_least: int) -> tuple[NDArray[np.bool_], memoryview]:
    """(mask, bytes of the kept values) of an update's payload.

    Args:
        length: n.
        always_kept: positions that every mask has.
        at_least: positions of the update's level; honest masks never have fewer.

    Raises:
        PeerError: too short, padding that is not zero, an always-kept position missing, or too few positions kept.
    """
    view, size = memoryview(payload), bitmap_bytes(length)
    if len(view) < size:
        raise PeerError(f"personal mask: {len(view)} bytes, the bitmap of {length} positions alone has {size}")
    bits = np.unpackbits(np.frombuffer(view[:size], np.uint8)).view(np.bool_)
    kept = bits[:length]
    if bits[length:].any():
        raise PeerError("personal mask: the padding of the bitmap is not zero")
    if not kept[:always_kept].all():
        raise PeerError(f"personal mask: position {int(kept[:always_kept].argmin())} is left out, but every sub-model has it")
    count = int(np.count_nonzero(kept))
    if count < at_least:
        raise PeerError(f"personal mask: keeps {count} positions, its level has {at_least}")
    return kept, view[size:]


def spread(values: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.float32]:
    """float32 [n]: the values of the kept positions in their places, 0 elsewhere."""
    whole = np.zeros(kept.size, np.float32)
    whole[kept] = values
    return whole
