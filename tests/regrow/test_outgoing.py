"""Updates on their way out: nothing that was learned is lost to rounding, rejection or reboot."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regrow import outgoing, values, wire
from regrow.errors import LocalError, PeerError
from regrow.outgoing import Outgoing
from regrow.values import WireDtype
from tests.golden.examples import EXAMPLES, INSTALL

N, KEPT = 900, 20
STEPS: dict[WireDtype, int] = {"int8": 127, "int4": 7}
COMMON = settings(max_examples=20)
Floats = NDArray[np.float32]


def assignment(dtype: WireDtype = "int8", chunk_bytes: int = wire.MIN_CHUNK_BYTES) -> wire.Assignment:
    message = EXAMPLES["assignment"][0]
    if not isinstance(message, wire.Assignment):
        raise TypeError("example")
    return msgspec.structs.replace(message, dtype=dtype, chunk_bytes=chunk_bytes)


def made(
    trained: Floats,
    base: Floats,
    coordinates: NDArray[np.uint32],
    owed: NDArray[np.float16] | None,
    dtype: WireDtype = "int8",
    sequence: int = 0,
) -> Outgoing:
    return outgoing.make(
        assignment(dtype),
        run="r1",
        sequence=sequence,
        trained=trained,
        base=base,
        coordinates=coordinates,
        size=N,
        always_kept=KEPT,
        owed=owed,
        examples=10,
        loss=0.5,
        seconds=1.0,
        scores=[],
    )


def prefix(generator: np.random.Generator, length: int) -> NDArray[np.uint32]:
    """Flat coordinates: 0..KEPT are always kept, then any others."""
    rest = KEPT + generator.permutation(N - KEPT)[: length - KEPT]
    return np.concatenate([np.arange(KEPT), np.sort(rest)]).astype(np.uint32)


@COMMON
@given(st.integers(0, 1000), st.lists(st.integers(KEPT, N), min_size=5, max_size=50), st.floats(1e-4, 10), st.sampled_from([*STEPS]))
def test_what_was_sent_plus_the_residual_is_the_sum_of_the_true_deltas(
    seed: int, lengths: list[int], scale: float, dtype: WireDtype
) -> None:
    generator = np.random.default_rng(seed)
    true, sent = np.zeros(N), np.zeros(N)
    owed: NDArray[np.float16] | None = None
    for length in lengths:
        where = prefix(generator, length)
        base = generator.normal(size=length).astype(np.float32)
        trained = base + np.float32(scale) * generator.normal(size=length).astype(np.float32)
        update = made(trained, base, where, owed, dtype)
        true[where] += trained.astype(np.float64) - base
        sent[where] += values.decode(update.payload, dtype, length, KEPT)
        owed = update.owed
    assert owed is not None
    # float16 keeps a residual to 2^-11 of itself, and a residual is at most a scale, 1/127 or 1/7 of the largest value of its group.
    allowed = len(lengths) * (scale * 5 / STEPS[dtype] * 2**-10 + 1e-5)
    np.testing.assert_allclose(sent + owed.astype(np.float64), true, atol=allowed)
    assert np.abs(sent - true).max() <= scale * 12 / STEPS[dtype] + allowed, "the debt grows with the rounds"


@pytest.mark.parametrize("dtype", STEPS)
def test_a_late_rejection_owes_the_sent_delta_again(dtype: WireDtype) -> None:
    generator = np.random.default_rng(5)
    where = prefix(generator, 500)
    base = np.zeros(500, np.float32)
    trained = generator.normal(size=500).astype(np.float32)
    first = made(trained, base, where, None, dtype)
    late = first.rejected()
    assert late.closed
    assert late.payload == b""
    assert late.owed is not None
    np.testing.assert_allclose(late.owed[where[KEPT:]].astype(np.float32), trained[KEPT:], rtol=2e-3, atol=1e-4)
    again = made(base, base, where, late.owed, dtype, sequence=1)
    received = values.decode(again.payload, dtype, 500, KEPT)
    np.testing.assert_allclose(received[KEPT:], trained[KEPT:], atol=4 / STEPS[dtype])
    assert not received[:KEPT].any(), "always-kept values travel exactly and are not owed"


def test_a_rejected_update_without_error_feedback_owes_nothing() -> None:
    base = np.zeros(100, np.float32)
    update = made(base + 1, base, np.arange(100, dtype=np.uint32), None, dtype="float16")
    assert update.owed is None
    assert update.rejected().owed is None


@COMMON
@given(st.integers(0, 1000), st.integers(KEPT, N), st.sampled_from([*STEPS, "float16", "float32"]))
def test_after_a_reboot_update_and_residual_are_the_same(seed: int, length: int, dtype: WireDtype) -> None:
    generator = np.random.default_rng(seed)
    where = prefix(generator, length)
    base = generator.normal(size=length).astype(np.float32)
    update = made(base + generator.normal(size=length).astype(np.float32), base, where, None, dtype=dtype, sequence=7)
    again = outgoing.from_bytes(update.to_bytes(), N)
    assert (again.run, again.sequence, again.head, again.payload) == (update.run, update.sequence, update.head, update.payload)
    assert [again.chunk(i, INSTALL) for i in range(again.count)] == [update.chunk(i, INSTALL) for i in range(update.count)]
    expected = np.zeros(N, np.float16) if update.owed is None else update.owed
    given_back = np.zeros(N, np.float16) if again.owed is None else again.owed
    assert expected.tobytes() == given_back.tobytes()
    unsized = outgoing.from_bytes(update.to_bytes(), None)
    following = [made(base, base, where, owed, dtype=dtype).payload for owed in (update.owed, unsized.owed)]
    assert following[0] == following[1], "the next update depends on whether there was a reboot"


def test_chunks_join_to_the_payload_and_only_the_first_carries_the_head() -> None:
    base = np.zeros(20_000, np.float32)
    update = outgoing.make(
        assignment("float32"),
        run="r1",
        sequence=0,
        trained=base,
        base=base,
        coordinates=np.arange(base.size, dtype=np.uint32),
        size=base.size,
        always_kept=0,
        owed=None,
        examples=0,
        loss=0.0,
        seconds=0.0,
        scores=[],
    )
    parts = [wire.decode(update.chunk(index, INSTALL), wire.UpdateChunk) for index in range(update.count)]
    assert b"".join(part for _, part in parts) == update.payload
    assert [chunk.head is not None for chunk, _ in parts] == [True, False, False, False, False]
    assert {chunk.count for chunk, _ in parts} == {5}
    assert update.head.examples == 1, "the wire has no update of nothing"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_training_never_leaves_the_device(bad: float) -> None:
    base = np.zeros(50, np.float32)
    trained = base.copy()
    trained[30] = bad
    with pytest.raises(PeerError, match="diverged"):
        made(trained, base, np.arange(50, dtype=np.uint32), None)


def test_a_score_that_is_not_finite_stays_at_home() -> None:
    base = np.zeros(50, np.float32)
    update = outgoing.make(
        assignment(),
        run="r1",
        sequence=0,
        trained=base,
        base=base,
        coordinates=np.arange(50, dtype=np.uint32),
        size=50,
        always_kept=0,
        owed=None,
        examples=1,
        loss=0.0,
        seconds=0.0,
        scores=[wire.Score(0, float("nan"), 0.0, 5), wire.Score(1, 0.5, 0.5, 5), wire.Score(2, float("inf"), 0.5, 5)],
    )
    assert update.head.scores == [wire.Score(1, 0.5, 0.5, 5)]
    wire.decode(update.chunk(0, INSTALL), wire.UpdateChunk)


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.sampled_from(["cut", "flip", "garbage"]))
def test_a_corrupt_file_is_a_local_error_or_reads_as_one(at: int, how: str) -> None:
    generator = np.random.default_rng(1)
    base = np.zeros(200, np.float32)
    update = made(generator.normal(size=200).astype(np.float32), base, np.arange(200, dtype=np.uint32), None)
    data = bytearray(update.to_bytes())
    at %= len(data)
    if how == "cut":
        del data[at:]
    elif how == "flip":
        data[at] ^= 0xFF
    else:
        data[at:] = b"\xff" * 20
    if how != "flip":
        with pytest.raises(LocalError, match="set aside"):
            outgoing.from_bytes(bytes(data), None)
        return
    with suppress(LocalError):  # a flipped bit of the residual cannot be seen here; the folder's checksum sees it
        outgoing.from_bytes(bytes(data), None)


@pytest.mark.parametrize("dtype", STEPS)
def test_the_residual_saturates_instead_of_overflowing(dtype: WireDtype) -> None:
    base = np.zeros(50, np.float32)
    trained = np.full(50, 3e38, np.float32)
    update = made(trained, base, np.arange(50, dtype=np.uint32), None, dtype)
    assert update.owed is not None
    assert np.isfinite(update.owed).all()
    late = update.rejected()
    assert late.owed is not None
    assert np.isfinite(late.owed).all()


def test_a_negative_zero_is_no_debt() -> None:
    owed = np.zeros(N, np.float16)
    owed[[3, 50]] = 0.25, 6e-8  # the second is subnormal
    signed = owed.copy()
    signed[[1, 7, N - 1]] = -0.0
    update = made(np.zeros(KEPT, np.float32), np.zeros(KEPT, np.float32), np.arange(KEPT, dtype=np.uint32), None, "int8")
    files = [dataclasses.replace(update, owed=each).to_bytes() for each in (owed, signed)]
    assert files[0] == files[1]
    back = outgoing.from_bytes(files[1], N).owed
    assert back is not None
    np.testing.assert_array_equal(back, owed)
