"""The sync pulse is found where it is, in noise, at low rates and in units of any size; and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.pulse import BIT_S, BITS, PULSE_S, find_pulse, is_high


def trace(
    began_s: float,
    *,
    hz: float = 10.0,
    idle_w: float = 2.0,
    rise_w: float = 3.0,
    noise_w: float = 0.0,
    length_s: float = 40.0,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A meter's CSV: power follows the load with the lag of a supply's capacitors."""
    rng = np.random.default_rng(seed)
    fine = np.arange(0.0, length_s, 0.005)
    load = np.array([is_high(at_s - began_s) for at_s in fine], float)
    smooth = np.convolve(load, np.ones(8) / 8, "same")
    at_s = np.sort(np.arange(0.0, length_s, 1 / hz) + rng.uniform(0, 0.2 / hz, round(length_s * hz)))
    watts = idle_w + rise_w * np.interp(at_s, fine, smooth) + rng.normal(0, noise_w, at_s.size)
    return at_s, watts


def test_the_pattern_looks_like_itself_nowhere_else() -> None:
    code = np.array(BITS) * 2 - 1
    sides = np.correlate(code, code, "full")
    assert sides.max() == len(BITS)
    assert np.abs(np.delete(sides, len(BITS) - 1)).max() <= 1


def test_when_cores_are_loaded() -> None:
    assert [is_high(BIT_S * index + 0.1) for index in range(len(BITS))] == [bit == 1 for bit in BITS]
    assert not is_high(-0.1)
    assert not is_high(PULSE_S)


@pytest.mark.parametrize("hz", [1.0, 2.0, 3.0])
def test_a_trace_that_is_too_coarse_is_refused_however_well_it_matches(hz: float) -> None:
    for seed in range(5):
        with pytest.raises(LocalError, match=r"further apart than 0\.35 s where it matches best: sample at 4 Hz or faster"):
            find_pulse(*trace(17.13, hz=hz, seed=seed))


@pytest.mark.parametrize("hz", [4.0, 5.0, 10.0, 50.0])
@pytest.mark.parametrize("noise_w", [0.0, 0.6])
def test_where_it_began(hz: float, noise_w: float) -> None:
    found = find_pulse(*trace(17.13, hz=hz, noise_w=noise_w))
    assert found.began_s == pytest.approx(17.13, abs=0.08)
    assert found.rise_w == pytest.approx(3.0, rel=0.35 if hz <= 5.0 else 0.2)
    assert found.offset_s(1_790_000_000.0) == pytest.approx(17.13 - 1_790_000_000.0, abs=0.08)


@settings(max_examples=25)
@given(st.floats(1.0, 32.0), st.floats(0.2, 20.0), st.integers(0, 1000))
def test_anywhere_and_of_any_size(began_s: float, rise_w: float, seed: int) -> None:
    found = find_pulse(*trace(began_s, rise_w=rise_w, noise_w=rise_w / 8, seed=seed))
    assert found.began_s == pytest.approx(began_s, abs=0.1)


def test_times_of_another_clock_and_a_drifting_level() -> None:
    at_s, watts = trace(20.0, noise_w=0.1)
    found = find_pulse(at_s + 1_790_000_000.0, watts + 0.02 * at_s)
    assert found.began_s - 1_790_000_000.0 == pytest.approx(20.0, abs=0.08)


@pytest.mark.parametrize(
    ("at_s", "watts", "said"),
    [
        ([0.0], [1.0], "at least two"),
        ([0.0, 1.0], [1.0], "as many times as watts"),
        ([0.0, 0.0], [1.0, 1.0], "do not ascend"),
        ([0.0, 1.0], [1.0, float("nan")], "no finite numbers"),
        ([0.0, 1.0, 2.0], [1.0, 2.0, 1.0], "lasts 2.0 s"),
        ([0.0, 1e7], [1.0, 1.0], "cut it to the minutes"),
        (list(np.arange(0, 40, 0.1)), [2.0] * 400, "no pulse found"),
    ],
)
def test_a_trace_without_a_pulse(at_s: list[float], watts: list[float], said: str) -> None:
    with pytest.raises(LocalError, match=said):
        find_pulse(at_s, watts)


@pytest.mark.parametrize("seed", range(8))
def test_noise_training_and_two_pulses_are_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    at_s = np.arange(0.0, 60.0, 0.1)
    with pytest.raises(LocalError, match="no pulse found"):
        find_pulse(at_s, 3 + rng.normal(0, 1, at_s.size))
    with pytest.raises(LocalError, match="no pulse found"):
        find_pulse(at_s, 2 + 3.0 * (at_s // 4 % 2))  # on and off, every four seconds
    first, second = trace(5.0, length_s=60.0, seed=seed), trace(35.0, length_s=60.0, seed=seed)
    with pytest.raises(LocalError, match="another place has"):
        find_pulse(first[0], first[1] + second[1])


def test_a_meter_that_was_silent_meanwhile_did_not_see_it() -> None:
    at_s, watts = trace(17.0, noise_w=0.05)
    kept = (at_s < 19.1) | (at_s > 20.4)
    with pytest.raises(LocalError, match=r"further apart than 0\.35 s"):
        find_pulse(at_s[kept], watts[kept])
