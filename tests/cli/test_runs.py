"""`regrow runs`: the list, one run, several, their tables, and their end."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas
import pytest
from pyarrow import parquet

from broker_server.run_files import take_lock
from broker_server.run_record import course_of, facts_of, why_unscored
from broker_server.runs import rollback, run_info
from cli.main import FAILED, MISUSED, main
from regrow.errors import LocalError
from regrow.task import parse_task
from tests.cli.made_runs import make_run
from tests.readers import duckdb_on
from tests.testbed.recorded import recorded_field


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with one run of two methods each, and what devices observed; not to be changed."""
    folder = tmp_path_factory.mktemp("place")
    recorded_field(folder, ("fedgmr", "fedavg"), 1)
    return folder / "runs"


def runs(place: Path, *words: object) -> int:
    return main(["runs", *map(str, words), "--runs", str(place)])


def names(place: Path) -> list[str]:
    return sorted(log.parent.name for log in place.glob("*/log.sqlite"))


def test_the_list_calls_a_score_what_it_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs(place) == 0
    said = capsys.readouterr().out
    last = [point.score for point in course_of(place / names(place)[0]).points if point.score is not None][-1]
    assert f"accuracy {last:.3f}" in said
    assert "20 s have passed" in said
    run = make_run(tmp_path)
    task = run / "task" / "task.toml"
    task.write_text(task.read_text().replace("[training]", '[training]\nloss = "huber"'))
    with closing(sqlite3.connect(run / "log.sqlite")) as db, db:
        fields = json.dumps({"global_score": 0.5})
        db.execute("INSERT INTO metrics (wall_time, kind, fields) VALUES (1.0, 'aggregated', ?)", (fields,))
    assert run_info(run).score_name == "R^2"
    assert main(["runs", "--runs", str(tmp_path / "runs")]) == 0
    assert "R^2 0.500" in capsys.readouterr().out


def test_the_list_reads_no_payload(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = facts_of(run)
    with closing(sqlite3.connect(run / "log.sqlite")) as db, db:
        db.execute("UPDATE log SET payload = x'00'")  # whoever decoded them would say so
    assert facts_of(run) == before
    assert (before.version, before.updates, before.devices) == (1, 1, {"d1"})


def test_a_score_from_before_a_rollback_is_not_that_of_the_run(tmp_path: Path) -> None:
    field = recorded_field(tmp_path, ("fedavg",), 1, observed=False)
    run = tmp_path / "runs" / field.done()[1].run
    assert run_info(run).score is not None
    from broker_server.runs import load_task, recover
    from broker_server.store import Store
    from regrow import checkpoint

    with Store.open(run) as store:
        ledger = recover(store, load_task(run / "task"))
        store.save_snapshot(store.last_id, *checkpoint.dump(ledger))
    rollback(run, ledger.version)
    info = run_info(run)
    assert (info.score, info.finished, info.version) == (None, "", ledger.version + 1)


def test_one_run_in_detail(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = (each for each in names(place) if "fedgmr" in each)
    assert runs(place, "show", name) == 0
    said, course = capsys.readouterr().out, course_of(place / name)
    for device, seen in course.devices.items():
        (line,) = (each for each in said.splitlines() if device in each)
        assert f" {len(seen.updates)} " in line
    for word in ("fedgmr", "seed", "20 s have passed", "stops at", "on disk"):
        assert word in said


def test_several_runs_side_by_side_and_their_picture(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "both.png"
    assert runs(place, "compare", *names(place), "--target", 0.2, "--out", picture) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names(place))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert runs(place, "compare", names(place)[0]) == MISUSED
    assert runs(place, "compare", *names(place), "--out", tmp_path / "both.txt") == MISUSED


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_run_as_tables(kind: str, place: Path, tmp_path: Path) -> None:
    name = names(place)[0]
    assert runs(place, "export", name, "--out", tmp_path, "--format", kind) == 0
    updates = len([update for device in course_of(place / name).devices.values() for update in device.updates])
    assert updates
    if kind == "csv":
        with (tmp_path / "update.csv").open() as lines:
            found = list(csv.DictReader(lines))
    elif kind == "json":
        found = json.loads((tmp_path / "update.json").read_text())
    else:
        found = parquet.read_table(tmp_path / "update.parquet").to_pylist()
    assert len(found) == updates
    assert {"device", "staleness", "bytes", "elapsed_s"} <= found[0].keys()
    assert {f"{table}.{kind}" for table in ("run", "curve", "telemetry", "observed-transfers")} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert runs(place, "export", name, "--format", "xlsx") == MISUSED


def test_delete_says_what_goes_asks_and_refuses_what_is_in_use(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(place, tmp_path / "runs"))
    first, second = names(own)
    assert runs(own, "delete", first) == MISUSED
    said = capsys.readouterr()
    assert "it counts in the field run orchard" in said.out
    assert "--yes" in said.err
    with take_lock(own / first):
        assert runs(own, "delete", second, first, "--yes") == FAILED
        assert "in use" in capsys.readouterr().err
    assert names(own) == [first, second]
    shutil.copytree(own / first, own / f".{first}.deleted")  # of a deletion that was cut off
    capsys.readouterr()
    assert runs(own) == 0
    assert "deleted" not in capsys.readouterr().out
    assert runs(own, "delete", first, "--yes") == 0
    assert names(own) == [second]
    assert not list(own.glob(f".{first}*"))
    assert runs(own, "show", first) == MISUSED


def test_a_report_that_lacks_a_deleted_run_says_so(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(place, tmp_path / "runs"))
    assert runs(own, "delete", names(own)[0], "--yes") == 0
    assert main(["field", "report", "orchard", "--runs", str(own), "--out", str(tmp_path / "report")]) == 0
    assert "1 runs" in capsys.readouterr().out
    assert "was deleted" in (tmp_path / "report" / "report.html").read_text()


def test_a_log_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "log.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(LocalError):
        facts_of(run)


def test_the_log_is_read_as_it_is_by_other_programs(place: Path) -> None:
    run = place / names(place)[0]
    wanted = {name: len(device.updates) for name, device in course_of(run).devices.items()}
    query = "SELECT fields->>'device' AS device, count(*) AS updates FROM metrics WHERE kind = 'update' GROUP BY 1"
    with closing(sqlite3.connect(f"{(run / 'log.sqlite').as_uri()}?mode=ro", uri=True)) as db:
        assert dict(db.execute(query)) == wanted
        found = pandas.read_sql(query, db)
    assert dict(zip(found.device, found.updates, strict=True)) == wanted
    with duckdb_on(run / "log.sqlite", "run") as duck:
        assert dict(duck.execute(query.replace("FROM metrics", "FROM run.metrics")).fetchall()) == wanted


def test_a_run_that_ends_without_a_score_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    reported, held = parse_task('name = "t"'), parse_task('name = "t"\n[evaluation]\ndata = "test.npz"')
    assert why_unscored(run, reported, 0) == ""
    assert "1 aggregation, and every 5 of them" in why_unscored(run, held, 1)
    assert "no evaluation on test.npz ended" in why_unscored(run, held, 7)
    assert "in 7 aggregations no device reported one" in why_unscored(run, reported, 7)
    with closing(sqlite3.connect(run / "log.sqlite")) as db, db:
        db.execute("INSERT INTO metrics (wall_time, kind, fields) VALUES (1.0, 'aggregated', ?)", (json.dumps({"global_score": 0.5}),))
    assert why_unscored(run, held, 7) == ""
