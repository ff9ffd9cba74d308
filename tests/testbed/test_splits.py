"""Splits: nothing lost, nothing twice, nothing random but the seed; and each kind's own promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regrow.errors import LocalError
from testbed import splits
from testbed.datasets import Dataset
from testbed.splits import Indices, Split, parse_split, split, train_validation


def made(y: NDArray[np.int64], user: NDArray[np.int64] | None = None) -> Dataset:
    return Dataset("made", np.zeros((len(y), 1), np.float32), y, user, int(y.max()) + 1)


def balanced(examples: int, classes: int) -> Dataset:
    return made(np.arange(examples, dtype=np.int64) % classes)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Uneven labels, some absent, and uneven users, all in random order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    examples, classes, users = draw(st.integers(1, 400)), draw(st.integers(1, 12)), draw(st.integers(1, 30))
    shares = rng.dirichlet(np.full(classes, draw(st.sampled_from([0.2, 1.0, 100.0]))))
    return made(rng.choice(classes, examples, p=shares).astype(np.int64), rng.integers(0, users, examples))


KINDS = st.one_of(
    st.just("iid"),
    st.just("user"),
    st.sampled_from([0.001, 0.1, 0.3, 1.0, 100.0, 1e6]).map(lambda alpha: f"dirichlet:{alpha}"),
    st.integers(1, 5).map(lambda count: f"shards:{count}"),
)


@given(datasets(), KINDS, st.integers(1, 12), st.integers(0, 2**63), st.integers(1, 10))
@settings(max_examples=300)
def test_each_example_goes_to_exactly_one_client_or_it_says_why(
    dataset: Dataset, kind: str, clients: int, seed: int, min_examples: int
) -> None:
    parts, why = [], ""
    try:
        parts = split(dataset, clients, kind, seed, min_examples=min_examples)
    except LocalError as error:
        why = str(error)
    if why:
        assert "fewer" in why or "at most" in why
        return
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= min_examples
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(dataset.y)))
    for part, again in zip(parts, split(dataset, clients, parse_split(kind), seed, min_examples=min_examples), strict=True):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(part, again)
    if kind == "iid" or kind.startswith("dirichlet"):
        assert np.ptp([len(part) for part in parts]) <= 1


@given(datasets(), st.integers(1, 12), st.sampled_from([0.001, 0.3, 1e6]), st.integers(0, 99))
def test_an_equal_split_exists_whenever_there_are_enough_examples(dataset: Dataset, clients: int, alpha: float, seed: int) -> None:
    fewest = len(dataset.y) // clients
    if fewest:
        for kind in ("iid", f"dirichlet:{alpha}"):
            assert min(len(part) for part in split(dataset, clients, kind, seed, min_examples=fewest)) == fewest


@pytest.mark.parametrize("kind", ["iid", "dirichlet:0.3", "user", "shards:2"])
def test_another_seed_gives_another_split(kind: str) -> None:
    y = np.arange(600, dtype=np.int64) % 10
    dataset = made(y, np.repeat(np.arange(20, dtype=np.int64), 30))
    first, second = (split(dataset, 5, kind, seed) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---- dirichlet -------------------------------------------------------------------------------------------------------


def skew(dataset: Dataset, parts: list[Indices]) -> float:
    """Mean over clients of the total variation distance between a client's labels and all labels."""
    overall = np.bincount(dataset.y, minlength=dataset.classes) / len(dataset.y)
    shares = [np.bincount(dataset.y[part], minlength=dataset.classes) / len(part) for part in parts]
    return float(np.mean([np.abs(share - overall).sum() / 2 for share in shares]))


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_a_large_alpha_is_like_iid_and_a_small_one_far_from_it(seed: int) -> None:
    dataset = balanced(5000, 10)
    by_alpha = [skew(dataset, split(dataset, 10, f"dirichlet:{alpha}", seed)) for alpha in (0.01, 0.3, 1e6)]
    iid = skew(dataset, split(dataset, 10, "iid", seed))
    assert by_alpha[0] > by_alpha[1] > by_alpha[2]
    assert by_alpha[0] > 0.6
    assert 0.3 < by_alpha[1] < 0.75
    assert by_alpha[2] < 0.09
    assert abs(by_alpha[2] - iid) < 0.03


def test_a_large_alpha_follows_uneven_labels_too() -> None:
    y = np.repeat(np.arange(4, dtype=np.int64), [4000, 800, 160, 40])
    parts = split(made(y), 5, "dirichlet:1000000", 3)
    counts = np.array([np.bincount(y[part], minlength=4) for part in parts])
    assert (abs(counts - np.array([800, 160, 32, 8])) < 4 * np.sqrt([800, 160, 32, 8])).all()


def test_a_rare_label_is_rarely_wished_for() -> None:
    """The mean of q_i is p: a label of 5 % gathers with few clients, where a symmetric draw would spread it nearly evenly (0.26)."""
    y = np.repeat(np.arange(2, dtype=np.int64), [4750, 250])
    largest = [max(np.count_nonzero(y[part]) for part in split(made(y), 5, "dirichlet:10", seed)) / 250 for seed in range(20)]
    assert np.mean(largest) > 0.34


def test_wishes_that_the_stock_can_meet_are_met() -> None:
    wanted = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    held = splits._deal(wanted, np.array([40, 60]), np.array([40, 30, 30]), np.random.default_rng(0))
    np.testing.assert_array_equal(held, [[40, 0, 0], [0, 30, 30]])


def test_a_contested_label_is_shared_and_not_first_come() -> None:
    wanted = np.array([[1.0, 0.0], [1.0, 0.0]])
    held = splits._deal(wanted, np.array([500, 500]), np.array([500, 500]), np.random.default_rng(0))
    np.testing.assert_array_equal(held.sum(axis=0), [500, 500])
    assert (abs(held - 250) < 50).all()


# ---- users and shards ------------------------------------------------------------------------------------------------


def test_a_user_stays_whole_and_users_are_dealt_evenly() -> None:
    user = np.random.default_rng(0).integers(100, 123, 2000)
    dataset = made(np.zeros(2000, np.int64), user)
    parts = split(dataset, 5, "user", 0)
    held = [set(user[part].tolist()) for part in parts]
    assert set.union(*held) == set(range(100, 123))
    assert sorted(len(own) for own in held) == [4, 4, 5, 5, 5]  # 23 users, so none is in two


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_client_of_equal_shards_sees_few_labels(shards: int) -> None:
    dataset = balanced(6000, 10)
    parts = split(dataset, 20, f"shards:{shards}", 4)
    assert {len(part) for part in parts} == {300}
    per_shard = 300 // shards
    for part in parts:  # a shard no larger than a label touches two labels at most
        assert len(np.unique(dataset.y[part])) <= shards * (1 if 600 % per_shard == 0 else 2)


@pytest.mark.parametrize("kind", ["iid", "dirichlet:0.3", "shards:1"])
def test_within_a_label_nobody_inherits_the_order_of_the_file(kind: str) -> None:
    parts = split(made(np.zeros(1000, np.int64)), 2, kind, 0)
    assert all(part.max() - part.min() > 900 for part in parts)


# ---- training and validation -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0, 0.99), st.integers(0, 2**40))
def test_training_and_validation_are_disjoint_and_complete(sizes: list[int], fraction: float, seed: int) -> None:
    indices = np.split(np.random.default_rng(0).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    both = train_validation(indices, fraction, seed)
    for own, (train, validation) in zip(indices, both, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.sort(own))
        assert len(train) >= 1
        assert len(validation) >= (1 if fraction and len(own) > 1 else 0)
        assert abs(len(validation) - fraction * len(own)) <= 1
        assert train.dtype == validation.dtype == np.int64
    for (train, _), (again, _) in zip(both, train_validation(indices, fraction, seed), strict=True):
        np.testing.assert_array_equal(train, again)
    np.testing.assert_array_equal(train_validation(indices[:1], fraction, seed)[0][0], both[0][0])


def test_clients_and_seeds_hold_out_different_places() -> None:
    indices = [np.arange(100), np.arange(100, 200)]
    (_, first), (_, second) = train_validation(indices, 0.2, 0)
    assert not np.array_equal(first, second - 100)
    assert not np.array_equal(first, train_validation(indices, 0.2, 1)[0][1])


def test_a_data_sets_own_part_decides() -> None:
    part = np.array([0, 0, 1, 1, 0, 0])
    ((train, validation), (train2, validation2)) = train_validation([np.array([0, 1, 2]), np.array([4, 5])], 0.5, 0, part)
    assert (train.tolist(), validation.tolist()) == ([0, 1], [2])
    assert (train2.tolist(), validation2.tolist()) == ([4, 5], [])
    with pytest.raises(LocalError, match="client 1 has no training example"):
        train_validation([np.array([0]), np.array([2, 3])], 0.5, 0, part)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["iid", "user", "dirichlet:0.3", "dirichlet:100.0", "shards:2"])
def test_a_split_reads_back(text: str) -> None:
    assert str(parse_split(text)) == text


def test_a_split_is_its_numbers() -> None:
    assert parse_split("dirichlet:0.3") == Split("dirichlet", alpha=0.3)
    assert parse_split("shards:2") == Split("shards", shards=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none of iid"),
        ("IID", "none of iid"),
        ("iid:1", "iid takes no number"),
        ("user:", "user takes no number"),
        ("dirichlet", "for example dirichlet:0.3"),
        ("dirichlet:", "for example dirichlet:0.3"),
        ("dirichlet:much", "for example dirichlet:0.3"),
        ("dirichlet:0", "alpha 0.0 is not in"),
        ("dirichlet:-1", "alpha -1.0 is not in"),
        ("dirichlet:nan", "alpha nan is not in"),
        ("dirichlet:inf", "alpha inf is not in"),
        ("shards", "for example shards:2"),
        ("shards:0", "0 shards per client"),
        ("shards:-1", "for example shards:2"),
        ("shards:1.5", "for example shards:2"),
        ("shards:²", "for example shards:2"),
    ],
)
def test_another_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(LocalError, match=message):
        parse_split(text)


def test_a_number_of_another_kind_is_refused() -> None:
    for arguments in ({"kind": "dirichlet"}, {"kind": "shards"}, {"kind": "iid", "alpha": 1.0}, {"kind": "user", "shards": 1}):
        with pytest.raises(LocalError, match="alpha belongs to dirichlet"):
            Split(**arguments)


def test_impossible_requests_name_the_cure() -> None:
    dataset = balanced(100, 10)
    users = made(dataset.y, np.repeat(np.arange(2, dtype=np.int64), [95, 5]))
    with pytest.raises(LocalError, match="100 examples, 11 clients need 10 each: take fewer clients"):
        split(dataset, 11, "iid", 0)
    with pytest.raises(LocalError, match="no natural users: take iid"):
        split(dataset, 2, "user", 0)
    with pytest.raises(LocalError, match="2 users for 3 clients"):
        split(users, 3, "user", 0)
    with pytest.raises(LocalError, match=r"gives client . 5 examples, not 10: take fewer"):
        split(users, 2, "user", 0)
    with pytest.raises(LocalError, match="100 examples for 10 x 11 shards"):
        split(dataset, 10, "shards:11", 0)
    for clients, fewest in ((0, 10), (1, 0)):
        with pytest.raises(LocalError, match="both must be 1 or more"):
            split(dataset, clients, "iid", 0, min_examples=fewest)
    with pytest.raises(LocalError, match="seed -1 is negative"):
        split(dataset, 2, "iid", -1)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(LocalError, match="validation fraction"):
            train_validation([np.arange(3)], fraction, 0)
    with pytest.raises(LocalError, match="client 0 has no training example"):
        train_validation([np.arange(0)], 0.2, 0)
