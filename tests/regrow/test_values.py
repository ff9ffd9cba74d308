from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regrow import values
from regrow.errors import LocalError, PeerError

DTYPES = ("float32", "float16", "int8", "int4")
GROUPED: dict[values.WireDtype, tuple[int, int]] = {
    "int8": (values.GROUP, 127),
    "int4": (values.INT4_GROUP, 7),
}  # values of one scale, largest |q|
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def vectors(elements: Any = FINITE, max_size: int = 700) -> Any:
    return hnp.arrays(np.float32, st.integers(0, max_size), elements=elements, fill=st.nothing() if max_size < 50 else FINITE)


def rounded(vector: np.ndarray, dtype: Any, always_kept: int) -> np.ndarray:
    """What the receiver will hold."""
    return values.decode(values.encode(vector, dtype, always_kept), dtype, vector.size, always_kept)


@settings(max_examples=150)
@given(vectors(), st.sampled_from(DTYPES), st.data())
def test_round_trip(vector: np.ndarray, dtype: Any, data: st.DataObject) -> None:
    always_kept = data.draw(st.integers(0, vector.size))
    payload = values.encode(vector, dtype, always_kept)
    assert len(payload) == values.encoded_size(dtype, vector.size, always_kept)
    decoded = values.decode(payload, dtype, vector.size, always_kept)
    np.testing.assert_array_equal(decoded[:always_kept], vector[:always_kept])
    rest, back = vector[always_kept:].astype(np.float64), decoded[always_kept:].astype(np.float64)
    if dtype == "float32":
        np.testing.assert_array_equal(back, rest)
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(back, np.clip(rest, -65504, 65504).astype(np.float16))
    else:
        size, steps = GROUPED[dtype]
        for start in range(0, rest.size, size):
            group = rest[start : start + size]
            scale = max(np.abs(group).max() / steps * (1 + 2**-10), 2.0**-24)
            clipped = np.clip(group, -65504 * steps, 65504 * steps)
            assert np.abs(back[start : start + size] - clipped).max() <= scale * 0.501
    np.testing.assert_array_equal(rounded(vector, dtype, always_kept), decoded)


def test_decoding_what_was_decoded_changes_nothing() -> None:
    vector = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    once = rounded(vector, "float16", 10)
    np.testing.assert_array_equal(rounded(once, "float16", 10), once)


def test_zero_and_subnormal_groups_are_exact() -> None:
    for dtype, (size, steps) in GROUPED.items():
        vector = np.zeros(3 * size, np.float32)
        vector[size : 2 * size] = 2.0**-24 * (np.arange(size) % (2 * steps + 1) - steps)  # the smallest float16 scale, times q
        vector[2 * size] = 1.0
        back = rounded(vector, dtype, 0)
        np.testing.assert_array_equal(back[: 2 * size], vector[: 2 * size])
        assert back[2 * size] == pytest.approx(1.0, rel=1e-3)


def test_scales_are_rounded_up() -> None:
    vector = np.random.default_rng(2).standard_normal(256 * 64).astype(np.float32)
    for dtype, (size, steps) in GROUPED.items():
        scales = np.frombuffer(values.encode(vector, dtype, 0), "<f2", vector.size // size).astype(np.float32)
        largest = np.abs(vector).reshape(-1, size).max(axis=1)
        assert (scales * steps >= largest).all()
        assert (scales * steps <= largest * 1.001).all()


def test_saturation() -> None:
    vector = np.array([1e30, -1e30, 1.0], np.float32)
    assert rounded(vector, "float16", 0).tolist() == [65504, -65504, 1]
    assert rounded(vector, "int8", 0).tolist() == [65504 * 127, -65504 * 127, 0]
    assert rounded(vector, "int4", 0).tolist() == [65504 * 7, -65504 * 7, 0]
    assert rounded(vector, "float16", 1).tolist() == [np.float32(1e30), -65504, 1]


def test_golden_bytes() -> None:
    vector = np.array([1.5, -2.0, 127.0, -1.0], np.float32)
    assert values.encode(vector, "float32", 1).hex() == "0000c03f000000c00000fe42000080bf"
    assert values.encode(vector, "float16", 1).hex() == "0000c03f00c0f05700bc"
    assert values.encode(vector, "int8", 1).hex() == "0000c03f003cfe7fff"  # scale 1.0; -2, 127, -1
    vector[2] = 7.0
    assert values.encode(vector, "int4", 1).hex() == "0000c03f003c7e0f"  # scale 1.0; -2 low and 7 high, -1 low and padding


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_feedback_loses_nothing_over_rounds(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    residual = np.zeros(600, np.float32)
    wanted, sent_so_far = np.zeros(600), np.zeros(600)
    for _ in range(50):
        delta = rng.standard_normal(600).astype(np.float32)
        payload, sent, residual = values.quantise_with_feedback(delta, residual, dtype, 7)
        np.testing.assert_array_equal(values.decode(payload, dtype, 600, 7), sent)
        wanted += delta
        sent_so_far += sent
        assert not residual[:7].any()
        np.testing.assert_allclose(sent_so_far + residual, wanted, atol=5e-5)
        assert np.abs(residual).max() < (0.4 if dtype == "int4" else 0.03)  # about half a step, however many rounds there were


def test_error_feedback_refuses_a_residual_on_always_kept_positions() -> None:
    with pytest.raises(LocalError):
        values.quantise_with_feedback(np.zeros(4, np.float32), np.ones(4, np.float32), "int8", 2)
    with pytest.raises(LocalError):
        values.quantise_with_feedback(np.zeros(4, np.float32), np.zeros(3, np.float32), "int8", 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_refused_on_both_sides(bad: float, dtype: Any) -> None:
    vector = np.array([0, 0, bad], np.float32)
    for always_kept in (0, 3):
        with pytest.raises(LocalError, match="position 2"):
            values.encode(vector, dtype, always_kept)
    with pytest.raises(PeerError):
        values.decode(vector.tobytes(), dtype, 3, 3)
    if dtype != "float32":
        half = np.array([bad], np.float16).tobytes()
        with pytest.raises(PeerError):
            values.decode(half + (b"\x01" if dtype in values.DELTA_DTYPES else b""), dtype, 1, 0)


def test_negative_scales_and_the_128th_step_are_refused() -> None:
    for payload in (np.float16(-1).tobytes() + b"\x01", np.float16(1).tobytes() + b"\x80", np.float16(-0.0).tobytes() + b"\x00"):
        with pytest.raises(PeerError):
            values.decode(payload, "int8", 1, 0)


def test_an_int4_value_of_minus_8_in_either_nibble_and_padding_are_refused() -> None:
    one = np.float16(1).tobytes()
    assert values.decode(one + b"\x79", "int4", 2, 0).tolist() == [-7, 7]
    for scale, packed, length, why in (
        (one, b"\x08", 2, "-8"),
        (one, b"\x80", 2, "-8"),
        (one, b"\x11", 1, "padding"),
        (one, b"\x80", 1, "padding"),
        (np.float16(-1).tobytes(), b"\x01", 1, "scale"),
        (np.float16(-0.0).tobytes(), b"\x00", 1, "scale"),
        (np.float16(np.inf).tobytes(), b"\x00", 1, "scale"),
        (one, b"\x01\x01", 2, "bytes"),
        (one, b"\x01", 3, "bytes"),
    ):
        with pytest.raises(PeerError, match=why):
            values.decode(scale + packed, "int4", length, 0)


@given(st.lists(st.integers(-7, 7), max_size=200), st.floats(2.0**-10, 100, width=16))
def test_int4_values_lie_where_the_protocol_says(quantised: list[int], scale: float) -> None:
    """Built nibble by nibble: two's complement, the first of a pair low, a scale for every 64."""
    scales = [scale * 2**group for group in range(-(-len(quantised) // 64))]
    packed = bytearray(-(-len(quantised) // 2))
    for place, q in enumerate(quantised):
        packed[place // 2] |= (q & 15) << 4 * (place % 2)
    payload = np.float32(0.5).tobytes() + np.array(scales, "<f2").tobytes() + bytes(packed)
    decoded = values.decode(payload, "int4", 1 + len(quantised), 1)
    assert decoded.tolist() == [0.5, *(float(np.float32(scales[place // 64] * q)) for place, q in enumerate(quantised))]


@settings(max_examples=200)
@given(st.binary(max_size=40), st.sampled_from(DTYPES), st.integers(0, 20), st.integers(0, 20))
def test_any_bytes_decode_finite_or_are_a_peer_error(payload: bytes, dtype: Any, length: int, always_kept: int) -> None:
    always_kept = min(always_kept, length)
    try:
        decoded = values.decode(payload, dtype, length, always_kept)
    except PeerError:
        return
    assert decoded.shape == (length,)
    assert np.isfinite(decoded).all()


def test_size_is_checked_before_anything_is_allocated() -> None:
    with pytest.raises(PeerError, match="bytes"):
        values.decode(b"", "float32", 2**40, 0)
    with pytest.raises(LocalError, match="dtype"):
        values.encode(np.zeros(1, np.float32), "int2", 0)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(LocalError):
        values.encoded_size("int8", 3, 4)
    assert [values.encoded_size("int4", 5 + rest, 5) - 20 for rest in (0, 1, 2, 64, 65)] == [0, 3, 3, 34, 37]
