"""`regrow field plan` and what is typed while a field run goes on."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from broker_server.field.plan import read_plan
from cli.field import typed_annotations
from cli.main import MISUSED, main
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
    from broker_server.field.progress import open_field

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
