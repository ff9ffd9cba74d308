"""What a page makes of runs that are over: bytes as counters grew, joules as journals have them, and nothing where nothing is known."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from broker_server.observations import FILE, annotate
from broker_server.page import energy, past
from broker_server.page.past import POINTS, Runs, Spent, device_history, last_state, series_of, spent_by_device
from broker_server.store import Store
from regrow import records
from regrow.errors import LocalError
from regrow.observations import PhaseSeen, PowerSeen
from regrow.records import to_record
from tests.broker_server.page_rig import make_run


def beat(who: str, up: int, down: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "telemetry", {"device": who, "bytes_up": up, "bytes_down": down, "uplink_bps": 8e5, "phase": "training", **more}


def made(version: int, **more: Any) -> tuple[str, dict[str, Any]]:
    scores = {"0.5": 0.4, "1.0": 0.5 + version / 10000}
    return "aggregated", {
        "version": version,
        "elapsed_s": 2.0 * version,
        "mean_density": 0.5,
        "global_score": 0.5,
        "scores": scores,
        **more,
    }


def write(run: Path, rows: list[tuple[str, dict[str, Any]]], first_s: float = 1000.0) -> None:
    clock = iter(range(10**9))
    with Store.open(run, wall_clock=lambda: first_s + next(clock)) as store:
        for kind, fields in rows:
            store.metric(kind, fields)
        store.append([])


def test_bytes_are_what_counters_grew_by_and_a_counter_may_begin_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [beat("a", 1000, 50), beat("b", 0, 0), made(1), beat("a", 1500, 60), beat("b", 10, 0), made(2), beat("a", 200, 5), made(3)]
    write(run, rows)
    assert spent_by_device(run) == {"a": Spent(700, 15, 200, 5), "b": Spent(10, 0, 10, 0)}
    series = series_of(run, tmp_path)
    assert series["sent_bytes"] == [0, 510, 710]
    assert series["received_bytes"] == [0, 10, 15]
    spent = Spent()
    for _, fields in rows:
        spent = spent.after(fields["bytes_up"], fields["bytes_down"]) if fields.get("device") == "a" else spent
    assert spent == spent_by_device(run)["a"]  # live as afterwards


def test_the_version_of_a_run_whose_last_metrics_a_crash_took_is_that_of_its_log(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run, [made(1)])
    kept = Runs(run.parent).all()[0]["version"]
    with Store.open(run) as store:
        store.append([to_record(records.Aggregated(version=kept + 1, elapsed_s=3.0))])
    assert series_of(run, tmp_path)["version"] == [1]
    assert series_of(run, tmp_path)["newest_version"] == Runs(run.parent).all()[0]["version"] == kept + 1


def test_long_runs_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run, [made(version) for version in range(1, 5 * POINTS + 8)])
    series = series_of(run, tmp_path)
    assert POINTS <= len(series["version"]) <= POINTS + 2
    assert series["version"][-1] == 5 * POINTS + 7
    assert series["version"] == sorted(series["version"])
    assert len(series["levels"]["1"]) == len(series["sent_bytes"]) == len(series["version"])


def test_levels_are_told_by_what_they_gave() -> None:
    found = past.contributions((0.1, 0.2, 0.5, 1.0), {0: (3, 300), 3: (1, 50)}, {0.1: 0.5, 0.5: 0.7, 1.0: 0.65})
    assert [(level["density"], level["updates"], level["score"]) for level in found] == [(0.1, 3, 0.5), (0.5, 0, 0.7), (1.0, 1, 0.65)]
    assert [level["gain"] for level in found] == [None, pytest.approx(0.2), pytest.approx(-0.05)]


def journal(home: Path, *rows: tuple[str, Any]) -> None:
    """As broker_server.observations has it: the columns are a row's fields, with device before and received_s behind."""
    home.mkdir(parents=True, exist_ok=True)
    annotate(home, "this makes the file", 0.0)
    with closing(sqlite3.connect(home / FILE)) as db:
        for who, row in rows:
            values = (who, *(getattr(row, name) for name in row.__struct_fields__), 0.0)
            table = "phases" if isinstance(row, PhaseSeen) else "power"
            db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)
        db.commit()


def test_joules_come_from_the_journal_and_unknown_is_not_zero(tmp_path: Path) -> None:
    run, home = make_run(tmp_path), tmp_path / "runs" / ".gateway"
    assert series_of(run, home)["energy"]["joules"] is None
    write(run, [made(1), made(2), made(3)])  # at 1000, 1001, 1002 s
    journal(
        home,
        ("a", PhaseSeen(990.0, 10.5, "train", 20.0, "rapl", "measured", run="one")),
        ("a", PhaseSeen(1000.6, 0.9, "transmit", 5.0, "rapl", "measured", run="one")),
        ("b", PhaseSeen(999.0, 1.5, "train", 7.0, "model", "modelled", run="one")),
        ("b", PhaseSeen(1000.0, 4.0, "idle", None, "none", "unmeasured", run="one")),
        ("b", PhaseSeen(1000.0, 4.0, "train", 1000.0, "rapl", "measured", run="other")),
        ("a", PowerSeen(1000.0, 1.0, 3.5, "rapl", "measured", 50.0)),
        ("a", PowerSeen(1001.0, 1.0, None, "rapl", "unmeasured", 51.0)),
    )
    series = series_of(run, home)
    assert series["energy"] == {
        "joules": 32.0,
        "phases": {"train": 27.0, "transmit": 5.0},
        "certainty": "measured, modelled",
        "unmeasured_s": 4.0,
    }
    assert series["joules"] == [None, 27.0, 32.0]
    history = device_history(run, home, "a")
    assert history["power"] == [(1000.0, 3.5, 50.0), (1001.0, None, 51.0)]
    assert history["energy"]["joules"] == 25.0
    assert device_history(run, home, "b")["energy"]["unmeasured_s"] == 4.0


def test_heartbeats_tell_watts_where_no_journal_does(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(
        run, [beat("a", 0, 0, watts=3.0, temperature_c=50.0), beat("a", 0, 0, watts=None, temperature_c=None), beat("b", 0, 0, watts=9.0)]
    )
    assert device_history(run, tmp_path, "a")["power"] == [(1000.0, 3.0, 50.0)]


def test_a_journal_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to look at" * 100)
    assert energy.spent_on(tmp_path, "one").joules is None
    assert energy.power_of(tmp_path, "a") == []
    assert energy.joules_at(tmp_path, "one", [1.0]) == [None]


def test_a_run_without_its_gateway_is_as_its_store_says(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    update = {"device": "a", "version": 1, "staleness": 2, "level": 1, "loss": 0.5, "examples": 20, "seconds": 1.0, "bytes": 100}
    write(
        run,
        [("joined", {"device": "a", "density": 0.2, "uplink_bps": 1e5, "bound_by": "link"}), beat("a", 5, 5), ("update", update), made(1)],
    )
    state = last_state(run)
    row = state["devices"]["a"]
    assert (row["density"], row["updates"], row["phase"], row["online"]) == (0.2, 1, "training", False)
    assert state["run"]["mean_density"] == 0.5
    assert state["events"][0]["text"].startswith("a joined at 100000 bit/s")


def test_a_run_that_cannot_be_read_is_a_line_and_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "log.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    (line,) = Runs(tmp_path / "runs").all()
    assert line["finished"].startswith("unreadable: ")
    with pytest.raises(LocalError, match=r"log\.sqlite"):
        series_of(run, tmp_path)
    assert Runs(tmp_path / "nowhere").all() == []
    assert Runs(tmp_path / "runs").path("two") is None
