import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.errors import PeerError
from regrow.indexset import decode_prefix, encode_levels
from regrow.order import Order


def order_of(labels: np.ndarray, levels: int) -> Order:
    """The order in which coordinate j lies in increment labels[j]; 0 is always kept."""
    counts = np.bincount(labels, minlength=levels + 1)
    lengths = tuple(int(stop) for stop in np.cumsum(counts)[1:])
    return Order(0, np.argsort(labels, kind="stable").astype(np.uint32), lengths, int(counts[0]))


def bound_bytes(order: Order) -> float:
    sizes = [b - a for a, b in pairwise((order.always_kept, *order.lengths)) if b > a]
    total = sum(sizes)
    return 1.10 * sum(-size * math.log2(size / total) for size in sizes) / 8 + 64 * len(order.lengths)


def check(order: Order) -> list[bytes]:
    payloads = encode_levels(order)
    always = order.coordinates[: order.always_kept]
    for levels in range(1, len(payloads) + 1):
        decoded = decode_prefix(order.size, always, order.lengths, payloads[:levels])
        np.testing.assert_array_equal(decoded, order.coordinates[: order.lengths[levels - 1]])
    assert payloads[-1] == b""
    assert sum(map(len, payloads)) <= bound_bytes(order)
    return payloads


@settings(max_examples=300)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=300))
def test_any_small_order_round_trips_within_the_bound(labels: list[int]) -> None:
    check(order_of(np.array(labels), 5))


@pytest.mark.parametrize("share", [0.0001, 0.003, 0.02, 0.05, 0.11, 0.2, 0.25, 0.34, 0.38, 0.5, 0.6, 0.9, 0.999])
def test_random_sets_stay_near_the_entropy(share: float) -> None:
    labels = np.where(np.random.default_rng(1).random(200_000) < share, 1, 2)
    payloads = check(order_of(labels, 2))
    p = np.mean(labels == 1)
    assert len(payloads[0]) <= 1.05 * 200_000 / 8 * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + 64


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 6, 8, 9, 10, 16, 17, 20, 33, 100])
@pytest.mark.parametrize("complement", [False, True])
def test_regular_sets_stay_within_the_bound(stride: int, complement: bool) -> None:
    labels = np.where((np.arange(100_003) % stride == 0) != complement, 1, 2)
    check(order_of(labels, 2))


def test_clustered_and_degenerate_sets() -> None:
    check(order_of(np.repeat([3, 1, 2], [50_000, 2_000, 30_000]), 3))
    check(order_of(np.ones(1000, np.int64), 1))  # density 1 only
    check(order_of(np.zeros(10, np.int64), 3))  # everything always kept
    check(order_of(np.array([1] + [2] * 99_999), 2))
    check(order_of(np.array([2] * 99_999 + [1]), 2))


def test_golden_bytes() -> None:
    # ranks 1, 4, 5, 12 of 16: gaps 1 2 0 6; r = 1: highs 0 1 0 3 -> 1 01 1 0001, lows 1 0 0 0 -> 1000
    labels = np.full(16, 2)
    labels[[1, 4, 5, 12]] = 1
    assert [payload.hex() for payload in check(order_of(labels, 2))] == ["01b180", ""]
    # the complement {1, 4} of 6 is coded as a bitmap: 01001
    labels = np.array([1, 2, 1, 1, 2, 1])
    assert [payload.hex() for payload in check(order_of(labels, 2))] == ["2048", ""]


EXAMPLE = order_of(np.random.default_rng(7).choice([0, 1, 2, 3], 400, p=[0.05, 0.1, 0.3, 0.55]), 3)
REGULAR = order_of(np.where(np.arange(4000) % 5 == 0, 1, 2), 2)


@settings(max_examples=400)
@given(st.sampled_from([EXAMPLE, REGULAR]), st.integers(0, 3), st.integers(0, 10_000), st.integers(0, 255), st.binary(max_size=4))
def test_mutated_bytes_decode_to_a_set_or_are_a_peer_error(order: Order, level: int, at: int, byte: int, tail: bytes) -> None:
    payloads = [bytearray(payload) for payload in encode_levels(order)]
    target = payloads[level % len(payloads)]
    if target:
        target[at % len(target)] = byte
        del target[len(target) - at % 2 :]
    target += tail
    try:
        decoded = decode_prefix(order.size, order.coordinates[: order.always_kept], order.lengths, [bytes(p) for p in payloads])
    except PeerError:
        return
    Order(0, decoded, order.lengths, order.always_kept)  # raises unless it is a whole, sorted permutation


@settings(max_examples=300)
@given(st.integers(1, 40), st.binary(max_size=40), st.integers(0, 41))
def test_any_bytes_decode_or_are_a_peer_error(n: int, payload: bytes, length: int) -> None:
    try:
        decoded = decode_prefix(n, np.empty(0, np.uint32), (length, n), [payload])
    except PeerError:
        return
    assert decoded.size == length
    assert (np.diff(decoded.astype(np.int64)) > 0).all()
    assert length == 0 or decoded[-1] < n


@pytest.mark.parametrize("payload", ["01b18000", "01b1", "01b181", "81b180", "1fb180", "0131", "41b180", ""])
def test_wrong_bytes_are_refused(payload: str) -> None:
    with pytest.raises(PeerError, match="level 0"):
        decode_prefix(16, np.empty(0, np.uint32), (4, 16), [bytes.fromhex(payload)])


@pytest.mark.parametrize("lengths", [(5, 3), (1, 16), (4, 17), ()])
def test_wrong_lengths_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(PeerError, match="lengths"):
        decode_prefix(16, np.array([0, 1], np.uint32), lengths, [b""] * max(1, len(lengths)))


def test_a_zlib_bomb_is_refused() -> None:
    bomb = b"\x40" + zlib.compress(b"\0" * 50_000_000)
    with pytest.raises(PeerError):
        decode_prefix(16, np.empty(0, np.uint32), (4, 16), [bomb])
