"""When the coordinator aggregates, by kind, and that nothing waits for what cannot come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.task import Trigger
from regrow.trigger import due_s, has_quorum

KINDS = ("all", "arrival", "interval", "fastest", "count")


def due(trigger: Trigger, arrived: int, outstanding: int, *, fastest: int = 2, quorum_s: float | None = None) -> float | None:
    return due_s(trigger, arrived=arrived, outstanding=outstanding, fastest_class=fastest, quorum_s=quorum_s, last_s=4.0, now_s=10.0)


@pytest.mark.parametrize(
    ("trigger", "arrived", "outstanding", "expected"),
    [
        (Trigger(kind="all"), 2, 1, None),
        (Trigger(kind="all"), 3, 0, 10.0),
        (Trigger(kind="arrival"), 1, 9, 10.0),
        (Trigger(kind="interval", interval_s=5.0), 1, 9, 9.0),
        (Trigger(kind="interval", interval_s=7.0), 1, 9, 11.0),
        (Trigger(kind="fastest", interval_s=0.5), 1, 5, None),
        (Trigger(kind="fastest", interval_s=0.5), 2, 5, 10.5),
        (Trigger(kind="fastest", interval_s=0.5, count=3), 2, 5, None),
        (Trigger(kind="count", count=3), 2, 5, None),
        (Trigger(kind="count", count=3), 3, 5, 10.0),
        (Trigger(kind="count"), 2, 5, 10.0),
    ],
)
def test_the_kinds(trigger: Trigger, arrived: int, outstanding: int, expected: float | None) -> None:
    assert due(trigger, arrived, outstanding) == expected


def test_fastest_counts_its_delay_from_the_quorum() -> None:
    assert due(Trigger(kind="fastest", interval_s=0.5), 2, 5, quorum_s=9.8) == 9.8 + 0.5


@settings(max_examples=80)
@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 20), st.integers(0, 20))
def test_with_nobody_outstanding_any_arrival_is_enough(kind: str, wanted: int, arrived: int, fastest: int) -> None:
    trigger = Trigger(kind=kind, count=wanted)  # type: ignore[arg-type]  # sampled from the literal's values
    assert due(trigger, arrived, 0, fastest=fastest) == 10.0
    assert due(trigger, 0, arrived, fastest=fastest) is None


@settings(max_examples=80)
@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_quorum_never_exceeds_what_can_still_come(wanted: int, arrived: int, outstanding: int, fastest: int) -> None:
    for kind in ("fastest", "count"):
        trigger = Trigger(kind=kind, count=wanted)
        assert has_quorum(trigger, arrived + outstanding, 0, fastest)
        if arrived and has_quorum(trigger, arrived, outstanding, fastest):
            assert has_quorum(trigger, arrived, outstanding - 1 if outstanding else 0, fastest), "a device that dies cannot undo a quorum"
