"""What a field run's report says of rows that are known, of those that are modelled, and of those that nobody has."""

from __future__ import annotations

import csv
import io
import sqlite3
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import pandas
import pytest
from pyarrow import parquet

from broker_server.field.frames import frames_of
from broker_server.field.observed import TRAINING, Observed
from broker_server.field.plots import MOST_MARKS, _over_the_day, _staleness
from broker_server.field.record import FieldRecord, Recorded, reach, read_record
from broker_server.field.summary import by_device, clocks, default_target, gaps, overview
from broker_server.observations import open_observations
from broker_server.runs import run_info
from cli.main import main
from tests.readers import duckdb_on
from tests.testbed.recorded import AHEAD_S, BASELINE_S, FULL_S, WATTS, recorded_field


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, three repetitions."""
    folder = tmp_path_factory.mktemp("orchard")
    recorded_field(folder, ("fedgmr", "fedavg"), 3)
    return folder


@pytest.fixture(scope="module")
def record(place: Path) -> FieldRecord:
    from broker_server.field.progress import read_field

    with closing(open_observations(place / "runs" / ".gateway")) as db:
        return read_record(read_field(place / "runs", "orchard"), db)


@pytest.fixture(scope="module")
def report(place: Path) -> tuple[Path, str]:
    """(the report's folder, what was said): made once, for it takes seconds."""
    out, said = place / "report", io.StringIO()
    words = ["field", "report", "orchard", "--runs", place / "runs", "--out", out, "--data", "npz", "--data-folder", place / "data"]
    with redirect_stdout(said):
        assert main([str(word) for word in words]) == 0
    return out, said.getvalue()


def column(table: Any, line: str, head: str) -> str:
    (found,) = (each for each in table.lines if each[0] == line)
    return str(found[list(table.head).index(head)])


def test_joules_are_those_of_the_run_and_not_of_its_baseline(record: FieldRecord) -> None:
    for run in record.runs:
        energy, watched = run.observed["pi-1"].energy(), run.observed["pi-1"]
        assert "baseline" not in energy
        for phase in ("train", "transmit"):
            assert energy[phase].joules == pytest.approx(WATTS[phase] * energy[phase].seconds)
        assert run.baseline["pi-1"].energy()["baseline"].joules == pytest.approx(WATTS["idle"] * BASELINE_S, rel=1e-3)
        assert watched.joules_until([run.step.end_s]) == [pytest.approx(sum(each.joules or 0.0 for each in energy.values()))]


def test_a_clock_that_is_an_hour_ahead_is_moved_back(record: FieldRecord) -> None:
    for run in record.runs:
        assert run.observed["pi-2"].offset.seconds == AHEAD_S
        arrivals = [update.wall_s for update in run.course.devices["pi-2"].updates]
        sent = [row["at_s"] + row["seconds"] for row in run.observed["pi-2"].rows["transfers"] if row["what"] == "update"]
        assert sent
        for at_s in sent:
            assert min(abs(at_s - arrival) for arrival in arrivals) < 0.01
    assert column(clocks(record), "pi-2", "offset") == "+3600000.0"
    assert column(clocks(record), "pi-1", "error at most") == "one way only"


def test_who_has_no_meter_is_unmeasured_everywhere_and_never_zero(record: FieldRecord) -> None:
    target = default_target(record)
    for method in record.methods:
        table = by_device(record, method)
        assert column(table, "pi-3", "J train") == "unmeasured"
        assert column(table, "pi-3", "idle W before") == "unmeasured"
        assert "modelled" in column(table, "pi-2", "J train")
        assert "±" in column(table, "pi-1", "J train")
        assert "modelled" not in column(table, "pi-1", "J train")
        assert column(overview(record, target), method, f"J to {target:g}") in ("unmeasured", "never")
        assert column(overview(record, target), method, "J in all") == "unmeasured (known of 2 of 3 devices)"
    for run in record.runs:
        assert run.joules_until([run.step.end_s]) == [None]


def test_how_many_devices_know_joules_is_told_of_all_runs_and_not_of_one(record: FieldRecord) -> None:
    first, *others = record.of("fedgmr")
    without = replace(first, observed={name: replace(each, rows={**each.rows, "phases": []}) for name, each in first.observed.items()})
    text = column(overview(replace(record, runs=(without, *others)), 0.5), "fedgmr", "J in all")
    assert text == "unmeasured (known of 0 to 2 of 3 devices)"


def test_modelled_joules_keep_the_models_interval(record: FieldRecord) -> None:
    for run in record.runs:
        train = run.observed["pi-2"].energy()["train"]
        assert train.certainty == "modelled"
        assert train.low_j == pytest.approx(0.9 * (train.joules or 0.0))
        assert train.high_j == pytest.approx(1.1 * (train.joules or 0.0))


def test_a_sum_over_devices_is_given_where_all_of_them_know_theirs(record: FieldRecord) -> None:
    def two_of(run: Recorded) -> Recorded:
        course = replace(run.course, devices={name: run.course.devices[name] for name in ("pi-1", "pi-2")})
        return replace(run, course=course, observed={name: run.observed[name] for name in ("pi-1", "pi-2")})

    metered = [two_of(run) for run in record.runs]
    for run in metered:
        parts = [energy.joules or 0.0 for observed in run.observed.values() for energy in observed.energy().values()]
        energy = run.energy()
        assert energy is not None
        assert energy.joules == pytest.approx(sum(parts))
        assert energy.certainty == "modelled"
    text = column(overview(replace(record, runs=tuple(metered)), 0.5), record.methods[0], "J in all")
    assert "modelled" in text
    assert "unmeasured" not in text


def test_rows_that_reach_over_the_edges_add_up_to_the_sums(record: FieldRecord) -> None:
    run = record.runs[0]
    start_s, end_s, before = run.step.start_s, run.step.end_s, run.baseline["pi-1"]
    example = run.observed["pi-1"].rows["phases"][0] | {"phase": "idle", "low_j": None, "high_j": None}
    crossing = [  # from 2 s before the baseline's end to 1 s into the run, and 3 s over its end
        example | {"at_s": before.end_s - 2.0, "seconds": start_s + 1.0 - before.end_s + 2.0, "joules": 40.0},
        example | {"at_s": end_s - 1.0, "seconds": 4.0, "joules": 8.0},
    ]
    sent = run.observed["pi-1"].rows["transfers"][0] | {"at_s": end_s - 1.0, "seconds": 4.0, "payload_bytes": 1000, "packet_bytes": 1010}

    def with_rows(observed: Observed, phases: list[dict[str, Any]]) -> Observed:
        return replace(observed, rows={**observed.rows, "phases": phases + observed.rows["phases"], "transfers": [sent]})

    crossed = replace(
        run,
        observed={"pi-1": with_rows(run.observed["pi-1"], crossing)},
        baseline={"pi-1": replace(with_rows(before, crossing[:1]), rows={**before.rows, "phases": crossing[:1]})},
    )
    tables = {table.name: table.dicts() for table in frames_of(replace(record, runs=(crossed,)))}
    mine = [row for row in tables["phases"] if row["phase_of_plan"] == "run"]
    (device,) = (row for row in tables["devices"] if row["device"] == "pi-1")
    for phase in ("train", "transmit", "idle"):
        assert sum(row["joules"] for row in mine if row["phase"] == phase) == pytest.approx(device[f"{phase}_j"])
        assert sum(row["seconds"] for row in mine if row["phase"] == phase) == pytest.approx(device[f"{phase}_s"])
    assert device["idle_j"] == pytest.approx(40.0 * 1.0 / crossing[0]["seconds"] + 2.0)
    assert min(row["elapsed_s"] for row in mine) == 0.0
    (earlier,) = (row for row in tables["phases"] if row["phase_of_plan"] == "baseline")
    assert (earlier["seconds"], earlier["joules"]) == (pytest.approx(2.0), pytest.approx(40.0 * earlier["share"]))
    (cut,) = (row for row in tables["transfers"] if row["phase_of_plan"] == "run")
    assert (cut["share"], cut["payload_bytes"], cut["packet_bytes"]) == (pytest.approx(0.25), pytest.approx(250.0), pytest.approx(252.5))


def test_what_a_full_journal_let_go_is_missing_and_says_so(record: FieldRecord) -> None:
    table = gaps(record)
    for run in record.runs:
        lost = run.observed["pi-1"].lost()
        assert lost == [
            (pytest.approx(run.step.start_s + FULL_S[0], abs=0.1, rel=0), pytest.approx(run.step.start_s + FULL_S[1], abs=0.1, rel=0))
        ]
        mine = [line for line in table.lines if line[0] == "pi-1" and line[1] == run.step.run]
        assert any(line[3] == "its journal was full" for line in mine)


def test_bytes_are_those_of_training_and_telemetry_stands_apart(record: FieldRecord) -> None:
    for run in record.runs:
        assert run.has_transfers
        rows = [row for observed in run.observed.values() for row in observed.rows["transfers"]]
        training = sum(row["packet_bytes"] for row in rows if row["what"] in TRAINING)
        assert run.transferred("packet_bytes", TRAINING) == pytest.approx(training, rel=0.01)
        assert 0 < run.spent[-1][0] <= training
        assert sum(row["packet_bytes"] for row in rows if row["what"] == "telemetry") == 3 * 560


def test_bytes_in_all_are_of_the_whole_run_like_its_joules(record: FieldRecord) -> None:
    run = record.runs[0]
    late = run.observed["pi-1"].rows["transfers"][-1] | {
        "what": "update",
        "at_s": run.step.end_s - 0.2,
        "seconds": 0.1,
        "packet_bytes": 5_000_000,
    }
    rows = run.observed["pi-1"].rows
    observed = {**run.observed, "pi-1": replace(run.observed["pi-1"], rows={**rows, "transfers": [*rows["transfers"], late]})}
    cut = replace(run.course, points=tuple(point for point in run.course.points if point.wall_s < run.step.end_s - 1.0))
    longer = replace(record, runs=(replace(run, course=cut, observed=observed),))
    tables = {table.name: table.dicts() for table in frames_of(longer)}
    sent = [row for row in tables["transfers"] if row["phase_of_plan"] == "run" and row["what"] in TRAINING]
    (whole,) = tables["runs"]
    assert whole["bytes"] == pytest.approx(sum(row["packet_bytes"] for row in sent))
    assert whole["bytes"] >= tables["curves"][-1]["bytes"] + 5_000_000
    assert column(overview(longer, 0.5), run.repetition.method, "MB in all") == f"{whole['bytes'] / 1e6:.2f}"
    unseen = replace(run, course=cut, observed={})
    assert unseen.bytes_in_all == sum(device.bytes_up + device.bytes_down for device in cut.devices.values())


def test_the_target_is_reached_where_the_curve_first_has_it(record: FieldRecord) -> None:
    target = default_target(record)
    for run in record.runs:
        curve = run.curve
        found = reach(curve, target)
        if found is None:
            assert all(point.score < target for point in curve)
        else:
            assert found.score >= target
            assert all(point.score < target for point in curve[: curve.index(found)])
            assert [point.elapsed_s for point in run.curve] == sorted(point.elapsed_s for point in curve)


def test_the_files_of_the_report(report: tuple[Path, str], record: FieldRecord) -> None:
    out, said = report
    assert "drawing the pictures" in said
    assert "6 runs" in said
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.pdf"))) == 7
    assert "Accuracy over joules: unmeasured" in page  # of pi-3, which trained too
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "run 2 moved behind the wall" in page
    assert "ina3221 VDD_IN" in page
    for file in (out / "data").glob("*.csv"):
        with file.open() as lines:
            rows = list(csv.reader(lines))
        table = parquet.read_table(file.with_suffix(".parquet"))
        assert table.column_names == rows[0]
        assert table.num_rows == len(rows) - 1
    with (out / "data" / "devices.csv").open() as lines:
        unknown = [row for row in csv.DictReader(lines) if row["device"] == "pi-3"]
    assert len(unknown) == len(record.runs)
    assert {(row["train_j"], row["train_certainty"]) for row in unknown} == {("", "unmeasured")}
    with (out / "data" / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert {(row["joules"], row["joules_certainty"], row["devices"], row["devices_with_joules"]) for row in runs} == {
        ("", "unmeasured", "3", "2")
    }


def test_of_many_annotations_some_are_drawn_and_the_picture_says_how_many_are_not(record: FieldRecord) -> None:
    start_s, end_s = record.span
    many = tuple((start_s + (end_s - start_s) * index / 5000, "", f"note {index}") for index in range(5000))
    picture = _over_the_day(replace(record, marks=many), "staleness", "Staleness", "versions", _staleness)
    assert picture is not None
    assert len(picture.figure.axes[0].collections[-1].get_segments()) == MOST_MARKS
    assert picture.caption.endswith("vertical lines: annotations (4800 more of them are only in the table)")
    matplotlib.pyplot.close(picture.figure)


def test_the_file_of_observations_is_read_as_it_is_by_other_programs(place: Path) -> None:
    file = place / "runs" / ".gateway" / "observations.sqlite"
    query = "SELECT device, sum(payload_bytes) AS bytes FROM {}transfers WHERE up GROUP BY device ORDER BY device"
    with closing(sqlite3.connect(file)) as db:
        found = pandas.read_sql(query.format(""), db)
    assert list(found.device) == ["pi-1", "pi-2", "pi-3"]
    with duckdb_on(file, "o") as duck:
        assert duck.execute(query.format("o.")).fetchall() == list(zip(found.device, found.bytes, strict=True))


def test_one_repetition_has_no_interval_and_no_observations_are_said(tmp_path: Path) -> None:
    field = recorded_field(tmp_path, ("fedavg",), 1, observed=False)
    record = read_record(field, None)
    assert "±" not in "".join(cell for line in overview(record, 0.5).lines for cell in line)
    assert main(["field", "report", "orchard", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "No device has sent observations" in page
    assert "no observations came from it" in page


def test_a_replay_of_what_was_simulated_comes_close(report: tuple[Path, str]) -> None:
    """The rows hold the simulator's own updates, so its replay must need about as long and send about as much."""
    out, _ = report
    with (out / "data" / "simulated.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["method"] for row in rows} == {"fedgmr", "fedavg"}
    for row in rows:
        assert 0.5 < float(row["payload bytes"].split(" ")[0]) < 2.0
        mean = float(row["updates per device: mean, least to most"].split(",")[0])
        assert 0.5 < mean < 2.0
    assert "Simulated by measured" in (out / "report.html").read_text()


def test_comparing_runs_counts_the_bytes_that_the_report_counts(
    place: Path, record: FieldRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = {run.step.run: run.step.start_s for run in record.runs}  # their folders were made just now
    monkeypatch.setattr("cli.runs.run_info", lambda path: replace(run_info(path), started_s=began[path.name]))
    target = default_target(record)
    assert main(["runs", "compare", *began, "--target", str(target), "--runs", str(place / "runs")]) == 0
    said = capsys.readouterr().out
    assert "MB: packets of models" in said
    for run in record.runs:
        found = reach(run.curve, target)
        (line,) = (line for line in said.splitlines() if run.step.run in line)
        if found is not None:
            assert f" {found.bytes / 1e6:.2f} " in line
        whole = float(line.rstrip(" │").rpartition("│")[2])  # from the making of its folder to its last word, so a little more
        assert whole == pytest.approx(run.bytes_in_all / 1e6, rel=0.03)
