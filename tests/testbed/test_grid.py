"""Which runs a comparison consists of, and what tuning may look at."""

from __future__ import annotations

import msgspec
import pytest

from regrow.errors import LocalError
from testbed.grid import (
    Variant,
    base_method,
    by_seed,
    choose,
    parse_choices,
    parse_own,
    specs_of,
    tuning_seed,
    tuning_specs,
    tuning_variants,
    variants_of,
)
from testbed.outcome import Spec
from tests.testbed.test_comparison import run

BASE = Spec(settings={"training.local_steps": 5}, seed=3)


def test_a_grid_multiplies_the_rows() -> None:
    grid = parse_choices(["wire.up='float32','int8'", "training.local_steps=1,5"], "--grid")
    variants = variants_of(["fedgmr", "fedavg"], grid, parse_own(["fedavg:training.learning_rate=0.1"]))
    assert [variant.name for variant in variants[:3]] == [
        "fedgmr[up=float32,local_steps=1]",
        "fedavg[up=float32,local_steps=1]",
        "fedgmr[up=float32,local_steps=5]",
    ]
    assert len({variant.name for variant in variants}) == 8
    rows = specs_of(BASE, variants, 2)
    assert rows["fedavg[up=int8,local_steps=1]"] == [
        Spec(method="fedavg", seed=seed, settings={"training.local_steps": 1, "training.learning_rate": 0.1, "wire.up": "int8"})
        for seed in (3, 4)
    ]
    assert [spec.seed for spec in by_seed(rows)] == [3] * 8 + [4] * 8


def test_keys_with_the_same_last_part_are_named_in_full() -> None:
    variant = variants_of(["fedgmr"], {"a.k": [1], "b.k": [True]}, [])[0]
    assert variant.name == "fedgmr[a.k=1,b.k=true]"


@pytest.mark.parametrize("wrong", ["nonsense", "a.b=", "=1,2", "a.b=1,1", "a.b=float32", "a.b=1]\nc=[2"])
def test_choices_that_are_none(wrong: str) -> None:
    with pytest.raises(LocalError, match="--grid"):
        parse_choices([wrong], "--grid")


def test_a_key_is_given_once() -> None:
    with pytest.raises(LocalError, match="twice"):
        parse_choices(["a.b=1,2", "a.b=3"], "--tune")
    with pytest.raises(LocalError, match="give it once"):
        variants_of(["fedavg"], {"a.b": [1]}, [("fedavg", "a.b", 2)])
    with pytest.raises(LocalError, match="not among"):
        variants_of(["fedavg"], {}, [("fedgmr", "a.b", 2)])
    with pytest.raises(LocalError, match="METHOD:TABLE"):
        parse_own(["training.learning_rate=0.1"])
    with pytest.raises(LocalError, match="give it once"):
        tuning_variants(variants_of(["fedavg"], {"a.b": [1, 2]}, []), {"a.b": [1]}, with_base=False)


@pytest.mark.parametrize(
    ("method", "base"), [("fedgmr", "fedgmr"), ("fiarse+restore", "fiarse"), ("fedgmr-no-restore", "fedgmr"), ("prfl+async-fa", "prfl")]
)
def test_base_methods(method: str, base: str) -> None:
    assert base_method(method) == base


def test_every_row_is_tuned_with_the_same_runs_on_a_seed_of_their_own() -> None:
    tune = {"training.learning_rate": [0.1, 0.2]}
    variants = variants_of(["fedgmr", "fiarse+restore", "fedgmr-fa"], {}, [])
    alone = tuning_variants(variants, tune, with_base=False)
    assert {row: variant.name for row, variant in alone.items()} == {variant.name: variant.name for variant in variants}
    seed = tuning_seed(BASE, 3)
    rows = tuning_specs(BASE, variants, tune, seed, 60.0)
    assert {len(specs) for specs in rows.values()} == {2}
    assert {(spec.seed, spec.seconds) for specs in rows.values() for spec in specs} == {(2, 60.0)}
    assert [spec.settings["training.learning_rate"] for spec in rows["fedgmr"]] == [0.1, 0.2]
    for first in (0, 1, 7):
        base = msgspec.structs.replace(BASE, seed=first)
        assert tuning_seed(base, 3) not in range(first, first + 3)
        assert tuning_seed(base, 3) >= 0


def test_an_ablation_may_take_its_base_methods_choice() -> None:
    variants = variants_of(["fedgmr", "fedgmr-fa", "fiarse+restore"], {"a.b": [1]}, [("fedgmr", "c.d", 2)])
    deciding = tuning_variants(variants, {"e.f": [1, 2]}, with_base=True)
    assert deciding["fedgmr-fa[b=1]"] is deciding["fedgmr[b=1]"] is variants[0]
    assert deciding["fiarse+restore[b=1]"] == Variant("fiarse", {"a.b": 1}, {"a.b": 1}, "fiarse[b=1]")


def test_the_choice_looks_at_validation_data_only() -> None:
    tune = {"training.learning_rate": [0.1, 0.2, 0.3]}
    low = msgspec.structs.replace(run(0, 0.9), validation_accuracy=0.3)
    high = msgspec.structs.replace(run(0, 0.1), validation_accuracy=0.7)
    choice = choose("fedgmr", tune, [low, high, None], 0, 60.0)
    assert choice is not None
    assert choice.chosen == {"training.learning_rate": 0.2}
    assert [score for _, score in choice.tried] == [0.3, 0.7, None]
    ties = choose("fedgmr", tune, [None, high, high], 0, 60.0)
    assert ties is not None
    assert ties.chosen == {"training.learning_rate": 0.2}
    assert choose("fedgmr", tune, [None, None, None], 0, 60.0) is None
    rows = specs_of(BASE, variants_of(["fedgmr"], {}, []), 1, {"fedgmr": choice})
    assert rows["fedgmr"][0].settings == {"training.local_steps": 5, "training.learning_rate": 0.2}
