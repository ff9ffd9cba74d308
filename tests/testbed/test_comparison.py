"""The comparison's numbers, by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from testbed.comparison import default_target, reach, rows_of, table_lines, write_report
from testbed.simulate import Outcome, Point, Spec


def curve(*accuracies: float, step_s: float = 10.0) -> list[Point]:
    return [
        Point(
            time_s=step_s * (i + 1),
            version=i,
            accuracy=a,
            loss=1.0,
            bytes_up=i,
            bytes_down=1000 * i,
            updates=i,
            mean_density=0.5,
            coverage=0.25,
        )
        for i, a in enumerate(accuracies)
    ]


def run(seed: int, *accuracies: float) -> Outcome:
    return Outcome(
        spec=Spec(seed=seed),
        points=curve(*accuracies),
        final_accuracy=accuracies[-1],
        validation_accuracy=0.5,
        worst_decile=0.4,
        per_class=[0.9, 0.3],
        updates={"a": 3, "b": 4},
        densities={},
        rejected=0,
        reason="",
    )


OUTCOMES = {
    "fedgmr": [run(1, 0.5, 0.8, 0.9), run(2, 0.4, 0.8, 0.8), run(3, 0.7, 0.75, 0.8)],
    "fedasync": [run(1, 0.1, 0.6, 0.7), run(2, 0.1, 0.3, 0.8), run(3, 0.2, 0.3, 0.7)],
    "fedavg": [run(1, 0.1, 0.2, 0.3), run(2, 0.1, 0.2, 0.3), run(3, 0.1, 0.2, 0.3)],
}


def test_reaching_a_target() -> None:
    points = curve(0.1, 0.5, 0.4)
    assert reach(points, 0.5, lambda point: point.time_s) == 20.0
    assert reach(points, 0.6, lambda point: point.time_s) is None


def test_rows_count_those_that_never_reach_it() -> None:
    rows = rows_of(OUTCOMES, 0.7, "fedgmr")
    assert rows["fedgmr"].seconds_to_target_median == 20.0
    assert rows["fedasync"].seconds_to_target_median == 30.0
    assert rows["fedgmr"].speedup_over_fedasync == 1.5
    assert (rows["fedavg"].seconds_to_target_median, rows["fedavg"].reached, rows["fedavg"].seeds) == (None, 0, 3)
    assert rows["fedavg"].speedup_over_fedasync is None
    assert rows["fedgmr"].bytes_to_target_median == 1001.0
    assert rows["fedgmr"].difference is None
    assert rows["fedasync"].difference == pytest.approx(-0.1)
    # Differences -0.2, 0, -0.1: deviation 0.1, Student's t with 2 degrees of freedom 4.303.
    assert rows["fedasync"].difference_interval == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert rows["fedgmr"].worst_class_mean == pytest.approx(0.3)
    assert rows["fedgmr"].updates_mean == 7


def test_density_counts_from_when_somebody_had_joined() -> None:
    one = run(1, 0.5, 0.6)
    late = msgspec.structs.replace(one, points=[msgspec.structs.replace(one.points[0], mean_density=0.0), one.points[1]])
    assert rows_of({"fedgmr": [late]}, 0.7, "fedgmr")["fedgmr"].mean_density == 0.5


def test_without_fedasync_there_is_no_speedup() -> None:
    rows = rows_of({"fedgmr": OUTCOMES["fedgmr"][:1]}, 0.7, "fedgmr")
    assert (rows["fedgmr"].speedup_over_fedasync, rows["fedgmr"].final_std) == (None, 0.0)


def test_the_default_target_is_below_the_best() -> None:
    assert default_target(OUTCOMES) == 0.79


def test_the_report(tmp_path: Path) -> None:
    summary = write_report(OUTCOMES, tmp_path, target=0.7, reference="fedgmr", command="regrow compare <x>")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;x&gt;" in page
    assert "never" in page
    assert summary["methods"]["fedavg"]["reached"] == 0
    lines = table_lines(rows_of(OUTCOMES, 0.7, "fedgmr"), 0.7, "fedgmr")
    assert {len(line) for line in lines} == {len(lines[0])}
