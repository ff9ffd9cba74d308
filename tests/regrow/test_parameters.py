import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import LocalError, PeerError
from regrow.parameters import Layout, Tensor

LAYOUT = Layout((Tensor("conv.weight", (2, 3)), Tensor("conv.bias", (2,), True), Tensor("scale", (), True)))


def test_flat_coordinates_follow_the_tensors_in_order() -> None:
    assert LAYOUT.size == 9
    assert LAYOUT.slices == {"conv.weight": slice(0, 6), "conv.bias": slice(6, 8), "scale": slice(8, 9)}
    assert LAYOUT.always_kept_coordinates.tolist() == [6, 7, 8]
    assert LAYOUT.always_kept_coordinates.dtype == np.uint32


def test_unflatten_gives_views_and_flatten_inverts_it() -> None:
    vector = np.arange(9, dtype=np.float32)
    arrays = LAYOUT.unflatten(vector)
    assert arrays["conv.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    arrays["scale"][...] = 70
    assert vector[8] == 70
    np.testing.assert_array_equal(LAYOUT.flatten(arrays), vector)


def test_flatten_refuses_what_does_not_fit() -> None:
    good = LAYOUT.unflatten(np.zeros(9, np.float32))
    for change in (
        {"other": np.zeros(1, np.float32)},
        {"scale": np.zeros(1, np.float32)},
        {"conv.bias": np.zeros(2, np.float64)},
    ):
        with pytest.raises(LocalError):
            LAYOUT.flatten({**good, **change})
    with pytest.raises(LocalError, match="missing"):
        LAYOUT.flatten({"scale": good["scale"]})
    with pytest.raises(LocalError):
        LAYOUT.unflatten(np.zeros(8, np.float32))


@pytest.mark.parametrize("shape", [(0,), (-1, 2), (2**31,), (2**16, 2**16), (1,) * 17])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LocalError):
        Tensor("t", shape)


def test_names_are_unique_and_the_total_is_bounded() -> None:
    with pytest.raises(LocalError, match="named"):
        Layout((Tensor("a", (1,)), Tensor("a", (2,))))
    with pytest.raises(LocalError, match="coordinates"):
        Layout((Tensor("a", (2**30,)), Tensor("b", (2**30,))))
    for nothing in ("", "line\nbreak", "x" * 257):
        with pytest.raises(LocalError):
            Tensor(nothing, (1,))
    with pytest.raises(LocalError):
        Layout(())


def test_json_round_trip() -> None:
    assert Layout.from_json(LAYOUT.to_json()) == LAYOUT


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "truncated"),
        (b'{"tensors":[]}', r"\$.tensors"),
        (b'{"tensors":[{"name":"a","shape":[2.5],"always_kept":true}]}', r"\$.tensors\[0\].shape\[0\]"),
        (b'{"tensors":[{"name":"a","shape":[0],"always_kept":true}]}', r"shape\[0\]"),
        (b'{"tensors":[{"name":"a","shape":[2],"always_kept":1}]}', "always_kept"),
        (b'{"tensors":[{"name":"a","shape":[65536,65536],"always_kept":true}]}', "tensor a"),
        (b'{"tensors":[{"name":"a","shape":[1],"always_kept":true,"x":1}]}', "unknown field"),
        (b'{"tensors":[' + b",".join([b'{"name":"a","shape":[1],"always_kept":true}'] * 10_001) + b"]}", "10000"),
        (b" " * (1024 * 1024 + 1), "1048576"),
        (b"[" * 100_000, "layout"),
    ],
)
def test_wrong_json_names_the_place(data: bytes, place: str) -> None:
    with pytest.raises(PeerError, match=place):
        Layout.from_json(data)


@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_mutated_json_parses_or_is_a_peer_error(at: int, byte: int, cut: int) -> None:
    data = bytearray(LAYOUT.to_json())
    data[at % len(data)] = byte
    with contextlib.suppress(PeerError):
        assert Layout.from_json(bytes(data[: len(data) - cut % len(data)])).size > 0
