"""Limits as values: what they are, what counts, and what follows from both, whatever the sensors say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.budget import (
    BATTERY,
    BYTES,
    COOLER_C,
    DAY_MINUTES,
    FULLER_PERCENT,
    HEAT,
    HOURS,
    JOULES,
    KEPT_BACK,
    LONGEST_DAY_S,
    UNMEASURED_MOST,
    UNMETERED,
    Allowed,
    Budget,
    Hours,
    Seen,
    Used,
    judge,
)
from regrow.errors import LocalError

minutes = st.integers(0, DAY_MINUTES - 1)
NIGHT = Hours.parse("22:00-06:00")
ALL_WELL = Seen(minute=23 * 60.0, day_left_s=3600.0, battery=80.0, temperature_c=40.0, metered=False)
EVERYTHING = Budget(100_000, 20.0, 30.0, 70.0, NIGHT, unmetered_only=True)


@given(minutes, minutes, st.floats(0, DAY_MINUTES, exclude_max=True))
def test_hours_are_those_that_a_walk_through_the_day_finds(start: int, end: int, minute: float) -> None:
    if start == end:
        with pytest.raises(LocalError, match="two different times"):
            Hours(start, end)
        return
    hours = Hours(start, end)
    inside = start <= minute < end if start < end else minute >= start or minute < end
    wait_s = hours.wait_s(minute)
    assert (wait_s == 0.0) == inside
    if not inside:
        assert hours.wait_s((minute + wait_s / 60) % DAY_MINUTES) == 0.0 or math.isclose((minute + wait_s / 60) % DAY_MINUTES, start)
        assert wait_s <= 60.0 * DAY_MINUTES
    assert Hours.parse(str(hours)) == hours


@given(st.text())
def test_what_is_no_hours_is_said_so(text: str) -> None:
    try:
        hours = Hours.parse(text)
    except LocalError:
        return
    assert 0 <= hours.start < DAY_MINUTES
    assert 0 <= hours.end < DAY_MINUTES


def test_hours_are_read_as_people_write_them() -> None:
    assert Hours.parse("22:00-06:00") == Hours(1320, 360)
    assert Hours.parse("18:30-24:00") == Hours(1110, 0)
    assert (NIGHT.wait_s(359.5), NIGHT.wait_s(360), NIGHT.wait_s(1319)) == (0.0, 57_600.0, 60.0)
    for wrong in ("22-6", "25:00-06:00", "22:00-06:60", "22:00–06:00", "06:00-06:00", "00:00-24:00", ""):
        with pytest.raises(LocalError):
            Hours.parse(wrong)


@pytest.mark.parametrize(
    ("name", "values"),
    [("bytes_per_day", (0, -1)), ("joules_per_round", (0.0, math.nan)), ("battery_floor", (-1.0, 101.0)), ("max_temperature_c", (151.0,))],
)
def test_a_limit_out_of_range_names_its_option(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(LocalError, match=r"^--[a-z-]+ "):
            Budget(**{name: value})  # type: ignore[arg-type]
    assert not Budget()
    assert EVERYTHING


def test_nothing_holds_where_all_is_well() -> None:
    allowed = judge(EVERYTHING, ALL_WELL, Used(), Allowed(), 100.0)
    assert (allowed.train, allowed.cool, allowed.link, allowed.density, allowed.said) == (True, True, True, 1.0, "")
    assert allowed.bytes_left == 95_000
    assert allowed.day_end_s == 3700.0
    assert judge(Budget(), Seen(), Used(), Allowed(), 0.0) == Allowed()


HOLDING = {
    HOURS: (replace(ALL_WELL, minute=12 * 60.0), Used(), "from 22:00 to 06:00 only", 36_000.0),
    BATTERY: (replace(ALL_WELL, battery=29.0), Used(), "at 29 %, the floor is 30 %", None),
    HEAT: (replace(ALL_WELL, temperature_c=70.0), Used(), "70 C, the ceiling is 70 C", None),
    UNMETERED: (replace(ALL_WELL, metered=True), Used(), "this network is metered", None),
    BYTES: (ALL_WELL, Used(sent_received_bytes=95_000), "95000 of 100000 used today", 3600.0),
    JOULES: (ALL_WELL, Used(unmeasured=UNMEASURED_MOST), "were not measured", None),
}


@pytest.mark.parametrize("name", HOLDING)
def test_each_limit_holds_alone_and_says_why_and_how_long(name: str) -> None:
    seen, used, why, seconds = HOLDING[name]
    allowed = judge(EVERYTHING, seen, used, Allowed(), 100.0)
    assert allowed.names == {name}
    assert allowed.said.startswith(f"{name}: ")
    assert why in allowed.said
    assert allowed.until_s == (None if seconds is None else 100.0 + seconds)
    assert allowed.train == (name in (HEAT, UNMETERED, BYTES))
    assert allowed.cool == (name != HEAT)
    assert allowed.link == (name not in (UNMETERED, BYTES))


def test_what_cannot_be_known_holds() -> None:
    allowed = judge(EVERYTHING, Seen(), Used(), Allowed(), 0.0)
    assert allowed.names == {HOURS, BATTERY, HEAT, UNMETERED}
    assert (allowed.train, allowed.cool, allowed.link) == (False, False, False)
    for said in ("the clock is not set", "the battery cannot be read", "no temperature can be read", "nobody says whether"):
        assert said in allowed.said
    assert allowed.until_s is None


@given(st.lists(st.floats(20, 120), max_size=40), st.lists(st.floats(0, 100), max_size=40))
def test_heat_and_battery_do_not_switch_to_and_fro(heats: list[float], charges: list[float]) -> None:
    budget = Budget(battery_floor=30.0, max_temperature_c=70.0)
    allowed, hot, low = Allowed(), False, False
    for heat, charge in zip(heats, charges, strict=False):
        allowed = judge(budget, Seen(temperature_c=heat, battery=charge), Used(), allowed, 0.0)
        hot = heat >= (70.0 - COOLER_C if hot else 70.0)
        low = charge < (30.0 + FULLER_PERCENT if low else 30.0)
        assert (allowed.cool, allowed.train) == (not hot, not low)


@given(
    st.lists(st.tuples(st.integers(1, 28), st.floats(0, 5000), st.integers(0, 10_000)), max_size=30),
    st.integers(1, 100_000),
)
def test_the_count_of_a_day_is_never_too_low_whatever_the_clock_does(moments: list[tuple[int, float, int]], limit: int) -> None:
    """The clock may go to and fro; a day begins anew only with a later date, or after more hours than a day has."""
    used, since, under_s, latest = Used(), 0, 0.0, ""
    for day, passed_s, more in moments:
        name = f"2026-11-{day:02}"
        used = used.at(name, passed_s, more)
        if name > latest or under_s >= LONGEST_DAY_S:
            latest, since, under_s = name, more, 0.0
        else:
            since, under_s = since + more, under_s + passed_s
        assert (used.day, used.sent_received_bytes) == (latest, since)
        left = judge(Budget(bytes_per_day=limit), Seen(), used, Allowed(), 0.0)
        assert left.bytes_left == max(int((1 - KEPT_BACK) * limit) - since, 0)
        assert left.link == (left.bytes_left > 0)


def test_a_clock_that_was_far_ahead_holds_no_day_for_ever() -> None:
    used = Used().at("2099-01-01", 0.0, 50).at("2026-11-21", 3600.0, 50)
    assert (used.day, used.sent_received_bytes) == ("2099-01-01", 100)
    used = used.at("2026-11-21", LONGEST_DAY_S, 0).at("2026-11-21", 1.0, 7)
    assert (used.day, used.sent_received_bytes) == ("2026-11-21", 7)


@given(st.dictionaries(st.sampled_from([0.05, 0.1, 0.2, 0.5, 1.0]), st.floats(0.01, 1000)), st.floats(0.01, 1000))
def test_a_density_that_took_too_much_is_not_given_again(joules: dict[float, float], limit: float) -> None:
    used = Used(run="a", joules=joules)
    allowed = judge(Budget(joules_per_round=limit), Seen(), used, Allowed(), 0.0)
    over = [share for share, took in joules.items() if took > limit]
    if not over:
        assert (allowed.density, allowed.said) == (1.0, "")
        return
    assert 0.0 < allowed.density < min(over)
    assert all(share <= allowed.density for share in joules if share < min(over))
    assert allowed.names == {JOULES}
    assert allowed.train
    assert used.round_done("b", 0.5, 1.0).joules == {0.5: 1.0}, "another run's rounds say nothing of this one's"


def test_rounds_that_nobody_measures_end_the_work_and_a_measured_one_begins_it_again() -> None:
    used, budget = Used(), Budget(joules_per_round=5.0)
    for _ in range(UNMEASURED_MOST):
        assert judge(budget, Seen(), used, Allowed(), 0.0).train
        used = used.round_done("a", 1.0, None)
    assert not judge(budget, Seen(), used, Allowed(), 0.0).train
    assert judge(budget, Seen(), used.round_done("a", 1.0, 4.0), Allowed(), 0.0) == Allowed()
