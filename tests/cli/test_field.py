"""`regrow field plan` and what is typed while a field run goes on."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from broker_server.field.plan import read_plan
from broker_server.field.progress import field_of, open_field
from broker_server.runs import create_run, load_task, newest_unfinished
from broker_server.store import Store
from cli.field import _settings_of, typed_annotations
from cli.main import MISUSED, main
from regrow.task import parse_task
from tests.cli.made_runs import make_run
from tests.testbed.processes import until


@pytest.fixture
def task(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path / "task"


def test_a_plan_says_its_order_and_its_time_and_can_be_checked_again(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "orchard.toml"
    words = ["field", "plan", str(file), "--task", str(task), "--devices", "pi-1,pi-2", "--repetitions", "2", "--run-s", "600"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "6 runs with 2 devices take 1 h 8 min" in said
    for number, block in enumerate(read_plan(file).blocks, 1):
        assert f"block {number}: {', '.join(block)}" in said
    assert main(["field", "plan", str(file)]) == 0
    assert capsys.readouterr().out == said
    assert main(words) == MISUSED
    assert "exists already" in capsys.readouterr().err


def test_a_field_run_that_was_begun_keeps_its_plan(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "orchard.toml"
    assert main(["field", "plan", str(file), "--task", str(task), "--devices", "pi-1"]) == 0
    with open_field(tmp_path / "runs", read_plan(file), file):
        assert main(["field", "run", str(file), "--runs", str(tmp_path / "runs")]) == 1
        assert "in use" in capsys.readouterr().err
    file.write_text(file.read_text().replace("run_s = 600", "run_s = 700"))
    assert main(["field", "run", str(file), "--runs", str(tmp_path / "runs")]) == MISUSED
    assert "another plan" in capsys.readouterr().err
    assert main(["field", "report", "orchard", "--runs", str(tmp_path / "runs")]) == 1
    assert "no repetition has been run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run-s", "1e308"], "too long: 2592000 s (30 days) at most"),
        (["--baseline-s", "1e7"], "too long"),
        (["--lead-s", "1e300"], "0.5 to 3600"),
        (["--repetitions", "1000000"], "1000 at most"),
        (["--sample-hz", "1e9"], "above 100"),
    ],
)
def test_a_plan_beyond_all_bounds_is_refused_at_once(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "orchard.toml"
    with pytest.raises(SystemExit):
        main(["field", "plan", str(file), "--task", str(tmp_path), "--devices", "pi-1", *words])
    error = capsys.readouterr().err
    assert words[0] in error
    assert said in error
    assert not file.exists()


def test_a_run_bears_the_method_name_of_its_plan(task: Path, tmp_path: Path) -> None:
    file = tmp_path / "orchard.toml"
    assert main(["field", "plan", str(file), "--task", str(task), "--devices", "pi-1", "--methods", "fedgmr-fixed,fiarse+restore"]) == 0
    with open_field(tmp_path / "runs", read_plan(file), file) as field:
        fixed, restored = (parse_task(_settings_of(field, method, 1)) for method in field.plan.methods)
    assert (fixed.method.name, fixed.restoration.trigger, fixed.method.importance) == ("fedgmr-fixed", "fixed", "wg")
    assert (restored.method.name, restored.restoration.trigger, restored.method.importance) == ("fiarse+restore", "plateau", "w")


def test_serving_a_task_leaves_the_runs_of_a_field_run_alone(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = tmp_path / "orchard.toml", tmp_path / "runs"
    assert main(["field", "plan", str(file), "--task", str(task), "--devices", "pi-1", "--methods", "fedavg", "--repetitions", "2"]) == 0
    with open_field(runs, read_plan(file), file):
        pass
    own = runs / "one"
    fields = [create_run(runs, load_task(task), name) for name in ("orchard-1-fedavg", "orchard-2-fedavg-2")]
    other = create_run(runs, load_task(task), "orchard-1-fedavg-again")
    assert [field_of(run) for run in (own, *fields, other)] == [None, "orchard", "orchard", None]
    shutil.rmtree(other)
    assert newest_unfinished(runs, "digits") == own
    capsys.readouterr()
    with Store.open(fields[1]):  # in use, so nothing is served
        assert main(["serve", str(fields[1]), "--runs", str(runs)]) == 1
    assert "orchard-2-fedavg-2 was made by `regrow field run` for orchard" in capsys.readouterr().out


def test_an_annotation_is_words_of_a_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / ".gateway"
    home.mkdir()
    words = ["field", "annotate", "--runs", str(tmp_path)]
    assert main([*words, " ", "\n"]) == MISUSED
    assert "without words" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "long ago", "--ago", "1e12"])
    assert "30 days" in capsys.readouterr().err
    assert kept(home) == []
    assert main([*words, "moved", "behind  the wall", "--ago", "60"]) == 0
    at_s = time.time() - 60
    assert "moved behind the wall" in (said := capsys.readouterr().out)
    assert time.strftime("noted for %Y-%m-%d %H:", time.localtime(at_s)) in said or at_s % 3600 < 60
    assert kept(home) == ["moved behind the wall"]


def kept(home: Path) -> list[str]:
    with suppress(sqlite3.Error), closing(sqlite3.connect(home / "observations.sqlite")) as db:
        return [row[0] for row in db.execute("SELECT text FROM annotations ORDER BY rowid")]
    return []


def test_every_line_that_is_typed_is_kept_and_nobody_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", stdin)
        with typed_annotations(tmp_path):
            keyboard.write(b"moved behind\n\nthe w")
            until(lambda: kept(tmp_path) == ["moved behind"], lambda: str(kept(tmp_path)))
            keyboard.write("all\nit rains \u2614\n".encode())
            until(lambda: len(kept(tmp_path)) == 3, lambda: str(kept(tmp_path)))
        assert "annotations" not in {thread.name for thread in threading.enumerate()}
    assert kept(tmp_path) == ["moved behind", "the wall", "it rains \u2614"]
