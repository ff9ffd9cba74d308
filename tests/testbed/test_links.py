"""Links, training times and attendance are what their words say, and depend on nothing but their arguments."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.errors import LocalError
from regrow.local_rules import drawn_levels
from regrow.machine import Train, Trained, TrainingFailed
from testbed.compute import Compute, read_steps, timed
from testbed.conditions import DAY_S, Attendance, heterogeneity, nightly, paper_links, paper_server_links
from testbed.links import BLOCK, Constant, Latency, Link, LogNormal, Trace, WithOutages, read_trace

RATES = st.floats(1e4, 1e8)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    gaps = draw(st.lists(st.floats(1.0, 30.0), min_size=1, max_size=6))
    rates = draw(st.lists(st.one_of(st.just(0.0), RATES), min_size=len(gaps), max_size=len(gaps)))
    rates[draw(st.integers(0, len(rates) - 1))] = draw(RATES)
    times = np.cumsum([draw(st.floats(0.0, 1e6)), *gaps[1:]])
    return Trace(tuple(times.tolist()), tuple(rates))


SEEDS = st.integers(0, 2**32)
SIMPLE = st.one_of(
    st.builds(Constant, RATES),
    st.builds(LogNormal, RATES, st.floats(0.0, 2.0), st.floats(0.5, 60.0), SEEDS, st.text(max_size=4), st.integers(1, 20), st.booleans()),
    traces(),
)
LINKS = st.one_of(SIMPLE, st.builds(WithOutages, SIMPLE, st.floats(5.0, 300.0), st.floats(0.5, 50.0), SEEDS, st.text(max_size=4)))
STARTS = st.floats(0.0, 1e5)
SIZES = st.integers(0, 100_000)


@settings(max_examples=150)
@given(LINKS, STARTS, SIZES, SIZES)
def test_sending_two_parts_in_a_row_takes_as_long_as_sending_both(link: Link, start_s: float, first: int, second: int) -> None:
    whole = link.finish_s(start_s, first + second)
    parts = link.finish_s(link.finish_s(start_s, first), second)
    assert start_s <= whole < math.inf
    if abs(parts - whole) > 1e-6:  # whoever ends at the very edge of an outage is put on one side of it by rounding
        assert link.finish_s(start_s, first + second - 1) <= parts <= link.finish_s(start_s, first + second + 1)


@settings(max_examples=150)
@given(LINKS, STARTS, st.floats(0.0, 1000.0), SIZES, SIZES)
def test_more_bytes_or_a_later_start_never_end_earlier(link: Link, start_s: float, later_s: float, few: int, more: int) -> None:
    assert link.finish_s(start_s, few + more) >= link.finish_s(start_s, few)
    assert link.finish_s(start_s + later_s, few) >= link.finish_s(start_s, few) - 1e-6


@settings(max_examples=60)
@given(LINKS, st.lists(st.tuples(STARTS, SIZES), min_size=2, max_size=8))
def test_the_order_of_questions_does_not_change_the_answers(link: Link, questions: list[tuple[float, int]]) -> None:
    twin = _fresh(link)
    assert twin == link
    forwards = [link.finish_s(*question) for question in questions]
    assert [twin.finish_s(*question) for question in reversed(questions)] == forwards[::-1]


def _fresh(link: Link) -> Link:
    """The same link without what it remembers."""
    values = {name: value for name, value in vars(link).items() if not name.startswith("_")}
    if isinstance(link, WithOutages):
        values["link"] = _fresh(link.link)
    return type(link)(**values)


@given(RATES, STARTS, SIZES)
def test_a_constant_link_is_exact(bps: float, start_s: float, payload_bytes: int) -> None:
    assert Constant(bps).finish_s(start_s, payload_bytes) == start_s + 8 * payload_bytes / bps


def test_a_trace_is_integrated_as_by_hand() -> None:
    link = Trace(
        (100.0, 110.0, 130.0), (800.0, 0.0, 1600.0)
    )  # 10 s of 100 bytes/s, 20 s of nothing, 20 s of 200 bytes/s: 5 000 bytes a cycle
    assert link.finish_s(0.0, 1_000) == 10.0
    assert link.finish_s(0.0, 1_001) == pytest.approx(30.005)
    assert link.finish_s(5.0, 1_500) == pytest.approx(35.0)
    assert link.finish_s(12.0, 200) == pytest.approx(31.0)
    assert link.finish_s(49.0, 300) == pytest.approx(51.0)
    assert link.finish_s(5.0, 10 * 5_000) == pytest.approx(505.0)
    assert link.finish_s(12.0, 0) == 12.0


def test_a_trace_that_does_not_repeat_keeps_its_last_rate() -> None:
    assert Trace((0.0, 10.0), (800.0, 80.0), repeat=False).finish_s(0.0, 1_100) == pytest.approx(20.0)
    silent = Trace((0.0, 10.0), (800.0, 0.0), repeat=False)
    assert silent.finish_s(0.0, 1_001) == math.inf
    assert WithOutages(silent, 5.0, 1.0).finish_s(0.0, 5_000) == math.inf
    assert Trace((7.0,), (800.0,)).finish_s(3.0, 200) == 5.0


def test_an_outage_of_years_is_passed_at_once() -> None:
    link = WithOutages(LogNormal(1e6), 5.0, 1e9, seed=3)
    until_s, _ = next(piece for piece in link.pieces(0.0) if piece[1] == 0.0)
    assert link.finish_s(0.0, 10**7) > until_s > 1e6
    pieces = list(islice(link.pieces(0.0), 1000))
    assert sum(until - at for (at, _), (until, bps) in pairwise(pieces) if not bps) > 1e9


def test_outages_carry_nothing_and_are_as_long_as_asked() -> None:
    link = WithOutages(Constant(8e9), 30.0, 10.0, seed=3, stream="d0/up")
    working = silent = 0.0
    at, silences = 0.0, 0
    for until_s, bps in islice(link.pieces(0.0), 8_000):
        if bps:
            working += until_s - at
        else:
            silent, silences = silent + until_s - at, silences + 1
            assert link.finish_s(at + (until_s - at) / 2, 1) == pytest.approx(until_s, abs=1e-6)
        at = until_s
    assert silences == 4_000
    assert working / 4_000 == pytest.approx(30.0, rel=0.06)
    assert silent / 4_000 == pytest.approx(10.0, rel=0.06)
    much_bytes = 10**12  # 1 000 s of work
    assert link.finish_s(0.0, much_bytes) == WithOutages(Constant(8e9), 30.0, 10.0, 3, "d0/up").finish_s(0.0, much_bytes)
    assert link.finish_s(0.0, much_bytes) != WithOutages(Constant(8e9), 30.0, 10.0, 4, "d0/up").finish_s(0.0, much_bytes)


def test_log_normal_rates_have_the_stated_mean_and_spread() -> None:
    link = LogNormal(1e6, 0.3, 10.0, seed=1, stream="d0/up", draws=1)
    rates = np.array([link.rate_bps(interval) for interval in range(20_000)])
    assert rates.mean() == pytest.approx(1e6, rel=0.01)
    assert np.log(rates).std() == pytest.approx(0.3, rel=0.02)
    median = LogNormal(1e6, 0.3, 10.0, seed=1, stream="d0/up", draws=1, preserve_mean=False)
    assert np.median([median.rate_bps(interval) for interval in range(20_000)]) == pytest.approx(1e6, rel=0.01)
    averaged = [LogNormal(1e6, 0.3, 10.0, seed=1).rate_bps(interval) for interval in range(500)]
    assert np.std(averaged) == pytest.approx(1e6 * math.sqrt((math.exp(0.09) - 1) / 20), rel=0.15)
    assert link.rate_bps(BLOCK) != LogNormal(1e6, 0.3, 10.0, 1, "d1/up", 1).rate_bps(BLOCK)
    assert link.finish_s(9.0, 1) == 9.0 + 8 / link.rate_bps(0)


def test_jitter_adds_its_mean_to_the_latency() -> None:
    latency = Latency(0.05, 0.02, seed=2, stream="d0")
    delays = [latency.at_s(second + 0.5) for second in range(5_000)]
    assert min(delays) >= 0.05
    assert np.mean(delays) == pytest.approx(0.07, rel=0.03)
    assert delays[3] == Latency(0.05, 0.02, seed=2, stream="d0").at_s(3.9)
    assert Latency(0.05).at_s(9.0) == 0.05


def test_a_recorded_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "link.csv"
    path.write_text("# agent d3\n\nSeconds, bits_per_second\n10, 5e5 # dusk\n12,0\n13.5,1000\n")
    assert read_trace(path) == Trace((10.0, 12.0, 13.5), (5e5, 0.0, 1000.0))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("# nothing\n", 1),
        ("time,rate\n0,1\n", 1),
        ("0,1\nseconds,bits_per_second\n", 2),
        ("0,1\n1\n", 2),
        ("0,1\n1,2,3\n", 2),
        ("0,1\n1,fast\n", 2),
        ("0,1\n1,nan\n", 2),
        ("0,1\n1,inf\n", 2),
        ("0,1\n1,-5\n", 2),
        ("0,1\n0,5\n", 2),
        ("0,0\n1,0\n", 2),
    ],
)
def test_a_malformed_trace_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "link.csv"
    path.write_text(text)
    with pytest.raises(LocalError, match=rf"link\.csv:{line}: "):
        read_trace(path)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "link.csv"
    with pytest.raises(LocalError, match=r"link\.csv: not readable"):
        read_trace(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LocalError, match=r"link\.csv: not readable"):
        read_trace(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(0.0),
        lambda: LogNormal(math.nan),
        lambda: LogNormal(1e6, -0.1),
        lambda: LogNormal(1e6, period_s=0.0),
        lambda: LogNormal(1e6, draws=0),
        lambda: Trace((), ()),
        lambda: Trace((0.0,), (1.0, 2.0)),
        lambda: Trace((1.0, 1.0), (1.0, 2.0)),
        lambda: Trace((0.0, 1.0), (0.0, 0.0)),
        lambda: Trace((0.0, 1.0), (1.0, -1.0)),
        lambda: WithOutages(Constant(1.0), 0.0, 1.0),
        lambda: Latency(-1.0),
        lambda: Compute(()),
        lambda: Compute((0.1,), slowdown=0.0),
        lambda: Compute((0.1,), by_density=((1.0, 1.0), (0.5, 0.5))),
        lambda: Compute((0.1,), sigma=-1.0),
        lambda: Attendance(5.0, 5.0),
        lambda: Attendance(windows_s=((10.0, 5.0),)),
        lambda: Attendance(windows_s=((0.0, DAY_S),)),
        lambda: nightly(25.0, 3.0),
        lambda: heterogeneity("extreme", 10),
        lambda: heterogeneity("low", 0),
        lambda: paper_links("d0", 0.0, 1, seed=0, period_s=1.0),
    ],
)
def test_what_makes_no_sense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(LocalError):
        make()


# ---- training time -------------------------------------------------------------------------------------------------------------------


def test_training_takes_steps_times_step_time_times_slowness() -> None:
    compute = Compute((0.2,), slowdown=3.0, by_density=((0.1, 0.4), (1.0, 1.0)))
    assert compute.seconds(0, 5, 1.0) == pytest.approx(3.0)
    assert compute.seconds(7, 5, 0.1) == pytest.approx(1.2)
    assert compute.seconds(7, 5, 0.55) == pytest.approx(2.1)
    assert compute.seconds(7, 5, 0.01) == pytest.approx(1.2)
    assert Compute((0.2,)).seconds(0, 5, 0.05) == Compute((0.2,)).seconds(0, 5, 1.0)


def test_recorded_steps_are_gone_through_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("seconds_per_step\n1\n2\n4\n")
    compute = Compute(read_steps(path))
    assert [compute.seconds(job, 2, 1.0) for job in range(4)] == [3.0, 5.0, 6.0, 3.0]
    assert compute.seconds(1, 7, 1.0) == 2 * 7 + 2.0
    path.write_text("1\n0\n")
    with pytest.raises(LocalError, match=r"steps\.csv:2: "):
        read_steps(path)


def test_jitter_of_training_is_pure_and_has_mean_one() -> None:
    compute = Compute((0.1,), sigma=0.25, seed=5, stream="d0")
    drawn = [compute.seconds(job, 10, 1.0) for job in range(3_000)]
    assert drawn[::-1] == [compute.seconds(job, 10, 1.0) for job in reversed(range(3_000))]
    assert np.mean(drawn) == pytest.approx(1.0, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.25, rel=0.05)


def test_a_timed_trainer_changes_the_time_only() -> None:
    job = Train(1, 0, {}, np.zeros(50, np.float32), np.zeros(50, np.uint32), 50, {}, steps=6, batch=1, learning_rate=0.1, seed=1)
    trained = Trained(1, job.values, 10, 0.5, 99.0, ())
    half = Compute((1.0,), by_density=((0.0, 0.0001), (1.0, 1.0)))
    run = timed(lambda name, _: (99.0, trained if name == "d0" else TrainingFailed(1, "no")), {"d0": half, "d1": Compute((1.0,))}, 100)
    seconds, result = run("d0", job)
    assert isinstance(result, Trained)
    assert seconds == pytest.approx(3.0, rel=1e-3)
    assert (result.seconds, result.loss) == (seconds, 0.5)
    assert run("d1", job) == (6.0, TrainingFailed(1, "no"))


def test_widths_that_are_drawn_take_what_each_step_costs() -> None:
    """Not what a step of their mean width would: between two levels, work is no straight line."""
    widths = {0: 10, 1: 40, 2: 100}
    job = Train(3, 2, {}, np.zeros(100, np.float32), np.zeros(100, np.uint32), 100, {}, 9, 1, 0.1, seed=5, widths=widths)
    drawn = drawn_levels([0, 1, 2], 9, 5)
    assert len(set(drawn)) == 3
    factors = {0: 0.3, 1: 0.9, 2: 1.0}
    compute = Compute((1.0, 2.0), slowdown=2.0, by_density=tuple((widths[level] / 100, factors[level]) for level in widths))
    seconds, _ = timed(lambda *_: (0.0, TrainingFailed(3, "no")), {"d0": compute}, 100)("d0", job)
    # Job 3 of 9 steps begins at the 28th recorded one: 2 s, 1 s, 2 s, ...
    assert seconds == pytest.approx(2.0 * sum(factors[level] * (2.0, 1.0)[step % 2] for step, level in enumerate(drawn)))


# ---- attendance and presets ----------------------------------------------------------------------------------------------------------


def test_a_night_crosses_midnight() -> None:
    charging = nightly(22.0, 6.0)
    hours = [hour for hour in range(48) if charging.available(3600.0 * hour)]
    assert hours == [*range(6), *range(22, 30), 46, 47]
    assert list(islice(charging.changes(), 4)) == [(0.0, True), (6 * 3600.0, False), (22 * 3600.0, True), (30 * 3600.0, False)]


@st.composite
def attendances(draw: st.DrawFn) -> Attendance:
    edges = sorted(draw(st.lists(st.integers(0, 99), max_size=6, unique=True).filter(lambda edges: len(edges) % 2 == 0)))
    shift = draw(st.integers(0, 99 - (edges[0] if edges else 0)))
    windows = tuple((float(a + shift), float(b + shift)) for a, b in zip(edges[::2], edges[1::2], strict=True))
    joins = draw(st.integers(0, 400))
    return Attendance(float(joins), float(joins + draw(st.integers(1, 400))), windows, 100.0)


@given(attendances())
def test_changes_and_availability_agree(attendance: Attendance) -> None:
    changes = list(attendance.changes())
    for tick in range(850):
        time_s = tick + 0.5
        last = [there for at, there in changes if at <= time_s]
        assert attendance.available(time_s) == (bool(last) and last[-1] and time_s < attendance.leaves_s)
    assert [there for _, there in changes] == [index % 2 == 0 for index in range(len(changes))]


@pytest.mark.parametrize(
    ("kind", "clients", "counts"),
    [
        ("high", 10, [1, 1, 1, 1, 6]),
        ("medium", 10, [1, 1, 2, 3, 3]),
        ("low", 10, [2, 2, 2, 2, 2]),
        ("high", 5, [1, 1, 0, 0, 3]),
        ("high", 1, [0, 0, 0, 0, 1]),
        ("medium", 7, [1, 1, 1, 2, 2]),
        ("low", 7, [2, 2, 1, 1, 1]),
    ],
)
def test_the_classes_of_the_papers(kind: str, clients: int, counts: list[int]) -> None:
    classes = heterogeneity(kind, clients)
    assert [classes.count(density) for density in (1.0, 0.5, 0.2, 0.1, 0.05)] == counts
    assert classes == sorted(classes, reverse=True)


def test_the_links_of_the_papers_send_every_class_in_the_same_time() -> None:
    for density in (1.0, 0.2, 0.05):
        for model_bytes in (26_000_000, 1_000_000):
            up, down = paper_links("d0", density, model_bytes, seed=1, period_s=30.0)
            assert Constant(up.mean_bps).finish_s(0.0, round(density * model_bytes)) == pytest.approx(5.2)
            assert Constant(down.mean_bps).finish_s(0.0, round(density * model_bytes)) == pytest.approx(1.3)
            assert (up.sigma, up.draws, up.period_s) == (0.3, 20, 30.0)
            assert up.rate_bps(0) / up.mean_bps != down.rate_bps(0) / down.mean_bps
    up, down = paper_server_links("coordinator", 26_000_000, seed=1, period_s=30.0)
    assert (up.mean_bps, down.mean_bps, up.sigma) == (80e6, 400e6, 0.1)
