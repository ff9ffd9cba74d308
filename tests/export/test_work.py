"""Multiply-adds by hand."""

from __future__ import annotations

import pytest

from export.models import digits_mlp, reduced_cnn
from export.work import multiply_adds, relative_work


def test_multiply_adds_by_hand() -> None:
    assert multiply_adds(digits_mlp(1)) == 64 * 32 + 32 * 10
    convolutions = 5 * 5 * 1 * 8 * 14 * 14 + 3 * 3 * 8 * 16 * 7 * 7
    assert multiply_adds(reduced_cnn(1)) == convolutions + 16 * 7 * 7 * 64 + 64 * 10


def test_half_the_hidden_units_are_half_the_work() -> None:
    (density, work), whole = relative_work(digits_mlp(1), (0.5, 1.0))
    units = round(density * 2410 - 10) / (64 + 1 + 10)  # of 32: each has 64 weights, a bias and 10 weights that read it
    assert units == pytest.approx(round(units))
    assert work == pytest.approx(units / 32)
    assert whole == (1.0, 1.0)


def test_work_falls_with_density() -> None:
    shares = relative_work(reduced_cnn(1), (0.05, 0.2, 1.0))
    assert [work for _, work in shares] == sorted(work for _, work in shares)
    assert shares[0][1] < 0.2
