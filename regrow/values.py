"""Values on the wire: float32, float16, int8 with one float16 scale per 256 values, or int4 with one per 64.

All little-endian and in position order. The always-kept segment is float32 in every dtype.

    float32, float16   float32 [always_kept], then the rest in the dtype
    int8               float32 [always_kept], float16 scale [ceil(m / 256)], int8 [m], m the rest; a value is scale * q
    int4               float32 [always_kept], float16 scale [ceil(m / 64)], uint8 [ceil(m / 2)]: q in -7..7 in two's
                       complement, the first of a pair in the low four bits; padding is 0

float16, int8 and int4 saturate instead of overflowing: at +-65504, times 127 or 7. int8 and int4 suit *deltas*: what
rounding loses stays with the sender as its error-feedback residual. Peers may send neither a non-finite number, nor a
negative scale, nor q = -128 or -8, nor padding other than 0.

Why int4 is so. Measured on chains of 20 deltas of reduced_cnn (full model and density 0.2, early and late in training):
the residual has |r|^2 = 1.4 % of |delta|^2 with 32 values a scale, 2.2 % with 64, 3.3 % with 128, 4.8 % with 256; int8's is
0.02 %. One more bit a value would divide it by 4, an eighth of a bit by 1.2. From 128 to 64 an eighth divides it by 1.5;
from 64 to 32 a quarter does, which is no more than a quarter bit should. And 64 makes rounding a contraction whatever the
values: a group loses at most (64 - 1) / 14^2 of its square sum, 256 could lose more than all of it. The scale is the
largest value / 7. The best of seven clipped scales for each group leaves 2.1 %, for seven times the work; clipping at 2.5
or 3 root mean squares leaves 7 to 52 %, because what is cut off is owed for rounds; stochastic rounding leaves 5 %.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError, PeerError

WireDtype = Literal["float32", "float16", "int8", "int4"]
DELTA_DTYPES: tuple[WireDtype, ...] = ("int8", "int4")  # they carry w_i - base with error feedback: for updates only, without slices
GROUP = 256  # int8 values that share one scale
INT4_GROUP = 64  # int4 values that share one scale
FLOAT16_MAX = 65504.0

_PAIRS = np.array([(byte << 4 & 0xF0, byte & 0xF0) for byte in range(256)], np.uint8).view(np.int8) >> 4
_PAIR_WORDS = _PAIRS.view(np.uint16).reshape(-1)  # byte -> its two int8 values, low nibble first, as one word: taken at once


def encoded_size(dtype: WireDtype, length: int, always_kept: int) -> int:
    """The payload's bytes for a prefix of this length.

    Raises:
        LocalError: unknown dtype, or the prefix is shorter than the always-kept segment.
    """
    if not 0 <= always_kept <= length:
        raise LocalError(f"values: a prefix of {length} without the {always_kept} always-kept positions")
    rest = length - always_kept
    if dtype == "float32":
        return 4 * length
    if dtype == "float16":
        return 4 * always_kept + 2 * rest
    if dtype == "int8":
        return 4 * always_kept + 2 * -(-rest // GROUP) + rest
    if dtype == "int4":
        return 4 * always_kept + 2 * -(-rest // INT4_GROUP) + -(-rest // 2)
    raise LocalError(f"values: unknown wire dtype {dtype!r}")


def encode(values: NDArray[np.float32], dtype: WireDtype, always_kept: int) -> bytes:
    """A prefix of the model, or of a delta, as wire bytes.

    Args:
        values: float32 [length], finite, in position order.
        dtype: how the positions behind the always-kept ones travel.
        always_kept: length of the first segment, <= length.

    Raises:
        LocalError: not finite, not float32, or too short.
    """
    encoded_size(dtype, values.size, always_kept)
    _check_finite(values)
    kept = values[:always_kept].astype("<f4").tobytes()
    rest = values[always_kept:]
    if dtype == "float32":
        return kept + rest.astype("<f4").tobytes()
    if dtype == "float16":
        return kept + _to_float16(rest).tobytes()
    if dtype == "int8":
        scales, quantised = _quantise(rest, GROUP, 127)
        return kept + scales.tobytes() + quantised.tobytes()
    scales, quantised = _quantise(rest, INT4_GROUP, 7)
    return kept + scales.tobytes() + _packed(quantised).tobytes()


def decode(payload: bytes | bytearray | memoryview, dtype: WireDtype, length: int, always_kept: int) -> NDArray[np.float32]:
    """The values that `encode` wrote, as the receiver knows them.

    Returns:
        float32 [length], a fresh array.

    Raises:
        PeerError: wrong size, a non-finite number or scale, a negative scale, q = -128 or -8, or padding that is not 0.
        LocalError: unknown dtype, or always_kept > length.
    """
    size = encoded_size(dtype, length, always_kept)
    if len(payload) != size:
        raise PeerError(f"values: {len(payload)} bytes, {length} values as {dtype} take {size}")
    values = np.empty(length, np.float32)
    rest = length - always_kept
    values[:always_kept] = np.frombuffer(payload, "<f4", always_kept)
    offset = 4 * always_kept
    if dtype == "int8":
        scales = np.frombuffer(payload, "<f2", -(-rest // GROUP), offset)
        quantised = np.frombuffer(payload, np.int8, rest, offset + scales.nbytes)
        values[always_kept:] = _dequantise(scales, quantised, GROUP, -128)
    elif dtype == "int4":
        scales = np.frombuffer(payload, "<f2", -(-rest // INT4_GROUP), offset)
        quantised = _unpacked(np.frombuffer(payload, np.uint8, -(-rest // 2), offset + scales.nbytes), rest)
        values[always_kept:] = _dequantise(scales, quantised, INT4_GROUP, -8)
    else:
        values[always_kept:] = np.frombuffer(payload, "<f4" if dtype == "float32" else "<f2", rest, offset)
    if not np.isfinite(values).all():
        raise PeerError(f"values: position {int(np.isfinite(values).argmin())} is not finite")
    return values


def quantise_with_feedback(
    delta: NDArray[np.float32], residual: NDArray[np.float32], dtype: WireDtype, always_kept: int
) -> tuple[bytes, NDArray[np.float32], NDArray[np.float32]]:
    """A delta's payload, with what earlier roundings lost added and what this one loses returned.

    Args:
        delta: float32 [length], w_i - base, in position order.
        residual: float32 [length], what is still owed; 0 on the always-kept positions.
        dtype: wire dtype.
        always_kept: length of the first segment.

    Returns:
        The payload; float32 [length] `sent`, what the receiver decodes; float32 [length], the new residual.
        sent + new residual = delta + residual up to float32 rounding. After a rejection the sender owes
        new residual + sent.

    Raises:
        LocalError: shapes differ, something is not finite, or the residual touches an always-kept position.

    Source: algorithms.md section 1, "what travels" (error feedback).
    """
    if delta.shape != residual.shape or residual[:always_kept].any():
        raise LocalError("values: the residual has another length, or is not 0 on the always-kept positions")
    owed = delta + residual
    payload = encode(owed, dtype, always_kept)
    sent = decode(payload, dtype, owed.size, always_kept)
    return payload, sent, owed - sent


def _to_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype("<f2")


def _quantise(values: NDArray[np.float32], group: int, steps: int) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Scales float16 [ceil(m / group)] and int8 [m]; a scale is rounded up, so that |q| <= steps without clipping."""
    groups = np.zeros((-(-values.size // group), group), np.float32)
    groups.reshape(-1)[: values.size] = values
    exact = np.abs(groups).max(axis=1, initial=0.0) / np.float32(steps)
    scales = _to_float16(exact)
    too_small = (scales < exact) & (scales < FLOAT16_MAX)  # a subnormal float16 scale is rounded up like any other
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    divisors = np.where(scales > 0, scales, np.float16(1.0)).astype(np.float32)
    groups /= divisors[:, None]
    quantised = np.clip(np.rint(groups, out=groups), -steps, steps, out=groups).astype(np.int8)
    return scales.astype("<f2"), quantised.reshape(-1)[: values.size]


def _dequantise(scales: NDArray[np.float16], quantised: NDArray[np.int8], group: int, lowest: int) -> NDArray[np.float32]:
    if not (np.isfinite(scales) & ~np.signbit(scales)).all() or (quantised == lowest).any():
        raise PeerError(f"values: a scale is negative or not finite, or a quantised value is {lowest}")
    values = quantised.astype(np.float32)
    whole = quantised.size // group
    values[: whole * group].reshape(whole, group)[:] *= scales[:whole, None].astype(np.float32)
    if scales.size > whole:
        values[whole * group :] *= np.float32(scales[whole])
    return values


def _packed(quantised: NDArray[np.int8]) -> NDArray[np.uint8]:
    """uint8 [ceil(m / 2)]: two values a byte, the first in the low nibble; the padding of an odd m is 0."""
    pairs = np.zeros(-(-quantised.size // 2) * 2, np.int8)
    pairs[: quantised.size] = quantised
    both = pairs.view("<u2")  # one pass over whole words is faster than two over every other byte
    return (both & 0x0F | both >> 4 & 0xF0).astype(np.uint8)


def _unpacked(packed: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    """int8 [size], -8 included; refuses padding that is not 0, so that an update has one encoding only."""
    if size % 2 and packed[-1] >> 4:
        raise PeerError("values: the padding behind the last int4 value is not 0")
    return _PAIR_WORDS.take(packed).view(np.int8)[:size]


def _check_finite(values: NDArray[Any]) -> None:
    if values.dtype != np.float32 or values.ndim != 1:
        raise LocalError(f"values: {values.dtype}{values.shape}, not a float32 vector")
    finite = np.isfinite(values)
    if not finite.all():
        raise LocalError(f"values: position {int(finite.argmin())} is not finite")
