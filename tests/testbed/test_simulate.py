"""Simulated runs on a small synthetic image set: deterministic, and the commands over them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from broker_server.runs import load_task
from cli.main import MISUSED, main
from cli.scenario import say_replaced
from regrow.errors import LocalError
from testbed.grid import parse_settings
from testbed.links import Constant, WithOutages
from testbed.outcome import Spec
from testbed.simulate import Simulation, links_of, task_of
from tests.testbed.bars import outcome_bytes, spec


def test_the_same_specification_gives_the_same_run_to_the_bit(task: Path, images: Path) -> None:
    first = outcome_bytes(task, spec(images, method="fedgmr"))
    assert first == outcome_bytes(task, spec(images, method="fedgmr"))
    assert first != outcome_bytes(task, spec(images, method="fedgmr", seed=2))


@pytest.mark.parametrize(
    "method", ["fedavg", "fedasync", "fedgmr", "fiarse+restore", "heterofl", "fedrolex+restore", "fjord+async", "subfedavg"]
)
def test_methods_train_over_the_papers_links(task: Path, images: Path, method: str) -> None:
    points: list[float] = []
    folder = load_task(task)
    run = spec(images, method=method, seconds=120.0)
    outcome = Simulation(folder, task_of(folder, {"name": "bars"}, run), run).run(lambda point: points.append(point.time_s))
    assert points == [40.0, 80.0]
    assert outcome.reason == "120 s have passed"
    last = outcome.points[-1]
    assert last.updates == sum(outcome.updates.values()) > 5
    assert last.bytes_up > 0 < last.bytes_down
    assert outcome.rejected == 0
    assert len(outcome.per_class) == 10
    first_densities = sorted(first for first, _ in outcome.densities.values())
    full = method in ("fedavg", "fedasync")
    assert first_densities == [1.0] * 5 if full else first_densities[0] <= 0.1
    if method not in ("fedavg", "heterofl", "subfedavg"):  # which may still wait for their slowest device
        assert outcome.final_accuracy > 0.3


def test_while_nobody_trains_the_whole_model_the_largest_part_that_is_trained_is_scored(task: Path, images: Path) -> None:
    folder = load_task(task)
    settings = {"method.ladder": [0.1, 1.0], "method.full_density_bps": 1e12, "restoration.full_model_every": 0}
    run = spec(images, method="fedgmr-no-restore", links="60000", settings=settings)
    simulation = Simulation(folder, task_of(folder, {"name": "bars"}, run), run)
    outcome = simulation.run()
    assert set(outcome.densities.values()) == {(0.1, 0.1)}
    kept = round(0.1 * folder.layout.size)
    ledger = simulation._ledger
    assert np.count_nonzero(ledger.trained_weights) <= kept
    score = simulation._trainer.evaluate(ledger.trained_weights, simulation._test.x, simulation._test.y)
    assert outcome.final_accuracy == score.accuracy
    # Beyond the part, the ledger still has what the model began with.
    beyond = ledger.order.coordinates[kept:]
    assert ledger.flat_weights[beyond].tobytes() == folder.initial[beyond].tobytes()


def test_settings_stand_above_the_method_and_mistakes_are_named(task: Path, images: Path) -> None:
    folder = load_task(task)
    assert parse_settings(["method.mixing=0.25", "wire.up='float32'"]) == {"method.mixing": 0.25, "wire.up": "float32"}
    settings = {"method.mixing": 0.25}
    assert task_of(folder, {"name": "bars"}, spec(images, method="fedasync", settings=settings)).method.mixing == 0.25
    own = {"name": "bars", "method": {"name": "fedasync", "mixing": 0.1}}
    assert task_of(folder, own, spec(images)).method.mixing == 0.1
    assert task_of(folder, own, spec(images, method="fedasync")).method.mixing == 0.6
    for wrong in ("nonsense", "a=", "=3"):
        with pytest.raises(LocalError, match="KEY=VALUE"):
            parse_settings([wrong])
    with pytest.raises(LocalError, match="mixin"):
        task_of(folder, {"name": "bars"}, spec(images, settings={"method.mixin": 1}))
    with pytest.raises(LocalError, match="known are fedgmr"):
        task_of(folder, {"name": "bars"}, spec(images, method="fedsgd"))


def test_what_a_method_by_name_takes_the_place_of_is_said(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dataclasses.replace(load_task(task), path=tmp_path)
    for text, said in (
        ('[method]\nname = "fedgmr"', ""),
        ("[method]\neta_g = 1.5\n[trigger]\ncount = 2", "[method] eta_g, [trigger] count"),
    ):
        (tmp_path / "task.toml").write_text(f'name = "bars"\n{text}\n')
        say_replaced(folder)
        err = capsys.readouterr().err
        assert said in err
        assert bool(err) == bool(said)


def test_links_by_name_by_rate_and_by_trace(tmp_path: Path) -> None:
    rates = links_of(Spec(clients=4, links="8000,4000"), 1000)
    assert [up for up, _ in rates] == [Constant(8000.0), Constant(8000.0), Constant(4000.0), Constant(4000.0)]
    (tmp_path / "a.csv").write_text("seconds,bits_per_second\n0,1000\n10,2000\n")
    assert len(links_of(Spec(clients=3, links=f"trace:{tmp_path}"), 1000)) == 3
    shaky = links_of(Spec(clients=1, links="8000", outages=(30.0, 5.0)), 1000)
    assert isinstance(shaky[0][0], WithOutages)
    for wrong in ("fast", f"trace:{tmp_path / 'none'}"):
        with pytest.raises(LocalError, match="links"):
            links_of(Spec(links=wrong), 1000)


def test_the_command(task: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = [
        str(task),
        "--data-folder",
        str(images),
        "--clients",
        "3",
        "--seconds",
        "30",
        "--points",
        "2",
        "--set",
        "training.local_steps=2",
    ]
    out = ["--out", str(tmp_path / "one")]
    assert main(["simulate", *scenario, *out, "--method", "fedasync", "--method", "fedfix", "--method", "fedasync"]) == 0
    assert len(list((tmp_path / "one").glob("fed*.json"))) == 2
    said = capsys.readouterr()
    assert said.out.count("after 30 virtual") == 2, "each method once, and nothing past the end"
    assert "nothing was aggregated" not in said.err
    assert "a method by name replaces [method]" not in said.err
    short = [*scenario[:5], "--seconds", "2", "--points", "1", "--step-sigma", "0", *out]
    assert main(["simulate", *short]) == 0
    said = capsys.readouterr()
    assert "task (fedgmr-pace) on fashion-mnist" in said.out
    assert "regrow: task (fedgmr-pace): nothing was aggregated, so this is the untrained model: " in said.err
    assert main(["simulate", *scenario, "--split", "random"]) == MISUSED
    assert main(["simulate", *scenario, "--outages", "soon"]) == MISUSED
