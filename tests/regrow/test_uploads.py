"""Updates on their way in: reassembly in any order and under a quota, and every check that stands before the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import uploads, values, wire
from regrow.errors import PeerError
from regrow.ledger import Ledger
from regrow.records import Assigned, Joined, Published
from regrow.uploads import Assembly, add_chunk, ranges
from tests.golden.examples import EXAMPLES, INSTALL
from tests.regrow.fleet import INITIAL, LAYOUT, task

CHUNK = wire.MIN_CHUNK_BYTES
COMMON = settings(max_examples=40)


def head(size: int = 10, data: bytes = b"") -> wire.UpdateHead:
    message = EXAMPLES["update"][0]
    if not isinstance(message, wire.UpdateChunk) or message.head is None:
        raise TypeError("example")
    return msgspec.structs.replace(message.head, size=size, digest=wire.digest(data))


def chunk(count: int, index: int, whole: bytes = b"", chunk_bytes: int = CHUNK, install: bytes = INSTALL) -> wire.UpdateChunk:
    first = head(len(whole), whole) if index == 0 else None
    return wire.UpdateChunk(install=install, count=count, chunk_bytes=chunk_bytes, head=first)


@COMMON
@given(st.integers(1, 5 * CHUNK), st.randoms(use_true_random=False), st.integers(0, 6))
def test_chunks_in_any_order_and_twice_make_the_update(size: int, random: st.DataObject, repeated: int) -> None:
    whole = np.random.default_rng(size).bytes(size)
    parts = wire.pieces(whole, CHUNK)
    order = list(range(len(parts))) + [i % len(parts) for i in range(repeated)]
    random.shuffle(order)  # type: ignore[attr-defined]  # Hypothesis hands a random.Random
    assembly: Assembly | None = None
    for index in order:
        assembly = add_chunk(assembly, chunk(len(parts), index, whole), parts[index], 3, index, size)
    assert assembly is not None
    assert assembly.whole
    assert assembly.missing() == []
    assert uploads.whole_payload(assembly) == whole


@COMMON
@given(st.sets(st.integers(0, 200)))
def test_ranges_name_exactly_the_indices(indices: set[int]) -> None:
    found = ranges(sorted(indices))
    assert [i for part in found for i in range(part.start, part.stop)] == sorted(indices)
    assert all(a.stop < b.start for a, b in pairwise(found)), "neighbouring ranges are one"


def test_missing_says_what_is_lacking() -> None:
    assembly = add_chunk(None, chunk(4, 2), memoryview(bytes(CHUNK)), 1, 2, 4 * CHUNK)
    assert assembly.missing() == [wire.Range(0, 2), wire.Range(3, 4)]
    assert not assembly.whole


@pytest.mark.parametrize(
    ("count", "index", "payload_bytes", "quota", "why"),
    [
        (wire.MAX_CHUNKS, 0, CHUNK, 10 * CHUNK, "this run's updates"),
        (11, 0, CHUNK, 10 * CHUNK, "this run's updates"),
        (2, 2, 5, 10 * CHUNK, "chunk 2 of 2"),
        (2, 0, CHUNK - 1, 10 * CHUNK, "chunks are"),
        (2, 1, CHUNK + 1, 10 * CHUNK, "chunks are"),
        (1, 0, CHUNK + 1, 10 * CHUNK, "chunks are"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused_before_anything_is_kept(
    count: int, index: int, payload_bytes: int, quota: int, why: str
) -> None:
    with pytest.raises(PeerError, match=why):
        add_chunk(None, chunk(count, index), memoryview(bytes(payload_bytes)), 1, index, quota)


def test_chunk_0_without_a_head_is_refused() -> None:
    with pytest.raises(PeerError, match="no head"):
        add_chunk(None, wire.UpdateChunk(install=INSTALL, count=1, chunk_bytes=CHUNK), memoryview(b"x"), 1, 0, CHUNK)


def test_a_chunk_that_contradicts_the_ones_before_is_refused_and_changes_nothing() -> None:
    assembly = add_chunk(None, chunk(3, 0), memoryview(bytes(CHUNK)), 1, 0, 9 * CHUNK)
    for other in (chunk(4, 1), chunk(3, 1, chunk_bytes=2 * CHUNK)):
        with pytest.raises(PeerError, match="speaks of"):
            add_chunk(assembly, other, memoryview(bytes(other.chunk_bytes)), 1, 1, 9 * CHUNK)
    assert list(assembly.chunks) == [0]


def test_a_newer_sequence_or_another_install_begins_anew() -> None:
    first = add_chunk(None, chunk(3, 0), memoryview(bytes(CHUNK)), 1, 0, 9 * CHUNK)
    newer = add_chunk(first, chunk(2, 1), memoryview(b"x"), 2, 1, 9 * CHUNK)
    assert (newer.sequence, list(newer.chunks)) == (2, [1])
    other = add_chunk(newer, chunk(2, 1, install=bytes(16)), memoryview(b"y"), 2, 1, 9 * CHUNK)
    assert (other.install, list(other.chunks)) == (bytes(16), [1])


def test_an_assembly_never_holds_more_than_the_quota_and_one_chunk() -> None:
    quota = 7 * CHUNK + 11
    assembly: Assembly | None = None
    for index in range(wire.MAX_CHUNKS):
        try:
            assembly = add_chunk(assembly, chunk(8, index), memoryview(bytes(CHUNK if index < 7 else 11)), 1, index, quota)
        except PeerError:
            break
    assert assembly is not None
    assert sum(map(len, assembly.chunks.values())) <= quota + CHUNK


def test_bytes_that_are_not_what_the_digest_promised_are_no_update() -> None:
    whole = bytes(100)
    assembly = add_chunk(None, chunk(1, 0, whole), memoryview(b"\x01" + whole[1:]), 1, 0, CHUNK)
    assert uploads.whole_payload(assembly) is None
    assembly = add_chunk(None, chunk(1, 0, whole), memoryview(whole[:-1]), 1, 0, CHUNK)
    assert uploads.whole_payload(assembly) is None


# ---- what is checked of a whole update -----------------------------------------------------------------------------------------------

UP = 1_000_000.0


def leased(up: values.WireDtype = "float32") -> Ledger:
    """One device with a lease on version 0, level 4 (the whole model)."""
    ledger = Ledger.start(task(wire={"up": up}), LAYOUT, INITIAL)
    ledger.apply(Joined(device="d0", install=INSTALL.hex(), uplink_bps=UP, density=1.0))
    ledger.apply(Published(version=0, chunk_bytes=CHUNK))
    ledger.apply(Assigned(device="d0", number=1, version=0, epoch=0, level=4, dtype=up, deadline_s=30.0))
    return ledger


def assembled(ledger: Ledger, payload: bytes | None = None, **fields: Any) -> tuple[Assembly, bytes]:
    if payload is None:
        payload = values.encode(ledger.published[0].base(LAYOUT.size) + np.float32(0.01), "float32", 40)
    known: dict[str, Any] = {"assignment": 1, "version": 0, "epoch": 0, "level": 4, "dtype": "float32", "examples": 5}
    known |= {"size": len(payload), "digest": wire.digest(payload)}
    made = wire.UpdateHead(**{**known, **fields})
    return Assembly(INSTALL, 0, 1, wire.MAX_CHUNK_BYTES, made, {0: payload}), payload


def test_a_good_update_is_accepted() -> None:
    ledger = leased()
    entry = uploads.checked(ledger, "d0", *assembled(ledger), UP)
    assert entry.norm == pytest.approx(0.01 * LAYOUT.size**0.5, rel=1e-3)
    assert entry.round_s > 0


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 3}, "not what was assigned"),
        ({"epoch": 1}, "not what was assigned"),
        ({"level": 0}, "not what was assigned"),
        ({"assignment": 2}, "never given"),
        ({"dtype": "int8"}, "takes float32"),
        ({"dtype": "int4"}, "takes float32"),
        ({"size": 12}, "12 bytes"),
    ],
)
def test_an_update_that_is_not_what_was_assigned_is_refused(fields: dict[str, Any], why: str) -> None:
    ledger = leased()
    with pytest.raises(PeerError, match=why) as caught:
        uploads.checked(ledger, "d0", *assembled(ledger, **fields), UP)
    assert not isinstance(caught.value, uploads.TooLateError)


def test_a_step_with_masks_costs_what_a_full_one_does() -> None:
    """tbar of 20 s of compute at any level: masks do not make it shorter, so nothing is scaled up."""
    ledger = leased()
    ledger.apply(Assigned(device="d0", number=2, version=0, epoch=0, level=0, dtype="float32", deadline_s=30.0))
    payload = values.encode(ledger.published[0].base(ledger.order.lengths[0]), "float32", 40)
    entry = uploads.checked(ledger, "d0", *assembled(ledger, payload, assignment=2, level=0, seconds=20.0), UP)
    full_bytes = values.encoded_size(entry.dtype, LAYOUT.size, ledger.order.always_kept)
    assert entry.round_s == pytest.approx(20.0 + 8 * full_bytes / UP)


def test_what_was_checked_is_taken_in_without_being_made_again() -> None:
    ledger = leased("int8")
    payload = values.encode(np.full(LAYOUT.size, 0.01, np.float32), "int8", 40)
    entry = uploads.checked(ledger, "d0", *assembled(ledger, payload, dtype="int8"), UP)
    made = ledger.reconstruct(entry, payload)
    assert ledger.reconstruct(entry, payload) is made
    other = ledger.reconstruct(entry, bytearray(payload))  # what may change is made each time
    assert other is not made
    assert np.array_equal(other[0], made[0])
    assert ledger.reconstruct(entry, bytearray(payload)) is not other
    with pytest.raises(PeerError):
        ledger.reconstruct(entry, payload[:-1])
    uploads.checked(ledger, "d0", *assembled(ledger, payload, dtype="int8"), UP)
    ledger.apply(entry, payload)
    assert ledger.at_hand is None
    assert np.array_equal(ledger.buffer["d0"].update.values, made[0])


@pytest.mark.parametrize("up", values.DELTA_DTYPES)
def test_a_delta_is_checked_as_the_values_that_it_makes(up: values.WireDtype) -> None:
    ledger = leased(up)
    delta = np.full(LAYOUT.size, 0.01, np.float32)
    payload = values.encode(delta, up, 40)
    entry = uploads.checked(ledger, "d0", *assembled(ledger, payload, dtype=up), UP)
    assert entry.norm == pytest.approx(0.01 * LAYOUT.size**0.5, rel=1e-3)
    trained, base, _ = ledger.reconstruct(entry, payload)
    np.testing.assert_allclose(trained - base, delta, rtol=1e-3)
    for wrong, why in (
        (values.encode(delta * np.float32(1e4), up, 40), "norm"),
        (payload[:-1], "bytes"),
        (payload[:-1] + b"\x80", "-8" if up == "int4" else "-128"),
        (payload[:160] + np.float16(np.nan).tobytes() + payload[162:], "not finite"),
    ):
        with pytest.raises(PeerError, match=why):
            uploads.checked(ledger, "d0", *assembled(ledger, wrong, dtype=up), UP)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_values_that_no_training_gives_are_refused(bad: float) -> None:
    ledger = leased()
    changed = ledger.published[0].base(LAYOUT.size)
    changed[70] = bad
    with pytest.raises(PeerError, match=r"not finite|norm"):
        uploads.checked(ledger, "d0", *assembled(ledger, changed.tobytes()), UP)


def test_of_an_older_assignment_only_the_version_must_still_be_held() -> None:
    ledger = leased()
    ledger.apply(Assigned(device="d0", number=2, version=0, epoch=0, level=0, dtype="float32", deadline_s=30.0))
    assert uploads.checked(ledger, "d0", *assembled(ledger), UP).level == 4
    del ledger.published[0]
    ledger.version = 1
    with pytest.raises(uploads.TooLateError, match="after its deadline"):
        uploads.checked(ledger, "d0", *assembled(leased()), UP)
    with pytest.raises(PeerError, match="never given") as caught:
        uploads.checked(ledger, "d0", *assembled(leased(), version=9), UP)
    assert not isinstance(caught.value, uploads.TooLateError), "a version that never was is not merely late"


def test_the_norm_bound_follows_the_level_then_all_levels_then_the_base() -> None:
    ledger = leased()
    factor = ledger.task.fleet.norm_bound
    assert uploads.norm_bound(ledger, 0, 2.0) == factor * 2.0
    ledger.norms = {4: [1.0, 2.0, 3.0]}
    assert uploads.norm_bound(ledger, 4, 9.0) == factor * 2.0
    ledger.norms[4] = [1e-6] * 32  # a device with hardly any data came first
    assert uploads.norm_bound(ledger, 4, 9.0) == pytest.approx(factor * 0.09)
    ledger.norms = {4: [1.0, 2.0, 3.0]}
    lengths = ledger.order.lengths
    assert uploads.norm_bound(ledger, 0, 9.0) == pytest.approx(factor * 2.0 * (lengths[0] / lengths[4]) ** 0.5)


def test_a_level_that_stood_still_may_move_again() -> None:
    ledger = leased()
    ledger.norms = {4: [0.0] * 32}
    entry = uploads.checked(
        ledger, "d0", *assembled(ledger, values.encode(ledger.published[0].base(LAYOUT.size) * np.float32(1.001), "float32", 40)), UP
    )
    assert entry.norm > 0


@pytest.mark.parametrize("seconds", [0.0, 1e-300, 1e12])
@pytest.mark.parametrize("uplink_bps", [1.0, 1e12])
def test_whatever_times_a_device_claims_the_ledger_takes_the_update(seconds: float, uplink_bps: float) -> None:
    ledger = leased()
    assembly, payload = assembled(ledger, seconds=seconds)
    entry = uploads.checked(ledger, "d0", assembly, payload, uplink_bps)
    ledger.apply(entry, payload)
    assert ledger.devices["d0"].full_round_s == [entry.round_s]
