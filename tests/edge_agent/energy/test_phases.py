"""Whose joules they are: the rule of edge_agent.energy.phases, case by case, and that the rows add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.energy.integral import Gap, Piece, Segment
from edge_agent.energy.phases import LONGEST_S, Doing, PhaseSplit
from regrow import observations
from regrow.observations import Phase, PhaseSeen
from regrow.power_model import PhasePower, PowerModel

UNIX_S = 1_790_000_000.0
MODEL = PowerModel(
    board="pi",
    meter="ina219",
    units=["a", "b", "c"],
    rows=30,
    watts_a_degree=0.0,
    phases={
        "idle": PhasePower(watts=2.0, unit_sd_w=0.1, row_sd_w=0.0, units=3),
        "train": PhasePower(watts=5.0, unit_sd_w=0.1, row_sd_w=0.0, units=3),
        "transmit": PhasePower(watts=3.0, unit_sd_w=0.1, row_sd_w=0.0, units=3),
    },
)


def doing(*phases: Phase, number: int = 0) -> Doing:
    return Doing(frozenset(phases), "run-1", number, 40, 0.25) if number else Doing(frozenset(phases))


def split(*, idle_w: float | None = None, model: PowerModel | None = None) -> PhaseSplit:
    return PhaseSplit("ina219 hwmon2", "measured", lambda at_s: UNIX_S + at_s, idle_w=idle_w, guess=model)


def flat(began_s: float, ended_s: float, watts: float) -> Segment:
    return Segment(began_s, ended_s, watts, watts)


def run(phases: PhaseSplit, pieces: list[Piece]) -> list[PhaseSeen]:
    rows = [row for piece in pieces for row in phases.take(piece)]
    rows += phases.finish()
    assert observations.decode_rows(observations.encode_rows(rows)) == rows  # every row may travel
    return rows


def test_a_phase_begins_and_ends_where_it_did_and_not_at_a_sample() -> None:
    phases = split()
    phases.change(doing("train", number=7), 0.25)
    phases.change(doing(), 0.75)
    idle, train, after = run(phases, [Segment(0.0, 1.0, 0.0, 4.0)])
    assert (idle.phase, idle.seconds, idle.joules) == ("idle", 0.25, pytest.approx(0.125))
    assert (train.at_s, train.seconds, train.joules) == (UNIX_S + 0.25, 0.5, pytest.approx(1.0))
    assert (train.run, train.number, train.density, train.steps) == ("run-1", 7, 0.25, 40)
    assert (after.phase, after.joules) == ("idle", pytest.approx(0.875))


def test_the_same_again_is_no_change() -> None:
    phases = split()
    for at_s in (0.1, 0.2, 0.3):
        phases.change(doing("train"), at_s)
    rows = run(phases, [flat(0.0, 1.0, 3.0)])
    assert [(row.phase, row.seconds) for row in rows] == [("idle", pytest.approx(0.1)), ("train", pytest.approx(0.9))]


def test_what_is_unknown_is_a_row_of_its_own_and_never_zero() -> None:
    phases = split()
    phases.change(doing("receive", number=3), 0.0)
    known, unknown = run(phases, [flat(0.0, 1.0, 3.0), Gap(1.0, 4.0, "unplugged"), flat(4.0, 5.0, 3.0)])
    assert (known.seconds, known.joules, known.certainty) == (2.0, pytest.approx(6.0), "measured")
    assert (unknown.seconds, unknown.joules, unknown.certainty, unknown.meter) == (3.0, None, "unmeasured", "unplugged")


def test_phases_that_overlap_share_equally_until_it_is_known_what_each_draws() -> None:
    phases = split(idle_w=2.0)
    phases.change(doing("train", "transmit"), 0.0)
    train, transmit = run(phases, [flat(0.0, 10.0, 6.0)])
    assert (train.phase, train.joules, train.seconds, train.marked) == ("train", 30.0, 10.0, "overlaps transmit")
    assert (transmit.phase, transmit.joules, transmit.seconds, transmit.marked) == ("transmit", 30.0, 10.0, "overlaps train")


def test_phases_that_overlap_share_by_what_each_draws_above_idle_when_alone() -> None:
    phases = split(idle_w=2.0)
    for at_s, what in ((0.0, ("train",)), (10.0, ("transmit",)), (20.0, ("train", "transmit"))):
        phases.change(doing(*what), at_s)  # type: ignore[arg-type]
    rows = run(phases, [flat(0.0, 10.0, 5.0), flat(10.0, 20.0, 3.0), flat(20.0, 30.0, 6.0)])
    assert [(row.phase, row.joules) for row in rows] == [
        ("train", 50.0),
        ("transmit", 30.0),
        ("train", pytest.approx(45.0)),  # 3 W of 4 above idle
        ("transmit", pytest.approx(15.0)),
    ]


def test_idleness_on_purpose_and_idle_power_that_was_seen() -> None:
    phases = split()  # no baseline known: the idle stretch tells
    for at_s, what in ((0.0, ("baseline",)), (10.0, ("train",)), (20.0, ("receive",)), (30.0, ("train", "receive"))):
        phases.change(doing(*what), at_s)  # type: ignore[arg-type]
    rows = run(phases, [flat(0.0, 10.0, 2.0), flat(10.0, 20.0, 4.0), flat(20.0, 30.0, 3.0), flat(30.0, 40.0, 6.0)])
    assert [(row.phase, row.joules) for row in rows] == [
        ("baseline", 20.0),
        ("train", 40.0),
        ("receive", 30.0),
        ("train", pytest.approx(40.0)),
        ("receive", pytest.approx(20.0)),
    ]


def test_a_long_stretch_is_told_of_in_parts() -> None:
    rows = run(split(), [flat(float(at_s), at_s + 1.0, 2.0) for at_s in range(700)])
    assert [(row.at_s - UNIX_S, row.seconds) for row in rows] == [(0.0, LONGEST_S), (LONGEST_S, LONGEST_S), (2 * LONGEST_S, 100.0)]


def test_marks_of_a_stretch() -> None:
    phases = split()
    phases.take(flat(0.0, 1.0, 2.0), ("under-voltage",))
    phases.take(flat(1.0, 2.0, 2.0), ("under-voltage", "throttled"))
    (row,) = phases.finish()
    assert row.marked == "under-voltage, throttled"


def test_without_a_meter_the_model_of_the_board_stands_in_with_its_interval() -> None:
    phases = split(model=MODEL)
    phases.change(doing("train", number=4), 0.0)
    phases.change(doing("receive"), 10.0)  # of which this model knows nothing
    modelled, unknown = run(phases, [Gap(0.0, 10.0, "no meter here"), Gap(10.0, 12.0, "no meter here")])
    assert (modelled.certainty, modelled.meter, modelled.joules) == ("modelled", "model of pi", 50.0)
    assert modelled.low_j is not None
    assert modelled.high_j is not None
    assert 0 < modelled.low_j < 50 < modelled.high_j
    assert (unknown.certainty, unknown.joules, unknown.low_j) == ("unmeasured", None, None)


STEPS = st.lists(
    st.tuples(
        st.floats(0.01, 3), st.floats(0.5, 50), st.booleans(), st.sets(st.sampled_from(["train", "transmit", "receive"]), max_size=3)
    ),
    min_size=1,
    max_size=30,
)


@given(STEPS)
def test_the_rows_add_up_to_what_was_drawn(steps: list[tuple[float, float, bool, set[Phase]]]) -> None:
    phases, now, joules, rows = split(), 0.0, 0.0, []
    for seconds, watts, known, what in steps:
        phases.change(Doing(frozenset(what)), now + seconds / 3)
        rows += phases.take(flat(now, now + seconds, watts) if known else Gap(now, now + seconds, "unplugged"))
        joules += watts * seconds if known else 0.0
        now += seconds
    rows += phases.finish()
    assert sum(row.joules or 0.0 for row in rows) == pytest.approx(joules)
    assert all(row.joules != 0 for row in rows)
