"""A model on its way into use, with real processes: promoted while `serve` runs, taken by agents, withdrawn, used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from broker_server.broker import Kind
from edge_agent.model_folder import ModelFolder
from export.models import digits_mlp
from export.task import save_model
from tests.testbed.processes import Child, Fleet, task_text

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("used", stop="seconds = 100"), kind="amqtt") as fleet:
        yield fleet


def promote(fleet: Fleet, *options: object) -> Child:
    child = fleet.start(["promote", fleet.run, *options], "promote.log")
    assert child.ended() == 0, child.text()
    return child


def placed(fleet: Fleet, name: str) -> str | None:
    """The hexadecimal digest of the model that a device has in place."""
    current = ModelFolder(fleet.folder / f"{name}.state", "used").current()
    return None if current is None else current.about.digest


def predict(fleet: Fleet, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "predict", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=fleet.folder, check=False, timeout=60)


def a_model_comes_into_use(fleet: Fleet, kind: Kind) -> None:
    serve = fleet.serve()
    fleet.add({"one": 4000.0, "two": 4000.0})
    for name in ("one", "two"):
        fleet.device(name)
    fleet.reach_version(6)

    said = promote(fleet).text()
    assert "a running `regrow serve` publishes it" in said
    good = placed(fleet, "one")
    assert good is not None
    assert good == placed(fleet, "two")
    assert said.count("placed") >= 4  # a line each, and in the table
    before = fleet.version()
    fleet.reach_version(before + 2)  # nobody was disturbed

    bad = fleet.folder / "bad.onnx"
    save_model(digits_mlp(2), bad)  # never trained
    said = promote(fleet, "--model", bad).text()
    assert said.count("kept") >= 4
    assert "worse on this device's validation data" in said
    assert placed(fleet, "one") == placed(fleet, "two") == good
    assert "promotion device=one promotion=2 outcome=kept" in serve.text()

    said = promote(fleet, "--withdraw").text()
    assert "used model 3: withdrawn by" in said
    assert said.count("placed") >= 4
    assert placed(fleet, "one") == good
    said = promote(fleet, "--withdraw").text()
    assert said.count("removed") >= 4
    assert placed(fleet, "one") is None

    assert serve.stop() == 0
    said = promote(fleet, "--port", fleet.port, "--broker-kind", kind).text()
    assert "used model 5: promoted by" in said
    assert said.count("placed") >= 4
    assert placed(fleet, "one") is not None

    listed = fleet.start(["runs", "--runs", fleet.runs], "runs.log")
    assert listed.ended() == 0
    assert "5: 2 of 2" in listed.text()


def test_a_model_comes_into_use(fleet: Fleet) -> None:
    a_model_comes_into_use(fleet, "amqtt")
    done = predict(fleet, "one.state", "--data", "one.npz")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 200
    assert "accuracy" in done.stderr
    data = np.load(fleet.folder / "one.npz")
    model = fleet.folder / "one.state" / "models" / "used" / "current" / "model.onnx"
    scores = onnxruntime.InferenceSession(model).run(None, {"x": data["x"]})[0]
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == scores.argmax(axis=1).tolist()
