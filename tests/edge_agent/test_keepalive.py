"""When a connection is pinged and when it is dead, second by second."""

from __future__ import annotations

from edge_agent.keepalive import KeepAlive


def test_quiet_is_pinged_and_silence_is_death() -> None:
    alive = KeepAlive(30)
    alive.begin(0.0)
    steps = {now: step for now in range(1, 100) if (step := alive.turn(50, 50, float(now)))}
    assert (steps[31], steps[61]) == ("ping", "dead")


def test_one_direction_that_is_quiet_is_enough_for_a_ping_and_any_byte_is_life() -> None:
    alive = KeepAlive(30)
    alive.begin(0.0)
    steps = {now: step for now in range(1, 200) if (step := alive.turn(0, now, float(now)))}
    assert set(steps.values()) == {"ping"}
    assert list(steps) == [30, 60, 90, 120, 150, 180]
