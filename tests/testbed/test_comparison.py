"""The comparison's numbers, by hand."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from testbed import pictures
from testbed.compare import Failure
from testbed.comparison import baseline_of, curve_of, default_target, reach, reached_of, rows_of, targets_of
from testbed.grid import Choice
from testbed.outcome import Outcome, Point, Spec, remarks, why_untrained
from testbed.report import Comparison, write_report
from testbed.tables import as_markdown, by_target, overview


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
        densities={f"device-{index:04d}": (1.0, 1.0) for index in range(10)},
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
    assert reach(points, 0.5, [10.0, 20.0, 30.0]) == 20.0
    assert reach(points, 0.6, [10.0, 20.0, 30.0]) is None


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


def test_density_and_coverage_count_from_when_somebody_had_joined() -> None:
    one = run(1, 0.5, 0.6)
    empty = msgspec.structs.replace(one.points[0], mean_density=0.0, coverage=0.0)
    late = msgspec.structs.replace(one, points=[empty, one.points[1]])
    row = rows_of({"fedgmr": [late]}, 0.7, "fedgmr")["fedgmr"]
    assert (row.mean_density, row.mean_coverage, row.minimum_coverage) == (0.5, 0.25, 0.25)
    nobody = rows_of({"fedgmr": [msgspec.structs.replace(one, points=[empty])]}, 0.7, "fedgmr")["fedgmr"]
    assert (nobody.mean_density, nobody.mean_coverage) == (0.0, 0.0)


def test_no_time_lies_after_the_end_of_the_run() -> None:
    late = [msgspec.structs.replace(one, spec=Spec(seed=one.spec.seed, seconds=29.5)) for one in OUTCOMES["fedgmr"]]  # the clock says 30
    assert rows_of({"fedgmr": late}, 0.85, "fedgmr")["fedgmr"].reached == 1
    assert reached_of(late[:1], [], 0.85).seconds_to_target_median == 29.5
    assert curve_of(late).seconds == [10.0, 20.0, 29.5]
    assert reached_of(OUTCOMES["fedgmr"], late[:1], 0.95).speedup_at_least is None


def test_a_row_of_fewer_seeds_is_marked_and_one_seed_has_no_deviation() -> None:
    rows = rows_of({"fedgmr": OUTCOMES["fedgmr"][:1], "fedavg": OUTCOMES["fedavg"][:2]}, 0.7, "fedgmr")
    shown = overview(rows, 0.7, "fedgmr", 2)
    seeds = shown.head.index("seeds")
    assert {line[0]: (line[1], line[seeds]) for line in shown.lines} == {
        "fedgmr": ("0.9000 ± -", "only 1 of 2"),
        "fedavg": ("0.3000 ± 0.0000", "2"),
    }


def test_never_is_said_of_runs_that_never_got_there_only() -> None:
    shown = overview(rows_of({"fedgmr": OUTCOMES["fedgmr"][:2]}, 0.85, "fedgmr"), 0.85, "fedgmr")
    assert shown.lines[0][2:6] == ["no median", "no median", "not run", "1/2"]


def test_runs_without_aggregations_say_why() -> None:
    trained = run(1, 0.1, 0.1)
    assert why_untrained(trained) is None
    still = [msgspec.structs.replace(point, version=0) for point in trained.points]
    lonely = msgspec.structs.replace(trained, points=still, updates={}, densities={})
    silent = msgspec.structs.replace(lonely, updates={"a": 0}, densities={"a": (1.0, 1.0)})
    waiting = msgspec.structs.replace(silent, updates={"a": 3})
    for outcome, why in (
        (lonely, "no device got through"),
        (silent, "1 of 10 devices joined and no update"),
        (waiting, "updates that arrived: 3"),
    ):
        assert why in (why_untrained(outcome) or "")
    assert rows_of({"fedgmr": [waiting, trained]}, 0.7, "fedgmr")["fedgmr"].aggregations_mean == 0.5
    shown = overview(rows_of({"fedgmr": [waiting], "fedavg": [trained]}, 0.7, "fedgmr"), 0.7, "fedgmr")
    assert {line[0]: line[1] for line in shown.lines} == {"fedgmr": "0.1000 ± -, untrained", "fedavg": "0.1000 ± -"}


def test_devices_that_took_no_part_are_spoken_of() -> None:
    trained = run(1, 0.1, 0.1)
    assert remarks(trained) == []
    fewer = msgspec.structs.replace(trained, densities={"0": (1.0, 1.0)})
    assert remarks(fewer) == ["9 of 10 devices took no part: they never got through to the coordinator"]
    small = msgspec.structs.replace(fewer, spec=msgspec.structs.replace(fewer.spec, memory=(1e6,)))
    assert "--memory-mb" in remarks(small)[0]


def test_without_fedasync_there_is_no_speedup() -> None:
    rows = rows_of({"fedgmr": OUTCOMES["fedgmr"][:1]}, 0.7, "fedgmr")
    assert (rows["fedgmr"].speedup_over_fedasync, rows["fedgmr"].final_std) == (None, None)


def test_the_default_target_is_below_the_best() -> None:
    assert default_target(OUTCOMES) == 0.79


def test_classes_devices_and_rejections() -> None:
    one, two = run(1, 0.5), msgspec.structs.replace(run(2, 0.5), per_class=[0.1, 0.8], updates={"a": 0, "b": 9}, rejected=3)
    row = rows_of({"fedgmr": [one, two]}, 0.7, "fedgmr")["fedgmr"]
    assert row.per_class_mean == pytest.approx([0.5, 0.55])
    assert row.worst_class == 0
    assert row.worst_class_mean == pytest.approx(0.2)  # the mean of each run's worst, 0.3 and 0.1
    assert (row.updates_per_device_min, row.updates_per_device_median, row.updates_per_device_max) == (1.5, 4.0, 6.5)
    assert row.rejected_mean == 1.5
    assert (row.mean_coverage, row.minimum_coverage) == (0.25, 0.25)


def test_a_speedup_over_what_never_arrives_is_a_bound() -> None:
    reached = reached_of(OUTCOMES["fedgmr"], OUTCOMES["fedavg"], 0.7)
    assert (reached.speedup_over_fedasync, reached.speedup_at_least) == (None, 1.5)  # FedAvg's runs end after 30 s, here it takes 20 s
    assert reached_of(OUTCOMES["fedgmr"], [], 0.7).speedup_at_least is None
    assert reached_of(OUTCOMES["fedavg"], OUTCOMES["fedavg"], 0.7).speedup_at_least is None


def test_the_table_tells_never_from_not_run_and_from_a_bound() -> None:
    def speedups(outcomes: dict[str, list[Outcome]]) -> dict[str, str]:
        table = overview(rows_of(outcomes, 0.7, "fedgmr"), 0.7, "fedgmr")
        column = table.head.index("x fedasync")
        return {line[0]: line[column] for line in table.lines}

    assert speedups(OUTCOMES) == {"fedgmr": "1.50", "fedasync": "1.00", "fedavg": "never"}
    assert set(speedups({name: OUTCOMES[name] for name in ("fedgmr", "fedavg")}).values()) == {"not run"}
    slow = {"fedgmr": OUTCOMES["fedgmr"], "fedasync": OUTCOMES["fedavg"]}
    assert speedups(slow) == {"fedgmr": "> 1.50", "fedasync": "never"}


def test_fedasync_of_a_grid_is_its_first() -> None:
    assert baseline_of({"fedgmr[k=1]": [], "fedasync[k=1]": [], "fedasync[k=2]": []}) == "fedasync[k=1]"
    assert baseline_of({"fedasync[k=1]": [], "fedasync": []}) == "fedasync"
    assert baseline_of({"fedasync-sync": []}) is None


def test_targets_end_at_the_best() -> None:
    assert targets_of(OUTCOMES, 0.79) == [0.65, 0.7, 0.75, 0.79, 0.8]  # the best mean is 0.8333
    assert targets_of({"fedgmr": [run(1, 0.12)]}, 0.11) == [0.05, 0.1, 0.11]
    assert targets_of({"fedgmr": [run(1, 0.02)]}, 0.01) == [0.01]
    assert targets_of({"fedgmr": [run(1, 0.6)]}, 0.6) == [0.45, 0.5, 0.55, 0.6]
    table = by_target(OUTCOMES, [0.4, 0.7])
    assert table.lines[1] == ["fedasync", "30", "0.0", "1.00", "30", "0.0", "1.00"]


def test_curves_are_means_over_seeds_as_long_as_the_shortest() -> None:
    mean_curve = curve_of([run(1, 0.2, 0.4, 0.9), run(2, 0.4, 0.5)])
    assert mean_curve.accuracy == pytest.approx([0.3, 0.45])
    assert (mean_curve.lowest, mean_curve.highest, mean_curve.seconds) == ([0.2, 0.4], [0.4, 0.5], [10.0, 20.0])
    assert mean_curve.megabytes == pytest.approx([0.0, 0.001001])


class Page(HTMLParser):
    """What the report's markup holds, and that its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "th":
            assert dict(attributes)["scope"] in ("row", "col")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_report(tmp_path: Path) -> None:
    tried = [({"training.learning_rate": 0.1}, 0.5), ({"training.learning_rate": 0.2}, None)]
    choices = {name: Choice({"training.learning_rate": 0.1}, tried, name, 0, 60.0) for name in OUTCOMES}
    failures = [Failure(Spec(method="fedfix", seed=2), "no <disk>")]
    summary = write_report(Comparison(OUTCOMES, 0.7, "fedgmr", "regrow compare <x>", choices, failures, 4), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.counts["table"] == page.counts["caption"] == 5
    assert all(address.startswith("#") for address in page.addresses), "the page needs nothing from elsewhere"
    for said in ("regrow compare &lt;x&gt;", "fedfix seed 2: no &lt;disk&gt;", "training.learning_rate=0.2: failed"):
        assert said in text
    pasted = (tmp_path / "report.md").read_text()
    assert "| fedavg | 0.3000 ± 0.0000 | never | never | never | 0/3 | only 3 of 4 | -0.5333 ± 0.1434 |" in pasted
    assert "aggregations" in pasted
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert msgspec.json.decode((tmp_path / "summary.json").read_bytes()) == msgspec.to_builtins(summary)
    assert summary["methods"]["fedavg"]["reached"] == 0
    assert summary["methods"]["fedavg"]["tuned"] == {"training.learning_rate": 0.1}
    assert {"final_mean", "final_std", "seconds_to_target_median", "speedup_over_fedasync"} <= summary["methods"]["fedgmr"].keys()
    assert summary["targets"]["0.80"]["fedgmr"]["reached"] == 3
    assert summary["failed"] == ["fedfix seed 2: no <disk>"]
    assert (summary["seeds"], summary["remarks"]) == (4, [])
    assert summary["machine"]["python"]


def test_pictures_of_many_methods_stay_readable() -> None:
    many = {f"method-{index:02d}": [run(seed, 0.1, 0.02 * index, 0.03 * index) for seed in (1, 2)] for index in range(23)}
    outcomes = {**many, "fedasync": [run(1, 0.1, 0.2, 0.3)], "fedgmr": [run(1, 0.1, 0.2, 0.2)]}
    rows = rows_of(outcomes, 0.5, "fedgmr")
    chosen = pictures.highlighted(rows, "fedgmr", outcomes)
    assert chosen == ["fedgmr", "fedasync", "method-22", "method-21", "method-20", "method-19", "method-18"]
    assert len(set(zip(pictures.COLOURS, pictures.DASHES, strict=True))) == pictures.HIGHLIGHTED
    lines = {name: (curve_of(runs).seconds, curve_of(runs).accuracy) for name, runs in outcomes.items()}
    drawn = [
        pictures.line_chart(lines, chosen, "s", "accuracy", 0.5),
        pictures.small_multiples(lines, "s", "accuracy", "key"),
        pictures.final_bars(rows),
        pictures.update_strips(outcomes),
    ]
    for picture in drawn:
        root = ElementTree.fromstring(picture)
        width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
        for line in root.iter("polyline"):
            numbers = [float(number) for pair in line.attrib["points"].split() for number in pair.split(",")]
            assert all(0 <= x <= width for x in numbers[::2])
            assert all(0 <= y <= height for y in numbers[1::2])
    assert "18 others" in drawn[0]
    assert drawn[1].count("<use ") == 25
    assert all(f">{name}<" in drawn[1] for name in outcomes)
    assert pictures.png({name: curve_of(runs) for name, runs in outcomes.items()}, chosen, 0.5).startswith(b"\x89PNG")


@pytest.mark.parametrize(("top", "last"), [(0.83, 1.0), (0.6, 0.6), (1.0, 1.0), (1999.0, 2000.0), (0.0, 1.0), (7.3, 8.0), (math.inf, 1.0)])
def test_axes_end_at_a_round_number(top: float, last: float) -> None:
    position, ticks = pictures._scale([0.0, top], 100, 50)
    assert ticks[-1] == pytest.approx(last)
    assert position(ticks[-1]) == pytest.approx(150)
    assert 3 <= len(ticks) <= 7


def test_markdown_keeps_its_columns() -> None:
    lines = as_markdown(by_target({"a|b": OUTCOMES["fedgmr"]}, [0.5])).splitlines()[2:]
    assert lines[2].startswith("| a\\|b |")
