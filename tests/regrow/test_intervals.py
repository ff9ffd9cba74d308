"""Intervals of few values: Student's quantiles, and none of a single value."""

from __future__ import annotations

import math

import pytest

from regrow.intervals import half_interval, t_quantile


def two_sided(t: float, degrees: int) -> float:
    """P(|T| <= t), by Simpson's rule over Student's density."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    steps = 2000
    width = t / steps
    inner = sum((4 if index % 2 else 2) * density(index * width) for index in range(1, steps))
    return 2 * width / 3 * (density(0.0) + inner + density(t))


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 40, 60, 120, 1000])
def test_quantiles_hold_95_percent(degrees: int) -> None:
    assert two_sided(t_quantile(degrees), degrees) == pytest.approx(0.95, abs=2e-4)


def test_a_single_value_has_no_interval() -> None:
    assert half_interval([]) is None
    assert half_interval([3.0]) is None


def test_three_values() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
