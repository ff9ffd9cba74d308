"""Interrupted runs: however they end, the resumed one gives the outcome of an uninterrupted one, to the bit, and trains nothing twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from broker_server.runs import load_task
from cli.main import main
from testbed.compare import run_spec
from testbed.outcome import Point, Spec, write_outcome
from testbed.simulate import Simulation, open_journal, task_of
from testbed.waves import Jobs, Result
from tests.testbed.bars import spec

BRISK = {"links": "2000000,2000000,500000,500000,100000", "step_s": 1.0, "seconds": 24.0}


class Counted(Simulation):
    """Counts what is really trained and scored."""

    trained = 0
    scored = 0

    def _train(self, jobs: Jobs) -> Sequence[Result]:
        Counted.trained += len(jobs)
        return super()._train(jobs)


class Stopped(Exception):
    """What Ctrl-C does, at a place of our choice."""


def counted_run(task: Path, spec: Spec, path: Path, *, stop_at: int | None = None, limit_bytes: int = 10**9) -> int:
    """Run with a journal, or until the point number `stop_at`; returns how many jobs were trained."""
    folder = load_task(task)
    journal = open_journal(path, limit_bytes, resume=True)
    before = Counted.trained
    points: list[Point] = []

    def on_point(point: Point) -> None:
        points.append(point)
        if len(points) == stop_at:
            raise Stopped

    simulation = Counted(folder, task_of(folder, {"name": "bars"}, spec), spec, journal)
    try:
        outcome = simulation.run(on_point)
    except Stopped:
        return Counted.trained - before
    write_outcome(path, outcome, journal)
    return Counted.trained - before


@pytest.mark.parametrize("method", ["fedgmr", "fedasync"])
def test_an_interrupted_run_goes_on_to_the_same_outcome(task: Path, images: Path, tmp_path: Path, method: str) -> None:
    run = spec(images, method=method, points=6, **BRISK)
    whole = counted_run(task, run, tmp_path / "whole.json")
    assert not (tmp_path / "whole.journal").exists()
    path = tmp_path / "parts.json"
    parts = [counted_run(task, run, path, stop_at=stop_at) for stop_at in (2, 4, 4)]
    assert parts[0] > 0 < parts[1]
    assert parts[2] == 0, "everything up to there was in the journal"
    torn = path.with_suffix(".journal")
    torn.write_bytes(torn.read_bytes()[:-7])
    parts.append(counted_run(task, run, path))
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert whole <= sum(parts) <= whole + 1, "at most what was torn is trained again"
    assert not torn.exists()


def test_a_small_journal_and_one_of_other_data_give_the_same_outcome(
    task: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = spec(images, method="fedasync", **(BRISK | {"seconds": 12.0}))
    path = tmp_path / "a.json"
    small = 3 * 4 * 52_266 + 10_000
    stopped = counted_run(task, run, path, stop_at=2, limit_bytes=small)
    assert 0 < path.with_suffix(".journal").stat().st_size <= small
    assert "grows no further" in caplog.text
    again = counted_run(task, run, path, limit_bytes=small)
    whole = counted_run(task, run, tmp_path / "whole.json", limit_bytes=0)
    assert whole - stopped < again < whole
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    other = msgspec.structs.replace(run, seed=2)
    counted_run(task, run, path, stop_at=2)
    counted_run(task, other, path)  # in the place of the first
    assert "do not fit" in caplog.text or "starting over" in caplog.text
    counted_run(task, other, tmp_path / "other.json", limit_bytes=0)
    assert path.read_bytes() == (tmp_path / "other.json").read_bytes()


def quick(task: Path, images: Path) -> list[str]:
    """Options of a run of a few jobs."""
    few = ["--clients", "3", "--seconds", "8", "--points", "2", "--links", "4000000", "--step-s", "0.5", "--set", "training.local_steps=2"]
    return [str(task), "--data-folder", str(images), *few]


KILLED = """
import os, signal, sys
import cli.simulate
from cli.main import main
class Mortal(cli.simulate.Simulation):
    def run(self, on_point):
        def fatal(point):
            on_point(point)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(fatal)
cli.simulate.Simulation = Mortal
main(sys.argv[1:])
"""


def test_a_killed_command_goes_on_with_resume(task: Path, images: Path, tmp_path: Path) -> None:
    scenario = [*quick(task, images), "--method", "fedbuff"]
    command = ["simulate", *scenario, "--out", str(tmp_path / "killed")]
    ended = subprocess.run([sys.executable, "-c", KILLED, *command], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    (journal,) = (tmp_path / "killed").glob("*.journal")
    assert journal.stat().st_size > 4 * 52_266
    assert main([*command, "--resume"]) == 0
    assert not journal.exists()
    assert main(["simulate", *scenario, "--out", str(tmp_path / "whole")]) == 0
    (resumed,), (whole,) = (tmp_path / "killed").glob("*.json"), (tmp_path / "whole").glob("*.json")
    assert resumed.read_bytes() == whole.read_bytes()


def test_ctrl_c_says_how_to_go_on(
    task: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["simulate", *quick(task, images), "--out", str(out)]
    train = Simulation._train
    calls: list[str] = []

    def interrupted(self: Simulation, jobs: Jobs) -> Sequence[Result]:
        calls.extend(name for name, _ in jobs)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(self, jobs)

    monkeypatch.setattr(Simulation, "_train", interrupted)
    monkeypatch.setattr(sys, "argv", ["regrow", *command])
    assert main(command) == 130
    said = capsys.readouterr().out
    assert f"to go on: regrow {' '.join(command)} --resume" in said
    assert main([*command, "--resume"]) == 0
    assert calls[4] == calls[5], "the first job that is trained again is the one that was interrupted"
    assert not list(out.glob("*.part.json"))
    assert "links 4000000" in capsys.readouterr().out


def test_ctrl_c_before_the_first_point_promises_no_curve(
    task: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_self: Simulation, _jobs: Jobs) -> Sequence[Result]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulation, "_train", interrupted)
    assert main(["simulate", *quick(task, images), "--out", str(tmp_path)]) == 130
    assert "before the first point of the curve" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part.json"))


def test_a_comparison_goes_on_inside_a_run(task: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = spec(images, method="fedbuff", **(BRISK | {"seconds": 8.0}))
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = run_spec(task, run, tmp_path / "whole")
    train = Simulation._train
    calls: list[str] = []

    def interrupted(self: Simulation, jobs: Jobs) -> Sequence[Result]:
        calls.extend(name for name, _ in jobs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, jobs)

    monkeypatch.setattr(Simulation, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_spec(task, run, tmp_path / "parts", 10**8)
    assert len(list((tmp_path / "parts").glob("*.journal"))) == 1
    assert run_spec(task, run, tmp_path / "parts", 10**8).read_bytes() == whole.read_bytes()
    assert calls[3] == calls[4]
    assert not list((tmp_path / "parts").glob("*.journal"))
