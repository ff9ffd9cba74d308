"""What the options of a simulated run mean: links, latency, speed, presence; and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from broker_server.runs import load_task
from cli.main import FAILED, MISUSED, main
from regrow.errors import LocalError
from regrow.machine import Train
from testbed.conditions import Attendance, attendances, nightly
from testbed.links import Constant, Latency, Trace
from testbed.outcome import Spec
from testbed.scenario import latencies, speeds, spread
from testbed.simulate import Simulation, links_of, task_of
from tests.testbed.bars import outcome_of, spec


def test_options_that_say_nothing_are_left_out_of_a_specification() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(Spec()))
    fields = "method settings seed data data_folder split clients links outages step_s slowdown seconds points trainer"
    assert list(encoded) == fields.split()
    fuller = Spec(latency=(0.1, 0.0), slowdown=(1.0, 4.0), step_by_density=((0.5, 0.6),), attend="nightly:22-6", memory=(64, 512))
    assert msgspec.json.decode(msgspec.json.encode(fuller), type=Spec) == fuller


def test_rates_and_traces_of_both_directions(tmp_path: Path) -> None:
    both = links_of(Spec(clients=2, links="8000/4000,1000"), 1000)
    assert both == [(Constant(8000.0), Constant(4000.0)), (Constant(1000.0), Constant(4000.0))]
    for name, rate in (("bus.up", 1000), ("bus.down", 5000), ("attic", 300)):
        (tmp_path / f"{name}.csv").write_text(f"0,{rate}\n10,{rate}\n")
    (attic, again), (up, down) = links_of(Spec(clients=2, links=f"trace:{tmp_path}"), 1000)
    assert isinstance(up, Trace)
    assert isinstance(down, Trace)
    assert isinstance(attic, Trace)
    assert attic == again
    assert (attic.bps[0], up.bps[0], down.bps[0]) == (300.0, 1000.0, 5000.0)
    (tmp_path / "bus.down.csv").unlink()
    with pytest.raises(LocalError, match=r"bus\.up\.csv: give bus\.csv for both"):
        links_of(Spec(links=f"trace:{tmp_path}"), 1000)
    for wrong in ("8000/", "/8000", "8000/fast", "8000/0", "8000/1/2", "-1", "inf", "8000,,"):
        with pytest.raises(LocalError, match="links"):
            links_of(Spec(links=wrong), 1000)


def test_latency_and_speed_of_every_device(tmp_path: Path) -> None:
    assert spread([1.0, 1.0, 4.0], 6) == [1.0, 1.0, 1.0, 1.0, 4.0, 4.0]
    assert latencies(None, 2, 1) == [None, None]
    first, second = latencies((0.1, 0.05), 2, 1)
    assert isinstance(first, Latency)
    assert isinstance(second, Latency)
    assert first.at_s(3.0) != second.at_s(3.0) > 0.1
    (tmp_path / "a.csv").write_text("seconds_per_step\n0.5\n1.5\n")
    made = speeds(["x", "y"], 1, step_s=9.0, steps_trace=tmp_path, slowdowns=(1.0, 3.0), sigma=0.0, by_density=((0.5, 0.5), (1.0, 1.0)))
    assert (made["x"].seconds(0, 2, 1.0), made["y"].seconds(0, 2, 0.5)) == (2.0, 3.0)
    jittered = speeds(["x"], 1, step_s=1.0, steps_trace=None, slowdowns=(1.0,), sigma=0.5, by_density=((1.0, 1.0),))
    assert jittered["x"].seconds(0, 1, 1.0) != jittered["x"].seconds(1, 1, 1.0)
    with pytest.raises(LocalError, match="steps-trace"):
        speeds(["x"], 1, step_s=1.0, steps_trace=tmp_path / "no", slowdowns=(1.0,), sigma=0.0, by_density=((1.0, 1.0),))


def test_attendance_for_all_by_file_and_by_pattern(tmp_path: Path) -> None:
    names = [f"device-{index:04d}" for index in range(12)]
    assert attendances("nightly:22-6", names) == dict.fromkeys(names, nightly(22, 6))
    toml = tmp_path / "who.toml"
    toml.write_text('["device-*"]\nhours = "22-6"\n[3]\njoins_s = 60\nleaves_s = 90.5\n["device-0011"]\nhours = "13.5-17 8-12"\n')
    found = attendances(str(toml), names)
    assert found[names[0]] == nightly(22, 6)
    assert (found[names[3]].joins_s, found[names[3]].leaves_s, found[names[3]].windows_s) == (60.0, 90.5, ())
    assert found[names[11]].windows_s == ((28_800.0, 43_200.0), (48_600.0, 61_200.0))
    assert attendances("nightly:0-24", names) == {}
    table = tmp_path / "who.csv"
    table.write_text("device,hours\n2,0-24\n")
    assert attendances(str(table), names) == {names[2]: Attendance()}
    table.write_text("device,joins_s,leaves_s,hours\n2,60,,\ndevice-000[45],,500,22-6\n")
    found = attendances(str(table), names)
    assert sorted(found) == [names[2], names[4], names[5]]
    assert found[names[5]] == nightly(22, 6, leaves_s=500.0)
    for content, said in (
        ("device\n12\n", "who.csv:2: no device '12'"),
        ("device,hours\n1,22\n", "who.csv:2: '22' is no window of hours; write it as FROM-TO"),
        ("device,hours\n1,8-8\n", "who.csv:2: .*from 8 h to 8 h is no time or all day; write 0-24"),
        ("device,hours\n1,0-24 8-9\n", "who.csv:2: .*the windows 0-24 8-9"),
        ("device,hours\n1,22-25\n", "who.csv:2: .*0..24"),
        ("device,hours\n1,8-12 11-13\n", "who.csv:2: .*apart"),
        ("device,joins_s\n1,soon\n", "who.csv:2"),
        ("device,joins_s,leaves_s\n1,9,9\n", "who.csv:2: .*joins < leaves"),
        ("device,from\n1,9\n", "'from' is none of"),
        ("device,hours\n1\n", "1 cells under 2"),
        ("who\n1\n", "who.csv:1: expected a header"),
        ("", "who.csv:1: expected a header"),
    ):
        table.write_text(content)
        with pytest.raises(LocalError, match=said):
            attendances(str(table), names)
    toml.write_text("device = 1\n")
    for missing in (str(toml), str(tmp_path / "none.csv"), str(tmp_path / "none.toml"), "nightly:22", "always"):
        with pytest.raises(LocalError, match=r"--attend|who\.toml|not readable"):
            attendances(missing, names)


def test_devices_come_late_leave_and_are_slow(task: Path, images: Path, tmp_path: Path) -> None:
    who = tmp_path / "who.csv"
    who.write_text("device,joins_s,leaves_s\n0,20,\n1,,15\n2,1000,\n")
    brisk = {"links": "2000000", "step_s": 0.5, "seconds": 40.0}
    run = spec(images, method="fedasync", attend=str(who), latency=(0.2, 0.1), slowdown=(1.0, 50.0), step_sigma=0.3, **brisk)
    folder = load_task(task)
    present: list[tuple[float, int]] = []
    simulation = Simulation(folder, task_of(folder, {"name": "bars"}, run), run)
    outcome = simulation.run(lambda point: present.append((point.time_s, point.updates)))
    assert simulation.task.fleet.min_devices == 3, "the run begins without those that come later"
    updates = outcome.updates
    assert set(updates) == {f"device-{index:04d}" for index in (0, 1, 3, 4)}
    assert present[0][1] > 0
    always = spec(images, method="fedasync", latency=(0.2, 0.1), slowdown=(1.0, 50.0), step_sigma=0.3, **brisk)
    whole = outcome_of(task, always)
    assert 0 < updates["device-0000"] < whole.updates["device-0000"]
    assert updates["device-0001"] < whole.updates["device-0001"]
    assert outcome_of(task, run).points == outcome.points


def test_really_smaller_models_train_faster(task: Path, images: Path) -> None:
    folder = load_task(task)
    run = spec(images, method="heterofl", clients=5, links="8000000,8000000,8000000,80000,80000", step_s=1.0, seconds=20.0)
    times: dict[str, dict[str, float]] = {}
    for name, more in (("work", {}), ("measured", {"step_by_density": ((0.0, 0.5), (1.0, 1.0))})):
        simulation = Simulation(folder, task_of(folder, {"name": "bars"}, msgspec.structs.replace(run, **more)), run)
        simulation = Simulation(folder, simulation.task, msgspec.structs.replace(run, **more))
        seen = times.setdefault(name, {})
        simulation.world.notes.clear()
        train = simulation.world._train

        def watched(device: str, job: Train, train: object = train, seen: dict[str, float] = seen) -> tuple[float, object]:
            seconds, result = train(device, job)  # type: ignore[operator]  # the world's own trainer
            seen[device] = seconds
            return seconds, result

        simulation.world._train = watched  # type: ignore[assignment]
        simulation.run()
    assert times["work"]["device-0000"] == 3.0
    assert times["work"]["device-0004"] < 1.0
    assert 1.5 <= times["measured"]["device-0004"] < 2.0


def test_mistakes_are_named_with_their_cure(task: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = ["simulate", str(task), "--data-folder", str(images), "--clients", "3", "--seconds", "30", "--out", str(tmp_path / "out")]
    for wrong, said in (
        (["--latency", "slow"], "--latency 'slow': give seconds"),
        (["--latency", "1,2,3"], "--latency"),
        (["--latency=-1"], "--latency"),
        (["--slowdown", "1,0"], "--slowdown '1,0': give how many times"),
        (["--slowdown", "nan"], "--slowdown"),
        (["--outages", "300"], "--outages '300': give mean seconds"),
        (["--outages", "300,0"], "--outages"),
        (["--step-by-density", "0.5"], "--step-by-density"),
        (["--step-by-density", "1=1,0.5=0.4"], "ascending"),
        (["--step-by-density", "2=1"], "above 0 and up to 1"),
        (["--step-by-density", "0=1"], "above 0 and up to 1"),
        (["--step-by-density", "0.5=nan"], "--step-by-density '0.5=nan'"),
        (["--outages", "300,1e10"], "from 0.01 to 1e9"),
        (["--steps-trace", str(tmp_path / "none")], f"--steps-trace {tmp_path / 'none'}: there is no such folder"),
        (["--steps-trace", str(tmp_path), "--step-s", "0.1"], "give one of them"),
        (["--links", f"trace:{tmp_path / 'none'}"], f"--links trace:{tmp_path / 'none'}: there is no such folder"),
        (["--links", "trace:"], "--links trace:: it names no folder"),
        (["--links", f"trace:{task / 'task.toml'}"], "task.toml: this is a file; give a folder"),
        (["--attend", "nightly:22"], "--attend nightly:22: '22' is no window of hours"),
        (["--attend", "nightly:foo"], "--attend nightly:foo: 'foo' is no window of hours"),
        (["--attend", "nightly:"], "it says no hours"),
        (["--clients", "100000"], "take fewer clients, 40 at most"),
        (["--trainer", "tensorflow"], "known are onnxruntime"),
        (["--out", str(task / "task.toml")], "task.toml is a file; name a folder"),
        (["--data", "npz"], "no " + str(images / "train.npz")),
    ):
        assert main([*scenario, *wrong]) in (FAILED, MISUSED), wrong
        assert said in capsys.readouterr().err
    nowhere = tmp_path / "nope" / "data"
    assert main(["simulate", str(task), "--data", "watch", "--data-folder", str(nowhere), "--split", "user"]) == MISUSED
    assert "there is no such folder" in capsys.readouterr().err
    assert not nowhere.parent.exists()


def test_methods_and_settings_that_would_be_another_run_or_the_same_are_refused(
    task: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = ["simulate", str(task), "--data-folder", str(images), "--clients", "3", "--seconds", "30", "--out", str(tmp_path / "out")]
    for wrong, said in (
        (["--set", "model='own.onnx'"], "use another task folder"),
        (["--set", "name='x'"], "a name changes nothing"),
        (["--method", "fedgmr", "--set", "method.name='fedavg'"], "--set method.name: the run is of fedgmr"),
        (["--method", "fedgmr", "--set", "method={name='fedavg'}"], "--set method.name: the run is of fedgmr"),
        (["--method", "fedasync-no-buffer"], "the same as 'fedasync'"),
        (["--method", "fedavg-sync"], "the same as 'fedavg'"),
        (["--method", "fedgmr+restore"], "the same as 'fedgmr'"),
        (["--method", "fiarse+restore-no-buffer-x"], "known are"),
        (["--set", "stop.seconds=10"], "use --seconds"),
        (["--set", "stop={seconds=10}"], "use --seconds"),
        (["--set", "seed=3"], "use --seed"),
        (["--set", "evaluation.data='x.npz'"], "evaluation.data"),
        (["--set", "x=1", "--set", "x.y=2"], "is no table"),
    ):
        assert main([*scenario, *wrong]) in (FAILED, MISUSED), wrong
        assert said in capsys.readouterr().err
    folder = load_task(task)
    stop = task_of(folder, {"name": "bars", "stop": {"accuracy": 0.5}}, spec(images, settings={"stop.aggregations": 7})).stop
    assert (stop.seconds, stop.aggregations, stop.accuracy) == (60.0, 7, None)


def test_data_that_does_not_fit_the_model_names_both(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits"
    assert main(["task", "new", str(folder), "--model", "digits_mlp"]) == 0
    assert main(["simulate", str(folder), "--data-folder", str(images), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "fashion-mnist does not fit the model" in said
    assert "digits" in said
    assert "[batch, 64]" in said
