"""From readings to joules: what is known is exact, what is not known stays unknown, and no moment is lost or counted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.energy.integral import Gap, Integral, Piece, Segment
from edge_agent.energy.meter import Joules, Reading, Unmeasured, Watts


def pieces(readings: list[tuple[float, Reading]], gap_s: float = 1.0, gain: float = 1.0) -> list[Piece]:
    integral = Integral(gap_s, lambda watts: gain * watts)
    return [piece for now, reading in readings if (piece := integral.add(reading, now)) is not None]


def test_trapezoids() -> None:
    found = pieces([(0.0, Watts(2.0)), (0.1, Watts(4.0)), (0.3, Watts(1.0))])
    assert found == [Segment(0.0, 0.1, 2.0, 4.0), Segment(0.1, 0.3, 4.0, 1.0)]
    assert sum(piece.joules for piece in found if isinstance(piece, Segment)) == pytest.approx(0.3 + 0.5)


def test_a_ramp_is_exact_at_any_rate() -> None:
    times = [0.0, 0.05, 0.11, 0.4, 0.41, 1.0]
    found = pieces([(at_s, Watts(1 + 3 * at_s)) for at_s in times])
    assert sum(piece.joules for piece in found if isinstance(piece, Segment)) == pytest.approx(1 + 1.5)


def test_a_counter() -> None:
    found = pieces([(0.0, Joules(5.0)), (0.5, Joules(7.0)), (1.0, Joules(7.5))])
    assert found == [Segment(0.0, 0.5, 4.0, 4.0), Segment(0.5, 1.0, 1.0, 1.0)]


def test_a_counter_that_stands_or_falls_is_unknown_and_not_zero() -> None:
    found = pieces([(0.0, Joules(5.0)), (0.5, Joules(5.0)), (1.0, Joules(4.0)), (1.5, Joules(6.0))])
    assert [type(piece) for piece in found] == [Gap, Gap, Segment]
    assert found[0] == Gap(0.0, 0.5, "the energy counter says 0 W, which no running device draws")
    assert isinstance(found[1], Gap)
    assert "negative" in found[1].reason


def test_gaps_are_not_bridged() -> None:
    found = pieces([(0.0, Watts(2.0)), (5.0, Watts(2.0)), (5.1, Watts(2.0))])
    assert found == [Gap(0.0, 5.0, "no value for 5.0 s"), Segment(5.0, 5.1, 2.0, 2.0)]
    assert pieces([(0.0, Joules(1.0)), (5.0, Joules(9.0))]) == [Gap(0.0, 5.0, "no value for 5.0 s")]


def test_what_is_unmeasured_keeps_its_reason_until_two_values_are_there() -> None:
    found = pieces(
        [(0.0, Watts(2.0)), (0.1, Unmeasured("unplugged")), (0.2, Unmeasured("unplugged")), (0.3, Watts(2.0)), (0.4, Watts(2.0))]
    )
    assert found == [
        Gap(0.0, 0.1, "unplugged"),
        Gap(0.1, 0.2, "unplugged"),
        Gap(0.2, 0.3, "unplugged"),
        Segment(0.3, 0.4, 2.0, 2.0),
    ]


def test_a_meter_that_tells_by_itself_counts_from_value_to_value() -> None:
    """Read ten times a second, it says one thing for two seconds: one trapezoid between its own times."""
    said = [(0.0, Watts(2.0, 0.0)), (0.1, Watts(2.0, 0.0)), (1.9, Watts(2.0, 0.0)), (2.0, Watts(4.0, 2.0)), (2.1, Watts(4.0, 2.0))]
    assert pieces(said, gap_s=15.0) == [Segment(0.0, 2.0, 2.0, 4.0)]
    late = pieces([*said, (30.0, Watts(4.0, 2.0)), (31.0, Watts(4.0, 31.0))], gap_s=15.0)
    assert late[1:] == [Gap(2.0, 30.0, "no new value for 28 s"), Gap(30.0, 31.0, "no new value for 28 s")]


def test_calibration_is_applied_before_a_value_counts() -> None:
    assert pieces([(0.0, Watts(2.0)), (0.1, Watts(2.0))], gain=1.5) == [Segment(0.0, 0.1, 3.0, 3.0)]
    assert pieces([(0.0, Joules(2.0)), (0.5, Joules(3.0))], gain=1.5) == [Segment(0.0, 0.5, 3.0, 3.0)]
    found = pieces([(0.0, Watts(2.0)), (0.1, Watts(2.0))], gain=-1.0)
    assert len(found) == 1
    assert isinstance(found[0], Gap)
    assert "after calibration says -2 W: negative" in found[0].reason


READINGS = st.one_of(
    st.floats(0.001, 9000).map(Watts),
    st.floats(0, 1e6).map(Joules),
    st.just(Unmeasured("unplugged")),
    st.tuples(st.floats(0.001, 9000), st.floats(0, 30)).map(lambda pair: Watts(*pair)),
)


@given(st.lists(st.tuples(st.floats(0.001, 5), READINGS), max_size=40), st.floats(0.5, 10))
def test_every_moment_is_in_one_piece(steps: list[tuple[float, Reading]], gap_s: float) -> None:
    integral, now, until = Integral(gap_s), 0.0, None
    for step_s, reading in steps:
        now += step_s
        if isinstance(reading, Watts) and reading.at_s is not None and reading.at_s > now:
            reading = Watts(reading.watts, now)
        piece = integral.add(reading, now)
        if piece is not None:
            assert piece.seconds > 0
            assert piece.ended_s <= now
            assert until is None or piece.began_s == until
            assert isinstance(piece, Gap) or (piece.joules > 0 and piece.seconds <= gap_s + 1e-9)
            assert not isinstance(piece, Gap) or piece.reason
            until = piece.ended_s


@given(st.floats(0.1, 1), st.floats(0, 50), st.floats(0, 50), st.floats(0.01, 0.99))
def test_splitting_loses_nothing(seconds: float, began_w: float, ended_w: float, part: float) -> None:
    whole = Segment(3.0, 3.0 + seconds, began_w, ended_w)
    first, second = whole.split(3.0 + part * seconds)
    assert first.joules + second.joules == pytest.approx(whole.joules)
    assert first.ended_s == second.began_s
