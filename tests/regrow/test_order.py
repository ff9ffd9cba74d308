import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.errors import LocalError
from regrow.order import Order, build_order, check_floor, importance, level_length
from regrow.parameters import Layout, Tensor
from regrow.reference import mask_of_density

LAYOUT = Layout((Tensor("a", (6,)), Tensor("bias", (2,), True), Tensor("b", (4,))))


def floats(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_hand_computed_order() -> None:
    scores = floats([5, 1, 1, 9, 0, 2, 0, 0, 7, 3, 1, 1])
    order = build_order(LAYOUT, scores, (0.4, 0.75, 1.0), epoch=3)
    assert (order.epoch, order.lengths, order.always_kept) == (3, (5, 9, 12), 2)
    # 6, 7 always kept; 9, 7, 5 are the largest; then 3, 2 and, of four ones, the two of lowest coordinate
    assert order.coordinates.tolist() == [6, 7, 0, 3, 8, 1, 2, 5, 9, 4, 10, 11]
    assert order.segments() == ((0, 2), (2, 5), (5, 9), (9, 12))
    assert order.position_of[order.coordinates].tolist() == list(range(12))


@settings(max_examples=200)
@given(st.data())
def test_every_level_is_the_reference_mask(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    kept = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    layout = Layout(tuple(Tensor(f"t{i}", (s,), k) for i, (s, k) in enumerate(zip(sizes, kept, strict=True))))
    scores = floats(data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.5, np.inf]), min_size=layout.size, max_size=layout.size)))
    densities = sorted({*data.draw(st.lists(st.floats(0.01, 1.0), max_size=6)), 1.0})
    order = build_order(layout, scores, densities, epoch=0)
    for length in order.lengths:
        mask = np.zeros(layout.size, np.bool_)
        mask[order.coordinates[:length]] = True
        expected = mask_of_density(scores.astype(np.float64), layout.always_kept_coordinates, length)
        np.testing.assert_array_equal(mask, expected)


def test_floor_puts_every_layers_largest_weights_first() -> None:
    scores = floats([9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0])
    magnitude = floats([1, 2, 1, 1, 1, 1, 0, 0, 3, 8, 3, 8])
    assert check_floor(LAYOUT, (0.5, 1.0), 0.25) == (2, 1)
    order = build_order(LAYOUT, scores, (0.5, 1.0), 0, floor=0.25, magnitude=magnitude)
    assert order.coordinates[:6].tolist() == [6, 7, 0, 1, 2, 9]  # floor: 0 and 1 (a tie's lower), 9; then 2 by importance
    with pytest.raises(LocalError, match="room for 0"):
        build_order(LAYOUT, scores, (0.1, 1.0), 0, floor=0.25, magnitude=magnitude)
    with pytest.raises(LocalError, match="magnitudes"):
        build_order(LAYOUT, scores, (0.5, 1.0), 0, floor=0.25)


def test_costs_divide_a_layers_importance() -> None:
    scores = floats([4, 4, 4, 4, 4, 4, 0, 0, 3, 3, 3, 3])
    order = build_order(LAYOUT, scores, (0.5, 1.0), 0, costs={"a": 2.0})
    assert order.coordinates[2:6].tolist() == [8, 9, 10, 11]
    for costs in ({"a": 0.0}, {"a": float("nan")}, {"nobody": 1.0}):
        with pytest.raises(LocalError, match="cost"):
            build_order(LAYOUT, scores, (0.5, 1.0), 0, costs=costs)


def test_always_kept_ones_count_and_may_fill_a_level() -> None:
    order = build_order(LAYOUT, floats([0] * 12), (0.01, 0.02, 1.0), 0)
    assert order.lengths == (2, 2, 12)
    assert order.segments() == ((0, 2), (2, 12))
    assert [level_length(d, 100, 7) for d in (0.05, 0.1, 1.0)] == [7, 10, 100]
    for density in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(LocalError):
            level_length(density, 100, 7)


def test_importance_kinds() -> None:
    w, dw, squares = floats([1, -2, 3]), floats([-4, 5, 0]), floats([7, 8, 9])
    assert importance("wg", w, change=dw).tolist() == [4, 10, 0]
    assert importance("w", w).tolist() == [1, 2, 3]
    assert importance("g", w, accumulated_squares=squares).tolist() == [7, 8, 9]
    for kind in ("wg", "g", "x"):
        with pytest.raises(LocalError):
            importance(kind, w)  # type: ignore[arg-type]  # one of them is wrong on purpose


def test_bad_input_is_refused() -> None:
    good = floats([0] * 12)
    with pytest.raises(LocalError, match="NaN"):
        build_order(LAYOUT, floats([0] * 11 + [np.nan]), (1.0,), 0)
    for densities in ((), (0.5,), (0.5, 0.5, 1.0), (1.0, 0.5)):
        with pytest.raises(LocalError):
            build_order(LAYOUT, good, densities, 0)
    with pytest.raises(LocalError):
        build_order(LAYOUT, good.astype(np.float64), (1.0,), 0)


@pytest.mark.parametrize(
    ("coordinates", "lengths", "always_kept"),
    [
        ([0, 0, 2], (3,), 0),
        ([0, 1, 3], (3,), 0),
        ([1, 0, 2], (3,), 0),
        ([0, 1, 2], (2,), 0),
        ([0, 1, 2], (2, 1, 3), 0),
        ([0, 1, 2], (1, 3), 2),
    ],
)
def test_an_order_that_is_none_is_refused(coordinates: list[int], lengths: tuple[int, ...], always_kept: int) -> None:
    with pytest.raises(LocalError):
        Order(0, np.array(coordinates, np.uint32), lengths, always_kept)
