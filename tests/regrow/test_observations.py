"""Rows of observations: every kind survives the wire, and whatever else comes is one PeerError."""

from __future__ import annotations

import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import LocalError, PeerError
from regrow.observations import (
    MAX_BATCH_BYTES,
    MAX_ROWS,
    Certainty,
    Field,
    LinkSeen,
    Mark,
    Missing,
    Phase,
    PhaseSeen,
    Row,
    TransferSeen,
    What,
    decode_rows,
    encode_rows,
    keeps_still,
    phase_at,
)

RATES = st.floats(0, 1e12)
COUNTS = st.integers(0, 2**53)
MAYBE = st.none() | RATES
ROW = st.one_of(
    st.builds(TransferSeen, RATES, RATES, st.booleans(), st.sampled_from(get_args(What)), COUNTS, COUNTS, st.text(max_size=64), COUNTS),
    st.builds(LinkSeen, RATES, RATES, st.text(max_size=64), st.none() | COUNTS, st.none() | COUNTS, MAYBE),
    st.builds(PhaseSeen, RATES, RATES, st.sampled_from(get_args(Phase)), MAYBE, st.text(max_size=99), st.sampled_from(get_args(Certainty))),
    st.builds(Missing, RATES, RATES, st.integers(1, 2**53)),
    st.builds(Mark, RATES, st.text(max_size=200)),
)


@given(st.lists(ROW, max_size=20))
def test_rows_come_back_as_they_were(rows: list[Row]) -> None:
    assert decode_rows(encode_rows(rows)) == rows


@given(st.binary(max_size=300))
def test_noise_is_one_peer_error(noise: bytes) -> None:
    try:
        rows = decode_rows(noise)
    except PeerError:
        return
    assert decode_rows(encode_rows(rows)) == rows


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0, 1e13])
def test_a_number_that_cannot_be_is_refused(number: float) -> None:
    with pytest.raises(PeerError, match=r"at_s|Observations"):
        decode_rows(msgspec.msgpack.encode([["k", number, "start"]]))


def test_a_batch_has_bounds_at_both_ends() -> None:
    many = [Mark(1.0, "x")] * (MAX_ROWS + 1)
    with pytest.raises(LocalError, match="at most"):
        encode_rows(many)
    with pytest.raises(PeerError, match="rows"):
        decode_rows(msgspec.msgpack.encode(many))
    with pytest.raises(PeerError, match="bytes"):
        decode_rows(bytes(MAX_BATCH_BYTES + 1))


@pytest.mark.parametrize(
    ("phase", "start_s", "end_s", "expected"),
    [
        ("baseline", 10.0, 20.0, [(5, "", False), (10, "baseline", True), (19.9, "baseline", True), (20, "", False)]),
        ("run", 10.0, 20.0, [(5, "", True), (10, "run", False), (20, "", False)]),
        ("run", 0.0, 0.0, [(0, "run", False), (1e9, "run", False)]),
        ("", 10.0, 20.0, [(5, "", False), (15, "", False)]),
    ],
)
def test_when_a_device_keeps_still(phase: str, start_s: float, end_s: float, expected: list[tuple[float, str, bool]]) -> None:
    said = msgspec.convert({"number": 1, "name": "walk", "phase": phase, "start_s": start_s, "end_s": end_s}, Field)
    assert [(now_s, phase_at(said, now_s), keeps_still(said, now_s)) for now_s, _, _ in expected] == expected
    over = msgspec.structs.replace(said, name="")
    assert not any(phase_at(over, now_s) or keeps_still(over, now_s) for now_s, _, _ in expected)
