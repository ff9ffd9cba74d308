"""Real runs by both engines: the same bytes, what fails stops no other, and nothing runs on after its parent."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import sys
import threading
from ipaddress import ip_address
from pathlib import Path

import msgspec
import psutil
import pytest

from cli.main import MISUSED, main
from regrow.errors import LocalError
from testbed.compare import Failure, in_processes, read_outcome, result_path, run_all, run_spec
from testbed.grid import by_seed, specs_of, variants_of
from testbed.inputs import inputs_digest
from testbed.outcome import Outcome, write_outcome
from testbed.ray_engine import on_ray
from tests.testbed.bars import spec, write_images
from tests.testbed.processes import until
from tests.testbed.test_comparison import run as finished

TINY = {"seconds": 20.0, "points": 2, "clients": 3, "settings": {"training.local_steps": 1}}


def runners(of: int) -> list[psutil.Process]:
    """The processes that a comparison has started for its runs."""
    try:
        return [child for child in psutil.Process(of).children() if any("spawn_main" in word for word in child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def test_a_comparison_runs_what_is_missing_and_a_broken_outcome_stops_no_other(task: Path, images: Path, tmp_path: Path) -> None:
    rows = specs_of(spec(images, **TINY), variants_of(["fedgmr", "fedasync"], {}, []), 2)
    specs = by_seed(rows)
    assert [(s.method, s.seed) for s in specs] == [("fedgmr", 1), ("fedasync", 1), ("fedgmr", 2), ("fedasync", 2)]
    for one in specs[:3]:
        run_spec(task, one, tmp_path)
    broken = result_path(tmp_path, task, specs[0])
    broken.write_text("{")
    with pytest.raises(LocalError, match="delete it"):
        read_outcome(broken)
    missing_data = msgspec.structs.replace(specs[0], data_folder=str(tmp_path / "none"))
    results = dict(run_all(task, [*specs, missing_data, specs[3]], tmp_path, in_processes(2)))
    assert {number for number, result in results.items() if isinstance(result, Outcome)} == {1, 2, 3, 5}
    assert results[3] == results[5]
    assert "delete it" in str(results[0])
    assert isinstance(results[4], Failure)
    assert "fedgmr seed 1 training.local_steps=1" in str(results[4])
    assert str(tmp_path / "none") in results[4].message


def test_outcomes_of_other_data_are_made_anew(
    task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_images(data)
    one = spec(data, method="fedasync", **TINY)

    def run() -> tuple[Outcome, bytes]:
        ((_, outcome),) = run_all(task, [one], out, in_processes(1))
        assert isinstance(outcome, Outcome)
        return outcome, result_path(out, task, one).read_bytes()

    first, text = run()
    assert len(first.inputs_digest) == 32
    old = msgspec.structs.replace(first, inputs_digest="", final_accuracy=0.125)  # written before there were digests
    write_outcome(result_path(out, task, one), old)
    assert run()[0] == old
    result_path(out, task, one).write_bytes(text)
    labels = data / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:8] + bytes(400), 1))
    assert not caplog.records
    second, _ = run()
    assert "the data has changed since; it is run again" in caplog.text
    assert (second.inputs_digest, second.points) != (first.inputs_digest, first.points)
    labels.unlink()
    assert run()[0] == second, "where the data is gone, what was finished stays"

    write_images(data)
    words = ["simulate", str(task), "--data-folder", str(data), "--method", "fedasync", "--clients", "3", "--seconds", "8", "--points", "1"]
    words += ["--set", "training.local_steps=1", "--out", str(out), "--resume"]
    assert main(words) == 0
    assert main(words) == 0
    assert "run again" not in capsys.readouterr().out
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:8] + bytes(400), 1))
    assert main(words) == 0
    assert "the data has changed since; it is run again" in capsys.readouterr().out


def test_recordings_and_attendances_count_as_data(images: Path, tmp_path: Path) -> None:
    for folder in ("links", "steps"):
        (tmp_path / folder).mkdir()
    files = [tmp_path / "links" / "a.csv", tmp_path / "steps" / "a.csv", tmp_path / "who.csv"]
    for file in files:
        file.write_text("1\n")
    one = spec(images, links=f"trace:{tmp_path / 'links'}", steps_trace=str(tmp_path / "steps"), attend=str(files[2]))
    digests = {inputs_digest(one), inputs_digest(spec(images))}
    for file in files:
        file.write_text("2\n")
        digests.add(inputs_digest(one))
    assert len(digests) == 5
    assert "" not in digests
    files[2].unlink()
    assert inputs_digest(one) == ""


def test_a_task_that_is_edited_meanwhile_changes_nothing(task: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    shutil.copytree(task, folder)
    specs = [spec(images, method="fedasync", seed=seed, **TINY) for seed in (1, 2)]
    for one in specs:
        run_spec(folder, one, _made(tmp_path / "whole"))
    paths = [result_path(tmp_path / "out", folder, one) for one in specs]
    results = run_all(folder, specs, tmp_path / "out", in_processes(1))
    first = next(results)
    text = (folder / "task.toml").read_text()
    (folder / "task.toml").write_text(text.replace("learning_rate = 0.05", "learning_rate = 0.5"))
    found = dict([first, *results])
    assert all(isinstance(result, Outcome) for result in found.values()), found
    for path in paths:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert result_path(tmp_path / "out", folder, specs[0]) != paths[0]

    (folder / "task.toml").write_text(text)
    specs = [spec(images, method="fedavg", seed=seed, **TINY) for seed in (1, 2)]
    results = run_all(folder, specs, tmp_path / "out", in_processes(1))
    next(results)
    (folder / "build" / "build.json").write_text("{}")
    assert "built anew" in str(next(result for _, result in results))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [({"points": []}, "points"), ({"final_accuracy": 7.5}, "final_accuracy"), ({"per_class": []}, "per_class"), ({"seed": 1}, "spec")],
)
def test_an_outcome_that_was_edited_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "a.json"
    write_outcome(path, finished(1, 0.5))
    assert read_outcome(path) == finished(1, 0.5)
    content = msgspec.json.decode(path.read_bytes())
    if "seed" in change:
        content["spec"]["sede"] = 1
    path.write_bytes(msgspec.json.encode(content | change))
    with pytest.raises(LocalError, match=rf"a\.json: .*{said}.*; delete it"):
        read_outcome(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LocalError, match="delete it"):
        read_outcome(path)


def test_a_process_that_is_killed_takes_no_other_with_it(task: Path, images: Path, tmp_path: Path) -> None:
    endless, short = (spec(images, **{**TINY, "seconds": seconds, "points": 1}) for seconds in (10.0**6, 20.0))

    def kill() -> None:
        until(lambda: runners(os.getpid()), "a run in its process")
        runners(os.getpid())[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    results = dict(run_all(task, [endless, short], tmp_path, in_processes(1)))
    killer.join()
    assert "ended by signal 9" in str(results[0])
    assert isinstance(results[1], Outcome)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_runs_end_with_their_comparison(task: Path, images: Path, tmp_path: Path, how: signal.Signals, status: int) -> None:
    words = [sys.executable, "-m", "cli.main", "compare", str(task), "--data-folder", str(images), "--clients", "3", "--methods", "fedgmr"]
    words += ["--seconds", "1000000", "--points", "1", "--seeds", "2", "--processes", "2", "--out", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as comparison:
        until(lambda: len(runners(comparison.pid)) == 2, "two runs in processes")
        children = runners(comparison.pid)
        comparison.send_signal(how)
        assert comparison.wait(30) == status
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_ray_gives_the_same_bytes(task: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    specs = [spec(Path(images.name), method=method, **TINY) for method in ("fedgmr", "fedasync")]
    absent = spec(Path("none"), method="fedgmr", **TINY)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for one in specs:
        run_spec(task, one, here)
    listening: set[str] = set()
    results = {}
    for number, result in run_all(task, [*specs, absent], there, on_ray(2, None)):
        results[number] = result
        family = [process for process in psutil.process_iter() if _is_of_ray(process)]
        sockets = [at for process in family for at in process.net_connections("inet")]
        listening |= {at.laddr.ip.removeprefix("::ffff:") for at in sockets if at.status == psutil.CONN_LISTEN}
    assert str(results[2]).startswith("fedgmr seed 1")
    assert "on node " in str(results[2])
    assert str(images.parent / "none") in str(results[2])
    for one in specs:
        assert result_path(there, task, one).read_bytes() == result_path(here, task, one).read_bytes()
    assert listening
    assert all(ip_address(ip).is_loopback for ip in listening), "reachable from this machine only"
    assert not [process for process in psutil.process_iter() if _is_of_ray(process)]


def _is_of_ray(process: psutil.Process) -> bool:
    try:
        return "ray" in process.name() and os.getpid() in {parent.pid for parent in process.parents()}
    except psutil.NoSuchProcess:
        return False


def test_the_command(task: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = [str(task), "--data-folder", str(images), "--clients", "3", "--seconds", "30", "--points", "2"]
    scenario += ["--set", "training.local_steps=2", "--out", str(tmp_path), "--processes", "2"]
    methods = ["--methods", "fedgmr,fedasync", "fedgmr", "--seeds", "1"]
    tune = ["--tune", "training.learning_rate=0.02,0.1", "--tune-seconds", "15"]
    assert main(["compare", *scenario, *methods, *tune]) == 0
    said = capsys.readouterr().out
    assert "tuning: 4 runs of 15 virtual seconds with seed 0" in said
    assert "4/4: " in said
    summary = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert set(summary["methods"]) == {"fedgmr", "fedasync"}
    chosen = summary["tuning"]["fedasync"]["chosen"]["training.learning_rate"]
    tried = {each["settings"]["training.learning_rate"]: each["validation_accuracy"] for each in summary["tuning"]["fedasync"]["tried"]}
    assert tried[chosen] == max(tried.values())
    outcomes = [msgspec.json.decode(file.read_bytes(), type=Outcome) for file in tmp_path.glob("fedasync-*.json")]
    assert [(one.spec.seed, one.spec.settings["training.learning_rate"]) for one in outcomes] == [(1, chosen)]

    grid = ["--methods", "fedasync", "--grid", "wire.up='float32','int8'", "--set-for", "fedasync:method.mixing=0.5", "--seeds", "1"]
    assert main(["compare", *scenario, *grid]) == 0
    summary = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert set(summary["methods"]) == {"fedasync[up=float32]", "fedasync[up=int8]"}
    assert summary["reference"] == summary["baseline"] == "fedasync[up=float32]"
    capsys.readouterr()

    exact = next(file for file in tmp_path.glob("fedasync-*.json") if "float32" in file.read_text())
    exact.write_text("{")
    assert main(["compare", *scenario, *grid]) == 1
    assert "regrow: failed: fedasync seed 1" in capsys.readouterr().err
    summary = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert list(summary["methods"]) == ["fedasync[up=int8]"]
    assert len(summary["failed"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", ","], "names none"),
        (["--methods", "fedsgd"], "fedsgd"),
        (["--methods", "fedgmr", "--target", "2"], "at most 1"),
        (["--methods", "fedavg", "--reference", "fedbuff"], "not among"),
        (["--methods", "fedavg", "--ray-address", "auto"], "--engine ray"),
        (["--methods", "fedavg", "--tune-seconds", "5"], "--tune-seconds is for --tune"),
        (["--methods", "fedavg", "--tune-base"], "--tune-base is for --tune"),
        (["--methods", "fedavg", "--grid", "method.name='fedgmr'"], "--set method.name"),
        (["--methods", "fedavg-sync"], "the same as 'fedavg'"),
        (["--methods", "fedavg", "--grid", "training.local_stepz=1"], "local_stepz"),
        (["--methods", "fedavg", "--tune", "training.local_steps=1,1"], "--tune"),
        (["--methods", "fedavg", "--set-for", "fedgmr:training.local_steps=1"], "--set-for fedgmr"),
    ],
)
def test_what_the_command_refuses(task: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(task), "--out", str(tmp_path), *words]) == MISUSED
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
