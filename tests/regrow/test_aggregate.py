from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import reference
from regrow.aggregate import (
    BLOCK,
    Update,
    fed_avg,
    mask_fed_avg,
    reexpress,
    staleness,
)
from regrow.errors import LocalError
from regrow.moves import adaptive_steps, add_deltas, gradient_average, mix
from regrow.order import Order, build_order
from regrow.parameters import Layout, Tensor


def floats(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def weights(values: Any) -> np.ndarray:
    return np.array(values, np.float64)


def whole(n: int) -> tuple[tuple[int, int], ...]:
    return ((0, n),)


class Case:
    """A random buffer, once as prefixes in position space and once as dense masks in flat coordinates."""

    def __init__(self, seed: int, clients: int, n: int, refreshed: bool) -> None:
        rng = np.random.default_rng(seed)
        always_kept = int(rng.integers(0, min(n, 5)))
        layout = Layout(tuple(t for t in (Tensor("a", (n - always_kept,)), *self._bias(always_kept))))
        densities = sorted({*np.round(rng.uniform(0.02, 1, 4), 3).tolist(), 1.0})
        old = build_order(layout, rng.random(n).astype(np.float32), densities, 0)
        self.order = build_order(layout, rng.random(n).astype(np.float32), densities[1:] or [1.0], 1) if refreshed else old
        magnitude = 10.0 ** rng.integers(-3, 4)
        flat = (rng.standard_normal(n) * magnitude).astype(np.float32)
        self.previous, self.flat_previous = flat[self.order.coordinates], flat.astype(np.float64)
        self.updates: list[Update] = []
        self.bases: list[np.ndarray] = []
        self.dense: list[reference.DenseUpdate] = []
        tau = staleness(("constant", "polynomial", "hinge")[seed % 3], a=0.6, b=2)
        self.weights = weights([tau(int(t)) * e for t, e in zip(rng.integers(0, 9, clients), rng.integers(1, 99, clients), strict=True)])
        for i in range(clients):
            from_old = old if refreshed and i % 3 else self.order
            length = int(rng.choice(from_old.lengths))
            trained = (rng.standard_normal(length) * magnitude).astype(np.float32)
            trained[rng.random(length) < 0.1] = 0.0
            base = (rng.standard_normal(n) * magnitude).astype(np.float32)
            kept = from_old.coordinates[:length]
            mask, dense = np.zeros(n, np.bool_), np.zeros(n)
            mask[kept], dense[kept] = True, trained
            update = Update(trained)
            self.updates.append(update if from_old is self.order else reexpress(update, old, self.order))
            self.bases.append(base[self.order.coordinates])
            self.dense.append(reference.DenseUpdate(mask, dense, float(self.weights[i]), base.astype(np.float64)))

    @staticmethod
    def _bias(always_kept: int) -> list[Tensor]:
        return [Tensor("bias", (always_kept,), True)] if always_kept else []

    def tolerance(self) -> np.ndarray:
        """1e-6 * max(|W_{k-1}|, sum beta |w| / sum beta), in flat coordinates."""
        magnitudes = [replace(u, w=np.abs(u.w)) for u in self.dense]
        mean = reference.buff_mask_fed_avg(np.zeros_like(self.flat_previous), magnitudes)
        return np.asarray(1e-6 * np.maximum(np.abs(self.flat_previous), mean))

    def flat(self, positions: np.ndarray) -> np.ndarray:
        result = np.empty(positions.size)
        result[self.order.coordinates] = positions
        return result


cases = st.builds(Case, st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 120), st.booleans())


@settings(max_examples=200)
@given(cases, st.sampled_from([1.0, 0.5, 0.01]))
def test_mask_fed_avg_is_the_papers(case: Case, eta_g: float) -> None:
    before = case.previous.copy()
    ours = mask_fed_avg(case.previous, case.updates, case.weights, case.order.segments(), eta_g)
    np.testing.assert_array_equal(case.previous, before)
    expected = reference.buff_mask_fed_avg(case.flat_previous, case.dense, eta_g)
    assert (np.abs(case.flat(ours) - expected) <= case.tolerance()).all()
    again = mask_fed_avg(case.previous, case.updates, case.weights, case.order.segments(), eta_g)
    assert ours.tobytes() == again.tobytes()


@settings(max_examples=100)
@given(cases)
def test_fed_avg_over_zero_filled_is_the_reference(case: Case) -> None:
    ours = fed_avg(case.previous, case.updates, case.weights)
    expected = reference.zero_filled_fed_avg(case.flat_previous, case.dense)
    assert (np.abs(case.flat(ours) - expected) <= case.tolerance()).all()


@settings(max_examples=100)
@given(cases)
def test_gradient_average_is_the_reference(case: Case) -> None:
    ours = gradient_average(case.previous, case.updates, case.bases, case.weights)
    expected = reference.gradient_average(case.flat_previous, case.dense)
    np.testing.assert_allclose(case.flat(ours), expected, rtol=2e-7, atol=1e-12)


@settings(max_examples=100)
@given(cases, st.floats(0.01, 1.0))
def test_mix_is_fedasync(case: Case, alpha: float) -> None:
    alphas = alpha * case.weights / case.weights.max(initial=1.0)
    ours = mix(case.previous, case.updates, alphas)
    dense = [replace(u, beta=float(a)) for u, a in zip(case.dense, alphas, strict=True)]
    np.testing.assert_allclose(case.flat(ours), reference.fed_async(case.flat_previous, dense), rtol=2e-6, atol=1e-9)


@settings(max_examples=100)
@given(cases, st.floats(0.01, 2.0))
def test_add_deltas_is_fedbuff(case: Case, eta_g: float) -> None:
    ours = add_deltas(case.previous, case.updates, case.bases, eta_g / max(len(case.updates), 1) * case.weights)
    expected = reference.fed_buff(case.flat_previous, case.dense, eta_g)
    np.testing.assert_allclose(case.flat(ours), expected, rtol=2e-6, atol=1e-9 * np.abs(expected).max())


@settings(max_examples=100)
@given(cases, st.floats(0.01, 2.0))
def test_adaptive_steps_are_asyncfededs(case: Case, eta_g: float) -> None:
    before = case.previous.copy()
    ours = adaptive_steps(case.previous, case.updates, case.bases, eta_g)
    expected = reference.async_fed_ed(case.flat_previous, case.dense, eta_g)
    np.testing.assert_array_equal(case.previous, before)
    np.testing.assert_allclose(case.flat(ours), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_methods_of_one_line_by_hand() -> None:
    previous, base = floats([4.0, 4.0, 9.0]), floats([1.0, 1.0, 1.0])
    update = Update(floats([7.0, 1.0]))  # change 6, 0; the model has moved by 3, 3 since its base
    np.testing.assert_allclose(mix(previous, [update], weights([0.5])), [5.5, 2.5, 9.0])
    np.testing.assert_allclose(mix(previous, [update, update], weights([0.5, 0.5])), [6.25, 1.75, 9.0])
    np.testing.assert_allclose(add_deltas(previous, [update, update], [base, base], weights([0.25, 0.25])), [7.0, 4.0, 9.0])
    step = 1.0 / (1.0 + np.sqrt(18.0) / 6.0)
    np.testing.assert_allclose(adaptive_steps(previous, [update], [base], 1.0), [4.0 + 6.0 * step, 4.0, 9.0], rtol=1e-6)
    still = Update(base[:2].copy())
    np.testing.assert_array_equal(adaptive_steps(previous, [still], [base], 1.0), previous)


def test_mix_refuses_to_overshoot() -> None:
    with pytest.raises(LocalError, match="above 1"):
        mix(floats([1.0]), [Update(floats([2.0]))], weights([1.5]))


@settings(max_examples=100)
@given(cases, st.randoms(use_true_random=False))
def test_permuting_the_clients_changes_rounding_only(case: Case, random: Any) -> None:
    order = list(range(len(case.updates)))
    random.shuffle(order)
    one = mask_fed_avg(case.previous, case.updates, case.weights, case.order.segments())
    other = mask_fed_avg(case.previous, [case.updates[i] for i in order], case.weights[order], case.order.segments())
    assert (np.abs(case.flat(one) - case.flat(other)) <= 2 * case.tolerance()).all()


@settings(max_examples=50)
@given(cases, st.floats(1e-3, 1e3))
def test_splitting_a_client_or_scaling_all_weights_changes_rounding_only(case: Case, scale: float) -> None:
    one = mask_fed_avg(case.previous, case.updates, case.weights, case.order.segments())
    halves = np.repeat(case.weights * (0.5 * scale), 2)
    twice = [update for update in case.updates for _ in range(2)]
    other = mask_fed_avg(case.previous, twice, halves, case.order.segments())
    assert (np.abs(case.flat(one) - case.flat(other)) <= 2 * case.tolerance()).all()


def test_fresh_equal_full_models_give_the_plain_mean() -> None:
    models = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    fresh = weights([staleness("polynomial")(0) * 20] * 5)
    updates = [Update(model) for model in models]
    expected = models.astype(np.float64).mean(axis=0)
    for ours in (mask_fed_avg(floats([0] * 40), updates, fresh, whole(40)), fed_avg(floats([0] * 40), updates, fresh)):
        np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(models).max())


def test_hand_computed() -> None:
    previous = floats([10, 20, 30, 40])
    updates = [Update(floats([1, 2, 3])), Update(floats([4]))]
    segments = ((0, 1), (1, 3), (3, 4))
    assert mask_fed_avg(previous, updates, weights([1, 3]), segments).tolist() == [3.25, 2, 3, 40]
    assert mask_fed_avg(previous, updates, weights([1, 3]), segments, 0.5).tolist() == [6.625, 11, 16.5, 40]
    assert fed_avg(previous, updates, weights([1, 3])).tolist() == [3.25, 0.5, 0.75, 0]
    bases = [floats([0, 0, 0, 0]), floats([8, 8, 8, 8])]
    assert gradient_average(previous, updates, bases, weights([1, 3])).tolist() == [7.25, 20.5, 30.75, 40]


def test_a_kept_zero_counts() -> None:
    updates = [Update(floats([0.0, 6.0])), Update(floats([4.0, 0.0]), np.array([True, True]))]
    assert mask_fed_avg(floats([9, 9]), updates, weights([1, 1]), whole(2)).tolist() == [2, 3]
    alone = Update(floats([0.0, 0.0]), np.array([True, False]))
    assert mask_fed_avg(floats([9, 9]), [alone], weights([2]), whole(2)).tolist() == [0, 9]


@settings(max_examples=50)
@given(cases, st.floats(0.01, 1.0))
def test_what_nobody_covers_keeps_its_bits(case: Case, eta_g: float) -> None:
    ours = mask_fed_avg(case.previous, case.updates, case.weights, case.order.segments(), eta_g)
    covered = np.zeros(case.previous.size, np.bool_)
    for update in case.dense:
        covered |= update.m
    alone = ~covered[case.order.coordinates]
    assert ours[alone].tobytes() == case.previous[alone].tobytes()


def test_no_update_and_one_update() -> None:
    previous = floats([1, 2, 3])
    for ours in (
        mask_fed_avg(previous, [], weights([]), whole(3)),
        fed_avg(previous, [], weights([])),
        gradient_average(previous, [], [], weights([])),
    ):
        assert ours.tolist() == [1, 2, 3]
        assert not np.shares_memory(ours, previous)
    assert mask_fed_avg(previous, [Update(floats([7.1, 8.3]))], weights([0.3]), whole(3)).tolist() == floats([7.1, 8.3, 3]).tolist()


def test_blocks_join_without_a_seam() -> None:
    n = 2 * BLOCK + 17
    rng = np.random.default_rng(5)
    stack = rng.standard_normal((12, n)).astype(np.float32)
    ours = mask_fed_avg(stack[0], [Update(row) for row in stack[1:]], weights([1] * 11), ((0, BLOCK - 1), (BLOCK - 1, n)))
    np.testing.assert_allclose(ours, stack[1:].astype(np.float64).mean(axis=0), atol=5e-6)


@pytest.mark.parametrize("clients", [9, 41, 3001])
def test_the_error_does_not_grow_with_the_number_of_clients(clients: int) -> None:
    values = floats([1 / 3, 1e6 / 7, -1e-6 / 11])  # the same sum again and again, so that float32 errors add up
    ours = mask_fed_avg(floats([0, 0, 0]), [Update(values)] * clients, weights([0.1] * clients), whole(3))
    assert (np.abs(ours.astype(np.float64) - values) <= 1e-6 * np.abs(values)).all()


def test_reexpression_keeps_every_value_at_its_coordinate() -> None:
    old = Order(0, np.array([2, 0, 3, 1], np.uint32), (1, 3, 4), 0)
    new = Order(1, np.array([0, 1, 2, 3], np.uint32), (1, 4), 0)
    moved = reexpress(Update(floats([5, 6, 7])), old, new)  # coordinates 2, 0, 3
    assert moved.values.tolist() == [6, 0, 5, 7]
    assert moved.presence is not None
    assert moved.presence.tolist() == [True, False, True, True]
    back = reexpress(moved, new, old)
    assert (back.values.tolist(), back.presence) == ([5, 6, 7], None)
    everything = reexpress(Update(floats([5, 6, 7, 8])), old, new)
    assert (everything.values.tolist(), everything.presence) == ([6, 8, 5, 7], None)


def test_staleness_functions() -> None:
    assert [staleness("constant")(t) for t in (0, 7)] == [1, 1]
    assert [staleness("polynomial")(t) for t in (0, 1, 31)] == pytest.approx([1, 2**-0.6, 0.125])
    assert [staleness("hinge", a=2, b=3)(t) for t in (0, 3, 4, 5)] == pytest.approx([1, 1, 1 / 3, 0.2])
    for kind, a, b in (("other", 1, 1), ("hinge", -1, 1), ("hinge", 1, float("nan"))):
        with pytest.raises(LocalError):
            staleness(kind, a, b)  # type: ignore[arg-type]  # the first is wrong on purpose
    with pytest.raises(LocalError):
        staleness("polynomial")(-1)


@pytest.mark.parametrize("bad", [[0.0], [-1.0], [np.nan], [np.inf], [1.0, 1.0]])
def test_bad_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(LocalError):
        mask_fed_avg(floats([1]), [Update(floats([1]))], weights(bad), whole(1))


def test_bad_updates_are_refused() -> None:
    with pytest.raises(LocalError, match="2 values for 1"):
        mask_fed_avg(floats([1]), [Update(floats([1, 2]))], weights([1]), whole(1))
    with pytest.raises(LocalError, match="segments"):
        mask_fed_avg(floats([1]), [], weights([]), whole(2))
    with pytest.raises(LocalError, match="eta_g"):
        mask_fed_avg(floats([1]), [], weights([]), whole(1), 0.0)
    with pytest.raises(LocalError, match="nothing is present"):
        Update(floats([1]), np.array([False]))
    with pytest.raises(LocalError):
        Update(np.zeros(1))
    with pytest.raises(LocalError, match="base"):
        gradient_average(floats([1]), [Update(floats([1]))], [], weights([1]))
