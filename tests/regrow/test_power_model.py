"""The power model against fleets whose truth is known: means, intervals that hold what they promise, and a unit held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import LocalError, PeerError
from regrow.observations import Phase
from regrow.power_model import Example, PowerModel, fit, from_json

TRUTH: dict[Phase, float] = {"idle": 2.0, "train": 5.0, "transmit": 2.8, "receive": 2.6}


def fleet(units: int, seed: int, *, unit_sd: float = 0.1, row_sd: float = 0.05, slope: float = 0.0, rows: int = 12) -> list[Example]:
    """Stretches of so many units, each a little off in its own way."""
    rng = np.random.default_rng(seed)
    examples = []
    for unit in range(units):
        for phase, watts in TRUTH.items():
            own = watts + rng.normal(0, unit_sd)
            for _ in range(rows):
                celsius, seconds = rng.uniform(45, 70), rng.uniform(2, 60)
                drawn = own + slope * (celsius - 50) + rng.normal(0, row_sd)
                examples.append(Example(f"pi-{unit}", phase, seconds, drawn * seconds, celsius))
    return examples


def test_the_mean_of_units_and_how_they_differ() -> None:
    model = fit("pi", "ina219", fleet(12, 1))
    for phase, watts in TRUTH.items():
        assert model.phases[phase].watts == pytest.approx(watts, abs=0.12)
        assert 0.04 < model.phases[phase].unit_sd_w < 0.2
        assert model.phases[phase].row_sd_w == pytest.approx(0.05, rel=0.25)
    assert model.watts_a_degree == pytest.approx(0.0, abs=0.005)
    assert (len(model.units), model.rows) == (12, 12 * 4 * 12)


def test_heat_costs_power() -> None:
    model = fit("pi", "ina219", fleet(6, 2, slope=0.03))
    assert model.watts_a_degree == pytest.approx(0.03, abs=0.003)
    cool, hot = model.joules("train", 10.0, 50.0), model.joules("train", 10.0, 70.0)
    assert cool is not None
    assert hot is not None
    assert hot[0] - cool[0] == pytest.approx(10 * 20 * 0.03, rel=0.15)


def test_without_temperatures_there_is_no_slope() -> None:
    examples = [Example(one.unit, one.phase, one.seconds, one.joules) for one in fleet(4, 3)]
    model = fit("pi", "ina219", examples)
    assert model.watts_a_degree == 0.0
    assert model.joules("train", 1.0) == model.joules("train", 1.0, 90.0)


@pytest.mark.parametrize("units", [4, 8])
def test_95_of_100_new_units_are_inside_the_interval(units: int) -> None:
    """The promise is to units that nobody measured: a hundred fleets, and a new unit for each."""
    inside = total = 0
    for seed in range(100):
        known = fit("pi", "ina219", fleet(units, seed, rows=4))
        for new in fleet(1, 10_000 + seed, rows=1):
            low, high = known.joules(new.phase, new.seconds, new.temperature_c)[1:]  # type: ignore[index]
            inside += low <= new.joules <= high
            total += 1
    assert 0.91 <= inside / total <= 0.99


def test_each_unit_is_held_out_once_and_a_strange_one_shows() -> None:
    examples = fleet(6, 4, unit_sd=0.02)
    strange = [Example("strange", one.phase, one.seconds, 2 * one.joules, one.temperature_c) for one in examples if one.unit == "pi-0"]
    model = fit("pi", "ina219", [*examples, *strange])
    assert [held.unit for held in model.held_out] == [f"pi-{unit}" for unit in range(6)] + ["strange"]
    odd = model.held_out[-1]
    assert (odd.inside, odd.rows) == (0, 48)
    assert odd.modelled_j == pytest.approx(odd.joules / 2, rel=0.05)
    assert odd.high_j < odd.joules
    good = fit("pi", "ina219", examples).held_out
    assert sum(held.inside for held in good) / sum(held.rows for held in good) > 0.85
    for held in good:
        assert held.low_j < held.modelled_j < held.high_j
        assert held.modelled_j == pytest.approx(held.joules, rel=0.05)


def test_a_baseline_is_idleness_and_an_unknown_phase_is_unknown() -> None:
    examples = [Example(one.unit, "baseline" if one.phase == "idle" else one.phase, one.seconds, one.joules) for one in fleet(3, 5)]
    model = fit("pi", "ina219", [one for one in examples if one.phase != "receive"])
    assert set(model.phases) == {"idle", "train", "transmit"}
    assert model.joules("baseline", 1.0) == model.joules("idle", 1.0)
    assert model.joules("receive", 1.0) is None
    assert model.watts({"receive"}) is None
    idle, train, send = (model.phases[phase].watts for phase in ("idle", "train", "transmit"))  # type: ignore[index]
    assert model.watts({"train", "transmit"}) == pytest.approx(train + send - idle)


def test_a_phase_of_one_unit_only_is_left_out() -> None:
    examples = [one for one in fleet(3, 6) if one.phase != "receive" or one.unit == "pi-1"]
    assert "receive" not in fit("pi", "ina219", examples).phases


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "there are none"),
        (fleet(2, 7), r"needs 3 measured units of a board, one of them to hold out; there are 2 \(pi-0, pi-1\)"),
        ([Example("a", "train", 0.0, 1.0)], "1.0 J in 0.0 s cannot be"),
        ([Example("a", "train", 1.0, float("nan"))], "cannot be"),
        (
            [Example(name, phase, 9.0, 9.0) for name, phase in (("a", "idle"), ("b", "train"), ("c", "receive"))],
            "no phase was measured on two",
        ),
    ],
)
def test_too_little_to_fit(examples: list[Example], said: str) -> None:
    with pytest.raises(LocalError, match=said):
        fit("pi", "ina219", examples)


def test_the_file_is_read_as_it_was_written() -> None:
    model = fit("pi", "ina219", fleet(3, 8))
    assert from_json(model.to_json()) == model
    assert model.name == "model of pi"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"format": 1}', b" " * 2_000_000])
def test_a_file_that_is_no_model(data: bytes) -> None:
    with pytest.raises(PeerError):
        from_json(data)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 20))
def test_a_spoilt_file_is_a_model_or_an_error(middle: bytes, at: int, length: int) -> None:
    good = fit("pi", "ina219", fleet(3, 8, rows=2)).to_json()
    try:
        model = from_json(good[:at] + middle + good[at + length :])
    except PeerError:
        return
    assert isinstance(model, PowerModel)
